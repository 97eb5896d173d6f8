"""What the doctor says is so: each fault here is made, and is found with how to mend it."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from posttrain import doctor
from posttrain.doctor import Finding
from tests.conftest import Ended


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the processes that import torch and DeepSpeed, which take their time."""
    said = {
        doctor.TORCH: {"cpu": "AVX2", "cuda": None, "devices": [], "bf16": False, "nccl": False, "gloo": True},
        doctor.DEEPSPEED: {"version": "1"},
    }
    monkeypatch.setattr(doctor, "_try", said.__getitem__)


def found(root: Path) -> dict[str, Finding]:
    return {finding.what: finding for finding in doctor.examine(root)}


def test_this_machine_can_run_the_pipeline(tmp_path: Path, posttrain: Callable[..., Ended]) -> None:
    """With the processes that import the libraries: the very environment that tests run in has no fault."""
    ended = posttrain("doctor", "--root", tmp_path / "none", "--json")
    findings = {finding["what"]: finding for finding in json.loads(ended.out)}
    assert ended.code == 0, ended.err
    assert {"Python", "libraries", "torch", "DeepSpeed", "root", "disk", "clock", "memory", "cores", "open files"} <= findings.keys()
    assert all(set(finding) == {"what", "state", "found", "mend"} for finding in findings.values())
    assert findings["torch"]["state"] == findings["DeepSpeed"]["state"] == "ok"
    assert not (tmp_path / "none").exists() and list(tmp_path.iterdir()) == [], "it leaves nothing behind"


@pytest.mark.usefixtures("fast")
def test_a_fault_is_one_line_and_the_exit_code(tmp_path: Path, posttrain: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    assert posttrain("doctor", "--root", tmp_path).code == 0
    monkeypatch.setattr(doctor, "_try", lambda _: "its import fails: ImportError: libcudart.so: cannot open")
    ended = posttrain("doctor", "--root", tmp_path)
    assert ended.code == 2
    assert ended.err == "error: torch: its import fails: ImportError: libcudart.so: cannot open; make setup\n"
    lines = {line.split(":")[0].split()[-1]: line.split()[0] for line in ended.out.splitlines()}
    assert (lines["torch"], lines["DeepSpeed"], lines["Python"]) == ("fault", "fault", "ok")


def test_why_a_library_cannot_be_imported_is_said() -> None:
    assert doctor._try("import json; print('noise'); print(json.dumps({'a': 1}))") == {"a": 1}
    assert doctor._try("import no_such_module") == "its import fails: ModuleNotFoundError: No module named 'no_such_module'"
    assert doctor._try("import os; os.kill(os.getpid(), 11)") == "its import was killed by SIGSEGV"


@pytest.mark.usefixtures("fast")
def test_a_library_outside_its_bounds_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor.importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.9.0" if name == "trl" else version(name))
    findings = found(tmp_path)
    assert (findings["trl"].state, findings["trl"].mend) == ("fault", "make setup")
    assert findings["trl"].found.startswith("0.9.0 is not ")
    assert "libraries" not in findings


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB of its own, which is too small for the doctor's own test of speed."""
    place = tmp_path / "disk"
    place.mkdir()
    ended = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)], capture_output=True, text=True)
    if ended.returncode:
        pytest.skip(f"no file system can be mounted here: {ended.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.usefixtures("fast")
def test_a_root_on_a_small_or_read_only_disk_is_a_fault(mounted: Path) -> None:
    findings = found(mounted / "runs")
    assert (findings["disk"].state, findings["root"].state) == ("fault", "fault")
    assert "No space left" in findings["root"].found
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    assert "Read-only" in found(mounted)["root"].found


@pytest.mark.usefixtures("fast")
def test_a_root_without_hard_links_or_with_another_clock_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(doctor.os, "link", refuse)
    clock = doctor.time.time
    monkeypatch.setattr(doctor.time, "time", lambda: clock() - 100)
    monkeypatch.setattr(doctor.fcntl, "flock", refuse)
    findings = found(tmp_path)
    assert (findings["root"].state, findings["clock"].state, findings["locks"].state) == ("fault", "warning", "warning")
    assert "100 s ahead of the one here" in findings["clock"].found


@pytest.mark.usefixtures("fast")
def test_a_pipeline_without_a_stage_that_trains_cannot_be_rehearsed(pipeline_file: Path, posttrain: Callable[..., Ended]) -> None:
    ended = posttrain("doctor", "--resume", pipeline_file, "--stage", "eval")
    assert (ended.code, ended.err) == (
        2,
        "error: --stage eval: no stage of that name trains; did you mean 'dpo'?\n",
    ) or "known: dpo, sft" in ended.err
    assert "is for --resume CONFIG only" in posttrain("doctor", "stages.sft.seed=1").err
