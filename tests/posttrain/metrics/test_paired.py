"""Intervals of a mean and of a paired difference: against formulas, in degenerate cases, and their coverage in simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.metrics import paired
from posttrain.metrics.paired import Comparison, Interval, compare, interval


def test_the_difference_is_the_difference_of_the_means():
    result = compare([0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0])
    assert result.difference == 0.25
    assert result.num_rows == 4
    assert result.low == 0.0 and result.high == 0.75


def test_a_weighted_difference_is_that_of_the_ratios_of_sums():
    rng = np.random.default_rng(0)
    num_tokens = rng.integers(1, 100, 50)
    before, after = rng.gamma(2, size=50) * num_tokens, rng.gamma(2, size=50) * num_tokens
    result = compare(list(before / num_tokens), list(after / num_tokens), weights=list(num_tokens))
    assert result.difference == pytest.approx(after.sum() / num_tokens.sum() - before.sum() / num_tokens.sum())
    assert interval(list(before / num_tokens), weights=list(num_tokens)).mean == pytest.approx(before.sum() / num_tokens.sum())


def test_the_bounds_are_those_of_a_bootstrap_written_out_by_hand():
    rng = np.random.default_rng(1)
    before, after, num_tokens = rng.normal(size=40), rng.normal(0.3, size=40), rng.integers(1, 50, 40)
    draws = np.random.default_rng(2).integers(0, 40, (20_000, 40))
    by_hand = ((after - before) * num_tokens)[draws].sum(1) / num_tokens[draws].sum(1)
    result = compare(before, after, weights=num_tokens)
    spread = by_hand.std()
    assert result.low == pytest.approx(np.quantile(by_hand, 0.025), abs=0.1 * spread)
    assert result.high == pytest.approx(np.quantile(by_hand, 0.975), abs=0.1 * spread)


def test_a_mean_of_many_rows_has_the_normal_interval():
    scores = np.random.default_rng(3).normal(5, 2, 1000)
    result = interval(scores)
    half = 1.96 * scores.std() / np.sqrt(1000)
    assert result.low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert result.high == pytest.approx(scores.mean() + half, abs=0.1 * half)


def coverage(num_trials, sample):
    covered = 0
    for trial in range(num_trials):
        truth, baseline, other, weights = sample(np.random.default_rng(trial))
        result = compare(baseline, other, weights=weights, seed=trial)
        covered += result.low <= truth <= result.high
    return covered / num_trials


def test_the_interval_covers_the_true_difference_about_95_times_in_100(monkeypatch):
    monkeypatch.setattr(paired, "NUM_RESAMPLES", 999)

    def sample(rng):
        hardness = rng.normal(0, 5, 80)
        return 0.5, hardness + rng.normal(0, 1, 80), hardness + rng.normal(0.5, 1, 80), None

    assert 0.91 <= coverage(300, sample) <= 0.98


def test_the_interval_of_a_ratio_covers_it_about_95_times_in_100_though_long_rows_differ(monkeypatch):
    monkeypatch.setattr(paired, "NUM_RESAMPLES", 999)

    def sample(rng):
        num_tokens = rng.integers(1, 101, 80)
        gain = num_tokens / 100 + rng.normal(0, 0.3, 80)
        baseline = rng.normal(2, 1, 80)
        truth = np.sum(np.arange(1, 101) ** 2 / 100) / np.sum(np.arange(1, 101))
        return truth, baseline, baseline + gain, num_tokens

    assert 0.90 <= coverage(300, sample) <= 0.985


def test_pairing_finds_a_difference_that_separate_intervals_hide():
    rng = np.random.default_rng(4)
    hardness = rng.normal(0, 5, 100)
    baseline, other = hardness + rng.normal(0, 0.2, 100), hardness + 0.2 + rng.normal(0, 0.2, 100)
    assert compare(baseline, other).low > 0
    assert interval(baseline).high > interval(other).low


def test_the_interval_is_a_function_of_the_seed():
    rng = np.random.default_rng(5)
    baseline, other = rng.normal(size=30), rng.normal(size=30)
    assert compare(baseline, other, seed=1) == compare(baseline, other, seed=1)
    assert compare(baseline, other, seed=1) != compare(baseline, other, seed=2)


def test_more_confidence_gives_a_wider_interval():
    scores = np.random.default_rng(6).normal(size=30)
    narrow, wide = interval(scores, confidence=0.5), interval(scores, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_memory_bounds_change_no_result(monkeypatch):
    scores = list(np.random.default_rng(7).normal(size=30))
    whole = interval(scores)
    monkeypatch.setattr(paired, "MAX_VALUES_IN_MEMORY", 1000)
    assert interval(scores) == whole


def test_equal_weights_are_no_weights():
    rng = np.random.default_rng(8)
    baseline, other = rng.normal(size=30), rng.normal(size=30)
    plain, weighted = compare(baseline, other), compare(baseline, other, weights=[7] * 30)
    assert weighted.difference == pytest.approx(plain.difference)
    assert (weighted.low, weighted.high) == pytest.approx((plain.low, plain.high))


def test_where_all_differences_are_equal_both_bounds_are_the_difference():
    assert compare([0.0, 1.0, 5.0], [0.5, 1.5, 5.5], weights=[1, 2, 3]) == Comparison(0.5, 0.5, 0.5, 3)
    assert compare([0.1] * 3, [0.1] * 3) == Comparison(0.0, 0.0, 0.0, 3)
    assert interval([1.0] * 7) == Interval(1.0, 1.0, 1.0, 7)
    assert interval([0.1] * 3, weights=[0.7, 0.1, 0.3]) == Interval(0.1, 0.1, 0.1, 3)


def test_a_single_row_has_no_interval():
    assert compare([1.0], [3.0]) == Comparison(2.0, None, None, 1)
    assert interval([1.0], weights=[9]) == Interval(1.0, None, None, 1)


def test_two_rows_have_the_interval_between_them():
    assert interval([0.0, 1.0]) == Interval(0.5, 0.0, 1.0, 2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=2, max_size=20))
def test_swapping_the_policies_mirrors_the_interval(pairs):
    baseline, other = zip(*pairs, strict=True)
    there, back = compare(baseline, other), compare(other, baseline)
    assert there.difference == pytest.approx(-back.difference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.low - 1e-9 <= there.difference <= there.high + 1e-9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare([], []), "baseline: must be one number for each of at least one row"),
        (lambda: interval([]), "scores: must be one number for each of at least one row"),
        (lambda: interval([[1.0], [2.0]]), "scores: must be one number for each of at least one row"),
        (lambda: compare([1.0], [1.0, 2.0]), "other: 2 scores, but baseline has 1"),
        (lambda: compare([1.0, 2.0], [1.0, float("nan")]), r"other\[1\]: nan is not finite"),
        (lambda: interval([1.0, 2.0], weights=[1.0]), "weights: 1 given for 2 rows"),
        (lambda: interval([1.0, 2.0], weights=[1.0, 0.0]), r"weights\[1\]: 0.0 must be above 0"),
        (lambda: interval([1.0, 2.0], confidence=95), "confidence: 95 must be between 0 and 1"),
    ],
)
def test_what_cannot_be_compared_says_which_value_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
