"""Inventory: what a run holds on disk, whether each piece of it is whole, and what of it can be spared. Imports no torch.

A piece that a living process is building is neither checked nor spared, and nothing is ever followed out of the root.
"""

import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

from posttrain import artifact, checkpoint, disk, ledger, smoke
from posttrain.error import UserError

REMOVED = ".removed-"
"""What a file or directory is called from the moment that it is no longer there until it is deleted."""
SHARED = (
    (".prepared", "prepared.json", "prepared data"),
    (".reference", "reference.json", "a reference"),
    (".results", "results.json", "results of an evaluation"),
    (".replies", "replies.json", "replies of a judge"),
)
"""What lies under the root for all runs: where, which file of a stage points to it, and what to call it."""
OF_OTHERS = (".nfs", ".fuse_hidden", ".lease.")
"""How file systems name what was deleted while it was open, and processes their part of the lease; both go by themselves."""


@dataclass(frozen=True)
class Piece:
    """Something that a run holds and that can be checked."""

    run: str
    stage: str
    what: str
    path: Path
    num_bytes: int
    """Bytes to read for the check."""
    mend: str
    """What to do where it is damaged."""
    faults: Callable[[], Iterable[str]] = field(repr=False, compare=False)
    """Reads all of it, and says what is wrong with it."""


@dataclass(frozen=True)
class Spare:
    """Something that can be deleted, and nothing is lost that a run still needs."""

    path: Path
    why: str
    num_bytes: int
    """Bytes that become free: a file that another place holds too, by a hard link, counts nothing."""
    stage: Path | None
    """The stage directory that it lies in, whose lease is taken to delete it; None where all runs share it, or none reads it."""


def list_runs(root: Path) -> list[Path]:
    """The directories of all runs under `root`."""
    return [path for path in sorted(root.glob("*")) if path.is_dir() and list_stages(path)]


def list_stages(run: Path) -> list[Path]:
    """The stage directories of a run."""
    marks = ("stage.json", artifact.FILE, artifact.OUTPUT)
    return [path for path in sorted(run.glob("*")) if not path.name.startswith(".") and any((path / mark).exists() for mark in marks)]


# --- whether it is whole ---------------------------------------------------------------------------------------------


def list_pieces(run: Path) -> list[Piece]:
    """All that a run holds, or its stages point to, and that records say the hash of; each once."""
    found = {piece.path: piece for stage in list_stages(run) for piece in _pieces(run.name, stage)}
    return list(found.values())


def _pieces(run: str, directory: Path) -> Iterator[Piece]:
    stage = directory.name
    if holder := ledger.lease_holder(directory):
        yield Piece(run, stage, f"not checked: being built by {holder}", directory, 0, "", list)
        return
    yield from _output_pieces(run, directory)
    prefixes = (checkpoint.PREFIX, checkpoint.WEIGHTS_PREFIX)
    for path in sorted(path for prefix in prefixes for path in (directory / "checkpoints").glob(f"{prefix}*")):
        if (path / checkpoint.MARKER).exists():  # else it was cut off, and is passed over
            mend = "delete it: what is before it is gone on from"
            yield Piece(run, stage, "checkpoint", path, disk.num_bytes(path), mend, partial(checkpoint.faults, path))
    for _, name, what in SHARED:
        try:
            entries = _entries(directory / name)
        except (OSError, ValueError, KeyError, TypeError) as error:
            said = f"{directory / name} is damaged ({error})"
            yield Piece(run, stage, what, directory / name, 0, "delete it: the next run writes it again", partial(list, [said]))
            continue
        for entry in entries:
            if (entry / disk.MANIFEST).exists():
                mend = "delete it: the next run makes it again"
                yield Piece(run, stage, what, entry, disk.num_bytes(entry), mend, partial(disk.entry_faults, entry, disk.hash_file))


def _entries(pointer: Path) -> list[Path]:
    """The entries under the root that a stage points to."""
    record = disk.read_json(pointer)
    return [] if record is None else [Path(path) for path in record.get("paths") or [record["path"]]]


def _output_pieces(run: str, directory: Path) -> Iterator[Piece]:
    stage, output = directory.name, directory / artifact.OUTPUT
    rebuild = f"put it right, or build the stage again with --rebuild {stage}"
    try:
        finished = artifact.read_artifact(directory)
    except UserError as error:
        said = str(error)
        mend = f"or build the stage again with --rebuild {stage}"
        yield Piece(run, stage, "artifact", directory / artifact.FILE, 0, mend, partial(list, [said]))
        return
    if finished is not None:
        size = sum(record["bytes"] for record in finished.files.values())
        yield Piece(run, stage, "output", output, size, rebuild, partial(artifact.faults, finished, disk.hash_file))
        yield Piece(run, stage, "evidence", directory / artifact.RECORD, 0, rebuild, partial(artifact.evidence_faults, directory))
    elif output.exists():
        faults = partial(artifact.published_faults, directory, disk.hash_file)
        mend = "run again: it is published again from the last checkpoint, where there is one"
        yield Piece(run, stage, "output, not verified yet", output, disk.num_bytes(output), mend, faults)


