"""Files as a crash leaves them: written aside, synced, renamed; hashed by content; moved aside, never deleted.

Whoever reads a file written here sees all of it or none of it, whatever was killed when.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from posttrain.error import UserError

CHUNK_BYTES = 1 << 20
FULL_BYTES = 1 << 16
MANIFEST = "manifest.json"
"""The sealed record, written last, of a directory that runs share; under `files` it holds what `describe_files` says."""


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` to write to, which takes its place, synced, when the block ends; nothing is left of it where that fails."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(aside).chmod(0o644)
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, atomically and synced."""
    with _replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, atomically and synced."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`; None where there is no such file. Raises `ValueError` where it holds no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def write_sealed(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON that carries its own hash, atomically and synced."""
    write_json(path, {"payload": value, "sha256": hash_json(value)})


def read_sealed(path: Path) -> Any:
    """What `write_sealed` wrote to `path`; None where there is no such file. Raises `ValueError` where it is not what was written."""
    record = read_json(path)
    if record is None:
        return None
    if not isinstance(record, dict) or record.keys() != {"payload", "sha256"}:
        raise ValueError("it is no sealed record")
    if record["sha256"] != hash_json(record["payload"]):
        raise ValueError("its hash does not match")
    return record["payload"]


def write_array(path: Path, array: Any) -> None:
    """Replace `path` by a numpy array, atomically and synced; makes its directory."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as file:
        np.save(file, array, allow_pickle=False)


def publish_directory(aside: Path, path: Path) -> None:
    """Sync every file below `aside` and rename it to `path`, which must not exist."""
    sync_tree(aside)
    aside.rename(path)
    sync_directory(path.parent)


def sync_tree(directory: Path) -> None:
    """Wait until every file below `directory`, and every name, is on disk."""
    for path in [*directory.rglob("*"), directory]:
        if path.is_file():
            sync_file(path)
        elif path.is_dir():
            sync_directory(path)


def sync_file(path: Path) -> None:
    """Wait until the bytes of `path` are on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in `path` are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move_aside(paths: list[Path], into: Path) -> Path | None:
    """Move those of `paths` that exist into a new numbered directory below `into`; that directory, or None."""
    present = [path for path in paths if path.exists()]
    if not present:
        return None
    into.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(old.name) for old in into.iterdir() if old.name.isdecimal()), default=0)
    target = into / str(number)
    target.mkdir()
    for path in present:
        path.rename(target / path.name)
    return target


def link_tree(source: Path, target: Path) -> None:
    """Make `target` the same tree as `source`, by hard links where the file system can, else by copies. No symbolic link is followed."""
    refuse_symlinks(source)
    shutil.copytree(source, target, copy_function=link_file)


def link_file(source: Path | str, target: Path | str) -> None:
    """Make `target` the same file as `source`, or a copy of it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def symlinks(directory: Path) -> Iterator[Path]:
    """All symbolic links at or below `directory`, hidden ones too; none is followed."""
    if directory.is_symlink():
        yield directory
        return
    for here, directories, files in os.walk(directory):
        yield from (path for name in sorted([*directories, *files]) if (path := Path(here, name)).is_symlink())


def refuse_symlinks(directory: Path) -> None:
    """Raise `UserError` where `directory` is, or holds, a symbolic link: what it leads to is no part of it."""
    if link := next(symlinks(directory), None):
        raise UserError(f"{link}: is a symbolic link, which is not followed; put the file itself there")


def num_bytes(path: Path) -> int:
    """Size of the file `path`, or of all files below the directory `path`; what a symbolic link points to is not counted."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size
    return sum(Path(here, name).lstat().st_size for here, _, files in os.walk(path) for name in files)


def show_bytes(count: int) -> str:
    """A number of bytes for people, such as `1.4 GB`, in powers of 1000 as disks are sold."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if size < 999.95:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def describe_files(directory: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Name below `directory` of each file to its `bytes` and `sha256`."""
    return {str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in files}


def file_faults(directory: Path, recorded: Mapping[str, Mapping[str, Any]], digest: Callable[[Path], str] | None) -> Iterator[str]:
    """What is wrong with each of the files that `describe_files` recorded: missing, no plain file, of another size or content.

    `digest` gives the hash of a file; where it is None, no file is read.
    """
    for name, record in recorded.items():
        path = directory / name
        try:
            info = path.lstat()
            if stat.S_ISLNK(info.st_mode):
                yield f"{path} is a symbolic link"
            elif not stat.S_ISREG(info.st_mode):
                yield f"{path} is no file"
            elif info.st_size != record["bytes"]:
                yield f"{path} has {info.st_size:,} bytes, and was written with {record['bytes']:,}"
            elif digest is not None and digest(path) != record["sha256"]:
                yield f"{path} does not hold what was written to it (its hash differs)"
        except (FileNotFoundError, NotADirectoryError):
            yield f"{path} is missing"
        except OSError as error:
            yield f"{path} cannot be read ({error.strerror})"


