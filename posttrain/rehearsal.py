"""Rehearsal: whether a stage that is killed and run again publishes what it would have published left alone.

    run  ->  run again, anew, and kill it after a checkpoint  ->  run on  ->  compare file by file, and loss by loss

Of the user's own pipeline, with few steps, under a root of its own, by the very commands that a user gives.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain import artifact, checkpoint
from posttrain.error import StageFailed, UserError

POLL_S = 0.002
KILLS = 5
"""How often it is tried to hit a stage in the middle of training."""


def few_steps(num_steps: int) -> dict[str, int]:
    """Settings by which a stage that trains takes so many steps, and keeps the state and the metrics of each."""
    return {"max_steps": num_steps, "save_steps": 1, "logging_steps": 1}


def outcome(directory: Path) -> dict[str, object]:
    """Name of each file that the finished stage in `directory` published to its hash, and of each step to its loss."""
    finished = artifact.read_artifact(directory)
    assert finished is not None, "the run ended well"
    losses = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    files = {name: record["sha256"] for name, record in finished.files.items()}
    return {**files, **{f"loss of step {entry['step']}": entry["loss"] for entry in losses}}


@dataclass(frozen=True)
class Rehearsal:
    """One stage of one pipeline file, rehearsed under `root`."""

    command: Sequence[str]
    """What starts the command line of the project."""
    arguments: Sequence[str]
    """The pipeline file and its overrides."""
    directory: Path
    """Of the stage, under `root`."""
    root: Path
    num_steps: int

    def differences(self, say: Callable[[str], None]) -> list[str]:
        """What differs between a run that was killed and one that was not; empty where resuming is exact. Tells what it does by `say`."""
        say(f"{self.directory.name}: {self.num_steps} steps without interruption")
        self._finish()
        whole = outcome(self.directory)
        step = self._kill(say)
        say(f"{self.directory.name}: killed after the checkpoint of step {step}, and run again")
        self._finish()
        resumed = outcome(self.directory)
        return [
            f"{name}: {_short(whole.get(name))} without interruption, {_short(resumed.get(name))} resumed"
            for name in sorted(whole.keys() | resumed.keys())
            if whole.get(name) != resumed.get(name)
        ]

    def _start(self, *more: str) -> subprocess.Popen[str]:
        command = [*self.command, "run", *self.arguments, "--root", str(self.root), "--until", self.directory.name, *more]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def _finish(self) -> None:
        process = self._start()
        try:
            _, said = process.communicate()
        finally:
            _end(process)
        if process.returncode:
            last = (said.strip().splitlines() or ["without a word"])[-1]
            failed = UserError if process.returncode == 2 else StageFailed
            raise failed(f"the rehearsal ended with exit code {process.returncode}: {last}")

    def _kill(self, say: Callable[[str], None]) -> int:
        """Build the stage anew and kill all its processes once a checkpoint of it is whole; the step of that."""
        for _ in range(KILLS):
            process = self._start("--rebuild", self.directory.name)
            try:
                while (code := process.poll()) is None and checkpoint.last_complete(self.directory / "checkpoints") is None:
                    time.sleep(POLL_S)
            finally:
                _end(process)
            if code:
                raise StageFailed(f"the rehearsal ended with exit code {code} where it was to be killed; run it again")
            last = checkpoint.last_complete(self.directory / "checkpoints")
            if last is not None and last.step < self.num_steps and not (self.directory / artifact.OUTPUT).exists():
                return last.step
            say(f"{self.directory.name}: it had trained to its end before it could be killed; again")
        raise UserError(f"--steps {self.num_steps}: are over before the stage can be killed among them; give more")


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) else value


def _end(process: subprocess.Popen[str]) -> None:
    """Kill the process and all that it started, as a machine that loses its power would."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    if process.stderr is not None:
        process.stderr.close()
