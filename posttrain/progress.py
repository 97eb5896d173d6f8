"""Progress: what a stage is at, written for whoever watches, and the one live line that shows it.

The main rank writes `progress.json` (the state now) and `metrics.jsonl` (every logged step); the driver, `status` and
any other watcher read the files, so watching needs no connection to the worker. Every rank tells its heartbeat too.
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import disk, heartbeat

if TYPE_CHECKING:
    from rich.console import Console

FILE = "progress.json"
TRAIN = "train"
"""The phase in which steps of training are taken."""
WRITE_EVERY_S = 0.5
PLAIN_LINE_EVERY_S = 10.0


class Progress:
    """The writing side; on any rank but the main one it writes none of these files."""

    def __init__(self, directory: Path, *, is_main: bool) -> None:
        self._directory = directory
        self._is_main = is_main
        self._written = 0.0
        self._phase = ""
        self._state: dict[str, Any] = {}
        self._began = (time.monotonic(), 0)
        self._line = b""
        """The last line of `metrics.jsonl`, as far as this process knows."""

    def phase(self, name: str, num_steps: int = 0, step: int = 0, **values: float) -> None:
        """Begin a phase of `num_steps` (0: unknown), at `step`; `values` are known before there is a step."""
        self._phase = name
        self._state = {"phase": name, "step": step, "num_steps": num_steps, **values}
        self._began = (time.monotonic(), step)
        heartbeat.tell(name, step)
        self._write(force=True)

    def step(self, step: int, **values: float) -> None:
        """`step` steps of the phase are done; `values` such as loss or tokens_per_s go with it."""
        heartbeat.tell(self._phase, step)
        elapsed = time.monotonic() - self._began[0]
        done = step - self._began[1]
        left = self._state["num_steps"] - step
        eta_s = elapsed / done * left if done > 0 and left >= 0 else None
        self._state = {**self._state, "step": step, "eta_s": eta_s, **values}
        self._write(force=step == self._state["num_steps"])

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append a line to `metrics.jsonl`, or add to the last one where that is of the same step."""
        if not self._is_main:
            return
        with (self._directory / "metrics.jsonl").open("ab") as file:
            known = json.loads(self._line) if self._line else {}
            if known.get("step") == step:
                file.truncate(file.tell() - len(self._line))
                values = {**known, **values}
            self._line = json.dumps({"step": step, **values}).encode() + b"\n"
            file.write(self._line)

    def rewind(self, step: int) -> None:
        """Drop the lines of `metrics.jsonl` after `step`, which a resumed run is about to write again."""
        path = self._directory / "metrics.jsonl"
        if self._is_main and path.is_file():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _line_step(line) <= step]
            disk.write_text(path, "".join(line + "\n" for line in lines))
            self._line = f"{lines[-1]}\n".encode() if lines else b""

    def _write(self, *, force: bool) -> None:
        if self._is_main and (force or time.monotonic() - self._written > WRITE_EVERY_S):
            self._written = time.monotonic()
            disk.write_json(self._directory / FILE, {**self._state, "updated": time.time()})


def _line_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a crash


class Watcher:
    """The reading side: one live line on a terminal, a plain line now and then elsewhere."""

    def __init__(self, directory: Path, name: str, console: "Console") -> None:
        self._path = directory / FILE
        self._name = name
        self._console = console
        self._printed = (0.0, "")
        self._status = console.status(f"{name}: starting", spinner="dots") if console.is_terminal else None
        self.state: dict[str, Any] = {}
        """What was read last."""

    def __enter__(self) -> "Watcher":
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status:
            self._status.stop()

    def show(self) -> None:
        """Read the state and show it where it is news."""
        try:
            state = disk.read_json(self._path)
        except (OSError, ValueError):
            return
        if not state:
            return
        self.state = state
        line = f"{self._name}: {describe(state)}"
        if self._status:
            self._status.update(line)
        elif state["phase"] != self._printed[1] or time.monotonic() - self._printed[0] > PLAIN_LINE_EVERY_S:
            self._printed = (time.monotonic(), state["phase"])
            self._console.print(f"  {line}", highlight=False)


def describe(state: dict[str, Any]) -> str:
    """One line: phase, step, loss, speed, time left."""
    parts = [state["phase"]]
    if state.get("num_steps"):
        parts.append(f"{state['step']}/{state['num_steps']}")
    if (loss := state.get("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    if (speed := state.get("tokens_per_s")) is not None:
        parts.append(f"{speed:,.0f} tokens/s")
    if state.get("eta_s") is not None and state["step"] < state["num_steps"]:
        minutes, seconds = divmod(int(state["eta_s"]), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return "  ".join(parts)
