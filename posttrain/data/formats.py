"""Formats: which one a record is in, by the names of its columns, and how it becomes a row.

A layout is a function from a record to a row, and the fields that it reads; other columns are ignored. Null counts as absent,
and so does an empty text in an optional field, since CSV has no null. Text is kept as it stands, to the last space.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.config import nearest
from posttrain.data import json_text
from posttrain.data.files import Record
from posttrain.data.json_text import names, show
from posttrain.data.rows import AnyRow, Conversation, Message, Pair, Role, Text, ToolCall
from posttrain.error import UserError

Format = Literal["messages", "prompt_completion", "alpaca", "sharegpt", "preference", "unpaired", "prompt", "text"]

ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
SHAREGPT_ROLES: dict[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}

LABELS = {"true": True, "false": False, "1": True, "0": False}
"""What a label may be, as text in small letters: CSV has no other."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How one format lies in its columns: any set of `needs` makes it recognizable, and `reads` lists all that it may use."""

    needs: tuple[frozenset[str], ...]
    reads: frozenset[str]
    row: type[Conversation] | type[Pair] | type[Text]
    build: Callable[[Record, str], AnyRow]


def rename(record: Record, columns: Mapping[str, str]) -> Record:
    """`record` under our field names; `columns` maps our name to the data's. A column that is renamed loses its old name."""
    if not columns:
        return record
    taken = set(columns.values())
    kept = {name: value for name, value in record.items() if name not in taken}
    return kept | {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}


def detect(columns: Collection[str], at: str) -> Format:
    """The one format that the column names fit. Raises `UserError`, beginning with `at`, where none does, or several do.

    Of two formats, the one that uses a strict superset of the columns of the other fits better: chosen and rejected beside
    messages make a preference, and a label makes them unpaired. `prompt` has no answers, and `text` no messages, so these are taken only
    where nothing else fits.
    """
    present = frozenset(columns)
    used = {name: layout.reads & present for name, layout in LAYOUTS.items() if any(need <= present for need in layout.needs)}
    for name in ("text", "prompt"):
        if len(used) > 1:
            used.pop(name, None)
    best = [name for name in used if not any(used[name] < other for other in used.values())]
    if len(best) == 1:
        return best[0]
    if best:
        raise UserError(f"{at}: the columns {names(columns)} fit {' and '.join(best)}; set format: to one of them")
    raise UserError(
        f"{at}: no format fits the columns {names(columns)}; name them with columns:, such as {{prompt: question, completion: answer}}"
    )


def convert(record: Record, form: Format, origin: str) -> AnyRow:
    """The row that `record`, under our field names, holds in the format `form`.

    `origin` is its place, such as `train.jsonl:17`. Raises `UserError`, and nothing else, as `origin: field: problem`.
    """
    try:
        return LAYOUTS[form].build(record, origin)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def holds(form: Format) -> str:
    """What the rows of a format are, in words: those of one data set are all of a kind."""
    return {"preference": "pairs", "unpaired": "labelled answers", "text": "plain text"}.get(form, "conversations")


def check_columns(columns: Mapping[str, str], forms: Collection[Format], at: str) -> None:
    """Refuse a rename to a field that none of `forms` reads. Raises `UserError`, beginning with `at`."""
    usable = sorted(frozenset().union(*(LAYOUTS[form].reads for form in forms)))
    whose = "any format" if set(forms) == set(LAYOUTS) else " or ".join(sorted(set(forms)))
    for ours in columns:
        if ours not in usable:
            raise UserError(f"{at}: {show(ours)} is no field of {whose}; {nearest(ours, usable)}")


# From a record to a row, one function a format.


def _from_messages(record: Record, origin: str) -> Conversation:
    return _conversation(_messages(_required(record, "messages"), "messages"), record, origin, "messages")


def _from_prompt_completion(record: Record, origin: str) -> Conversation:
    prompt = _text_or_messages(_required(record, "prompt"), "prompt", "user")
    if _no_answer(record, "completion"):
        return _conversation(prompt, record, origin, "completion")
    completion = _text_or_messages(_required(record, "completion"), "completion", "assistant", opens=False)
    if not _has_assistant(completion):
        raise UserError("completion: has no assistant message; add the answer")
    # Only the completion is there to be learned: answers given earlier, in the prompt, are context.
    context = [_untrained(message) for message in prompt]
    return _conversation(context + completion, record, origin, "completion")


