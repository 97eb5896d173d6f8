"""Trackers are told what is logged, under names by which a stage is found again, and change nothing else."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TensorBoardCallback

from posttrain.checkpoint import Checkpoint
from posttrain.fit import _open_event_files
from tests.conftest import Ended, read_lines

Cli = Callable[..., Ended]


def read_events(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory)).Reload()


def scalars(events: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_has_the_figures_of_the_log(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    ended = posttrain("run", pipeline_file, "--root", tmp_path / "runs", "--until", "sft", "stages.sft.report_to=[tensorboard]")
    assert ended.code == 0, ended.err
    stage = tmp_path / "runs" / "test" / "sft"
    logged = read_lines(stage / "metrics.jsonl")
    events = read_events(stage / "tensorboard")
    assert len(logged) == 6
    for name in ("loss", "grad_norm", "learning_rate"):
        assert scalars(events, f"train/{name}") == [(line["step"], float(np.float32(line[name]))) for line in logged]
    settings = json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])
    assert (settings["run_name"], settings["project"]) == ("test/sft", "posttrain")
    assert not (stage / "checkpoints").exists()


def test_a_tracker_is_no_part_of_what_is_built(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> None:
    def fingerprint(*overrides: str) -> str:
        ended = posttrain("plan", pipeline_file, "--root", tmp_path / "runs", "--json", "--only", "sft", *overrides)
        assert ended.code == 0, ended.err
        return str(json.loads(ended.out)[0]["fingerprint"])

    assert fingerprint() == fingerprint("stages.sft.report_to=[tensorboard]") == fingerprint("stages.sft.report_to=[]")


def test_steps_that_a_resumed_stage_trains_again_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    context: Any = SimpleNamespace(directory=tmp_path / "r" / "sft", name="sft", is_main=True)
    arguments: Any = SimpleNamespace(to_json_string=lambda: "{}")
    for last, steps in ((None, range(1, 6)), (Checkpoint(tmp_path, 3, 1, {}, {}, {}), range(4, 8))):
        callback = TensorBoardCallback()
        _open_event_files(SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[callback])), context, last)
        callback.on_train_begin(arguments, SimpleNamespace(is_world_process_zero=True, is_hyper_param_search=False), None)
        for step in steps:
            loss = step + (0.5 if last else 0.0)
            callback.on_log(arguments, SimpleNamespace(is_world_process_zero=True, global_step=step), None, logs={"loss": loss})
        callback.on_train_end(arguments, None, None)
    told = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5), (7, 7.5)]
    assert scalars(read_events(context.directory / "tensorboard"), "train/loss") == told


def test_event_files_go_below_the_directory_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    context: Any = SimpleNamespace(directory=tmp_path / "r" / "sft", name="sft", is_main=True)
    callback = TensorBoardCallback()
    _open_event_files(SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[callback])), context, None)
    assert callback.logging_dir == str(tmp_path / "elsewhere" / "r" / "sft")


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_runs(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, tracker: str
) -> None:
    if find_spec(tracker):
        pytest.skip(f"{tracker} is installed here")
    ended = posttrain("plan", pipeline_file, "--root", tmp_path / "runs", f"stages.sft.report_to=[tensorboard, {tracker}]")
    assert (ended.code, ended.err) == (2, f"error: stages.sft.report_to: {tracker} is not installed; run: pip install {tracker}\n")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.sft.report_to=tensorboard", "stages.sft.report_to: input should be a valid list, got 'tensorboard'"),
        ("stages.sft.report_to=[wandbb]", "stages.sft.report_to.0: input should be 'tensorboard', 'wandb', 'mlflow' or 'trackio'"),
        ("stages.eval.report_to=[tensorboard]", "stages.eval.report_to: unknown key"),
    ],
)
def test_what_is_no_tracker_is_one_line(posttrain: Cli, pipeline_file: Path, tmp_path: Path, override: str, message: str) -> None:
    ended = posttrain("plan", pipeline_file, "--root", tmp_path / "runs", override)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert message in ended.err


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("report_to: tensorboard", "stages.sft.trainer.report_to: is a field of the stage; set stages.sft.report_to instead"),
        ("run_name: mine", "stages.sft.trainer.run_name: is set by the pipeline; trackers know a stage as RUN/STAGE"),
    ],
)
def test_the_trainer_is_not_told_of_trackers_behind_the_stage(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, field: str, message: str
) -> None:
    ended = posttrain("run", pipeline_file, "--root", tmp_path / "runs", "--until", "sft", f"stages.sft.trainer={{{field}}}")
    assert ended.code == 2
    assert message in ended.err
