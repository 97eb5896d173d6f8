"""Diversity: picks the rows that together cover what all of them ask, under a budget.

  k_center:           next is the row that is farthest from all picked ones, argmax_i min_{j in S} d(i, j)      (Gonzalez, 1985)
  facility_location:  next is the row that most raises  f(S) = sum_i max_{j in S} (1 + cos(i, j)) / 2           (Minoux, 1978)

Papers: Zhou et al., 2023, "LIMA: Less Is More for Alignment", arXiv 2305.11206: a thousand prompts of high quality and
diversity; Sener & Savarese, 2018, "Active Learning for Convolutional Neural Networks: A Core-Set Approach", arXiv 1708.00489;
Minoux, 1978, "Accelerated greedy algorithms for maximizing submodular set functions": what a row gains only falls as others
are picked, so a row whose old gain is below another's new one need not be looked at.

The first leaves no prompt far from a picked one, so it picks outliers; the second picks what stands for many.

Differences: 1. the first centre is the row whose hash with the seed is least, instead of any; 2. of equals the first in order
is picked, so nothing is random but the seed.
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from posttrain.curate.embed import EmbeddingStep, embed
from posttrain.curate.rows import prompt_of
from posttrain.curate.scored import Keep, keep_number
from posttrain.curate.step import Bench, Candidate, Drop, Outcome
from posttrain.data.source import unit

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from posttrain.curate.embed import Vectors

    Floats = npt.NDArray[np.float32]

CELLS_AT_ONCE = 1 << 24
"""Similarities that are in memory at once."""
FEWEST_GAINS, MOST_GAINS = 8, 64
"""Rows whose gain is computed together, at first and where the first do not settle it: one by one they are as slow to read."""


class Diversity(EmbeddingStep):
    """Keeps the rows whose prompts together cover what all prompts ask."""

    name: ClassVar[str] = "diversity"

    keep: Keep = 1000
    """How many rows are kept: a number such as 1000, or a share of the candidates such as 0.1."""
    method: Literal["k_center", "facility_location"] = "facility_location"
    """`facility_location` keeps what stands for many; `k_center` leaves no prompt far from a kept one, so it keeps outliers."""

    def run(self, candidates: Sequence[Candidate], bench: Bench) -> Outcome:
        """Keep as many as the budget allows."""
        import numpy as np

        number = keep_number(self.keep, len(candidates))
        if number >= len(candidates):
            return Outcome(list(candidates))
        vectors = embed([prompt_of(candidate.row) for candidate in candidates], self, bench)
        bench.progress.phase(f"{self.name}: pick", number)

        def pick(_: Sequence[None]) -> "Floats":
            picked = np.empty((1, number), dtype=np.float32)  # exact up to 16 million rows
            for count, row in enumerate(self.pick(vectors, candidates, number, bench.seed)):
                picked[0, count] = row
                bench.progress.step(count + 1)
            return picked

        # Measured, so that one rank decides for all: two machines may round differently.
        picked = {int(row) for row in bench.measure("picked", [None], pick, chunk_size=1)[0]}
        kept = [candidate for position, candidate in enumerate(candidates) if position in picked]
        left = [candidate for position, candidate in enumerate(candidates) if position not in picked]
        dropped = [Drop(candidate.index, f"{self.name}: over the budget") for candidate in left]
        return Outcome(kept, dropped, facts={"coverage": coverage(vectors, sorted(picked))})

    def pick(self, vectors: "Vectors", candidates: Sequence[Candidate], number: int, seed: int) -> Iterator[int]:
        """The positions of `number` rows, in the order in which they are picked."""
        if self.method == "facility_location":
            return facility_location(vectors, number)
        first = min(range(len(candidates)), key=lambda position: unit(seed, f"first centre {candidates[position].index}"))
        return k_center(vectors, number, first)


def k_center(vectors: "Vectors", number: int, first: int) -> Iterator[int]:
    """Positions among `vectors` `(N, D)`: `first`, and then each time the one farthest from all before it."""
    import numpy as np

    nearest = np.full(len(vectors), -np.inf, dtype=np.float32)  # largest cosine with a picked one: least distance
    row = first
    for _ in range(number):
        yield row
        np.maximum(nearest, vectors @ vectors[row], out=nearest)
        nearest[row] = np.inf  # never again, whatever rounding says
        row = int(nearest.argmin())


def facility_location(vectors: "Vectors", number: int) -> Iterator[int]:
    """Positions among `vectors` `(N, D)`: each time the one that most raises the sum over all of the nearness to a picked one."""
    import numpy as np

    nearest = np.zeros(len(vectors), dtype=np.float32)
    gains = (len(vectors) + vectors @ vectors.sum(axis=0, dtype=np.float64)) / 2  # of the first row: its nearness to all
    queue = [(-float(gain), row) for row, gain in enumerate(gains)]
    heapq.heapify(queue)
    for _ in range(number):
        fresh: set[int] = set()
        at_once = FEWEST_GAINS
        while queue[0][1] not in fresh:
            stale: list[int] = []
            while queue and queue[0][1] not in fresh and len(stale) < at_once:
                stale.append(heapq.heappop(queue)[1])
            for row, gain in zip(stale, _gains(vectors, nearest, stale), strict=True):
                heapq.heappush(queue, (-float(gain), row))
            fresh.update(stale)
            at_once = min(2 * at_once, MOST_GAINS)
        _, row = heapq.heappop(queue)
        yield row
        np.maximum(nearest, (1 + vectors @ vectors[row]) / 2, out=nearest)


def coverage(vectors: "Vectors", picked: Sequence[int]) -> dict[str, float]:
    """Cosine of a row with the picked one that is nearest to it: the mean over all rows, and the least."""
    import numpy as np

    size = max(1, CELLS_AT_ONCE // len(picked))
    chosen = vectors[picked]
    nearest = np.concatenate([(vectors[start : start + size] @ chosen.T).max(axis=1) for start in range(0, len(vectors), size)])
    return {"mean cosine": float(nearest.mean()), "least cosine": float(nearest.min())}


def _gains(vectors: "Vectors", nearest: "Floats", rows: Sequence[int]) -> "Floats":
    """By how much each row would raise the sum of `nearest` `(N,)`, `(R,)`."""
    import numpy as np

    cosines = vectors[list(rows)] @ vectors.T
    cosines -= 2 * nearest - 1
    gains: Floats = np.maximum(cosines, 0, out=cosines).sum(axis=1) / 2
    return gains
