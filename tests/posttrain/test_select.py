"""What is measured on held-out rows while a stage trains, that it disturbs nothing, and that the best step is what is published."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import heldout
from posttrain.checkpoint import MARKER, directory_of, list_complete, mark_complete, prune, weights_of
from posttrain.config import DataSource, ModelSource
from posttrain.error import Preempted
from posttrain.recipe import KeepPolicy
from posttrain.selection import choose
from posttrain.stage import Input, StageContext, load_stage
from tests.conftest import Ended, read_lines, write_chat, write_pairs

Cli = Callable[..., Ended]
LEARNS = {"learning_rate": 2e-2, "lr_scheduler_type": "constant", "warmup_steps": 0, "global_batch_size": 8, "max_length": 128}


@pytest.fixture(scope="module")
def held_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations whose answers become ever less likely the better the others are learned."""
    path = tmp_path_factory.mktemp("held") / "held.jsonl"
    rows = [{"prompt": f"what is the colour of fish {number}?", "completion": "#@%&ZQXJ~^" * (2 + number % 3)} for number in range(11)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- which step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "best", "step"),
    [
        ([3.0, 1.0, 2.0], "low", 20),
        ([3.0, 1.0, 2.0], "high", 10),
        ([2.0, 1.0, 1.0], "low", 20),
        ([math.nan, 1.0, -math.inf], "low", 20),
        ([math.nan, 1.0, math.inf], "high", 20),
    ],
)
def test_the_best_is_the_first_of_the_lowest_or_of_the_highest_numbers(values: list[float], best: Any, step: int) -> None:
    measured = [{"step": 10 * place, "nll": value} for place, value in enumerate(values, start=1)]
    found = choose(measured, "heldout/nll", best)
    assert found is not None and (found.step, found.value) == (step, values[step // 10 - 1])
    assert [each for each, _ in found.measured] == [10, 20, 30]


def test_where_nothing_is_a_number_there_is_no_best() -> None:
    assert choose([{"step": 1, "nll": math.nan}, {"step": 2}], "heldout/nll", "low") is None


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"select": "best by heldout/nll"},
            "select: with one measurement, after the last step, there is nothing to choose from; set eval_steps",
        ),
        ({"select": "best by loss"}, "select: 'loss' is not measured on held-out rows; known: heldout/nll, heldout/loss, "),
        ({"select": "last"}, "select: 'last' is no rule; write `best by METRIC`, with one of heldout/nll, "),
        ({"select": "best by heldout/nll", "eval_steps": 2}, "select: nothing is held out to measure on; wire a data set to "),
        ({"eval_steps": 2}, "eval_steps: nothing is held out to measure on; wire a data set to stages.sft.inputs.heldout"),
        ({"eval_steps": 0}, "eval_steps: input should be greater than or equal to 1"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused_in_one_line(posttrain: Cli, pipeline_file: Path, fields: dict[str, Any], problem: str) -> None:
    ended = posttrain("plan", pipeline_file, *(f"stages.sft.{name}={value}" for name, value in fields.items()))
    assert ended.code == 2
    assert f"stages.sft.{problem}" in ended.err and ended.err.count("\n") == 1


def test_the_names_that_transformers_has_for_it_are_pointed_elsewhere(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> None:
    ended = posttrain("run", pipeline_file, "--root", tmp_path, "stages.sft.trainer={load_best_model_at_end: true}")
    assert ended.code == 2
    assert "stages.sft.trainer.load_best_model_at_end: is set by the pipeline; set select on the stage itself" in ended.err


# --- what is measured ------------------------------------------------------------------------------------------------


def open_stage(kind: str, tiny: Path, data: Path, held: Path, directory: Path, **settings: Any) -> StageContext[Any]:
    """A stage that is prepared, to be run right here."""
    directory.mkdir(parents=True)
    stage = load_stage(kind, kind)
    inputs = {
        "policy": (Input("base", "policy", "", ModelSource(model=str(tiny))),),
        "data": (Input("rows", "dataset", "", DataSource(data=str(data))),),
        "heldout": (Input("held", "dataset", "", DataSource(data=str(held))),),
    }
    context: StageContext[Any] = StageContext(kind, stage.config(**{**LEARNS, **settings}), inputs, directory, directory.parent)
    assert stage.prepare is not None
    stage.prepare(context)
    return context


@pytest.fixture
def nondeterministic_afterwards() -> Iterator[None]:
    """A stage that is run in this process leaves a switch of torch behind."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nondeterministic_afterwards")
@pytest.mark.parametrize(
    ("kind", "settings", "same"),
    [
        ("sft", {}, {"nll": "loss"}),
        ("dpo", {}, {}),
        ("dpo", {"loss_type": ["aot"]}, {}),
        ("orpo", {}, {}),
        ("kto", {}, {}),
        ("reward", {"margin": 0.5}, {"mean_margin": "margin"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(value.get("loss_type", [])) if isinstance(value, dict) else "",
)
def test_it_is_what_training_would_log_of_these_rows(
    kind: str, settings: dict[str, Any], same: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    """With all rows in each step, training logs in step 2 what the policy after step 1 says of them."""
    data = write_chat(tmp_path / "rows.jsonl", 24) if kind == "sft" else write_pairs(tmp_path / "rows.jsonl", 12)
    whole = {
        "global_batch_size": 12 if kind in ("dpo", "orpo", "reward") else 24,
        "max_steps": 2,
        "eval_steps": 1,
        "micro_batch_tokens": 150,
    }
    context = open_stage(kind, tiny, data, data, tmp_path / kind, **{**settings, **whole, "learning_rate": 1e-3})
    published = load_stage(kind, kind).run(context)
    first, last = read_lines(context.directory / "heldout.jsonl")
    _, logged = read_lines(context.directory / "metrics.jsonl")
    compared = {name: logged[same.get(name, name)] for name in first if same.get(name, name) in logged and name != "step"}
    assert "loss" in compared and len(compared) > 1
    for name, expected in compared.items():
        assert first[name] == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    assert first["loss"] != last["loss"], "it learns"
    assert published["heldout/loss"] == logged["heldout/loss"] == last["loss"], "the last step is published"
    assert "warning" in json.loads((context.directory / "preflight.json").read_text())["summary"][-1], "they are what it trains on"


def pipeline(path: Path, tiny: Path, chat: Path, held: Path) -> Path:
    """One stage that is measured as it trains, one that is not, and an evaluation of the first."""
    settings = {**LEARNS, "max_steps": 10, "micro_batch_tokens": 200}
    path.write_text(
        f"""
run: test
sources: {{base: {{model: {tiny}}}, chat: {{data: {chat}}}, held: {{data: {held}}}}}
stages:
  chosen: {json.dumps({"kind": "sft", **settings, "eval_steps": 2, "select": "best by heldout/nll"})[:-1]}, "inputs":
    {{policy: base, data: chat, heldout: held}}}}
  plain: {json.dumps({"kind": "sft", **settings})[:-1]}, "inputs": {{policy: base, data: chat}}}}
  eval: {{inputs: {{policies: [base, chosen, plain], data: held}}, max_new_tokens: 2}}
