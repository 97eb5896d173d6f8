"""A smoke tries each stage that trains, on its longest samples, before anything is built; it is not repeated, and says what failed."""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from posttrain import ledger
from posttrain.batch import GlobalBatches, Sizes
from posttrain.checkpoint import last_complete, mark_complete
from posttrain.config import DataSource, KubernetesLauncher
from posttrain.data import prepared
from posttrain.data.prepared import prepare
from posttrain.data.samples import conversation_encoder
from posttrain.error import StageFailed, UserError
from posttrain.launch import jobs, kubernetes
from posttrain.stage import Input, StageContext, load_stage
from stages.sft import SFTConfig
from tests.conftest import Ended
from tests.posttrain.data.test_samples import encoder_of
from tests.posttrain.launch.test_clusters import LAUNCHERS, stand_ins
from tests.posttrain.launch.test_slurm import STAGES, finish, launch_with

PIPELINE = """
run: r
smoke: true
sources:
  base: {model: HERE/base}
  chat: {data: HERE/chat.jsonl}
  prefs: {data: HERE/prefs.jsonl}
stages:
  sft: {inputs: {policy: base, data: chat}, max_length: 512}
  reward: {inputs: {policy: sft, data: prefs, heldout: prefs}}
  dpo: {inputs: {policy: sft, data: prefs}}
  both: {kind: merge, inputs: {policies: [sft, dpo]}}
  rlhf: {inputs: {policy: both, data: chat, reward: reward}}
  eval: {inputs: {policies: [base, rlhf], data: chat}}
"""
CURATED = """  picked: {kind: curate, inputs: {data: chat}, steps: [normalize]}
  sft: {inputs: {policy: base, data: picked}"""
TRAINS = ["sft", "reward", "dpo", "rlhf"]
OUT_OF_MEMORY = "rank 0: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB"


@dataclass
class Project:
    """A pipeline, and a launcher that leaves behind what ranks would which train steps in no time."""

    here: Path
    call: Callable[..., Ended]
    launched: list[str] = field(default_factory=list)
    """The stages that were launched, in order; those that were only tried in brackets."""
    read: dict[str, list[str]] = field(default_factory=dict)
    """What each read that was tried: models and data, by their paths below `here`."""
    steps: dict[str, list[list[int]]] = field(default_factory=lambda: defaultdict(list))
    """The steps that each launch of a stage took."""
    failures: dict[str, tuple[str, Exception]] = field(default_factory=dict)
    """By what is launched, as in `launched` with the number of the attempt, the phase that it fails in, and how."""
    faults: set[str] = field(default_factory=set)

    @property
    def root(self) -> Path:
        return self.here / "runs"

    def ended(self, command: str, *arguments: str) -> Ended:
        return self.call(command, self.here / "pipeline.yaml", "--root", self.root, *arguments)

    def done(self, command: str, *arguments: str) -> list[str]:
        """Run a command that is to end well; what was launched for it."""
        before = len(self.launched)
        ended = self.ended(command, *arguments)
        assert ended.code == 0, ended.err
        return self.launched[before:]

    def refused(self, code: int, *arguments: str) -> str:
        ended = self.ended(*arguments)
        assert ended.code == code, ended
        (line,) = ended.err.splitlines()
        return line

    def smokes(self, *arguments: str) -> dict[str, str | None]:
        return {row["stage"]: row["smoke"] for row in json.loads(self.ended("plan", "--json", *arguments).out)}

    def launch(self, directory: Path, attempt: ledger.Attempt) -> None:
        name = f"({attempt.name})" if attempt.is_smoke else attempt.name
        self.launched.append(name)
        sources = [entry["source"] for role in attempt.inputs.values() for entry in role]
        paths = [Path(source.get("model") or source["data"]) for source in sources]
        self.read[name] = [str(path.relative_to(self.here)) for path in paths]
        if (name := f"{name} {attempt.number}") in self.failures:
            phase, failure = self.failures[name]
            (directory / "checkpoints").mkdir(exist_ok=True)
            (attempt.logs(directory) / "rank_0.beat").write_text(json.dumps({"phase": phase, "step": 1}))
            raise failure
        if attempt.kind in ("sft", "reward", "dpo", "rlhf"):
            self.steps[name.partition(" ")[0]].append(train(directory, attempt, self.faults))
        finish(directory, attempt)


