"""The text of a row: read by steps that judge it, rewritten by steps that mend it."""

from collections.abc import Callable
from dataclasses import replace

from posttrain.data.rows import Conversation, Message, Row


def prompt_of(row: Row) -> str:
    """What is asked: all messages of a pair's prompt, or of a conversation before its last answer, without system messages."""
    messages = row.prompt if not isinstance(row, Conversation) else _asked(row.messages)
    return "\n\n".join(message["content"] for message in messages if message["role"] != "system")


def answers_of(row: Row) -> list[str]:
    """What is learned: the last answer of a conversation (none, if it is only a prompt), or chosen and rejected of a pair."""
    if isinstance(row, Conversation):
        return [row.messages[-1]["content"]] if row.messages[-1]["role"] == "assistant" else []
    return ["\n\n".join(message["content"] for message in answer) for answer in (row.chosen, row.rejected)]


def texts_of(row: Row) -> list[str]:
    """The contents of all messages, in order; of a pair the prompt's, then the answers'."""
    return [message["content"] for message in messages_of(row)]


def answer_texts_of(row: Row) -> list[str]:
    """The contents of all assistant messages that may be learned from, in order."""
    messages = row.messages if isinstance(row, Conversation) else [*row.chosen, *row.rejected]
    return [message["content"] for message in messages if message["role"] == "assistant"]


def map_texts(row: Row, change: Callable[[str], str]) -> Row:
    """The row with every content changed; the very same object where nothing changes."""
    return map_messages(row, lambda message: {**message, "content": change(message["content"])})


def map_messages(row: Row, change: Callable[[Message], Message]) -> Row:
    """The row with every message changed; the very same object where nothing changes."""

    def changed(messages: list[Message]) -> list[Message]:
        return [change(message) for message in messages]

    if isinstance(row, Conversation):
        messages = changed(row.messages)
        return row if messages == row.messages else replace(row, messages=messages)
    prompt, chosen, rejected = changed(row.prompt), changed(row.chosen), changed(row.rejected)
    if (prompt, chosen, rejected) == (row.prompt, row.chosen, row.rejected):
        return row
    return replace(row, prompt=prompt, chosen=chosen, rejected=rejected)


def messages_of(row: Row) -> list[Message]:
    """All messages, in order; of a pair the prompt's, then the answers'."""
    return row.messages if isinstance(row, Conversation) else [*row.prompt, *row.chosen, *row.rejected]


def _asked(messages: list[Message]) -> list[Message]:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages
