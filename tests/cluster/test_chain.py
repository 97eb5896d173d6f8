"""On a real Slurm of two nodes: whatever happens to the jobs of a chain, it publishes what it would have published left alone."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from posttrain.parallel import num_cores
from tests.cluster.harness import SCRIPTS, Cluster, Submitted, missing, wait
from tests.conftest import Ended, write_chat
from tests.faults.harness import Chain

NUM_STEPS = 40
LOCAL = ("launcher={kind: local, num_processes: 2}", "stages.eval.launcher={}", "stages.eval.num_processes=1")
ZERO2 = "stages.sft.deepspeed=ds_configs/zero2.json"

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run([SCRIPTS / "up.sh", directory], check=True)
        yield Cluster(directory)
    finally:
        subprocess.run([SCRIPTS / "down.sh", directory], check=False)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """One rank on each of two nodes trains, slowly for its size, and one rank evaluates."""
    here = tmp_path_factory.mktemp("chain")
    write_chat(here / "chat.jsonl", 24)
    path = here / "pipeline.yaml"
    path.write_text(f"""
run: r
sources: {{base: {{model: {tiny}}}, chat: {{data: {here}/chat.jsonl}}}}
stages:
  sft: {{inputs: {{policy: base, data: chat}}, max_steps: {NUM_STEPS}, global_batch_size: 8, micro_batch_tokens: 1, save_steps: 10,
         learning_rate: 1e-3, max_length: 128, preflight: {{held_out: 1.0}}}}
  eval: {{inputs: {{policies: [base, sft], data: chat}}, max_new_tokens: 4, launcher: {{num_nodes: 1}}}}
