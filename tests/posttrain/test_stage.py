"""A stage declares what it reads and writes, and says so in its docstring."""

import ast
from pathlib import Path

import pytest

from posttrain.error import UserError
from posttrain.stage import load_stage
from stages import STAGES

FOLDER = Path(__file__).parents[2] / "stages"


def test_the_folder_of_stages_is_the_table_of_stages() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} - {"__init__"} == set(STAGES)
    for kind, module in STAGES.items():
        assert module == f"stages.{kind}"
        assert load_stage(kind, "").kind == kind


@pytest.mark.parametrize("kind", list(STAGES))
def test_a_stage_says_in_its_first_line_what_it_does_and_below_what_it_reads_and_writes(kind: str) -> None:
    stage = load_stage(kind, "")
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{kind}.py").read_text())) or ""
    assert stage.summary == docstring.splitlines()[0]
    assert stage.summary.lower().startswith(f"{kind}:")
    assert all(role in docstring for role in stage.inputs)
    assert "Reads:" in docstring
    assert "Writes:" in docstring


@pytest.mark.parametrize("kind", list(STAGES))
def test_the_config_of_a_stage_is_frozen_and_right_by_default(kind: str) -> None:
    config = load_stage(kind, "").config()
    config.check(1, f"stages.{kind}")
    with pytest.raises(ValueError, match="frozen"):
        config.num_processes = 2


def test_an_unknown_kind_names_the_path_and_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^stages.x.kind: 'sfft' is no kind of stage; did you mean 'sft'\?$"):
        load_stage("sfft", "stages.x.kind")
