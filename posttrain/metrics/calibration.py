"""Calibration: by how much probabilities are off, compared with how often they come true.

  ECE          sum over bins b of  n_b / N * |mean confidence - share that is right|            (Guo et al., 2017)

  of pairs     confidence  sigmoid(|d|), d by how much the chosen answer is likelier, or higher rewarded, than the rejected one
               right       where d > 0
  of tokens    confidence  the largest of the probabilities that the next token is predicted with
               right       where the token that is there is the one which has it

Of a policy d is log pi(chosen) - log pi(rejected), so sigmoid(d) is the probability that it says the chosen one, if it says one of the two.

By row: where the bin's confidence is above its accuracy by s = 1 or -1, a row's part is s * (confidence - right), of tokens the mean of
these over the row, and ECE is the mean of the parts, weighted by tokens. So a bootstrap of rows gives an interval, whose tokens stay
together as they depend on each other; it takes it for given on which side of its accuracy a bin lies.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
NUM_BINS = 10
"""Bins of equal size over the confidences of pairs, from 0 to 1."""
NUM_TOKEN_BINS = 15
"""The same over those of tokens, as many as Guo et al. have."""


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


def bin_tokens(confidence: npt.ArrayLike, is_right: npt.ArrayLike) -> dict[str, list[Any]]:
    """Of the tokens of a row (T,) what their calibration is drawn from, each (B,) over the bins of their confidence: `bin_tokens`, how
    many are in it, `bin_confidence`, the sum of their confidences, and `bin_right`, how many are right."""
    confidence_T = np.asarray(confidence, dtype=np.float64)
    bins_T = np.minimum((confidence_T * NUM_TOKEN_BINS).astype(int), NUM_TOKEN_BINS - 1)
    of_right_T = bins_T[np.asarray(is_right, dtype=bool)]
    return {
        "bin_tokens": np.bincount(bins_T, minlength=NUM_TOKEN_BINS).tolist(),
        "bin_confidence": np.bincount(bins_T, weights=confidence_T, minlength=NUM_TOKEN_BINS).tolist(),
        "bin_right": np.bincount(of_right_T, minlength=NUM_TOKEN_BINS).tolist(),
    }


def token_gaps(binned: Sequence[Mapping[str, Any]]) -> Floats:
    """Of each row, as `bin_tokens` says it, its part in the ECE of tokens (N,), whose mean, weighted by tokens, that is."""
    num_tokens_NB, confidence_NB, right_NB = (
        np.array([row[name] for row in binned], dtype=np.float64) for name in ("bin_tokens", "bin_confidence", "bin_right")
    )
    excess_NB = confidence_NB - right_NB
    signs_B = np.where(excess_NB.sum(axis=0) < 0, -1.0, 1.0)
    gaps_N: Floats = excess_NB @ signs_B / num_tokens_NB.sum(axis=1)
    return gaps_N
