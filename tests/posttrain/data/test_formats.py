"""Each format becomes the same rows; whatever does not fit is one line that names the place and the field."""

from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.config import DataSource
from posttrain.data.formats import LAYOUTS, Format, convert, detect, rename
from posttrain.data.rows import Conversation, Pair, Text, asked_turns, prompt_text, question
from posttrain.error import UserError

U = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
T = {"role": "tool", "content": "1"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CHECKS = [{"kind": "exact", "answer": "4"}]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def fails(record: dict[str, object], form: Format) -> str:
    with pytest.raises(UserError) as caught:
        convert(record, form, "x.jsonl:3")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("x.jsonl:3: ")
    return message.removeprefix("x.jsonl:3: ")


def test_the_formats_are_those_that_a_config_may_name():
    assert set(get_args(Format)) == set(LAYOUTS) == set(get_args(get_args(DataSource.model_fields["format"].annotation)[0]))


CONVERSATIONS = [
    ("messages", {"messages": [S, U, A]}, [S, U, A]),
    ("messages", {"messages": [A, U, A]}, [A, U, A]),
    ("messages", {"messages": [U, U, A, A]}, [U, U, A, A]),
    ("messages", {"messages": [U, CALLED, T, A]}, [U, CALLED, T, A]),
    ("messages", {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}, [U, CALLED]),
    ("messages", {"messages": [U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]}]}, [U, CALLED]),
    ("messages", {"messages": [U, {**A, "tool_calls": None, "name": None, "train": None}]}, [U, A]),
    ("messages", {"messages": [{**U, "name": "eve"}, {**A, "train": False}]}, [{**U, "name": "eve"}, {**A, "train": False}]),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]}, A]},
        [said("user", "qr"), A],
    ),
    ("prompt_completion", {"prompt": "q", "completion": "a"}, [U, A]),
    ("prompt_completion", {"prompt": " q\n", "completion": " a "}, [said("user", " q\n"), said("assistant", " a ")]),
    ("prompt_completion", {"prompt": [S, U], "completion": [A]}, [S, U, A]),
    ("prompt_completion", {"prompt": [U], "completion": "a"}, [U, A]),
    ("prompt_completion", {"prompt": "q", "completion": [CALLED, T, A]}, [U, CALLED, T, A]),
    ("prompt_completion", {"prompt": [U, A, U], "completion": "a"}, [U, {**A, "train": False}, U, A]),
    ("alpaca", {"instruction": "q", "output": "a"}, [U, A]),
    ("alpaca", {"instruction": "q", "input": "", "output": "a", "system": "", "history": None}, [U, A]),
    ("alpaca", {"instruction": "q", "input": "i", "output": "a"}, [said("user", "q\n\ni"), A]),
    ("alpaca", {"instruction": "", "input": "i", "output": "a"}, [said("user", "i"), A]),
    ("alpaca", {"instruction": "q", "output": "a", "system": "s", "history": [["q", "a"]]}, [S, U, A, U, A]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [U, A]),
    ("sharegpt", {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, [U, A]),
    (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [S, U, A],
    ),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, [S, U, A]),
]


@pytest.mark.parametrize("form, record, messages", CONVERSATIONS)
def test_a_record_becomes_a_conversation_and_its_columns_tell_the_format(form, record, messages):
    assert convert(record, form, "x.jsonl:3") == Conversation(messages, None, [], "x.jsonl:3")
    assert detect(record, "sources.x: format") == form


@pytest.mark.parametrize("value", ['{"name": "f", "arguments": {"x": 1}}', '[{"name": "f", "arguments": {"x": 1}}]'])
@pytest.mark.parametrize("result", ["observation", "tool"])
def test_sharegpt_function_calls_become_tool_calls(value, result):
    turns = [("human", "q"), ("function_call", value), (result, "1"), ("gpt", "a")]
    record = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    assert convert(record, "sharegpt", "x:1").messages == [U, CALLED, T, A]


@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], '[{"name": "f", "parameters": {}}]', [{"function": TOOL["function"]}]])
@pytest.mark.parametrize("form, columns", [("messages", {"messages": [U, A]}), ("sharegpt", {"conversations": [U, A]})])
def test_tools_are_wrapped_one_way_whichever_way_they_come(tools, form, columns):
    assert convert({**columns, "tools": tools}, form, "x:1").tools == [TOOL]


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools_are_none(tools):
    assert convert({"messages": [U, A], "tools": tools}, "messages", "x:1").tools is None


