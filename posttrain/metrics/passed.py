"""How sure a share of passed rows is, and a difference between two policies' shares of the same rows: where each score is 0 or 1.

  share         the limits of Clopper and Pearson (1934), exact by the binomial distribution
  difference    (gained - lost) / N, over the rows that only the other policy passes and those that only the baseline does; the
                limits of both shares, put together as squares are, with their correlation              (Zou and Donner, 2008)

A bootstrap draws from the rows that are there: where 50 rows are all passed, or two policies agree on all of them, it knows nothing
else and is certain. These limits are not. By enumeration, for 10 to 200 rows, true differences of up to 0.3 and all shares of rows that
change, the one-sided 95 % limit of a difference is on the wrong side of it in at most 4.9 % of the draws.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

from posttrain.metrics.evidence import POWER
from posttrain.metrics.paired import Comparison, Interval


def are_passed(scores: Iterable[float], weights: Iterable[float]) -> bool:
    """Whether scores say of each row that it passes or does not, and every row counts the same."""
    found = set(scores)
    return found <= {0.0, 1.0} and (len(set(weights)) == 1 or len(found) == 1)


def interval_passed(scores: Sequence[float], *, confidence: float) -> Interval:
    """The share of passed rows (N,) and its interval."""
    num_passed = int(sum(scores))
    low, high = _limits(num_passed, len(scores), confidence)
    return Interval(num_passed / len(scores), low, high, len(scores))


def compare_passed(baseline: Sequence[float], other: Sequence[float], *, confidence: float) -> Comparison:
    """The difference between two policies' shares of the same rows (N,), in the same order, and its interval."""
    num_rows, (lost, gained) = len(baseline), _discordant(baseline, other)
    difference = (gained - lost) / num_rows
    lost_low, lost_high = (limit - lost / num_rows for limit in _limits(lost, num_rows, confidence))
    gained_low, gained_high = (limit - gained / num_rows for limit in _limits(gained, num_rows, confidence))
    others = (num_rows - lost) * (num_rows - gained)
    correlation = -math.sqrt(lost * gained / others) if others else -1.0  # of two counts in one multinomial draw
    low = difference - math.sqrt(gained_low**2 + lost_high**2 + 2 * correlation * gained_low * lost_high)
    high = difference + math.sqrt(gained_high**2 + lost_low**2 + 2 * correlation * gained_high * lost_low)
    return Comparison(difference, max(-1.0, low), min(1.0, high), num_rows)


def p_value_passed(baseline: Sequence[float], other: Sequence[float]) -> float:
    """McNemar's exact test: how likely so uneven a split of the rows that only one policy passes is, where each may gain any of them."""
    from scipy.stats import binomtest  # type: ignore[import-untyped,unused-ignore]

    lost, gained = _discordant(baseline, other)
    return float(binomtest(gained, lost + gained).pvalue) if lost + gained else 1.0


def detectable_passed(baseline: Sequence[float], other: Sequence[float], *, confidence: float) -> float | None:
    """The least difference that McNemar's test finds in `POWER` of the cases, where as many of the rows (N,) differ as do here, or as
    it takes; None where it finds none.

    The normal distribution gives too small a one where few rows differ: of 2 in 480, the half.
    """
    from scipy.optimize import brentq  # type: ignore[import-untyped,unused-ignore]
    from scipy.stats import binom  # type: ignore[import-untyped,unused-ignore]

    num_rows = len(baseline)
    share = sum(_discordant(baseline, other)) / num_rows
    num_differ = np.arange(num_rows + 1)
    # Of so many that differ, a policy may lose no more where the split is uneven enough; -1 where none is.
    may_lose = binom.ppf((1 - confidence) / 2, num_differ, 0.5)
    may_lose = np.where(2 * binom.cdf(may_lose, num_differ, 0.5) <= 1 - confidence, may_lose, may_lose - 1)

    def power(by: float) -> float:
        differ = max(share, by)
        wins = (1 + by / differ) / 2
        found = binom.cdf(may_lose, num_differ, 1 - wins) + binom.cdf(may_lose, num_differ, wins)
        return float(binom.pmf(num_differ, num_rows, differ) @ found)

    return None if power(1.0) < POWER else float(brentq(lambda by: power(by) - POWER, 1e-9, 1.0, xtol=1e-6))


def _discordant(baseline: Sequence[float], other: Sequence[float]) -> tuple[int, int]:
    """How many rows only the baseline passes, and how many only the other does."""
    pairs = list(zip(baseline, other, strict=True))
    return sum(before > after for before, after in pairs), sum(before < after for before, after in pairs)


@cache
def _limits(count: int, num_rows: int, confidence: float) -> tuple[float, float]:
    from scipy.stats import binomtest  # type: ignore[import-untyped,unused-ignore]

    found = binomtest(count, num_rows).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)
