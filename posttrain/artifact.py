"""Artifacts: the finished output of a stage, the only thing that another stage may read.

`artifact.json` lies beside `output/` and is written last: it exists if and only if the stage finished. It holds a fresh
id for each build, so whoever was built from an earlier build can be told apart from whoever was built from this one, and
size and hash of every file, so that nothing damaged is read.

    output.json      size and hash of every file of `output/` and of the evidence, from the moment it was published
    artifact.json    the same of `output/`, and all that is known of the build, once it was verified
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import disk
from posttrain.config import DATA_SUFFIXES, DataSource, ModelSource
from posttrain.error import UserError
from posttrain.stage import ArtifactKind

FILE = "artifact.json"
OUTPUT = "output"
RECORD = "output.json"
EVIDENCE = ("probe.safetensors", "published.json", "final_metrics.json", "selected.json")
"""What a published output is checked against, and declared finished with."""


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
    files: Mapping[str, Mapping[str, Any]]
    """Name below `output/` of each file to its `bytes` and `sha256`."""
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
        payload = disk.read_sealed(path)
        if payload is None:
            return None
        return Artifact(
            id=payload["id"],
            kind=payload["kind"],
            fingerprint=payload["fingerprint"],
            identity=payload["identity"],
            version=payload["version"],
            inputs=payload["inputs"],
            files=payload["files"],
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
    disk.refuse_symlinks(output)
    payload = {
        "id": uuid.uuid4().hex,
        "kind": kind,
        "fingerprint": fingerprint,
        "identity": identity,
        "version": version,
        "inputs": inputs,
        "files": disk.describe_files(output, disk.list_files(output)),
        "metrics": metrics,
        "provenance": provenance,
    }
    disk.write_sealed(directory / FILE, payload)


def record_output(directory: Path, output: Path) -> None:
    """Write down what is about to be published: to be called when `output` and the evidence are whole, before `output` is renamed."""
    disk.refuse_symlinks(output)
    evidence = [path for name in EVIDENCE if (path := directory / name).is_file()]
    record = {"files": disk.describe_files(output, disk.list_files(output)), "evidence": disk.describe_files(directory, evidence)}
    disk.write_sealed(directory / RECORD, record)


def faults(artifact: Artifact, digest: Callable[[Path], str] | None) -> Iterator[str]:
    """What is wrong with the files of a finished output; where `digest`, the hash of a file, is None, by their sizes alone."""
    yield from _tree_faults(artifact.output, artifact.files, digest)


def published_faults(directory: Path, digest: Callable[[Path], str] | None) -> Iterator[str]:
    """The same of an `output/` whose stage has not finished yet, and of the evidence that it is to be checked against."""
    record = _read_record(directory)
    if isinstance(record, str):
        yield record
        return
    yield from _tree_faults(directory / OUTPUT, record["files"], digest)
    yield from disk.file_faults(directory, record["evidence"], digest)


def evidence_faults(directory: Path) -> Iterator[str]:
    """What is wrong with what an output was checked against."""
    record = _read_record(directory)
    yield from [record] if isinstance(record, str) else disk.file_faults(directory, record["evidence"], disk.hash_file)


def _read_record(directory: Path) -> Mapping[str, Mapping[str, Any]] | str:
    """What `record_output` wrote, or what is wrong with that."""
    path = directory / RECORD
    try:
        record = disk.read_sealed(path)
    except (OSError, ValueError) as error:
        return f"{path} is damaged ({error})"
    return f"{path} is missing" if record is None else record


def _tree_faults(output: Path, recorded: Mapping[str, Mapping[str, Any]], digest: Callable[[Path], str] | None) -> Iterator[str]:
    if digest is None:
        yield from disk.file_faults(output, recorded, None)
        return
    if links := list(disk.symlinks(output)):  # before anything is read: one could lead anywhere
        yield from (f"{link} is a symbolic link" for link in links)
        return
    yield from disk.file_faults(output, recorded, digest)
    extra = [path for path in disk.list_files(output) if str(path.relative_to(output)) not in recorded]
    yield from (f"{path} was put there since, and would be read too" for path in extra)


def check_files(artifact: Artifact, hashes: disk.HashCache) -> None:
    """Raise `UserError` where a file of a finished output is not what its stage wrote. Reads those that changed since they last were."""
    if fault := next(faults(artifact, hashes.hash_file), None):
        name = artifact.directory.name
        raise UserError(f"stages.{name}: {fault}; put that right, or build the stage again with --rebuild {name}")


def fingerprint_source(source: ModelSource | DataSource, at: str, hashes: disk.HashCache) -> str:
    """What a source is: local files by their bytes, a Hub source by its pinned revision. Raises `UserError`."""
    if isinstance(source, ModelSource):
        return disk.hash_json({"model": _content(source.model, source.revision, f"{at}.model", hashes, is_model=True)})
    recipe = source.model_dump(mode="json", exclude={"data", "license"}, exclude_defaults=True)
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
