"""Files become records with their places; whatever is wrong with a file is one line that names it."""

import gzip
import json
import sys
import types
from pathlib import Path

import pytest

from posttrain.data.files import open_file, open_hub
from posttrain.error import UserError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "ä\u2028c", "completion": "d"}]
CSV = 'prompt,completion\r\na,b\r\n"two\nlines, quoted","say ""hi"""\r\nlast,one\r\n'


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def fails(path: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        list(open_file(str(path)))
    message = str(caught.value)
    assert "\n" not in message
    return message


def jsonl(rows: list[dict[str, str]], end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


@pytest.mark.parametrize("pack", [lambda b: b, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_jsonl_positions_are_line_numbers_with_bom_crlf_blank_lines_and_gzip(tmp_path, pack, mark, end):
    name = "x.jsonl" if pack(b"") == b"" else "x.jsonl.gz"
    path = write(tmp_path / name, pack(mark + (jsonl(ROWS, end) + end + end).encode()))
    assert list(open_file(path)) == [(f"{path}:1", ROWS[0]), (f"{path}:2", ROWS[1])]


def test_a_jsonl_file_needs_no_newline_at_its_end_and_its_blank_lines_count(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"a": 1}\n\n{"a": 2}')
    assert [position for position, _ in open_file(path)] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_positions_are_indices(tmp_path, indent):
    text = json.dumps(ROWS, indent=indent).replace("\n", "\r\n")
    expected = [(0, ROWS[0]), (1, ROWS[1])]
    for path in (write(tmp_path / "x.json", "\ufeff" + text), write(tmp_path / "x.json.gz", gzip.compress(text.encode()))):
        assert list(open_file(path)) == [(f"{path}[{index}]", row) for index, row in expected]


def test_csv_positions_are_the_first_line_of_each_record(tmp_path):
    expected = [(2, "a", "b"), (3, "two\nlines, quoted", 'say "hi"'), (5, "last", "one")]
    for path in (write(tmp_path / "X.CSV", "\ufeff" + CSV), write(tmp_path / "x.csv.gz", gzip.compress(CSV.encode()))):
        got = list(open_file(path))
        assert got == [(f"{path}:{line}", {"prompt": p, "completion": c}) for line, p, c in expected]


def test_a_csv_file_without_a_header_gets_its_names_from_outside(tmp_path):
    path = write(tmp_path / "x.csv", 'one,two\r\n"a, b",c\r\n')
    expected = [(f"{path}:1", {"q": "one", "a": "two"}), (f"{path}:2", {"q": "a, b", "a": "c"})]
    assert list(open_file(path, ["q", "a"])) == expected
    packed = write(tmp_path / "x.csv.gz", gzip.compress(Path(path).read_bytes()))
    assert [record for _, record in open_file(packed, ["q", "a"])] == [record for _, record in expected]
    with pytest.raises(UserError, match=r"x.csv:1: has 2 fields, but column_names has 3"):
        list(open_file(path, ["q", "a", "more"]))


def test_csv_takes_a_field_longer_than_the_csv_module_does_by_default(tmp_path):
    path = write(tmp_path / "x.csv", "a\n" + "x" * 200_000 + "\n")
    assert len(next(open_file(path))[1]["a"]) == 200_000


def test_parquet_rows_keep_lists_of_objects_and_are_counted_over_batches(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(600)]
    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert list(open_file(path)) == [(f"{path}[{i}]", row) for i, row in enumerate(rows)]


@pytest.mark.parametrize("name, content", [("x.json", " [ ] "), ("x.jsonl", "\n \r\n"), ("x.csv", "a,b\n"), ("x.jsonl", "\ufeff")])
def test_a_file_may_hold_no_records(tmp_path, name, content):
    assert list(open_file(write(tmp_path / name, content))) == []


BAD = [
    ("x.jsonl", '{"a": 1}\n{"a": }\n', ":2: malformed JSON at column 7: expecting value; mend the line, or delete it"),
    ("x.jsonl", '{"a": 1}\n{"a": 1} {"a": 2}\n', ":2: malformed JSON at column 10: there is more text"),
    ("x.jsonl", '{"a": 1}\n{"a": 1', ":2: malformed JSON"),
    ("x.jsonl", '{"a": 1}\n[1, 2]\n', ":2: must be an object of column names to values, got a list of 2"),
    ("x.jsonl", '"text"\n', ":1: must be an object of column names to values, got 'text'"),
    ("x.jsonl", "true\n", ":1: must be an object of column names to values, got true"),
    ("x.jsonl", '{"a": 1, "b": {"c": 1, "c": 2}}\n', ":1: malformed JSON at column 1: the key 'c' stands twice"),
    ("x.jsonl", '{"a": NaN}\n', ":1: malformed JSON at column 1: NaN is not JSON"),
    ("x.jsonl", '{"a": -Infinity}\n', ":1: malformed JSON at column 1: -Infinity is not JSON"),
    ("x.jsonl", '{"a": 1e999}\n', ":1: malformed JSON at column 1: '1e999' is beyond the range"),
    ("x.jsonl", '{"a": ' + "1" * 5000 + "}\n", ":1: malformed JSON at column 1: a number has too many digits"),
    ("x.jsonl", '{"a": ' + "[" * 100_000 + "}\n", ":1: malformed JSON at column 1: nested too deep"),
    ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', ":2: not UTF-8 text (byte 0xff)"),
    ("x.jsonl", '{"a": 1}\n'.encode("utf-16"), ":1: not UTF-8 text"),
    ("x.json", '{"a": 1}\n{"a": 2}\n', ":1: must be a JSON array of objects, beginning with '['; one object a line makes a .jsonl"),
    ("x.json", "\n  5", ":2: must be a JSON array"),
    ("x.json", "   \n", ":2: must be a JSON array"),
    ("x.json", '[{"a": 1},\n {"a": }]', ":2: record 1 is malformed JSON: expecting value"),
    ("x.json", '[{"a": 1},\n {"a": 1, "a": 2}]', ":2: record 1 is malformed JSON: the key 'a' stands twice"),
    ("x.json", '[{"a": 1}\n {"a": 2}]', ":2: malformed JSON: expected ',' or ']' after record 0, got '{'"),
    ("x.json", '[{"a": 1},\n', ":2: record 1 is malformed JSON: expecting value"),
    ("x.json", '[{"a": 1}', ":1: malformed JSON: expected ',' or ']' after record 0, got the end of the file"),
    ("x.json", '[{"a": 1}]\n[]', ":2: malformed JSON: there is more text after the array"),
    ("x.json", '[{"a": 1}, null]', "[1]: must be an object of column names to values, got null"),
    ("x.json", "[" * 100_000, ":1: record 0 is malformed JSON: nested too deep"),
    ("x.json", "[\n[NaN]]", ":2: record 0 is malformed JSON: NaN is not JSON"),
    ("x.json", b'[{"a": 1},\n{"a": "\xe4"}]', ":2: not UTF-8 text (byte 0xe4)"),
    ("x.csv", "a,b\n1,2\n1,2,3\n", ":3: has 3 fields, but the header has 2"),
    ("x.csv", "a,b\n1\n", ":2: has 1 fields, but the header has 2"),
    ("x.csv", 'a,b\n1,2\n"open,2\n', ":3: malformed CSV: unexpected end of data"),
    ("x.csv", 'a,b\n"1"x,2\n', ":2: malformed CSV"),
    ("x.csv", "a,b,a\n1,2,3\n", ":1: the header names the column 'a' twice"),
    ("x.csv", b"a,b\n1,\xff\n", ":2: not UTF-8 text"),
    ("x.jsonl.gz", b"plain text", ":1: cannot be read (Not a gzipped file"),
    ("x.json.gz", b"plain text", ": cannot be read (Not a gzipped file"),
    ("x.parquet", b"no parquet at all", " is not a Parquet file"),
    ("x.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", " is not a Parquet file"),
    ("x.txt", "hello", " is of no known kind"),
    ("x.parquet.gz", b"hello", " is of no known kind"),
    ("x.gz", b"hello", " is of no known kind"),
    ("x.jsonl", "", " is empty"),
    ("x.json", "", " is empty"),
    ("x.csv", "", " is empty"),
    ("x.parquet", "", " is empty"),
]


@pytest.mark.parametrize("name, content, problem", BAD, ids=[problem[:60] for _, _, problem in BAD])
def test_a_bad_file_is_one_line_that_names_file_and_place(tmp_path, name, content, problem):
    path = write(tmp_path / name, content)
    assert fails(path).startswith(path + problem)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.gz", "x.json.gz"])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_gzip_is_told_as_truncated(tmp_path, name, keep):
    whole = gzip.compress(b"a,b\n" + b"".join(b"%d,%d\n" % (i, i * i) for i in range(5000)) if "csv" in name else _many_rows(name))
    path = write(tmp_path / name, whole[: int(len(whole) * keep)])
    assert "truncated" in fails(path)


def _many_rows(name: str) -> bytes:
    rows = [{"a": i, "b": i * i} for i in range(5000)]
    return (json.dumps(rows) if name == "x.json.gz" else "".join(json.dumps(row) + "\n" for row in rows)).encode()


def test_damaged_gzip_is_an_error_and_not_a_crash(tmp_path):
    whole = bytearray(gzip.compress(_many_rows("x.jsonl")))
    whole[len(whole) // 2] ^= 0xFF
    assert ".jsonl.gz:" in fails(write(tmp_path / "x.jsonl.gz", bytes(whole)))


def test_damaged_parquet_pages_are_an_error_and_not_a_crash(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [f"text {i}" for i in range(1000)]}), path, compression="gzip", use_dictionary=False)
    whole = bytearray(path.read_bytes())
    whole[40:400] = b"\xff" * 360
    path.write_bytes(bytes(whole))
    assert fails(path).startswith(f"{path}[0]: ")


def test_what_is_no_file_is_refused_when_opened_and_not_when_read(tmp_path):
    for path, problem in [(tmp_path / "no.jsonl", "does not exist"), (tmp_path, "is a directory"), ("/dev/null", "not a regular file")]:
        with pytest.raises(UserError, match=problem):
            open_file(str(path))
    with pytest.raises(UserError, match="does not exist"):
        open_file(write(tmp_path / "file", "x") + "/below.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        open_file("nul\0.jsonl")


def test_jsonl_is_streamed_so_a_bad_last_line_does_not_hide_the_first(tmp_path):
    records = open_file(write(tmp_path / "x.jsonl", '{"a": 1}\nbroken\n'))
    assert next(records)[1] == {"a": 1}
    with pytest.raises(UserError, match=":2: malformed"):
        next(records)


def test_a_hub_data_set_is_loaded_at_its_pinned_revision(monkeypatch):
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return [{"prompt": "a"}, {"prompt": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    records = open_hub("some-org/some-set", revision="a" * 40, subset="en", split="test")
    assert list(records) == [("some-org/some-set[0]", {"prompt": "a"}), ("some-org/some-set[1]", {"prompt": "b"})]
    assert calls == [("some-org/some-set", {"name": "en", "split": "test", "revision": "a" * 40})]


@pytest.mark.parametrize(
    "error", [ConnectionError("no\nnetwork"), FileNotFoundError("gone"), ValueError("BuilderConfig"), RuntimeError("x")]
)
def test_a_hub_data_set_that_cannot_be_loaded_is_one_line_that_names_it(monkeypatch, error):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError) as caught:
        open_hub("some-org/some-set", revision="a" * 40, subset=None, split="train")
    assert str(caught.value).startswith("some-org/some-set at aaaaaaaaaaaa cannot be loaded") and "\n" not in str(caught.value)
