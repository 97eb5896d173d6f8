"""Killed at any moment and begun again, a run publishes the very bytes of one that nobody disturbed."""

from pathlib import Path

import pytest

from tests.faults.harness import CHAINS
from tests.faults.kills import Whole, draw, run_point, run_whole

SEED = 1
POINTS = range(10)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    """An undisturbed run of each variant."""
    return {name: run_whole(make(tmp_path_factory.mktemp(name))) for name, make in CHAINS.items()}


@pytest.mark.parametrize("number", POINTS)
def test_a_run_that_is_killed_comes_out_as_if_it_had_not_been(number: int, whole: dict[str, Whole], tmp_path: Path) -> None:
    variant = list(CHAINS)[number % len(CHAINS)]
    report = run_point(tmp_path / "point", number, variant, draw(SEED, number, whole[variant].seconds), whole[variant])
    assert not report.problems, report
