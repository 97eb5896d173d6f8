"""Heartbeats: where each rank is, as it says itself; and a report of who hangs, or died, and where.

    rank     tell(phase, step, samples)   before every micro-batch: rank_N.beat, one small record that is overwritten in place
    driver   Lookout.look()               nothing new of any rank for `stall_timeout_s`: `failure.json`, and the stage fails
             Lookout.died()               a rank is dead: the same

A rank tells from the very thread that works, so that one which hangs falls silent. A record goes to the system's page cache, which
no disk is waited for and which outlives a process that is killed, so it is the last word of a rank to the micro-batch. On SIGUSR1 a rank
writes down the stacks of its threads, even where Python comes no further. All lies in the logs of the attempt.

    python -m posttrain.heartbeat LOGS    what the ranks of this host do; it has them write their stacks
"""

import faulthandler
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from posttrain import disk
from posttrain.error import StageFailed
from posttrain.ledger import Attempt
from posttrain.provenance import now

BEAT_FILE = "rank_{rank}.beat"
STACKS_FILE = "rank_{rank}.stacks"
PY_SPY_FILE = "rank_{rank}.py-spy"
REPORT = "failure.json"
STACKS_ON = signal.SIGUSR1
RECORD_BYTES = 2048
NUM_SAMPLES = 64
"""Samples of a micro-batch that a record names: the first ones, which are the longest."""
NUM_LETTERS = 200
NUM_SHOWN = 4
SHARE = 0.01
"""Of a rank's time that telling may take: on a disk that is slow to take a record, fewer are written."""
UNSTEADY = 4
"""By how much longer than a step a phase may take that has not come a step further yet: loading, compiling, saving, verifying."""
WAITS = "wait for "
"""How phases begin that wait for another run, for as long as that takes."""
LOOK_AT_LEAST_EVERY_S, LOOK_AT_MOST_EVERY_S = 30.0, 1.0
STACKS_WITHIN_S = 3.0
POLL_S = 0.05
PY_SPY_WITHIN_S = 10.0
LAST_LINES = 20
LAST_BYTES = 1 << 13
BORN_WITHIN_S = 2.0
"""How far apart two readings of when a process began may be."""
ENDED = "ended"


# --- in a rank -------------------------------------------------------------------------------------------------------


@dataclass
class _Rank:
    """What this process has said of itself."""

    handle: int
    said: dict[str, Any]
    stacks: IO[str]
    """Kept open for the handler of the signal."""
    began_step: int = 0
    silent_until: float = 0.0
    """Time of the monotonic clock before which nothing more is written of the same phase."""


_rank: _Rank | None = None