def _from_alpaca(record: Record, origin: str) -> Conversation:
    messages = _system(record) + _history(record) + [_instruction(record)]
    if not _no_answer(record, "output"):
        output = _text(_required(record, "output"), "output")
        messages.append({"role": "assistant", "content": output})
    return _conversation(messages, record, origin, "output")


def _from_sharegpt(record: Record, origin: str) -> Conversation:
    messages = _with_system(record, _messages(_required(record, "conversations"), "conversations", sharegpt=True), "conversations")
    return _conversation(messages, record, origin, "conversations")


def _from_prompt(record: Record, origin: str) -> Conversation:
    if _absent(record, "prompt") and not _absent(record, "instruction"):
        prompt = [_instruction(record)]
    else:
        prompt = _text_or_messages(_required(record, "prompt"), "prompt", "user")
    _check_open(prompt, "prompt")
    return Conversation(prompt, _tools(record), _checks(record), origin)


def _from_preference(record: Record, origin: str) -> Pair:
    chosen = _answer(record, "chosen")
    rejected = _answer(record, "rejected")
    at = next((name for name in ("prompt", "conversations", "messages") if not _absent(record, name)), None)
    if at is None:
        prompt, chosen, rejected = _split_prefix(record, chosen, rejected)
    else:
        prompt = _text_or_messages(record[at], at, "user", sharegpt=True)
        chosen, rejected = _strip_prompt(prompt, chosen, rejected, at)
    prompt = _with_system(record, prompt, at or "chosen")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(answer, name)
    return Pair(prompt, chosen, rejected, _tools(record), origin, _margin(record))


def _from_unpaired(record: Record, origin: str) -> Conversation:
    label = _label(record)
    at = next((name for name in ("messages", "conversations") if not _absent(record, name) and record.get("completion") is None), None)
    if at is None:
        at = "completion"
        prompt = _text_or_messages(_required(record, "prompt"), "prompt", "user")
        answer = _text_or_messages(_required(record, at), at, "assistant", opens=False)
        if len(answer) > 1:
            raise UserError(f"{at}: holds {len(answer)} messages; let it hold the one answer that has the label, and the prompt all before")
    else:
        messages = _messages(record[at], at, sharegpt=at == "conversations")
        prompt, answer = messages[:-1], messages[-1:]
        if not prompt:
            raise UserError(f"{at}: holds one message; add the prompt before the answer")
    if (last := answer[0]["role"]) != "assistant":
        raise UserError(f"{at}: ends with a {last} message; it must end with the answer that has the label")
    context = [_untrained(message) for message in _with_system(record, prompt, at)]
    return Conversation(context + answer, _tools(record), [], origin, label)


def _from_text(record: Record, origin: str) -> Text:
    return Text(_text(_required(record, "text"), "text"), origin)


def _label(record: Record) -> bool:
    value = _required(record, "label")
    label = LABELS.get(str(value).casefold()) if isinstance(value, (bool, int, str)) else None
    if label is None:
        raise UserError(
            f"label: must be true or false, got {show(value)}; where it is no verdict on the answer, set format: to one without"
        )
    return label


# What the preference format adds.


def _margin(record: Record) -> float | None:
    if _absent(record, "margin"):
        return None
    value = record["margin"]
    try:
        margin = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        margin = math.nan
    if not math.isfinite(margin):
        raise UserError(f"margin: must be a number, by how much the chosen answer is the better, got {show(value)}")
    return margin


def _answer(record: Record, name: str) -> list[Message]:
    value = _required(record, name)
    if isinstance(value, dict):
        return [_message(value, name, sharegpt=True)]
    return _text_or_messages(value, name, "assistant", sharegpt=True)


