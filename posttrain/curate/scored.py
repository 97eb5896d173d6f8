"""Scores: what the steps share that give every row one, and keep the best rows.

`quality` and `reward` have a local model score, `judge` one behind an HTTP interface.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from posttrain.curate.step import Bench, Candidate, Drop, Outcome, Step
from posttrain.data.rows import Conversation, Message, Row

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

Keep = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] | None
"""How many rows are kept: a whole number of rows, or with a decimal point a share of the candidates."""
ROWS_AT_ONCE = 256
"""Rows of a chunk that is measured, and saved, at once."""


class Scored(Step):
    """A step that gives each row a score, and keeps the best."""

    keep: Keep = None
    """How many of the best rows are kept: a number such as 1000, or a share of the candidates such as 0.1; by default all."""
    min: float | None = None
    """Least score that is kept."""
    max: float | None = None
    """Largest score that is kept."""

    @model_validator(mode="after")
    def _limits_leave_room(self) -> "Scored":
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min: {self.min} is above max: {self.max}, so nothing is kept; lower it")
        return self

    def choose(self, candidates: Sequence[Candidate], scores: Sequence[float], refused: dict[int, Drop], **facts: Any) -> Outcome:
        """Keep the best of those that are within the limits, and not `refused` by their index; of equals the first.

        A score that is not a number stands for a row without one, which is kept and counts among the best.
        """
        drops = dict(refused)
        for candidate, score in zip(candidates, scores, strict=True):
            if candidate.index in drops:
                continue
            if self.min is not None and score < self.min:
                drops[candidate.index] = Drop(candidate.index, f"{self.name}: below {self.min:g}", f"{score:.4g}")
            elif self.max is not None and score > self.max:
                drops[candidate.index] = Drop(candidate.index, f"{self.name}: above {self.max:g}", f"{score:.4g}")
        left = [(candidate, score) for candidate, score in zip(candidates, scores, strict=True) if candidate.index not in drops]
        ranked = sorted(left, key=lambda scored: (not math.isnan(scored[1]), -scored[1], scored[0].index))
        for candidate, score in ranked[keep_number(self.keep, len(candidates)) :]:
            drops[candidate.index] = Drop(candidate.index, f"{self.name}: not among the best", f"{score:.4g}")
        kept = [candidate for candidate in candidates if candidate.index not in drops]
        return Outcome(kept, [drops[index] for index in sorted(drops)], facts={"scores": spread(scores), **facts})


def answered(row: Row) -> list[Message]:
    """All messages up to the answer that counts: the chosen one of a pair, or the last one that may be learned; none without any."""
    if not isinstance(row, Conversation):
        return [*row.prompt, *row.chosen]
    counts = [number for number, message in enumerate(row.messages) if message["role"] == "assistant" and message.get("train", True)]
    return row.messages[: counts[-1] + 1] if counts else []


def keep_number(keep: int | float | None, num_candidates: int) -> int:
    """How many rows `keep` allows."""
    if keep is None:
        return num_candidates
    return keep if isinstance(keep, int) else max(1, round(keep * num_candidates))


def spread(scores: Sequence[float]) -> dict[str, float]:
    """How the scores lie, without those that are none: plain JSON."""
    import numpy as np

    there = np.array([score for score in scores if not math.isnan(score)])
    if not len(there):
        return {}
    names = {"lowest": 0, "tenth": 10, "median": 50, "ninetieth": 90, "highest": 100}
    return {name: float(np.percentile(there, share)) for name, share in names.items()}


def measure_by_length(bench: Bench, name: str, lengths: Sequence[int], compute: "Callable[[Sequence[int]], Floats]") -> "Floats":
    """`compute` of all numbers of rows, those of like length together, in the order of the rows, `(N, ...)`."""
    import numpy as np

    if not lengths:
        return np.empty((0, 0), dtype=np.float32)
    bench.progress.phase(f"{name}: score", len(lengths))
    order = np.argsort(np.array(lengths), kind="stable")
    measured = bench.measure("scores", [int(number) for number in order], compute, chunk_size=ROWS_AT_ONCE)
    scores = np.empty_like(measured)
    scores[order] = measured
    return scores
