"""Rows as JSON records: written so that every reader of data sets, ours first of all, reads back the very same rows.

A conversation becomes `messages`, or `prompt` where a data set holds prompts without answers; a pair becomes `prompt`,
`chosen` and `rejected`; `tools`, `checks`, `label` and `margin` stand beside them where a row has any. `origin` is for people.
"""

from typing import Any

from posttrain.data.files import Record
from posttrain.data.rows import Conversation, Pair, Row


def is_bare(row: Row) -> bool:
    """Whether the row is only a prompt, with neither answers nor checks: as `messages` it would read as one with an answer missing."""
    return isinstance(row, Conversation) and not row.checks and not any(message["role"] == "assistant" for message in row.messages)


def is_answered(row: Row) -> bool:
    """Whether the row ends with an answer, so that it cannot be read as a prompt."""
    return isinstance(row, Pair) or row.messages[-1]["role"] == "assistant"


def to_record(row: Row, *, as_prompt: bool = False) -> Record:
    """The record of a row. `as_prompt` is for data sets that hold a bare prompt; all their rows must then be prompts."""
    record: dict[str, Any]
    if isinstance(row, Conversation):
        assert not (as_prompt and is_answered(row)), f"{row.origin} holds an answer"
        record = {"prompt" if as_prompt else "messages": row.messages}
        if row.checks:
            record["checks"] = row.checks
        if row.label is not None:
            record["label"] = row.label
    else:
        # Where an answer begins as its prompt does, readers take that for the prompt said again; so it is, for both.
        again = row.prompt if row.prompt in (row.chosen[: len(row.prompt)], row.rejected[: len(row.prompt)]) else []
        record = {"prompt": row.prompt, "chosen": again + row.chosen, "rejected": again + row.rejected}
        if row.margin is not None:
            record["margin"] = row.margin
    if row.tools:
        record["tools"] = row.tools
    return {**record, "origin": row.origin}


def to_state(row: Row) -> dict[str, Any]:
    """The fields of a row, for our own files; `from_state` is its inverse."""
    return {name: getattr(row, name) for name in type(row).__slots__}


def from_state(state: dict[str, Any]) -> Row:
    """The row that `to_state` was given."""
    return Conversation(**state) if "messages" in state else Pair(**state)
