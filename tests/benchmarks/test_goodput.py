"""Goodput in closed form is what Daly published, and what a simulation that knows no formula comes to."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, stats

from benchmarks.goodput import DAY, HOUR, RECORDS, Run, daly, goodput, simulate, slowest, state_of, young
from tests.conftest import REPOSITORY

MINUTE = 60.0
DALY = Run(mttf_s=6 * HOUR, held_s=5 * MINUTE, restart_s=10 * MINUTE)
"""Daly, 2006, figure 4."""


@pytest.mark.parametrize(("mttf_s", "minutes"), [(24 * HOUR, 117), (6 * HOUR, 57), (15 * MINUTE, 9.1)])
def test_the_best_interval_is_the_one_that_daly_published(mttf_s: float, minutes: float) -> None:
    """The captions of figures 3 to 5, for 5 minutes a checkpoint."""
    assert daly(replace(DALY, mttf_s=mttf_s)) / MINUTE == pytest.approx(minutes, rel=0.006)


@pytest.mark.parametrize("mttf_s", [24 * HOUR, 6 * HOUR, HOUR])
def test_no_other_interval_is_better_than_the_best(mttf_s: float) -> None:
    run = replace(DALY, mttf_s=mttf_s)
    others = np.linspace(0.2, 5, 400) * daly(run)
    assert goodput(run, daly(run)) >= max(goodput(run, interval) for interval in others) * (1 - 1e-3)
    assert goodput(run, daly(run)) > goodput(run, young(run)) * (1 - 1e-12)


@pytest.mark.parametrize(
    ("run", "interval_s"),
    [
        (DALY, 20 * MINUTE),
        (DALY, daly(DALY)),
        (DALY, 4 * HOUR),
        (replace(DALY, mttf_s=24 * HOUR), daly(replace(DALY, mttf_s=24 * HOUR))),
        (replace(DALY, written_s=30 * MINUTE), HOUR),
        (replace(DALY, written_s=HOUR, held_s=MINUTE), 20 * MINUTE),
    ],
    ids=["often", "best", "rarely", "a day between failures", "written later", "several being written"],
)
def test_a_simulated_run_takes_as_long_as_the_closed_form_says(run: Run, interval_s: float) -> None:
    generator = np.random.default_rng(0)
    found = [simulate(run, interval_s, 100 * run.mttf_s, generator) for _ in range(30)]
    error = np.std(found, ddof=1) / np.sqrt(len(found))
    assert error < 0.005
    assert np.mean(found) == pytest.approx(goodput(run, interval_s), abs=4 * error + 0.002)


def test_without_failures_only_checkpoints_cost_time() -> None:
    run = Run(mttf_s=1e15, held_s=1.0)
    assert simulate(run, 9.0, 900.0, np.random.default_rng(0)) == pytest.approx(0.9)
    assert goodput(replace(run, mttf_s=1e9), 9.0) == pytest.approx(0.9)


def test_where_all_wait_for_the_slowest_a_step_is_longer_by_the_largest_of_normal_numbers() -> None:
    """The expected largest of N, by its integral."""
    largest, _ = integrate.quad(lambda x: x * 1000 * stats.norm.pdf(x) * stats.norm.cdf(x) ** 999, -10, 10)
    assert slowest(1000, 0.05, np.random.default_rng(0)) == pytest.approx(0.05 * largest, rel=0.01)


def test_the_page_says_what_the_formulas_give() -> None:
    page = Path(REPOSITORY, "docs", "scale.md").read_text(encoding="utf-8")
    for record in RECORDS:
        run = Run(record.gpu_mttf_s / 1000, **state_of(1000))
        cells = [f"{record.gpu_mttf_s / DAY / 365:.1f}", f"{run.mttf_s / HOUR:.1f}"]
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {record.name} | {' | '.join(cells)} |")]
        assert f"| {goodput(run, 30 * MINUTE):.1%} | {goodput(run, 3 * HOUR):.1%} |" in row
