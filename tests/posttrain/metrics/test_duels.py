"""Win rates against scipy's and scikit-learn's figures, against enumeration, and as evaluations and gates have them."""

from itertools import product

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binom, binomtest, multinomial

from posttrain.metrics.duels import control_length, interval_won, p_value_won, win_rate
from posttrain.metrics.measured import bounds_of, measure_results
from posttrain.metrics.table import compare_measured, make_table


def outcomes_of(won: int, tied: int, lost: int) -> list[float]:
    return [1.0] * won + [0.5] * tied + [0.0] * lost


def test_a_tie_counts_half():
    assert win_rate(outcomes_of(3, 2, 1)) == pytest.approx(4 / 6)
    assert interval_won(outcomes_of(3, 2, 1), confidence=0.95).mean == pytest.approx(4 / 6)


def test_without_a_tie_interval_and_p_are_those_of_the_binomial_distribution():
    reference = binomtest(31, 45)
    limits = reference.proportion_ci(0.9, method="exact")
    found = interval_won(outcomes_of(31, 0, 14), confidence=0.9)
    assert (found.low, found.high) == pytest.approx((limits.low, limits.high))
    assert p_value_won(outcomes_of(31, 0, 14)) == pytest.approx(reference.pvalue)


def test_p_is_that_of_the_sign_test_which_ties_leave_out():
    assert p_value_won(outcomes_of(31, 100, 14)) == pytest.approx(binomtest(31, 45).pvalue)
    assert p_value_won(outcomes_of(0, 9, 0)) == 1


def test_the_interval_of_ties_alone_is_not_certain():
    found = interval_won(outcomes_of(0, 10, 0), confidence=0.95)
    assert found.low < 0.4 and found.high > 0.6 and found.mean == 0.5


@pytest.mark.parametrize("chances", [(0.5, 0.1, 0.4), (0.3, 0.6, 0.1), (0.05, 0.9, 0.05), (0.2, 0.3, 0.5), (0.9, 0.08, 0.02)])
def test_each_limit_is_on_the_wrong_side_of_the_win_rate_in_one_of_twenty_draws_at_most(chances: tuple[float, float, float]):
    num_rows, truth = 20, chances[0] + chances[1] / 2
    too_high = too_low = 0.0
    for won, tied in product(range(num_rows + 1), repeat=2):
        if (lost := num_rows - won - tied) >= 0:
            found = interval_won(outcomes_of(won, tied, lost), confidence=0.9)
            chance = float(multinomial.pmf([won, tied, lost], num_rows, chances))
            too_high += chance * (found.low > truth)
            too_low += chance * (found.high < truth)
    assert 0 < max(too_high, too_low) <= 0.05


# --- length ----------------------------------------------------------------------------------------------------------


def draw(num_rows: int, *, even: float, by_length: float, seed: int) -> tuple[list[float], list[float]]:
    """Duels that are decided by length, and beyond it by a logit of `even`; one in five is a tie."""
    rng = np.random.default_rng(seed)
    longer = rng.normal(60, 200, num_rows)
    won = (rng.random(num_rows) < expit(even + by_length * np.tanh(longer / longer.std()))).astype(float)
    won[rng.random(num_rows) < 0.2] = 0.5
    return list(won), list(longer)


def test_the_length_controlled_win_rate_is_that_of_scikit_learns_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    won, longer = draw(150, even=-0.4, by_length=1.5, seed=0)
    terms = np.tanh(np.array(longer) / np.std(longer))[:, None]
    # A tie is half a row that is won, and half a row that is lost.
    model = linear_model.LogisticRegression(C=3.0**2, tol=1e-10, max_iter=10_000)
    model.fit(np.concatenate([terms, terms]), [1] * 150 + [0] * 150, sample_weight=[*won, *(1 - each for each in won)])
    rate, _ = control_length(won, longer)
    assert rate == pytest.approx(float(expit(model.intercept_[0])), abs=1e-6)
    assert rate < win_rate(won) - 0.03, "the longer answers won by their length"


def test_a_judge_that_goes_by_length_alone_finds_no_policy_better():
    longer = [float(number) for number in range(-20, 60)]
    won = [float(each > 0) if each else 0.5 for each in longer]
    assert win_rate(won) > 0.7
    rate, _ = control_length(won, longer)
    assert rate == pytest.approx(0.5, abs=0.05)
    assert control_length(won[:41], longer[:41])[0] == pytest.approx(0.5, abs=1e-6), "as long as often as short: by symmetry"


def test_where_lengths_do_not_differ_or_all_is_won_it_is_the_win_rate():
    assert control_length(outcomes_of(3, 2, 1), [7.0] * 6)[0] == pytest.approx(4 / 6)
    assert control_length([1.0, 1.0], [5.0, -3.0]) == (1.0, [1.0, 1.0])


