"""Raw records out of files and Hub data sets: each an object of column names to values, with the place where it stands.

What the columns mean is the matter of `formats`. Opening fails at once on what is wrong with a file as a whole; what is wrong
inside it fails on the way, naming the line. JSONL, CSV and Parquet are streamed; the text of a JSON array is held, its
records are not.
"""

import csv
import gzip
import importlib
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from posttrain.data import json_text
from posttrain.error import UserError

Record = dict[str, Any]
Records = Iterator[tuple[str, Record]]
"""`(position, record)`; the position is `path:line` for JSONL and CSV, and `path[index]` elsewhere."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_ROW_BYTES = 16 << 20
"""Longest line of a text file, field of a CSV file, and mean row of a part of a Parquet file: more tokens than any model reads."""
MAX_JSON_BYTES = 1 << 30
"""Longest JSON array, unpacked, since its text is held."""
PARQUET_BATCH_ROWS = 256


def open_file(path: str, column_names: Sequence[str] | None = None) -> Records:
    """The records of a `.json`, `.jsonl`, `.csv` (each also `.gz`) or `.parquet` file, in order.

    `column_names` is for a CSV file without a header line, whose first line is then a record. Raises `UserError` at once where
    the file is missing, empty or of no known kind, and while iterating, naming the line, where its content is malformed. A
    file may turn out to hold no records at all.
    """
    _check_readable(path)
    reader = _reader(path)
    if reader is None:
        raise UserError(f"{path} is of no known kind; give a .json, .jsonl, .csv (each may end in .gz) or .parquet file")
    if column_names is not None:
        assert reader is _read_csv, "the config lets only CSV files have them"
        return _read_csv(path, list(column_names))
    return reader(path)


def open_hub(name: str, *, revision: str, subset: str | None, split: str) -> Records:
    """The records of one split of a Hub data set at a pinned commit; the position is `name[index]`. Raises `UserError`."""
    datasets: Any = importlib.import_module("datasets")
    try:
        loaded = datasets.load_dataset(name, name=subset, split=split, revision=revision)
    except Exception as error:  # its own errors, those of the HTTP client and plain ones share no base class
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise UserError(
            f"{name} at {revision[:12]} cannot be loaded from the Hub; check id, subset, split and network ({reason})"
        ) from None
    return ((f"{name}[{index}]", record) for index, record in enumerate(loaded))


def _check_readable(path: str) -> None:
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise UserError(f"{path} is a directory; name the files in it")
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is not a regular file; copy the data to one")
        if found.st_size == 0:
            raise UserError(f"{path} is empty; it must hold at least one row")
        with open(path, "rb"):
            pass
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist; check the path (relative ones start at {Path.cwd()})") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{path!r} cannot be read ({reason}); check the path and its permissions") from None


def _reader(path: str) -> Callable[[str], Records] | None:
    name = path.lower()
    if name.endswith(".parquet"):
        return _open_parquet
    plain = name.removesuffix(".gz")
    return next((reader for suffix, reader in _TEXT_READERS.items() if plain.endswith(suffix)), None)


def _read_json(path: str) -> Records:
    text = _whole_text(path)
    at = json_text.skip_space(text, 0)
    if text[at : at + 1] != "[":
        hint = "; one object a line makes a .jsonl file" if text[at : at + 1] == "{" else ""
        raise UserError(f"{path}:{_line_at(text, at)}: must be a JSON array of objects, beginning with '['{hint}")
    at = json_text.skip_space(text, at + 1)
    index, closed = 0, text[at : at + 1] == "]"
    while not closed:
        position = f"{path}[{index}]"
        try:
            record, end = json_text.parse_at(text, at)
        except json_text.BadJSON as error:
            offset = at if error.offset is None else error.offset
            raise UserError(f"{path}:{_line_at(text, offset)}: record {index} is malformed JSON: {error}") from None
        yield position, _object(record, position)
        index, at = index + 1, json_text.skip_space(text, end)
        closed = text[at : at + 1] == "]"
        if not closed and text[at : at + 1] != ",":
            found = json_text.show(text[at]) if at < len(text) else "the end of the file"
            raise UserError(f"{path}:{_line_at(text, at)}: malformed JSON: expected ',' or ']' after record {index - 1}, got {found}")
        at = at if closed else json_text.skip_space(text, at + 1)
    if (rest := json_text.skip_space(text, at + 1)) != len(text):
        raise UserError(f"{path}:{_line_at(text, rest)}: malformed JSON: there is more text after the array; remove it")


def _read_jsonl(path: str) -> Records:
    for number, line in _lines(path):
        if not line.strip():
            continue
        position = f"{path}:{number}"
        try:
            record = json_text.parse(line)
        except json_text.BadJSON as error:
            column = "" if error.offset is None else f" at column {error.offset + 1}"
            mend = "" if ";" in str(error) else "; mend the line, or delete it"
            raise UserError(f"{position}: malformed JSON{column}: {error}{mend}") from None
        yield position, _object(record, position)


def _read_csv(path: str, column_names: list[str] | None = None) -> Records:
    csv.field_size_limit(MAX_ROW_BYTES)  # 128 KiB by default, and a long document is one field
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header = column_names
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}:{start}: malformed CSV: {error}; quote the field, and double the quotes within") from None
        if not fields:
            continue
        if header is None:
            header = _header(fields, f"{path}:{start}")
        elif len(fields) != len(header):
            names = "the header" if column_names is None else "column_names"
            raise UserError(f"{path}:{start}: has {len(fields)} fields, but {names} has {len(header)}; quote fields that hold commas")
        else:
            yield f"{path}:{start}", dict(zip(header, fields, strict=True))


def _header(fields: list[str], at: str) -> list[str]:
    twice = next((name for index, name in enumerate(fields) if name in fields[:index]), None)
    if twice is not None:
        raise UserError(f"{at}: the header names the column {json_text.show(twice)} twice; rename one")
    return fields


def _open_parquet(path: str) -> Records:
    pyarrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    errors = (pyarrow.ArrowException, OSError, ValueError, OverflowError)  # ValueError: a name or a text that is not UTF-8
    try:
        file = parquet.ParquetFile(path)
        columns = list(file.schema_arrow.names)
    except errors as error:
        raise UserError(f"{path} is not a Parquet file, or a damaged one ({_one_line(error)}); write it again") from None
    if len(set(columns)) != len(columns):
        raise UserError(f"{path} has two columns of one name among {json_text.names(columns)}; rename one")
    parts = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
    row_bytes = max((part.total_byte_size // max(1, part.num_rows) for part in parts), default=0)
    if row_bytes > MAX_ROW_BYTES:
        raise UserError(f"{path} has rows of {row_bytes >> 20} MiB, over {MAX_ROW_BYTES >> 20} MiB; write one sample a row")
    batch_rows = min(PARQUET_BATCH_ROWS, MAX_ROW_BYTES // max(1, row_bytes))
    return _parquet_records(path, file, batch_rows, errors)


def _parquet_records(path: str, file: Any, batch_rows: int, errors: tuple[type[Exception], ...]) -> Records:
    index = 0
    with file:
        batches = file.iter_batches(batch_size=batch_rows)
        while True:
            try:
                records = next(batches).to_pylist()
            except StopIteration:
                return
            except errors as error:
                raise UserError(
                    f"{path}[{index}]: this row or one soon after cannot be read ({_one_line(error)}); write it again"
                ) from None
            for record in records:
                yield f"{path}[{index}]", record
                index += 1


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """`(number from 1, line)` by newline bytes alone, since text in JSON may hold other line separators. Line ends are kept."""
    number = 0
    with _open_bytes(path) as file:
        while True:
            try:
                raw = file.readline(MAX_ROW_BYTES + 1)
            except (EOFError, zlib.error, OSError) as error:
                raise UserError(f"{path}:{number + 1}: {_unreadable(error)}") from None
            if not raw:
                return
            number += 1
            if len(raw) > MAX_ROW_BYTES:
                raise UserError(f"{path}:{number}: the line is over {MAX_ROW_BYTES >> 20} MiB; write one sample a line")
            if b"\0" in raw:
                raise UserError(f"{path}:{number}: {_no_text(raw)}")
            try:
                yield number, (raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw).decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: {_not_utf8(error)}") from None


def _whole_text(path: str) -> str:
    with _open_bytes(path) as file:
        try:
            raw = file.read(MAX_JSON_BYTES + 1)
        except (EOFError, zlib.error, OSError) as error:
            raise UserError(f"{path}: {_unreadable(error)}") from None
    if len(raw) > MAX_JSON_BYTES:
        raise UserError(f"{path} holds over {MAX_JSON_BYTES >> 20} MiB; one object a line makes a .jsonl file, which is not held in memory")
    if b"\0" in raw:
        number = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        raise UserError(f"{path}:{number}: {_no_text(raw)}")
    try:
        return raw.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: {_not_utf8(error)}") from None


def _open_bytes(path: str) -> BinaryIO:
    try:
        return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _object(value: object, position: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{position}: must be an object of column names to values, got {json_text.show(value)}")
    return value


def _line_at(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1


def _unreadable(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "the gzip data ends too soon; the file is truncated, so copy it again"
    return f"cannot be read ({_one_line(error)}); write or copy the file again"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text (byte 0x{error.object[error.start]:02x}); convert the file to UTF-8"


def _no_text(raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or raw[1:2] == b"\0" or raw[:1] == b"\0":
        return "not UTF-8 text, but UTF-16, it seems; convert the file to UTF-8"
    return "holds a NUL byte, so it is no text, or a damaged one; write or copy the file again"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


_TEXT_READERS: dict[str, Callable[[str], Records]] = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