def train(directory: Path, attempt: ledger.Attempt, faults: set[str]) -> list[int]:
    """Take the steps that are left, and save after each as the config says."""
    metrics = directory / "metrics.jsonl"
    last = None if "begins anew" in faults else last_complete(directory / "checkpoints")
    done = metrics.read_text().splitlines()[: last.step] if last else []
    steps = list(range(1 + (last.step if last else 0), 1 + (attempt.config["max_steps"] or 3)))
    for step in steps:
        done.append(json.dumps({"step": step, "loss": 1 / step, "step_time_s": time.monotonic()}))
        path = directory / "checkpoints" / f"checkpoint-{step}"
        if step % attempt.config["save_steps"] == 0 and "saves nothing" not in faults and not path.exists():
            path.mkdir(parents=True)
            mark_complete(path, step, 1)
    metrics.write_text("".join(f"{line}\n" for line in done))
    (directory / "prepared.json").write_text(json.dumps({"path": "", "longest_tokens": 61}))
    (directory / "layout.json").write_text(json.dumps({"micro_batch_tokens": 2048, "recompute": False}))
    (attempt.logs(directory) / "rank_0.beat").write_text(json.dumps({"phase": "ended", "step": 0}))
    return steps


@pytest.fixture
def project(tmp_path: Path, posttrain: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> Project:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "chat.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    (tmp_path / "prefs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "pipeline.yaml").write_text(PIPELINE.replace("HERE", str(tmp_path)))
    found = Project(tmp_path, posttrain)
    launch_with(monkeypatch, found.launch)
    return found


def tries(*names: str) -> list[str]:
    return [f"({name})" for name in names for _ in range(2)]


# --- when --------------------------------------------------------------------------------------------------------------------


def test_a_chain_is_tried_as_a_whole_before_anything_of_it_is_built(project: Project) -> None:
    assert project.smokes() == {**dict.fromkeys(TRAINS, "due"), "both": None, "eval": None}
    assert project.done("run") == [*tries(*TRAINS), "sft", "reward", "dpo", "both", "rlhf", "eval"]
    assert project.steps == {**{f"({name})": [[1, 2], [2]] for name in TRAINS}, **{name: [[1, 2, 3]] for name in TRAINS}}
    assert {name: said for name, said in project.smokes().items() if said} == dict.fromkeys(
        TRAINS, "passed: 64 samples a step, of up to 61 tokens, computed 2,048 at once; resumed to other bytes, by rounding"
    )
    assert "passed" in project.ended("status").out
    assert [path.name for path in (project.root / "r").iterdir() if path.name.startswith(".")] == [], "nothing is left of it"


