"""A mixture: as many rows from each data set as given shares allow, once every other step has had its say.

The scarcest data set sets the total, since no row is repeated; within one, rows are drawn by a hash of the seed and of the
row's number, as in `posttrain.data.source`: whether a row is drawn before another does not depend on what else is left.
"""

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, ClassVar

from pydantic import Field

from posttrain.config import nearest
from posttrain.curate.step import Bench, Candidate, Drop, Outcome, Step
from posttrain.data.source import unit
from posttrain.error import UserError

OVER = "over its share of the mixture"


class Mixture(Step):
    """Draws rows so that each data set has its share of what is kept."""

    name: ClassVar[str] = "mixture"

    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Share of each data set, by its name in the pipeline file; they need not add up to 1."""

    def run(self, candidates: Sequence[Candidate], bench: Bench) -> Outcome:
        """Keep of each data set what is drawn of it."""
        counts = Counter(candidate.source for candidate in candidates)
        self._check_sources(counts, [given.name for given in bench.context.inputs["data"]], f"{bench.context.at}: {self.name}.weights")
        drawn: set[int] = set()
        for source, take in share_out(self.weights, counts).items():
            indices = [candidate.index for candidate in candidates if candidate.source == source]
            drawn.update(heapq.nsmallest(take, indices, key=lambda index: unit(bench.seed, f"mixture {index}")))
        kept = [candidate for candidate in candidates if candidate.index in drawn]
        dropped = [Drop(candidate.index, OVER, candidate.source) for candidate in candidates if candidate.index not in drawn]
        return Outcome(kept, dropped, facts={"taken": dict(Counter(candidate.source for candidate in kept))})

    def _check_sources(self, counts: Mapping[str, int], given: Sequence[str], at: str) -> None:
        for source in self.weights:
            if source not in given:
                raise UserError(f"{at}.{source}: no data set of this stage has that name; {nearest(source, given)}")
            if counts[source] == 0:
                raise UserError(f"{at}.{source}: no row of it is left to take a share of; leave it out here and of inputs.data")
        if missing := [source for source in given if source not in self.weights]:
            raise UserError(f"{at}: names no share of {missing[0]}; add one, or leave {missing[0]} out of inputs.data")


def share_out(weights: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, int]:
    """How many rows each data set gives: as many as the scarcest allows, within a row of each share."""
    exact = {source: Fraction(repr(weight)) for source, weight in weights.items()}
    shares = {source: weight / sum(exact.values()) for source, weight in exact.items()}
    total = math.floor(min(counts[source] / share for source, share in shares.items()))
    takes = {source: math.floor(total * share) for source, share in shares.items()}
    by_remainder = sorted(shares, key=lambda source: takes[source] - total * shares[source])
    for source in by_remainder[: total - sum(takes.values())]:
        takes[source] += 1
    return takes
