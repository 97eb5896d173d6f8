"""What Slurm is given, and what is made of its answers. Its commands are stand-ins here; tests/cluster has the real ones."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from posttrain import artifact, ledger
from posttrain.config import SlurmLauncher, read_launcher
from posttrain.error import Preempted, StageFailed, UserError
from posttrain.heartbeat import Lookout
from posttrain.launch.slurm import Script, _raise_failure, rank_command
from posttrain.provenance import now
from posttrain.stage import load_stage
from tests.conftest import Commands, Ended
from tests.posttrain.launch.test_hosts import attempted

GOLDEN = Path(__file__).parent / "golden"


def launcher(**fields: Any) -> SlurmLauncher:
    read = read_launcher("launcher", {"kind": "slurm", **fields})
    assert isinstance(read, SlurmLauncher)
    return read


BIG = launcher(
    partition="gpu",
    account="lab",
    qos="long",
    num_nodes=4,
    gpus_per_node=8,
    cpus_per_process=12,
    time="2-00:00:00",
    save_before_s=600,
    setup=["module load cuda/13.0", "export NCCL_SOCKET_IFNAME=ib0"],
    sbatch=["--constraint=h100", "--mem=0"],
)
SMALL = Script(
    run="my-chat-model",
    stage="eval",
    launcher=launcher(),
    output=Path("/data/runs/my-chat-model/eval/logs/job_%j.log"),
    directory=Path("/home/me/work"),
    command=["/env/bin/python", "/code/pipeline.py", "step", "/data/runs/my-chat-model/.jobs/eval/pipeline.json", "--stage", "eval"],
    after=[],
)
SCRIPTS = {
    "small": SMALL,
    "big": replace(SMALL, stage="dpo", launcher=BIG, after=["12", "15"]),
    "odd_names": replace(
        SMALL,
        output=Path("/data/50% of 'it'/eval/logs/job_%j.log"),
        directory=Path("/home/a b/$(touch x)"),
        command=["/env/my python", "step", "$HOME;`touch x`", 'it\'s "here"', "*"],
    ),
}


# --- the script ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_the_script_of_a_job_is_the_one_that_was_read_through(name: str) -> None:
    assert SCRIPTS[name].text() == (GOLDEN / f"{name}.sbatch").read_text()


def test_the_driver_is_given_its_words_as_they_are(tmp_path: Path) -> None:
    words = ["$HOME;`touch x`", 'it\'s "here"', "*", "", "a\\b"]
    script = replace(SMALL, command=["printf", "<%s>", *words], directory=tmp_path)
    done = subprocess.run(["bash", "-s"], input=script.text(), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "".join(f"<{word}>" for word in words)
    assert not list(tmp_path.iterdir())


def test_the_driver_takes_the_place_of_the_shell_so_that_a_signal_to_the_job_reaches_it(tmp_path: Path) -> None:
    script = replace(SMALL, command=["sh", "-c", "echo $$"])
    (tmp_path / "script").write_text(script.text())
    shell = subprocess.Popen(["bash", tmp_path / "script"], stdout=subprocess.PIPE, text=True)
    assert shell.communicate()[0].strip() == str(shell.pid)


RANKS = {
    "srun": (
        BIG,
        "srun --nodes=4 --ntasks=32 --ntasks-per-node=8 --cpus-per-task=12 --mpi=none --export=ALL --wait=0 --kill-on-bad-exit=1"
        " PYTHON -m posttrain.worker /data/runs/x/dpo",
    ),
    "torchrun": (
        BIG.model_copy(update={"ranks": "torchrun"}),
        "srun --nodes=4 --ntasks=4 --ntasks-per-node=1 --cpus-per-task=96 --mpi=none --export=ALL --wait=0 --kill-on-bad-exit=1"
        " PYTHON -m torch.distributed.run --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=node1:2345 --rdzv-id=2345"
        " --signals-to-handle=SIGTERM,SIGUSR2 --shutdown-timeout=600 -m posttrain.worker /data/runs/x/dpo",
    ),
    "apptainer": (
        BIG.model_copy(update={"container": "image.sif", "container_mounts": ["/scratch"]}),
        "srun --nodes=4 --ntasks=32 --ntasks-per-node=8 --cpus-per-task=12 --mpi=none --export=ALL --wait=0 --kill-on-bad-exit=1"
        " apptainer exec --nv --bind=/work --bind=/data/runs --bind=/scratch --pwd=/work image.sif python -m"
        " posttrain.worker /data/runs/x/dpo",
    ),
    "pyxis": (
        launcher(num_nodes=2, container="org/image:1", container_runtime="pyxis", python="python3.12"),
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --mpi=none --export=ALL --wait=0 --kill-on-bad-exit=1 --container-image=org/image:1"
        " --container-mounts=/work:/work,/data/runs:/data/runs --container-workdir=/work python3.12 -m posttrain.worker /data/runs/x/dpo",
    ),
}


@pytest.mark.parametrize("name", list(RANKS))
def test_ranks_are_started_by_this_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "PYTHON")
    given, expected = RANKS[name]
    mounts = [Path("/work"), Path("/data/runs")]
    assert " ".join(rank_command(given, Path("/data/runs/x/dpo"), address="node1", port=2345, mounts=mounts)) == expected


def test_what_is_published_already_is_verified_by_one_rank() -> None:
    command = rank_command(BIG, Path("/x"), address="node1", port=1, mounts=[], alone=True)
    assert command[1:4] == ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"time": "4 hours"}, "launcher.time: '4 hours' is no time limit; give minutes, `4:00:00` or `2-00:00:00`"),
        ({"time": 5}, "launcher.save_before_s: 300 leaves nothing of the 300 s of time; lower it, or raise time"),
        ({"setup": ["module load x\nrm y"]}, "launcher.setup: 'module load x\\nrm y' is no line of text"),
        ({"partition": ""}, "launcher.partition: '' is no line of text"),
        ({"sbatch": ["-N 3"]}, "launcher.sbatch: '-N 3' is no long option; write it as `--name=value`"),
        ({"sbatch": ["--nodes=3"]}, "launcher.sbatch: '--nodes=3' is a field of the launcher; set num_nodes instead"),
        ({"sbatch": ["--dependency=afterany:3"]}, "launcher.sbatch: '--dependency=afterany:3' is set by the pipeline; leave it out"),
        ({"gpu_per_node": 8}, "launcher.gpu_per_node: unknown key; did you mean 'gpus_per_node'?"),
    ],
)
def test_a_launcher_that_is_set_wrongly_is_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        launcher(**fields)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("time", "seconds"), [(6, 360), ("6", 360), ("6:30", 390), ("1:00:00", 3600), ("1-2", 93600), ("1-2:30", 95400), ("1-00:00:10", 86410)]
)
def test_a_time_limit_is_read_as_slurm_reads_it(time: int | str, seconds: int) -> None:
    assert launcher(time=time, save_before_s=min(seconds - 1, 65535)).time == time
    if seconds <= 65535:
        with pytest.raises(UserError, match=f"{seconds} s of time"):
            launcher(time=time, save_before_s=seconds)


# --- what srun says of ranks that end ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "raised", "message"),
    [
        ("Killed", StageFailed, "rank 1 ended on node2 (Killed); out of memory is the usual reason; stacks and logs"),
        ("Out Of Memory", StageFailed, "rank 1 ended on node2 (Out Of Memory); stacks and logs"),
        ("Exited with exit code 75", Preempted, "was asked to stop and saved its state"),
        ("User defined signal 2", Preempted, "was asked to stop and saved its state"),
    ],
)
def test_the_rank_that_ended_first_says_why(tmp_path: Path, how: str, raised: type[Exception], message: str) -> None:
    """Words of srun 22.05. Rank 0 only lost the other."""
    stage = attempted(tmp_path)
    attempt = ledger.read_attempt(stage)
    assert attempt is not None
    said = [f"srun: error: node2: task 1: {how}", "srun: error: node1: task 0: Exited with exit code 1"]
    with pytest.raises(raised, match=re.escape(message)):
        _raise_failure(stage, attempt, 1, said, Lookout(stage, attempt, 2))


# --- submit, run, status and cancel, with stand-ins for Slurm's commands ---------------------------------------------

STAGES = """
run: r
smoke: false
sources:
  base: {model: HERE/base}
  chat: {data: HERE/chat.jsonl}
  prefs: {data: HERE/prefs.jsonl}
