"""The queue of a cluster: what every kind of cluster is asked of jobs. One kind a module (`slurm.py`, `kubernetes.py`)."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from posttrain.error import UserError

ANSWER_WITHIN_S = 120.0
"""How long a command of a cluster may take to answer."""
OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")
"""States in which a job neither runs nor will, in the words of Slurm."""


class Refused(UserError):
    """A command of a cluster said no."""


def call(*command: str, cluster: str, check: str) -> str:
    """What a command of a cluster prints. Raises `UserError` where it is missing or does not answer, `Refused` where it says no.

    `check` is a command by which a user sees whether the cluster is up.
    """
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWER_WITHIN_S)
    except OSError:
        raise UserError(f"{command[0]}: is not on the PATH here; use one that has {cluster}'s commands, or launcher.kind=local") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: no answer within {ANSWER_WITHIN_S:.0f} s; is {cluster} up? `{check}` says so") from None
    if done.returncode:
        raise Refused(f"{command[0]}: {(done.stderr.strip().splitlines() or ['refused without a word'])[-1]}")
    return done.stdout


@dataclass(frozen=True)
class Queued:
    """What a cluster says of a job."""

    state: str
    """In the words of Slurm."""
    where: str
    """The nodes that it runs on, or in parentheses why it does not."""

    @property
    def is_over(self) -> bool:
        """Whether it neither runs nor will."""
        return self.state in OVER


class Order(Protocol):
    """What a job is made of: a pure function of the stage and its launcher."""

    @property
    def stage(self) -> str:
        """The stage that it is of."""

    @property
    def file(self) -> str:
        """Name of the file in which it is kept."""

    @property
    def placeholder(self) -> str:
        """What stands for its number where it is only shown."""

    def text(self) -> str:
        """All of it, as the cluster takes it."""

    def log(self, number: str) -> str:
        """Where the job of that number writes what its driver says."""


class Queue(Protocol):
    """A kind of cluster. All raise `UserError` where it cannot be asked."""

    @property
    def name(self) -> str:
        """What people call it."""

    def ask(self, numbers: Sequence[str]) -> dict[str, Queued]:
        """What it says of those of the jobs that it knows."""

    def give(self, path: Path) -> str:
        """Give it a job; the number that it gets. Raises `Refused`."""

    def withdraw(self, number: str) -> str | None:
        """Take a job back that waits, or ask one that runs to save and end; where it runs, if it does."""

    def here(self) -> str | None:
        """The number of the job that this process is in."""

    def again(self, number: str) -> str | None:
        """See to it that the job that this process is in is begun again; why it is not, where it is not."""
