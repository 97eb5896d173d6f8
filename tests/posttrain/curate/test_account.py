"""The account: every row once, and a step that loses one, or counts one twice, is caught."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.curate.account import Account
from posttrain.curate.intake import Intake, Misfit
from posttrain.curate.step import Bench, Candidate, Drop, Outcome, Step
from posttrain.data.rows import Row
from tests.conftest import read_lines
from tests.posttrain.curate.bench import chat


class Anything(Step):
    """Stands for any step."""

    name = "length"
    limit: int = 3
    """A setting."""

    def run(self, candidates: Sequence[Candidate], bench: Bench) -> Outcome:
        raise NotImplementedError


def intake(num_rows: int = 4) -> Intake:
    """Rows of two sources, and one that does not fit, which stands second."""
    numbers = [0, *range(2, num_rows + 1)]
    candidates = [Candidate(number, "ab"[number % 2], chat(f"answer {number}", origin=f"{number}")) for number in numbers]
    return Intake(["a", "b"], candidates, [Misfit(1, "b", "x:1", "x:1: output: is empty", {"output": "", "odd": b"\xff"})])


def settled(*outcomes: Outcome) -> Account:
    account = Account(intake())
    for outcome in outcomes:
        account.settle(Anything(), outcome)
    return account


def rows() -> list[Candidate]:
    return list(intake().candidates)


@pytest.mark.parametrize(
    "kept, dropped, what",
    [
        ([0, 2, 3], [], "lost a row"),
        ([0, 2, 3, 4, 4], [], "decided about a row twice"),
        ([0, 2], [3, 4, 4], "decided about a row twice"),
        ([0, 2, 3], [3, 4], "kept and dropped the same row"),
        ([0, 2, 3], [7], "lost a row, or made one up"),
        ([2, 0, 3, 4], [], "changed the order"),
    ],
)
def test_an_outcome_that_is_no_account_of_every_row_is_caught(kept: list[int], dropped: list[int], what: str) -> None:
    known: dict[int, Candidate] = {candidate.index: candidate for candidate in rows()}
    with pytest.raises(AssertionError, match=what):
        settled(Outcome([known[index] for index in kept], [Drop(index, "x") for index in dropped]))


def test_a_drop_without_a_reason_is_caught() -> None:
    with pytest.raises(AssertionError, match="without a reason"):
        settled(Outcome(rows()[1:], [Drop(0, "")]))


def two_steps() -> Account:
    zero, _two, _three, four = rows()
    mended = Candidate(2, "a", chat("mended", origin="2"))
    first = Outcome([zero, mended, four], [Drop(3, "too long", "5 words")], {"spaces": 1}, {"mean": 0.5})
    return settled(first, Outcome([mended], [Drop(0, "near duplicate", "similarity 0.900", "2"), Drop(4, "too long")]))


def test_every_row_stands_in_one_file_as_it_was_when_it_left(tmp_path: Path) -> None:
    two_steps().write(tmp_path / "output", seed=7)
    (kept,) = read_lines(tmp_path / "output" / "rows.jsonl")
    assert (kept["messages"][1]["content"], kept["origin"]) == ("mended", "2")
    dropped = read_lines(tmp_path / "output" / "dropped.jsonl")
    assert [(row["index"], row["source"], row["step"], row["reason"], row["detail"], row["match"]) for row in dropped] == [
        (0, "a", "length", "near duplicate", "similarity 0.900", "2"),
        (1, "b", "read", "does not fit", "x:1: output: is empty", None),
        (3, "b", "length", "too long", "5 words", None),
        (4, "a", "length", "too long", "", None),
    ]
    assert dropped[2]["row"]["messages"][1]["content"] == "answer 3"
    assert dropped[1]["row"] == {"output": "", "odd": "b'\\xff'"}, "as it stands in the file, so that a person can mend it"


def test_the_report_counts_rows_in_and_out_by_step_and_source(tmp_path: Path) -> None:
    two_steps().write(tmp_path / "output", seed=7)
    report: dict[str, Any] = json.loads((tmp_path / "output" / "report.json").read_text())
    assert (report["seed"], report["num_rows_in"], report["num_rows_out"]) == (7, 5, 1)
    assert report["sources"] == {"a": {"rows_in": 3, "rows_out": 1}, "b": {"rows_in": 2, "rows_out": 0}}
    read, first, second = report["steps"]
    assert (read["step"], read["rows_in"], read["rows_out"], read["reasons"]) == ("read", 5, 4, {"does not fit": 1})
    assert first["settings"] == {"limit": 3}
    assert (first["changed"], first["changes"], first["facts"], first["reasons"]) == (1, {"spaces": 1}, {"mean": 0.5}, {"too long": 1})
    assert second["sources"] == {"a": {"rows_in": 3, "rows_out": 1}, "b": {"rows_in": 0, "rows_out": 0}}
    for step, after in zip(report["steps"], report["steps"][1:], strict=False):
        assert step["rows_in"] - step["dropped"] == step["rows_out"] == after["rows_in"]
        assert sum(step["reasons"].values()) == step["dropped"]


def test_the_table_is_text_with_a_line_for_each_step_and_one_for_all() -> None:
    table = two_steps().table()
    assert [row[:5] for row in table["rows"]] == [
        ["read", "5", "1", "0", "4"],
        ["length", "4", "1", "1", "3"],
        ["length", "3", "2", "0", "1"],
        ["all", "5", "4", "", "1"],
    ]
    assert table["rows"][1][5] == "1 too long, 1 spaces"
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert table["notes"][:2] == ["a: 1 of 3 rows are kept", "b: 0 of 2 rows are kept"]


def test_metrics_add_up_a_step_that_stands_twice() -> None:
    assert two_steps().metrics() == {
        "num_rows_in": 5.0,
        "num_rows_out": 1.0,
        "dropped_read": 1.0,
        "dropped_length": 3.0,
        "changed_length": 1.0,
    }


def test_where_nothing_is_left_the_worst_step_is_named() -> None:
    said = settled(Outcome([], [Drop(0, "too long"), *(Drop(n, "too short") for n in (2, 3, 4))])).why_empty()
    assert said == "no row is left of 5; length dropped the most, 3 as 'too short'; loosen it, or leave it out"


def test_the_files_hold_rows_of_any_text(tmp_path: Path) -> None:
    text = 'line\u2028separator, \x7f, 🙂 and "quotes"'
    row: Row = chat(text, origin="x")
    Account(Intake(["a"], [Candidate(0, "a", row)])).write(tmp_path / "output", seed=0)
    (read,) = [json.loads(line) for line in (tmp_path / "output" / "rows.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert read["messages"][1]["content"] == text
