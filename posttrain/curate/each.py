"""Steps that look at one row at a time: a function from a row to a verdict, called for all rows, on all cores."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posttrain.curate.step import Bench, Candidate, Drop, Outcome
from posttrain.data.rows import Row
from posttrain.parallel import map_chunks

ROWS_AT_ONCE = 100
"""Few, so that the work can be seen to go on, and stopped."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a row: dropped for a reason, or else mended. A row that is kept as it is needs none."""

    reason: str = ""
    detail: str = ""
    row: Row | None = None
    """The mended row."""
    changes: frozenset[str] = frozenset()
    """What was mended."""


def judge_each(candidates: Sequence[Candidate], judge: Callable[[Row], Verdict | None], bench: Bench) -> Outcome:
    """The outcome of a verdict on each row; None keeps it as it is."""

    def work(positions: Sequence[int]) -> list[tuple[int, Verdict]]:
        # The rows were forked along: only the verdicts, of which there are few, travel between the processes.
        verdicts = ((position, judge(candidates[position].row)) for position in positions)
        return [(position, verdict) for position, verdict in verdicts if verdict is not None]

    verdicts: dict[int, Verdict] = {}
    for number, found in enumerate(map_chunks(work, range(len(candidates)), chunk_size=ROWS_AT_ONCE), 1):
        verdicts.update(found)
        bench.progress.step(min(number * ROWS_AT_ONCE, len(candidates)))
    kept, dropped, changes = [], [], Counter[str]()
    for position, candidate in enumerate(candidates):
        verdict = verdicts.get(position)
        if verdict is None:
            kept.append(candidate)
        elif verdict.reason:
            dropped.append(Drop(candidate.index, verdict.reason, verdict.detail))
        else:
            assert verdict.row is not None, "a verdict drops a row or mends it"
            kept.append(Candidate(candidate.index, candidate.source, verdict.row))
            changes.update(verdict.changes)
    return Outcome(kept, dropped, dict(sorted(changes.items())))


def excerpt(text: str, size: int = 100) -> str:
    """The beginning of `text` on one line, for the detail of a drop."""
    line = " ".join(text.split())
    return line if len(line) <= size else line[: size - 3] + "..."
