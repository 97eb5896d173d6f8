"""A stage that was cut off goes on on any number of ranks, and under any stage of ZeRO. All cells: `python -m tests.faults.matrix`."""

from pathlib import Path

import pytest

from tests.faults.matrix import Cell, Matrix, Way, is_right


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """The runs that the cells share."""
    here: Path = tmp_path_factory.mktemp("matrix")
    return Matrix(here)


@pytest.mark.parametrize(
    "cell",
    [
        Cell("sft", "full", Way(0, 2), Way(0, 2)),
        Cell("sft", "full", Way(0, 2), Way(0, 1)),
        Cell("sft", "full", Way(3, 2), Way(3, 2)),
        Cell("sft", "full", Way(3, 2), Way(3, 4)),
        Cell("sft", "full", Way(3, 2), Way(1, 2)),
        Cell("dpo", "full", Way(2, 2), Way(2, 2)),
        Cell("dpo", "full", Way(2, 2), Way(2, 1)),
        Cell("dpo", "full", Way(2, 2), Way(0, 2)),
        Cell("dpo", "lora", Way(1, 1), Way(1, 2)),
        Cell("dpo", "lora with dropout", Way(3, 2), Way(3, 2)),
        Cell("reward", "lora", Way(3, 2), Way(3, 2)),
        Cell("orpo", "full", Way(3, 2), Way(3, 1)),
        Cell("kto", "full", Way(0, 2), Way(0, 1)),
        Cell("select", "full", Way(3, 2), Way(3, 2)),
    ],
    ids=str,
)
def test_a_stage_goes_on_on_other_ranks_as_if_it_had_not_been_cut_off(cell: Cell, matrix: Matrix) -> None:
    compared = matrix.compare(cell)
    assert is_right(cell, compared), compared
