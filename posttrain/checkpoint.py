"""Checkpoints: resumable training state, private to one stage, counted only when whole.

A checkpoint is whole when it holds the marker COMPLETE, which is written last, after every rank has written its part.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import disk

MARKER = "COMPLETE"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its directory, the optimizer step it was taken after, and the number of ranks that wrote it."""

    path: Path
    step: int
    world_size: int


def last_complete(directory: Path) -> Checkpoint | None:
    """The whole checkpoint of the highest step, or None. What has no marker is passed over, whatever its number."""
    found = []
    for marker in directory.glob(f"checkpoint-*/{MARKER}"):
        try:
            record = json.loads(marker.read_text())
            found.append(Checkpoint(marker.parent, record["step"], record["world_size"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a marker that cannot be read marks nothing
    return max(found, key=lambda checkpoint: checkpoint.step, default=None)


def mark_complete(path: Path, step: int, world_size: int) -> None:
    """Declare the checkpoint whole. To be called by one rank, after a barrier of all."""
    disk.sync_tree(path)
    record: dict[str, Any] = {"step": step, "world_size": world_size}
    disk.write_json(path / MARKER, record)
