"""What an evaluation says of policies: every value with an interval, every difference with p, and what it could not have seen."""

import re

import numpy as np
import pytest

from posttrain.metrics.evidence import adjust
from posttrain.metrics.measured import Measured
from posttrain.metrics.passed import detectable_passed, p_value_passed
from posttrain.metrics.table import compare_measured, make_table
from posttrain.report.read import read_cell

NUM_ROWS = 40


def measured(scores, weights=None):
    weights = [1.0] * len(scores) if weights is None else weights
    rows = range(len(scores))
    return Measured(float(np.average(scores, weights=weights)), dict(zip(rows, scores, strict=True)), dict(zip(rows, weights, strict=True)))


@pytest.fixture
def three():
    """Of three policies whether 40 rows pass, and their nll on the same rows, of unequal length."""
    rng = np.random.default_rng(0)
    hard, tokens = rng.normal(3, 1, NUM_ROWS), [float(count) for count in rng.integers(1, 9, NUM_ROWS)]
    passed = {"base": [0.0] * NUM_ROWS, "sft": [1.0] * 20 + [0.0] * 20, "dpo": [0.0] * 39 + [1.0]}
    gains = {"base": 0.0, "sft": -1.0, "dpo": 0.0}
    return {
        name: {"passed": measured(passed[name]), "nll": measured(list(hard + rng.normal(gains[name], 0.1, NUM_ROWS)), tokens)}
        for name in passed
    }


def test_every_value_has_an_interval_and_every_difference_one_and_p(three):
    results = compare_measured(three, confidence=0.95, seed=0)
    assert [(result["metric"], result["policy"]) for result in results] == [(m, p) for m in ("passed", "nll") for p in three]
    assert all(result["low"] <= result["value"] <= result["high"] for result in results)
    assert [result["policy"] for result in results if "difference" not in result] == ["base", "base"]
    differences = [result["difference"] for result in results if "difference" in result]
    assert differences[0]["p"] == pytest.approx(2 / 2**20) and differences[1]["p"] == 1.0, "of 20 rows that one of them passes, and of one"
    assert differences[0]["p"] == p_value_passed(
        list(three["base"]["passed"].scores.values()), list(three["sft"]["passed"].scores.values())
    )
    assert [each["p_adjusted"] for each in differences] == adjust([each["p"] for each in differences])


def test_a_cell_of_the_table_is_read_as_what_it_says(three):
    results = compare_measured(three, confidence=0.95, seed=0)
    table = make_table(results, list(three), confidence=0.95)
    assert table["columns"] == ["metric", "rows", "base", "sft", "dpo"]
    assert [row[:2] for row in table["rows"]] == [["passed", "40"], ["nll", "40"]]
    by_place = {(result["metric"], result["policy"]): result for result in results}
    for name, _, *cells in table["rows"]:
        for policy, text in zip(three, cells, strict=True):
            cell, result = read_cell(text), by_place[name, policy]
            told = result.get("difference") or {**result, "value": None}
            assert (cell.value, cell.difference) == pytest.approx((result["value"], told["value"]), abs=6e-4)
            assert (cell.low, cell.high) == pytest.approx((told["low"], told["high"]), abs=6e-4)
            assert cell.p == ("" if policy == "base" else "<0.001" if policy == "sft" else f"{told['p_adjusted']:.3f}")


def test_the_notes_say_what_so_few_rows_cannot_see(three):
    legend, limits = make_table(compare_measured(three, confidence=0.95, seed=0), list(three), confidence=0.95)["notes"]
    assert legend.endswith("corrected for all 4 differences here (Holm)")
    points = 100 * detectable_passed([0.0] * NUM_ROWS, [1.0] * 20 + [0.0] * 20, confidence=0.95)
    assert limits.startswith(f"40 rows cannot see a difference under {points:.1f} points of passed or 0.0"), (
        "of the policy with more spread"
    )
    assert re.search(r" or 0\.\d{3} of nll \(80% power\)$", limits)


def test_one_policy_alone_is_compared_with_nothing(three):
    results = compare_measured({"sft": three["sft"]}, confidence=0.9, seed=0)
    table = make_table(results, ["sft"], confidence=0.9)
    assert table["notes"] == ["in brackets: of sft its interval (90%)"]
    assert all(read_cell(row[2]).low is not None and read_cell(row[2]).difference is None for row in table["rows"])


def test_what_cannot_be_compared_is_shown_without_a_difference(three):
    three["dpo"]["nll"] = measured([1.0] * NUM_ROWS, [1.0] * NUM_ROWS)
    del three["base"]["passed"]
    table = make_table(compare_measured(three, confidence=0.95, seed=0), list(three), confidence=0.95)
    cells = {name: cells for name, _, *cells in table["rows"]}
    assert cells["nll"][2] == "1.000 (other tokens than the baseline's: not comparable)"
    assert cells["passed"][0] == "-" and read_cell(cells["passed"][1]).difference is None
    assert "all" not in table["notes"][0], "one difference alone is left as it is"


def test_a_single_row_has_values_and_no_claims():
    one = {name: {"nll": measured([value], [3.0])} for name, value in (("a", 2.0), ("b", 1.5))}
    table = make_table(compare_measured(one, confidence=0.95, seed=0), list(one), confidence=0.95)
    assert table["rows"] == [["nll", "1", "2.000", "1.500 (-0.500)"]]
    assert len(table["notes"]) == 1
