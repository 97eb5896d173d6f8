"""p-values against all swaps written out and in simulation, their correction against an example by hand, and power as it was promised."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.metrics import evidence, paired
from posttrain.metrics.evidence import adjust, detectable, p_value
from posttrain.metrics.passed import p_value_passed


def test_of_few_rows_p_is_the_share_of_all_swaps_with_as_large_a_difference():
    rng = np.random.default_rng(0)
    before, after, weights = rng.normal(size=8), rng.normal(1.0, 1.0, size=8), rng.integers(1, 9, 8)
    signs = np.array(list(product([1, -1], repeat=8)))
    drawn = (signs * (after - before) * weights).sum(1)
    seen = drawn[0]
    by_hand = min(1.0, 2 * min((drawn >= seen - 1e-9).mean(), (drawn <= seen + 1e-9).mean()))
    assert p_value(before, after, weights=weights, seed=0) == pytest.approx(by_hand)


def test_of_rows_that_pass_or_not_it_is_mcnemars():
    before, after = [1.0] * 3 + [0.0] * 9, [0.0] + [1.0] * 8 + [0.0] * 3
    assert p_value(before, after, weights=[1.0] * 12, seed=0) == pytest.approx(p_value_passed(before, after))


def test_by_chance_alone_one_of_twenty_is_under_five_percent(monkeypatch):
    monkeypatch.setattr(evidence, "NUM_RESAMPLES", 499)
    num_trials, found = 600, 0
    for trial in range(num_trials):
        rng = np.random.default_rng(trial)
        hardness, weights = rng.normal(0, 3, 15), rng.integers(1, 20, 15)
        found += p_value(hardness + rng.gamma(1, size=15), hardness + rng.gamma(1, size=15), weights=weights, seed=trial) < 0.05
    assert found / num_trials == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / num_trials))


def test_the_same_scores_differ_by_chance():
    assert p_value([0.1, 0.2], [0.1, 0.2], weights=[1, 2], seed=0) == 1.0
    assert p_value([0.1], [0.9], weights=[1], seed=0) == 1.0


def test_holms_correction_is_that_of_the_example():
    # 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which is not below the one before
    assert adjust([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust([0.6, 0.7]) == [1.0, 1.0]
    assert adjust([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_a_correction_keeps_the_order_and_lies_between_p_and_bonferronis(p_values):
    adjusted = adjust(p_values)
    assert all(p <= one <= min(1.0, p * len(p_values)) + 1e-12 for p, one in zip(p_values, adjusted, strict=True))
    assert [adjusted[i] for i in np.argsort(p_values, kind="stable")] == sorted(adjusted)


def test_of_twenty_differences_that_are_none_one_is_found_in_one_of_twenty_tables():
    tables = np.random.default_rng(0).random((2000, 20))
    wrong = np.mean([min(adjust(list(table))) < 0.05 for table in tables])
    assert wrong == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 2000))
    assert np.mean(tables.min(1) < 0.05) > 0.6, "uncorrected, it is in most"


def test_a_detectable_difference_is_found_in_four_of_five_cases(monkeypatch):
    monkeypatch.setattr(paired, "NUM_RESAMPLES", 499)

    def draw(rng, effect):
        weights = rng.integers(1, 30, 120)
        return rng.normal(2, 1, 120), weights, rng.normal(effect, 0.4, 120)

    base, weights, gained = draw(np.random.default_rng(1000), 0.0)
    effect = detectable(base, base + gained, weights=weights, confidence=0.95)
    num_trials, found = 300, 0
    for trial in range(num_trials):
        base, weights, gained = draw(np.random.default_rng(trial), effect)
        found += paired.compare(base, base + gained, weights=weights, seed=trial).low > 0
    assert found / num_trials == pytest.approx(0.8, abs=0.1), "as far as a pilot of 120 rows knows the spread"


def test_what_rows_can_show_falls_with_the_root_of_their_number():
    assert detectable([0.0, 0.0] * 50, [0.0, 1.0] * 50, weights=[1] * 100, confidence=0.95) == pytest.approx(
        (1.9600 + 0.8416) * np.sqrt(0.25 * 100 / 99) / 10, rel=1e-4
    )
    assert detectable([0.5, 0.6], [0.5, 0.6], weights=[1, 1], confidence=0.95) is None
