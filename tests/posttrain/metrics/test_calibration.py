"""Calibration of pairs and of tokens: against bins filled one by one, and where probabilities come true by construction."""

import math
from itertools import pairwise

import numpy as np
import pytest

from posttrain.metrics.calibration import NUM_BINS, NUM_TOKEN_BINS, bin_tokens, calibration_gaps, expected_calibration_error, token_gaps


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


# --- tokens ------------------------------------------------------------------------------------------------------------


def draw_rows(*, count: int, sharpness: float = 1.0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of tokens, each with a confidence and whether it is right; these come true where `sharpness` is 1."""
    rng = np.random.default_rng(2)
    rows = []
    for num_tokens in rng.integers(1, 60, count):
        true = rng.beta(2, 1, num_tokens)
        sure = true**sharpness / (true**sharpness + (1 - true) ** sharpness)
        rows.append((sure, rng.random(num_tokens) < true))
    return rows


def ece_of_tokens(rows: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Guo et al., 2017, eq. 3, over all tokens, a bin at a time."""
    confidence, right = (np.concatenate(each) for each in zip(*rows, strict=True))
    edges = np.linspace(0, 1, 16)
    total = 0.0
    for low, high in pairwise(edges):
        inside = (confidence >= low) & ((confidence < high) | (high == 1))
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return total


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_sums_of_rows_have_the_error_over_all_tokens_as_their_mean(sharpness: float) -> None:
    rows = draw_rows(count=50, sharpness=sharpness)
    gaps = token_gaps([bin_tokens(*row) for row in rows])
    num_tokens = [len(confidence) for confidence, _ in rows]
    assert np.average(gaps, weights=num_tokens) == pytest.approx(ece_of_tokens(rows), abs=1e-12)


def test_what_a_row_keeps_are_the_sums_of_its_bins() -> None:
    found = bin_tokens(np.array([1.0, 0.99, 0.5, 0.01], dtype=np.float32), np.array([1, 0, 1, 0], dtype=np.float32))
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(found, NUM_TOKEN_BINS)
    assert {number: count for number, count in enumerate(found["bin_tokens"]) if count} == {0: 1, 7: 1, 14: 2}
    assert found["bin_confidence"][14] == pytest.approx(1.99) and (found["bin_right"][14], found["bin_right"][7]) == (1, 1)


def test_tokens_that_come_true_are_calibrated_and_overconfident_ones_are_not() -> None:
    calibrated, sharp = (
        np.average(token_gaps([bin_tokens(*row) for row in rows]), weights=[len(row[0]) for row in rows])
        for rows in (draw_rows(count=2000), draw_rows(count=2000, sharpness=4.0))
    )
    assert calibrated < 0.01 < 0.1 < sharp