def test_what_is_being_tried_is_said(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def launch(directory: Path, attempt: ledger.Attempt) -> None:
        seen.append([name for name, said in project.smokes().items() if said == "running"])
        project.launch(directory, attempt)

    launch_with(monkeypatch, launch)
    project.done("smoke", "--until", "reward")
    assert seen == [["sft"], ["sft"], ["reward"], ["reward"]]


def test_a_stage_is_tried_on_what_was_made_by_trying_those_above_and_not_on_held_out_rows(project: Project) -> None:
    project.done("smoke")
    assert project.read == {
        "(sft)": ["base", "chat.jsonl"],
        "(reward)": ["runs/r/.smoke/sft/output", "prefs.jsonl"],
        "(dpo)": ["runs/r/.smoke/sft/output", "prefs.jsonl"],
        # Of a merge that is yet to be made, what it merges first.
        "(rlhf)": ["runs/r/.smoke/sft/output", "chat.jsonl", "runs/r/.smoke/reward/output"],
    }


def test_what_passed_is_not_tried_again_until_it_is_another_recipe_or_computed_otherwise(project: Project) -> None:
    zero = project.here / "zero.json"
    zero.write_text("{}")
    sharded = f"stages.dpo.deepspeed={zero}"
    assert project.done("smoke") == tries(*TRAINS)
    for same in ([], ["run=other"], ["stages.dpo.logging_steps=5"], ["stages.dpo.save_steps=7"]):
        assert project.done("smoke", *same) == []
    assert project.done("smoke", "--again", "--only", "sft") == tries("sft")
    assert project.done("smoke", "stages.dpo.micro_batch_tokens=99") == tries("dpo")
    assert project.read["(dpo)"] == ["base", "prefs.jsonl"], "the base has the same architecture, and nothing else is there"
    assert project.done("smoke", sharded) == tries("dpo")
    zero.write_text('{"zero_optimization": {"stage": 3}}')
    assert project.done("smoke", sharded) == tries("dpo")
    assert project.done("smoke", "launcher.num_processes=2") == tries(*TRAINS)
    assert project.done("run", "stages.sft.max_length=500", "--until", "sft", "--no-smoke") == ["sft"]


def test_a_plan_tells_of_what_passed_in_any_run_and_of_what_failed_in_its_own(project: Project) -> None:
    project.failures["(dpo) 1"] = ("train", StageFailed("stages.dpo: rank 0 was lost"))
    project.ended("smoke", "--until", "dpo")
    own, other = project.smokes(), project.smokes("run=other")
    assert [(own[name] or "").partition(":")[0] for name in TRAINS] == ["passed", "passed", "failed", "due"]
    assert [(other[name] or "").partition(":")[0] for name in TRAINS] == ["passed", "passed", "due", "due"]
    assert (other["sft"], other["reward"]) == (own["sft"], own["reward"])
    assert project.smokes("stages.sft.learning_rate=1e-3") == {**own, **dict.fromkeys(TRAINS, "due")}, "another recipe, and all above it"
    for choice in ("smoke=false", "smoke=[rlhf]"):
        told = project.smokes(choice)
        assert (told["sft"], told["dpo"], told["rlhf"]) == (own["sft"], own["dpo"], "due" if "rlhf" in choice else None)


def test_a_chat_template_that_a_stage_above_brings_goes_with_the_policy_that_stands_for_its_own(project: Project) -> None:
    (project.here / "t.jinja").write_text("{{ messages }}")
    template = f"stages.sft.chat_template={project.here}/t.jinja"
    project.done("smoke", template, "--only", "sft")
    config = project.here / "config"

    def launch(directory: Path, attempt: ledger.Attempt) -> None:
        config.write_text(str(attempt.config["chat_template"]))
        project.launch(directory, attempt)

    with pytest.MonkeyPatch.context() as patch:
        launch_with(patch, launch)
        project.done("smoke", template, "--only", "dpo")
    assert project.read["(dpo)"][0] == "base"
    assert config.read_text() == f"{project.here}/t.jinja"


def test_a_stage_whose_data_are_yet_to_be_made_is_tried_when_they_are(project: Project) -> None:
    config = project.here / "pipeline.yaml"
    config.write_text(config.read_text().replace("  sft: {inputs: {policy: base, data: chat}", CURATED))
    table = json.loads(project.ended("smoke", "--json").out)
    assert {row["stage"]: row["smoke"].partition(":")[0] for row in table} == {
        "sft": "not yet",
        "reward": "passed",  # on the base
        "dpo": "passed",
        "rlhf": "passed",
    }
    assert project.done("run", "--until", "sft") == ["picked", *tries("sft"), "sft"]


def test_a_reward_model_is_not_tried_again_for_a_stage_that_cannot_be_tried_yet(project: Project) -> None:
    config = project.here / "pipeline.yaml"
    sampled = "  drawn: {kind: curate, inputs: {data: chat}, steps: [normalize]}\n  rlhf: {inputs: {policy: both, data: drawn,"
    config.write_text(config.read_text().replace("  rlhf: {inputs: {policy: both, data: chat,", sampled))
    built = ["sft", "reward", "dpo", "both", "drawn", *tries("rlhf"), "rlhf"]
    assert project.done("run", "--until", "rlhf") == [*tries("sft", "reward", "dpo"), *built]


def test_by_default_only_what_others_train_for_long_is_tried(project: Project) -> None:
    config = project.here / "pipeline.yaml"
    config.write_text(config.read_text().replace("smoke: true\n", ""))
    others = ["launcher={kind: hosts, hosts: [a, b]}", "stages.both.launcher={hosts: [a]}"]
    assert set(project.smokes().values()) == set(project.smokes("launcher.num_processes=2").values()) == {None}
    assert [name for name, said in project.smokes(*others).items() if said == "due"] == TRAINS
    assert [name for name, said in project.smokes(*others, "stages.dpo.max_steps=10").items() if said == "due"] == ["sft", "reward", "rlhf"]
    assert [name for name, said in project.smokes("smoke=[dpo]").items() if said == "due"] == ["dpo"]
    assert project.done("run", "--until", "sft") == ["sft"]
    assert project.done("run", "--only", "dpo", "--smoke") == [*tries("dpo"), "dpo"]
    assert project.read["(dpo)"] == ["runs/r/sft/output", "prefs.jsonl"], "what is finished is what it reads"
    assert project.refused(2, "run", "smoke=[evla]") == "error: smoke: 'evla' is no stage; did you mean 'eval'?"
    assert project.refused(2, "run", "smoke=[eval]").startswith("error: smoke: 'eval' trains nothing, so there are no steps to try")
    assert "use submit --smoke: its jobs begin with that" in project.refused(2, "smoke", "launcher={kind: slurm}")


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_the_first_job_of_a_chain_tries_all_that_its_nodes_are_fit_for(
    kind: str, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = project.here
    stages = STAGES.replace("HERE", str(here)).replace("smoke: false\n", "").replace("beta: 0.03}", "beta: 0.03, launcher: {num_nodes: 1}}")
    (here / "pipeline.yaml").write_text(stages + LAUNCHERS[kind])
    stand_ins(here, monkeypatch)
    project.done("submit")
    for stage, launched in (("sft", [*tries("sft", "near"), "sft"]), ("near", ["near"]), ("far", [*tries("far"), "far"])):
        monkeypatch.setenv("SLURM_JOB_ID" if kind == "slurm" else "POSTTRAIN_JOB", jobs.read_jobs(project.root / "r")[stage].number)
        before = len(project.launched)
        ended = project.call("step", project.root / "r" / ".jobs" / stage / "pipeline.json", "--stage", stage, "--root", project.root)
        assert (ended.code, project.launched[before:]) == (0, launched), ended.err


def test_a_job_tries_none_but_what_was_submitted_with_it(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.here / "pipeline.yaml").write_text(STAGES.replace("HERE", str(project.here)) + LAUNCHERS["slurm"])
    stand_ins(project.here, monkeypatch)
    project.done("submit", "--smoke", "--only", "sft")
    monkeypatch.setenv("SLURM_JOB_ID", jobs.read_jobs(project.root / "r")["sft"].number)
    ended = project.call("step", project.root / "r" / ".jobs" / "sft" / "pipeline.json", "--stage", "sft", "--root", project.root)
    assert (ended.code, project.launched) == (0, [*tries("sft"), "sft"])


def test_every_pod_tries_what_the_first_one_does_and_then_builds(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run = project.root / "r"
    order = [run / ".smoke" / "sft", run / ".smoke" / "dpo", run / "sft"]
    (run / ".jobs" / "sft").mkdir(parents=True)
    for name, value in {"POSTTRAIN_JOB": "j", "POSTTRAIN_RESTART": "0", "JOB_COMPLETION_INDEX": "1"}.items():
        monkeypatch.setenv(name, value)
    met: dict[Path, threading.Barrier] = defaultdict(lambda: threading.Barrier(2))
    pod: list[Path] = []

    def ranks(launcher: Any, directory: Path, attempt: ledger.Attempt, *_: object, **__: object) -> None:
        met[directory].wait(timeout=20)  # as ranks wait for one another
        if threading.current_thread() is threading.main_thread():
            finish(directory, attempt)
        else:
            pod.append(directory)

    monkeypatch.setattr(kubernetes, "_run_ranks", ranks)
    monkeypatch.setattr(kubernetes, "LOOK_EVERY_S", 0.01)
    launcher = KubernetesLauncher(image="i", volumes={"/": "all"}, num_nodes=2)
    other = threading.Thread(target=kubernetes.join, args=(launcher, run / "sft"), daemon=True)
    other.start()
    stage = load_stage("sft", "")
    recipe: dict[str, Any] = {"run": "r", "root": project.root, "fingerprint": "f", "identity": {}, "config": SFTConfig(), "inputs": {}}
    with kubernetes.kubernetes_launcher(launcher, Console()) as launch:
        for directory in order:
            launch(directory, ledger.start_attempt(directory, stage=stage, name=directory.name, num_processes=2, **recipe))
    other.join(timeout=20)
    assert not other.is_alive() and pod == order


# --- what fails --------------------------------------------------------------------------------------------------------------


def test_out_of_memory_is_one_line_that_says_where_and_what_to_change(project: Project) -> None:
    project.failures["(dpo) 1"] = ("train", StageFailed(f"stages.dpo: {OUT_OF_MEMORY}; it was at train, sample 7"))
    line = project.refused(2, "run")
    assert line == (
        "error: stages.dpo: out of memory when its smoke trained; set stages.dpo.gradient_checkpointing: true, or shard it with "
        "stages.dpo.deepspeed: ds_configs/zero3_offload.json, or train adapters, stages.dpo.lora: {r: 16}, or lower stages.dpo.max_length "
        f"(2,048 now) ({OUT_OF_MEMORY}; it was at train, sample 7)"
    )
    assert project.launched == [*tries("sft", "reward"), "(dpo)"], "nothing is built"
    assert project.smokes()["dpo"] == f"failed: {line.removeprefix('error: ')}"
    assert "failed: stages.dpo: out of memory" in project.ended("status").out
    left = [str(path.relative_to(project.root / "r" / ".smoke")) for path in (project.root / "r" / ".smoke").glob("*/*")]
    assert sorted(left) == ["dpo/logs", "reward/logs", "sft/logs"], "what tells why, and nothing large"
    project.done("run", "--until", "sft", "--no-smoke")
    assert "what a smoke that failed left" in project.ended("clean", "--dry-run").out
    project.failures.clear()
    # The policy of rlhf may be any of its architecture; a reward model has to be one.
    assert project.done("smoke", "stages.dpo.gradient_checkpointing=true") == tries("reward", "dpo", "rlhf")
    assert not (project.root / "r" / ".smoke").exists()


def test_where_more_is_computed_at_once_than_the_longest_sample_that_comes_first(project: Project) -> None:
    settings = ["stages.sft.gradient_checkpointing=true", "stages.sft.lora={}", f"stages.sft.deepspeed={project.here}/none.json"]
    project.failures["(sft) 2"] = ("train", StageFailed("stages.sft: rank 1 ended (killed by SIGKILL); out of memory is the usual reason"))
    assert project.refused(2, "smoke", *settings).startswith(
        "error: stages.sft: out of memory when its smoke trained, resumed from the state after step 1; "
        "lower stages.sft.micro_batch_tokens (2,048 now), or lower stages.sft.max_length (512 now) (rank 1 ended"
    )
    project.failures["(sft) 2"] = ("verify", StageFailed("stages.sft: rank 0: RuntimeError: DefaultCPUAllocator: can't allocate memory"))
    where = "out of memory when its smoke reloaded what it had published, resumed from the state after step 1; beside its part of the model"
    assert where in project.refused(2, "smoke", *settings)


def test_a_crash_and_a_mistake_of_the_user_keep_their_exit_codes(project: Project) -> None:
    project.failures["(sft) 1"] = ("save", StageFailed("stages.sft: rank 0: OSError: input/output error; its log is L"))
    said = "failed: stages.sft: its smoke failed when it saved its state: rank 0: OSError: input/output error; its log is L"
    assert project.refused(1, "smoke") == said
    project.failures["(sft) 1"] = ("prepare data", UserError("chat.jsonl:1: is no conversation; mend it"))
    found = "(found by the smoke of stages.sft when it prepared its data)"
    assert project.refused(2, "smoke") == f"error: chat.jsonl:1: is no conversation; mend it {found}"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("saves nothing", "when it was to be resumed: the state after step 1 is not there, or not whole"),
        ("begins anew", "when it was to be resumed: the state that it had saved after step 1 was not gone on from"),
    ],
)
def test_a_state_that_cannot_be_gone_on_from_is_a_failure(fault: str, said: str, project: Project) -> None:
    project.faults.add(fault)
    assert said in project.refused(1, "smoke")


# --- on what -----------------------------------------------------------------------------------------------------------------


def test_every_step_takes_the_same_samples_and_deals_the_longest_out_first() -> None:
    lengths = np.array([9, 7, 5, 3, 1])
    for size, expected in ((3, [0, 1, 2]), (7, [0, 1, 2, 3, 4, 0, 1])):
        sizes = Sizes(lengths, lengths, np.ones_like(lengths))
        batches = GlobalBatches(sizes, num_steps=2, global_batch_size=size, micro_batch_tokens=9, seed=None, rank=0, world_size=1)
        assert batches.samples(0).tolist() == batches.samples(1).tolist() == expected
        assert batches.deal(1)[0][0] == [0]


def test_the_longest_samples_are_those_of_all_rows_once_these_are_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "Hi", "completion": "ab " * (1 + 37 * number % 90)} for number in range(90)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = Input("chat", "dataset", "f", DataSource(data=str(tmp_path / "chat.jsonl")))
    encoder = encoder_of(conversation_encoder)
    directory = tmp_path / "run" / "sft"
    directory.mkdir(parents=True)
    real = StageContext("sft", SFTConfig(global_batch_size=3), {}, directory, tmp_path)
    tried = replace(real, is_smoke=True)

    def lengths(context: StageContext[Any]) -> list[int]:
        found = prepare(context, given, encoder)
        assert (found.num_rows, found.num_tokens) == (len(found.samples), found.column("length").sum())
        return found.column("length").tolist()

    every = lengths(replace(real, root=tmp_path / "elsewhere"))
    longest = sorted(every, reverse=True)
    assert len(set(every)) == 90
    monkeypatch.setattr(prepared, "ROWS_LOOKED_AT", 20)
    assert lengths(tried) == sorted(every[:20], reverse=True)
    assert lengths(real) == every, "what was looked at for a smoke is not what is trained on"
    assert lengths(tried) == longest[:64], "at least so many, though a step takes three"
    monkeypatch.undo()
    elsewhere = replace(tried, root=tmp_path / "few")
    assert lengths(elsewhere) == longest[:64], "few rows are all looked at"
    made = {path.name for path in (elsewhere.root / ".prepared").iterdir()}
    assert lengths(replace(elsewhere, is_smoke=False)) == every
    assert made == {path.name for path in (elsewhere.root / ".prepared").iterdir()}, "and need not be prepared again"
    assert lengths(replace(tried, config=SFTConfig(global_batch_size=80))) == longest[:80]
    assert json.loads((directory / "prepared.json").read_text())["longest_tokens"] == longest[0]


def test_a_real_chain_is_tried_and_a_real_fault_found(pipeline_file: Path, tmp_path: Path, posttrain: Callable[..., Ended]) -> None:
    root = tmp_path / "runs"
    ended = posttrain("smoke", pipeline_file, "--root", root)
    assert ended.code == 0, ended.err
    for name in ("sft", "dpo"):
        assert [path.name for path in (root / "test" / name).iterdir()] == ["smoke.json"], "no stage was built"
        said = json.loads((root / "test" / name / "smoke.json").read_text())["payload"]["said"]
        assert said.startswith("8 samples a step, of up to ") and said.endswith("resumed to the same bytes")
    assert not (root / "test" / ".smoke").exists()
    diverging = ["stages.dpo.learning_rate=1e30", "stages.dpo.warmup_steps=0", "stages.dpo.max_grad_norm=0"]
    again = posttrain("run", pipeline_file, "--root", root, "--smoke", *diverging)
    assert again.code == 2
    assert "sft  smoke" not in again.out, "it has passed"
    assert "stages.dpo: " in again.err and "is nan" in again.err and "(found by the smoke of stages.dpo when it trained" in again.err
    assert not (root / "test" / "sft" / "output").exists(), "nothing was built before it was known"