def _split_prefix(record: Record, chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """The prompt is what both lists begin with; the last message of each stays an answer even where the lists are equal."""
    for name in ("chosen", "rejected"):
        if not isinstance(record[name], list):
            raise UserError(f"{name}: is only an answer, and there is no prompt; add the prompt, or name its column with columns:")
    length = 0
    while length < min(len(chosen), len(rejected)) - 1 and chosen[length] == rejected[length]:
        length += 1
    if length == 0:
        raise UserError("chosen: shares no first message with rejected, so there is no prompt; add the prompt, or begin both with it")
    return chosen[:length], chosen[length:], rejected[length:]


def _strip_prompt(prompt: list[Message], chosen: list[Message], rejected: list[Message], at: str) -> tuple[list[Message], list[Message]]:
    repeats = [answer[: len(prompt)] == prompt for answer in (chosen, rejected)]
    if all(repeats):
        return chosen[len(prompt) :], rejected[len(prompt) :]
    if any(repeats):
        first, other = ("chosen", "rejected") if repeats[0] else ("rejected", "chosen")
        raise UserError(f"{first}: repeats the {at} and {other} does not; let both hold only the answer")
    return chosen, rejected


def _check_answer(answer: list[Message], at: str) -> None:
    if not answer:
        raise UserError(f"{at}: holds only the prompt; add the answer")
    if answer[0]["role"] != "assistant":
        raise UserError(f"{at}: the answer begins with a {answer[0]['role']} message; both answers must follow one and the same prompt")
    if answer[-1]["role"] != "assistant":
        raise UserError(f"{at}: ends with a {answer[-1]['role']} message; it must end with an assistant message")


# Parts of a record.


def _conversation(messages: list[Message], record: Record, origin: str, at: str) -> Conversation:
    checks = _checks(record)
    if not _has_assistant(messages):
        if not checks:
            raise UserError(f"{at}: has no assistant message; add the answer, or checks, or set format: prompt")
        _check_open(messages, at)
    return Conversation(messages, _tools(record), checks, origin)


def _check_open(messages: list[Message], at: str) -> None:
    if (last := messages[-1]["role"]) not in ("user", "tool"):
        raise UserError(f"{at}: a prompt to answer must end with a user or tool message, got {last}")


def _system(record: Record) -> list[Message]:
    return [] if _absent(record, "system") else [{"role": "system", "content": _text(record["system"], "system")}]


def _with_system(record: Record, messages: list[Message], at: str) -> list[Message]:
    system = _system(record)
    if system and messages[0]["role"] == "system":
        raise UserError(f"system: is given here and as the first message of {at}; keep one")
    return system + messages


def _instruction(record: Record) -> Message:
    parts = [_text(record[name], name) for name in ("instruction", "input") if not _absent(record, name)]
    if not parts:
        raise UserError("instruction: is missing or empty; add the text to answer")
    return {"role": "user", "content": "\n\n".join(parts)}


def _history(record: Record) -> list[Message]:
    if _absent(record, "history"):
        return []
    turns = record["history"]
    if not isinstance(turns, list):
        raise UserError(f"history: must be a list of [question, answer] pairs, got {show(turns)}")
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        at = f"history[{index}]"
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(f"{at}: must be a pair [question, answer], got {show(turn)}")
        messages.append({"role": "user", "content": _text(turn[0], f"{at}[0]")})
        messages.append({"role": "assistant", "content": _text(turn[1], f"{at}[1]")})
    return messages


def _tools(record: Record) -> list[dict[str, Any]] | None:
    """The tools as JSON schemas; a bare `{"name", "description", "parameters"}` is wrapped as templates expect it."""
    tools: list[dict[str, Any]] = []
    for index, tool in enumerate(_objects(record, "tools")):
        at = f"tools[{index}]"
        function = tool.get("function", tool)
        if not isinstance(function, dict):
            raise UserError(f"{at}.function: must be an object with a name, got {show(function)}")
        _text(function.get("name"), f"{at}.{'function.' if 'function' in tool else ''}name")
        tools.append({"type": "function", "function": function})
    return tools or None


def _checks(record: Record) -> list[dict[str, Any]]:
    checks = _objects(record, "checks")
    for index, check in enumerate(checks):
        _text(check.get("kind"), f"checks[{index}].kind")
    return checks + _instructions(record)


def _instructions(record: Record) -> list[dict[str, Any]]:
    """The checks of a row as IFEval has them: ids of instructions, and at the same place in `kwargs` the fields of each."""
    if _absent(record, "instruction_id_list"):
        return []
    ids = _parsed(record["instruction_id_list"], "instruction_id_list")
    if not isinstance(ids, list):
        raise UserError(f"instruction_id_list: must be a list of ids, or one as JSON text, got {show(ids)}")
    fields = _objects(record, "kwargs")
    if len(fields) != len(ids):
        raise UserError(f"kwargs: has {len(fields)} entries for {len(ids)} instructions; give an object for each, if only {{}}")
    return [
        {"kind": "instruction", "id": _text(name, f"instruction_id_list[{index}]")} | given
        for index, (name, given) in enumerate(zip(ids, fields, strict=True))
    ]


def _objects(record: Record, name: str) -> list[dict[str, Any]]:
    """An optional field that holds a list of plain JSON objects, or such a list as JSON text."""
    if _absent(record, name):
        return []
    value = _parsed(record[name], name)
    if not isinstance(value, list):
        raise UserError(f"{name}: must be a list of objects, or one as JSON text, got {show(value)}")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise UserError(f"{name}[{index}]: must be an object, got {show(item)}")
        if problem := json_text.problem_with(item):
            raise UserError(f"{name}[{index}]: {problem}")
    return value


# Messages.


def _text_or_messages(value: object, at: str, role: Role, *, opens: bool = True, sharegpt: bool = False) -> list[Message]:
    """Text becomes one message of `role`; `opens` says whether the list may begin with a system message."""
    if isinstance(value, str):
        return [{"role": role, "content": _text(value, at)}]
    if not isinstance(value, list):
        raise UserError(f"{at}: must be text or messages, got {show(value)}")
    return _messages(value, at, opens=opens, sharegpt=sharegpt)


def _messages(value: object, at: str, *, opens: bool = True, sharegpt: bool = False) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"{at}: must be a list of messages, got {show(value)}")
    if not value:
        raise UserError(f"{at}: is an empty list; it must hold at least one message")
    messages = [_message(item, f"{at}[{index}]", sharegpt=sharegpt) for index, item in enumerate(value)]
    for index, message in enumerate(messages):
        if message["role"] == "system" and not (opens and index == 0):
            raise UserError(f"{at}[{index}].role: a system message may only be the first of all; move it there or remove it")
    return messages


