"""Artifacts: the finished output of a stage, the only thing that another stage may read.

`artifact.json` lies beside `output/` and is written last: it exists if and only if the stage finished. It holds a fresh
id for each build, so whoever was built from an earlier build can be told apart from whoever was built from this one.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import disk
from posttrain.config import DATA_SUFFIXES, DataSource, ModelSource
from posttrain.error import UserError
from posttrain.stage import ArtifactKind

FILE = "artifact.json"
OUTPUT = "output"


@dataclass(frozen=True)
class Artifact:
    """What `artifact.json` says of one finished build."""

    id: str
    kind: ArtifactKind
    fingerprint: str
    identity: Mapping[str, Any]
    version: int
    inputs: Mapping[str, Mapping[str, str]]
    """Name of each input to the `id` and `fingerprint` of the build that was read (of a source, both are the latter)."""
    metrics: Mapping[str, float]
    finished: str
    directory: Path

    @property
    def output(self) -> Path:
        """The directory that holds the finished output."""
        return self.directory / OUTPUT


def read_artifact(directory: Path) -> Artifact | None:
    """The artifact of the stage directory, or None where the stage has not finished. Raises `UserError` if damaged."""
    path = directory / FILE
    try:
        record = disk.read_json(path)
        if record is None:
            return None
        payload = record["payload"]
        if record["sha256"] != disk.hash_json(payload):
            raise ValueError("its hash does not match")
        return Artifact(
            id=payload["id"],
            kind=payload["kind"],
            fingerprint=payload["fingerprint"],
            identity=payload["identity"],
            version=payload["version"],
            inputs=payload["inputs"],
            metrics=payload["metrics"],
            finished=payload["provenance"]["finished"],
            directory=directory,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, and the stage is checked and finished again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def write_artifact(
    directory: Path,
    *,
    kind: ArtifactKind,
    fingerprint: str,
    identity: Mapping[str, Any],
    version: int,
    inputs: Mapping[str, Mapping[str, str]],
    metrics: Mapping[str, float],
    provenance: Mapping[str, Any],
) -> None:
    """Declare the `output/` of the stage directory finished, with the size and hash of each of its files."""
    output = directory / OUTPUT
    files = {
        str(path.relative_to(output)): {"bytes": path.stat().st_size, "sha256": disk.hash_file(path)} for path in disk.list_files(output)
    }
    payload = {
        "id": uuid.uuid4().hex,
        "kind": kind,
        "fingerprint": fingerprint,
        "identity": identity,
        "version": version,
        "inputs": inputs,
        "files": files,
        "metrics": metrics,
        "provenance": provenance,
    }
    disk.write_json(directory / FILE, {"payload": payload, "sha256": disk.hash_json(payload)})


def fingerprint_source(source: ModelSource | DataSource, at: str, hashes: disk.HashCache) -> str:
    """What a source is: local files by their bytes, a Hub source by its pinned revision. Raises `UserError`."""
    if isinstance(source, ModelSource):
        return disk.hash_json({"model": _content(source.model, source.revision, f"{at}.model", hashes, is_model=True)})
    recipe = source.model_dump(mode="json", exclude={"data"}, exclude_defaults=True)
    contents = []
    for entry in source.paths:
        name, _, revision = entry.partition("@")
        contents.append(_content(name, revision or None, f"{at}.data", hashes, is_model=False))
    return disk.hash_json({"data": contents, **recipe})


def _content(name: str, revision: str | None, at: str, hashes: disk.HashCache, *, is_model: bool) -> object:
    if revision is not None:
        return {"hub": name, "revision": revision}
    path = Path(name)
    try:
        if not path.exists():
            raise UserError(f"{at}: {name!r} does not exist here; give a path on this disk, or a Hub id with its pinned revision")
        return _model_content(path, at, hashes) if is_model else _data_content(path, at, hashes)
    except OSError as error:
        raise UserError(f"{at}: {error.filename or name} cannot be read ({error.strerror}); check its permissions") from None


def _model_content(path: Path, at: str, hashes: disk.HashCache) -> object:
    if not (path / "config.json").is_file():
        raise UserError(f"{at}: {str(path)!r} holds no config.json, so it is no model directory; give one in Hugging Face layout")
    return {str(file.relative_to(path)): hashes.hash_file(file) for file in disk.list_files(path)}


def _data_content(path: Path, at: str, hashes: disk.HashCache) -> object:
    if path.is_dir():
        raise UserError(f"{at}: {str(path)!r} is a directory; name the data files in it")
    if not path.is_file():
        raise UserError(f"{at}: {str(path)!r} is no regular file; copy the data to one")
    if not path.name.lower().removesuffix(".gz").endswith(DATA_SUFFIXES):
        raise UserError(f"{at}: {str(path)!r} is of no known kind; give a .json, .jsonl, .csv or .parquet file")
    if path.stat().st_size == 0:
        raise UserError(f"{at}: {str(path)!r} is empty; it must hold at least one row")
    return {"sha256": hashes.hash_file(path)}
