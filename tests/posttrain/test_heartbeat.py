"""A rank that hangs or dies is named, with where it was and what it had in its hands."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest

from posttrain import heartbeat
from posttrain.error import StageFailed
from posttrain.heartbeat import Lookout, describe, num_fruitless, read_beat
from posttrain.launch.slurm import _examine, _refuse_to_repeat
from posttrain.ledger import Attempt
from tests.conftest import REPOSITORY, Ended
from tests.faults import harness

BAD_SAMPLE = 7
LIMIT_S = 4.0
WITHIN_S = 60.0


def attempt_of(directory: Path, number: int = 1, *, limit_s: float | None = 100.0, build: str = "b") -> Attempt:
    attempt = Attempt(
        name="sft", kind="sft", run="r", root=str(directory), version=1, fingerprint=build, identity={}, inputs={}, held_out=[],
        config={"stall_timeout_s": limit_s}, num_processes=2, number=number, started="", token="",
    )  # fmt: skip
    attempt.logs(directory).mkdir(parents=True, exist_ok=True)
    return attempt


def told(attempt: Attempt, directory: Path, rank: int = 0, **fields: object) -> dict[str, Any]:
    """What a rank would have told."""
    record = {
        "rank": rank, "host": "n1", "pid": 1, "born": 0.0, "build": attempt.fingerprint, "phase": "train", "step": 5, "micro_batch": 0,
        "samples": [3], "num_samples": 1, "is_steady": True, "time": 1000.0, **fields,
    }  # fmt: skip
    if "samples" in fields:
        record["num_samples"] = len(record["samples"])  # type: ignore[arg-type]
    (attempt.logs(directory) / f"rank_{rank}.beat").write_text(json.dumps(record))
    return record


# --- patience --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A time of the monotonic clock, to be set."""
    now = [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    return now


def silent_for(lookout: Lookout, clock: list[float], seconds: int) -> str:
    """What the stage fails with in so many seconds in which nobody tells anything new; nothing where it does not."""
    for _ in range(seconds):
        clock[0] += 1.0
        try:
            lookout.look()
        except StageFailed as failure:
            return str(failure)
    return ""


def watched(tmp_path: Path, limit_s: float | None = 100.0) -> tuple[Attempt, Lookout]:
    attempt = attempt_of(tmp_path, limit_s=limit_s)
    return attempt, Lookout(tmp_path, attempt, 2, lambda logs: {})


def test_training_that_comes_no_further_fails_after_the_limit_and_other_phases_after_four_times_as_long(
    tmp_path: Path, clock: list[float]
) -> None:
    attempt, lookout = watched(tmp_path)
    for rank in (0, 1):
        told(attempt, tmp_path, rank, phase="load model", is_steady=False)
    assert not silent_for(lookout, clock, 390)
    for rank in (0, 1):
        told(attempt, tmp_path, rank, is_steady=True)
    assert not silent_for(lookout, clock, 95)
    assert silent_for(lookout, clock, 20)


def test_one_rank_that_comes_further_is_enough(tmp_path: Path, clock: list[float]) -> None:
    attempt, lookout = watched(tmp_path)
    told(attempt, tmp_path, 0, step=1)
    for step in range(10):
        told(attempt, tmp_path, 1, step=step)
        assert not silent_for(lookout, clock, 90)
    assert silent_for(lookout, clock, 30)


@pytest.mark.parametrize(
    ("limit_s", "phase"), [(None, "train"), (100.0, "wait for another process that prepares the same data")], ids=["off", "waiting"]
)
def test_what_may_take_as_long_as_it_likes_is_no_hang(tmp_path: Path, clock: list[float], limit_s: float | None, phase: str) -> None:
    attempt, lookout = watched(tmp_path, limit_s)
    told(attempt, tmp_path, 0, phase=phase)
    assert not silent_for(lookout, clock, 5000)


def test_time_for_which_the_driver_itself_was_stopped_is_not_held_against_the_ranks(tmp_path: Path, clock: list[float]) -> None:
    attempt, lookout = watched(tmp_path)
    told(attempt, tmp_path, 0)
    told(attempt, tmp_path, 1)
    assert not silent_for(lookout, clock, 50)
    clock[0] += 10_000.0
    assert not silent_for(lookout, clock, 30)
    assert silent_for(lookout, clock, 60)


@pytest.mark.parametrize(
    ("first", "second", "processes", "lags"),
    [
        ({"micro_batch": 3}, {"micro_batch": 2, "time": 2000.0}, {}, 1),
        ({"step": 6, "micro_batch": None}, {"step": 5, "micro_batch": 9}, {}, 1),
        ({"time": 1001.0}, {"time": 1000.0}, {}, 1),
        ({"time": 1000.0}, {"time": 1001.0}, {1: "stopped"}, 1),
        ({"micro_batch": 1}, {"micro_batch": 4}, {0: "sleeping", 1: "ended"}, 1),
        ({"phase": "publish", "time": 1001.0}, {"phase": "train", "time": 1000.0}, {}, 1),
        ({"phase": "verify", "time": 1001.0}, {"phase": "ended", "time": 1000.0}, {}, 0),
    ],
    ids=["a micro-batch behind", "a step behind", "silent for longer", "stopped", "gone", "another phase", "the other is done"],
)
def test_who_lags_is_told_by_place_time_and_process(
    tmp_path: Path, clock: list[float], first: dict[str, Any], second: dict[str, Any], processes: dict[int, str], lags: int
) -> None:
    attempt = attempt_of(tmp_path)
    told(attempt, tmp_path, 0, **first)
    told(attempt, tmp_path, 1, host="n2", **second)
    lookout = Lookout(tmp_path, attempt, 2, lambda logs: processes)
    said = silent_for(lookout, clock, 500)
    assert said.startswith("stages.sft: no rank came any further for 1")
    assert f" s, and rank {lags} on n{lags + 1} lags" in said


def test_a_rank_that_waits_for_others_does_not_lag(tmp_path: Path, clock: list[float]) -> None:
    attempt = attempt_of(tmp_path)
    for rank in (0, 1):
        told(attempt, tmp_path, rank)
    waits = 'Current thread 0x1 (most recent call first):\n  File "/x/torch/distributed/distributed_c10d.py", line 1 in all_reduce\n'
    (attempt.logs(tmp_path) / "rank_0.stacks").write_text(waits)
    (attempt.logs(tmp_path) / "rank_1.stacks").write_text('Current thread 0x1 (most recent call first):\n  File "/x/y.py", line 1 in z\n')
    lookout = Lookout(tmp_path, attempt, 2, lambda logs: {})
    assert "rank 1 on n1 lags" in silent_for(lookout, clock, 500)


# --- what is said of it ----------------------------------------------------------------------------------------------


def test_where_a_rank_was_is_told_in_words() -> None:
    record = {"phase": "train", "step": 12, "samples": [4711], "num_samples": 1}
    assert describe(record) == "train, after step 12, sample 4711"
    assert describe({**record, "samples": [5, 4, 3, 2, 1], "num_samples": 70}) == "train, after step 12, samples 5, 4, 3, 2 and 66 more"
    assert describe({**record, "step": 0, "samples": [], "num_samples": 0}) == "train"


def died(tmp_path: Path, number: int, *, build: str = "b", **fields: object) -> tuple[str, dict[str, Any]]:
    """What is said of rank 1, which died in that attempt where it had told to be."""
    attempt = attempt_of(tmp_path, number, build=build)
    told(attempt, tmp_path, 0)
    told(attempt, tmp_path, 1, **fields)
    said = str(Lookout(tmp_path, attempt, 2, lambda logs: {}).died(1, "rank 1 ended (killed by SIGKILL)"))
    return said, json.loads((attempt.logs(tmp_path) / "failure.json").read_text())


def test_a_crash_at_the_same_sample_again_is_said(tmp_path: Path) -> None:
    said, report = died(tmp_path, 1, samples=[4711, 33])
    assert said.startswith("stages.sft: rank 1 ended (killed by SIGKILL); it was at train, after step 5, samples 4711, 33; stacks and logs")
    assert report["failed_there_in_attempts"] == []
    said, report = died(tmp_path, 2, samples=[4711, 34], step=7)
    assert "; at sample 4711 it failed in attempt 1 too; " in said
    assert report["failed_there_in_attempts"] == [1, 2]
    assert "; at sample 4711 it failed in attempts 1, 2 too; " in died(tmp_path, 3, samples=[8, 4711])[0]
    assert "too" not in died(tmp_path, 4, samples=[34])[0].replace("attempt 2 too", "")
    assert "too" not in died(tmp_path, 5, samples=[4711], build="another")[0]
    assert "too" not in died(tmp_path, 6, samples=[4711], phase="save")[0]


def test_a_crash_where_no_sample_is_at_hand_is_at_the_same_place_if_phase_and_step_are(tmp_path: Path) -> None:
    died(tmp_path, 1, phase="load model", step=0, samples=[])
    assert "; at the same place it failed in attempt 1 too; " in died(tmp_path, 2, phase="load model", step=0, samples=[])[0]
    assert "too" not in died(tmp_path, 3, phase="generate", step=0, samples=[])[0]


def test_a_job_that_comes_no_further_is_not_started_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(number: int, **fields: object) -> Attempt:
        attempt = attempt_of(tmp_path, number)
        told(attempt, tmp_path, 0, **fields)
        return attempt

    for number, step in enumerate((10, 20, 20, 15, 15), start=1):
        begun(number, step=step)
    sixth = attempt_of(tmp_path, 6)
    assert num_fruitless(tmp_path, sixth) == 3
    assert num_fruitless(tmp_path, attempt_of(tmp_path, 6, build="another")) == 0
    _refuse_to_repeat(tmp_path, sixth, most=2)  # this is no job that was requeued
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    _refuse_to_repeat(tmp_path, sixth, most=3)
    with pytest.raises(StageFailed, match=r"^stages.sft: was started 4 times and came no further than to train, after step 15, sample 3; "):
        _refuse_to_repeat(tmp_path, sixth, most=2)
    begun(6, phase="publish", step=0)
    assert num_fruitless(tmp_path, attempt_of(tmp_path, 7)) == 0


# --- processes -------------------------------------------------------------------------------------------------------

RANK = """
import sys, time
from pathlib import Path
from posttrain import heartbeat

def wait_for_the_others():
    print("here", flush=True)
    time.sleep(1000)

heartbeat.begin(Path(sys.argv[1]), int(sys.argv[2]), "b")
for step in range(3):
    heartbeat.tell("train", step, micro_batch=0, samples=[step, 9])
    time.sleep(0.05)
wait_for_the_others()
"""


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes that told what they are at, and come no further."""
    logs = attempt_of(tmp_path).logs(tmp_path)
    command = [sys.executable, "-c", RANK, str(logs)]
    started = [subprocess.Popen([*command, str(rank)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_ranks_leave_their_last_word_and_their_stacks_and_go_on(tmp_path: Path, ranks: Sequence[subprocess.Popen[str]]) -> None:
    logs = tmp_path / "logs" / "attempt_1"
    ranks[1].kill()
    ranks[1].wait()
    found = heartbeat.examine(logs)
    assert (found.keys(), found[1]) == ({0, 1}, "ended")
    assert found[0] in ("sleeping", "running")
    assert "in wait_for_the_others" in (logs / "rank_0.stacks").read_text()
    assert ranks[0].poll() is None
    for rank in (0, 1):
        record = read_beat(logs, rank)
        assert record is not None
        assert (record["step"], record["samples"], record["is_steady"], record["host"]) == (2, [2, 9], True, socket.gethostname())


def test_under_slurm_each_node_looks_at_its_own_ranks(
    tmp_path: Path, ranks: Sequence[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a stand-in for srun; tests/cluster has the real one."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\nwhile case "$1" in --*) true ;; *) false ;; esac; do shift; done\nexec "$@"\n')
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{srun.parent}:{os.environ['PATH']}")
    logs = tmp_path / "logs" / "attempt_1"
    ranks[0].send_signal(signal.SIGSTOP)
    record = json.loads((logs / "rank_1.beat").read_text())
    (logs / "rank_2.beat").write_text(json.dumps({**record, "rank": 2, "host": "another"}))
    found = _examine(["this one"], logs)
    assert (found.keys(), found[0]) == ({0, 1}, "stopped")
    assert "in wait_for_the_others" in (logs / "rank_1.stacks").read_text()


# --- stages ----------------------------------------------------------------------------------------------------------


SLOW = (
    "stages.sft.num_processes=2", "stages.sft.micro_batch_tokens=1", "stages.sft.max_steps=400", f"stages.sft.stall_timeout_s={LIMIT_S}",
)  # fmt: skip


def meddle(stage: Path, act: Callable[[dict[str, Any]], None]) -> threading.Thread:
    """Do something to rank 1, as soon as it has trained some steps of attempt 1."""

    def wait() -> None:
        deadline = time.monotonic() + WITHIN_S
        while time.monotonic() < deadline:
            record = read_beat(stage / "logs" / "attempt_1", 1)
            if record and record["phase"] == "train" and record["step"] > 2 and record["samples"]:
                act(record)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_rank_that_hangs_is_reported_and_the_others_are_stopped(
    posttrain: Callable[..., Ended], pipeline_file: Path, tmp_path: Path
) -> None:
    stage = tmp_path / "runs" / "test" / "sft"
    thread = meddle(stage, lambda record: os.kill(record["pid"], signal.SIGSTOP))
    ended = posttrain("run", pipeline_file, "--root", tmp_path / "runs", "--only", "sft", *SLOW)
    thread.join()
    assert ended.code == 1
    (line,) = [line for line in ended.err.splitlines() if line.startswith("failed: ")]
    assert "failed: stages.sft: no rank came any further for " in line
    assert f" s, and rank 1 on {socket.gethostname()} lags (its process is stopped); it was at train, after step " in line
    logs = stage / "logs" / "attempt_1"
    assert f"stacks and logs of all ranks are in {logs}/failure.json" in line
    report = json.loads((logs / "failure.json").read_text())
    assert report["rank"] == 1
    assert report["last_told"]["step"] > 2
    waiting, hung = report["ranks"]
    assert any("posttrain/fit.py" in frame for frame in waiting["stacks"])
    assert hung["process"] == "stopped"
    assert hung["silent_s"] > LIMIT_S
    assert not any(psutil.pid_exists(rank["told"]["pid"]) for rank in report["ranks"])


def test_a_rank_that_is_killed_is_reported_with_the_sample_it_had_at_hand(
    posttrain: Callable[..., Ended], pipeline_file: Path, tmp_path: Path
) -> None:
    stage = tmp_path / "runs" / "test" / "sft"
    logs = stage / "logs" / "attempt_1"
    last: list[dict[str, Any]] = []

    def kill(record: dict[str, Any]) -> None:
        os.kill(record["pid"], signal.SIGSTOP)
        time.sleep(0.1)
        while not (now := read_beat(logs, 1)):
            pass
        last.append(now)
        os.kill(record["pid"], signal.SIGKILL)

    thread = meddle(stage, kill)
    ended = posttrain("run", pipeline_file, "--root", tmp_path / "runs", "--only", "sft", *SLOW)
    thread.join()
    assert ended.code == 1
    assert f"rank 1 ended (killed by SIGKILL); out of memory is the usual reason; it was at {describe(last[0])}; " in ended.err
    report = json.loads((logs / "failure.json").read_text())
    assert report["last_told"] == last[0]
    assert report["rank"] == 1


def drive_with_a_bad_sample(arguments: list[str], log: Path) -> None:
    """A driver under which one sample cannot be computed, in a process forked from a warm parent."""
    from posttrain.fit import OurOrder

    come_to = OurOrder._come_to

    def break_at(self: OurOrder, number: int) -> None:
        come_to(self, number)
        if BAD_SAMPLE in self.at_hand[number]:
            raise RuntimeError("this cannot be computed")

    OurOrder._come_to = break_at  # type: ignore[method-assign]
    harness._drive(arguments, log)


def test_a_sample_that_ends_a_rank_twice_is_named(pipeline_file: Path, tmp_path: Path) -> None:
    harness.warm_up()
    said = []
    for number in (1, 2):
        log = tmp_path / f"log_{number}"
        log.mkdir()
        command = ["run", pipeline_file, "--root", tmp_path / "runs", "--only", "sft", *SLOW]
        driver = get_context("forkserver").Process(target=drive_with_a_bad_sample, args=([*map(str, command)], log))
        driver.start()
        driver.join(WITHIN_S)
        assert driver.exitcode == 1, (log / "err").read_text()
        said.append((log / "err").read_text().splitlines()[-1])
    logs = tmp_path / "runs" / "test" / "sft" / "logs"
    report = json.loads((logs / "attempt_2" / "failure.json").read_text())
    assert f"rank {report['rank']}: RuntimeError: this cannot be computed; it was at train, " in said[0]
    assert f"sample {BAD_SAMPLE}; stacks and logs of all ranks are in " in said[0]
    assert f"sample {BAD_SAMPLE}; at sample {BAD_SAMPLE} it failed in attempt 1 too; " in said[1]
    assert report["failed_there_in_attempts"] == [1, 2]
    assert any("RuntimeError: this cannot be computed" in line for line in report["ranks"][report["rank"]]["log"])
