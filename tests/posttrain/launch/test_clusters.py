"""What every kind of cluster is asked, and what is made of its answers: one list of claims for all. Their commands are stand-ins."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from posttrain import artifact, disk
from posttrain.error import Preempted, StageFailed, UserError
from posttrain.launch import jobs
from posttrain.launch.jobs import Job
from posttrain.parallel import num_cores
from tests.conftest import REPOSITORY, Commands, Ended, write_chat
from tests.posttrain.launch.test_slurm import SBATCH, SCANCEL, SCONTROL, SQUEUE, STAGES, finish, launch_with, raising

LAUNCHERS = {
    "slurm": "launcher: {kind: slurm, num_nodes: 2, processes_per_node: 4}",
    "kubernetes": "launcher: {kind: kubernetes, image: i, volumes: {/: all}, num_nodes: 2, processes_per_node: 4}",
}
KUBECTL = f"""#!{sys.executable}
import json, sys, yaml
from pathlib import Path
here = Path("HERE/jobsets")
words = [word for word in sys.argv[1:] if not word.startswith("-")]
if words[0] == "apply":
    (file,) = [word.partition("=")[2] for word in sys.argv if word.startswith("--filename=")]
    jobset = yaml.safe_load(Path(file).read_text())
    if jobset["metadata"]["annotations"]["posttrain/stage"] in (Path("HERE/full").read_text() if Path("HERE/full").exists() else ""):
        sys.exit("Error from server (Forbidden): error when creating: exceeded quota")
    (here / jobset["metadata"]["name"]).write_text(json.dumps(jobset))
    print(json.dumps(jobset))
elif words[0] == "get":
    found = [json.loads((here / name).read_text()) for name in words[2:] if (here / name).exists()]
    print("" if not found else json.dumps(found[0] if len(words) == 3 else {{"kind": "List", "items": found}}))
elif words[0] == "delete":
    (here / words[2]).unlink(missing_ok=True)
