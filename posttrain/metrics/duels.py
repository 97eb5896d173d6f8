"""Duels: how often a policy's answers beat those of another to the same prompts, where each is won (1), tied (1/2) or lost (0).

  win rate            1/2 + (won - lost) / 2N: a tie counts half.  Its interval is that of (won - lost) / N in passed.py, which is sure of
                      nothing because no such row was drawn; without a tie it is Clopper and Pearson's.  p is the sign test's.
  length-controlled   sigmoid(a) of  P(won) = sigmoid(a + b * tanh(d / sd(d))),  d: by how many characters the answer is longer
                      (Dubois et al., 2024, arXiv 2404.04475): what the win rate would be, were all answers of the same length

Differences from Dubois et al.: 1. no term for how hard an instruction is, which takes the duels of many other policies; 2. b has a
normal prior of standard deviation 3, instead of a penalty by cross-validation, so that it is there where the longer answer always
wins; 3. an interval, by linearization: rows are given the numbers whose mean changes as the estimate does where a row counts for more
or less (the infinitesimal jackknife), and the bootstrap draws these.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from posttrain.metrics.paired import Interval
from posttrain.metrics.passed import compare_passed, detectable_passed, interval_passed, p_value_passed

EVEN = 0.5
"""The win rate of two policies that are equally good."""
PRIOR = 3.0
"""Standard deviation of the prior of what length does to the logit of winning. It is wide: in simulations where that is 3, it does not
show in the rate of 50 rows; a prior of 1 pulls it by 0.04 toward the win rate."""


def win_rate(outcomes: Sequence[float]) -> float:
    """Share of duels (N,) that are won, a tie counting half."""
    return EVEN + (outcomes.count(1.0) - outcomes.count(0.0)) / (2 * len(outcomes))


def interval_won(outcomes: Sequence[float], *, confidence: float) -> Interval:
    """The win rate of duels (N,), and its interval."""
    won, lost = _split(outcomes)
    if EVEN not in outcomes:
        return interval_passed(won, confidence=confidence)
    found = compare_passed(lost, won, confidence=confidence)
    assert found.low is not None and found.high is not None
    return Interval(EVEN + found.difference / 2, EVEN + found.low / 2, EVEN + found.high / 2, len(outcomes))


def p_value_won(outcomes: Sequence[float]) -> float:
    """The sign test: how likely so uneven a split of the duels without ties is, where either policy may win any of them."""
    return p_value_passed(*reversed(_split(outcomes)))


def detectable_won(outcomes: Sequence[float], *, confidence: float) -> float | None:
    """By how much a win rate must differ from even for so many rows, as many of them ties, to show it; None where they never do."""
    found = detectable_passed(*reversed(_split(outcomes)), confidence=confidence)
    return None if found is None else found / 2


def _split(outcomes: Sequence[float]) -> tuple[list[float], list[float]]:
    """Of each duel whether it is won, and whether it is lost."""
    return [float(outcome == 1) for outcome in outcomes], [float(outcome == 0) for outcome in outcomes]


def control_length(outcomes: Sequence[float], longer: Sequence[float]) -> tuple[float, list[float]]:
    """The length-controlled win rate of duels (N,), and by row what its interval is drawn from (N,), which has it as its mean.

    `longer` (N,) is by how many characters the answer is longer than the other policy's.
    """
    from scipy.optimize import minimize  # type: ignore[import-untyped,unused-ignore]
    from scipy.special import expit  # type: ignore[import-untyped,unused-ignore]

    outcomes_N, longer_N = np.asarray(outcomes, dtype=np.float64), np.asarray(longer, dtype=np.float64)
    num_rows, spread = len(outcomes_N), longer_N.std()
    if np.ptp(outcomes_N) == 0:
        return float(outcomes_N[0]), outcomes_N.tolist()  # there is nothing that length could explain
    terms_N2 = np.stack([np.ones(num_rows), np.tanh(longer_N / spread) if spread else np.zeros(num_rows)], axis=1)
    prior = np.array([0.0, PRIOR**-2])

    def loss(weights: NDArray[np.float64]) -> float:
        logits_N = terms_N2 @ weights
        return float((np.logaddexp(0, logits_N) - outcomes_N * logits_N).sum() + (prior * weights**2).sum() / 2)

    def slope(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(terms_N2.T @ (expit(terms_N2 @ weights) - outcomes_N) + prior * weights)

    def curvature(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        chance_N = expit(terms_N2 @ weights)
        return np.asarray((terms_N2.T * (chance_N * (1 - chance_N))) @ terms_N2 + np.diag(prior))

    weights = minimize(loss, np.zeros(2), jac=slope, hess=curvature, method="trust-exact", options={"gtol": 1e-9 * num_rows}).x
    rate = float(expit(weights[0]))
    # The prior is shared out among the rows, so that at the estimate their parts of the slope come to nothing.
    parts_N2 = terms_N2 * (outcomes_N - expit(terms_N2 @ weights))[:, None] - prior * weights / num_rows
    influence_N = num_rows * rate * (1 - rate) * (parts_N2 @ np.linalg.inv(curvature(weights))[:, 0])
    return rate, (rate + influence_N).tolist()
