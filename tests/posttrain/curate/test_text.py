"""Text is mended without harm to code or other scripts, and a row is dropped for language or length only where it is sure."""

import json
from pathlib import Path

import pytest

from posttrain.config import DataSource
from posttrain.curate.rows import texts_of
from posttrain.curate.text import Language, Length, Normalize, mend, without_code, words
from posttrain.data.rows import Conversation
from posttrain.data.source import open_source
from posttrain.error import UserError
from tests.posttrain.curate.bench import apply, chat, dropped, pair

CODE = "    def area(r):\n        return 3.14 * r\n\n    print(area(2))"

MENDED = [
    ("his fiancÃ© waits", "his fiancé waits", "mojibake repaired"),
    ("youâ\x80\x99re late", "you’re late", "mojibake repaired"),
    ("cafe\u0301", "café", "Unicode composed"),
    ("a\r\nb\rc\u2028d", "a\nb\nc\nd", "line ends unified"),
    ("how\u200bever\ufeff", "however", "invisible characters removed"),
    ("a\x00b\x0cc", "abc", "invisible characters removed"),
    ("soft\u00adware", "software", "invisible characters removed"),
    ("\n\n  yes \n", "yes", "white space around it removed"),
]


@pytest.mark.parametrize("before, after, what", MENDED)
def test_what_is_broken_is_mended_and_counted(before: str, after: str, what: str) -> None:
    outcome = apply(Normalize(), [chat(before), chat("fine")])
    assert texts_of(outcome.kept[0].row)[1] == after
    assert outcome.changes == {what: 1}


@pytest.mark.parametrize(
    "text",
    [
        CODE,
        "\tindented\n\tby tabs",
        "“curly” quotes, it’s fine",
        "ﬁne ligatures and ｆｕｌｌ width",
        "&amp; is how HTML writes &",
        "👩\u200d👩\u200d👧 and 👍🏽",
        "می\u200cخواهم",
        "क्\u200dष",
        "naïve façade, São Paulo, Ångström",
        "double  spaces\tand tabs",
        "trailing in the middle   \nstays",
        "我是一个助手。",
        "x = 'Ã'",
    ],
)
def test_what_is_right_stays_as_it_is(text: str) -> None:
    row = chat(text)
    (kept,) = apply(Normalize(), [row]).kept
    assert kept.row is row


def test_mending_twice_changes_nothing_more() -> None:
    for before, after, _ in MENDED:
        assert mend(mend(before, set()), set()) == after


def test_a_row_of_which_nothing_is_left_is_dropped() -> None:
    assert dropped(Normalize(), [chat("\u200b\ufeff"), chat("5")]) == {0: "empty"}


def test_a_call_of_a_tool_needs_no_text() -> None:
    row = Conversation(
        [
            {"role": "user", "content": "rain? "},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}],
            },
        ],
        None,
        [],
        "x",
    )
    (kept,) = apply(Normalize(), [row]).kept
    assert texts_of(kept.row) == ["rain?", ""]


def test_code_is_cut_out_as_markdown_has_it() -> None:
    text = "before `x = 1` after\n```python\nlang = `code`\n~~~\n```\nbetween\n~~~~\n```\nopen\n~~~\nto the end"
    assert without_code(text).split() == ["before", "after", "between"]
    assert without_code("a ``b ` c`` d").split() == ["a", "d"]
    assert without_code("no code") == "no code"


def test_words_of_scripts_without_spaces_are_characters() -> None:
    assert words("It's 3.5 times; don't!") == ["it's", "3", "5", "times", "don't"]
    assert words("我是AI助手") == ["我", "是", "ai", "助", "手"]


ENGLISH = "The weather will be fine tomorrow, so we can go to the beach and swim in the sea."
FRENCH = "Demain il fera beau, nous pourrons donc aller à la plage et nager dans la mer."
GERMAN = "Morgen wird das Wetter schön, also können wir an den Strand gehen und im Meer schwimmen."
CHINESE = "您好，我是一个人工智能助手，很高兴认识您。请问我能为您做些什么？"


