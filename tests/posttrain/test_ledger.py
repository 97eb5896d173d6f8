"""What the disk says of a stage: attempts, and the lease that lets only one process build it at a time."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from posttrain import disk, ledger
from posttrain.config import DataSource, ModelSource
from posttrain.error import UserError, heed_signals
from posttrain.stage import load_stage

REPOSITORY = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from posttrain import ledger
from posttrain.error import UserError
try:
    with ledger.lease(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
except UserError as error:
    print(error, flush=True)
"""


def holder(directory: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that holds the lease for that long, or says why it cannot."""
    arguments = [sys.executable, "-c", HOLD, str(directory), str(seconds)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def attempt(directory: Path, **fields: object) -> ledger.Attempt:
    stage = load_stage("sft", "")
    source = {"name": "base", "kind": "policy", "fingerprint": "f", "id": "f", "source": {"model": "/base"}}
    data = {"name": "chat", "kind": "dataset", "fingerprint": "g", "id": "g", "source": {"data": "/chat.jsonl"}}
    given = {
        "name": "sft", "run": "r", "root": directory.parent, "fingerprint": "x", "identity": {"kind": "sft"}, "num_processes": 1,
        "config": stage.config(seed=3), "inputs": {"policy": [source], "data": [data]},
    }  # fmt: skip
    return ledger.start_attempt(directory, stage=stage, **{**given, **fields})


# --- attempts --------------------------------------------------------------------------------------------------------


def test_an_attempt_is_read_as_it_was_started(tmp_path: Path) -> None:
    started = attempt(tmp_path)
    assert ledger.read_attempt(tmp_path) == started
    assert started.input_builds == {"base": {"id": "f", "fingerprint": "f"}, "chat": {"id": "g", "fingerprint": "g"}}


def test_attempts_are_numbered_and_each_has_logs_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "logs" / "attempt_of_mine").mkdir(parents=True)
    assert [attempt(tmp_path).number for _ in range(3)] == [1, 2, 3]
    assert all((tmp_path / "logs" / f"attempt_{number}").is_dir() for number in (1, 2, 3))


def test_a_new_attempt_does_not_show_the_progress_of_the_last(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text('{"phase": "train", "step": 9, "num_steps": 9}')
    attempt(tmp_path)
    assert not (tmp_path / "progress.json").exists()


def test_an_attempt_knows_how_long_those_before_it_took_at_the_same_build(tmp_path: Path) -> None:
    first = attempt(tmp_path)
    log = first.logs(tmp_path) / "rank_0.log"
    log.touch()
    began = datetime.fromisoformat(first.started).timestamp()
    os.utime(log, (began + 30, began + 30))
    second = attempt(tmp_path)
    assert second.earlier == [{"started": first.started, "seconds": 30.0, "num_processes": first.num_processes}]
    (tmp_path / "progress.json").touch()
    os.utime(tmp_path / "progress.json", (began + 40, began + 40))
    third = attempt(tmp_path)
    assert [each["seconds"] for each in third.earlier] == [30.0, pytest.approx(40.0, abs=2.0)]
    record = json.loads((tmp_path / "stage.json").read_text())
    (tmp_path / "stage.json").write_text(json.dumps({**record, "fingerprint": "of something else"}))
    assert attempt(tmp_path).earlier == [], "what was spent on something else"


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "{}", '{"name": "sft"}'])
def test_a_damaged_attempt_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "stage.json").write_text(content)
    assert ledger.read_attempt(tmp_path) is None


def test_a_worker_is_told_everything_by_the_attempt(tmp_path: Path) -> None:
    started = attempt(tmp_path)
    read, stage, context = ledger.open_context(tmp_path, rank=1, local_rank=1, world_size=2)
    assert (read, stage.kind, context.config.seed, context.root) == (started, "sft", 3, tmp_path.parent)
    assert context.input("policy").model == ModelSource(model="/base")
    assert context.input("data").data == DataSource(data="/chat.jsonl")
    assert (context.rank, context.is_main, context.at) == (1, False, "stages.sft")


def test_a_worker_without_an_attempt_is_told_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no readable stage.json; start the stage with `run`"):
        ledger.open_context(tmp_path, rank=0, local_rank=0, world_size=1)


# --- the lease -------------------------------------------------------------------------------------------------------


def test_a_lease_is_held_for_the_block_and_given_back(tmp_path: Path) -> None:
    assert ledger.lease_holder(tmp_path) is None
    with ledger.lease(tmp_path):
        found = ledger.lease_holder(tmp_path)
        assert found is not None
        assert (found.pid, found.host) == (os.getpid(), os.uname().nodename)
        with pytest.raises(UserError, match=f"being built by process {os.getpid()} on "), ledger.lease(tmp_path):
            pass
        assert ledger.lease_holder(tmp_path), "who was refused did not take it away"
    assert ledger.lease_holder(tmp_path) is None


def test_a_lease_is_given_back_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ledger.lease(tmp_path):
        raise KeyboardInterrupt
    assert not (tmp_path / "lease.json").exists()


def test_another_process_cannot_hold_what_one_holds(tmp_path: Path) -> None:
    first = holder(tmp_path, 60)
    try:
        assert said(first) == "held"
        assert f"being built by process {first.pid} on " in said(holder(tmp_path, 0))
        with pytest.raises(UserError, match="wait for it, or stop it"), ledger.lease(tmp_path):
            pass
    finally:
        first.kill()
        first.wait()


def test_the_lease_of_a_process_that_died_is_free_at_once(tmp_path: Path) -> None:
    first = holder(tmp_path, 60)
    assert said(first) == "held"
    first.kill()
    while Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert ledger.lease_holder(tmp_path) is None, "also before its parent has taken note"
    first.wait()
    with ledger.lease(tmp_path):
        pass


def test_the_lease_of_a_suspended_process_is_not_free(tmp_path: Path) -> None:
    first = holder(tmp_path, 60)
    assert said(first) == "held"
    first.send_signal(signal.SIGSTOP)
    os.utime(tmp_path / "lease.json", (0, 0))
    assert ledger.lease_holder(tmp_path) is not None
    first.kill()
    first.wait()


RACE = """
import os, random, sys, time
from pathlib import Path
from posttrain import ledger
from posttrain.error import UserError

random.seed(sys.argv[2])
ledger._machine = lambda: sys.argv[3]
chain, link, replace = ledger._chain, os.link, Path.replace

def lingering(call):
    def linger():
        time.sleep(random.random() * random.choice([0, 0.001, 0.01]))

    def lingered(*arguments, **options):
        linger()
        try:
            return call(*arguments, **options)
        finally:
            linger()
    return lingered

ledger._chain, os.link, Path.replace = map(lingering, (chain, link, replace))
print("ready", flush=True)
for line in sys.stdin:
    directory, begin = Path(sys.argv[1], line.split()[0]), float(line.split()[1])
    time.sleep(max(0, begin - time.time()))
    try:
        with ledger.lease(directory):
            (directory / "inside").mkdir()
            time.sleep(random.random() * 0.02)
            (directory / "inside").rmdir()
        print("held", flush=True)
    except UserError as error:
        print("refused", flush=True)
    except FileExistsError:
        print("two at once", flush=True)
"""
NUM_RACES = 60


def test_of_many_processes_on_two_hosts_that_find_a_dead_lease_no_two_hold_it_at_once(tmp_path: Path) -> None:
    """No locks are asked for anywhere, and every step of taking a lease over is drawn out at random."""
    with ledger.lease(tmp_path):
        record = json.loads((tmp_path / "lease.json").read_text())
    hosts = ["a", "b"] * 3
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path), str(number), host],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
        )
        for number, host in enumerate(hosts)
    ]  # fmt: skip
    held = 0
    try:
        assert [said(racer) for racer in racers] == ["ready"] * len(racers)
        for race in range(NUM_RACES):
            directory = tmp_path / str(race)
            directory.mkdir()
            disk.write_json(directory / "lease.json", {**record, "machine": random.choice("ab"), "born": "1", "token": str(race)})
            os.utime(directory / "lease.json", (time.time() - ledger.LEASE_EXPIRES_S - 1,) * 2)
            begin = time.time() + 0.02
            for racer in racers:
                assert racer.stdin is not None
                print(race, begin, file=racer.stdin, flush=True)
            results = [said(racer) for racer in racers]
            assert set(results) <= {"held", "refused"}, f"race {race}: {results}"
            assert "held" in results, f"race {race}: nobody got it"
            assert not list(directory.iterdir()), "nothing of the race is left"
            held += results.count("held")
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert held < NUM_RACES * len(racers), "they did race"


def test_a_process_that_died_while_it_took_a_lease_over_can_be_taken_over_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = holder(tmp_path, 60)
    assert said(dead) == "held"
    dead.kill()
    dead.wait()
    died = os.fork()
    if died == 0:
        monkeypatch.setattr(disk, "write_json", lambda path, value: path.write_text(json.dumps(value)))
        monkeypatch.setattr(Path, "replace", lambda *_: os._exit(9))
        with ledger.lease(tmp_path):
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(died, 0)[1]) == 9
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".lease.after.")]) == 1
    assert ledger.lease_holder(tmp_path) is None
    with ledger.lease(tmp_path):
        found = ledger.lease_holder(tmp_path)
        assert found is not None and found.pid == os.getpid()
    assert not list(tmp_path.glob("lease.json")) and not list(tmp_path.glob(".lease.after.*"))


def test_a_lease_beats_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "HEARTBEAT_S", 0.02)
    path = tmp_path / "lease.json"
    with ledger.lease(tmp_path):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 5
        while path.stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - path.stat().st_mtime < 5


def foreign(directory: Path, age_s: float) -> None:
    with ledger.lease(directory):
        record = json.loads((directory / "lease.json").read_text())
    disk.write_json(directory / "lease.json", {**record, "host": "node7", "machine": "node7"})
    os.utime(directory / "lease.json", (time.time() - age_s,) * 2)


def test_the_lease_of_another_host_lives_as_long_as_its_heart_beats(tmp_path: Path) -> None:
    foreign(tmp_path, age_s=ledger.LEASE_EXPIRES_S - 5)
    assert "on node7" in str(ledger.lease_holder(tmp_path))
    with pytest.raises(UserError, match="on node7"), ledger.lease(tmp_path):
        pass
    foreign_path = tmp_path / "lease.json"
    os.utime(foreign_path, (time.time() - ledger.LEASE_EXPIRES_S - 1,) * 2)
    with ledger.lease(tmp_path):
        assert ledger.lease_holder(tmp_path)


@pytest.mark.parametrize("skew_s", [-3600, 3600])
def test_how_old_a_heartbeat_of_another_host_is_does_not_depend_on_the_clock_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew_s: float
) -> None:
    foreign(tmp_path, age_s=1)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + skew_s)
    with pytest.raises(UserError, match="on node7"), ledger.lease(tmp_path):
        pass
    os.utime(tmp_path / "lease.json", (clock() - ledger.LEASE_EXPIRES_S - 1,) * 2)
    with ledger.lease(tmp_path):
        pass


def test_who_lost_the_lease_neither_keeps_it_alive_nor_gives_it_back_and_is_told_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that slept for an hour wakes up to find that another took over."""
    monkeypatch.setattr(ledger, "HEARTBEAT_S", 0.01)
    path = tmp_path / "lease.json"
    told: list[int] = []
    with heed_signals(told.append), ledger.lease(tmp_path):
        assert ledger.lost_lease() is None
        record = json.loads(path.read_text())
        disk.write_json(path, {**record, "host": "node7", "machine": "node7", "pid": 5, "token": "theirs"})
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 5
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)
        assert told == [signal.SIGTERM]
        assert "was taken over by" in str(ledger.lost_lease())
        assert path.stat().st_mtime == 0
    assert json.loads(path.read_text())["token"] == "theirs"
    assert ledger.lost_lease() is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"host": 1}'])
def test_a_damaged_lease_holds_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "lease.json").write_text(content)
    assert ledger.lease_holder(tmp_path) is None
    with ledger.lease(tmp_path):
        pass


def test_ctrl_c_just_after_a_lease_was_taken_takes_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), ledger.lease(tmp_path):
        pass
    assert not (tmp_path / "lease.json").exists()
