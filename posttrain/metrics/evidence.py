"""Whether differences are more than chance: p-values, corrected where there are many, and the least difference that rows can show.

  p                by chance alone each row's two scores could as well be swapped: of such swaps, the share with as large a
                   difference                                               (the paired permutation test; of scores 0 and 1, McNemar's)
  Holm             p of rank i of m, from the least, times m - i + 1, and none below the one before             (Holm, 1979)
  detectable       (z(1 - alpha / 2) + z(power)) * sd / sqrt(N), sd of the paired differences by row            (Cohen, 1988, ch. 2);
                   of scores 0 and 1 by McNemar's power instead (passed.py)

The test is exact for few rows too, which a p-value read off the bootstrap is not; and McNemar's exact test is the same test of scores
that are 0 or 1, so all p-values of a table mean the same.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from posttrain.metrics.paired import MAX_VALUES_IN_MEMORY, NUM_RESAMPLES

POWER = 0.8
"""How likely the detectable difference is found, where it is there."""


def p_value(baseline: Sequence[float], other: Sequence[float], *, weights: Sequence[float], seed: int) -> float:
    """Two-sided, that the weighted means of two policies' scores of the same rows (N,) differ by chance; exact up to 13 rows."""
    from scipy.stats import permutation_test  # type: ignore[import-untyped,unused-ignore]

    baseline_N, other_N, weights_N = (np.asarray(values, dtype=np.float64) for values in (baseline, other, weights))
    if np.array_equal(baseline_N, other_N) or len(baseline_N) == 1:
        return 1.0

    def difference(before: NDArray[np.float64], after: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        found: NDArray[np.float64] = ((after - before) * weights_N).sum(axis=axis) / weights_N.sum()
        return found

    tested = permutation_test(
        (baseline_N, other_N),
        difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, MAX_VALUES_IN_MEMORY // (2 * len(baseline_N))),
        rng=np.random.default_rng(seed),
    )
    return float(tested.pvalue)


def adjust(p_values: Sequence[float]) -> list[float]:
    """The p-values (M,) such that one under alpha is wrong with probability alpha at most in any of the M tests."""
    p_M = np.asarray(p_values, dtype=np.float64)
    order_M = np.argsort(p_M, kind="stable")
    adjusted_M = np.empty_like(p_M)
    adjusted_M[order_M] = np.minimum(1.0, np.maximum.accumulate(p_M[order_M] * np.arange(len(p_M), 0, -1)))
    return [float(value) for value in adjusted_M]


def detectable(baseline: Sequence[float], other: Sequence[float], *, weights: Sequence[float], confidence: float) -> float | None:
    """The least difference that so many rows (N,) show, two-sided, in `POWER` of the cases; None where no row differs from another.

    Of a ratio, a row's difference counts by its weight: the standard deviation is that of the linearized ratio.
    """
    from scipy.stats import norm  # type: ignore[import-untyped,unused-ignore]

    differences_N, weights_N = np.asarray(other) - np.asarray(baseline), np.asarray(weights, dtype=np.float64)
    if len(differences_N) < 2 or np.ptp(differences_N) == 0:
        return None
    residuals_N = weights_N * (differences_N - np.average(differences_N, weights=weights_N)) / weights_N.mean()
    error = residuals_N.std(ddof=1) / np.sqrt(len(residuals_N))
    return float((norm.ppf((1 + confidence) / 2) + norm.ppf(POWER)) * error)
