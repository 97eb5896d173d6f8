"""What every data set becomes: conversations, which may bear labels, pairs of answers to one prompt, or plain text. Nothing here checks
input.

A row is what `formats` made of one record, so it may be relied upon: every content is text, only an assistant message with
tool calls has an empty one, a system message stands first or not at all, and both answers of a pair end with the assistant.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

Role = Literal["system", "user", "assistant", "tool"]


class Function(TypedDict):
    """A function and the arguments that it is called with."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """One call that an assistant message makes."""

    type: Literal["function"]
    function: Function


class Message(TypedDict):
    """One turn. `train: False` keeps an assistant turn in the context and out of the loss."""

    role: Role
    content: str
    tool_calls: NotRequired[list[ToolCall]]
    name: NotRequired[str]
    train: NotRequired[bool]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order. Without an assistant message it is a prompt to answer."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    """JSON schemas of the functions on offer, each `{"type": "function", "function": {...}}`; None, never an empty list."""
    checks: list[dict[str, Any]]
    """What an answer must pass, each with a `kind`; empty where nothing is checked."""
    origin: str
    """Where the row stands: `path:line`, `path[index]` or `hub-id[index]`."""
    label: bool | None = None
    """Whether its answer, the one assistant message without `train: False`, is desirable; None where nobody said."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and two answers, the chosen one the better. The answers hold only what follows the prompt."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[dict[str, Any]] | None
    """As in `Conversation`."""
    origin: str
    """As in `Conversation`."""
    margin: float | None = None
    """By how much the chosen answer is the better, where somebody said."""


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text that nobody says: how well a policy predicts it is measured, and nothing else is done with it."""

    text: str
    origin: str
    """As in `Conversation`."""


Row = Conversation | Pair
"""What stages read."""
AnyRow = Row | Text
"""What a data set may hold."""


def split_pairs(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, and in the place of each pair two conversations: with its chosen answer, desirable, and with its rejected one."""
    for row in rows:
        if isinstance(row, Conversation):
            yield row
            continue
        for answer, label in ((row.chosen, True), (row.rejected, False)):
            yield Conversation([*_trained(row.prompt, False), *_trained(answer, True)], row.tools, [], row.origin, label)


def _trained(messages: list[Message], train: bool) -> list[Message]:
    return [{**message, "train": train} if message["role"] == "assistant" else message for message in messages]


def pick_evenly(indices: Sequence[int], count: int) -> set[int]:
    """So many of the rows, or all if they are fewer, evenly spread."""
    most = min(count, len(indices))
    return {indices[number * len(indices) // most] for number in range(most)}


def prompt_text(row: AnyRow) -> str:
    """The roles and contents of the prompt as one text: the key by which the held-out split keeps rows together.

    The prompt of a conversation ends before the first assistant message that answers something; an opening greeting by the
    assistant is part of it, since otherwise all conversations that open so would share the empty prompt. Plain text is all prompt.
    """
    if isinstance(row, Text):
        return row.text
    return "".join(f"{message['role']}\n{message['content']}\n" for message in _prompt(row))


def question(row: AnyRow) -> str:
    """What is asked, in a form that two rows share if they ask the same: without system prompt, white space and case aside."""
    if isinstance(row, Text):
        return " ".join(row.text.casefold().split())
    asked = [message["content"] for message in _prompt(row) if message["role"] in ("user", "tool")]
    return " ".join(" ".join(asked).casefold().split())


def asked_messages(row: Row) -> list[Message]:
    """The messages that an answer is to follow: the prompt of a pair, or a conversation up to the answer that it ends with, if any."""
    if isinstance(row, Pair):
        return row.prompt
    return row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages


def asked_turns(row: Row) -> list[list[Message]]:
    """`asked_messages`, cut wherever a policy is to answer: where one user message follows another, and at the end."""
    turns: list[list[Message]] = [[]]
    for message in asked_messages(row):
        if message["role"] == "user" and turns[-1] and turns[-1][-1]["role"] == "user":
            turns.append([])
        turns[-1].append(message)
    return turns


def _prompt(row: Row) -> list[Message]:
    if isinstance(row, Pair):
        return row.prompt
    asked = False
    for index, message in enumerate(row.messages):
        if asked and message["role"] == "assistant":
            return row.messages[:index]
        asked = asked or message["role"] in ("user", "tool")
    return row.messages if asked else [message for message in row.messages if message["role"] == "system"]
