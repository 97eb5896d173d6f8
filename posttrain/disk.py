"""Files as a crash leaves them: written aside, synced, renamed; hashed by content; moved aside, never deleted.

Whoever reads a file written here sees all of it or none of it, whatever was killed when.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from posttrain.error import UserError

CHUNK_BYTES = 1 << 20
FULL_BYTES = 1 << 16


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
    """Make `target` the same tree as `source`, by hard links where the file system can, else by copies."""
    shutil.copytree(source, target, copy_function=link_file)


def link_file(source: Path | str, target: Path | str) -> None:
    """Make `target` the same file as `source`, or a copy of it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


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
    """File hashes remembered by path, size and time of change, so that planning reads large weights only once.

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
        """SHA-256 of `path`, read only if its size or time of change is not the remembered one."""
        stat = path.stat()
        key, stamp = str(path.resolve()), [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._known.get(key)
        if isinstance(known, list) and known[:3] == stamp and len(known) == 4:
            return str(known[3])
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
    return shutil.disk_usage(directory).free < FULL_BYTES