stages:
  sft: {inputs: {policy: base, data: chat}}
  near: {kind: dpo, inputs: {policy: sft, data: prefs}, beta: 0.3}
  far: {kind: dpo, inputs: {policy: sft, data: prefs}, beta: 0.03}
  eval: {inputs: {policies: [near, far], data: [prefs]}, launcher: {num_nodes: 1, processes_per_node: 1}}
"""
PIPELINE = f"{STAGES}launcher: {{kind: slurm, partition: main, num_nodes: 2, processes_per_node: 4}}\n"
SBATCH = """#!/bin/sh
test -e HERE/full && { echo "sbatch: error: invalid account" >&2; exit 1; }
number=$(cat HERE/number); echo $((number + 1)) > HERE/number
for script; do :; done
cp "$script" "HERE/given/$number"
echo "$number|PENDING|(Priority)" >> HERE/queue
echo "$number;cluster"
"""
SQUEUE = """#!/bin/sh
for word; do case $word in --jobs=*) jobs=${word#--jobs=};; esac; done
found=$(grep -E "^($(echo "$jobs" | tr , '|'))\\|" HERE/queue)
test -n "$found" || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
echo "$found"
"""
SCANCEL = """#!/bin/sh
echo "$@" >> HERE/cancelled
case $1 in --state=PENDING) sed -i "/^$2|PENDING/d" HERE/queue;; esac
"""
SCONTROL = """#!/bin/sh
echo "$@" >> HERE/requeued
"""


@dataclass(frozen=True)
class Cluster(Commands):
    """A pipeline of four stages, and a Slurm that writes down what it is asked for and does nothing."""

    here: Path
    call: Callable[..., Ended]

    def given(self) -> dict[str, str]:
        """The scripts that were given to sbatch, by number."""
        return {path.name: path.read_text() for path in sorted((self.here / "given").iterdir())}

    def options(self, number: str) -> dict[str, str]:
        """The options in a script that was given."""
        lines = [line.removeprefix("#SBATCH ") for line in self.given()[number].splitlines() if line.startswith("#SBATCH ")]
        return {name: value for name, _, value in (line.partition("=") for line in lines)}

    def queue(self, **states: str) -> None:
        """Have the queue hold these, as `_12="RUNNING|node1"`."""
        (self.here / "queue").write_text("".join(f"{number[1:]}|{state}\n" for number, state in states.items()))

    def finish(self, *stages: str) -> None:
        """Have stages finished, as their jobs would have."""
        for stage in stages:
            self.done("run", "launcher={kind: local}", "stages.eval.launcher={}", "--only", stage)

    def step(self, stage: str, *arguments: object) -> Ended:
        """What the job of a stage does."""
        return self.call("step", self.root / "r" / ".jobs" / stage / "pipeline.json", "--stage", stage, "--root", self.root, *arguments)

    def fates(self) -> dict[str, str]:
        rows = json.loads(self.done("status", "--json"))
        return {row["stage"]: " ".join(row["job"].values()).strip() for row in rows if "job" in row}

    def log(self, name: str) -> list[str]:
        path = self.here / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path, posttrain: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> Cluster:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "chat.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    (tmp_path / "prefs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "pipeline.yaml").write_text(PIPELINE.replace("HERE", str(tmp_path)))
    (tmp_path / "given").mkdir()
    (tmp_path / "queue").touch()
    (tmp_path / "number").write_text("11")
    (tmp_path / "bin").mkdir()
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text.replace("HERE", str(tmp_path)))
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    launch_with(monkeypatch, finish)
    return Cluster(tmp_path, posttrain)


def finish(directory: Path, attempt: ledger.Attempt) -> None:
    (directory / "output").mkdir(exist_ok=True)
    (directory / "output" / "model.safetensors").write_text(attempt.token)
    artifact.write_artifact(
        directory,
        kind=load_stage(attempt.kind, "").output,
        fingerprint=attempt.fingerprint,
        identity=attempt.identity,
        version=attempt.version,
        inputs=attempt.input_builds,
        metrics={},
        provenance={"finished": now()},
    )


def launch_with(monkeypatch: pytest.MonkeyPatch, launch: Callable[[Path, ledger.Attempt], None]) -> None:
    @contextmanager
    def open_launcher(*_: object, **__: object) -> Iterator[Callable[..., None]]:
        yield launch

    monkeypatch.setattr("posttrain.launch.open_launcher", open_launcher)


def test_a_chain_is_a_job_for_each_stage_after_those_that_it_reads(cluster: Cluster) -> None:
    cluster.done("submit")
    assert {number: cluster.options(number).get("--dependency") for number in cluster.given()} == {
        "11": None,
        "12": "afterok:11",
        "13": "afterok:11",
        "14": "afterok:12:13",
    }
    assert [cluster.options(number)["--job-name"] for number in cluster.given()] == ["r.sft", "r.near", "r.far", "r.eval"]
    assert [cluster.options(number)["--nodes"] for number in cluster.given()] == ["2", "2", "2", "1"]
    assert [cluster.options(number)["--ntasks-per-node"] for number in cluster.given()] == ["4", "4", "4", "1"]
    assert all("--kill-on-invalid-dep" in cluster.options(number) for number in cluster.given())


def test_a_dry_submission_prints_the_scripts_and_changes_nothing(cluster: Cluster) -> None:
    out = cluster.done("submit", "--dry-run")
    assert out.count("#!/bin/bash") == 4
    assert "--dependency=afterok:JOB-OF-near:JOB-OF-far" in out
    assert cluster.given() == {}
    assert not (cluster.root / "r").exists()


def test_a_half_finished_chain_is_given_only_what_is_left(cluster: Cluster) -> None:
    cluster.finish("sft", "near")
    cluster.done("submit")
    assert {number: cluster.options(number).get("--dependency") for number in cluster.given()} == {"11": None, "12": "afterok:11"}
    assert [cluster.options(number)["--job-name"] for number in cluster.given()] == ["r.far", "r.eval"]


def test_a_finished_chain_is_given_nothing(cluster: Cluster) -> None:
    cluster.finish("sft", "near", "far", "eval")
    cluster.done("submit")
    assert cluster.given() == {}


def test_what_another_run_has_finished_is_reused_without_a_job(cluster: Cluster) -> None:
    cluster.finish("sft")
    cluster.done("submit", "run=second", "--until", "near")
    assert [cluster.options(number)["--job-name"] for number in cluster.given()] == ["second.near"]
    assert (cluster.root / "second" / "sft" / "artifact.json").exists()


def test_a_chain_that_waits_or_runs_is_not_submitted_again(cluster: Cluster) -> None:
    cluster.done("submit")
    line = cluster.refused("submit")
    assert "sft has job 11, near has job 12, far has job 13, eval has job 14, which waits or runs" in line
    assert len(cluster.given()) == 4


def test_further_stages_wait_for_jobs_that_were_submitted_before(cluster: Cluster) -> None:
    cluster.done("submit", "--until", "near")
    cluster.done("submit", "--only", "far")
    assert cluster.options("13")["--dependency"] == "afterok:11"
    assert "stages.sft: a chosen stage reads it, and it is not ready" in cluster.refused("submit", "run=other", "--only", "far")


def test_a_job_works_from_the_pipeline_as_it_was_submitted(cluster: Cluster) -> None:
    cluster.done("submit", "stages.sft.learning_rate=1e-3", "--only", "sft")
    cluster.config.write_text(cluster.config.read_text().replace("beta: 0.3", "beta: 0.5"))
    os.environ["SLURM_JOB_ID"] = "11"
    try:
        assert cluster.step("sft").code == 0
    finally:
        del os.environ["SLURM_JOB_ID"]
    attempt = ledger.read_attempt(cluster.root / "r" / "sft")
    assert attempt is not None
    assert attempt.config["learning_rate"] == 1e-3
    assert attempt.num_processes == 8


def test_where_slurm_refuses_a_job_those_before_it_are_taken_back(cluster: Cluster) -> None:
    sbatch = cluster.here / "bin" / "sbatch"
    sbatch.write_text(sbatch.read_text() + f'test "$number" = 12 && touch {cluster.here}/full || true\n')
    line = cluster.refused("submit")
    assert line.startswith("stages.far: sbatch: sbatch: error: invalid account; the script is ")
    assert cluster.log("cancelled") == ["--state=PENDING 12", "--state=PENDING 11"]
    assert cluster.log("queue") == []


def test_without_slurm_submit_is_one_line_and_status_still_answers(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.done("submit")
    assert cluster.fates()["eval"] == "14 queued after near, far"
    monkeypatch.setenv("PATH", "/nowhere")
    assert "squeue: is not on the PATH here" in cluster.refused("submit")
    assert cluster.fates()["eval"] == "14 unknown Slurm cannot be asked here"
    assert "14 unknown: Slurm cannot be asked here" in cluster.done("status")
    assert "sbatch: is not on the PATH here" in cluster.refused("submit", "run=other")


def test_a_launcher_of_this_machine_starts_no_jobs(cluster: Cluster) -> None:
    assert "launcher.kind: local starts no jobs" in cluster.refused("submit", "launcher={kind: local}", "stages.eval.launcher={}")


def test_a_stage_changes_fields_of_the_launcher_and_not_its_kind(cluster: Cluster) -> None:
    assert "stages.eval.launcher.kind: is 'local'" in cluster.refused("plan", "stages.eval.launcher={kind: local}")
    assert "stages.eval.launcher.num_node: unknown key; did you mean" in cluster.refused("plan", "stages.eval.launcher={num_node: 3}")
    line = cluster.refused("plan", "stages.sft.num_processes=2")
    assert line == "stages.sft.num_processes: 2, and its launcher says 2 nodes with 4 each; set stages.sft.launcher instead"


# --- how a job ends --------------------------------------------------------------------------------------------------


@pytest.fixture
def in_job(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The chain is submitted, and this process is the first job of it."""
    cluster.done("submit")
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    cluster.queue(_11="RUNNING|node[1-2]", _12="PENDING|(Dependency)", _13="PENDING|(Dependency)", _14="PENDING|(Dependency)")
    return cluster


