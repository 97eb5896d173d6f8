"""Intervals of shares and of their differences: against formulas, and their error by enumeration of all that rows can do."""

import math
from itertools import product

import numpy as np
import pytest

from posttrain.metrics.paired import Comparison
from posttrain.metrics.passed import are_passed, compare_passed, detectable_passed, interval_passed, p_value_passed


def scores(both: int, lost: int, gained: int, neither: int) -> tuple[list[float], list[float]]:
    """Baseline's and other's scores of so many rows that both pass, only the baseline, only the other, and neither."""
    return [1.0] * (both + lost) + [0.0] * (gained + neither), [1.0] * both + [0.0] * lost + [1.0] * gained + [0.0] * neither


def test_where_all_rows_pass_the_share_may_still_be_lower():
    found = interval_passed([1.0] * 7, confidence=0.95)
    assert (found.mean, found.high, found.num_rows) == (1.0, 1.0, 7)
    assert found.low == pytest.approx(0.025 ** (1 / 7)), "so likely that all pass, it is seen with a probability of 2.5 %"


def test_the_limits_of_a_share_are_those_at_which_what_was_seen_is_just_unlikely():
    found = interval_passed([1.0] * 3 + [0.0] * 17, confidence=0.9)

    def at_most(count, share):
        return sum(math.comb(20, k) * share**k * (1 - share) ** (20 - k) for k in range(count + 1))

    assert found.mean == pytest.approx(0.15)
    assert at_most(3, found.high) == pytest.approx(0.05)
    assert 1 - at_most(2, found.low) == pytest.approx(0.05)


def test_a_limit_of_a_difference_is_wrong_in_one_of_twenty_draws_at_most_however_few_rows_differ():
    num_rows = 20
    outcomes = [(lost, gained) for lost, gained in product(range(num_rows + 1), repeat=2) if lost + gained <= num_rows]
    lows = np.array([compare_passed(*scores(0, lost, gained, num_rows - lost - gained), confidence=0.9).low for lost, gained in outcomes])
    ways = [math.comb(num_rows, lost) * math.comb(num_rows - lost, gained) for lost, gained in outcomes]
    lost, gained = np.array(outcomes).T
    worst = {}
    for truth in (-0.3, -0.1, -0.02, 0.0, 0.1, 0.3):
        for discordant in np.linspace(abs(truth), 1.0, 40):
            lose, gain = (discordant - truth) / 2, (discordant + truth) / 2
            likely = ways * lose**lost * gain**gained * (1 - discordant) ** (num_rows - lost - gained)
            assert likely.sum() == pytest.approx(1.0)
            worst[truth] = max(worst.get(truth, 0.0), likely[lows > truth + 1e-12].sum())
    assert max(worst.values()) <= 0.05
    assert min(worst.values()) > 0.03, "and it is not much wider than need be"


def test_policies_that_agree_on_every_row_may_differ_on_others():
    found = compare_passed(*scores(45, 0, 0, 5), confidence=0.9)
    assert found.difference == 0
    assert -found.low == found.high == pytest.approx(1 - 0.05 ** (1 / 50)), "the limit of a share that was never seen"


def test_of_many_rows_the_limits_are_the_normal_ones():
    lost, gained, num_rows = 300, 420, 5000
    found = compare_passed(*scores(2000, lost, gained, num_rows - 2000 - lost - gained), confidence=0.95)
    difference = (gained - lost) / num_rows
    half = 1.96 * math.sqrt((lost + gained) / num_rows - difference**2) / math.sqrt(num_rows)
    assert found.difference == pytest.approx(difference)
    assert (found.low, found.high) == pytest.approx((difference - half, difference + half), abs=0.05 * half)


def test_swapping_the_policies_mirrors_the_interval():
    before, after = scores(3, 4, 9, 2)
    there, back = compare_passed(before, after, confidence=0.95), compare_passed(after, before, confidence=0.95)
    assert (back.difference, back.low, back.high) == pytest.approx((-there.difference, -there.high, -there.low))


def test_rows_that_all_change_have_limits_too():
    assert compare_passed(*scores(0, 0, 5, 0), confidence=0.9) == Comparison(1.0, pytest.approx(2 * 0.05 ** (1 / 5) - 1), 1.0, 5)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1.0), (1, 6, 2 * (1 + 7) / 2**7), (5, 0, 2 / 2**5), (3, 3, 1.0), (2, 10, 2 * (1 + 12 + 66) / 2**12)],
)
def test_mcnemars_test_asks_how_uneven_the_split_of_rows_that_changed_is(lost, gained, p):
    assert p_value_passed(*scores(11, lost, gained, 3)) == pytest.approx(p)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 1), (6, 2), (20, 4)])
def test_a_detectable_difference_is_found_in_four_of_five_draws_however_few_rows_differ(lost, gained):
    num_rows = 24
    least = detectable_passed(*scores(0, lost, gained, num_rows - lost - gained), confidence=0.95)
    differ = max(least, (lost + gained) / num_rows)
    loses, gains = (differ - least) / 2, (differ + least) / 2
    found = sum(
        math.comb(num_rows, a) * math.comb(num_rows - a, b) * loses**a * gains**b * (1 - differ) ** (num_rows - a - b)
        for a, b in product(range(num_rows + 1), repeat=2)
        if a + b <= num_rows and p_value_passed(*scores(0, a, b, num_rows - a - b)) < 0.05
    )
    assert found == pytest.approx(0.8, abs=1e-3)


def test_few_rows_detect_nothing():
    assert detectable_passed([1.0] * 5, [0.0] * 5, confidence=0.95) is None, "five of five that change are not uneven enough"
    assert detectable_passed([1.0] * 6, [1.0] * 6, confidence=0.95) == pytest.approx(0.8 ** (1 / 6), abs=1e-5), "all six have to change"


@pytest.mark.parametrize(
    ("values", "weights", "is_it"),
    [
        ([0.0, 1.0], [1.0, 1.0], True),
        ([1.0, 1.0], [3.0, 1.0], True),
        ([0.0, 1.0], [3.0, 1.0], False),
        ([0.0, 0.5], [1.0, 1.0], False),
        ([1.0], [2.0], True),
    ],
)
def test_scores_of_rows_that_count_alike_are_passed_or_not(values, weights, is_it):
    assert are_passed(values, weights) == is_it