# --- what can be spared ----------------------------------------------------------------------------------------------


def list_spares(run: Path, root: Path) -> list[Spare]:
    """What of a run, and of what runs under `root` share, can be deleted."""
    spares = [_spare(path, "an old build", None) for path in sorted((run / ".old").glob("*/*"))]
    spares += [_spare(path, "left by a command that was killed", None) for path in sorted(run.glob(f"{REMOVED}*"))]
    if (run / smoke.DIRECTORY).is_dir() and ledger.lease_holder(run / smoke.DIRECTORY) is None:
        spares.append(_spare(run / smoke.DIRECTORY, "what a smoke that failed left", None))
    for directory in list_stages(run):
        if ledger.lease_holder(directory) is None:
            spares += _stage_spares(directory)
    return [*spares, *_shared_spares(root)]


def _stage_spares(directory: Path) -> Iterator[Spare]:
    killed = "left by a process that was killed"
    try:
        is_finished = artifact.read_artifact(directory) is not None
    except UserError:
        return  # damaged: nothing of it is deleted before that is mended
    prefixes = (checkpoint.PREFIX, checkpoint.WEIGHTS_PREFIX)
    whole = {each.path for prefix in prefixes for each in checkpoint.list_complete(directory / "checkpoints", prefix)}
    if is_finished and (directory / "checkpoints").exists():
        yield _spare(directory / "checkpoints", "checkpoints of a finished stage", directory)
    elif not is_finished:
        for path in sorted((directory / "checkpoints").glob("*")):
            if path not in whole:
                yield _spare(path, "a checkpoint that was cut off or damaged", directory)
    if (directory / "output.partial").exists():
        yield _spare(directory / "output.partial", "an output that was cut off", directory)
    for path in [*sorted(directory.glob(".*")), *sorted(directory.glob("logs/*/ahead.*/"))]:
        if not path.name.startswith(OF_OTHERS):
            yield _spare(path, killed, directory)


def _shared_spares(root: Path) -> Iterator[Spare]:
    """Prepared data, references and results that no run points to. While a stage of any run is being built, all may be about to be read."""
    if _is_building(root):
        return
    for shared, name, what in SHARED:
        used = set()
        for pointer in root.glob(f"*/*/{name}"):
            try:
                used |= {entry.name for entry in _entries(pointer)}
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                return  # who knows what it points to
        for path in sorted((root / shared).glob("*")):
            if path.name not in used and not path.name.startswith(OF_OTHERS) and path.suffix != ".lock":
                is_left = path.name.startswith(".")
                yield _spare(path, f"{what} that is damaged, or was left half-made" if is_left else f"{what} that no run uses", None)


def _is_building(root: Path) -> bool:
    return any(ledger.lease_holder(path.parent) for path in root.glob(f"*/*/{ledger.LEASE}"))


def _spare(path: Path, why: str, stage: Path | None) -> Spare:
    return Spare(path, why, freed_bytes(path), stage)


def freed_bytes(path: Path) -> int:
    """Bytes that become free when `path` is deleted: those of files that no other place holds by a hard link."""
    files = [Path(here, name) for here, _, names in os.walk(path) for name in names] if path.is_dir() and not path.is_symlink() else [path]
    held = [file.lstat() for file in files]
    here = Counter((info.st_dev, info.st_ino) for info in held)
    last = {(info.st_dev, info.st_ino): info.st_size for info in held if here[info.st_dev, info.st_ino] == info.st_nlink}
    return sum(last.values())


def delete(spares: list[Spare], root: Path) -> Iterator[Spare]:
    """Delete what `list_spares` found, each under the lease of its stage; yields what was deleted, as it is.

    What a process has begun to build since is left alone.
    """
    for stage, group in groupby(spares, key=lambda spare: spare.stage):
        if stage is None:
            for spare in group:
                if spare.path.parent.parent != root or not _is_building(root):
                    yield from _delete(spare)
            continue
        try:
            with ledger.lease(stage):
                for spare in group:
                    yield from _delete(spare)
        except UserError:
            continue


def _delete(spare: Spare) -> Iterator[Spare]:
    """Take it away in one instant, so that nobody finds half of it, and then delete it."""
    gone = spare.path.with_name(f"{REMOVED}{uuid.uuid4().hex}")
    try:
        spare.path.rename(gone)
    except FileNotFoundError:
        return
    if gone.is_dir() and not gone.is_symlink():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    yield spare