"""
    )
    return path


WAYS = {
    "plain": (),
    "adapters with dropout": ("lora={r: 4, lora_dropout: 0.2}",),
    "zero3": ("num_processes=2", "deepspeed=ds_configs/zero3.json"),
}


@pytest.mark.parametrize("way", WAYS)
def test_training_is_what_it_is_without_and_the_best_step_is_published(
    way: str, posttrain: Cli, tiny: Path, chat_file: Path, held_file: Path, tmp_path: Path
) -> None:
    file = pipeline(tmp_path / "pipeline.yaml", tiny, chat_file, held_file)
    overrides = [f"stages.{stage}.{each}" for stage in ("chosen", "plain") for each in WAYS[way]]
    if way == "plain":
        overrides.append("stages.chosen.report_to=[tensorboard]")
    ended = posttrain("run", file, "--root", tmp_path, *overrides)
    assert ended.code == 0, ended.err
    run = tmp_path / "test"
    logged, plain = (read_lines(run / stage / "metrics.jsonl") for stage in ("chosen", "plain"))
    for name in ("loss", "grad_norm", "learning_rate", "mean_token_accuracy"):
        assert [line[name] for line in logged] == [line[name] for line in plain], "not a bit is other than without held-out rows"
    values = {line["step"]: line["heldout/nll"] for line in logged if "heldout/nll" in line}
    assert list(values) == [2, 4, 6, 8, 10]
    best = min(values, key=lambda step: values[step])
    assert best < 10, "else the last step would do"
    payload = json.loads((run / "chosen" / "artifact.json").read_text())["payload"]
    assert (payload["metrics"]["selected_step"], payload["metrics"]["heldout/nll"]) == (best, values[best])
    assert payload["provenance"]["selection"]["measured"] == [[step, value] for step, value in values.items()]
    measured = json.loads((run / "eval" / "artifact.json").read_text())["payload"]["metrics"]
    assert measured["chosen.nll"] == pytest.approx(values[best], rel=1e-3), "its weights are those of that step"
    assert measured["plain.nll"] == pytest.approx(values[10], rel=1e-3), "and those of the last step are worse"
    assert measured["plain.nll"] > 1.01 * measured["chosen.nll"]
    if way == "plain":
        shows_what_was_chosen(posttrain, file, run, best, values, overrides)


def shows_what_was_chosen(posttrain: Cli, file: Path, run: Path, best: int, values: dict[int, float], overrides: list[str]) -> None:
    """The log, `status`, the report and a tracker tell which step it is, and what others there were."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = f"step {best}, heldout/nll {values[best]:.4g}, lowest of 5 ("
    others = [f"{step}: {value:.4g}" for step, value in values.items() if step != best]
    log = (run / "chosen" / "logs" / "attempt_1" / "rank_0.log").read_text()
    status = posttrain("status", file, "--root", run.parent, *overrides)
    assert all(text in log and text in status.out for text in (words, *others))
    assert posttrain("report", file, "--root", run.parent, *overrides).code == 0
    page = (run / "report.html").read_text()
    assert f"Step {best} is published: its heldout/nll is the lowest" in page
    assert all(f"{value:.4g}" in page for value in values.values())
    events = EventAccumulator(str(run / "chosen" / "tensorboard")).Reload()
    told = {event.step: event.value for event in events.Scalars("train/heldout/nll")}
    assert told == pytest.approx(values, rel=1e-6)


# --- cut off, and damaged --------------------------------------------------------------------------------------------

CHOSEN = {"max_steps": 24, "save_steps": 5, "eval_steps": 3, "select": "best by heldout/nll", "lora": {"r": 4, "lora_dropout": 0.2}}


def left(context: StageContext[Any]) -> list[Any]:
    """What a run publishes, and what it says of how it got there."""
    logged = [
        {name: value for name, value in line.items() if not name.endswith(("_per_s", "_time_s"))}
        for line in read_lines(context.directory / "metrics.jsonl")
    ]
    files = [context.output / "model.safetensors", *(context.directory / name for name in ("selected.json", "heldout.jsonl"))]
    return [logged, *(file.read_bytes() for file in files)]


def stop_after(context: StageContext[Any], step: int) -> None:
    """Ask this process for an end once that step is logged."""
    logged = context.directory / "metrics.jsonl"
    while not logged.is_file() or len(logged.read_text().splitlines()) < step:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("nondeterministic_afterwards")
def test_a_run_that_is_cut_off_publishes_the_very_same_step(
    tiny: Path, chat_file: Path, held_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, cut = (open_stage("sft", tiny, chat_file, held_file, tmp_path / name / "sft", **CHOSEN) for name in ("whole", "cut"))
    run = load_stage("sft", "sft").run
    run(whole)
    best = json.loads((whole.directory / "selected.json").read_text())["step"]
    assert best < 12, "long before the end"
    # By a signal, beyond the best step.
    watcher = threading.Thread(target=stop_after, args=(cut, best + 2), daemon=True)
    watcher.start()
    with pytest.raises(Preempted):
        run(cut)
    watcher.join()
    newest = list_complete(cut.checkpoints)[0]
    assert best < newest.step < 24 and newest.weights == best
    assert weights_of(cut.checkpoints, best).is_dir()
    size = {
        path: sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (newest.path, weights_of(cut.checkpoints, best))
    }
    assert size[weights_of(cut.checkpoints, best)] < 0.5 * size[newest.path], "weights alone, and not the optimizer's state"
    # By a signal in the midst of a measurement.
    measure, due = heldout.Heldout.measure, -(-(newest.step + 1) // 3) * 3

    def asked_to_end(self: heldout.Heldout) -> dict[str, float]:
        self.trainer.signalled = self.trainer.state.global_step >= due
        return measure(self)

    with monkeypatch.context() as patched:
        patched.setattr(heldout.Heldout, "measure", asked_to_end)
        with pytest.raises(Preempted):
            run(cut)
    assert list_complete(cut.checkpoints)[0].step == due
    assert read_lines(cut.directory / "heldout.jsonl")[-1]["step"] < due
    run(cut)
    assert left(cut) == left(whole)
    # While it was published, and what it would publish is damaged: nothing is taken for it.
    (weights,) = weights_of(cut.checkpoints, best).glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    capfd.readouterr()
    run(cut)
    assert f"it needs the weights of step {best}, which are not whole" in capfd.readouterr().out
    assert left(cut) == left(whole)


def write_weights(checkpoints: Path, step: int) -> None:
    path = weights_of(checkpoints, step)
    path.mkdir(parents=True)
    (path / "rank_00000.safetensors").write_bytes(b"weights")
    mark_complete(path, step, 1)


def write_checkpoint(checkpoints: Path, step: int, weights: int | None) -> None:
    path = directory_of(checkpoints, step)
    path.mkdir(parents=True)
    (path / "rank_00000.safetensors").write_bytes(b"state")
    mark_complete(path, step, 1, weights=weights)


def test_weights_stay_as_long_as_a_checkpoint_that_is_kept_needs_them(tmp_path: Path) -> None:
    def kept() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    for step in (2, 4, 6):
        write_weights(tmp_path, step)
    write_checkpoint(tmp_path, 3, weights=2)
    prune(tmp_path, KeepPolicy(), last=6, weights=6)
    assert kept() == {"checkpoint-3", "weights-2", "weights-6"}, "a run that falls back to step 3 has 2 as its best"
    write_checkpoint(tmp_path, 7, weights=6)
    prune(tmp_path, KeepPolicy(), weights=6)
    assert kept() == {"checkpoint-3", "checkpoint-7", "weights-2", "weights-6"}
    write_checkpoint(tmp_path, 9, weights=None)
    (weights_of(tmp_path, 6) / MARKER).unlink()
    prune(tmp_path, KeepPolicy(), weights=None)
    assert kept() == {"checkpoint-7", "checkpoint-9"}, "nothing that was cut off stays"


def test_what_could_not_be_gone_on_from_does_not_push_out_what_is_saved_anew(tmp_path: Path) -> None:
    for step in (10, 80, 90):
        write_checkpoint(tmp_path, step, weights=None)
    prune(tmp_path, KeepPolicy(), last=10)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10"}