PAIRS = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": [U], "chosen": [A], "rejected": [said("assistant", "b")]},
    {"prompt": "q", "chosen": A, "rejected": said("assistant", "b")},
    {"prompt": "q", "chosen": [U, A], "rejected": [U, said("assistant", "b")]},
    {"prompt": "q", "chosen": [U, A], "rejected": [U, said("assistant", "b")], "messages": [U, A]},
    {"chosen": [U, A], "rejected": [U, said("assistant", "b")]},
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": [{"from": "gpt", "value": "a"}],
        "rejected": [{"from": "gpt", "value": "b"}],
    },
    {"messages": [U], "chosen": A, "rejected": [said("assistant", "b")]},
    {"messages": [U], "chosen": "a", "rejected": "b"},
]


@pytest.mark.parametrize("record", PAIRS)
def test_every_form_of_a_preference_becomes_the_same_pair(record):
    assert convert(record, "preference", "x[0]") == Pair([U], [A], [said("assistant", "b")], None, "x[0]")
    assert detect(record, "sources.x: format") == "preference"


def test_an_implicit_prompt_ends_at_the_last_common_message():
    common = [S, U, CALLED, T]
    pair = convert({"chosen": [*common, A], "rejected": [*common, CALLED, T, A]}, "preference", "x:1")
    assert (pair.prompt, pair.chosen, pair.rejected) == (common, [A], [CALLED, T, A])


def test_equal_answers_stay_answers():
    assert convert({"chosen": [U, A], "rejected": [U, A]}, "preference", "x:1") == Pair([U], [A], [A], None, "x:1")


@pytest.mark.parametrize(
    "record, messages",
    [
        ({"prompt": "q", "completion": "a"}, [U, A]),
        ({"prompt": [S, U], "completion": [A]}, [S, U, A]),
        ({"prompt": [U, A, U], "completion": "a"}, [U, {**A, "train": False}, U, A]),
        ({"prompt": "q", "completion": "a", "messages": [U, said("assistant", "other")]}, [U, A]),
        ({"messages": [U, A]}, [U, A]),
        ({"messages": [U, CALLED, T, A]}, [U, {**CALLED, "train": False}, T, A]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, [S, U, A]),
    ],
)
def test_a_label_is_of_the_last_answer_and_all_before_is_context(record, messages):
    labels = [(True, True), (False, False), (1, True), (0, False), ("True", True), ("false", False), ("1", True), ("0", False)]
    for value, label in labels:
        labelled = {**record, "label": value}
        assert convert(labelled, "unpaired", "x:1") == Conversation(messages, None, [], "x:1", label)
        assert detect(labelled, "sources.x: format") == "unpaired"


@pytest.mark.parametrize(("value", "margin"), [(1, 1.0), (0.5, 0.5), ("0.25", 0.25), (-1, -1.0), ("", None), (None, None)])
def test_the_margin_of_a_pair_is_a_number(value, margin):
    pair = convert({"prompt": "q", "chosen": "a", "rejected": "b", "margin": value}, "preference", "x:1")
    assert isinstance(pair, Pair)
    assert pair.margin == margin


def test_a_system_column_opens_the_prompt_of_a_pair():
    assert convert({"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}, "preference", "x:1").prompt == [S, U]


@pytest.mark.parametrize(
    "record, messages",
    [
        ({"prompt": "q"}, [U]),
        ({"prompt": [S, U, A, U]}, [S, U, A, U]),
        ({"prompt": "q", "checks": CHECKS}, [U]),
        ({"instruction": "q", "checks": CHECKS}, [U]),
        ({"instruction": "q", "input": "i", "checks": CHECKS}, [said("user", "q\n\ni")]),
    ],
)
def test_a_prompt_needs_no_answer(record, messages):
    assert detect(record, "x") == "prompt"
    assert convert(record, "prompt", "x:1") == Conversation(messages, None, record.get("checks", []), "x:1")


@pytest.mark.parametrize(
    "form, record",
    [
        ("messages", {"messages": [U]}),
        ("prompt_completion", {"prompt": "q", "completion": None}),
        ("prompt_completion", {"prompt": "q", "completion": ""}),
        ("alpaca", {"instruction": "q", "output": ""}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}]}),
    ],
)
@pytest.mark.parametrize("checks", [CHECKS, '[{"kind": "exact", "answer": "4"}]'], ids=["list", "text"])
def test_checks_make_a_row_without_an_answer_a_prompt(form, record, checks):
    assert convert({**record, "checks": checks}, form, "x:1") == Conversation([U], None, CHECKS, "x:1")
    fails(record, form)


