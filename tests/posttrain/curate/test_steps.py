"""The config's list of steps: read strictly, told with the whole path, the same however it is written."""

import sys
from collections.abc import Sequence
from typing import Any

import pytest

from posttrain.config import identity
from posttrain.curate.steps import STEPS, check_inputs, list_steps, parse_steps
from posttrain.error import UserError
from stages.curate import CHEAP_STEPS, CurateConfig

AT = "stages.curate.steps"

WRONG: list[tuple[Any, str]] = [
    (5, f"{AT}: must be a list of steps, such as [normalize, {{length: {{max_answer_words: 500}}}}], got 5"),
    ([], f"{AT}: must be a list of steps, such as [normalize, {{length: {{max_answer_words: 500}}}}], got an empty list"),
    ({"length": {}}, f"{AT}: must be a list of steps"),
    (["normalise"], f"{AT}[0]: 'normalise' is no step; did you mean 'normalize'?"),
    ([["length"]], f"{AT}[0]: must be the name of a step, or one name with its settings, got a list of 1"),
    (["length", 5], f"{AT}[1]: must be the name of a step, or one name with its settings, got 5"),
    ([{"length": {}, "pii": {}}], f"{AT}[0]: must be the name of a step, or one name with its settings, got an object with length, pii"),
    (
        ["normalize", "length", "pii", {"near_duplicates": {"treshold": 0.5}}],
        f"{AT}[3].near_duplicates.treshold: unknown key; did you mean 'threshold'?",
    ),
    ([{"near_duplicates": {"threshold": "0.5"}}], f"{AT}[0].near_duplicates.threshold: input should be a valid number, got '0.5'"),
    ([{"near_duplicates": {"threshold": 2}}], f"{AT}[0].near_duplicates.threshold: input should be less than or equal to 1, got 2"),
    ([{"length": 5}], f"{AT}[0].length: input should be a valid dictionary or instance of Length, got 5"),
    ([{"length": {"max_answer_words": 1, "min_answer_words": 2}}], f"{AT}[0].length.max_answer_words: 1 is below min_answer_words, 2"),
    ([{"refusals": {"patterns": ["("]}}], f"{AT}[0].refusals.patterns: '(' is not a regular expression"),
    (["length", "pii", "length"], f"{AT}[2]: length with the same settings is {AT}[0] already; leave it out here"),
    (["length", {"length": {"min_prompt_words": 0}}], f"{AT}[1]: length with the same settings is {AT}[0] already"),
]


@pytest.mark.parametrize("listed, message", WRONG, ids=[message[:70] for _, message in WRONG])
def test_a_wrong_list_is_told_with_the_whole_path(listed: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        CurateConfig(steps=listed).check(1, "stages.curate")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("written", [["length"], [{"length": {}}], [{"length": None}], [{"length": {"min_prompt_words": 0}}]])
def test_a_step_is_the_same_however_its_defaults_are_written(written: Any) -> None:
    assert identity(CurateConfig(steps=written), "stages.curate") == {"steps": ["length"]}


def test_settings_and_order_and_seed_bear_identity() -> None:
    one, two = [{"length": {"max_answer_words": 9}}, "pii"], ["pii", {"length": {"max_answer_words": 9}}]
    assert identity(CurateConfig(steps=one, seed=3), "x") == {"seed": 3, "steps": one}
    assert identity(CurateConfig(steps=two), "x") == {"steps": two}


def test_the_config_of_an_attempt_is_read_back_as_it_was() -> None:
    config = CurateConfig(steps=["pii", {"length": {"max_answer_words": 9}}])
    assert CurateConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_step_may_stand_twice_with_other_settings() -> None:
    listed = [{"near_duplicates": {"by": "prompt"}}, "near_duplicates"]
    assert list_steps(parse_steps(listed, AT)) == listed


def test_the_default_steps_are_what_they_would_be_if_written() -> None:
    assert CurateConfig().steps == list_steps(parse_steps(CHEAP_STEPS, AT)) == CHEAP_STEPS


def test_every_step_of_the_table_is_there_and_says_what_it_is() -> None:
    for name in STEPS:
        module, _, cls = STEPS[name].partition(":")
        step = getattr(__import__(module, fromlist=[cls]), cls)
        assert step.name == name
        assert step.__doc__
        assert all(field.description for field in step.model_fields.values()), name


def test_reading_a_config_imports_nothing_heavy() -> None:
    import subprocess

    code = "import sys; from stages.curate import *; CurateConfig().check(1, 'x'); CurateConfig(steps=['language', 'pii']).check(1, 'x')"
    code += "; print([name for name in ('torch', 'numpy', 'ftfy', 'rensa', 'phonenumbers', 'py3langid') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    "listed, wired, message",
    [
        (["contamination"], ["data"], "stages.c.inputs.decontaminate: missing, and the step contamination reads it"),
        (["length", "reward"], ["data"], "stages.c.inputs.reward: missing, and the step reward reads it"),
        (["length"], ["data", "reward"], "stages.c.inputs.reward: no step reads it; leave it out, or list one that does: reward"),
        (["length"], ["data", "decontaminate"], "stages.c.inputs.decontaminate: no step reads it; leave it out, or list one that does: co"),
    ],
)
def test_inputs_are_those_that_the_steps_read(listed: Sequence[str], wired: Sequence[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_inputs(parse_steps(listed, AT), wired, "stages.c")
    assert str(caught.value).startswith(message)


def test_inputs_that_fit_are_accepted() -> None:
    check_inputs(parse_steps(["length"], AT), ["data"], "stages.c")
    check_inputs(parse_steps(["contamination"], AT), ["data", "decontaminate"], "stages.c")
