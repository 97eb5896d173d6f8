"""A checkpoint counts only when it is whole."""

from pathlib import Path

import pytest

from posttrain.checkpoint import MARKER, last_complete, mark_complete


def checkpoint(directory: Path, step: int, *, whole: bool) -> Path:
    path = directory / f"checkpoint-{step}"
    (path / "shards").mkdir(parents=True)
    (path / "shards" / "optimizer.pt").write_bytes(b"state")
    if whole:
        mark_complete(path, step, world_size=2)
    return path


def test_the_last_whole_checkpoint_is_found_and_unmarked_ones_after_it_are_passed_over(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        checkpoint(tmp_path, step, whole=True)
    for step in (101, 2000):
        checkpoint(tmp_path, step, whole=False)
    found = last_complete(tmp_path)
    assert found is not None
    assert (found.path, found.step, found.world_size) == (tmp_path / "checkpoint-100", 100, 2)


def test_without_a_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert last_complete(tmp_path / "nowhere") is None
    checkpoint(tmp_path, 5, whole=False)
    assert last_complete(tmp_path) is None


@pytest.mark.parametrize("marker", [b"", b"{", b"5", b"[]", b"{}", b'{"step": 7}', b"\xff\xfe"])
def test_a_marker_that_cannot_be_read_marks_nothing(tmp_path: Path, marker: bytes) -> None:
    checkpoint(tmp_path, 5, whole=True)
    (checkpoint(tmp_path, 7, whole=False) / MARKER).write_bytes(marker)
    found = last_complete(tmp_path)
    assert found is not None
    assert found.step == 5


def test_the_step_is_what_the_marker_says_not_what_the_directory_is_called(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5, whole=True).rename(tmp_path / "checkpoint-old")
    checkpoint(tmp_path, 4, whole=True)
    found = last_complete(tmp_path)
    assert found is not None
    assert found.step == 5
