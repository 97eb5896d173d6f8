"""Calibration: by how much probabilities are off, compared with how often they come true.

  confidence   sigmoid(|d|), d by how much the chosen answer of a pair is likelier, or higher rewarded, than the rejected one
  ECE          sum over bins b of  n_b / N * |mean confidence - share that is right|            (Guo et al., 2017)

Of a policy d is log pi(chosen) - log pi(rejected), so sigmoid(d) is the probability that it says the chosen one, if it says one of the two.

By row: where the bin's confidence is above its accuracy by s = 1 or -1, a row's part is s * (confidence - right), and ECE is the mean of
these. So a bootstrap of rows gives an interval; it takes it for given on which side of its accuracy a bin lies.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
NUM_BINS = 10
"""Bins of equal size over the confidences from 0 to 1."""


def expected_calibration_error(differences: npt.ArrayLike) -> float:
    """The ECE of differences (N,) between the chosen and the rejected answer of pairs; a tie is half right."""
    return float(calibration_gaps(differences).mean())


def calibration_gaps(differences: npt.ArrayLike) -> Floats:
    """Of each pair its part in the ECE (N,), whose mean that is."""
    from scipy.special import expit  # type: ignore[import-untyped,unused-ignore]

    differences_N = np.asarray(differences, dtype=np.float64)
    confidence_N = expit(np.abs(differences_N))
    excess_N: Floats = confidence_N - ((differences_N > 0) + 0.5 * (differences_N == 0))
    bins_N = np.minimum((confidence_N * NUM_BINS).astype(int), NUM_BINS - 1)
    excess_B = np.bincount(bins_N, weights=excess_N, minlength=NUM_BINS)
    signed_N: Floats = np.where(excess_B < 0, -1.0, 1.0)[bins_N] * excess_N
    return signed_N