def test_checks_stay_with_an_answered_row():
    assert convert({"messages": [U, A], "checks": CHECKS}, "messages", "x:1").checks == CHECKS


def test_messages_with_from_and_value_hint_at_sharegpt():
    assert fails({"messages": [{"from": "human", "value": "q"}]}, "messages").endswith("this looks like format: sharegpt")


def turn(**fields: object) -> dict[str, object]:
    return {"messages": [U, A, fields]}


def pair(**fields: object) -> dict[str, object]:
    return {"prompt": "q", "chosen": "a", "rejected": "b", **fields}


DEEP: list[object] = []
for _ in range(100):
    DEEP = [DEEP]

BAD = [
    ("messages", turn(role="bot", content="x"), "messages[2].role: 'bot' is not a role; use system, user, assistant or tool"),
    ("messages", turn(role=["user"], content="x"), "messages[2].role: a list of 1 is not a role"),
    ("messages", turn(content="x"), "messages[2].role: is missing"),
    ("messages", {"messages": [{"from": "human", "value": "q"}]}, "messages[0].role: is missing; each message needs one of system, user,"),
    ("messages", turn(role="system", content="x"), "messages[2].role: a system message may only be the first"),
    ("messages", turn(role="user", content=""), "messages[2].content: is empty"),
    ("messages", turn(role="user"), "messages[2].content: must be text or a list of text parts, got null"),
    ("messages", turn(role="user", content=5), "messages[2].content: must be text or a list of text parts, got 5"),
    ("messages", turn(role="assistant", content=""), "messages[2].content: the answer is empty"),
    ("messages", turn(role="assistant", content=" \n"), "messages[2].content: the answer is empty"),
    ("messages", turn(role="assistant", content=[]), "messages[2].content: the answer is empty"),
    ("messages", turn(role="assistant", content="", tool_calls=[]), "messages[2].content: the answer is empty"),
    ("messages", turn(role="user", content="\ud800"), "messages[2].content: holds half a surrogate pair, \\ud800, at character 0"),
    ("messages", turn(role="user", content=[{"type": "image_url"}]), "messages[2].content[0].type: 'image_url' is not supported"),
    ("messages", turn(role="user", content=[{"type": "text"}]), "messages[2].content[0].text: must be text, got null"),
    ("messages", turn(role="user", content=["x"]), "messages[2].content[0]: must be {"),
    ("messages", turn(role="user", content="x", tool_calls=[CALL]), "messages[2].tool_calls: only an assistant message calls tools"),
    ("messages", turn(role="assistant", tool_calls=True), "messages[2].tool_calls: must be a list of tool calls, got true"),
    ("messages", turn(role="assistant", tool_calls=[5]), "messages[2].tool_calls[0]: must be an object with name and arguments, got 5"),
    ("messages", turn(role="assistant", tool_calls=[{"function": {}}]), "messages[2].tool_calls[0].function.name: must be text"),
    ("messages", turn(role="assistant", tool_calls=[{"name": "f", "arguments": "{"}]), "messages[2].tool_calls[0].arguments: '{' is"),
    ("messages", turn(role="assistant", tool_calls=[{"name": "f", "arguments": []}]), "messages[2].tool_calls[0].arguments: must be"),
    ("messages", turn(role="assistant", tool_calls=[{"name": "f", "arguments": {"x": DEEP}}]), "messages[2].tool_calls[0].arguments: is "),
    ("messages", turn(role="assistant", content="x", train="no"), "messages[2].train: must be true or false, got 'no'"),
    ("messages", turn(role="user", content="x", name=5), "messages[2].name: must be text, got 5"),
    ("messages", {"messages": []}, "messages: is an empty list"),
    ("messages", {"messages": "text"}, "messages: must be a list of messages, got 'text'"),
    ("messages", {"messages": ["text"]}, "messages[0]: must be an object with role and content, got 'text'"),
    ("messages", {"messages": None}, "messages: is missing or null; the row has messages"),
    ("messages", {"text": "x"}, "messages: is missing or null; the row has text"),
    ("messages", {"messages": [U]}, "messages: has no assistant message"),
    ("messages", {"messages": [S], "checks": CHECKS}, "messages: a prompt to answer must end with a user or tool message, got system"),
    ("messages", {"messages": [U, A], "tools": 5}, "tools: must be a list of objects"),
    ("messages", {"messages": [U, A], "tools": "{"}, "tools: '{' is not valid JSON"),
    ("messages", {"messages": [U, A], "tools": [5]}, "tools[0]: must be an object, got 5"),
    ("messages", {"messages": [U, A], "tools": [{}]}, "tools[0].name: must be text, got null"),
    ("messages", {"messages": [U, A], "tools": [{"function": 5}]}, "tools[0].function: must be an object with a name, got 5"),
    ("messages", {"messages": [U, A], "checks": [{"kind": 5}]}, "checks[0].kind: must be text, got 5"),
    ("messages", {"messages": [U, A], "checks": [{"kind": "x", "y": float("nan")}]}, "checks[0]: holds nan, which JSON has not"),
    ("messages", {"messages": [U, A], "checks": [{"kind": "x", "y": b"z"}]}, "checks[0]: holds a bytes, which JSON has not"),
    ("messages", {"messages": [U, A], "checks": '[{"kind": "a", "kind": "b"}]'}, "checks: '[{"),
    ("prompt_completion", {"prompt": 5, "completion": "a"}, "prompt: must be text or messages, got 5"),
    ("prompt_completion", {"prompt": "", "completion": "a"}, "prompt: is empty"),
    ("prompt_completion", {"prompt": "q", "completion": " "}, "completion: is empty"),
    ("prompt_completion", {"prompt": "q", "completion": None}, "completion: is missing or null"),
    ("prompt_completion", {"prompt": "q", "completion": [U]}, "completion: has no assistant message"),
    ("prompt_completion", {"prompt": "q", "completion": [S, A]}, "completion[0].role: a system message may only be the first"),
    ("prompt_completion", {"prompt": "q", "completion": []}, "completion: is an empty list"),
    ("alpaca", {"instruction": "", "input": "", "output": "a"}, "instruction: is missing or empty"),
    ("alpaca", {"instruction": "q", "output": ""}, "output: is empty"),
    ("alpaca", {"instruction": "q", "output": True}, "output: must be text, got true"),
    ("alpaca", {"instruction": "q", "input": 5, "output": "a"}, "input: must be text, got 5"),
    ("alpaca", {"instruction": "q", "output": "a", "history": "x"}, "history: must be a list of [question, answer] pairs, got 'x'"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["x"]]}, "history[0]: must be a pair [question, answer], got a list of 1"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["x", ""]]}, "history[0][1]: is empty"),
    ("sharegpt", {"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from: 'bot' is not a role; use human, gpt, system,"),
    ("sharegpt", {"conversations": [{"role": "bot", "content": "x"}]}, "conversations[0].role: 'bot' is not a role; use system, user,"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": ""}]}, "conversations[0].value: the answer is empty"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "x"}]}, "conversations: has no assistant message"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "f()"}]}, "conversations[0].value: 'f()' is not valid JSON"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "5"}]}, "conversations[0].value: must be a list of tool calls"),
    ("sharegpt", {"conversations": [S, U, A], "system": "t"}, "system: is given here and as the first message of conversations"),
    ("preference", pair(chosen=True), "chosen: must be text or messages, got true"),
    ("preference", pair(rejected=""), "rejected: is empty"),
    ("preference", pair(chosen=" "), "chosen: is empty"),
    ("preference", pair(rejected=None), "rejected: is missing or null"),
    ("preference", pair(chosen=[]), "chosen: is an empty list"),
    ("preference", pair(prompt=[]), "prompt: is an empty list"),
    ("preference", pair(chosen=[A, U]), "chosen: ends with a user message; it must end with an assistant message"),
    ("preference", pair(chosen=[U, A]), "chosen: repeats the prompt and rejected does not"),
    ("preference", pair(chosen=[U], rejected=[U, A]), "chosen: holds only the prompt"),
    ("preference", pair(chosen=[said("user", "other"), A], rejected=[A]), "chosen: the answer begins with a user message"),
    ("preference", {"chosen": "a", "rejected": "b"}, "chosen: is only an answer, and there is no prompt"),
    ("preference", {"chosen": [U, A], "rejected": "b"}, "rejected: is only an answer, and there is no prompt"),
    ("preference", {"chosen": [U, A], "rejected": [A]}, "chosen: shares no first message with rejected"),
    ("preference", {"chosen": [S, U, A], "rejected": [S, said("user", "other"), A]}, "chosen: the answer begins with a user message"),
    *(
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": margin}, f"margin: must be a number, by how much {rest}")
        for margin, rest in (("big", "the chosen answer is the better, got 'big'"), (True, ""), (float("nan"), ""), ("inf", ""), ([1], ""))
    ),
    ("unpaired", {"prompt": "q", "completion": "a"}, "label: is missing or null"),
    ("unpaired", {"prompt": "q", "completion": "a", "label": 2}, "label: must be true or false, got 2; where it is no verdict"),
    ("unpaired", {"prompt": "q", "completion": "a", "label": 1.0}, "label: must be true or false, got 1.0"),
    ("unpaired", {"prompt": "q", "completion": " ", "label": True}, "completion: is empty"),
    ("unpaired", {"prompt": "q", "label": True}, "completion: is missing or null"),
    ("unpaired", {"prompt": "q", "completion": [U], "label": True}, "completion: ends with a user message"),
    ("unpaired", {"prompt": "q", "completion": [CALLED, T, A], "label": True}, "completion: holds 3 messages; let it hold the one answer"),
    ("unpaired", {"messages": [U, A, U], "label": True}, "messages: ends with a user message; it must end with the answer"),
    ("unpaired", {"messages": [A], "label": True}, "messages: holds one message; add the prompt before the answer"),
    ("prompt", {"prompt": [U, A]}, "prompt: a prompt to answer must end with a user or tool message, got assistant"),
    ("prompt", {"prompt": ""}, "prompt: is empty"),
    ("prompt", {}, "prompt: is missing or null; the row has "),
    ("text", {"text": " "}, "text: is empty"),
    ("text", {"text": ["a"]}, "text: must be text"),
]  # fmt: skip


@pytest.mark.parametrize("form, record, problem", BAD, ids=[f"{form}: {problem[:50]}" for form, _, problem in BAD])
def test_a_bad_record_is_one_line_that_names_place_and_field(form, record, problem):
    assert fails(record, form).startswith(problem)


@pytest.mark.parametrize(
    "columns, form",
    [
        ("messages labels", "messages"),
        ("prompt completion label messages", "unpaired"),
        ("prompt prompt_id messages", "messages"),
        ("prompt prompt_id chosen rejected messages score_chosen score_rejected", "preference"),
        ("id prompt completion text", "prompt_completion"),
        ("instruction input output text", "alpaca"),
        ("instruction output checks", "alpaca"),
        ("id conversations tools", "sharegpt"),
        ("key prompt kwargs", "prompt"),
        ("prompt text", "prompt"),
        ("id text url", "text"),
    ],
)
def test_columns_beside_those_of_a_format_do_not_hide_it(columns, form):
    assert detect(columns.split(), "x") == form


@pytest.mark.parametrize(
    "columns, candidates",
    [
        ("messages conversations", "messages and sharegpt"),
        ("prompt completion messages", "messages and prompt_completion"),
        ("prompt completion chosen rejected", "prompt_completion and preference"),
        ("instruction output conversations", "alpaca and sharegpt"),
    ],
)
def test_columns_that_fit_two_formats_ask_for_a_format(columns, candidates):
    with pytest.raises(UserError, match=f"^sources.x: the columns {columns.replace(' ', ', ')} fit {candidates}; set format: "):
        detect(columns.split(), "sources.x")


@pytest.mark.parametrize("columns", ["question answer", "instruction", "instruction instances", "chosen", ""])
def test_columns_that_fit_no_format_are_listed(columns):
    with pytest.raises(UserError, match=f"^sources.x: no format fits the columns {columns.replace(' ', ', ')}; name them with columns:"):
        detect(columns.split(), "sources.x")


def test_renaming_moves_columns_and_can_swap_them():
    assert rename({"question": 1, "x": 2}, {"prompt": "question"}) == {"prompt": 1, "x": 2}
    assert rename({"chosen": 1, "rejected": 2}, {"chosen": "rejected", "rejected": "chosen"}) == {"chosen": 2, "rejected": 1}
    assert rename({"prompt": 1, "question": 2}, {"prompt": "question"}) == {"prompt": 2}
    assert rename({"a": 1}, {"prompt": "question"}) == {"a": 1}


@pytest.mark.parametrize(
    "row, text",
    [
        (Conversation([S, U, A, U, A], None, [], ""), "system\ns\nuser\nq\n"),
        (Conversation([U, CALLED, T, A], None, [], ""), "user\nq\n"),
        (Conversation([A, U, A], None, [], ""), "assistant\na\nuser\nq\n"),
        (Conversation([U], None, CHECKS, ""), "user\nq\n"),
        (Conversation([S, A], None, [], ""), "system\ns\n"),
        (Pair([U, A, U], [A], [A], None, ""), "user\nq\nassistant\na\nuser\nq\n"),
    ],
)
def test_the_prompt_text_ends_before_the_first_answer(row, text):
    assert prompt_text(row) == text


def test_plain_text_is_kept_as_it_stands_and_asks_all_that_it_says():
    row = convert({"text": " A  b\n", "url": "u"}, "text", "x:1")
    assert row == Text(" A  b\n", "x:1")
    assert (prompt_text(row), question(row)) == (" A  b\n", "a b")


@pytest.mark.parametrize(
    "row, turns",
    [
        (Conversation([S, U, A], None, [], ""), [[S, U]]),
        (Conversation([S, U, U, U], None, [], ""), [[S, U], [U], [U]]),
        (Conversation([U, A, U, U, A], None, [], ""), [[U, A, U], [U]]),
        (Conversation([U, CALLED, T], None, [], ""), [[U, CALLED, T]]),
        (Pair([U, U], [A], [A], None, ""), [[U], [U]]),
        (Conversation([A], None, [], ""), [[]]),
    ],
)
def test_a_policy_answers_where_one_user_message_follows_another_and_at_the_end(row, turns):
    assert asked_turns(row) == turns


WORDS = st.sampled_from(
    ["", " ", "text", "user", "assistant", "system", "tool", "human", "gpt", "function_call", "[]", '{"name": "f"}', "\ud800"]
)
NAMES = st.sampled_from(
    ["role", "content", "from", "value", "type", "text", "tool_calls", "function", "name", "arguments", "train", "kind"]
)
FIELDS = st.sampled_from(sorted(frozenset().union(*(layout.reads for layout in LAYOUTS.values()))))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=4))
ROLE = st.sampled_from(["user", "assistant", "tool", "assistant", "user", "system", "human", "gpt"])
CALLS = st.sampled_from([[CALL], CALL, [CALL["function"]], '{"name": "f"}'])
MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": st.text(min_size=1, max_size=5)}, optional={"name": WORDS, "tool_calls": CALLS})
TURNS = st.lists(st.sampled_from([U, A, CALLED, T, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]) | MESSAGE, max_size=4)
LIKELY = {
    **dict.fromkeys(["messages", "conversations"], TURNS.map(lambda turns: [*turns, A]) | TURNS),
    **dict.fromkeys(["prompt", "completion", "chosen", "rejected"], st.text(min_size=1, max_size=5) | TURNS.map(lambda turns: [*turns, A])),
    **dict.fromkeys(["instruction", "input", "output", "system"], st.text(min_size=1, max_size=5)),
    "text": st.text(min_size=1, max_size=5),
    "label": st.booleans(),
    "margin": st.floats(-1, 1),
    "history": st.lists(st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=2), max_size=2),
    "tools": st.sampled_from([[TOOL], "[]", None]),
    "checks": st.sampled_from([CHECKS, [], None]),
    "instruction_id_list": st.sampled_from([["punctuation:no_comma"], [], None]),
    "kwargs": st.sampled_from([[{}], "[{}]", [], None]),
}


