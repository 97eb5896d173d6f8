"""What finished steps decided, on disk: a stage that is started again goes on after the last of them.

Checkpoint N holds what step N decided about its candidates, so all candidates come about again by reading the data and
applying the checkpoints in order. Checkpoint 0, of the reading alone, says that what steps measured is worth keeping.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from typing import Any

from posttrain import disk
from posttrain.checkpoint import MARKER, directory_of, faults, mark_complete
from posttrain.curate.records import from_state, to_state
from posttrain.curate.step import Candidate, Drop, Outcome
from posttrain.error import Preempted, UserError
from posttrain.progress import Progress
from posttrain.stage import StageContext

FILE = "outcome.json"


def save_start(context: StageContext[Any]) -> None:
    """Declare that the data was read whole; the main rank alone."""
    if not context.is_main:
        return
    path = directory_of(context.checkpoints, 0)
    path.mkdir(parents=True, exist_ok=True)
    mark_complete(path, 0, context.world_size)


def load_outcome(context: StageContext[Any], number: int, candidates: Sequence[Candidate]) -> Outcome | None:
    """What step `number` decided about `candidates` before the stage was cut off; None where it did not come to that."""
    path = directory_of(context.checkpoints, number)
    if not (path / MARKER).is_file():
        return None
    if wrong := faults(path):
        print(f"{path} is not used: {wrong[0]}", flush=True)
        return None
    return _decode((path / FILE).read_text(encoding="utf-8"), candidates)


def save_outcome(context: StageContext[Any], number: int, candidates: Sequence[Candidate], outcome: Outcome) -> Outcome:
    """Save what step `number` decided about `candidates`. Returns it as a later attempt will load it."""
    text = _encode(candidates, outcome)
    if context.is_main:
        path = directory_of(context.checkpoints, number)
        path.mkdir(parents=True, exist_ok=True)
        disk.write_text(path / FILE, text)
        mark_complete(path, number, context.world_size)
    return _decode(text, candidates)


def forget_outcomes(context: StageContext[Any]) -> None:
    """Remove all that was saved; the main rank alone. Once nothing is left of the rows, it would only bar another config."""
    if context.is_main:
        shutil.rmtree(context.checkpoints, ignore_errors=True)


@contextmanager
def forget_if_idle(context: StageContext[Any]) -> Iterator[None]:
    """Remove what was saved where the block ends in a user's mistake before anything was decided or measured: it would only bar
    the config that mends it."""
    try:
        yield
    except UserError:
        kept = [path for path in context.checkpoints.glob("*/*") if path.parent.name != "checkpoint-0"]
        if not any(path.is_file() or any(path.iterdir()) for path in kept):
            forget_outcomes(context)
        raise


class StopInOrder(Progress):
    """Progress that ends the work with `Preempted` at the next step forward after SIGTERM or SIGUSR2.

    All that is saved is saved whole, so it may end anywhere; but what a signal handler raises is lost in some places, such as
    a fork, so the handler only takes note.
    """

    signalled = False

    def step(self, step: int, **values: float) -> None:
        """So many steps of the phase are done: now is the time to stop, where a signal asked for it."""
        super().step(step, **values)
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Raise `Preempted` where a signal asked for it."""
        if self.signalled:
            raise Preempted("curate keeps the steps it has finished")

    def note_signal(self, signum: int) -> None:
        """Remember that a signal asked for an end."""
        self.signalled = True


def _encode(candidates: Sequence[Candidate], outcome: Outcome) -> str:
    rows = {candidate.index: candidate.row for candidate in candidates}
    changed = {kept.index: to_state(kept.row) for kept in outcome.kept if kept.row is not rows[kept.index] and kept.row != rows[kept.index]}
    return json.dumps(
        {
            "kept": [kept.index for kept in outcome.kept],
            "changed": changed,
            "dropped": [astuple(drop) for drop in outcome.dropped],
            "changes": dict(outcome.changes),
            "facts": dict(outcome.facts),
        },
        ensure_ascii=False,
        allow_nan=False,
    )


def _decode(text: str, candidates: Sequence[Candidate]) -> Outcome:
    state = json.loads(text)
    changed = {int(index): from_state(row) for index, row in state["changed"].items()}
    given = {candidate.index: candidate for candidate in candidates}
    kept = [replace(given[index], row=changed[index]) if index in changed else given[index] for index in state["kept"]]
    return Outcome(kept, [Drop(*drop) for drop in state["dropped"]], state["changes"], state["facts"])
