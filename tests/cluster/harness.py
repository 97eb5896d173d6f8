"""A real Slurm of two nodes on this machine, and a chain on it: submitted, troubled, and watched by the files that it writes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.disk import read_json
from posttrain.error import EXIT_PREEMPTED
from tests.conftest import REPOSITORY
from tests.faults.harness import Chain

SCRIPTS = Path(__file__).parent
WITHIN_S = 240.0
POLL_S = 0.1


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if os.geteuid() != 0:
        return "a Slurm of network namespaces needs root"
    if not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "munged", "ip"))):
        return "Slurm is not installed here; tests/cluster/up.sh installs it"
    return None


@dataclass(frozen=True)
class Cluster:
    """The running Slurm whose files lie in `directory`."""

    directory: Path

    def on(self, name: str, *command: object) -> str:
        """What a command prints on `head`, `node1` or `node2`."""
        done = subprocess.run(
            [self.directory / "on", name, *map(str, command)], cwd=REPOSITORY, capture_output=True, text=True, timeout=WITHIN_S
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def pipeline(self, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """A command of the pipeline on a node."""
        command = [self.directory / "on", name, sys.executable, "pipeline.py", *map(str, arguments)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=WITHIN_S)

    def pids(self, name: str, what: str = "") -> list[int]:
        """The processes of a node whose command line holds `what`."""
        namespace = f"{(self.directory / 'prefix').read_text().strip()}-{name}"
        said = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True).stdout
        return [int(pid) for pid in said.split() if what in _command_line(int(pid))]

    def kill(self, name: str) -> None:
        """End all that runs on a node at once, its daemon too."""
        for pid in self.pids(name):
            _send(pid, signal.SIGKILL)

    def revive(self, name: str) -> None:
        """Start the daemon of a node that was killed."""
        subprocess.run([self.directory / "slurmd", name], check=True)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """While the block runs, no rank comes any further."""
        ranks = [pid for name in ("node1", "node2") for pid in self.pids(name, "posttrain.worker") if "srun" not in _command_line(pid)]
        for pid in ranks:
            _send(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in ranks:
                _send(pid, signal.SIGCONT)

    def jobs(self) -> dict[str, str]:
        """Number of each job to its state, of those that Slurm remembers."""
        lines = self.on("head", "squeue", "--noheader", "--states=all", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""  # ended just now


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def wait(condition: Callable[[], Any], what: str, log: Callable[[], str] = str) -> Any:
    """What the condition gives, as soon as that is something."""
    deadline = time.monotonic() + WITHIN_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} within {WITHIN_S} s; {log()}"
        time.sleep(POLL_S)
    return found


@dataclass(frozen=True)
class Submitted:
    """A chain that is given to a cluster."""

    cluster: Cluster
    chain: Chain

    def call(self, command: str, *arguments: object, name: str = "head") -> subprocess.CompletedProcess[str]:
        """A command of the pipeline on this chain."""
        return self.cluster.pipeline(name, command, self.chain.file, *self.chain.overrides, *arguments, "--root", self.chain.root)

    def done(self, command: str, *arguments: object, name: str = "head") -> str:
        """What such a command prints that ends well."""
        ended = self.call(command, *arguments, name=name)
        assert ended.returncode == 0, (ended.stdout, ended.stderr)
        return ended.stdout

    def number(self, stage: str) -> str:
        """The number of the stage's last job."""
        return str(read_json(self.chain.directory / ".jobs" / stage / "job.json")["payload"]["number"])

    def fate(self, stage: str) -> dict[str, str]:
        """What `status` says of it."""
        rows = {row["stage"]: row for row in json.loads(self.done("status", "--json"))}
        return dict(rows[stage].get("job", {}))

    def attempt(self, stage: str = "sft") -> int:
        """How often the stage was begun."""
        record = read_json(self.chain.directory / stage / "stage.json")
        return record["number"] if record else 0

    def log(self, stage: str = "sft") -> str:
        """All that the stage's jobs have said."""
        return "".join(path.read_text() for path in sorted((self.chain.directory / stage / "logs").glob("job_*.log")))

    def meet(self, step: int, *, attempt: int = 1) -> None:
        """Wait until sft has trained beyond a step in that attempt."""
        wait(
            lambda: self.end("sft") or (self.attempt() >= attempt and self.chain.is_in("sft", "train", past=step)),
            f"training was to come beyond step {step} in attempt {attempt}",
            self.log,
        )
        assert not self.end("sft"), f"it was to be troubled, and had ended; {self.log()}"

    def end(self, stage: str) -> dict[str, Any]:
        """What the driver of the stage's last job ended with; nothing while it runs, or where Slurm may start it again."""
        record = read_json(self.chain.directory / ".jobs" / stage / "ended.json")
        return dict(record["payload"]) if record and record["payload"]["code"] != EXIT_PREEMPTED else {}

    def finish(self, stage: str = "sft") -> None:
        """Wait until the stage's job has ended well."""
        wait(lambda: self.end(stage), f"{stage} was to end", self.log)
        assert self.end(stage)["code"] == 0, self.log(stage)