launcher: {{kind: slurm, num_nodes: 2, processes_per_node: 1, cpus_per_process: {max(1, num_cores() // 2)}, time: 20, save_before_s: 60,
           check_nodes: false}}
""")
    return path


def untroubled(pipeline: Path, root: Path, posttrain: Callable[..., Ended], *overrides: str) -> Chain:
    """The chain, run by two processes of this machine."""
    if not root.exists():
        ended = posttrain("run", pipeline, *LOCAL, *overrides, "--root", root)
        assert ended.code == 0, ended.err
    return Chain(pipeline, root)


@pytest.fixture
def submitted(cluster: Cluster, pipeline: Path, tmp_path: Path) -> Submitted:
    """Under a root whose name a shell would take for two."""
    return Submitted(cluster, Chain(pipeline, tmp_path / "my runs"))


@pytest.fixture
def reference(pipeline: Path, posttrain: Callable[..., Ended]) -> Chain:
    return untroubled(pipeline, pipeline.parent / "plain", posttrain)


def assert_same(submitted: Submitted, reference: Chain) -> None:
    found = [line for line in submitted.chain.outcome().differences(reference.outcome()) if not line.startswith("eval")]
    assert found == []


def test_a_chain_of_jobs_under_zero_2_publishes_what_two_processes_of_one_machine_do_whoever_else_wants_to_build_it(
    submitted: Submitted, pipeline: Path, posttrain: Callable[..., Ended]
) -> None:
    out = submitted.done("submit", ZERO2, "launcher.check_nodes=true")
    sft, evaluation = submitted.number("sft"), submitted.number("eval")
    assert f"job {evaluation}, after {sft} (sft)" in out
    assert submitted.fate("eval") == {"job": evaluation, "state": "queued", "why": "after sft"}
    submitted.meet(1)

    # Others come: the same command, another driver, another job of the same script.
    again = submitted.call("submit", ZERO2)
    assert again.returncode == 2
    assert f"sft has job {sft}, eval has job {evaluation}" in again.stderr
    other = submitted.call("run", ZERO2, *LOCAL, "--only", "sft", name="node2")
    assert other.returncode == 2
    assert "stages.sft: being built by process" in other.stderr
    assert " on node1, since " in other.stderr
    second = submitted.cluster.on("head", "sbatch", "--parsable", submitted.chain.directory / ".jobs" / "sft" / "script.sbatch").strip()
    assert submitted.fate("sft") == {"job": sft, "state": "running", "why": "node[1-2]"}

    submitted.finish("eval")
    wait(lambda: submitted.cluster.jobs().get(second) == "COMPLETED", "the other job was to end well", submitted.log)
    assert submitted.attempt() == 1
    assert "sft  skip: finished" in submitted.log()
    assert "  nodes: " in submitted.log(), "they were compared before anything was trained"
    hosts = [(submitted.chain.directory / "sft" / "logs" / "attempt_1" / f"rank_{rank}.log").read_text() for rank in (0, 1)]
    assert [text.splitlines()[0] for text in hosts] == ["rank 0 of 2 on node1", "rank 1 of 2 on node2"]
    assert submitted.fate("eval")["state"] == "done"
    reference = untroubled(pipeline, pipeline.parent / "zero2", posttrain, ZERO2)
    assert submitted.chain.outcome().differences(reference.outcome()) == []
    assert "skip" in submitted.done("submit", ZERO2), "nothing is left"


def test_a_job_whose_time_is_nearly_over_saves_and_goes_on_in_its_next_turn(submitted: Submitted, reference: Chain) -> None:
    submitted.done("submit", "--only", "sft")
    submitted.meet(3)
    with submitted.cluster.frozen():
        number = submitted.number("sft")
        *_, minutes, _ = submitted.cluster.on("head", "squeue", "--noheader", f"--jobs={number}", "--format=%M").split(":")
        submitted.cluster.on("head", "scontrol", "update", f"JobId={number}", f"TimeLimit={int(minutes) + 2}")
        wait(lambda: "asked to stop" in submitted.log(), "Slurm was to send its signal", submitted.log)
        submitted.cluster.on("head", "scontrol", "update", f"JobId={number}", "TimeLimit=20")
    submitted.finish()
    assert submitted.attempt() == 2
    assert "sft  resume: from the checkpoint of step " in submitted.log()
    assert_same(submitted, reference)


def test_a_job_that_loses_a_node_goes_on_when_there_are_enough_again(submitted: Submitted, reference: Chain) -> None:
    submitted.done("submit", "--only", "sft")
    submitted.meet(12)
    submitted.cluster.kill("node2")
    number = submitted.number("sft")
    wait(lambda: submitted.cluster.jobs()[number] not in ("RUNNING",), "the job was to end", submitted.log)
    submitted.cluster.revive("node2")
    submitted.finish()
    assert submitted.attempt() >= 2, "Slurm may take the node away once more before it trusts it again"
    assert "sft  resume: from the checkpoint of step " in submitted.log()
    assert_same(submitted, reference)


def test_a_job_that_makes_room_for_a_more_urgent_one_goes_on_after_it(submitted: Submitted, reference: Chain) -> None:
    submitted.done("submit", "--only", "sft")
    submitted.meet(3)
    options = ["--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 1"]
    with submitted.cluster.frozen():  # or it may be done before Slurm has looked at its queue again
        urgent = submitted.cluster.on("head", "sbatch", *options).strip()
        wait(lambda: "asked to stop" in submitted.log(), "Slurm was to ask for room", submitted.log)
    submitted.finish()
    wait(lambda: submitted.cluster.jobs()[urgent] == "COMPLETED", "the urgent job was to end well", submitted.log)
    assert submitted.attempt() == 2
    assert "sft  resume: from the checkpoint of step " in submitted.log()
    assert_same(submitted, reference)


def test_a_chain_that_is_cancelled_has_saved_and_is_run_to_its_end_later(submitted: Submitted, reference: Chain) -> None:
    submitted.done("submit")
    submitted.meet(3)
    assert "was asked to save and end" in submitted.done("cancel")
    number = submitted.number("sft")
    wait(lambda: submitted.cluster.jobs()[number] not in ("RUNNING", "COMPLETING"), "the job was to end", submitted.log)
    assert submitted.fate("sft")["state"] == "cancelled"
    assert submitted.fate("eval") == {"job": submitted.number("eval"), "state": "cancelled", "why": "sft cancelled"}
    saved = max(submitted.chain.checkpoints("sft"))
    assert saved > 3
    said = (submitted.chain.directory / "sft" / "logs" / "attempt_1" / "rank_0.log").read_text()
    assert f"sft saved its state after step {saved}" in said, "it was the cancelling that saved it"
    out = submitted.done("run", "--only", "sft")
    assert f"sft  resume: from the checkpoint of step {saved}" in out
    assert submitted.number("sft") != number
    assert_same(submitted, reference)


def test_a_stage_that_fails_cancels_what_waits_for_it(submitted: Submitted, tmp_path: Path) -> None:
    rows = tmp_path / "chat.jsonl"
    write_chat(rows, 8)
    held = submitted.cluster.on("head", "sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 60").strip()
    submitted.done("submit", f"sources.chat.data={rows}")
    rows.unlink()
    submitted.cluster.on("head", "scancel", held)
    number = submitted.number("eval")
    wait(lambda: submitted.cluster.jobs().get(number) == "CANCELLED", "eval was to be cancelled")
    row = json.loads(submitted.cluster.pipeline("node2", "status", "--root", submitted.chain.root, "--json").stdout)
    fates = {each["stage"]: each["job"] for each in row}
    assert fates["sft"]["state"] == "failed"
    assert "does not exist here" in fates["sft"]["why"]
    assert fates["eval"] == {"job": number, "state": "cancelled", "why": "sft failed"}
    assert submitted.end("sft")["code"] == 2