def test_what_its_interval_is_drawn_from_has_its_mean_and_spreads_as_the_jackknife_does():
    won, longer = draw(80, even=0.3, by_length=1.0, seed=1)
    rate, drawn = control_length(won, longer)
    assert np.mean(drawn) == pytest.approx(rate, abs=1e-8)
    without = [control_length(won[:row] + won[row + 1 :], longer[:row] + longer[row + 1 :])[0] for row in range(80)]
    pseudo = 80 * rate - 79 * np.array(without)
    assert np.std(drawn) == pytest.approx(np.std(pseudo), rel=0.05)
    assert np.corrcoef(drawn, pseudo)[0, 1] > 0.99


# --- in an evaluation ------------------------------------------------------------------------------------------------


def duel(row: int, first: float | None, second: float | None, answer: str = "yes", baseline: str = "no") -> dict[str, object]:
    outcome = None if None in (first, second) else first if first == second else 0.5
    return {"row": row, "measure": "duel", "answer": answer, "baseline": baseline, "outcome": outcome, "verdicts": [first, second]}


def test_what_the_judge_says_twice_becomes_four_metrics():
    results = [duel(0, 1.0, 1.0), duel(1, 1.0, 0.0), duel(2, 0.0, 0.0), duel(3, 1.0, None), duel(4, 1.0, 1.0)]
    same = {"row": 5, "measure": "duel", "answer": "yes", "baseline": "yes", "outcome": 0.5}
    found = measure_results([*results, same])
    assert {name: measured.value for name, measured in found.items() if name != "length_controlled_win_rate"} == {
        "win_rate": (1 + 0.5 + 0 + 1 + 0.5) / 5,
        "inconsistent_verdicts": 1 / 4,
        "unread_verdicts": 1 / 5,
    }
    assert list(found["win_rate"].scores) == [0, 1, 2, 4, 5], "the row that could not be read is left out"


def test_rows_without_any_verdict_have_no_win_rate():
    assert list(measure_results([duel(0, None, 1.0)])) == ["unread_verdicts"]


def test_what_counts_is_by_how_much_an_answer_is_longer_than_the_other_one():
    won = [float(row > 11) for row in range(32)]
    as_much = [duel(row, won[row], won[row], answer="x" * (10 + row), baseline="x" * (3 + row)) for row in range(32)]
    assert measure_results(as_much)["length_controlled_win_rate"].value == pytest.approx(20 / 32)
    more_and_more = [{**result, "baseline": "x" * 26} for result in as_much]
    reference, _ = control_length(won, [row - 16.0 for row in range(32)])
    assert measure_results(more_and_more)["length_controlled_win_rate"].value == pytest.approx(reference)


def test_the_table_says_how_far_from_even_a_win_rate_lies():
    results = [duel(row, 1.0, 1.0, answer="yes" * (row % 5)) for row in range(24)]
    results += [duel(row, 0.0, 0.0, answer="yes" * (row % 3)) for row in range(24, 32)]
    found = compare_measured({"base": {}, "dpo": measure_results(results)}, confidence=0.95, seed=0)
    (rate,) = (each for each in found if each["metric"] == "win_rate")
    limits = binomtest(24, 32).proportion_ci(0.95, method="exact")
    assert (rate["low"], rate["high"]) == pytest.approx((limits.low, limits.high))
    difference = rate["difference"]
    assert (difference["value"], difference["low"], difference["high"]) == pytest.approx((0.25, limits.low - 0.5, limits.high - 0.5))
    assert difference["p"] == pytest.approx(binomtest(24, 32).pvalue) and difference["p_adjusted"] == pytest.approx(2 * difference["p"])
    power = sum(binomtest(won, 32).pvalue <= 0.05 and binom.pmf(won, 32, 0.5 + difference["detectable"]) for won in range(33))
    assert power == pytest.approx(0.8, abs=1e-3), "none of the 32 is a tie"
    table = make_table(found, ["base", "dpo"], confidence=0.95)
    cells = {name: (rows, base, own) for name, rows, base, own in table["rows"]}
    assert cells["win_rate"][:2] == ("32", "-") and cells["win_rate"][2].startswith("0.750 (+0.250, +")
    assert any("against base" in note and "0.5" in note for note in table["notes"])


def test_a_gate_is_as_sure_of_a_win_rate_as_the_rows_are():
    measured = measure_results([duel(row, float(row > 1), float(row > 1), answer="yes" * (1 + row % 5)) for row in range(24)])
    for name, least in (("win_rate", 0.5), ("length_controlled_win_rate", 0.0)):
        low, high = bounds_of(measured[name], confidence=0.9999, seed=0) or (0.0, 2.0)
        assert least <= low < measured[name].value < high <= 1
    even = measure_results([duel(row, 0.5, 0.5) for row in range(12)])["win_rate"]
    low, high = bounds_of(even, confidence=0.95, seed=0) or (0.0, 1.0)
    assert low < 0.42 and high > 0.58, "twelve ties are no proof that it is even"
    better = measure_results([duel(row, 1.0, 1.0) for row in range(9)])["win_rate"]
    assert (bounds_of(better, confidence=0.95, seed=0) or (0.0, 0.0))[0] == pytest.approx(0.05 ** (1 / 9))
