"""Which checkpoints count, and which are kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.checkpoint import MARKER, directory_of, faults, last_complete, list_complete, mark_complete, prune
from posttrain.recipe import KeepPolicy


def write(checkpoints: Path, step: int, *, size: int = 100, **metrics: float) -> Path:
    path = directory_of(checkpoints, step)
    path.mkdir(parents=True)
    (path / "rank_00000.safetensors").write_bytes(bytes(range(256))[:size])
    mark_complete(path, step, 1, metrics=metrics)
    return path


def steps(checkpoints: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in checkpoints.iterdir())


def test_the_newest_whole_one_counts_by_number_and_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write(tmp_path, step)
    assert [each.step for each in list_complete(tmp_path)] == [100, 10, 9]


def test_one_that_is_marked_again_by_a_later_attempt_stays_whole(tmp_path: Path) -> None:
    path = write(tmp_path, 0)
    for _ in range(2):
        mark_complete(path, 0, 1)
    assert last_complete(tmp_path) is not None
    assert not faults(path)


def cut_short(path: Path) -> None:
    (path / "rank_00000.safetensors").write_bytes(b"short")


def remove_file(path: Path) -> None:
    (path / "rank_00000.safetensors").unlink()


def remove_marker(path: Path) -> None:
    (path / MARKER).unlink()


def forge_step(path: Path) -> None:
    marker = path / MARKER
    marker.write_text(marker.read_text().replace('"step": 2', '"step": 7'))


def empty_marker(path: Path) -> None:
    (path / MARKER).write_text("")


@pytest.mark.parametrize("damage", [cut_short, remove_file, remove_marker, forge_step, empty_marker])
def test_one_that_is_damaged_is_passed_over(tmp_path: Path, damage: Any) -> None:
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    last = last_complete(tmp_path)
    assert last is not None and last.step == 1
    assert faults(directory_of(tmp_path, 2))
    assert not faults(directory_of(tmp_path, 1))


def test_a_flipped_bit_is_found_by_reading_all(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    file = path / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)
    assert faults(path) == ["rank_00000.safetensors does not have the hash that was recorded"]


def test_the_newest_are_kept_and_what_was_cut_off_goes(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    remove_marker(directory_of(tmp_path, 4))
    prune(tmp_path, KeepPolicy(save_total_limit=2))
    assert steps(tmp_path) == [2, 3]


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step, loss in ((1, 2.0), (2, 0.5), (3, 1.5), (4, 1.0), (5, 1.2)):
        write(tmp_path, step, loss=loss)
    prune(tmp_path, KeepPolicy(metric_for_best_model="loss"))
    assert steps(tmp_path) == [2, 4, 5]
    prune(tmp_path, KeepPolicy(metric_for_best_model="loss", greater_is_better=True))
    assert steps(tmp_path) == [4, 5]


def test_bytes_are_limited_but_the_newest_whole_one_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, size=100)
    prune(tmp_path, KeepPolicy(save_total_limit=3, max_bytes=250))
    assert steps(tmp_path) == [2, 3]
    prune(tmp_path, KeepPolicy(max_bytes=1))
    assert steps(tmp_path) == [3]


def test_without_a_whole_one_nothing_is_deleted(tmp_path: Path) -> None:
    remove_marker(write(tmp_path, 1))
    prune(tmp_path, KeepPolicy())
    assert steps(tmp_path) == [1]


def saved_steps(posttrain: Any, pipeline_file: Path, root: Path, *options: str) -> list[int]:
    """After which steps the stage sft saved, as its log tells."""
    ended = posttrain("run", pipeline_file, "--root", root, "--only", "sft", *options)
    assert ended.code == 0, ended.err
    log = (root / "test" / "sft" / "logs" / "attempt_1" / "rank_0.log").read_text()
    return [int(line.split()[3].rstrip(":")) for line in log.splitlines() if line.startswith("checkpoint of step")]


def test_it_is_saved_by_steps_by_the_clock_and_at_the_end(posttrain: Any, pipeline_file: Path, tmp_path: Path) -> None:
    assert saved_steps(posttrain, pipeline_file, tmp_path / "steps", "stages.sft.save_steps=4") == [4, 6]
    by_clock = ("stages.sft.save_minutes=1e-6", "stages.sft.save_steps=1000")
    assert saved_steps(posttrain, pipeline_file, tmp_path / "clock", *by_clock) == [1, 2, 3, 4, 5, 6]
    metrics = json.loads((tmp_path / "clock" / "test" / "sft" / "artifact.json").read_text())["payload"]["metrics"]
    weights = (tmp_path / "clock" / "test" / "sft" / "output" / "model.safetensors").stat().st_size
    assert metrics["checkpoint_bytes"] > 2.9 * weights, "weights and two moments"
    assert not (tmp_path / "clock" / "test" / "sft" / "checkpoints").exists()