@st.composite
def records(draw, form: Format) -> dict[str, object]:
    """Most fields of `form` as they should be, some as anything at all, and some left out."""
    kinds = st.sampled_from(["likely"] * 8 + ["anything", "absent"])
    chosen = {field: draw(kinds) for field in sorted(LAYOUTS[form].reads)}
    return {field: draw(LIKELY[field] if kind == "likely" else WORDS | VALUES) for field, kind in chosen.items() if kind != "absent"}


RECORDS = st.dictionaries(FIELDS, WORDS | VALUES, max_size=6)
FORMS_AND_RECORDS = st.sampled_from(sorted(LAYOUTS)).flatmap(lambda form: st.tuples(st.just(form), records(form) | RECORDS))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(FORMS_AND_RECORDS)
def test_any_record_gives_a_row_or_a_one_line_error(form_and_record):
    form, record = form_and_record
    try:
        row = convert(record, form, "x:1")
    except UserError as error:
        assert str(error).startswith("x:1: ") and len(str(error).splitlines()) == 1
        return
    assert isinstance(row, LAYOUTS[form].row) and row.origin == "x:1"
    prompt_text(row).encode()
    if isinstance(row, Text):
        return
    for message in row.messages if isinstance(row, Conversation) else row.prompt + row.chosen + row.rejected:
        assert message["content"].strip() or message.get("tool_calls")
    if isinstance(row, Pair):
        assert row.prompt and row.chosen[-1]["role"] == row.rejected[-1]["role"] == "assistant"
