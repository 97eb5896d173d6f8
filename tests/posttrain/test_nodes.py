"""A node that is unlike the others is named in one line, before anything is trained on it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain import disk, nodes
from posttrain.config import read_launcher
from posttrain.error import UserError
from posttrain.launch.slurm import node_command
from posttrain.nodes import check_nodes, gather, judge, links, probe, refuse
from tests.conftest import REPOSITORY, Ended

FIT: dict[str, Any] = {
    "packages": {"torch": "2.15", "trl": "1.16"},
    "source": {"pipeline.py": "a", "posttrain/fit.py": "b"},
    "written_bytes_per_s": 1e9,
    "read_bytes_per_s": 1e9,
    "clock_apart_s": 0.1,
    "free_disk_bytes": 10**12,
    "free_memory_bytes": 10**11,
    "num_cores": 8,
    "num_gpus": 8,
    "missing_models": [],
    "failed": {},
}
TIMED: dict[str, Any] = {"unseen": [], "products_per_s": 1e12, "all_reduce_bytes_per_s": 1e9}


def said(
    *,
    size: int = 3,
    records: dict[int, dict[str, Any] | None] | None = None,
    timed: dict[int, dict[str, Any] | None] | None = None,
    num_gpus: int = 8,
) -> list[str]:
    """What is said of nodes that fit together, but for what some of them say otherwise."""
    hosts = [f"n{number}" for number in range(size)]
    told: list[Any] = []
    measured: list[Any] = []
    for number, host in enumerate(hosts):
        neighbours = {str(other): 1e9 for pair in links(size) if number in pair for other in pair if other != number}
        other = (records or {}).get(number, {})
        told.append(None if other is None else {**FIT, "host": host, **other})
        other = (timed or {}).get(number, {})
        measured.append(None if other is None else {**TIMED, "links": neighbours, **other})
    return [f"{finding.state}: {finding.what} {finding.found}" for finding in judge(hosts, told, measured, num_gpus=num_gpus)]


def test_nodes_that_fit_together_are_praised_in_one_line() -> None:
    (line,) = said()
    assert line == "ok: n0, n1, n2 the same 2 packages and 2 files of code, 1.0 GB a second to the root, 1.0 GB a second all-reduced"


@pytest.mark.parametrize(
    ("size", "wrong", "line"),
    [
        (3, {0: {"packages": {"torch": "2.14", "trl": "1.16"}}}, "fault: n0 has torch 2.14, and n1 2.15"),
        (2, {1: {"packages": {"trl": "1.16"}}}, "fault: n1 has torch not at all, and n0 2.15"),
        (3, {2: {"packages": {"torch": "2.14", "trl": "1.17"}}}, "fault: n2 has torch 2.14, and n0 2.15, and 1 more"),
        (3, {1: {"source": {"pipeline.py": "a", "posttrain/fit.py": "c"}}}, "fault: n1 has another posttrain/fit.py than n0"),
        (3, {1: {"source": {"pipeline.py": "a"}}}, "fault: n1 lacks posttrain/fit.py, which n0 has"),
        (3, {1: {"num_gpus": 7}}, "fault: n1 has 7 GPUs, and 8 are wanted"),
        (3, {1: {"missing_models": ["a/b"]}}, "fault: n1 is offline, and its cache lacks a/b"),
        (3, {1: {"free_disk_bytes": 1000}}, "fault: n1 has 1.0 kB left in the root of all runs"),
        (3, {1: {"clock_apart_s": -90.0}}, "fault: n1 has a clock 90 s behind the disk's"),
        (3, {1: {"free_memory_bytes": 10**9}}, "warning: n1 has 1.0 GB of memory left"),
        (3, {1: {"read_bytes_per_s": 1e6}}, "warning: n1 reads 1.0 MB a second of the root of all runs"),
        (3, {1: {"failed": {"disk": "no answer within 60 s"}, "free_disk_bytes": 0}}, "fault: n1 disk: no answer within 60 s"),
        (3, {1: {"failed": {"packages": "no answer within 60 s"}, "packages": {}}}, "fault: n1 packages: no answer within 60 s"),
    ],
)
def test_a_node_that_is_wrong_is_named_in_one_line(size: int, wrong: dict[int, dict[str, Any]], line: str) -> None:
    assert said(size=size, records=wrong) == [line]


@pytest.mark.parametrize(
    ("size", "wrong", "lines"),
    [
        (3, {2: {"products_per_s": 4e11}}, ["warning: n2 computes at 40% of the others' speed"]),
        (2, {0: {"products_per_s": 5e11}}, ["warning: n0 computes at 50% of the others' speed"]),
        # Of a slow link both ends know; the one that has no fast link is to blame.
        (
            4,
            {0: {"links": {"1": 1e8, "3": 1e9}}, 1: {"links": {"0": 1e8, "2": 1e8}}, 2: {"links": {"1": 1e8, "3": 1e9}}},
            ["warning: n1 talks at 10% of the others' speed, 100.0 MB a second"],
        ),
        (2, {0: {"links": {"1": 1e6}}, 1: {"links": {"0": 1e6}}}, ["warning: n0 and n1 talk at 1.0 MB a second"]),
        (3, {1: None}, ["fault: n1 did not measure within 600 s"]),
        (
            3,
            {0: {"failed": "RuntimeError: timeout"}, 1: None},
            ["fault: n1 did not measure within 600 s", "fault: n0 cannot talk to the others: RuntimeError: timeout"],
        ),
        (3, {1: {"unseen": [0, 2]}}, ["fault: n1 does not see what n0, n2 wrote"]),
    ],
    ids=["slow", "the slower of two", "slow links", "a slow link", "does not end", "the reason first", "another disk"],
)
def test_a_node_that_is_slow_or_cut_off_is_named(size: int, wrong: dict[int, dict[str, Any] | None], lines: list[str]) -> None:
    assert said(size=size, timed=wrong) == lines


def test_a_node_that_says_nothing_is_named_first_whatever_the_others_miss() -> None:
    lines = said(records={2: None}, timed={0: {"unseen": [2]}, 1: {"unseen": [2]}, 2: None})
    assert lines[0] == "fault: n2 gave no answer in the shared directory"


def test_a_fault_ends_it_and_a_warning_does_not() -> None:
    findings = judge(["a"], [{**FIT, "host": "a", "free_memory_bytes": 1}], [{**TIMED, "links": {}}], num_gpus=8)
    refuse(findings)
    findings += judge(["a"], [None], [None], num_gpus=8)
    with pytest.raises(UserError, match=r"^nodes: a: gave no answer in the shared directory; see that it mounts the root of all runs$"):
        refuse(findings)


def test_every_node_has_two_links_where_there_are_more_than_two() -> None:
    assert links(1) == []
    assert links(2) == [(0, 1)]
    assert links(4) == [(0, 1), (1, 2), (2, 3), (0, 3)]


# --- of this machine -------------------------------------------------------------------------------------------------


def test_a_node_tells_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub"
    (cache / "models--a--b" / "snapshots" / ("0" * 40)).mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = probe(tmp_path, {"models": [["a/b", "0" * 40], ["a/b", "1" * 40], ["c/d", "0" * 40]]}, 0)
    assert found["failed"] == {}
    assert found["missing_models"] == ["a/b", "c/d"]
    assert found["packages"]["pytest"] == pytest.__version__
    assert found["source"]["posttrain/nodes.py"] == disk.hash_file(REPOSITORY / "posttrain" / "nodes.py")
    assert abs(found["clock_apart_s"]) < 1
    assert found["written_bytes_per_s"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert probe(tmp_path, {"models": [["c/d", "0" * 40]]}, 0)["missing_models"] == []


def test_what_takes_too_long_or_fails_on_a_node_is_said_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "ANSWER_WITHIN_S", 1.0)
    monkeypatch.setattr(nodes, "source", lambda: time.sleep(20))
    found = probe(tmp_path / "gone", {"models": []}, 0)
    assert found["failed"].keys() == {"source", "shared directory", "clock", "disk"}
    assert found["failed"]["source"] == "no answer within 1 s"
    assert found["failed"]["clock"].startswith("FileNotFoundError: ")


def test_a_node_that_does_not_see_the_shared_directory_gives_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that is given another directory than the driver's, as where a mount is missing."""
    elsewhere = "import sys, posttrain.nodes as nodes; nodes.SEEN_WITHIN_S = 0.5; sys.exit(nodes.main([sys.argv[1]]))"
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    assert gather(tmp_path, 1, [sys.executable, "-c", elsewhere, str(tmp_path / "elsewhere")]) == ([None], [None])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A pipeline of one stage on two processes."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "chat.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    (tmp_path / "p.yaml").write_text(f"""
run: r
sources: {{base: {{model: {tmp_path}/base}}, chat: {{data: {tmp_path}/chat.jsonl}}}}
stages: {{sft: {{inputs: {{policy: base, data: chat}}}}}}
launcher: {{kind: local, num_processes: 2}}
""")
    return tmp_path / "p.yaml"