def raising(error: BaseException) -> Callable[..., None]:
    def launch(*_: object) -> None:
        raise error

    return launch


def test_a_job_that_finishes_its_stage_says_so(in_job: Cluster) -> None:
    assert in_job.fates() == {
        "sft": "11 running node[1-2]",
        "near": "12 queued after sft",
        "far": "13 queued after sft",
        "eval": "14 queued after near, far",
    }
    assert in_job.step("sft").code == 0
    in_job.queue(_12="PENDING|(Resources)", _13="PENDING|(Priority)", _14="PENDING|(Dependency)")
    assert in_job.fates() == {
        "sft": "11 done",
        "near": "12 queued Resources",
        "far": "13 queued Priority",
        "eval": "14 queued after near, far",
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StageFailed("stages.sft: rank 1: boom"), 1),
        (UserError("stages.sft: rank 1: boom"), 2),
        (ValueError("stages.sft: rank 1: boom"), None),
    ],
    ids=["crash", "wrong input", "bug"],
)
def test_a_stage_that_fails_cancels_what_waits_for_it_and_status_says_why(
    in_job: Cluster, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int | None
) -> None:
    launch_with(monkeypatch, raising(error))
    if code is None:
        with pytest.raises(ValueError, match="boom"):
            in_job.step("sft")
    else:
        assert in_job.step("sft").code == code
    assert in_job.log("requeued") == []
    in_job.queue(_11="FAILED|(NonZeroExitCode)", _12="CANCELLED|(DependencyNeverSatisfied)")  # the others are forgotten already
    said = "stages.sft: rank 1: boom" if code else "ValueError: stages.sft: rank 1: boom"
    assert in_job.fates() == {
        "sft": f"11 failed {said}",
        "near": "12 cancelled sft failed",
        "far": "13 cancelled sft failed",
        "eval": "14 cancelled near cancelled",
    }


