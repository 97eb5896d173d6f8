"""An artifact is there if and only if its stage finished; a source is what it holds."""

import os
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
