"""A reader sees all of a file or none of it, whatever fails when; and a full or read-only disk is one line for the user."""

import contextlib
import errno
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain import disk
from posttrain.error import UserError


def fail(code: int) -> Callable[..., None]:
    def failing(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return failing


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_value_is_read_as_it_was_written(tmp_path: Path) -> None:
    value = {"text": "héllo \u2028 日本", "number": 1e-5, "list": [None, True]}
    disk.write_json(tmp_path / "x.json", value)
    assert disk.read_json(tmp_path / "x.json") == value
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o644
    assert disk.read_json(tmp_path / "none.json") is None


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_failure_at_any_point_of_writing_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "x.json"
    disk.write_json(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(step, fail(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            disk.write_json(path, "new")
    assert disk.read_json(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_killed_while_it_writes_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    disk.write_json(path, "old")
    child = os.fork()
    if child == 0:
        os.replace = os.rename = lambda *_: os._exit(9)  # type: ignore[assignment]
        disk.write_json(path, "new" * 100_000)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert disk.read_json(path) == "old"


def test_a_directory_is_published_whole_and_never_over_another(tmp_path: Path) -> None:
    aside = tmp_path / "output.partial"
    (aside / "sub").mkdir(parents=True)
    (aside / "sub" / "file").write_text("content")
    (aside / "dangling").symlink_to("nowhere")
    disk.publish_directory(aside, tmp_path / "output")
    assert (tmp_path / "output" / "sub" / "file").read_text() == "content"
    assert not aside.exists()
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "file").touch()
    with pytest.raises(OSError, match="not empty"):
        disk.publish_directory(tmp_path / "again", tmp_path / "output")
    assert (tmp_path / "output" / "sub" / "file").read_text() == "content"


def test_what_is_moved_aside_is_numbered_and_kept(tmp_path: Path) -> None:
    old = tmp_path / ".old"
    for content in ("first", "second"):
        (tmp_path / "a").write_text(content)
        (tmp_path / "b").mkdir()
        disk.move_aside([tmp_path / "a", tmp_path / "b", tmp_path / "none"], old)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".old"]
    assert [(old / number / "a").read_text() for number in ("1", "2")] == ["first", "second"]


def test_numbers_go_on_after_the_highest_and_pass_over_other_names(tmp_path: Path) -> None:
    for name in ("2", "10", "notes"):
        (tmp_path / ".old" / name).mkdir(parents=True)
    (tmp_path / "a").touch()
    assert disk.move_aside([tmp_path / "a"], tmp_path / ".old") == tmp_path / ".old" / "11"


def test_moving_nothing_aside_makes_no_directory(tmp_path: Path) -> None:
    assert disk.move_aside([tmp_path / "none"], tmp_path / ".old") is None
    assert not (tmp_path / ".old").exists()


def test_a_linked_tree_is_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "sub" / "file").write_text("content")
    disk.link_tree(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "sub" / "file").samefile(tmp_path / "a" / "sub" / "file")


def test_a_tree_is_copied_where_links_are_not_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("content")
    monkeypatch.setattr("os.link", fail(errno.EXDEV))
    disk.link_tree(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "file").read_text() == "content"
    assert not (tmp_path / "b" / "file").samefile(tmp_path / "a" / "file")


@pytest.mark.parametrize("link", ["b", "sub/b", ".hidden", "sub"])
def test_a_symbolic_link_is_never_followed_out_of_a_tree(tmp_path: Path, link: str) -> None:
    tree = tmp_path / "a"
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_text("secret")
    (tree / link).parent.mkdir(parents=True)
    (tree / link).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=f"{tree / link}: is a symbolic link"):
        disk.link_tree(tree, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert disk.num_bytes(tree) < 1000 and list(disk.symlinks(tree)) == [tree / link]


def test_a_linked_tree_itself_is_no_tree(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="is a symbolic link"):
        disk.link_tree(tmp_path / "b", tmp_path / "c")


def test_a_sealed_record_is_read_as_it_was_written_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert disk.read_sealed(path) is None
    disk.write_sealed(path, {"a": [1, "ü"]})
    assert disk.read_sealed(path) == {"a": [1, "ü"]}
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            assert disk.read_sealed(path) == {"a": [1, "ü"]}, "a space, say, was changed, and nothing that it holds"
        except ValueError:
            continue


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"four"), "has 4 bytes, and was written with 5"),
        (lambda path: path.write_bytes(b"WHOLE"), "does not hold what was written to it"),
        (lambda path: (path.unlink(), path.mkdir()), "is no file"),
        (lambda path: (path.rename(path.with_name("b")), path.symlink_to("b")), "is a symbolic link"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, damage: Callable[[Path], Any], said: str) -> None:
    (tmp_path / "a").write_bytes(b"whole")
    recorded = disk.describe_files(tmp_path, [tmp_path / "a"])
    assert list(disk.file_faults(tmp_path, recorded, disk.hash_file)) == []
    damage(tmp_path / "a")
    (fault,) = disk.file_faults(tmp_path, recorded, disk.hash_file)
    assert fault.startswith(f"{tmp_path}/a {said}")


