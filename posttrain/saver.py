"""Saving a training run while it goes on, and finding what it can go on from.

A save takes a copy of the state and gives it to a thread, so training waits for the copy only; where memory has no room for
one, it waits for the disk. State that changes no more, as after the last step, needs no copy. Every rank writes its own files,
hashes them and says so in its record, and the main rank's thread declares the checkpoint whole once all records are there: no
rank waits for another in a collective meanwhile.
"""

import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from posttrain import disk, state
from posttrain.checkpoint import (
    WEIGHTS_PREFIX,
    Checkpoint,
    directory_of,
    list_complete,
    mark_complete,
    prune,
    weights_of,
    wrong_hash,
)
from posttrain.error import UserError
from posttrain.ranks import any_rank, of_main, sum_over_ranks
from posttrain.recipe import KeepPolicy
from posttrain.stage import StageContext

POLL_S = 0.05
SPARE_BYTES = 1 << 24
"""Disk that must be left beside a checkpoint, for logs and records."""
ROOM_FOR_COPY = 1.5
"""Memory that must be free for the copy, in sizes of it."""
FIRST_TAKES_S, MOST_TAKES_S, FIRST_BYTES_PER_S = 5.0, 30.0, 50e6
"""What the first save is taken to need, until it is measured: that long on any disk, and for its bytes on a slow one, within bounds."""


class Saver:
    """Saves the state of one trainer, as often as it is asked to."""

    def __init__(self, context: StageContext[Any], keep: KeepPolicy, belongs_to: Mapping[str, Any], *, first_bytes: int) -> None:
        self.context = context
        self.keep = keep
        self.belongs_to = belongs_to
        self.saved_step: int | None = None
        """The step that was saved last, or gone on from."""
        self.num_saves = 0
        self.held_s = 0.0
        """Seconds for which training waited, over all saves."""
        self.takes_s = min(MOST_TAKES_S, FIRST_TAKES_S + first_bytes / FIRST_BYTES_PER_S)
        """Seconds from the last save's start until it was whole; before there is one, what a state of `first_bytes` may take."""
        self.num_bytes = 0
        """Size of the last checkpoint, over all ranks."""
        self.kept_weights: int | None = None
        """The step whose weights are kept beside the checkpoints, as of now."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, step: int, fragments: Sequence[state.Fragment], said: dict[str, Any], metrics: Mapping[str, float], *, is_final: bool
    ) -> None:
        """Save the state after `step`. All ranks call it; returns once the state may change, which a final one may not before `wait`.

        Raises `UserError` on a full disk.
        """
        self.wait()
        if self.saved_step == step:
            return
        self._save(directory_of(self.context.checkpoints, step), step, fragments, said, metrics, self.kept_weights, is_final=is_final)
        self.saved_step = step

    def save_weights(self, step: int, fragments: Sequence[state.Fragment]) -> None:
        """Keep the weights of `fragments` in place of those that were kept before, once a checkpoint says so. All ranks call it."""
        self.wait()
        self.kept_weights = step
        weights = [replace(fragment, tensors={state.WEIGHT: fragment.tensors[state.WEIGHT]}, scalars={}) for fragment in fragments]
        self._save(weights_of(self.context.checkpoints, step), step, weights, {}, {}, None, is_final=False)

    def _save(
        self,
        path: Path,
        step: int,
        fragments: Sequence[state.Fragment],
        said: dict[str, Any],
        metrics: Mapping[str, float],
        weights: int | None,
        *,
        is_final: bool,
    ) -> None:
        started = time.monotonic()
        context = self.context
        mine = sum(tensor.nbytes for fragment in fragments for tensor in fragment.tensors.values())
        self.num_bytes = sum_over_ranks(mine)
        if context.is_main:
            shutil.rmtree(path, ignore_errors=True)  # what was cut off, or damaged
            path.mkdir(parents=True)
        self._make_room(path, step)
        has_room = psutil.virtual_memory().available > ROOM_FOR_COPY * self.num_bytes
        tensors = {f"{key}:{fragment.name}": tensor for fragment in fragments for key, tensor in fragment.tensors.items()}
        if has_room and not is_final:
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        record = {
            "fragments": {
                fragment.name: {
                    "shape": list(fragment.shape),
                    "start": fragment.start,
                    "tensors": {key: tensor.numel() for key, tensor in fragment.tensors.items()},
                    "scalars": fragment.scalars,
                }
                for fragment in fragments
            },
            **said,
        }

        held = [0.0]
        what, num_bytes, kept = path.name.partition("-")[0], self.num_bytes, self.kept_weights

        def work() -> None:
            try:
                self._write(path, step, tensors, record, metrics, weights)
                self.takes_s = time.monotonic() - started
                if context.is_main:
                    prune(context.checkpoints, self.keep, last=step, weights=kept)
                    size = f"{num_bytes / 1e6:,.1f} MB"
                    print(f"{what} of step {step}: {size}, training waited {held[0]:.2f} s, whole after {self.takes_s:.2f} s", flush=True)
            except BaseException as error:
                self._error = error

        self.num_saves += 1
        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        held[0] = time.monotonic() - started
        if not has_room and not is_final:
            self.wait()
        self.held_s += time.monotonic() - started

    def check(self) -> None:
        """Raise what went wrong in the background."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait until what was saved last is whole. Raises what went wrong."""
        if self._thread is not None:
            while self._thread.is_alive():
                self._thread.join(POLL_S)  # in short pieces, so that signals are heard
            self._thread = None
        self.check()

    def _make_room(self, path: Path, step: int) -> None:
        """Raise `UserError` where the disk has no room for the checkpoint, even with all but the newest deleted."""
        needed = self.num_bytes + SPARE_BYTES
        context = self.context
        if context.is_main and shutil.disk_usage(path).free < needed:
            prune(context.checkpoints, KeepPolicy(save_total_limit=2, max_bytes=1), last=step, weights=self.kept_weights)
            path.mkdir(parents=True, exist_ok=True)
        if any_rank(context.is_main and shutil.disk_usage(path).free < needed):
            whole = list_complete(context.checkpoints)
            kept = f"the checkpoint of step {whole[0].step} is kept" if whole else "there is no checkpoint yet"
            raise UserError(
                f"{context.at}: the disk of {context.checkpoints} has no room for a checkpoint of {needed / 1e9:,.2f} GB; {kept}: "
                "free some and run again"
            )

    def _write(
        self,
        path: Path,
        step: int,
        tensors: dict[str, torch.Tensor],
        record: dict[str, Any],
        metrics: Mapping[str, float],
        kept: int | None,
    ) -> None:
        context = self.context
        weights, said = path / state.weights_file(context.rank), path / state.record_file(context.rank)
        files = {}
        try:
            if tensors:
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, str(weights))
                disk.sync_file(weights)
                files[weights.name] = {"bytes": weights.stat().st_size, "sha256": disk.hash_file(weights)}
            disk.write_json(said, {**record, "files": files})
        except BaseException:
            weights.unlink(missing_ok=True)  # so that the disk has room for a word about it
            raise
        if not context.is_main:
            return
        hashed: dict[str, Any] = {}
        for rank in range(context.world_size):
            while not (path / state.record_file(rank)).is_file():
                time.sleep(POLL_S)
            hashed |= disk.read_json(path / state.record_file(rank))["files"]
        mark_complete(path, step, context.world_size, belongs_to=self.belongs_to, metrics=metrics, hashed=hashed, weights=kept)