def entry_faults(directory: Path, digest: Callable[[Path], str] | None, record: str = MANIFEST) -> Iterator[str]:
    """What is wrong with the record of a directory, or with a file that it names, as `file_faults` says it."""
    path = directory / record
    try:
        sealed = read_sealed(path)
        if sealed is None:
            yield f"{path} is missing"
            return
        files = sealed["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{path} is damaged ({error})"
        return
    yield from file_faults(directory, files, digest)


@contextmanager
def new_entry(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A directory that takes the place of `path` when the block ends well, and what its record is to say beside its files.

    Nothing is left of it where the block fails, nor where, on a disk without locks, another process was faster with the very same.
    """
    aside = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex}")
    aside.mkdir(parents=True)
    record: dict[str, Any] = {}
    try:
        yield aside, record
        write_sealed(aside / MANIFEST, {**record, "files": describe_files(aside, list_files(aside))})
        try:
            publish_directory(aside, path)
        except OSError:
            if not (path / MANIFEST).is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def discard_damaged(directory: Path, hashes: "HashCache") -> None:
    """Move what is at `directory` to `.old` beside it and say so, where it is not what its record says, or has none."""
    if directory.exists() and (fault := next(entry_faults(directory, hashes.hash_file), None)):
        kept = move_aside([directory], directory.parent / ".old")
        print(f"{fault}: it was moved to {kept}, and is made again", flush=True)


def hash_file(path: Path) -> str:
    """SHA-256 of the bytes of `path`, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of the canonical JSON form of `value`, in hex. Raises `TypeError` on what has no stable form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def list_files(directory: Path) -> list[Path]:
    """All files below `directory` that are not hidden, sorted by name."""
    found = directory.rglob("*")
    return sorted(f for f in found if f.is_file() and not any(p.startswith(".") for p in f.relative_to(directory).parts))


class HashCache:
    """File hashes remembered by path, size and times of change, so that planning reads large weights only once.

    The inode's own time of change is among them, which no program can set back: bytes changed under a restored time are seen.
    Lives in one JSON file; where that cannot be written (a read-only disk), it just is not kept.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        self._changed = False
        try:
            known = read_json(path)
        except (OSError, ValueError):
            known = None  # a damaged or unreadable cache costs time, never correctness
        if isinstance(known, dict):
            self._known = known

    def hash_file(self, path: Path) -> str:
        """SHA-256 of `path`, read only if its size or a time of change is not the remembered one."""
        info = path.stat()
        key, stamp = str(path.resolve()), [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]
        known = self._known.get(key)
        if isinstance(known, list) and known[:4] == stamp and len(known) == 5:
            return str(known[4])
        digest = hash_file(path)
        self._known[key] = [*stamp, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        """Write the cache if it changed."""
        if self._changed:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._path, self._known)
            except (OSError, ValueError):
                pass  # ValueError: a file name that is no text


@contextmanager
def explain_disk_errors(what: str) -> Iterator[None]:
    """Turn a full or read-only disk met inside into one line for the user that says what was being written."""
    try:
        yield
    except Exception as error:
        where, why = getattr(error, "filename", None) or what, _error_number(error)
        if why in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{where}: no space left on the disk while writing {what}; free some and run again") from error
        if why in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(f"{where}: not writable ({os.strerror(why)}) while writing {what}; choose another --root") from error
        if why == errno.ENOTDIR:
            raise UserError(f"{where}: a file is where a directory should be; move it away, or choose another --root") from error
        raise


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors and torch write files by themselves, and tell of a disk that refuses them in words only.
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1])
    return errno.ENOSPC if re.search(r"inline_container.*unexpected pos|PytorchStreamWriter failed writing", str(error)) else None


def is_full(directory: Path) -> bool:
    """Whether the disk of `directory` has so little space left that not even an error message may have found room."""
    return free_bytes(directory) < FULL_BYTES


def free_bytes(directory: Path) -> int:
    """Bytes that can still be written to the disk of `directory`."""
    return shutil.disk_usage(directory).free