def test_without_reading_only_sizes_tell(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"whole")
    recorded = disk.describe_files(tmp_path, [tmp_path / "a"])
    (tmp_path / "a").write_bytes(b"WHOLE")
    assert list(disk.file_faults(tmp_path, recorded, None)) == []
    (tmp_path / "a").write_bytes(b"WHOLE!")
    assert len(list(disk.file_faults(tmp_path, recorded, None))) == 1


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_951, "1.0 MB"), (2 * 10**15, "2.0 PB")]
)
def test_bytes_are_written_for_people(count: int, text: str) -> None:
    assert disk.show_bytes(count) == text


def test_hidden_files_are_no_part_of_a_model(tmp_path: Path) -> None:
    for name in ("b", "a", "sub/c", ".hidden", ".git/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in disk.list_files(tmp_path)] == ["a", "b", "sub/c"]


# --- hashes ----------------------------------------------------------------------------------------------------------


def test_the_hash_of_a_value_depends_on_neither_order_nor_spelling() -> None:
    assert disk.hash_json({"a": 1, "b": [1.0, "ü"]}) == disk.hash_json(json.loads('{"b": [1.0, "\\u00fc"], "a": 1}'))
    assert disk.hash_json({"a": 1}) != disk.hash_json({"a": "1"})
    assert disk.hash_json(1) != disk.hash_json(1.0)


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), Path("x"), b"x", object()])
def test_what_has_no_stable_form_is_not_hashed(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        disk.hash_json({"a": value})


def test_a_file_is_hashed_once_and_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "file", tmp_path / ".hashes.json"
    file.write_text("one")
    reads: list[Path] = []
    hash_file = disk.hash_file
    monkeypatch.setattr(disk, "hash_file", lambda path: reads.append(path) or hash_file(path))

    def cached() -> str:
        hashes = disk.HashCache(cache)
        digest = hashes.hash_file(file)
        hashes.save()
        return digest

    assert cached() == cached() == hash_file(file)
    assert len(reads) == 1
    file.write_text("two")  # of the same size
    assert cached() == hash_file(file)
    os.utime(file, (1, 1))
    assert cached() == hash_file(file)
    assert len(reads) == 3


def test_a_byte_changed_under_a_restored_time_is_seen(tmp_path: Path) -> None:
    file, hashes = tmp_path / "file", disk.HashCache(tmp_path / ".hashes.json")
    file.write_text("one")
    before = file.stat()
    first = hashes.hash_file(file)
    time.sleep(0.02)  # a file system's clock ticks every few milliseconds
    with file.open("r+") as written:
        written.write("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashes.hash_file(file) == disk.hash_file(file) != first


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"FILE": 5}', '{"FILE": [1, 2]}', '{"FILE": null}'])
def test_a_damaged_cache_costs_time_but_never_gives_a_wrong_hash(tmp_path: Path, content: str) -> None:
    file, cache = tmp_path / "file", tmp_path / ".hashes.json"
    file.write_text("x")
    cache.write_text(content.replace("FILE", str(file)))
    hashes = disk.HashCache(cache)
    assert hashes.hash_file(file) == disk.hash_file(file)
    hashes.save()
    assert list(disk.read_json(cache)) == [str(file)]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    hashes = disk.HashCache(tmp_path / "file" / "below a file" / ".hashes.json")
    assert hashes.hash_file(tmp_path / "file") == disk.hash_file(tmp_path / "file")
    hashes.save()


# --- full and read-only disks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "runs/x: no space left on the disk while writing stages.sft; free some and run again"),
        (errno.EDQUOT, "runs/x: no space left on the disk while writing stages.sft"),
        (errno.EROFS, "runs/x: not writable (Read-only file system) while writing stages.sft; choose another --root"),
        (errno.EACCES, "runs/x: not writable (Permission denied) while writing stages.sft"),
        (errno.ENOTDIR, "runs/x: a file is where a directory should be"),
    ],
)
def test_a_disk_that_cannot_be_written_is_explained(code: int, message: str) -> None:
    with pytest.raises(UserError) as caught, disk.explain_disk_errors("stages.sft"):
        raise OSError(code, os.strerror(code), "runs/x")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "words",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",  # safetensors 0.8
        "[enforce fail at inline_container.cc:671] . unexpected pos 375104 vs 374996",  # torch 2.15
        "PytorchStreamWriter failed writing file data/5: file write failed",
    ],
)
def test_a_full_disk_is_recognized_by_the_words_of_libraries_that_give_no_error_number(words: str) -> None:
    with pytest.raises(UserError, match="no space left on the disk"), disk.explain_disk_errors("stages.sft"):
        raise RuntimeError(words)


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "no such file", "x"), RuntimeError("CUDA error"), KeyError("x")])
def test_another_error_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)), disk.explain_disk_errors("stages.sft"):
        raise error


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB of its own: enough for the weights that the stage below writes, not for its optimizer state."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def project(place: Path, base: Path | None = None) -> Path:
    """A pipeline file whose stage would train; the sources lie beside it."""
    if base is None:
        base = place / "base"
        base.mkdir()
        (base / "config.json").write_text("{}")
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(4)]
    (place / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "pipeline.yaml").write_text(f"""
run: r
sources: {{base: {{model: {base}}}, chat: {{data: {place}/chat.jsonl}}}}
stages: {{sft: {{inputs: {{policy: base, data: chat}}, max_steps: 1, global_batch_size: 4, max_length: 128, num_processes: 1}}}}
""")
    return place / "pipeline.yaml"


