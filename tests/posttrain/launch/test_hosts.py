"""Machines that are reached by ssh: what is started on them, and how it ends. tests/cluster has real ones; here ssh is a stand-in."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain import disk, ledger
from posttrain.config import HostsLauncher, read_launcher
from posttrain.error import Preempted, StageFailed, UserError
from posttrain.launch import hosts
from posttrain.launch.hosts import host_command
from tests.conftest import REPOSITORY


def launcher(**fields: Any) -> HostsLauncher:
    read = read_launcher("launcher", {"kind": "hosts", **({"hosts": ["a", "b"]} if "hostfile" not in fields else {}), **fields})
    assert isinstance(read, HostsLauncher)
    return read


def test_on_each_machine_this_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.launch.hosts.LIBRARIES", {"OMP_NUM_THREADS": "1"})
    given = launcher(
        hosts=["me@node1", "node2"],
        processes_per_host=8,
        cpus_per_process=4,
        ssh=["-p", "2222"],
        setup=["module load x"],
        python="/env/python",
    )
    *ssh, script = host_command(given, Path("/data/runs/r/sft"), 1, here=Path("/data/my work"))
    assert ssh == ["ssh", *hosts.OPTIONS, "-p", "2222", "node2"]
    assert script == (
        "module load x\n"
        "cd '/data/my work' || exit 2\n"
        f"exec env OMP_NUM_THREADS=1 POSTTRAIN_CORES=4 PYTHONPATH={REPOSITORY} /env/python -m posttrain.tether"
        " /env/python -m torch.distributed.run --nnodes=2 --node-rank=1 --nproc-per-node=8 --master-addr=node1 --master-port=29500"
        " --signals-to-handle=SIGTERM --shutdown-timeout=600 -m posttrain.worker /data/runs/r/sft"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=8\nb slots=8 # the new one\n\n# c slots=8\n", None),
        ("a slots=8\nb slots=4\n", "must name machines with as many slots each"),
        ("a\n", ":1: 'a' is no line `name slots=8`"),
        ("a slots=8\na slots=8\n", ":2: 'a slots=8' is no line"),
        ("", "must name machines"),
    ],
)
def test_a_hostfile_names_machines_and_their_slots(tmp_path: Path, text: str, message: str | None) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    if message is None:
        found = launcher(hostfile=str(path))
        assert (found.hosts, found.processes_per_host, found.num_processes) == (["a", "b"], 8, 16)
        return
    with pytest.raises(UserError) as refused:
        launcher(hostfile=str(path))
    assert str(refused.value).startswith(f"launcher.hostfile: {path}") and message in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hosts": []}, "launcher.hosts: list should have at least 1 item after validation, not 0, got []"),
        ({"hosts": ["-oProxyCommand=x"]}, "launcher.hosts: '-oProxyCommand=x' is no name of a machine"),
        ({"hosts": ["a", "a"]}, "launcher.hosts: 'a' stands twice; name it once"),
        ({"setup": ["x\ny"]}, "launcher.setup: 'x\\ny' is no line of text"),
        ({"host": ["a"]}, "launcher.host: unknown key; did you mean 'hosts'?"),
    ],
)
def test_a_launcher_that_is_set_wrongly_is_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        launcher(**fields)
    assert str(refused.value) == message


# --- with a stand-in for ssh, and for torchrun ------------------------------------------------------------------------

SSH = """#!/bin/sh
for word; do host=$command command=$word; done
case $host in gone) while ! test -e "$STAGE/started_a"; do sleep 0.1; done; exit 255;; esac
MACHINE=$host exec sh -c "$command"
"""
PYTHON = """#!{python}
import os, signal, sys, time
from pathlib import Path
if sys.argv[2] == "posttrain.tether":
    os.execv("{python}", ["{python}", *sys.argv[1:]])
directory, machine = Path(sys.argv[-1]), os.environ.get("MACHINE", os.uname().nodename)
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), (directory / f"saved_{{machine}}").touch(), os._exit(1)))
(directory / f"started_{{machine}}").touch()
{body}
"""


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a stage that is being attempted."""
    directory = attempted(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STAGE", str(directory))
    return directory


def attempted(root: Path) -> Path:
    """The directory of a stage under that root, with all that a launcher looks at."""
    directory = root / "r" / "sft"
    (directory / "logs" / "attempt_1").mkdir(parents=True)
    record: dict[str, Any] = {"identity": {}, "config": {"stall_timeout_s": None}, "inputs": {}, "held_out": []}
    record |= {"name": "sft", "kind": "sft", "run": "r", "root": str(root), "version": 1, "fingerprint": "", "num_processes": 2}
    disk.write_json(directory / "stage.json", {**record, "number": 1, "started": "", "token": "now"})
    return directory


def run(stage: Path, body: str, *machines: str, look: Any = lambda: None, ssh: Sequence[str] = ()) -> None:
    """Start a rank that does so on each machine, as the launcher does."""
    python = stage.parents[1] / "python"
    python.write_text(PYTHON.format(python=sys.executable, body=body))
    python.chmod(0o755)
    given = launcher(hosts=list(machines), python=str(python), ssh=list(ssh))
    commands = [host_command(given, stage, node, here=REPOSITORY) for node in range(len(machines))]
    attempt = ledger.read_attempt(stage)
    assert attempt is not None
    hosts._run_hosts(machines, commands, stage, attempt, look)


def names(stage: Path, what: str) -> list[str]:
    return sorted(path.name.removeprefix(f"{what}_") for path in stage.glob(f"{what}_*"))


def test_what_ends_well_on_all_machines_has_ended_well(stage: Path) -> None:
    run(stage, "", "a", "b")
    assert names(stage, "started") == ["a", "b"]


def test_a_machine_that_is_gone_stops_the_others_and_is_named(stage: Path) -> None:
    with pytest.raises(StageFailed, match="the connection to gone broke or could not be made, so the others were stopped"):
        run(stage, "time.sleep(60)", "a", "gone")
    assert names(stage, "saved") == ["a"]


@pytest.mark.parametrize(("kind", "raised"), [("user", UserError), ("crash", StageFailed)])
def test_a_rank_that_fails_stops_the_other_machines_and_has_the_word(stage: Path, kind: str, raised: type[Exception]) -> None:
    disk.write_json(stage / "logs" / "attempt_1" / "rank_1.error.json", {"kind": kind, "message": "line 3 is wrong", "time": 1.0})
    with pytest.raises(raised, match="line 3 is wrong"):
        run(
            stage,
            "while not (directory / 'started_a').exists(): time.sleep(0.1)\nsys.exit(1) if machine == 'b' else time.sleep(60)",
            "a",
            "b",
        )
    assert names(stage, "saved") == ["a"]


def test_whoever_is_asked_to_stop_has_the_machines_save(stage: Path) -> None:
    def look() -> None:
        if len(names(stage, "started")) == 2:
            raise Preempted("stopped by SIGTERM")

    with pytest.raises(Preempted, match="stopped by SIGTERM"):
        run(stage, "time.sleep(60)", "a", "b", look=look)
    assert names(stage, "saved") == ["a", "b"]


def test_a_driver_that_is_killed_leaves_nothing_behind(stage: Path) -> None:
    program = f"""
from pathlib import Path
from tests.posttrain.launch.test_hosts import run
run(Path({str(stage)!r}), "time.sleep(60)", "a", "b")
"""
    driver = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY)
    wait_for(lambda: len(names(stage, "started")) == 2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait_for(lambda: names(stage, "saved") == ["a", "b"])


def test_without_ssh_it_is_one_line(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="ssh: is not on the PATH here"):
        run(stage, "", "a")


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
