"""How sure a mean is, and a difference between two policies on the same rows: percentile intervals of the bootstrap.

  difference = mean(other) - mean(baseline);  rows are drawn with replacement, and both scores of a row are drawn together

Pairing removes how hard a row is from the noise, so it finds differences that two separate intervals hide (Efron and
Tibshirani, 1993, ch. 13). Percentile rather than BCa intervals: scores of 0 and 1 leave BCa undefined on one-sided data, and its
jackknife takes quadratic time in the rows. Below some twenty rows they are a little too narrow.

For a ratio such as the nll per token, scores are per row and token, and weights are the tokens of each row: the statistic is
then sum(weights * scores) / sum(weights), computed anew on every draw of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 9999
MAX_VALUES_IN_MEMORY = 4_000_000


@dataclass(frozen=True)
class Interval:
    """One policy's mean over `num_rows` rows, with the bounds of its interval; these are None for a single row."""

    mean: float
    low: float | None
    high: float | None
    num_rows: int


@dataclass(frozen=True)
class Comparison:
    """`mean(other) - mean(baseline)` over `num_rows` rows, with the bounds of its interval; these are None for a single row."""

    difference: float
    low: float | None
    high: float | None
    num_rows: int


def interval(scores: Sequence[float], *, weights: Sequence[float] | None = None, seed: int = 0, confidence: float = 0.95) -> Interval:
    """The (weighted) mean of `scores` (N,) and its bootstrap interval, the same for the same `seed`.

    Raises `ValueError` for no rows, unequal lengths, a value that is not finite, or a weight that is not above 0.
    """
    scores_N, weights_N = _checked("scores", scores), _checked_weights(weights, len(scores))
    low, high = _bounds(scores_N, weights_N, seed, confidence)
    return Interval(_mean(scores_N, weights_N), low, high, len(scores_N))


def compare(
    baseline: Sequence[float],
    other: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> Comparison:
    """The difference between two policies scored on the same rows (N,), in the same order, and its bootstrap interval.

    `weights` (N,) are those of both: tokens per row for an nll, which two tokenizers that cut a row differently do not share.
    Raises `ValueError` as `interval` does.
    """
    baseline_N, other_N = _checked("baseline", baseline), _checked("other", other)
    if len(baseline_N) != len(other_N):
        raise ValueError(f"other: {len(other_N)} scores, but baseline has {len(baseline_N)}; score both on the same rows")
    weights_N = _checked_weights(weights, len(baseline_N))
    low, high = _bounds(other_N - baseline_N, weights_N, seed, confidence)
    return Comparison(_mean(other_N - baseline_N, weights_N), low, high, len(baseline_N))


def _checked(name: str, values: Sequence[float]) -> NDArray[np.float64]:
    values_N = np.asarray(values, dtype=np.float64)
    if values_N.ndim != 1 or not len(values_N):
        raise ValueError(f"{name}: must be one number for each of at least one row, got shape {values_N.shape}")
    if not np.isfinite(values_N).all():
        row = int(np.flatnonzero(~np.isfinite(values_N))[0])
        raise ValueError(f"{name}[{row}]: {values_N[row]} is not finite")
    return values_N


def _checked_weights(weights: Sequence[float] | None, num_rows: int) -> NDArray[np.float64]:
    if weights is None:
        return np.ones(num_rows)
    weights_N = _checked("weights", weights)
    if len(weights_N) != num_rows:
        raise ValueError(f"weights: {len(weights_N)} given for {num_rows} rows; give one for each")
    if (weights_N <= 0).any():
        row = int(np.flatnonzero(weights_N <= 0)[0])
        raise ValueError(f"weights[{row}]: {weights_N[row]} must be above 0; leave the row out instead")
    return weights_N


def _bounds(
    values_N: NDArray[np.float64], weights_N: NDArray[np.float64], seed: int, confidence: float
) -> tuple[float | None, float | None]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence} must be between 0 and 1, such as 0.95")
    if len(values_N) < 2:
        return None, None
    if np.ptp(values_N) == 0:
        return float(values_N[0]), float(values_N[0])
    from scipy.stats import bootstrap  # type: ignore[import-untyped,unused-ignore]

    result = bootstrap(
        (values_N, weights_N),
        _weighted_mean,
        paired=True,
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, MAX_VALUES_IN_MEMORY // len(values_N)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _mean(values_N: NDArray[np.float64], weights_N: NDArray[np.float64]) -> float:
    # The mean of equal values is that value, which a rounded sum may miss in the last bit.
    return float(values_N[0]) if np.ptp(values_N) == 0 else float(_weighted_mean(values_N, weights_N))


def _weighted_mean(values: NDArray[np.float64], weights: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = (values * weights).sum(axis=axis) / weights.sum(axis=axis)
    return mean
