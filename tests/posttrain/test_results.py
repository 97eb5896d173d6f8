"""The Parquet file of an evaluation: what goes in comes out, by us and by any reader of Parquet."""

from pathlib import Path

import pytest

from posttrain.results import FILE, read_results, write_results

SETTINGS = {
    "engine": "vllm 0.25.0",
    "weights": "w",
    "contract": "c",
    "stop_tokens": ["<|im_end|>"],
    "max_new_tokens": 8,
    "is_greedy": True,
}
RESULTS = [
    {"policy": "a", "row": 0, "origin": "x.jsonl:1", "measure": "nll", "logp": -1.5, "num_tokens": 3},
    {
        "policy": "a",
        "row": 1,
        "origin": "x.jsonl:2",
        "measure": "answer",
        "turn": 2,
        "answer": "jä \U0001f600\n",
        "num_tokens": 0,
        "ended": False,
        "repetition": 0.0,
        "checks": [],
        "verdicts": [1.0, None],
        "settings": SETTINGS,
    },
]


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_results(tmp_path, RESULTS)
    assert list(read_results(tmp_path)) == RESULTS


def test_text_that_no_file_can_hold_is_written_out(tmp_path: Path) -> None:
    write_results(tmp_path, [{"policy": "a", "row": 0, "measure": "duel", "baseline": "\ud800", "replies": ["x\udfff"]}])
    (found,) = read_results(tmp_path)
    assert (found["baseline"], found["replies"]) == ("\\ud800", ["x\\udfff"])


def test_any_reader_of_parquet_reads_them(tmp_path: Path) -> None:
    from datasets import Dataset

    write_results(tmp_path, RESULTS)
    table = Dataset.from_parquet(str(tmp_path / FILE), cache_dir=str(tmp_path / "cache"))
    assert table["measure"][:] == ["nll", "answer"] and table[1]["settings"] == SETTINGS and table[0]["answer"] is None


def test_a_field_that_is_no_column_is_a_mistake_of_the_measure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no columns of rows\.parquet: reason"):
        write_results(tmp_path, [{**RESULTS[0], "reason": "x"}])


@pytest.mark.parametrize("content", [None, b"", b"PAR1 and then nothing"])
def test_what_is_gone_or_damaged_is_an_error_of_a_file(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        list(read_results(tmp_path))