def test_a_job_that_was_asked_to_make_room_requeues_itself(in_job: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_with(monkeypatch, raising(Preempted("stopped by SIGUSR2")))
    assert in_job.step("sft").code == 75
    assert in_job.log("requeued") == ["requeue 11"]
    in_job.queue(_11="PENDING|(BeginTime)")
    assert in_job.fates()["sft"] == "11 queued BeginTime"
    launch_with(monkeypatch, finish)
    assert in_job.step("sft").code == 0


@pytest.mark.parametrize("state", ["COMPLETING|node1", "CANCELLED|node1", None])
def test_a_job_that_slurm_itself_ends_is_not_requeued(in_job: Cluster, monkeypatch: pytest.MonkeyPatch, state: str | None) -> None:
    launch_with(monkeypatch, raising(Preempted("stopped by SIGTERM")))
    in_job.queue(**({"_11": state} if state else {}))
    assert in_job.step("sft").code == 75
    assert in_job.log("requeued") == []
    in_job.queue()
    assert in_job.fates()["sft"] == "11 stopped stopped by SIGTERM"


def test_a_job_that_was_cancelled_saves_and_is_not_requeued(in_job: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    out = in_job.call("cancel", in_job.config, "--root", in_job.root).out
    assert "eval  job 14 was taken from the queue" in out
    assert "sft  job 11 on node[1-2] was asked to save and end" in out
    assert in_job.log("cancelled")[-1] == "--batch --signal=TERM 11"
    launch_with(monkeypatch, raising(Preempted("stopped by SIGTERM")))
    assert in_job.step("sft").code == 75
    assert in_job.log("requeued") == []
    in_job.queue()
    assert in_job.fates() == {
        "sft": "11 cancelled stopped by SIGTERM",
        "near": "12 cancelled sft cancelled",
        "far": "13 cancelled sft cancelled",
        "eval": "14 cancelled near cancelled",
    }
    assert "no job of " in in_job.call("cancel", "r", "--root", in_job.root).out


def test_a_job_that_was_killed_is_told_from_its_silence(in_job: Cluster) -> None:
    in_job.queue(_11="OUT_OF_MEMORY|(OutOfMemory)")
    assert in_job.fates()["sft"].startswith("11 failed OUT_OF_MEMORY, and its driver left no word; its log is ")
    assert in_job.fates()["near"] == "12 cancelled sft failed"


def test_a_stage_that_is_to_be_built_again_is_built_again_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.finish("sft")
    before = ledger.read_attempt(cluster.root / "r" / "sft")
    cluster.done("submit", "--rebuild", "sft", "--only", "sft")
    (arguments,) = [line for line in cluster.given()["11"].splitlines() if line.startswith("exec ")]
    assert before is not None
    assert arguments.endswith(f" --replaces {before.token}")
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    assert "sft  rebuild: asked for" in cluster.step("sft", "--replaces", before.token).out
    assert "sft  skip: finished" in cluster.step("sft", "--replaces", before.token).out, "as after a requeue"


def test_only_a_job_is_a_step_of_a_chain(cluster: Cluster) -> None:
    cluster.done("submit")
    ended = cluster.step("sft")
    assert (ended.code, ended.err) == (2, "error: step: is what a job of Slurm does; `submit` makes jobs of the stages\n")
