"""Checkpoints: resumable training state, private to one stage, counted only when whole.

    checkpoint-<step>/   rank_00000.safetensors   of training: the parts of weights and optimizer state that the rank held
                         rank_00000.json          which parts these are, and the rank's random numbers and sums
                         ...
                         COMPLETE                 written last: step, what the state belongs to, size and hash of every file
    weights-<step>/      the same of the weights alone, of the step that a stage with `select` would publish so far

What has no marker, or whose marker, sizes or hashes do not fit, is never used. What lies in the files is independent of how
many ranks wrote it and how they shared it out (`posttrain/state.py`). Imports no torch.
"""

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain import disk
from posttrain.recipe import KeepPolicy

MARKER = "COMPLETE"
PREFIX = "checkpoint-"
WEIGHTS_PREFIX = "weights-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose marker says that it is whole: its directory, and the optimizer step that it was taken after."""

    path: Path
    step: int
    world_size: int
    belongs_to: Mapping[str, Any]
    """What the state would be misused for if it changed: name of a field to its value."""
    metrics: Mapping[str, float] = field(repr=False)
    """What was logged last before it."""
    files: Mapping[str, Mapping[str, Any]] = field(repr=False)
    """Name of each file to its `bytes` and `sha256`."""
    weights: int | None = None
    """Step of the weights that it cannot do without: those that were best until then, where they are not its own."""

    @property
    def num_bytes(self) -> int:
        """Size of all its files."""
        return sum(int(file["bytes"]) for file in self.files.values())


def directory_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"{PREFIX}{step}"


def weights_of(checkpoints: Path, step: int) -> Path:
    """Where the weights of a step lie."""
    return checkpoints / f"{WEIGHTS_PREFIX}{step}"


def list_complete(checkpoints: Path, prefix: str = PREFIX) -> list[Checkpoint]:
    """The checkpoints whose marker can be read and whose files have the sizes that it says, the newest first."""
    found = [read_checkpoint(marker.parent) for marker in checkpoints.glob(f"{prefix}*/{MARKER}")]
    return sorted((each for each in found if each and not _wrong_sizes(each)), key=lambda each: -each.step)


def last_complete(checkpoints: Path) -> Checkpoint | None:
    """The newest of `list_complete`, or None."""
    return next(iter(list_complete(checkpoints)), None)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """What the marker of a checkpoint says, or None where there is none, or one that was damaged."""
    try:
        return Checkpoint(path, **disk.read_sealed(path / MARKER))
    except (OSError, ValueError, TypeError):
        return None  # a marker that cannot be read marks nothing


def faults(path: Path) -> list[str]:
    """What is wrong with a checkpoint; empty where it is whole. Reads every byte of it."""
    checkpoint = read_checkpoint(path)
    if checkpoint is None:
        return ["damaged marker" if (path / MARKER).exists() else "no marker: it was cut off while it was written"]
    return _wrong_sizes(checkpoint) or [fault for name in checkpoint.files if (fault := wrong_hash(checkpoint, name))]


def wrong_hash(checkpoint: Checkpoint, name: str) -> str | None:
    """What is wrong with the bytes of one of its files, or None."""
    try:
        is_right = disk.hash_file(checkpoint.path / name) == checkpoint.files[name]["sha256"]
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if is_right else f"{name} does not have the hash that was recorded"


def _wrong_sizes(checkpoint: Checkpoint) -> list[str]:
    wrong = []
    for name, said in checkpoint.files.items():
        try:
            found = (checkpoint.path / name).stat().st_size
        except OSError:
            wrong.append(f"{name} is missing")
            continue
        if found != said["bytes"]:
            wrong.append(f"{name} has {found:,} bytes, not {said['bytes']:,}")
    return wrong


def mark_complete(
    path: Path,
    step: int,
    world_size: int,
    *,
    belongs_to: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    hashed: Mapping[str, Mapping[str, Any]] | None = None,
    weights: int | None = None,
) -> None:
    """Declare a checkpoint whole. To be called by one rank, once all files are there; `hashed` are those whose hash is known."""
    known = hashed or {}
    files = {}
    for file in disk.list_files(path):
        name = str(file.relative_to(path))
        if name == MARKER:
            continue  # of an attempt before, and replaced now
        if name not in known:
            disk.sync_file(file)
        files[name] = known.get(name) or {"bytes": file.stat().st_size, "sha256": disk.hash_file(file)}
    disk.sync_directory(path)
    said = {"step": step, "world_size": world_size, "belongs_to": dict(belongs_to or {}), "metrics": dict(metrics or {}), "files": files}
    disk.write_sealed(path / MARKER, {**said, "weights": weights})


def prune(checkpoints: Path, keep: KeepPolicy, *, last: float = math.inf, weights: int | None = None) -> None:
    """Delete what the policy does not keep, and what was cut off or damaged; never the newest whole checkpoint.

    What lies beyond the step `last` could not be gone on from, and does not count. Weights alone are kept of those steps that a
    checkpoint which is kept names, and of the step `weights`, which the next one will.
    """
    whole = [each for each in list_complete(checkpoints) if each.step <= last]
    if whole:
        _prune_checkpoints(checkpoints, keep, whole)
    needed = {weights, *(each.weights for each in list_complete(checkpoints))}
    of_needed = {each.path for each in list_complete(checkpoints, WEIGHTS_PREFIX) if each.step in needed}
    _delete(path for path in checkpoints.glob(f"{WEIGHTS_PREFIX}*") if path not in of_needed)


def _prune_checkpoints(checkpoints: Path, keep: KeepPolicy, whole: Sequence[Checkpoint]) -> None:
    kept = {each.path for each in whole[: keep.save_total_limit]}
    if keep.metric_for_best_model is not None:
        rated = [each for each in whole if keep.metric_for_best_model in each.metrics]
        sign = 1 if keep.greater_is_better else -1
        kept |= {max(rated, key=lambda each: sign * each.metrics[str(keep.metric_for_best_model)]).path} if rated else set()
    total = 0
    for number, each in enumerate(whole):
        total += each.num_bytes if each.path in kept else 0
        if number and keep.max_bytes is not None and total > keep.max_bytes:
            kept.discard(each.path)
    _delete(path for path in checkpoints.glob(f"{PREFIX}*") if path not in kept)


def _delete(paths: Iterable[Path]) -> None:
    for path in list(paths):
        # The marker goes first, so that what is half deleted is not taken for whole.
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