"""


@dataclass(frozen=True)
class Cluster(Commands):
    """A pipeline of four stages, and a cluster that writes down what it is asked for and does nothing."""

    kind: str
    here: Path
    call: Callable[..., Ended]
    set_variable: Callable[[str, str], None]

    @property
    def run(self) -> Path:
        return self.root / "r"

    def job(self, stage: str) -> Job:
        return jobs.read_jobs(self.run)[stage]

    def known(self) -> list[str]:
        """The jobs that wait or run."""
        if self.kind == "slurm":
            return sorted(line.split("|")[0] for line in (self.here / "queue").read_text().splitlines())
        return sorted(path.name for path in (self.here / "jobsets").iterdir())

    def set(self, stage: str, state: str | None) -> None:
        """Have the job of a stage be PENDING, RUNNING or FAILED, or be forgotten."""
        number = self.job(stage).number
        if self.kind == "slurm":
            queue = self.here / "queue"
            others = [line for line in queue.read_text().splitlines() if not line.startswith(f"{number}|")]
            queue.write_text("".join(f"{line}\n" for line in [*others, *([f"{number}|{state}|node1"] if state else [])]))
            return
        path = self.here / "jobsets" / number
        if state is None:
            path.unlink()
            return
        jobset = json.loads(path.read_text())
        ready = [{"name": "ranks", "ready": int(state == "RUNNING"), "active": 1}]
        jobset["status"] = {"terminalState": "Failed"} if state == "FAILED" else {"replicatedJobsStatus": ready}
        path.write_text(json.dumps(jobset))

    def enter(self, stage: str) -> None:
        """Be the driver in the job of that stage."""
        self.set(stage, "RUNNING")
        self.set_variable("SLURM_JOB_ID" if self.kind == "slurm" else "POSTTRAIN_JOB", self.job(stage).number)

    def step(self, stage: str, *arguments: object) -> Ended:
        """What the job of a stage does."""
        return self.call("step", self.run / ".jobs" / stage / "pipeline.json", "--stage", stage, "--root", self.run.parent, *arguments)

    def fates(self) -> dict[str, str]:
        rows = json.loads(self.done("status", "--json"))
        return {row["stage"]: f"{row['job']['state']} {row['job']['why']}".strip() for row in rows if "job" in row}


@pytest.fixture(params=list(LAUNCHERS))
def cluster(request: pytest.FixtureRequest, tmp_path: Path, posttrain: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> Cluster:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "chat.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    (tmp_path / "prefs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "pipeline.yaml").write_text(STAGES.replace("HERE", str(tmp_path)) + LAUNCHERS[request.param])
    stand_ins(tmp_path, monkeypatch)
    launch_with(monkeypatch, finish)
    return Cluster(request.param, tmp_path, posttrain, monkeypatch.setenv)


def stand_ins(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put commands of clusters on the PATH that keep what they are given under `here`."""
    for name in ("given", "jobsets", "bin"):
        (here / name).mkdir()
    (here / "queue").touch()
    (here / "number").write_text("11")
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL, "scontrol": SCONTROL, "kubectl": KUBECTL}.items():
        (here / "bin" / name).write_text(text.replace("HERE", str(here)))
        (here / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{here / 'bin'}:{os.environ['PATH']}")
    for name in ("SLURM_JOB_ID", "POSTTRAIN_JOB", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)


def test_a_chain_is_a_job_for_each_stage_after_those_that_it_reads(cluster: Cluster) -> None:
    cluster.done("submit")
    given = jobs.read_jobs(cluster.run)
    assert {stage: sorted(job.after) for stage, job in given.items()} == {
        "sft": [],
        "near": ["sft"],
        "far": ["sft"],
        "eval": ["far", "near"],
    }
    assert given["eval"].after == {"near": given["near"].number, "far": given["far"].number}
    assert cluster.known() == sorted(job.number for job in given.values())


def test_a_dry_submission_prints_what_would_be_given_and_changes_nothing(cluster: Cluster) -> None:
    ended = cluster.ended("submit", "--dry-run")
    assert ended.code == 0
    assert [f"{stage}  run: not started" for stage in ("sft", "near", "far", "eval")] == ended.err.splitlines()
    if cluster.kind == "kubernetes":
        assert [jobset["metadata"]["annotations"]["posttrain/stage"] for jobset in yaml.safe_load_all(ended.out)] == [
            "sft",
            "near",
            "far",
            "eval",
        ]
    else:
        assert ended.out.count("#!/bin/bash") == 4
    assert cluster.known() == []
    assert not cluster.run.exists()


def test_a_half_finished_chain_is_given_only_what_is_left(cluster: Cluster) -> None:
    for stage in ("sft", "near"):
        cluster.done("run", "launcher={kind: local}", "stages.eval.launcher={}", "--only", stage)
    cluster.done("submit")
    assert {stage: sorted(job.after) for stage, job in jobs.read_jobs(cluster.run).items()} == {"far": [], "eval": ["far"]}
    cluster.enter("far")
    assert cluster.step("far").code == 0


def test_a_chain_that_waits_or_runs_is_not_submitted_again(cluster: Cluster) -> None:
    cluster.done("submit")
    assert f"sft has job {cluster.job('sft').number}, near has job " in cluster.refused("submit")
    assert len(cluster.known()) == 4


def test_further_stages_wait_for_jobs_that_were_submitted_before(cluster: Cluster) -> None:
    cluster.done("submit", "--until", "near")
    cluster.done("submit", "--only", "far")
    assert cluster.job("far").after == {"sft": cluster.job("sft").number}


def test_where_a_job_is_refused_those_before_it_are_taken_back(cluster: Cluster) -> None:
    if cluster.kind == "slurm":
        sbatch = cluster.here / "bin" / "sbatch"
        sbatch.write_text(sbatch.read_text() + f'test "$number" = 12 && touch {cluster.here}/full || true\n')
    else:
        (cluster.here / "full").write_text("far")
    assert cluster.refused("submit").startswith("stages.far: ")
    assert cluster.known() == []
    assert cluster.job("sft").cancelled


def test_without_the_commands_of_the_cluster_submit_is_one_line_and_status_still_answers(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.done("submit")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "is not on the PATH here" in cluster.refused("submit")
    name = {"slurm": "Slurm", "kubernetes": "Kubernetes"}[cluster.kind]
    assert cluster.fates()["eval"] == f"unknown {name} cannot be asked here"


def test_status_tells_of_a_chain_on_its_way(cluster: Cluster) -> None:
    cluster.done("submit")
    cluster.enter("sft")
    assert cluster.fates() == {
        "sft": "running node1" if cluster.kind == "slurm" else "running its pods",
        "near": "queued after sft",
        "far": "queued after sft",
        "eval": "queued after near, far",
    }
    assert cluster.step("sft").code == 0
    cluster.set("sft", None)
    assert cluster.fates()["sft"] == "done"


@pytest.mark.parametrize(("error", "code"), [(StageFailed("stages.sft: rank 1: boom"), 1), (UserError("stages.sft: rank 1: boom"), 2)])
def test_what_waits_for_a_stage_that_failed_is_cancelled_and_status_says_why(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    launch_with(monkeypatch, raising(error))
    cluster.done("submit")
    cluster.enter("sft")
    assert cluster.step("sft").code == code
    cluster.set("sft", "FAILED")
    for stage in ("near", "far", "eval"):
        cluster.set(stage, None)
    assert cluster.fates() == {
        "sft": "failed stages.sft: rank 1: boom",
        "near": "cancelled sft failed",
        "far": "cancelled sft failed",
        "eval": "cancelled near cancelled",
    }


def test_a_job_that_was_asked_to_make_room_leaves_no_last_word_and_finishes_when_it_is_begun_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_with(monkeypatch, raising(Preempted("stopped by SIGTERM")))
    cluster.done("submit")
    cluster.enter("sft")
    assert cluster.step("sft").code == 75
    cluster.set("sft", "PENDING")
    assert cluster.fates()["sft"].startswith("queued")
    launch_with(monkeypatch, finish)
    assert cluster.step("sft").code == 0


def test_a_job_that_was_cancelled_saves_and_is_not_begun_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_with(monkeypatch, raising(Preempted("stopped by SIGTERM")))
    cluster.done("submit")
    cluster.enter("sft")
    number, out = cluster.job("sft").number, cluster.done("cancel")
    assert f"eval  job {cluster.job('eval').number} was taken from the queue" in out
    assert f"sft  job {number} on " in out and "was asked to save and end" in out
    assert cluster.step("sft").code == 75
    if cluster.kind == "slurm":
        cluster.set("sft", None)
    assert cluster.fates() == {
        "sft": "cancelled stopped by SIGTERM",
        "near": "cancelled sft cancelled",
        "far": "cancelled sft cancelled",
        "eval": "cancelled near cancelled",
    }


def test_only_a_job_is_a_step_of_a_chain(cluster: Cluster) -> None:
    cluster.done("submit")
    ended = cluster.step("sft")
    name = {"slurm": "Slurm", "kubernetes": "Kubernetes"}[cluster.kind]
    assert (ended.code, ended.err) == (2, f"error: step: is what a job of {name} does; `submit` makes jobs of the stages\n")


def test_a_launcher_that_starts_no_jobs_says_so(cluster: Cluster) -> None:
    assert "launcher.kind: local starts no jobs" in cluster.refused("submit", "launcher={kind: local}", "stages.eval.launcher={}")


def test_how_many_nodes_a_stage_has_is_its_launchers_to_say(cluster: Cluster) -> None:
    line = cluster.refused("plan", "stages.sft.num_processes=2")
    assert line == "stages.sft.num_processes: 2, and its launcher says 2 nodes with 4 each; set stages.sft.launcher instead"


# --- Kubernetes, which knows of no jobs that wait for others ----------------------------------------------------------


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose stage `dpo` waits for the job x-1 of `sft`."""
    monkeypatch.setattr("posttrain.launch.jobs.ASK_EVERY_S", 0.01)
    for stage, number in (("sft", "x-1"), ("dpo", "x-2")):
        (tmp_path / ".jobs" / stage).mkdir(parents=True)
        write_job(tmp_path, stage, number)
    return tmp_path


def write_job(run: Path, stage: str, number: str, **fields: Any) -> None:
    record = {"stage": stage, "kind": "kubernetes", "number": number, "log": "", "submitted": "", "after": {}, "cancelled": False, **fields}
    disk.write_sealed(run / ".jobs" / stage / "job.json", record)


def write_end(run: Path, code: int, *, is_final: bool = True, number: str = "x-1") -> None:
    record = {"job": number, "code": code, "message": "boom", "ended": "", "crashes": 1, "is_final": is_final}
    disk.write_sealed(run / ".jobs" / "sft" / "ended.json", record)


@contextmanager
def still_waiting() -> Iterator[None]:
    """The block waits on, for as long as anyone would look."""

    class Enough(Exception):
        pass

    before, moments = time.sleep, iter(range(5))

    def sleep(seconds: float) -> None:
        if next(moments, None) is None:
            raise Enough
        before(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.launch.jobs.time.sleep", sleep)
        with pytest.raises(Enough):
            yield


def wait(run: Path) -> None:
    jobs.wait_for_others(run, "dpo", {"sft": "x-1"}, Console(quiet=True))


def test_the_pod_that_waits_ends_once_the_job_above_has_ended_well(waiting: Path) -> None:
    with still_waiting():
        wait(waiting)
    write_end(waiting, 0, number="x-0")  # of a job before
    with still_waiting():
        wait(waiting)
    write_end(waiting, 75)
    with still_waiting():
        wait(waiting)
    write_end(waiting, 1, is_final=False)  # to be begun again
    with still_waiting():
        wait(waiting)
    write_end(waiting, 0)
    wait(waiting)


@pytest.mark.parametrize("how", ["failed: boom", "was cancelled", "was followed by job x-3"])
def test_the_pod_that_waits_in_vain_says_so_and_cancels_its_job(waiting: Path, how: str) -> None:
    if how == "failed: boom":
        write_end(waiting, 2)
    elif how == "was cancelled":
        write_job(waiting, "sft", "x-1", cancelled=True)
    else:
        write_job(waiting, "sft", "x-3")
    with pytest.raises(UserError, match=f"stages.dpo: waits in vain for stages.sft, whose job x-1 {how}"):
        wait(waiting)
    assert jobs.read_jobs(waiting)["dpo"].cancelled


@pytest.mark.parametrize("cluster", ["kubernetes"], indirect=True)
def test_a_crash_is_final_once_the_cluster_begins_it_no_more_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_with(monkeypatch, raising(StageFailed("boom")))
    cluster.done("submit")
    cluster.enter("sft")
    found = []
    for _ in range(3):
        assert cluster.step("sft", "--max-restarts", 1).code == 1
        found.append(disk.read_sealed(cluster.run / ".jobs" / "sft" / "ended.json")["is_final"])
    assert found == [False, True, True]


@pytest.mark.parametrize("cluster", ["kubernetes"], indirect=True)
def test_crashes_before_and_after_the_job_made_room_are_counted_together(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.done("submit")
    cluster.enter("sft")
    for error, code in ((StageFailed("boom"), 1), (Preempted("stopped by SIGTERM"), 75), (StageFailed("boom"), 1)):
        launch_with(monkeypatch, raising(error))
        assert cluster.step("sft", "--max-restarts", 1).code == code
    assert disk.read_sealed(cluster.run / ".jobs" / "sft" / "ended.json")["is_final"]


def test_pods_must_see_the_root_of_all_runs(tmp_path: Path, posttrain: Callable[..., Ended]) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "chat.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    (tmp_path / "prefs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    config = tmp_path / "pipeline.yaml"
    config.write_text(STAGES.replace("HERE", str(tmp_path)) + LAUNCHERS["kubernetes"].replace("/: all", "/elsewhere: all"))
    ended = posttrain("submit", config, "--dry-run", "--root", tmp_path / "runs")
    assert ended.code == 2
    assert f"launcher.volumes: pods see /elsewhere, and --root {tmp_path / 'runs'} lies in none of them" in ended.err


def test_two_pods_train_what_two_ranks_of_this_machine_do(
    tmp_path: Path, tiny: Path, posttrain: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of the JobSet that was submitted, with the variables that Kubernetes and JobSet set."""
    from posttrain.launch.local import free_port

    write_chat(tmp_path / "chat.jsonl", 24)
    config = tmp_path / "pipeline.yaml"
    cores = max(1, num_cores() // 2)
    config.write_text(f"""
run: r
sources: {{base: {{model: {tiny}}}, chat: {{data: {tmp_path}/chat.jsonl}}}}
stages: {{sft: {{inputs: {{policy: base, data: chat}}, max_steps: 2, global_batch_size: 8, learning_rate: 1e-3, max_length: 128}}}}
launcher: {{kind: kubernetes, image: i, volumes: {{/: all}}, num_nodes: 2, processes_per_node: 1, cpus_per_process: {cores}}}
""")
    local = posttrain("run", config, "launcher={kind: local, num_processes: 2}", "--root", tmp_path / "plain")
    assert local.code == 0, local.err
    stand_ins(tmp_path, monkeypatch)
    root = tmp_path / "runs"
    assert posttrain("submit", config, "--root", root).code == 0
    jobset = yaml.safe_load((root / "r" / ".jobs" / "sft" / "jobset.yaml").read_text())
    (container,) = jobset["spec"]["replicatedJobs"][-1]["template"]["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value", "0") for entry in container["env"]}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # the pods here share one host
    pods = []
    for index in ("1", "0"):
        given = {**os.environ, **environment, "JOB_COMPLETION_INDEX": index}
        command = [sys.executable, *container["command"][1:]]
        pods.append(subprocess.Popen(command, cwd=REPOSITORY, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [pod.communicate(timeout=240)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    found, expected = (artifact.read_artifact(directory / "r" / "sft") for directory in (root, tmp_path / "plain"))
    assert found is not None and expected is not None
    assert disk.hash_file(found.output / "model.safetensors") == disk.hash_file(expected.output / "model.safetensors")
