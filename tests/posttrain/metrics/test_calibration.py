"""Calibration of pairs: against bins filled one by one, and where probabilities come true by construction."""

import math

import numpy as np
import pytest

from posttrain.metrics.calibration import NUM_BINS, calibration_gaps, expected_calibration_error


def by_hand(differences: list[float]) -> float:
    """Guo et al., 2017, eq. 3."""
    bins: list[list[tuple[float, float]]] = [[] for _ in range(NUM_BINS)]
    for difference in differences:
        confidence = 1 / (1 + math.exp(-abs(difference)))
        right = 0.5 if difference == 0 else float(difference > 0)
        bins[min(int(confidence * NUM_BINS), NUM_BINS - 1)].append((confidence, right))
    gaps = [abs(sum(c for c, _ in each) / len(each) - sum(r for _, r in each) / len(each)) * len(each) for each in bins if each]
    return sum(gaps) / len(differences)


def test_the_parts_of_rows_have_the_error_as_their_mean() -> None:
    differences = [*np.random.default_rng(0).normal(0.3, 2, 300).tolist(), 0.0, 40.0, -40.0]
    assert expected_calibration_error(differences) == pytest.approx(by_hand(differences))
    assert calibration_gaps(differences).mean() == pytest.approx(by_hand(differences))


def test_probabilities_that_come_true_are_calibrated_and_overconfident_ones_are_not() -> None:
    rng = np.random.default_rng(1)
    size = rng.uniform(0, 4, 50_000)
    comes_true = rng.random(len(size)) < 1 / (1 + np.exp(-size))
    differences = np.where(comes_true, size, -size)
    assert expected_calibration_error(differences) < 0.01
    assert expected_calibration_error(10 * differences) > 0.1
    assert expected_calibration_error([-30.0, -30.0]) == pytest.approx(1.0)


def test_a_part_is_signed_by_the_side_of_its_bin_and_not_by_its_own() -> None:
    wrong, right, other_wrong = -2.0, 2.1, -2.15  # one bin, less right than sure
    gaps = calibration_gaps([wrong, right, other_wrong])
    assert gaps[0] > 0 and gaps[2] > 0 and gaps[1] < 0, "the one that is right makes the bin less wrong"
