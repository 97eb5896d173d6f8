"""An artifact is there if and only if its stage finished; a source is what it holds."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain import artifact, disk
from posttrain.artifact import fingerprint_source
from posttrain.config import DataSource, ModelSource
from posttrain.error import UserError
from posttrain.provenance import now


def write(directory: Path, **fields: Any) -> None:
    given: dict[str, Any] = {
        "kind": "policy", "fingerprint": "f", "identity": {"kind": "sft", "seed": 3}, "version": 1, "metrics": {"loss": 0.25},
        "inputs": {"base": {"id": "b", "fingerprint": "b"}}, "provenance": {"finished": now()},
    }  # fmt: skip
    artifact.write_artifact(directory, **{**given, **fields})


@pytest.fixture
def built(tmp_path: Path) -> Path:
    (tmp_path / "output" / "sub").mkdir(parents=True)
    (tmp_path / "output" / "model.safetensors").write_text("weights")
    (tmp_path / "output" / "sub" / "adapter.safetensors").write_text("adapter")
    write(tmp_path)
    return tmp_path


def test_an_artifact_is_read_as_it_was_written(built: Path) -> None:
    found = artifact.read_artifact(built)
    assert found is not None
    assert (found.kind, found.fingerprint, found.version, found.metrics) == ("policy", "f", 1, {"loss": 0.25})
    assert (found.identity, found.inputs) == ({"kind": "sft", "seed": 3}, {"base": {"id": "b", "fingerprint": "b"}})
    assert found.output == built / "output"


def test_each_build_has_an_id_of_its_own(built: Path) -> None:
    first = artifact.read_artifact(built)
    write(built)
    second = artifact.read_artifact(built)
    assert first and second
    assert first.id != second.id


def test_every_file_of_the_output_is_recorded_by_size_and_hash(built: Path) -> None:
    files = disk.read_json(built / "artifact.json")["payload"]["files"]
    assert set(files) == {"model.safetensors", "sub/adapter.safetensors"}
    assert files["model.safetensors"] == {"bytes": 7, "sha256": disk.hash_file(built / "output" / "model.safetensors")}


def test_an_unfinished_stage_has_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    assert artifact.read_artifact(tmp_path) is None


def test_an_artifact_file_that_cannot_be_read_is_named(built: Path) -> None:
    (built / "artifact.json").unlink()
    (built / "artifact.json").mkdir()
    with pytest.raises(UserError, match=r"artifact.json: cannot be read \(Is a directory\)"):
        artifact.read_artifact(built)


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def replace_by_link(path: Path) -> None:
    outside = path.parents[2] / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


@pytest.mark.parametrize(
    ("damage", "said", "by_size"),
    [
        (flip, "model.safetensors does not hold what was written to it", False),
        (lambda path: path.write_bytes(b"w"), "model.safetensors has 1 bytes, and was written with 7", True),
        (Path.unlink, "model.safetensors is missing", True),
        (replace_by_link, "model.safetensors is a symbolic link", True),
        (lambda path: (path.parent / "added.json").write_text("{}"), "added.json was put there since", False),
        (lambda path: (path.parent / "link").symlink_to("/"), "link is a symbolic link", False),
    ],
)
def test_a_damaged_output_is_refused_before_it_is_read(built: Path, damage: Callable[[Path], Any], said: str, by_size: bool) -> None:
    hashes = disk.HashCache(built / ".hashes.json")
    finished = artifact.read_artifact(built)
    assert finished is not None
    artifact.check_files(finished, hashes)
    time.sleep(0.02)
    damage(built / "output" / "model.safetensors")
    with pytest.raises(UserError) as caught:
        artifact.check_files(finished, hashes)
    assert str(caught.value).startswith(f"stages.{built.name}: {built}/output/{said}")
    assert str(caught.value).endswith(f"build the stage again with --rebuild {built.name}")
    assert any(artifact.faults(finished, None)) == by_size, "what planning sees without reading a file"


def test_what_lies_beside_an_output_hidden_is_nobodys_business(built: Path) -> None:
    (built / "output" / ".DS_Store").touch()
    finished = artifact.read_artifact(built)
    assert finished is not None
    assert list(artifact.faults(finished, disk.hash_file)) == []


def test_an_output_with_a_symbolic_link_is_never_declared_finished(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "model.safetensors").symlink_to("/etc/hostname")
    for declare in (write, lambda directory: artifact.record_output(directory, directory / "output")):
        with pytest.raises(UserError, match="is a symbolic link"):
            declare(tmp_path)


def test_what_was_published_is_known_to_be_whole_until_it_is_verified(built: Path) -> None:
    (built / "artifact.json").unlink()
    (built / "final_metrics.json").write_text("{}")
    assert [fault.split()[-1] for fault in artifact.published_faults(built, None)] == ["missing"]
    artifact.record_output(built, built / "output")
    assert list(artifact.published_faults(built, disk.hash_file)) == []
    for path in (built / "final_metrics.json", built / "output" / "model.safetensors"):
        whole = path.read_bytes()
        flip(path)
        assert next(artifact.published_faults(built, disk.hash_file)).startswith(str(path))
        path.write_bytes(whole)
    (built / "output.json").write_text((built / "output.json").read_text().replace("7", "8"))
    assert "output.json is damaged" in next(artifact.published_faults(built, None))


def fingerprint(source: ModelSource | DataSource, cache: Path) -> str:
    return fingerprint_source(source, "sources.x", disk.HashCache(cache / ".hashes.json"))


def test_a_model_is_what_its_files_hold_not_where_they_lie(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "b" / ".cache").mkdir()
    (tmp_path / "b" / ".cache" / "lock").touch()
    a, b = (fingerprint(ModelSource(model=str(tmp_path / name)), tmp_path) for name in ("a", "b"))
    assert a == b
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    assert fingerprint(ModelSource(model=str(tmp_path / "b")), tmp_path) != a


def test_data_are_what_their_files_hold_in_the_order_given_and_how_they_are_read(tmp_path: Path) -> None:
    for name in ("a", "b", "copy of a"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name[-1]}", "completion": "c"}}\n')
    a, b, copy = (str(tmp_path / f"{name}.jsonl") for name in ("a", "b", "copy of a"))
    seen = [
        fingerprint(source, tmp_path)
        for source in (
            DataSource(data=a), DataSource(data=b), DataSource(data=[a, b]), DataSource(data=[b, a]), DataSource(data=[a, a]),
            DataSource(data=a, max_samples=1), DataSource(data=a, seed=1), DataSource(data=a, columns={"prompt": "q"}),
        )
    ]  # fmt: skip
    assert len(set(seen)) == len(seen)
    assert fingerprint(DataSource(data=copy), tmp_path) == seen[0]
    assert fingerprint(DataSource(data=[a], split="train"), tmp_path) == seen[0]


def test_the_home_directory_may_be_abbreviated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ModelSource(model="~/base").model == str(tmp_path / "base")
    assert DataSource(data=["~/a.jsonl", "b.jsonl"]).data == [str(tmp_path / "a.jsonl"), "b.jsonl"]


def test_a_file_name_that_is_no_text_is_hashed_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    try:
        Path(os.fsdecode(bytes(tmp_path) + b"/\xff.bin")).write_text("x")
    except OSError:
        pytest.skip("this file system takes only names that are text")
    hashes = disk.HashCache(tmp_path / ".hashes.json")
    assert fingerprint_source(ModelSource(model=str(tmp_path)), "sources.x", hashes)
    hashes.save()
