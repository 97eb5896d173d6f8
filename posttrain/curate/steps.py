"""The table of curation steps, and the config's list of them: from names and settings to checked steps, in order."""

import importlib
from collections.abc import Collection, Sequence
from typing import Any

from posttrain.config import identity, nearest, validate
from posttrain.curate.step import Step
from posttrain.data.json_text import show
from posttrain.error import UserError

STEPS = {
    "normalize": "posttrain.curate.text:Normalize",
    "language": "posttrain.curate.text:Language",
    "length": "posttrain.curate.text:Length",
    "refusals": "posttrain.curate.answers:Refusals",
    "boilerplate": "posttrain.curate.answers:Boilerplate",
    "placeholders": "posttrain.curate.answers:Placeholders",
    "markup": "posttrain.curate.answers:Markup",
    "pii": "posttrain.curate.pii:Pii",
    "exact_duplicates": "posttrain.curate.duplicates:ExactDuplicates",
    "near_duplicates": "posttrain.curate.duplicates:NearDuplicates",
    "contamination": "posttrain.curate.contamination:Contamination",
    "quality": "posttrain.curate.quality:Quality",
    "reward": "posttrain.curate.quality:Reward",
    "judge": "posttrain.curate.judge:Judge",
    "diversity": "posttrain.curate.diversity:Diversity",
    "mixture": "posttrain.curate.mixture:Mixture",
}
"""Name to class, imported when a config lists it. A new step is one class and one line here."""

Listed = str | dict[str, dict[str, Any]]
"""An entry of the config's list: the name of a step, or its name with settings."""


def step_classes() -> dict[str, type[Step]]:
    """All steps, by name."""
    return {name: _load(name) for name in STEPS}


def parse_steps(listed: object, at: str) -> list[Step]:
    """The steps that a config lists, in order. Raises `UserError` naming the place under `at`."""
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{at}: must be a list of steps, such as [normalize, {{length: {{max_answer_words: 500}}}}], got {show(listed)}")
    steps: list[Step] = []
    for position, entry in enumerate(listed):
        step = _parse(entry, f"{at}[{position}]")
        if step in steps:
            before = f"{at}[{steps.index(step)}]"
            raise UserError(f"{at}[{position}]: {step.name} with the same settings is {before} already; leave it out here")
        steps.append(step)
    return steps


def list_steps(steps: Sequence[Step]) -> list[Listed]:
    """The shortest config that gives these steps, which is the same however they were written."""
    listed: list[Listed] = []
    for step in steps:
        settings = step.model_dump(mode="json", exclude_defaults=True)
        listed.append({step.name: settings} if settings else step.name)
    return listed


def identify_steps(steps: Sequence[Step], at: str) -> list[Listed]:
    """What of these steps changes the bytes of an output, input files by their content. Raises `UserError` under `at`."""
    listed: list[Listed] = []
    for position, step in enumerate(steps):
        settings = identity(step, f"{at}[{position}].{step.name}")
        listed.append({step.name: settings} if settings else step.name)
    return listed


def check_inputs(steps: Sequence[Step], wired: Collection[str], at: str) -> None:
    """Refuse a step without the input that it reads, and an optional input that no step reads. Raises `UserError`."""
    for step in steps:
        for role in step.reads:
            if role not in wired:
                raise UserError(f"{at}.inputs.{role}: missing, and the step {step.name} reads it; name one, or leave the step out")
    read = {"data", *(role for step in steps for role in step.reads)}
    for role in wired:
        if role not in read:
            readers = [name for name in STEPS if role in _load(name).reads]
            raise UserError(f"{at}.inputs.{role}: no step reads it; leave it out, or list one that does: {', '.join(readers)}")


def _parse(entry: object, at: str) -> Step:
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, settings),) = entry.items()
    elif isinstance(entry, str):
        name, settings = entry, {}
    else:
        raise UserError(f"{at}: must be the name of a step, or one name with its settings, got {show(entry)}")
    if name not in STEPS:
        raise UserError(f"{at}: {name!r} is no step; {nearest(str(name), list(STEPS))}")
    return validate(_load(name), {} if settings is None else settings, f"{at}.{name}")


def _load(name: str) -> type[Step]:
    module, _, cls = STEPS[name].partition(":")
    step: type[Step] = getattr(importlib.import_module(module), cls)
    assert step.name == name, f"the table has {step.name} as {name}"
    return step
