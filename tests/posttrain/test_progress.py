"""What a stage is at can be read from its files, by anyone, at any moment."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from posttrain import disk, progress
from posttrain.error import Preempted
from posttrain.launch.local import heed_deadline, reserve_s
from posttrain.progress import Progress, Watcher, describe
from posttrain.recipe import KeepPolicy
from posttrain.saver import Saver


def state(directory: Path) -> dict[str, object]:
    read = disk.read_json(directory / "progress.json")
    assert isinstance(read, dict)
    return read


def test_the_first_and_the_last_step_of_a_phase_are_always_written(tmp_path: Path) -> None:
    writing = Progress(tmp_path, is_main=True)
    writing.phase("train", num_steps=100)
    assert (state(tmp_path)["phase"], state(tmp_path)["step"]) == ("train", 0)
    for step in range(1, 101):
        writing.step(step, loss=1.0 / step)
    assert (state(tmp_path)["step"], state(tmp_path)["loss"]) == (100, 0.01)


def test_steps_are_not_written_faster_than_anyone_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[object] = []
    monkeypatch.setattr(disk, "write_json", lambda path, value: writes.append(value))
    writing = Progress(tmp_path, is_main=True)
    writing.phase("train", num_steps=10_000)
    for step in range(1, 1000):
        writing.step(step)
    assert len(writes) < 5


def test_the_time_left_counts_from_where_a_resumed_phase_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("posttrain.progress.time.monotonic", lambda: clock[0])
    writing = Progress(tmp_path, is_main=True)
    writing.phase("train", num_steps=100, step=80)
    clock[0] = 10.0
    writing.step(90)
    assert state(tmp_path)["eta_s"] == pytest.approx(10.0)


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    writing = Progress(tmp_path, is_main=False)
    writing.phase("train", num_steps=1)
    writing.step(1)
    writing.metrics(1, {"loss": 1.0})
    writing.rewind(0)
    assert list(tmp_path.iterdir()) == []


def test_rewinding_drops_what_a_resumed_run_writes_again_and_a_line_that_was_cut_off(tmp_path: Path) -> None:
    writing = Progress(tmp_path, is_main=True)
    writing.rewind(0)  # nothing there yet
    for step in (1, 2, 3):
        writing.metrics(step, {"loss": 1.0 / step})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    writing.rewind(2)
    writing.metrics(3, {"loss": 0.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.5},
    ]


def test_a_state_is_described_in_one_line() -> None:
    assert describe({"phase": "load model", "step": 0, "num_steps": 0}) == "load model"
    full = {"phase": "train", "step": 12, "num_steps": 40, "eta_s": 125.0, "loss": 1.23456, "tokens_per_s": 12345.6}
    assert describe(full) == "train  12/40  loss 1.2346  12,346 tokens/s  2:05 left"
    assert describe({**full, "step": 40}) == "train  40/40  loss 1.2346  12,346 tokens/s"


def test_without_a_terminal_a_line_is_printed_for_each_phase_and_then_now_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    writing = Progress(tmp_path, is_main=True)
    monkeypatch.setattr(progress, "WRITE_EVERY_S", -1.0)
    with Watcher(tmp_path, "sft", Console(file=out, width=200)) as watcher:
        watcher.show()
        writing.phase("train", num_steps=4)
        for step in (1, 2, 3):
            writing.step(step)
            watcher.show()
        monkeypatch.setattr(progress, "PLAIN_LINE_EVERY_S", 0.0)
        watcher.show()
        writing.phase("publish")
        watcher.show()
        (tmp_path / "progress.json").write_text("{")
        watcher.show()
    lines = [line.split("  0:0")[0].strip() for line in out.getvalue().splitlines()]
    assert lines == ["sft: train  1/4", "sft: train  3/4", "sft: publish"]


@pytest.mark.parametrize(("num_parameters", "reserved"), [(1_000_000, 12.86), (100_000_000, 48.5), (70_000_000_000, 50.0)])
def test_of_a_time_limit_is_kept_what_a_first_save_may_take(tmp_path: Path, num_parameters: int, reserved: float) -> None:
    context: Any = None  # it is not asked before there is something to save
    saver = Saver(context, KeepPolicy(), {}, first_bytes=12 * num_parameters)
    watcher = Watcher(tmp_path, "sft", Console(file=io.StringIO()))
    writing = Progress(tmp_path, is_main=True)
    kept = []
    for phase in ("load model", "train", "publish"):
        writing.phase(phase, num_steps=1)
        watcher.show()
        kept.append(reserve_s(watcher))
        if phase == "train":
            writing.step(1, save_s=saver.takes_s)
            watcher.show()
            kept.append(reserve_s(watcher))
    assert kept == pytest.approx([5.0, 5.0, reserved, 5.0])


def test_a_time_limit_too_short_for_a_step_says_so(tmp_path: Path) -> None:
    watcher = Watcher(tmp_path, "sft", Console(file=io.StringIO()))
    writing = Progress(tmp_path, is_main=True)
    said = []
    for began, step in (("load model", 0), ("train", 0), ("train", 1)):
        writing.phase(began, 1)
        if step:
            writing.step(step, save_s=0.1)
        watcher.show()
        with pytest.raises(Preempted) as stopped:
            heed_deadline("sft", watcher, time.monotonic())
        said.append("longer" in str(stopped.value))
        heed_deadline("sft", watcher, time.monotonic() + 60.0)
    assert said == [False, True, False]