def test_answers_in_another_language_are_dropped_and_what_has_no_language_is_kept() -> None:
    kept = [
        chat(ENGLISH),
        chat("42"),
        chat("Albert Einstein"),
        chat("oui"),
        chat(ENGLISH, prompt=FRENCH),
        chat(f"```python\n# {GERMAN}\nprint(1)\n```"),
        chat("SELECT id, name FROM users WHERE age > 30 ORDER BY name;"),
        chat("https://www.beispiel.de/das-wetter-wird-morgen-schoen-also-gehen-wir-schwimmen"),
    ]
    other = [chat(FRENCH), chat(GERMAN), chat(CHINESE), pair(ENGLISH, FRENCH)]
    assert dropped(Language(), kept + other) == {len(kept) + n: "other language" for n in range(4)}


def test_more_languages_can_be_allowed() -> None:
    assert dropped(Language(allow=["en", "fr"]), [chat(ENGLISH), chat(FRENCH), chat(GERMAN)]) == {2: "other language"}
    with pytest.raises(UserError, match=r"steps\[0\].language.allow: 'english' is no language"):
        Language(allow=["english"]).check("steps[0].language")


def test_limits_are_in_words_and_each_has_its_reason() -> None:
    step = Length(min_prompt_words=2, max_prompt_words=4, min_answer_words=2, max_answer_words=5)
    rows = [
        chat("two words", "just so"),
        chat("two words", "one"),
        chat("two words", "far too many words here"),
        chat("one", "just so"),
        chat("one two three four five six", "just so"),
        pair("two words", "one", "just so"),
    ]
    reasons = ["prompt too short", "prompt too long", "answer too short", "answer too long", "answer too short"]
    assert dropped(step, rows) == dict(enumerate(reasons, 1))


def test_by_default_an_answer_may_be_a_sign_and_a_prompt_without_an_answer_has_no_length_of_it() -> None:
    prompt = Conversation([{"role": "user", "content": "how many?"}], None, [{"kind": "x"}], "x")
    assert dropped(Length(), [chat("5"), chat("="), chat("🙂"), prompt]) == {}


def test_answers_that_go_round_in_circles_are_dropped() -> None:
    places = ["sea and its grey birds", "hill where nobody lives", "wood of old pines", "town that sleeps", "mill by the weir"]
    poem = "\n".join(f"And in the {when} I walked to the {where}" for when in ("dawn", "noon", "dusk") for where in places)
    mince = "He needs 2 pounds of ground mince for a pie, so 5 pies take 2 * 5 = 10 pounds of ground mince. " * 2 + "He has none. " * 6
    loop = "I like it. " * 40
    lines = "\n".join(["one and the same line"] * 20 + [f"another line, number {n}" for n in range(5)])
    table = "\n".join(f"| row {n} | value {n * n} | {'ok' if n % 2 else 'not ok'} |" for n in range(30))
    kept = [chat(poem), chat(table), chat(mince), chat("no " * 20)]
    assert dropped(Length(), [*kept, chat(loop), chat(lines)]) == {4: "repetitive", 5: "repetitive"}


def test_a_rejected_answer_may_go_round_in_circles() -> None:
    fine = "It rains in the north, and the south stays dry."
    assert dropped(Length(), [pair(fine, "so it is. " * 40), pair("so it is. " * 40, fine)]) == {1: "repetitive"}


def test_limits_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="max_answer_words: 3 is below min_answer_words, 5"):
        Length(min_answer_words=5, max_answer_words=3)


@pytest.mark.real
def test_real_rows_in_english_are_kept_and_the_chinese_ones_are_found(shared: Path) -> None:
    data = shared / "data" / "llamafactory_demo"
    alpaca = list(open_source(DataSource(data=str(data / "alpaca_en_demo.json")), "alpaca").rows())
    assert len(dropped(Language(), alpaca)) == 0
    identity = list(open_source(DataSource(data=str(data / "identity.json")), "identity").rows())
    is_chinese = {n for n, row in enumerate(json.loads((data / "identity.json").read_text())) if any(c > "\u4e00" for c in row["output"])}
    found = set(dropped(Language(), identity))
    assert found <= is_chinese
    assert len(found) > 0.9 * len(is_chinese)
