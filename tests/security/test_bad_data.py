"""A zoo of data files: each is refused with one line that names the file, and nothing is left of the attempt."""

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.config import DataSource
from posttrain.data import files
from posttrain.data.formats import convert, detect
from posttrain.data.source import open_source
from posttrain.error import UserError
from tests.conftest import Ended
from tests.security.preparing import Refuse, refuse, refused, run_prepare, write_pipeline

__all__ = ["refuse"]

GOOD = {"prompt": "Who?", "completion": "Me."}
ROW = json.dumps(GOOD)
TALK = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}


def parquet(columns: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def turns(*messages: Any) -> str:
    return lines({"messages": list(messages)})


USER, ANSWER = TALK["messages"]
NESTED = json.loads("[" * 500 + "]" * 500)
PARQUET = parquet({"prompt": ["Who?"] * 50, "completion": ["Me."] * 50})

ZOO: list[tuple[str, str, str | bytes, str]] = [
    # encodings
    ("utf-16 with a mark", "x.jsonl", (ROW + "\n").encode("utf-16"), "x.jsonl:1: not UTF-8 text, but UTF-16"),
    ("utf-16 little-endian", "x.jsonl", (ROW + "\n").encode("utf-16-le"), "x.jsonl:1: not UTF-8 text, but UTF-16"),
    ("utf-16 big-endian", "x.csv", "prompt,completion\na,b\n".encode("utf-16-be"), "x.csv:1: not UTF-8 text, but UTF-16"),
    ("utf-16 array", "x.json", f"[{ROW}]".encode("utf-16"), "x.json:1: not UTF-8 text, but UTF-16"),
    ("utf-32", "x.jsonl", (ROW + "\n").encode("utf-32"), "x.jsonl:1: not UTF-8 text"),
    ("latin-1", "x.jsonl", '{"prompt": "Wer?", "completion": "Ich für mich."}\n'.encode("latin-1"),
     "x.jsonl:1: not UTF-8 text (byte 0xfc)"),
    ("latin-1 later", "x.csv", "prompt,completion\na,b\nc,für\n".encode("latin-1"), "x.csv:3: not UTF-8 text"),
    ("half a character at the end", "x.jsonl", ROW.encode()[:-2] + b"\xe2\x82", "x.jsonl:1: not UTF-8 text"),
    ("overlong", "x.jsonl", b'{"prompt": "\xc0\xaf", "completion": "b"}\n', "x.jsonl:1: not UTF-8 text"),
    ("two marks", "x.jsonl", b"\xef\xbb\xbf\xef\xbb\xbf" + ROW.encode(), "x.jsonl:1: malformed JSON"),
    ("a mark and nothing", "x.jsonl", b"\xef\xbb\xbf", "holds no rows"),
    ("surrogates in UTF-8", "x.jsonl", b'{"prompt": "\xed\xa0\x80", "completion": "b"}\n', "x.jsonl:1: not UTF-8 text"),
    ("half a surrogate pair", "x.jsonl", '{"prompt": "\\ud800", "completion": "b"}\n', "x.jsonl:1: prompt: holds half a surrogate pair"),
    ("the other half", "x.jsonl", '{"prompt": "a", "completion": "b\\udfff"}\n', "x.jsonl:1: completion: holds half a surrogate pair"),
    # NUL and binary
    ("a NUL in a line", "x.jsonl", ROW.encode()[:5] + b"\0" + ROW.encode()[5:], "x.jsonl:1: holds a NUL byte"),
    ("a NUL in a field", "x.csv", b"prompt,completion\na,b\0\n", "x.csv:2: holds a NUL byte"),
    ("a NUL in an array", "x.json", b'[{"prompt": "a\0"}]', "x.json:1: holds a NUL byte"),
    ("a file of NULs", "x.jsonl", b"\0" * 5000, "x.jsonl:1: not UTF-8 text"),
    ("random bytes", "x.jsonl", bytes(range(128, 256)) * 8, "x.jsonl:1: not UTF-8 text"),
    ("an image", "x.json", b"\x89PNG\r\n\x1a\n" + b"\1\2\3" * 40, "x.json:1: not UTF-8 text"),
    ("Parquet named JSONL", "x.jsonl", PARQUET, "x.jsonl:"),
    ("gzip named JSONL", "x.jsonl", gzip.compress(ROW.encode()), "x.jsonl:1: "),
    ("JSONL named Parquet", "x.parquet", ROW, "is not a Parquet file"),
    ("JSONL named JSON", "x.json", lines(GOOD, GOOD), "one object a line makes a .jsonl file"),
    ("JSON named JSONL", "x.jsonl", json.dumps([GOOD]), "x.jsonl:1: must be an object"),
    ("CSV named JSONL", "x.jsonl", "prompt,completion\na,b\n", "x.jsonl:1: malformed JSON"),
    ("JSONL named CSV", "x.csv", lines(GOOD), "x.csv holds no rows"),
    ("plain text named gzip", "x.jsonl.gz", ROW, "x.jsonl.gz:1: cannot be read (Not a gzipped file"),
    # ends of lines, and nothing
    ("nothing", "x.jsonl", "", "is empty"),
    ("blank lines", "x.jsonl", "\n\n \r\n\t\n", "holds no rows"),
    ("blank lines of CSV", "x.csv", "\r\n\r\n", "holds no rows"),
    ("a header alone", "x.csv", "prompt,completion\r\n", "holds no rows"),
    ("an empty array", "x.json", "[]", "holds no rows"),
    ("no rows in Parquet", "x.parquet", parquet({"prompt": pa.array([], pa.string()), "completion": pa.array([], pa.string())}),
     "holds no rows"),
    ("no columns in Parquet", "x.parquet", parquet({}), "holds no rows"),
    ("lines that end in CR alone", "x.jsonl", ROW + "\r" + ROW + "\r", "x.jsonl:1: malformed JSON"),
    ("a line cut off after CRLF", "x.jsonl", ROW + "\r\n" + ROW[:20], "x.jsonl:2: malformed JSON"),
    # JSON
    ("a key twice", "x.jsonl", '{"prompt": "a", "prompt": "b", "completion": "c"}\n', "the key 'prompt' stands twice"),
    ("NaN", "x.jsonl", lines(ROW, '{"prompt": NaN, "completion": "c"}'), "x.jsonl:2: malformed JSON at column 1: NaN is not JSON"),
    ("Infinity", "x.json", '[{"prompt": -Infinity}]', "-Infinity is not JSON"),
    ("beyond range", "x.jsonl", '{"prompt": 1e999}\n', "beyond the range of a number"),
    ("a huge integer", "x.jsonl", '{"prompt": ' + "9" * 10_000 + "}\n", "a number has too many digits"),
    ("deep nesting", "x.jsonl", '{"prompt": ' + "[" * 100_000, "nested too deep"),
    ("deep objects", "x.json", '[{"a":' * 50_000, "nested too deep"),
    ("deep in a field that is read", "x.jsonl", lines({**TALK, "tools": [{"name": "f", "parameters": {"a": NESTED}}]}),
     "tools[0]: is nested deeper"),
    ("deep in tools as text", "x.jsonl", lines({**TALK, "tools": "[" * 100_000}), "tools: "),
    ("a comma too many", "x.jsonl", '{"prompt": "a", "completion": "b",}\n', "x.jsonl:1: malformed JSON"),
    ("single quotes", "x.jsonl", "{'prompt': 'a', 'completion': 'b'}\n", "x.jsonl:1: malformed JSON"),
    ("a comment", "x.jsonl", "// rows\n" + ROW, "x.jsonl:1: malformed JSON"),
    ("two rows in a line", "x.jsonl", ROW + ROW + "\n", "there is more text"),
    ("an array that is not closed", "x.json", f"[{ROW},", "record 1 is malformed JSON"),
    ("text after an array", "x.json", f"[{ROW}] x", "there is more text"),
    ("a control character", "x.jsonl", '{"prompt": "a\x01", "completion": "b"}\n', "x.jsonl:1: malformed JSON"),
    ("null", "x.jsonl", "null\n", "must be an object of column names to values, got null"),
    ("a number", "x.jsonl", "17\n", "must be an object of column names to values, got 17"),
    ("a list", "x.jsonl", '["Who?", "Me."]\n', "must be an object of column names to values, got a list of 2"),
    ("an empty object", "x.jsonl", "{}\n", "no format fits the columns"),
    # types and schemas
    ("a number for text", "x.jsonl", '{"prompt": "a", "completion": 5}\n', "x.jsonl:1: completion: "),
    ("an object for text", "x.jsonl", '{"prompt": {"a": 1}, "completion": "b"}\n', "x.jsonl:1: prompt: "),
    ("null for text", "x.jsonl", '{"prompt": "a", "completion": null}\n', "x.jsonl:1: completion: is missing or null"),
    ("an empty answer", "x.jsonl", '{"prompt": "a", "completion": " "}\n', "x.jsonl:1: completion"),
    ("another schema later", "x.jsonl", lines(GOOD, TALK), "x.jsonl:2: "),
    ("a column that goes missing", "x.jsonl", lines(GOOD, {"prompt": "a"}), "x.jsonl:2: completion: is missing"),
    ("a type that changes", "x.jsonl", lines(GOOD, {"prompt": "a", "completion": ["b"]}), "x.jsonl:2: completion[0]: "),
    ("columns of nothing known", "x.csv", "a,b\n1,2\n", "no format fits the columns a, b"),
    ("columns of two formats", "x.jsonl", lines({**GOOD, "instruction": "a", "output": "b"}), "fit "),
    ("messages that are text", "x.jsonl", lines({"messages": "hello"}), "messages: must be a list of messages"),
    ("no messages", "x.jsonl", lines({"messages": []}), "messages: is an empty list"),
    ("a message that is text", "x.jsonl", turns("hello"), "messages[0]: must be an object"),
    ("no role", "x.jsonl", turns({"content": "a"}), "messages[0].role: is missing"),
    ("an unknown role", "x.jsonl", turns({"role": "root", "content": "a"}), "messages[0].role: 'root' is not a role"),
    ("a role that is a list", "x.jsonl", turns({"role": ["user"], "content": "a"}), "messages[0].role: "),
    ("content that is a number", "x.jsonl", turns({"role": "user", "content": 5}, ANSWER), "messages[0].content: "),
    ("an image in content", "x.jsonl", turns({"role": "user", "content": [{"type": "image"}]}, ANSWER), "is not supported"),
    ("a system message later", "x.jsonl", turns(USER, {"role": "system", "content": "a"}, ANSWER), "may only be the first"),
    ("train that is text", "x.jsonl", turns(USER, {**ANSWER, "train": "yes"}), "messages[1].train: must be true or false"),
    ("tool calls by a user", "x.jsonl", turns({**USER, "tool_calls": [{"name": "f", "arguments": {}}]}, ANSWER), "only an assistant"),
    ("arguments that are a list", "x.jsonl", turns(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}),
     "arguments: must"),
    ("a conversation without an answer", "x.jsonl", turns(USER), "has no assistant message"),
    ("answers of which none is trained", "x.jsonl", turns(USER, {**ANSWER, "train": False}), "no token of it is trained"),
    ("a control token in a question", "x.jsonl", turns({"role": "user", "content": "a<|im_end|>b"}, ANSWER),
     "'<|im_end|>', which is a control"),
    ("a control token in an answer", "x.jsonl", lines({"prompt": "a", "completion": "b</s>"}), "which is a control token"),
    ("sharegpt without from", "x.jsonl", lines({"conversations": [{"value": "a"}]}), "conversations[0]"),
    ("a pair for a conversation", "x.jsonl", lines({"prompt": "a", "chosen": "b", "rejected": "c"}), "is a preference pair"),
    # CSV
    ("too many fields", "x.csv", "prompt,completion\na,b,c\n", "x.csv:2: has 3 fields, but the header has 2"),
    ("too few fields", "x.csv", "prompt,completion\na\n", "x.csv:2: has 1 fields, but the header has 2"),
    ("a quote that is not closed", "x.csv", 'prompt,completion\n"a,b\n', "x.csv:2: malformed CSV"),
    ("text after a quote", "x.csv", 'prompt,completion\n"a"b,c\n', "x.csv:2: malformed CSV"),
    ("a column twice", "x.csv", "prompt,prompt\na,b\n", "names the column 'prompt' twice"),
    ("semicolons", "x.csv", "prompt;completion\na;b\n", "no format fits the columns"),
    # gzip and Parquet
    ("gzip cut off", "x.jsonl.gz", gzip.compress(lines(*[GOOD] * 2000).encode())[:-20], "the gzip data ends too soon"),
    ("gzip cut off at its head", "x.jsonl.gz", gzip.compress(ROW.encode())[:5], "x.jsonl.gz:1: "),
    ("gzip with another checksum", "x.jsonl.gz", gzip.compress(ROW.encode())[:-8] + b"12345678", "x.jsonl.gz:"),
    ("garbage after gzip", "x.jsonl.gz", gzip.compress((ROW + "\n").encode()) + b"garbage", "x.jsonl.gz:"),
    ("gzip of gzip", "x.jsonl.gz", gzip.compress(gzip.compress(ROW.encode())), "x.jsonl.gz:1: "),
    ("gzip of nothing", "x.jsonl.gz", gzip.compress(b""), "holds no rows"),
    ("Parquet cut off", "x.parquet", PARQUET[:-30], "is not a Parquet file, or a damaged one"),
    ("Parquet cut off at its head", "x.parquet", PARQUET[:8], "is not a Parquet file, or a damaged one"),
    ("Parquet with a hole", "x.parquet", PARQUET[:20] + b"\xff" * 40 + PARQUET[60:], "x.parquet"),
    ("Parquet of numbers", "x.parquet", parquet({"prompt": [1], "completion": [2]}), "prompt: "),
    ("Parquet of bytes", "x.parquet", parquet({"prompt": [b"a"], "completion": [b"b"]}), "prompt: "),
    ("Parquet of nulls", "x.parquet", parquet({"prompt": [None, None], "completion": ["a", "b"]}), "prompt: is missing or null"),
    # kinds
    ("an unknown ending", "x.txt", ROW, "is of no known kind"),
    ("no ending", "x", ROW, "is of no known kind"),
    ("another packing", "x.jsonl.bz2", ROW, "is of no known kind"),
    ("a pickle", "x.pkl", b"\x80\x04N.", "is of no known kind"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said"), [case[1:] for case in ZOO], ids=[case[0] for case in ZOO])
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, tiny: Path, refuse: Refuse, name: str, content: str | bytes, said: str) -> None:
    data = tmp_path / name
    data.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refuse(tiny, data)
    assert said in line
    assert name in line


def test_the_file_that_the_zoo_starts_from_is_right(
    tmp_path: Path, tiny: Path, posttrain: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every way of writing it: with a mark, CRLF, blank lines, packed, as an array, as CSV and as Parquet."""
    ways = {
        "x.jsonl": b"\xef\xbb\xbf" + (ROW + "\r\n\r\n" + ROW).encode(),
        "x.jsonl.gz": gzip.compress(ROW.encode()),
        "x.json": f"[{ROW}]".encode(),
        "x.csv": b"prompt,completion\r\nWho?,Me.\r\n",
        "x.parquet": PARQUET,
    }
    for name, content in ways.items():
        (tmp_path / name).write_bytes(content)
        pipeline = write_pipeline(tmp_path / "pipeline.yaml", tiny, tmp_path / name)
        ended = run_prepare(posttrain, monkeypatch, pipeline, "--root", tmp_path / f"runs-{name}")
        assert (ended.code, ended.err.strip()) == (1, "failed: prepared"), ended


@pytest.mark.parametrize("kind", ["folder", "fifo", "socket", "device", "loop", "nothing", "long", "NUL"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, tiny: Path, refuse: Refuse, kind: str) -> None:
    data = tmp_path / "x.jsonl"
    if kind == "folder":
        data.mkdir()
    elif kind == "fifo":
        os.mkfifo(data)
    elif kind == "socket":
        os.mknod(data, 0o140644)
    elif kind == "device":
        data.symlink_to("/dev/zero")
    elif kind == "loop":
        data.symlink_to(data)
    elif kind == "long":
        data = tmp_path / ("x" * 300 + ".jsonl")
    override = ('sources.chat.data="a\\0.jsonl"',) if kind == "NUL" else ()
    assert refuse(tiny, data, *override).startswith("sources.chat.data: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, tiny: Path, refuse: Refuse) -> None:
    data = tmp_path / "x.jsonl"
    data.write_text(ROW)
    data.chmod(0)
    assert "cannot be read (Permission denied)" in refuse(tiny, data)


# --- size ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test can reach."""
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 5000)


LONG = json.dumps({"prompt": "a" * 2000, "completion": "b"})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", ROW + "\n" + LONG, "x.jsonl:2: the line is over"),
        ("x.jsonl.gz", gzip.compress((ROW + "\n" + LONG).encode()), "x.jsonl.gz:2: the line is over"),
        ("x.csv", 'prompt,completion\n"a\n' + "a\n" * 1000 + '",b\n', "x.csv:2: malformed CSV: field larger"),
        ("x.csv", "prompt,completion\n" + "a" * 2000 + ",b\n", "x.csv:2: the line is over"),
        ("x.json", "[" + " " * 6000 + "]", "holds over"),
        ("x.json.gz", gzip.compress(b"[" + b" " * 6000 + b"]"), "holds over"),
        ("x.parquet", parquet({"prompt": ["a" * 2000], "completion": ["b"]}), "has rows of"),
    ],
)
def test_what_is_too_long_to_be_a_row_is_refused(
    tmp_path: Path, tiny: Path, refuse: Refuse, name: str, content: str | bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refuse(tiny, tmp_path / name)


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.jsonl.gz"])
def test_a_line_without_end_is_not_held_in_memory(tmp_path: Path, name: str) -> None:
    """A gibibyte in one line, sparse on disk or packed to a megabyte."""
    path = tmp_path / name
    if name.endswith(".gz"):
        with gzip.open(path, "wb", compresslevel=1) as packed:
            for _ in range(64):
                packed.write(b"a" * (16 << 20))
    else:
        with path.open("wb") as file:
            file.truncate(1 << 30)
    largest = 0
    real = files._open_bytes

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Counting":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def readline(self, size: int) -> bytes:
            nonlocal largest
            line: bytes = self.file.readline(size)
            largest = max(largest, len(line))
            return line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_open_bytes", lambda path: Counting(real(path)))
        with pytest.raises(UserError, match=r":1: the line is over 16 MiB"):
            list(files.open_file(str(path)))
    assert largest == files.MAX_ROW_BYTES + 1


# --- whatever stands in a file, it is read or refused ----------------------------------------------------------------

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
TEXT = st.text(st.characters(codec=None), max_size=20)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
KEYS = st.sampled_from(
    ["messages", "prompt", "completion", "chosen", "rejected", "instruction", "input", "output", "history", "conversations", "tools",
     "role", "content", "from", "value", "system", "checks", "tool_calls", "function", "name", "arguments", "kind", "train", "user",
     "assistant", "human"]
)  # fmt: skip
VALUES = st.recursive(LEAVES | KEYS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12)


@FUZZ
@given(record=st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_record_becomes_a_row_or_is_refused(record: dict[str, Any]) -> None:
    try:
        form = detect(record, "x")
        row = convert(record, form, "x:1")
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert row.origin == "x:1"


@FUZZ
@given(
    content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode),
    name=st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.jsonl.gz"]),
)
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    try:
        list(files.open_file(str(path)))
    except UserError as error:
        assert str(path) in str(error) and str(error).isprintable()


@FUZZ
@given(place=st.integers(0, len(PARQUET) - 1), byte=st.integers(0, 255))
def test_a_parquet_file_with_another_byte_is_read_or_refused(tmp_path: Path, place: int, byte: int) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(PARQUET[:place] + bytes([byte]) + PARQUET[place + 1 :])
    try:
        list(files.open_file(str(path)))
    except UserError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1


def test_a_refusal_that_comes_late_leaves_no_prepared_data(
    tmp_path: Path, tiny: Path, posttrain: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some chunks of rows have been encoded and written by processes forked for it."""
    data = tmp_path / "x.jsonl"
    data.write_text(lines(*({"prompt": f"a {number}", "completion": "b"} for number in range(3000)), '{"prompt": '))
    pipeline = write_pipeline(tmp_path / "pipeline.yaml", tiny, data)
    line = refused(run_prepare(posttrain, monkeypatch, pipeline, "--root", tmp_path / "runs"), tmp_path / "runs")
    assert "x.jsonl:3001: malformed JSON" in line


def test_every_entry_of_a_source_is_named_by_its_own_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(ROW)
    (tmp_path / "b.jsonl").write_text("{")
    source = DataSource(data=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    with pytest.raises(UserError, match=r"b\.jsonl:1: malformed JSON"):
        open_source(source, "sources.chat")