def begin(logs: Path, rank: int, build: str) -> None:
    """From here on this process is that rank of an attempt at `build`, and writes its stacks when it is asked to."""
    global _rank
    with suppress(OSError):  # a full disk is for the work to meet; it may have room for that
        handle = os.open(logs / BEAT_FILE.format(rank=rank), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        stacks = (logs / STACKS_FILE.format(rank=rank)).open("w", encoding="utf-8")
        faulthandler.enable()  # what a rank that crashes in C was at stands in its log
        faulthandler.register(STACKS_ON, file=stacks, all_threads=True)
        process = psutil.Process()
        said = {"rank": rank, "host": socket.gethostname(), "pid": process.pid, "born": process.create_time(), "build": build}
        _rank = _Rank(handle, said, stacks)
        tell("begin")


def tell(phase: str, step: int = 0, *, micro_batch: int | None = None, samples: Sequence[int] = ()) -> None:
    """Say that `step` steps of the phase are done, and which samples come next. Nothing where this process is no rank."""
    rank = _rank
    if rank is None or rank.said["pid"] != os.getpid():  # a process that a rank has forked
        return
    started = time.monotonic()
    is_new = phase != rank.said.get("phase")
    if is_new:
        rank.began_step = step
    rank.said |= {
        "phase": phase[:NUM_LETTERS],
        "step": step,
        "micro_batch": micro_batch,
        "samples": list(samples[:NUM_SAMPLES]),
        "num_samples": len(samples),
        "is_steady": step > rank.began_step,
        "time": time.time(),
    }
    if is_new or started >= rank.silent_until:
        flush()
        rank.silent_until = time.monotonic() + (time.monotonic() - started) / SHARE


def flush() -> None:
    """Write what was told last, whenever something was written before."""
    if _rank is not None:
        with suppress(OSError):
            os.pwrite(_rank.handle, json.dumps(_rank.said).encode()[:RECORD_BYTES].ljust(RECORD_BYTES), 0)


# --- on the host of a rank -------------------------------------------------------------------------------------------


def read_beat(logs: Path, rank: int) -> dict[str, Any] | None:
    """What a rank told last; None where it told nothing yet, or is telling right now."""
    try:
        record: dict[str, Any] = json.loads((logs / BEAT_FILE.format(rank=rank)).read_bytes())
    except (OSError, ValueError):
        return None
    return record


def examine(logs: Path) -> dict[int, str]:
    """What the processes of this host's ranks do, such as `sleeping`, `stopped` or `ended`; those that can write down their stacks."""
    host = socket.gethostname()
    found: dict[int, str] = {}
    asked = []
    for path in logs.glob(BEAT_FILE.format(rank="*")):
        record = read_beat(logs, int(path.stem.removeprefix("rank_")))
        if record is None or record["host"] != host:
            continue
        rank = record["rank"]
        try:
            process = psutil.Process(record["pid"])
            if abs(process.create_time() - record["born"]) > BORN_WITHIN_S:
                raise psutil.NoSuchProcess(record["pid"])
            found[rank] = process.status()
            if found[rank] == psutil.STATUS_ZOMBIE:
                raise psutil.NoSuchProcess(record["pid"])
            _spy(record["pid"], logs / PY_SPY_FILE.format(rank=rank))
            process.send_signal(STACKS_ON)
            if found[rank] != psutil.STATUS_STOPPED:
                asked.append(logs / STACKS_FILE.format(rank=rank))
        except psutil.Error:
            found[rank] = ENDED
    deadline = time.monotonic() + STACKS_WITHIN_S
    while not all(path.is_file() and path.stat().st_size for path in asked) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    time.sleep(POLL_S)  # the last one may still be at it
    return found


def _spy(pid: int, path: Path) -> None:
    """Write the stacks of a process to a file as py-spy sees them, where it is installed: of one that is stopped too, in C code too."""
    command = shutil.which("py-spy")
    if command is None:
        return
    with suppress(OSError, subprocess.SubprocessError):
        arguments = [command, "dump", "--nonblocking", "--pid", str(pid)]
        said = subprocess.run(arguments, capture_output=True, text=True, timeout=PY_SPY_WITHIN_S)
        path.write_text(said.stdout or said.stderr, encoding="utf-8")


# --- in the driver ---------------------------------------------------------------------------------------------------


class Lookout:
    """Watches the ranks of one phase of an attempt, and reports on those that hang or died.

    `examine` is what becomes known of the processes of all hosts.
    """

    def __init__(self, directory: Path, attempt: Attempt, num_ranks: int, examine: Callable[[Path], Mapping[int, str]] = examine) -> None:
        self._directory = directory
        self._attempt = attempt
        self._logs = attempt.logs(directory)
        self._ranks = range(num_ranks)
        self._examine = examine
        self._processes: Mapping[int, str] | None = None
        self._limit_s: float | None = attempt.config["stall_timeout_s"]
        self._told: list[dict[str, Any] | None] = []
        self._silent_s = 0.0
        self._looked = time.monotonic()

    def look(self) -> None:
        """Raise `StageFailed` where no rank has come any further for as long as the stage allows. To be called often."""
        if self._limit_s is None:
            return
        every_s = min(LOOK_AT_LEAST_EVERY_S, max(LOOK_AT_MOST_EVERY_S, self._limit_s / 20))
        since_s = time.monotonic() - self._looked
        if since_s < every_s:
            return
        self._looked += since_s
        self._silent_s += min(since_s, 2 * every_s)  # where this process was stopped itself, so were the ranks
        told = [read_beat(self._logs, rank) for rank in self._ranks]
        at_work = [record for record in told if record and record["phase"] != ENDED]
        if told != self._told or any(record["phase"].startswith(WAITS) for record in at_work):
            self._told, self._silent_s = told, 0.0
        is_steady = bool(at_work) and all(record["is_steady"] for record in at_work)
        if self._silent_s > self._limit_s * (1 if is_steady else UNSTEADY):
            self.examine()
            rank = self._laggard()
            where = f" on {record['host']}" if (record := read_beat(self._logs, rank)) else ""
            process = (self._processes or {}).get(rank)
            lags = f"rank {rank}{where} lags" + (f" (its process is {process})" if process in (psutil.STATUS_STOPPED, ENDED) else "")
            raise self._failed(rank, f"no rank came any further for {self._silent_s:,.0f} s, and {lags}")

    def examine(self) -> None:
        """Have the ranks that are left write down their stacks, before they are stopped."""
        self._processes = self._examine(self._logs)

    def died(self, rank: int, how: str) -> StageFailed:
        """What to raise where a rank is dead; `how` begins with its name."""
        return self._failed(rank, how)

    def _laggard(self) -> int:
        """The rank that the others wait for: stopped or gone; else the one that came least far and waits for nobody."""
        records = {rank: read_beat(self._logs, rank) for rank in self._ranks}
        told = {rank: record for rank, record in records.items() if record and record["phase"] != ENDED}
        if len(told) < len(records):
            silent = [rank for rank, record in records.items() if record is None]
            if silent or not told:
                return [*silent, 0][0]
        is_one_phase = len({record["phase"] for record in told.values()}) == 1

        def order(rank: int) -> tuple[Any, ...]:
            record = told[rank]
            place = (record["step"], -1 if record["micro_batch"] is None else record["micro_batch"]) if is_one_phase else (0, 0)
            waits = any("distributed_c10d.py" in line for line in self._stack(rank))
            is_there = (self._processes or {}).get(rank) not in (psutil.STATUS_STOPPED, ENDED)
            return is_there, place, waits, record["time"]

        return min(told, key=order)

    def _failed(self, rank: int, how: str) -> StageFailed:
        record = read_beat(self._logs, rank)
        said = f"stages.{self._attempt.name}: {how}"
        again: list[int] = []
        if record is not None:
            said += f"; it was at {describe(record)}"
            again, samples = self._before(record)
            if again:
                where = f"sample{'s'[: len(samples) > 1]} {_list(samples, len(samples))}" if samples else "the same place"
                said += f"; at {where} it failed in attempt{'s'[: len(again) > 1]} {_list(again, len(again))} too"
        path = self._logs / REPORT
        try:
            disk.write_json(path, self._report(rank, said, record, again))
        except OSError:  # on a full disk the line still says it
            return StageFailed(f"{said}; its log is {self._logs}/rank_{rank}.log")
        return StageFailed(f"{said}; stacks and logs of all ranks are in {path}")

    def _report(self, rank: int, said: str, record: Mapping[str, Any] | None, again: Sequence[int]) -> dict[str, Any]:
        return {
            "what": said,
            "rank": rank,
            "written": now(),
            "build": self._attempt.fingerprint,
            "failed_there_in_attempts": [*again, self._attempt.number] if again else [],
            "last_told": record,
            "ranks": [
                {
                    "rank": each,
                    "told": told,
                    "silent_s": None if told is None else round(time.time() - told["time"], 1),
                    "process": (self._processes or {}).get(each),
                    "stacks": self._stack(each),
                    "py_spy": _last_lines(self._logs / PY_SPY_FILE.format(rank=each), None),
                    "log": _last_lines(self._logs / f"rank_{each}.log", LAST_LINES),
                }
                for each in self._ranks
                for told in [read_beat(self._logs, each)]
            ],
        }

    def _stack(self, rank: int) -> list[str]:
        return _last_lines(self._logs / STACKS_FILE.format(rank=rank), None)

    def _before(self, record: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """The earlier attempts at this build that failed where this one does, and the samples that were at hand in all of them."""
        attempts, samples = [], set(record["samples"])
        for number in range(1, self._attempt.number):
            try:
                report = disk.read_json(self._logs.parent / f"attempt_{number}" / REPORT)
            except (OSError, ValueError):
                continue
            before = report["last_told"] if report and report["build"] == self._attempt.fingerprint else None
            if before is None or before["phase"] != record["phase"]:
                continue
            if common := samples & set(before["samples"]):
                samples = common
                attempts.append(number)
            elif not samples and before["step"] == record["step"]:
                attempts.append(number)
        return attempts, [sample for sample in record["samples"] if sample in samples]


def num_fruitless(directory: Path, attempt: Attempt) -> int:
    """How many attempts just before this one, at the same build, came no further than the one before them."""
    told = []
    for number in range(attempt.number - 1, 0, -1):
        record = read_beat(directory / "logs" / f"attempt_{number}", 0)
        if record is None or record["build"] != attempt.fingerprint:
            break
        told.append(record)
    further = [later["phase"] != before["phase"] or later["step"] > before["step"] for later, before in itertools.pairwise(told)]
    return further.index(True) if True in further else len(further)


def describe(record: Mapping[str, Any]) -> str:
    """Where a rank was, in words: phase, step, samples."""
    parts = [str(record["phase"])]
    if record["step"]:
        parts.append(f"after step {record['step']}")
    if record["samples"]:
        parts.append(f"sample{'s'[: record['num_samples'] > 1]} {_list(record['samples'], record['num_samples'])}")
    return ", ".join(parts)


def _list(numbers: Sequence[int], total: int) -> str:
    shown = ", ".join(map(str, numbers[:NUM_SHOWN]))
    return shown if total <= NUM_SHOWN else f"{shown} and {total - NUM_SHOWN} more"


def _last_lines(path: Path, most: int | None) -> list[str]:
    """The last lines of a file; all of the last kilobytes where `most` is None."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - (LAST_BYTES if most else LAST_BYTES * 8)))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines[-most:] if most else lines


def main(arguments: Sequence[str]) -> None:
    """Print a line for each rank of this host: its number, and what its process does."""
    for rank, process in examine(Path(arguments[0])).items():
        print(rank, process, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
