"""A row that is written is the row that is read back, whatever is in it, by the same reader as any other data set."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.config import DataSource
from posttrain.curate.records import from_state, is_bare, to_record, to_state
from posttrain.data.rows import Conversation, Pair, Row
from posttrain.data.source import open_source

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=3)
CALL = st.builds(lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}}, TEXT, OBJECT)
TOOLS = st.none() | st.lists(
    st.builds(lambda name, more: {"type": "function", "function": {**more, "name": name}}, TEXT, OBJECT), min_size=1, max_size=2
)
CHECK = st.builds(lambda kind, more: {**more, "kind": kind}, TEXT, OBJECT)
CHECKS = st.lists(CHECK, max_size=2)


def message(role: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"role": st.just(role), "content": TEXT}, optional={"name": TEXT})


ASSISTANT = st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXT}, optional={"train": st.booleans(), "name": TEXT}) | (
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.just("") | TEXT, "tool_calls": st.lists(CALL, min_size=1, max_size=2)}
    )
)
ASKING = message("user") | message("tool")
SYSTEM = st.lists(message("system"), max_size=1)
TURNS = st.lists(ASSISTANT | ASKING, max_size=3)


def conversation(messages: list[Any], tools: Any, checks: Any) -> Conversation:
    return Conversation(messages, tools, checks, "x.jsonl:1")


ANSWERED = st.builds(lambda s, a, b, t, c: conversation([*s, *a, b], t, c), SYSTEM, TURNS, ASSISTANT, TOOLS, CHECKS)
CHECKED = st.builds(
    lambda s, a, b, t, c: conversation([*s, *a, b], t, c), SYSTEM, TURNS, ASKING, TOOLS, st.lists(CHECK, min_size=1, max_size=2)
)
PROMPTS = st.builds(lambda s, a, b, t, c: conversation([*s, *a, b], t, c), SYSTEM, TURNS, ASKING, TOOLS, CHECKS)
FOLLOWS = st.builds(lambda first, between, last: [first, *between, last], ASSISTANT, TURNS, ASSISTANT) | st.lists(
    ASSISTANT, min_size=1, max_size=2
)
PAIRS = st.builds(
    lambda s, p, again, c, r, t, m: Pair([*s, *p], (p if again and p[0]["role"] == "assistant" else []) + c, r, t, "x.jsonl:1", m),
    SYSTEM,
    st.lists(ASSISTANT | ASKING, min_size=1, max_size=2),
    st.booleans(),
    FOLLOWS,
    FOLLOWS,
    TOOLS,
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
)
LABELLED = st.builds(
    lambda s, a, b, t, label: Conversation([*s, a, b], t, [], "x.jsonl:1", label), SYSTEM, ASKING, ASSISTANT, TOOLS, st.booleans()
)
ANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def read_back(path: Path, rows: list[Any]) -> list[Row]:
    as_prompt = any(is_bare(row) for row in rows)
    lines = [json.dumps(to_record(row, as_prompt=as_prompt), ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return list(open_source(DataSource(data=str(path)), "sources.x").rows())


def state(row: Row) -> dict[str, Any]:
    return {name: value for name, value in to_state(row).items() if name != "origin"}


@pytest.mark.parametrize("rows", [st.lists(ANSWERED | CHECKED, min_size=1, max_size=3), st.lists(PROMPTS, min_size=1, max_size=3),
                                  st.lists(PAIRS, min_size=1, max_size=3), st.lists(LABELLED, min_size=1, max_size=3)],
                         ids=["conversations", "prompts", "pairs", "labelled"])  # fmt: skip
def test_rows_are_read_back_as_they_were(tmp_path: Path, rows: st.SearchStrategy[list[Row]]) -> None:
    @ANY
    @given(rows)
    def check(rows: list[Row]) -> None:
        assert [state(row) for row in read_back(tmp_path / "rows.jsonl", rows)] == [state(row) for row in rows]

    check()


@ANY
@given(ANSWERED | PROMPTS | PAIRS | LABELLED)
def test_the_state_of_a_row_survives_json(row: Row) -> None:
    assert from_state(json.loads(json.dumps(to_state(row)))) == row


def test_the_record_is_what_others_read_too() -> None:
    row = Conversation([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], None, [], "x.jsonl:7")
    assert to_record(row) == {"messages": row.messages, "origin": "x.jsonl:7"}
    two = Pair(row.messages[:1], row.messages[1:], [{"role": "assistant", "content": "b"}], None, "x.jsonl:8")
    assert to_record(two) == {"prompt": two.prompt, "chosen": two.chosen, "rejected": two.rejected, "origin": "x.jsonl:8"}


@pytest.mark.real
@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "glaive_toolcall_en_demo.json", "dpo_en_demo.json"])
def test_real_rows_are_read_back_as_they_were(shared: Path, tmp_path: Path, name: str) -> None:
    rows = list(open_source(DataSource(data=str(shared / "data" / "llamafactory_demo" / name)), "x").rows())
    assert [state(row) for row in read_back(tmp_path / "rows.jsonl", rows)] == [state(row) for row in rows]