def test_two_processes_of_this_machine_fit_together_and_are_asked_once_a_day(
    posttrain: Callable[..., Ended], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = posttrain("nodes", file, "--root", tmp_path / "runs", "--json")
    assert ended.code == 0, ended.err
    findings = json.loads(ended.out)
    assert not [finding for finding in findings if finding["state"] == "fault"], findings
    assert [path.name for path in (tmp_path / "runs" / ".nodes").iterdir()] == ["fit.json"]
    host = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    assert all(f"{host} (process " in finding["what"] for finding in findings)

    def nobody(directory: Path) -> list[str]:
        raise AssertionError("they were asked before")

    assert check_nodes(tmp_path / "runs", [host, host], nobody, num_gpus=0) == []
    monkeypatch.setattr(nodes, "source", lambda: {"pipeline.py": "another"})
    with pytest.raises(AssertionError, match="they were asked before"):
        check_nodes(tmp_path / "runs", [host, host], nobody, num_gpus=0)


def test_a_launcher_whose_nodes_cannot_be_asked_is_refused(posttrain: Callable[..., Ended], file: Path, tmp_path: Path) -> None:
    ended = posttrain("nodes", file, "launcher={kind: kubernetes, image: i, volumes: {/data: claim}}", "--root", tmp_path)
    assert ended.code == 2
    assert ended.err.startswith("error: launcher.kind: kubernetes, whose nodes cannot be asked from here")


def test_tasks_are_asked_of_slurm_one_a_node(tmp_path: Path) -> None:
    launcher: Any = read_launcher(
        "launcher",
        {"kind": "slurm", "partition": "gpu", "num_nodes": 4, "gpus_per_node": 8, "cpus_per_process": 12, "sbatch": ["--mem=0"]},
    )
    alone = node_command(launcher, tmp_path, [tmp_path], is_job=False)
    task = ["--mpi=none", "--export=ALL", "--wait=0", sys.executable, "-m", "posttrain.nodes", str(tmp_path)]
    asked = ["srun", "--partition=gpu", "--gpus-per-node=8", "--time=15", "--mem=0"]
    size = ["--nodes=4", "--ntasks=4", "--ntasks-per-node=1", "--cpus-per-task=96"]
    assert alone == [*asked, *size, *task]
    assert node_command(launcher, tmp_path, [tmp_path], is_job=True) == ["srun", *size, *task]