def _message(value: object, at: str, *, sharegpt: bool) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"{at}: must be an object with role and content, got {show(value)}")
    by_from = sharegpt and "from" in value
    role_key, content_key = ("from", "value") if by_from else ("role", "content")
    named = value.get(role_key)
    role = _role(value, named, f"{at}.{role_key}", sharegpt=sharegpt)
    message: Message = {"role": role, "content": ""}
    if named == "function_call":
        message["tool_calls"] = _tool_calls(value.get(content_key), f"{at}.{content_key}")
    elif (calls := value.get("tool_calls")) not in (None, []):
        if role != "assistant":
            raise UserError(f"{at}.tool_calls: only an assistant message calls tools, and this is a {role} message")
        message["tool_calls"] = _tool_calls(calls, f"{at}.tool_calls")
    if named != "function_call":
        message["content"] = _content(value.get(content_key), f"{at}.{content_key}", role, optional="tool_calls" in message)
    _add_options(message, value, at)
    return message


def _role(value: Record, named: object, at: str, *, sharegpt: bool) -> Role:
    if named is None:
        hint = "; this looks like format: sharegpt" if "from" in value and not sharegpt else ""
        raise UserError(f"{at}: is missing; each message needs one of system, user, assistant or tool{hint}")
    known = ROLES | SHAREGPT_ROLES if sharegpt else ROLES
    if not isinstance(named, str) or named not in known:
        *most, last = SHAREGPT_ROLES if at.endswith(".from") else ROLES
        raise UserError(f"{at}: {show(named)} is not a role; use {', '.join(most)} or {last}")
    return known[named]


def _add_options(message: Message, value: Record, at: str) -> None:
    if (name := value.get("name")) is not None:
        message["name"] = _text(name, f"{at}.name")
    if (train := value.get("train")) is not None:
        if not isinstance(train, bool):
            raise UserError(f"{at}.train: must be true or false, got {show(train)}")
        message["train"] = train


def _content(value: object, at: str, role: Role, *, optional: bool) -> str:
    """The text of a message, from text or from a list of text parts, which are joined without a separator."""
    if value is None and optional:
        return ""
    if isinstance(value, list):
        value = "".join(_part(part, f"{at}[{index}]") for index, part in enumerate(value))
    if not isinstance(value, str):
        raise UserError(f"{at}: must be text or a list of text parts, got {show(value)}")
    if optional and not value.strip():
        return ""
    if role == "assistant" and not value.strip():
        raise UserError(f"{at}: the answer is empty; remove the message or the row")
    return _text(value, at)


