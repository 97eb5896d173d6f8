"""The runner decides from what is on disk alone, and does no more than it decided. Stages are built by a stand-in: no model is trained."""

import dataclasses
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

import pipeline
from posttrain import artifact, disk, ledger
from posttrain.checkpoint import mark_complete
from posttrain.config import Config, read_pipeline
from posttrain.error import Preempted, StageFailed
from posttrain.provenance import now
from posttrain.recipe import TrainingExecution
from posttrain.stage import StageConfig, load_stage
from stages import STAGES
from tests.conftest import Commands

REPOSITORY = Path(__file__).parent.parent
PIPELINE = """
run: first
sources:
  base: {model: HERE/base}
  chat: {data: HERE/chat.jsonl}
  prefs: {data: HERE/prefs.jsonl}
stages:
  sft: {inputs: {policy: base, data: chat}, learning_rate: 1e-4}
  dpo: {inputs: {policy: sft, data: prefs}, beta: 0.1}
  eval: {inputs: {policies: [base, sft, dpo], data: [chat, prefs]}}
"""
NAMES = ("sft", "dpo", "eval")


@dataclass(frozen=True)
class Project(Commands):
    """A pipeline file with its sources, the commands on it, and the names of the stages built so far, in order."""

    here: Path
    call: Callable[..., Any]
    built: list[str]

    def stage(self, name: str, run: str = "first") -> Path:
        return self.root / run / name

    def run(self, *arguments: str) -> list[str]:
        """Run; the names of the stages that were built for it."""
        before = len(self.built)
        ended = self.ended("run", *arguments)
        assert ended.code == 0, ended.err
        return self.built[before:]

    def refused(self, command: str, *arguments: str) -> str:
        """The one line that the command ended with, its exit code being 2."""
        ended = self.ended(command, *arguments)
        assert ended.code == 2, ended
        (line,) = ended.err.splitlines()
        return str(line)

    def rows(self, *arguments: str, command: str = "plan") -> dict[str, dict[str, Any]]:
        ended = self.ended(command, "--json", *arguments)
        assert ended.code == 0, ended.err
        return {row["stage"]: row for row in json.loads(ended.out)}

    def actions(self, *arguments: str) -> str:
        """The planned actions of sft, dpo and eval."""
        rows = self.rows(*arguments)
        return " ".join(rows[name]["action"] for name in NAMES if name in rows)

    def fingerprints(self, *overrides: str) -> list[str]:
        return [node.fingerprint for node in pipeline.plan(read_pipeline(self.config, overrides), self.root)]


@pytest.fixture
def project(tmp_path: Path, posttrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Project:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_text("weights")
    (tmp_path / "chat.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    (tmp_path / "prefs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "pipeline.yaml").write_text(PIPELINE.replace("HERE", str(tmp_path)))
    built: list[str] = []

    def finish(directory: Path, attempt: ledger.Attempt) -> None:
        built.append(attempt.name)
        (directory / "output").mkdir(exist_ok=True)
        (directory / "output" / "model.safetensors").write_text(attempt.token)
        (directory / "final_metrics.json").write_text('{"loss": 0.5}')
        artifact.record_output(directory, directory / "output")
        write_artifact(directory, attempt)

    @contextmanager
    def open_launcher(*_: object, **__: object) -> Iterator[Callable[..., None]]:
        yield finish

    monkeypatch.setattr("posttrain.launch.open_launcher", open_launcher)
    return Project(tmp_path, posttrain, built)


def write_artifact(directory: Path, attempt: ledger.Attempt) -> None:
    artifact.write_artifact(
        directory,
        kind=load_stage(attempt.kind, "").output,
        fingerprint=attempt.fingerprint,
        identity=attempt.identity,
        version=attempt.version,
        inputs=attempt.input_builds,
        metrics={"loss": 0.5},
        provenance={"finished": now()},
    )


# --- decide: states on disk, built by hand ---------------------------------------------------------------------------


def unstarted(project: Project) -> None:
    """Nothing was ever run."""


def finished(project: Project) -> None:
    project.run()


def without_artifact_file(project: Project) -> None:
    project.run()
    (project.stage("sft") / "artifact.json").unlink()


def without_output(project: Project) -> None:
    project.run()
    (project.stage("sft") / "output" / "model.safetensors").unlink()
    (project.stage("sft") / "output").rmdir()


def output_truncated(project: Project) -> None:
    project.run()
    (project.stage("sft") / "output" / "model.safetensors").write_text("w")


def output_incomplete(project: Project) -> None:
    """A file of the output is gone, and its directory is not."""
    project.run()
    (project.stage("dpo") / "output" / "model.safetensors").unlink()


def published_truncated(project: Project) -> None:
    without_artifact_file(project)
    (project.stage("sft") / "output" / "model.safetensors").write_text("w")


def published_truncated_with_checkpoint(project: Project) -> None:
    published_truncated(project)
    checkpoint = project.stage("sft") / "checkpoints" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    mark_complete(checkpoint, step=5, world_size=1)


def cut_off(project: Project) -> None:
    """The first stage was started, and ended before it had saved anything."""
    (node, *_) = pipeline.plan(read_pipeline(project.config), project.root)
    ledger.start_attempt(
        node.directory,
        stage=node.stage,
        name=node.name,
        run=node.run,
        root=node.root,
        fingerprint=node.fingerprint,
        identity=node.identity,
        config=node.config,
        inputs={role: [pipeline._record(entry) for entry in entries] for role, entries in node.inputs.items()},
        num_processes=1,
    )


def checkpointed(project: Project) -> None:
    cut_off(project)
    checkpoint = project.stage("sft") / "checkpoints" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    mark_complete(checkpoint, step=5, world_size=1)


def half_checkpointed(project: Project) -> None:
    cut_off(project)
    (project.stage("sft") / "checkpoints" / "checkpoint-5").mkdir(parents=True)


def damaged_attempt(project: Project) -> None:
    checkpointed(project)
    (project.stage("sft") / "stage.json").write_text('{"name": "sf')


def source_changed(project: Project) -> None:
    project.run()
    (project.here / "chat.jsonl").write_text('{"prompt": "q", "completion": "another"}\n')


def base_changed(project: Project) -> None:
    project.run()
    (project.here / "base" / "model.safetensors").write_text("other weights")


def source_moved(project: Project) -> None:
    project.run()
    (project.here / "chat.jsonl").rename(project.here / "moved.jsonl")


def source_touched(project: Project) -> None:
    project.run()
    os.utime(project.here / "chat.jsonl", (0, 0))


def dpo_checkpointed(project: Project) -> None:
    """All finished; then dpo is cut off at a checkpoint, and sft built again."""
    project.run()
    (project.stage("dpo") / "artifact.json").unlink()
    project.run("--only", "sft", "--rebuild", "sft")


def leased(project: Project, *, pid: int | None = None, age_s: float = 0.0, **fields: object) -> None:
    cut_off(project)
    with ledger.lease(project.stage("sft")):
        record = json.loads((project.stage("sft") / "lease.json").read_text())
    path = project.stage("sft") / "lease.json"
    path.write_text(json.dumps({**record, "pid": pid or record["pid"], **fields}))
    os.utime(path, (time.time() - age_s,) * 2)


def leased_by_a_live_process(project: Project) -> None:
    leased(project)


def leased_by_a_suspended_process(project: Project) -> None:
    leased(project, age_s=10 * ledger.LEASE_EXPIRES_S)


def leased_by_a_dead_process(project: Project) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    leased(project, pid=gone.pid)


def leased_by_an_earlier_process_of_that_pid(project: Project) -> None:
    leased(project, born="1")


def leased_by_another_host(project: Project) -> None:
    leased(project, host="node7", machine="of node7")


def leased_by_another_host_long_ago(project: Project) -> None:
    leased(project, host="node7", machine="of node7", age_s=ledger.LEASE_EXPIRES_S + 1)


def lease_file_is_garbage(project: Project) -> None:
    cut_off(project)
    (project.stage("sft") / "lease.json").write_text("[1]")


BETA, RATE = "stages.dpo.beta=0.05", "stages.sft.learning_rate=2e-4"


@pytest.mark.parametrize(
    ("state", "arguments", "actions", "stage", "why"),
    [
        (unstarted, [], "run run run", "sft", "not started"),
        (unstarted, ["--rebuild", "sft"], "run run run", "sft", "not started"),
        (finished, [], "skip skip skip", "dpo", "finished 20"),
        (finished, ["run=second"], "reuse reuse reuse", "dpo", "finished as "),
        (finished, ["run=second", BETA], "reuse run run", "dpo", "not started"),
        (finished, ["--rebuild", "dpo"], "skip rebuild rebuild", "dpo", "asked for"),
        (finished, ["--rebuild", "dpo"], "skip rebuild rebuild", "eval", "dpo will be built"),
        (finished, [BETA], "skip drift rebuild", "dpo", "stages.dpo.beta: 0.1 -> 0.05, but it finished 20"),
        (finished, [BETA, "stages.dpo.seed=3"], "skip drift rebuild", "dpo", "stages.dpo.beta: 0.1 -> 0.05; stages.dpo.seed: 0 -> 3, but"),
        (finished, [BETA, "--rebuild", "dpo"], "skip rebuild rebuild", "dpo", "asked for"),
        (finished, [RATE], "drift rebuild rebuild", "dpo", "sft will be built"),
        (finished, ["stages.dpo.inputs.policy=base"], "skip drift rebuild", "dpo", "stages.dpo.inputs: sft, prefs -> base, prefs, but"),
        (
            finished,
            ["stages.eval.inputs.policies=[base, dpo]"],
            "skip skip drift",
            "eval",
            "inputs: base, sft, dpo, chat, prefs -> base, dpo",
        ),
        (finished, ["stages.sft.lora={}"], "drift rebuild rebuild", "sft", "stages.sft.lora: null -> {}"),
        (without_artifact_file, [], "resume rebuild rebuild", "sft", "from its published output"),
        (without_artifact_file, [], "resume rebuild rebuild", "dpo", "sft will be built"),
        (without_artifact_file, [RATE], "drift rebuild rebuild", "sft", "0.0001 -> 0.0002, but its published output is of the old config"),
        (without_output, [], "rebuild rebuild rebuild", "sft", "its output is gone"),
        (output_truncated, [], "damaged rebuild rebuild", "sft", "output/model.safetensors has 1 bytes, and was written with 32"),
        (output_truncated, ["run=second"], "run run run", "sft", "not started"),
        (output_truncated, ["--rebuild", "sft"], "rebuild rebuild rebuild", "sft", "asked for"),
        (output_truncated, [RATE], "drift rebuild rebuild", "sft", "0.0001 -> 0.0002"),
        (output_incomplete, [], "skip damaged rebuild", "dpo", "output/model.safetensors is missing"),
        (published_truncated, [], "damaged rebuild rebuild", "sft", "model.safetensors has 1 bytes, and was written with 32"),
        (published_truncated_with_checkpoint, [], "resume rebuild rebuild", "sft", "from the checkpoint of step 5"),
        (cut_off, [], "run run run", "sft", "attempt 1 left nothing to resume"),
        (cut_off, [RATE], "run run run", "sft", "attempt 1 left nothing to resume"),
        (half_checkpointed, [], "run run run", "sft", "attempt 1 left nothing to resume"),
        (checkpointed, [], "resume run run", "sft", "from the checkpoint of step 5"),
        (checkpointed, [RATE], "drift run run", "sft", "0.0001 -> 0.0002, but the checkpoint of step 5 is of the old config"),
        (checkpointed, ["--rebuild", "sft"], "rebuild run run", "sft", "asked for"),
        (damaged_attempt, [], "run run run", "sft", "not started"),
        (source_changed, [], "drift rebuild drift", "sft", "sources.chat: changed, but it finished 20"),
        (base_changed, [], "drift rebuild drift", "eval", "sources.base: changed, but it finished 20"),
        (source_moved, ["sources.chat.data=HERE/moved.jsonl"], "skip skip skip", "sft", "finished 20"),
        (source_touched, [], "skip skip skip", "sft", "finished 20"),
        (dpo_checkpointed, [], "skip rebuild rebuild", "dpo", "sft was built again since its published output"),
        (leased_by_a_live_process, [], "running run run", "sft", "being built by process "),
        (leased_by_a_suspended_process, [], "running run run", "sft", "being built by process "),
        (leased_by_a_dead_process, [], "run run run", "sft", "left nothing to resume"),
        (leased_by_an_earlier_process_of_that_pid, [], "run run run", "sft", "left nothing to resume"),
        (leased_by_another_host, [], "running run run", "sft", "on node7, since 20"),
        (leased_by_another_host_long_ago, [], "run run run", "sft", "left nothing to resume"),
        (lease_file_is_garbage, [], "run run run", "sft", "left nothing to resume"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_what_is_on_disk_decides(
    project: Project, state: Callable[[Project], None], arguments: list[str], actions: str, stage: str, why: str
) -> None:
    state(project)
    arguments = [argument.replace("HERE", str(project.here)) for argument in arguments]
    before = sorted(path for path in project.root.rglob("*") if path.name != ".hashes.json")
    rows = project.rows(*arguments)
    assert " ".join(rows[name]["action"] for name in NAMES) == actions
    assert why in rows[stage]["why"]
    assert sorted(path for path in project.root.rglob("*") if path.name != ".hashes.json") == before, "planning changes nothing"


def test_another_kind_of_stage_with_the_same_fields_is_drift(project: Project) -> None:
    project.config.write_text(
        PIPELINE.replace("HERE", str(project.here)).replace("dpo: {inputs", "dpo: {kind: dpo, inputs").replace(", beta: 0.1", "")
    )
    project.run()
    rows = project.rows("stages.dpo.kind=sft")
    assert rows["dpo"]["action"] == "drift"
    assert "stages.dpo.kind: dpo -> sft" in rows["dpo"]["why"]


def test_another_version_of_a_stage_is_drift(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.run()
    stage = load_stage("dpo", "")
    monkeypatch.setattr("stages.dpo.STAGE", dataclasses.replace(stage, version=2))
    assert "stage dpo went from version 1 to 2" in project.rows()["dpo"]["why"]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"payload": {}, "sha256": ""}'])
def test_a_damaged_artifact_file_is_named_and_never_taken_for_a_finished_stage(project: Project, content: str) -> None:
    project.run()
    path = project.stage("sft") / "artifact.json"
    path.write_text(content)
    if content == "null":
        assert project.actions() == "resume rebuild rebuild"
        return
    for command in ("plan", "run", "status"):
        line = project.refused(command)
        assert line.startswith(f"error: {path}: damaged (")
        assert "delete it" in line
    path.unlink()
    assert project.run() == ["sft", "dpo", "eval"]


def test_an_artifact_file_edited_by_hand_is_damaged(project: Project) -> None:
    project.run()
    path = project.stage("dpo") / "artifact.json"
    path.write_text(path.read_text().replace("0.5", "0.1"))
    assert "damaged (its hash does not match)" in project.refused("plan")


# --- fingerprints ----------------------------------------------------------------------------------------------------

OTHER_EXECUTION = {
    "num_processes": "2",
    "launcher": "{num_processes: 2}",
    "stall_timeout_s": "7",
    "micro_batch_tokens": "300",
    "deepspeed": "ds_configs/zero2.json",
    "fsdp": "full_shard",
    "gradient_checkpointing": "true",
    "layout": "padded",
    "sequence_parallel_size": "1",  # more than there are processes is refused, and told by tests of its own
    "attn_implementation": "sdpa",
    "save_steps": "7",
    "save_minutes": "7",
    "keep": "{save_total_limit: 7}",
    "max_shard_size": "7MB",
    "report_to": "[tensorboard]",
    "deterministic": "false",
    "logging_steps": "7",
    "preflight": "{padding: 0.9}",
}


def test_every_field_that_says_only_where_and_how_fast_is_tried_below() -> None:
    assert set(OTHER_EXECUTION) == set(TrainingExecution.model_fields) | set(StageConfig.model_fields)


@pytest.mark.parametrize("override", [f"{name}={value}" for name, value in OTHER_EXECUTION.items()])
def test_where_and_how_fast_a_stage_runs_is_not_fingerprinted(project: Project, override: str) -> None:
    assert project.fingerprints(f"stages.sft.{override}") == project.fingerprints()


def test_the_launcher_and_the_name_of_the_run_are_not_fingerprinted(project: Project) -> None:
    assert project.fingerprints("launcher.num_processes=4", "run=other") == project.fingerprints()


@pytest.mark.parametrize("stage", NAMES)
def test_spelling_out_the_defaults_does_not_change_a_fingerprint(project: Project, stage: str) -> None:
    fields = load_stage(stage, "").config.model_fields
    given = {"sft": {"learning_rate"}, "dpo": {"beta"}, "eval": set()}[stage]
    defaults = {name: info.get_default(call_default_factory=True) for name, info in fields.items() if name not in given}
    spelled_out = [f"stages.{stage}.{name}={json.dumps(value, default=Config.model_dump)}" for name, value in defaults.items()]
    assert project.fingerprints(*spelled_out) == project.fingerprints()


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("stages.sft.learning_rate=2e-4", "sft dpo eval"),
        ("stages.sft.seed=1", "sft dpo eval"),
        ("stages.sft.lora={r: 8}", "sft dpo eval"),
        ("stages.dpo.trainer={adam_beta2: 0.95}", "dpo eval"),
        ("stages.eval.confidence=0.9", "eval"),
        ("stages.dpo.inputs.policy=base", "dpo eval"),
        ("sources.chat.max_samples=1", "sft eval dpo"),
        ("sources.prefs.columns={prompt: question}", "dpo eval"),
    ],
)
def test_what_changes_the_bytes_changes_the_fingerprint_of_the_stage_and_of_all_after_it(
    project: Project, override: str, changed: str
) -> None:
    pairs = zip(NAMES, project.fingerprints(), project.fingerprints(override), strict=True)
    assert {name for name, before, after in pairs if before != after} == set(changed.split())


def test_a_hub_source_counts_by_its_pinned_commit(project: Project) -> None:
    hub = "sources.base={model: some-org/some-base, revision: " + "a" * 40 + "}"
    assert project.fingerprints(hub) == project.fingerprints(hub)
    assert project.fingerprints(hub) != project.fingerprints(hub.replace("aaaa}", "aaab}"))


# --- what a stage is told of those after it ------------------------------------------------------------------------------


def foreseen(project: Project, stage: str) -> list[str]:
    attempt = ledger.read_attempt(project.stage(stage))
    assert attempt is not None
    return [later.name for later in ledger.foreseen(attempt)]


def test_a_stage_foresees_the_next_ones_that_train_on_rows(project: Project) -> None:
    project.run()
    assert [foreseen(project, name) for name in NAMES] == [["dpo"], [], []]
    attempt = ledger.read_attempt(project.stage("sft"))
    assert attempt is not None
    (later,) = ledger.foreseen(attempt)
    assert (later.policy.name, later.data.name, later.config.beta) == ("base", "prefs", 0.1)
    assert later.contract == {"chat_template": None, "system_prompt": None}


def test_a_stage_foresees_only_what_this_command_will_run(project: Project) -> None:
    project.run("--until", "sft")
    assert foreseen(project, "sft") == []
    project.run()
    project.run("--rebuild", "sft", "--until", "dpo")
    assert foreseen(project, "sft") == ["dpo"]


def test_a_stage_whose_data_are_yet_to_be_made_is_not_foreseen(project: Project) -> None:
    made = "  mix: {kind: curate, inputs: {data: chat}}\n  more: {kind: sft, inputs: {policy: dpo, data: mix}, learning_rate: 1e-5}\n"
    project.config.write_text(project.config.read_text() + made)
    project.run()
    assert foreseen(project, "dpo") == []
    assert foreseen(project, "sft") == ["dpo"]


# --- reuse -----------------------------------------------------------------------------------------------------------


def test_a_new_run_of_the_same_recipe_takes_over_what_is_finished(project: Project) -> None:
    project.run()
    assert project.run("run=second") == []
    assert project.actions("run=second") == "skip skip skip"
    first, second = (artifact.read_artifact(project.stage("dpo", run)) for run in ("first", "second"))
    assert first and second
    assert first.id == second.id
    assert (second.output / "model.safetensors").samefile(first.output / "model.safetensors")


def test_a_new_run_with_one_field_changed_builds_from_there_on(project: Project) -> None:
    project.run()
    assert project.run("run=second", BETA) == ["dpo", "eval"]


def test_what_another_run_finished_from_an_earlier_build_of_an_input_is_not_reused(project: Project) -> None:
    project.run()
    project.run("run=second")
    project.run("--only", "sft", "--rebuild", "sft")
    assert project.actions("run=third").split()[0] == "reuse"
    assert project.actions() == "skip rebuild rebuild"


def test_a_reused_stage_outlives_the_run_it_came_from(project: Project) -> None:
    project.run()
    project.run("run=second")
    project.root.joinpath("first").rename(project.here / "elsewhere")
    assert project.actions("run=second") == "skip skip skip"
    (project.stage("sft", "second") / "artifact.json").unlink()
    assert project.rows("run=second")["sft"]["why"] == "from its published output"
    assert (project.stage("sft", "second") / "final_metrics.json").is_file(), "what the output is finished with came along"


def test_choosing_a_stage_whose_input_another_run_holds_says_to_choose_that_too(project: Project) -> None:
    project.run()
    assert "stages.sft: a chosen stage reads it, and it is not ready (reuse: finished as " in project.refused(
        "run", "run=second", "--only", "dpo"
    )


def test_a_damaged_build_of_another_run_is_not_reused_but_made_anew(project: Project) -> None:
    project.run()
    weights = project.stage("sft") / "output" / "model.safetensors"
    weights.write_text(weights.read_text()[::-1])  # of the same size: planning does not read it
    assert project.actions("run=second") == "reuse reuse reuse"
    ended = project.ended("run", "run=second")
    assert ended.code == 0, ended.err
    assert f"sft  not reused: {weights} does not hold what was written to it" in ended.out
    assert project.built[3:] == ["sft", "dpo", "eval"], "and what was made of it is not reused either"


def test_a_symbolic_link_in_a_build_of_another_run_is_not_followed(project: Project) -> None:
    project.run()
    secret = project.here / "secret"
    secret.write_text("secret")
    (project.stage("sft") / "output" / "added.txt").symlink_to(secret)
    assert project.run("run=second", "--until", "sft") == ["sft"]
    assert not (project.stage("sft", "second") / "output" / "added.txt").exists()


# --- execute ---------------------------------------------------------------------------------------------------------


def test_a_finished_pipeline_is_not_built_again(project: Project) -> None:
    assert project.run() == ["sft", "dpo", "eval"]
    assert project.run() == []


def test_drift_stops_the_run_before_anything_is_built(project: Project) -> None:
    project.run()
    (project.stage("sft") / "artifact.json").unlink()
    line = project.refused("run", BETA)
    assert line.startswith("error: stages.dpo.beta: 0.1 -> 0.05, but it finished ")
    assert "--rebuild dpo" in line
    assert "run=NAME" in line
    assert project.built == ["sft", "dpo", "eval"]


def test_rebuild_moves_the_old_build_aside_whole_and_deletes_nothing(project: Project) -> None:
    project.run()
    token = (project.stage("dpo") / "output" / "model.safetensors").read_text()
    assert project.run(BETA, "--rebuild", "dpo") == ["dpo", "eval"]
    old = project.root / "first" / ".old" / "dpo" / "1"
    assert (old / "output" / "model.safetensors").read_text() == token
    assert artifact.read_artifact(old)
    assert project.run(BETA) == []


def test_a_damaged_output_stops_the_run_before_anything_is_built(project: Project) -> None:
    output_truncated(project)
    line = project.refused("run", "--rebuild", "eval")
    assert line.startswith(f"error: stages.sft: {project.stage('sft')}/output/model.safetensors has 1 bytes, and was written with 32; ")
    assert line.endswith("build the stage again with --rebuild sft")
    assert project.built == ["sft", "dpo", "eval"]
    assert project.run("--rebuild", "sft") == ["sft", "dpo", "eval"]


def test_a_published_output_that_is_not_what_was_published_is_published_again_from_a_checkpoint(project: Project) -> None:
    published_truncated_with_checkpoint(project)
    weights = project.stage("sft") / "output" / "model.safetensors"
    ended = project.ended("run", "--only", "sft")
    assert ended.code == 0, ended.err
    assert f"{weights} has 1 bytes" in ended.out and "published again from the last checkpoint" in ended.out
    assert project.built[3:] == ["sft"] and len(weights.read_text()) == 32
    assert (project.root / "first" / ".old" / "sft" / "1" / "output" / "model.safetensors").read_text() == "w"


def test_a_published_output_that_is_not_what_was_published_is_not_finished_where_there_is_no_checkpoint(project: Project) -> None:
    without_artifact_file(project)
    weights = project.stage("sft") / "output" / "model.safetensors"
    weights.write_text(weights.read_text()[::-1])
    assert "stages.sft: " in (line := project.refused("run")) and "does not hold what was written to it" in line
    assert project.built == ["sft", "dpo", "eval"]


def test_a_run_whose_stage_another_process_took_over_ends_at_once(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "HEARTBEAT_S", 0.01)

    @contextmanager
    def open_launcher(*_: object, **__: object) -> Iterator[Callable[..., None]]:
        def launch(directory: Path, _: object) -> None:
            path = directory / "lease.json"
            theirs = {**json.loads(path.read_text()), "host": "node7", "machine": "node7", "pid": 5}
            disk.write_text(path, json.dumps(theirs))  # at once: it is looked at all along
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                time.sleep(0.01)

        yield launch

    monkeypatch.setattr("posttrain.launch.open_launcher", open_launcher)
    ended = project.ended("run")
    assert (ended.code, ended.err.count("\n")) == (75, 1)
    assert ended.err.startswith(f"stopped: {project.stage('sft')} was taken over by process 5 on node7, since ")
    assert json.loads((project.stage("sft") / "lease.json").read_text())["host"] == "node7", "theirs is left to them"


def test_a_stage_being_built_elsewhere_is_left_alone(project: Project) -> None:
    leased_by_another_host(project)
    assert "stages.sft: being built by process" in project.refused("run")
    assert project.built == []


def test_a_stage_that_another_process_finished_in_the_meantime_is_not_built_again(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = ledger.lease

    @contextmanager
    def slow_lease(directory: Path) -> Iterator[None]:
        monkeypatch.setattr(ledger, "lease", lease)
        project.run("--only", "sft")
        with lease(directory):
            yield

    monkeypatch.setattr(ledger, "lease", slow_lease)
    assert "stages.sft: another process finished it just now" in project.refused("run")
    assert project.built == ["sft"]


def test_how_a_stage_ends_is_the_exit_code(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, code, line in [
        (StageFailed("stages.sft: rank 1: boom\nwith a second line"), 1, "failed: stages.sft: rank 1: boom\\nwith a second line"),
        (Preempted("stages.sft saved its state"), 75, "stopped: stages.sft saved its state; run the same command again to go on"),
        (KeyboardInterrupt(), 75, "stopped: interrupted; run the same command again to go on"),
    ]:

        @contextmanager
        def open_launcher(*_: object, error: BaseException = error, **__: object) -> Iterator[Callable[..., None]]:
            def launch(*_: object) -> None:
                raise error

            yield launch

        monkeypatch.setattr("posttrain.launch.open_launcher", open_launcher)
        ended = project.ended("run")
        assert (ended.code, ended.err.strip()) == (code, line)
        assert not (project.stage("sft") / "lease.json").exists(), "the lease is given back on every way out"


@pytest.mark.parametrize(
    ("chosen", "built"),
    [
        ([], "sft dpo eval"),
        (["--only", "sft"], "sft"),
        (["--until", "dpo"], "sft dpo"),
        (["--from", "sft"], "sft dpo eval"),
        (["--from", "sft", "--until", "sft"], "sft"),
    ],
)
def test_stages_can_be_chosen(project: Project, chosen: list[str], built: str) -> None:
    assert list(project.rows(*chosen)) == built.split()
    assert project.run(*chosen) == built.split()


def test_stages_after_a_finished_one_can_be_chosen(project: Project) -> None:
    project.run("--only", "sft")
    assert project.run("--from", "dpo", "--until", "dpo") == ["dpo"]
    assert project.run("--only", "eval") == ["eval"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["--only", "dpo"], "error: stages.sft: a chosen stage reads it, and it is not ready (run: not started); choose it too"),
        (["--from", "eval"], "error: stages.sft: a chosen stage reads it"),
        (["--only", "spt"], "error: --only spt: no such stage; did you mean 'sft'?"),
        (["--from", "base"], "error: --from base: no such stage; known: dpo, eval, sft"),
        (["--rebuild", "x"], "error: --rebuild x: no such stage"),
        (["--until", ""], "error: --until : no such stage"),
        (["--from", "eval", "--until", "sft"], "error: --from eval --until sft: eval comes after sft; swap them"),
        (["--only", "sft", "--from", "sft"], "error: --only sft: leaves nothing for --from and --until to choose"),
    ],
)
def test_a_choice_that_cannot_be_run_is_refused(project: Project, chosen: list[str], message: str) -> None:
    assert project.refused("run", *chosen).startswith(message)
    assert project.built == []


def test_rebuilding_an_input_that_is_not_chosen_is_refused(project: Project) -> None:
    project.run()
    assert "stages.sft: a chosen stage reads it, and it is not ready (rebuild: asked for)" in project.refused(
        "run", "--rebuild", "sft", "--from", "dpo"
    )


# --- commands --------------------------------------------------------------------------------------------------------

PLAN_KEYS = ["stage", "kind", "action", "why", "fingerprint", "inputs"]


def test_plan_as_json_has_these_keys(project: Project) -> None:
    rows = project.rows()
    assert [list(row) for row in rows.values()] == [[*PLAN_KEYS, "trains", "disk_bytes", "needs", "smoke"]] * 3
    assert list(rows["sft"]["disk_bytes"]) == ["prepared", "checkpoints", "output", "completions", "total", "peak"]
    assert rows["eval"]["inputs"] == {"policies": ["base", "sft", "dpo"], "data": ["chat", "prefs"]}


def test_plan_says_what_is_trained_and_what_is_the_reference(project: Project) -> None:
    assert [row["trains"] for row in project.rows().values()] == ["all of base", "all of sft; reference: sft, frozen", ""]
    rows = project.rows("stages.dpo.lora={load_in_4bit: true}")
    assert rows["dpo"]["trains"] == "adapters on sft in 4 bits; reference: sft, frozen"


def test_status_as_json_has_these_keys(project: Project) -> None:
    project.run("--until", "dpo")
    (project.stage("dpo") / "progress.json").write_text('{"phase": "train", "step": 3, "num_steps": 9}')
    rows = project.rows(command="status")
    assert [list(row) for row in rows.values()] == [[*PLAN_KEYS, "metrics", "progress", "output", "smoke"]] * 3
    assert rows["dpo"]["metrics"] == {"loss": 0.5}
    assert rows["dpo"]["progress"] == {"phase": "train", "step": 3, "num_steps": 9}
    assert rows["dpo"]["output"] == str(project.stage("dpo") / "output")
    assert (rows["eval"]["metrics"], rows["eval"]["progress"], rows["eval"]["output"]) == ({}, None, None)


def test_status_without_a_config_lists_every_stage_of_every_run(project: Project) -> None:
    project.run("--until", "dpo")
    project.run("run=second", "--until", "sft")  # reused
    checkpointed_run = project.root / "third"
    project.call("run", project.config, "--root", project.root, "run=third", "stages.sft.seed=1", "--only", "sft")
    (checkpointed_run / "sft" / "artifact.json").unlink()
    ended = project.call("status", "--root", project.root, "--json")
    rows = {f"{row['run']}/{row['stage']}": row for row in json.loads(ended.out)}
    assert {name: row["action"] for name, row in rows.items()} == {
        "first/sft": "skip",
        "first/dpo": "skip",
        "second/sft": "skip",
        "third/sft": "resume",
    }
    assert {row["kind"] for row in rows.values()} == {"sft", "dpo"}
    assert set(rows["first/sft"]) == {"run", *PLAN_KEYS, "metrics", "progress", "output", "smoke"}
    table = project.call("status", "--root", project.root).out
    assert all(name in table for name in rows)


def test_status_says_how_far_a_stage_is_and_of_a_finished_one_that_it_is_finished(project: Project) -> None:
    project.run("--until", "dpo")
    for stage in ("sft", "dpo"):
        (project.stage(stage) / "progress.json").write_text('{"phase": "train", "step": 3, "num_steps": 9}')
    (project.stage("dpo") / "artifact.json").unlink()
    sft, dpo = project.call("status", "--root", project.root).out.splitlines()[1:][::-1]
    assert "finished" in sft and "train" not in sft
    assert "stopped at train 3/9" in dpo and "finished" not in dpo


def test_status_of_a_root_without_runs_is_empty(project: Project) -> None:
    assert json.loads(project.call("status", "--root", project.here / "none", "--json").out) == []
    assert not (project.here / "none").exists()


def test_the_tables_show_what_json_says(project: Project) -> None:
    project.run("--until", "sft")
    for command in ("plan", "status"):
        table = project.ended(command).out
        for row in project.rows(command=command).values():
            (line,) = [line for line in table.splitlines() if line.split()[:1] == [row["stage"]]]
            assert row["action"] in line.split()


def test_a_long_line_is_not_broken_where_there_is_no_terminal(project: Project) -> None:
    project.run()
    prompt = "be kind " * 60
    assert f"null -> {prompt.strip()}" in project.ended("plan", f"stages.dpo.system_prompt={prompt}").out


def test_square_brackets_are_shown_as_they_are_written(project: Project) -> None:
    project.run()
    assert "adamw_torch_fused -> [/red] [bold]x[/]" in project.ended("plan", "stages.dpo.optim='[/red] [bold]x[/]'").out
    assert "stages.sft.trainer={x: [sigmoid]} --stage dpo" in project.ended("run", "run=other", "stages.sft.trainer={x: [sigmoid]}").out
    assert "list[float] | None" in project.call("stages", "dpo").out


def test_stages_lists_the_kinds(posttrain: Callable[..., Any]) -> None:
    kinds = json.loads(posttrain("stages", "--json").out)
    assert [kind["kind"] for kind in kinds] == list(STAGES)
    table = posttrain("stages").out
    for kind in kinds:
        assert set(kind) == {"kind", "inputs", "output"}
        assert load_stage(kind["kind"], "").summary in table


@pytest.mark.parametrize("kind", list(STAGES))
def test_every_field_of_every_stage_has_a_line_of_help(posttrain: Callable[..., Any], kind: str) -> None:
    rows = json.loads(posttrain("stages", kind, "--json").out)
    assert set(load_stage(kind, "").config.model_fields) <= {row["name"] for row in rows}
    table = posttrain("stages", kind).out
    for row in rows:
        assert set(row) == {"name", "type", "default", "help"}
        assert row["help"].endswith("."), row
        assert "\n" not in row["help"], row
        assert "." not in row["type"], row
        assert f"  {row['name']} " in table
        assert row["help"] in table


def test_the_fields_of_a_nested_config_are_listed_too(posttrain: Callable[..., Any]) -> None:
    assert "lora.r" in {row["name"] for row in json.loads(posttrain("stages", "sft", "--json").out)}


def test_an_unknown_kind_of_stage_suggests_the_nearest(posttrain: Callable[..., Any]) -> None:
    ended = posttrain("stages", "dpoo")
    assert (ended.code, ended.err) == (2, "error: KIND: 'dpoo' is no kind of stage; did you mean 'dpo'?\n")


# --- verify and clean ------------------------------------------------------------------------------------------------


def test_verify_reads_every_byte_and_names_the_first_fault(project: Project) -> None:
    project.run()
    ended = project.call("verify", project.config, "--root", project.root, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert [(row["stage"], row["what"]) for row in found if row["what"] == "output"] == [
        ("dpo", "output"),
        ("eval", "output"),
        ("sft", "output"),
    ]
    assert all(row["faults"] == [] for row in found)
    weights = project.stage("sft") / "output" / "model.safetensors"
    before = weights.stat()
    weights.write_text(weights.read_text()[::-1])
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    (project.stage("eval") / "output" / "added.json").write_text("{}")
    for run in ("first", project.root / "first", project.config):
        ended = project.call("verify", run, "--root", project.root)
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert ended.err.startswith(f"error: first/eval: output: {project.stage('eval')}/output/added.json was put there since")
        assert ended.err.strip().endswith("or build the stage again with --rebuild eval")
        assert f"{weights} does not hold what was written to it" in ended.out, "all faults stand in the table"


def test_verify_says_of_each_file_that_a_stage_is_finished_with_what_is_wrong(project: Project) -> None:
    project.run("--only", "sft")
    stage = project.stage("sft")
    for name in ("artifact.json", "output.json", "final_metrics.json", "output/model.safetensors"):
        whole = (stage / name).read_bytes()
        for damaged in (whole[:-3], whole[:9] + bytes([whole[9] ^ 4]) + whole[10:], b""):
            (stage / name).write_bytes(damaged)
            if damaged != whole:
                ended = project.call("verify", "first", "--root", project.root)
                assert (ended.code, ended.err.count("\n")) == (2, 1), (name, damaged)
                assert str(stage / name) in ended.err
        (stage / name).write_bytes(whole)
    assert project.call("verify", "first", "--root", project.root).code == 0


def test_verify_of_what_is_no_run_says_which_there_are(project: Project) -> None:
    project.run("--only", "sft")
    ended = project.call("verify", "firts", "--root", project.root)
    assert (ended.code, ended.err) == (2, ended.err)
    assert ended.err.endswith("did you mean 'first'?\n")


def test_verify_leaves_a_stage_alone_that_is_being_built(project: Project) -> None:
    leased_by_a_live_process(project)
    (project.stage("sft") / "output").mkdir()
    ended = project.call("verify", "first", "--root", project.root)
    assert ended.code == 0
    assert "not checked: being built by process" in ended.out


def spared(project: Project, *arguments: str) -> dict[str, int]:
    """What `clean` would delete: the path below the root, and the bytes that this frees."""
    ended = project.call("clean", "first", "--root", project.root, "--dry-run", "--json", *arguments)
    assert ended.code == 0, ended.err
    return {str(Path(row["path"]).relative_to(project.root)): row["bytes"] for row in json.loads(ended.out)}


def littered(project: Project) -> None:
    """A finished run, rebuilt once, killed in every place, with shared data that it uses and that nobody does."""
    project.run()
    project.run("--rebuild", "dpo")
    (project.stage("sft") / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (project.stage("sft") / "checkpoints" / "checkpoint-5" / "state").write_text("12345")
    (project.stage("dpo") / "output.partial").mkdir()
    (project.stage("dpo") / "output.partial" / "half").write_text("123")
    (project.stage("dpo") / ".stage.json.x1").write_text("1")
    for key in ("used", "unused", ".old"):
        (project.root / ".prepared" / key).mkdir(parents=True)
        (project.root / ".prepared" / key / "rows.arrow").write_text("rows")
    (project.stage("sft") / "prepared.json").write_text(json.dumps({"path": str(project.root / ".prepared" / "used")}))


def test_clean_says_what_it_deletes_and_deletes_nothing_else(project: Project) -> None:
    littered(project)
    spares = spared(project)
    assert set(spares) == {
        "first/.old/dpo/1", "first/.old/eval/1", "first/sft/checkpoints", "first/dpo/output.partial", "first/dpo/.stage.json.x1",
        ".prepared/unused", ".prepared/.old",
    }  # fmt: skip
    assert (spares["first/sft/checkpoints"], spares["first/dpo/output.partial"], spares[".prepared/unused"]) == (5, 3, 4)
    files = {path for path in project.root.rglob("*") if path.is_file() and path.name != ".hashes.json"}
    ended = project.call("clean", "first", "--root", project.root)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "there is nobody to ask; say --yes to delete, --dry-run to only look" in ended.err
    assert all(path.exists() for path in files), "it was not asked to"
    ended = project.call("clean", "first", "--root", project.root, "--yes")
    assert ended.code == 0, ended.err
    assert all(path in ended.out for path in spares)
    left = {path for path in project.root.rglob("*") if path.is_file() and path.name != ".hashes.json"}
    gone = {path for path in files if any(path.is_relative_to(project.root / spare) for spare in spares)}
    assert left == files - gone
    assert project.actions() == "skip skip skip"
    assert spared(project) == {}


def test_clean_asks_on_a_terminal(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    littered(project)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, is_deleted in (("n", False), ("y", True)):
        monkeypatch.setattr("click.termui.visible_prompt_func", lambda _, answer=answer: answer)
        assert project.call("clean", "first", "--root", project.root).code == 0
        assert (project.root / ".prepared" / "unused").exists() != is_deleted


def test_clean_keeps_the_checkpoints_of_an_unfinished_stage_that_are_whole(project: Project) -> None:
    checkpointed(project)
    whole = project.stage("sft") / "checkpoints" / "checkpoint-5"
    (whole.parent / "checkpoint-6").mkdir()
    assert set(spared(project)) == {"first/sft/checkpoints/checkpoint-6"}
    assert project.call("clean", "first", "--root", project.root, "--yes").code == 0
    assert project.rows()["sft"]["why"] == "from the checkpoint of step 5"
    assert not (whole.parent / "checkpoint-6").exists()


def test_clean_touches_nothing_of_a_stage_that_is_being_built_nor_what_it_may_be_about_to_read(project: Project) -> None:
    littered(project)
    with ledger.lease(project.stage("sft")):
        assert set(spared(project)) == {"first/.old/dpo/1", "first/.old/eval/1", "first/dpo/output.partial", "first/dpo/.stage.json.x1"}
        assert project.call("clean", "first", "--root", project.root, "--yes").code == 0
        assert ledger.lease_holder(project.stage("sft"))
        assert (project.stage("sft") / "checkpoints" / "checkpoint-5" / "state").exists()


def test_clean_does_not_count_what_another_run_holds_too(project: Project) -> None:
    project.run()
    project.run("run=second")
    project.run("--rebuild", "sft")
    assert spared(project)["first/.old/sft/1"] < 32 + sum(
        path.stat().st_size for path in (project.root / "first" / ".old" / "sft" / "1").rglob("*") if path.suffix == ".json"
    )
    assert project.call("clean", "first", "--root", project.root, "--yes").code == 0
    assert project.actions("run=second").split()[0] == "skip"


def test_clean_never_follows_a_link(project: Project) -> None:
    littered(project)
    (project.here / "mine").write_text("mine")
    (project.stage("dpo") / "output.partial" / "link").symlink_to(project.here)
    (project.root / ".prepared" / "linked").symlink_to(project.here)
    assert project.call("clean", "first", "--root", project.root, "--yes").code == 0
    assert (project.here / "mine").read_text() == "mine"
    assert not (project.root / ".prepared" / "linked").is_symlink()


# --- what planning costs ---------------------------------------------------------------------------------------------


def test_planning_warns_where_the_disk_will_be_full(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert project.ended("plan").err == ""
    header = json.dumps({"model.embed_tokens.weight": {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 4_000_000]}}).encode()
    (project.here / "base" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    rows = project.rows()
    assert (rows["sft"]["disk_bytes"]["checkpoints"], rows["sft"]["disk_bytes"]["output"]) == (36_000_000, 4_000_002)
    needed = 2 * rows["sft"]["disk_bytes"]["total"] + rows["dpo"]["disk_bytes"]["checkpoints"]
    for free, warns in ((needed * 2, False), (rows["sft"]["disk_bytes"]["peak"] - 1, True)):
        monkeypatch.setattr("posttrain.disk.free_bytes", lambda _, free=free: free)
        ended = project.ended("plan")
        assert ended.code == 0
        assert ended.err.startswith("warning: ") == warns
    assert "with stages.sft about 40.0 MB will be needed; free some, as `clean` does, or choose another --root" in ended.err


def test_planning_imports_no_heavy_library(project: Project) -> None:
    script = """
import sys, pipeline
for arguments in sys.stdin.read().splitlines():
    sys.argv = ["pipeline.py", *arguments.split("|")]
    assert pipeline.main() == 0
heavy = {"torch", "transformers", "trl", "datasets", "peft", "accelerate", "deepspeed", "numpy", "scipy", "jinja2"}
print("HEAVY", sorted(heavy & sys.modules.keys()))
"""
    project.run()
    commands = [["plan", str(project.config)], ["status", str(project.config)], ["status"], ["stages"], ["stages", "dpo"]]
    commands += [["verify", "first"], ["clean", "first", "--dry-run"]]
    given = "\n".join("|".join([*command, *(["--root", str(project.root)] if command[0] != "stages" else [])]) for command in commands)
    ended = subprocess.run([sys.executable, "-c", script], input=given, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert ended.stdout.splitlines()[-1] == "HEAVY []", ended.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["plan"], "Missing argument 'CONFIG'"),
        (["plann"], "No such command 'plann'"),
        (["plan", "x.yaml", "--frm", "sft"], "No such option '--frm'"),
        (["run", "x.yaml", "--only"], "Option '--only' requires an argument"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_points_to_help(posttrain: Callable[..., Any], arguments: list[str], message: str) -> None:
    ended = posttrain(*arguments)
    assert ended.code == 2
    assert ended.err.startswith(f"error: {message}")
    assert ended.err.endswith("; --help says what there is\n")
    assert ended.err.count("\n") == 1


def test_help_is_no_error(posttrain: Callable[..., Any]) -> None:
    for arguments in (["--help"], ["run", "-h"]):
        ended = posttrain(*arguments)
        assert (ended.code, ended.err) == (0, "")
        assert "Usage:" in ended.out


def test_help_lists_commands_from_the_first_that_is_needed(posttrain: Callable[..., Any]) -> None:
    listed = [line.split()[0] for line in posttrain("--help").out.partition("Commands:")[2].splitlines() if line.strip()]
    assert listed[:2] == ["plan", "run"] and listed[-1] == "nodes"
    assert listed == [name for name, command in pipeline.cli.commands.items() if not command.hidden]


def test_chat_names_what_it_cannot_talk_to(project: Project) -> None:
    assert "no finished policy to talk to" in project.refused("chat")
    assert "--stage eval: no stage of that name makes a policy" in project.refused("chat", "--stage", "eval")
    assert "--stage spt: no stage of that name makes a policy; did you mean 'sft'?" in project.refused("chat", "--stage", "spt")


def test_devices_are_counted_without_asking_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, count in [("0,1,2", 3), ("", 1), ("-1", 1), ("0, ", 1), ("GPU-8932f937", 1)]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert pipeline.num_devices() == count