def find_whole(context: StageContext[Any], belongs_to: Mapping[str, Any]) -> Checkpoint | None:
    """The newest checkpoint of which every byte is as it was written; says what is wrong with others. All ranks call it.

    Raises `UserError` where it belongs to other data, weights or settings than these.
    """
    candidates = list_complete(context.checkpoints) if context.is_main else []
    if context.is_main:
        for path in sorted(context.checkpoints.glob("checkpoint-*")):
            if path not in {each.path for each in candidates}:
                print(f"{path} is not used: it was cut off or damaged", flush=True)
    for checkpoint in of_main(candidates):
        if _is_damaged(context, checkpoint):
            continue
        if checkpoint.weights is not None and find_weights(context, checkpoint.weights) is None:
            print(f"{checkpoint.path} is not used: it needs the weights of step {checkpoint.weights}, which are not whole", flush=True)
            continue
        _check_belongs(context, checkpoint, belongs_to)
        return checkpoint
    return None


def find_weights(context: StageContext[Any], step: int) -> Checkpoint | None:
    """The weights that are kept of a step; None where not every byte of them is as it was written. All ranks call it."""
    found = next((each for each in list_complete(context.checkpoints, WEIGHTS_PREFIX) if each.step == step), None)
    return None if any_rank(found is None) or found is None or _is_damaged(context, found) else found


def _is_damaged(context: StageContext[Any], checkpoint: Checkpoint) -> bool:
    """Whether a byte is not as it was written; says of which file. All ranks call it, and each reads its share."""
    wrong = [
        fault
        for number, name in enumerate(sorted(checkpoint.files))
        if number % context.world_size == context.rank and (fault := wrong_hash(checkpoint, name))
    ]
    for fault in wrong:
        print(f"{checkpoint.path} is not used: {fault}", flush=True)
    return any_rank(bool(wrong))


def _check_belongs(context: StageContext[Any], checkpoint: Checkpoint, belongs_to: Mapping[str, Any]) -> None:
    for name in sorted(belongs_to.keys() | checkpoint.belongs_to.keys()):
        before, after = checkpoint.belongs_to.get(name), belongs_to.get(name)
        if before != after:
            raise UserError(
                f"{context.at}: {name} was {before!r} for the checkpoint of step {checkpoint.step} and is {after!r} now; "
                f"undo the change, or build it again with --rebuild {context.name}"
            )