def fill(place: Path) -> None:
    with (place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_a_full_disk_is_one_line(tmp_path: Path, small_disk: Path, posttrain: Callable[..., Any]) -> None:
    config = project(tmp_path)
    fill(small_disk)
    ended = posttrain("run", config, "--root", small_disk)
    assert ended.code == 2
    assert ended.err == "error: stages.sft: no space left on the disk while writing stages.sft; free some and run again\n"
    (small_disk / "filler").unlink()
    assert posttrain("plan", config, "--root", small_disk).code == 0


def test_a_read_only_disk_is_one_line(tmp_path: Path, small_disk: Path, posttrain: Callable[..., Any]) -> None:
    config = project(tmp_path)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert posttrain("plan", config, "--root", small_disk).code == 0
    ended = posttrain("run", config, "--root", small_disk)
    assert ended.code == 2
    assert ended.err.startswith(f"error: {small_disk}/r: not writable (Read-only file system) while writing stages.sft")
    assert ended.err.count("\n") == 1


@pytest.mark.real
def test_a_disk_that_fills_up_while_a_stage_trains_is_one_line(
    tmp_path: Path, small_disk: Path, stories: Path, posttrain: Callable[..., Any]
) -> None:
    config = project(tmp_path, stories)
    ended = posttrain("run", config, "--root", small_disk)
    assert ended.code == 2, ended.err
    assert "has no room for a checkpoint of 0.02 GB; there is no checkpoint yet: free some and run again" in ended.err
    assert ended.err.count("\n") == 1
    assert not (small_disk / "r" / "sft" / "artifact.json").exists()