def _part(value: object, at: str) -> str:
    if not isinstance(value, dict):
        raise UserError(f'{at}: must be {{"type": "text", "text": ...}}, got {show(value)}')
    if value.get("type") != "text":
        raise UserError(f"{at}.type: {show(value.get('type'))} is not supported; only parts of type 'text' are")
    if not isinstance(text := value.get("text"), str):
        raise UserError(f"{at}.text: must be text, got {show(text)}")
    return text


def _tool_calls(value: object, at: str) -> list[ToolCall]:
    """Calls from a list, a single object, or JSON text of either; each bare or under the key `function`."""
    value = _parsed(value, at)
    if isinstance(value, dict):
        return [_tool_call(value, at)]
    if not isinstance(value, list) or not value:
        raise UserError(f"{at}: must be a list of tool calls, got {show(value)}")
    return [_tool_call(call, f"{at}[{index}]") for index, call in enumerate(value)]


def _tool_call(value: object, at: str) -> ToolCall:
    if isinstance(value, dict) and "function" in value:
        value, at = value["function"], f"{at}.function"
    if not isinstance(value, dict):
        raise UserError(f"{at}: must be an object with name and arguments, got {show(value)}")
    name = _text(value.get("name"), f"{at}.name")
    arguments = _parsed(value.get("arguments"), f"{at}.arguments")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise UserError(f"{at}.arguments: must be an object, or one as JSON text, got {show(arguments)}")
    if problem := json_text.problem_with(arguments):
        raise UserError(f"{at}.arguments: {problem}")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


# Values.


def _required(record: Record, name: str) -> Any:
    value = record.get(name)
    if value is None:
        raise UserError(f"{name}: is missing or null; the row has {names(record)}")
    return value


def _absent(record: Record, name: str) -> bool:
    return record.get(name) in (None, "")


def _no_answer(record: Record, name: str) -> bool:
    return _absent(record, name) and bool(_checks(record))


def _text(value: object, at: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{at}: must be text, got {show(value)}")
    if not value.strip():
        raise UserError(f"{at}: is empty; fill it in, or remove it or the row")
    if problem := json_text.surrogate_in(value):
        raise UserError(f"{at}: {problem}")
    return value


def _parsed(value: object, at: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json_text.parse(value)
    except json_text.BadJSON as error:
        raise UserError(f"{at}: {show(value)} is not valid JSON: {error}") from None


def _has_assistant(messages: list[Message]) -> bool:
    return any(message["role"] == "assistant" for message in messages)


def _untrained(message: Message) -> Message:
    return {**message, "train": message.get("train", False)} if message["role"] == "assistant" else message


def _layout(
    build: Callable[[Record, str], AnyRow], row: type[Conversation] | type[Pair] | type[Text], needs: list[str], also: str = ""
) -> Layout:
    sets = tuple(frozenset(need.split()) for need in needs)
    return Layout(sets, frozenset().union(*sets) | frozenset(also.split()), row, build)


CHECKS = "checks instruction_id_list kwargs"
"""Columns that say what an answer must pass."""

LAYOUTS: dict[Format, Layout] = {
    "messages": _layout(_from_messages, Conversation, ["messages"], f"tools {CHECKS}"),
    "prompt_completion": _layout(_from_prompt_completion, Conversation, ["prompt completion"], f"tools {CHECKS}"),
    "alpaca": _layout(_from_alpaca, Conversation, ["instruction output"], f"input system history {CHECKS}"),
    "sharegpt": _layout(_from_sharegpt, Conversation, ["conversations"], f"system tools {CHECKS}"),
    "preference": _layout(_from_preference, Pair, ["chosen rejected"], "prompt conversations messages system tools margin"),
    "unpaired": _layout(_from_unpaired, Conversation, ["prompt completion label", "messages label", "conversations label"], "system tools"),
    "prompt": _layout(_from_prompt, Conversation, ["prompt", "instruction checks"], f"input tools {CHECKS}"),
    "text": _layout(_from_text, Text, ["text"]),
}
