"""One launch: what every launcher does whose ranks prepare, train and verify a stage within one start of all processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.artifact import FILE as ARTIFACT_FILE
from posttrain.artifact import OUTPUT
from posttrain.error import StageFailed
from posttrain.heartbeat import Lookout
from posttrain.launch.local import heed_deadline, tell_summary
from posttrain.ledger import PREFLIGHT_FILE, Attempt
from posttrain.progress import Watcher

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Following:
    """A stage whose ranks run."""

    look: Callable[[], None]
    """To be called every now and then: shows progress, tells what the preparation found, and raises where a rank hangs or time is up."""
    lookout: Lookout


def is_published(directory: Path) -> bool:
    """Whether all that is left to do is to verify what was published, which needs no other rank."""
    return (directory / OUTPUT).is_dir()


@contextmanager
def following(
    directory: Path,
    attempt: Attempt,
    console: "Console",
    *,
    deadline: float = inf,
    examine: Callable[[Path], dict[int, str]] | None = None,
) -> Iterator[Following]:
    """While the block runs the ranks of a stage. Raises `StageFailed` where it ends well without an artifact.

    `deadline` is a time of the monotonic clock, and `examine` as in `Lookout`.
    """
    is_told = is_published(directory)
    world_size = 1 if is_told else attempt.num_processes
    if not is_told:
        (directory / PREFLIGHT_FILE).unlink(missing_ok=True)  # it tells of the attempt before
    lookout = Lookout(directory, attempt, world_size) if examine is None else Lookout(directory, attempt, world_size, examine)
    with Watcher(directory, attempt.name, console) as watcher:

        def look() -> None:
            nonlocal is_told
            watcher.show()
            if not is_told and (directory / PREFLIGHT_FILE).is_file():
                is_told = True
                tell_summary(directory, console)
            heed_deadline(attempt.name, watcher, deadline)
            lookout.look()

        yield Following(look, lookout)
    if not (directory / ARTIFACT_FILE).is_file():
        raise StageFailed(f"stages.{attempt.name}: ended without an artifact; its logs are in {attempt.logs(directory)}")
