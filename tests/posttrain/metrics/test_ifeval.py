"""Verifiable instructions: what each takes for followed, how loosely, what a row may not ask, and what eval makes of them.

The recorded verdicts are those of lm_eval 0.4.13 with nltk 3.10.4, its punkt_tab and langdetect 1.0.9 (seed 0), written by
benchmarks/ifeval_agreement.py --record.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.formats import convert, detect
from posttrain.error import UserError
from posttrain.metrics.check import as_reference, read_check, read_checks, score
from posttrain.metrics.ifeval import INSTRUCTIONS, follows, follows_loosely, read_instruction
from posttrain.metrics.measured import grade, measure_results
from posttrain.metrics.metric import load_metric
from tests.conftest import Ended, read_lines

VERDICTS = Path(__file__).with_name("ifeval_verdicts.jsonl")

ENGLISH = "The library is open every day, and everybody is welcome to read there."
RUSSIAN = "Библиотека открыта каждый день, и мы рады всем читателям."
GERMAN = "Die Bibliothek ist jeden Tag geöffnet, und alle sind herzlich willkommen."


def follow(answer: str, name: str, /, **fields: Any) -> bool:
    return follows(read_instruction({"kind": "instruction", "id": name, **fields}, "row"), answer)


def loosely(answer: str, name: str, /, **fields: Any) -> bool:
    return follows_loosely(read_instruction({"kind": "instruction", "id": name, **fields}, "row"), answer)


# What follows each, and what does not.

CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["Cat", "dog"]}, ["A CAT and dogs"], ["a cat", "c a t dog"]),
    ("keywords:existence", {"keywords": ["C++", "(a)"]}, ["use c++ (A)"], ["use c a"]),
    ("keywords:frequency", {"keyword": " cat ", "frequency": 2, "relation": "at least"}, ["cat, Catalog"], ["cat"]),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "less than"}, ["cat", "none"], ["cat cat"]),
    ("keywords:frequency", {"keyword": "3.5", "frequency": 1, "relation": "at least"}, ["3.5 kg"], ["315 kg"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "red dog"]}, ["catalog, red", "red dogs"], ["A CAT.", "my red dog!"]),
    ("keywords:forbidden_words", {"forbidden_words": ["C++"]}, ["C and C+", "xC++"], ["in C++ or", "(c++)"]),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 3, "let_relation": "at least"}, ["eEe"], ["ee"]),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "less than"}, ["#a"], ["#a #b"]),
    ("language:response_language", {"language": "de"}, [GERMAN, "12 + 3"], [ENGLISH]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, ["Dr. No came. He left."], ["Mr. Dr. Lee came."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, ["A title\n\nand more"], ["One. Two!"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a***b", "***\na\n***\nb***"], ["a", "a***b***c", "a******b"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["a-b_c d", "पुस्तकालय हर दिन"], ["a b!", "पुस्तकालय हर"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["a b !"], ["it's so"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Well"},
        ["a\n\nwell, b", "a\n\n'\"WELL.b", "a\n\nWell\n\n"],
        ["well\n\na", "a\n\nwells", "a\n\nb\n\nwell", "\n\na\n\nwell", "a\n\n-well"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b]", "[[a] []"], ["[a", "[a\nb] [c]", "[[a]]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a\nP.S. b", "p. s.b"], ["P.S b", "PS. b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["a P.P.S b", "p. p. s"], ["P.S. b"]),
    ("detectable_content:postscript", {"postscript_marker": "N.B."}, ["n.b. this"], ["inabc this"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "a\n - b\n\n  *c", "---\n-"],
        ["* a", "* a\n** b", "+ a\n+ b", "*\n* a"],
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 0}, ["none"], ["- a"]),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is no.", "So: My answer is maybe. Yes"],
        ["my answer is no.", "My answer is no"],
    ),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* *b*", "**a** *b*"], ["*a*", "*a\nb* *c*", "** ** *a*"]),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": " Part", "num_sections": 2},
        ["Part 1 Part2"],
        ["Part 1", "part 1 part 2", "Part  1 Part 2"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', "```json\n[]\n```", "```JSON\n1```", "``` 1 ```", "NaN"],
        ["{'a': 1}", "Here: {}", "[" * 100_000],
    ),
    ("detectable_format:title", {}, ["<<a>>", "x <<a b>> y"], ["<<>>", "<< >>", "<a>", "<<a\nb>>", ">>a<<"]),
    ("combination:two_responses", {}, ["a******b", "******a\n******\nb******"], ["a", "a******a", "a******b******c", "a************b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": " Say A. "}, ["\nsay a. A"], ["Say A", "I say A."]),
    ("startend:end_checker", {"end_phrase": "The End. "}, ['so.\nthe end."', "The end.\n"], ["The end", "The end. Bye"]),
    ("startend:quotation", {}, [' "a"\n', '"a" and "b"'], ['"', '"a', "“a”", "'a'"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and I", "U.S. WELL-KNOWN"],
        ["NASA nasa Nasa", "WELL-KNOWN"],
    ),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "less than"}, ["none 1"], ["A cat"]),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, RUSSIAN.upper(), "123"]),
    ("change_case:english_lowercase", {}, [ENGLISH.lower()], [ENGLISH, RUSSIAN.lower(), "123"]),
    ("punctuation:no_comma", {}, ["a; b", "a，b"], ["a, b"]),
]


@pytest.mark.parametrize(("name", "fields", "good", "bad"), CASES, ids=[f"{name} {number}" for number, (name, *_) in enumerate(CASES)])
def test_an_answer_follows_an_instruction_or_does_not(name, fields, good, bad):
    assert [answer for answer in good if not follow(answer, name, **fields)] == []
    assert [answer for answer in bad if follow(answer, name, **fields)] == []


def test_every_instruction_of_ifeval_is_there():
    assert {name for name, *_ in CASES} == set(INSTRUCTIONS)
    assert len(INSTRUCTIONS) == 25


def test_verdicts_are_those_of_lm_evaluation_harness():
    rows = read_lines(VERDICTS)
    assert {row["id"] for row in rows} == set(INSTRUCTIONS)
    for row in rows:
        name, answer, theirs = row.pop("id"), row.pop("answer"), (row.pop("strict"), row.pop("loose"))
        assert (follow(answer, name, **row), loosely(answer, name, **row)) == theirs, (name, row, answer)


@pytest.mark.parametrize("blank", ["", " ", "\n\u3000\n"])
def test_a_blank_answer_follows_nothing(blank):
    assert not follow(blank, "punctuation:no_comma")
    assert not loosely(blank, "punctuation:no_comma")


def test_a_verdict_on_language_is_the_same_each_time():
    mixed = "The library sagt, dass chacun es bienvenido."
    assert len({follow(mixed, "language:response_language", language="en") for _ in range(40)}) == 1


# Loosely.

PREFACED = "Sure, here it is:\n{}"
SIGNED = "{}\nBye, then."


@pytest.mark.parametrize(
    "form", ["{}", PREFACED, SIGNED, PREFACED.format(SIGNED), "*{}*", f"*{PREFACED}*", f"*{SIGNED}*", f"**{PREFACED.format(SIGNED)}**"]
)
def test_each_of_the_eight_forms_may_follow(form):
    assert loosely(form.format('"a; b"'), "startend:quotation")
    assert follow(form.format('"a; b"'), "startend:quotation") == (form == "{}")


@pytest.mark.parametrize("answer", ["one\ntwo\n{}\nthree", "{}\nthree\nfour", "_{}_"])
def test_no_other_form_may(answer):
    assert not loosely(answer.format('"a"'), "startend:quotation")


@settings(deadline=None)
@given(answer=st.text(alphabet="*-[]<>\"'.,\n aB1", max_size=60), case=st.sampled_from(CASES))
def test_what_follows_strictly_follows_loosely(answer, case):
    name, fields, *_ = case
    assert follow(answer, name, **fields) <= loosely(answer, name, **fields)


# Reading.


def test_rows_of_ifeval_and_rows_with_checks_are_read_alike():
    ids, fields = ["punctuation:no_comma", "length_constraints:number_words"], {"num_words": 5, "relation": "at least"}
    ifeval = {"key": 1, "prompt": "q", "instruction_id_list": ids, "kwargs": [{"num_words": None, "relation": None}, fields]}
    as_text = {**ifeval, "instruction_id_list": json.dumps(ids), "kwargs": json.dumps(ifeval["kwargs"])}
    ours = {"prompt": "q", "checks": [{"kind": "instruction", "id": ids[0]}, {"kind": "instruction", "id": ids[1], **fields}]}
    assert {detect(record, "x") for record in (ifeval, as_text, ours)} == {"prompt"}
    rows = [convert(record, "prompt", "x:1") for record in (ifeval, as_text, ours)]
    first, *others = [read_checks(row.checks, row.origin) for row in rows]
    assert [first] * 2 == others
    assert [score(check, "a b c d e") for check in first] == [1.0, 1.0]
    assert [score(check, "a, b") for check in first] == [0.0, 0.0]
    assert [read_check(json.loads(as_reference(check)), "row") for check in first] == first


def test_instructions_stand_beside_other_checks():
    record = {
        "messages": [{"role": "user", "content": "q"}],
        "checks": [{"kind": "exact_answer", "answer": "a"}],
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }
    assert [check.kind for check in read_checks(convert(record, "messages", "x:1").checks, "x:1")] == ["exact_answer", "instruction"]


@pytest.mark.parametrize(
    ("ids", "kwargs", "problem"),
    [
        ("punctuation:no_comma", [{}], "x:1: instruction_id_list: 'punctuation:no_comma' is not valid JSON"),
        ({"a": 1}, [{}], "x:1: instruction_id_list: must be a list of ids, or one as JSON text, got an object with a"),
        ([5], [{}], "x:1: instruction_id_list[0]: must be text, got 5"),
        (["punctuation:no_comma"], [], "x:1: kwargs: has 0 entries for 1 instructions; give an object for each, if only {}"),
        (["punctuation:no_comma"], None, "x:1: kwargs: has 0 entries for 1 instructions; give an object for each, if only {}"),
        (["punctuation:no_comma"], [5], "x:1: kwargs[0]: must be an object, got 5"),
    ],
)
def test_lists_that_do_not_fit_are_refused(ids, kwargs, problem):
    with pytest.raises(UserError) as error:
        convert({"prompt": "q", "instruction_id_list": ids, "kwargs": kwargs}, "prompt", "x:1")
    assert str(error.value).startswith(problem)


WORDS = {"id": "length_constraints:number_words"}
FIRST = {"id": "length_constraints:nth_paragraph_first_word", "num_paragraphs": 2, "nth_paragraph": 1, "first_word": "a"}
LETTER = {"id": "keywords:letter_frequency", "let_frequency": 1, "let_relation": "at least"}
AT_WORDS, AT_FIRST = f"checks[0] ({WORDS['id']})", f"checks[0] ({FIRST['id']})"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "checks[0].id: missing; give the id of an instruction, such as punctuation:no_comma"),
        (
            {"id": "punctuation:no_coma"},
            "checks[0].id: no instruction is called 'punctuation:no_coma'; did you mean 'punctuation:no_comma'?",
        ),
        ({"id": "punctuation:no_comma", "num_words": 5}, "checks[0] (punctuation:no_comma).num_words: unknown key; known: id, kind"),
        ({**WORDS, "num_words": 5}, f"{AT_WORDS}.relation: missing; it is required"),
        (
            {**WORDS, "num_words": 5, "relation": "at most"},
            f"{AT_WORDS}.relation: input should be 'less than' or 'at least', got 'at most'",
        ),
        ({**WORDS, "num_words": "5", "relation": "at least"}, f"{AT_WORDS}.num_words: input should be a valid integer, got '5'"),
        ({**WORDS, "num_words": 0, "relation": "at least"}, f"{AT_WORDS}.num_words: input should be greater than or equal to 1, got 0"),
        ({**FIRST, "nth_paragraph": 3}, f"{AT_FIRST}.nth_paragraph: 3 is above num_paragraphs 2, so no answer can pass"),
        (
            {**FIRST, "first_word": "don't"},
            f'{AT_FIRST}.first_word: must be one word without . , ? ! or quotes, since a first word ends there, got "don\'t"',
        ),
        ({**LETTER, "letter": "ab"}, "checks[0] (keywords:letter_frequency).letter: must be one character, got 'ab'"),
        (
            {"id": "keywords:existence", "keywords": "a"},
            "checks[0] (keywords:existence).keywords: input should be a valid list, got 'a'",
        ),
        ({"id": "keywords:existence", "keywords": ["a", " "]}, "checks[0] (keywords:existence).keywords.1: is blank; fill it in"),
        (
            {"id": "language:response_language", "language": "english"},
            "checks[0] (language:response_language).language: 'english' is no language that langdetect knows; known: af, ar, bg",
        ),
    ],
)
def test_an_instruction_that_cannot_be_made_is_one_line_that_names_its_row_and_field(fields, problem):
    with pytest.raises(UserError) as error:
        read_checks([{"kind": "instruction", **fields}], "ifeval.jsonl:12")
    assert str(error.value).startswith(f"ifeval.jsonl:12: {problem}")
    assert len(str(error.value).splitlines()) == 1


def test_an_instruction_without_its_libraries_says_what_to_install(monkeypatch):
    monkeypatch.setattr("posttrain.metrics.ifeval.find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        read_checks([{"kind": "instruction", "id": "change_case:english_capital"}], "x:1")
    assert str(error.value) == 'x:1: checks[0]: change_case:english_capital needs langdetect; run: pip install "posttrain[ifeval]"'
    assert read_checks([{"kind": "instruction", "id": "punctuation:no_comma"}], "x:1")


def words(number: int, relation: str) -> dict[str, Any]:
    return {**WORDS, "num_words": number, "relation": relation}


CAPITAL, LOWER = {"id": "change_case:english_capital"}, {"id": "change_case:english_lowercase"}


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        (words(10, "at least"), words(10, "less than"), "(words: at least 10 and at most 9)"),
        (CAPITAL, LOWER, "(lowercase letters: exactly 0 and at least 1)"),
        (LOWER, {"id": "language:response_language", "language": "de"}, "change_case:english_lowercase (en)"),
        (
            LOWER,
            {"id": "change_case:capital_word_frequency", "capital_frequency": 1, "capital_relation": "at least"},
            "(words in capitals: exactly 0 and at least 1)",
        ),
        (
            {"id": "keywords:existence", "keywords": ["Cat"]},
            {"id": "keywords:frequency", "keyword": "cat", "frequency": 1, "relation": "less than"},
            "('cat': at least 1 and exactly 0)",
        ),
    ],
)
def test_two_instructions_that_no_answer_can_follow_are_refused(one, other, why):
    with pytest.raises(UserError, match=r"^x:1: no answer can follow both ") as error:
        read_checks([{"kind": "instruction", **fields} for fields in (one, other)], "x:1")
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (words(10, "at least"), words(11, "less than")),
        (CAPITAL, {"id": "language:response_language", "language": "en"}),
        ({"id": "keywords:existence", "keywords": ["cat"]}, {"id": "keywords:forbidden_words", "forbidden_words": ["cat"]}),  # cats
        ({**LETTER, "letter": "a"}, {**LETTER, "letter": "b", "let_relation": "less than"}),
    ],
)
def test_two_that_some_answer_can_follow_are_not(one, other):
    assert len(read_checks([{"kind": "instruction", **fields} for fields in (one, other)], "x:1")) == 2


# Measuring.


def test_the_metric_gives_both_accuracies():
    reference = as_reference(read_check({"kind": "instruction", "id": "startend:quotation"}, "row"))
    result = load_metric("instruction").compute(predictions=['"a"', 'Sure:\n"a"', "a", ""], references=[reference] * 4)
    assert result == {"accuracy": 0.25, "scores": [1.0, 0.0, 0.0, 0.0], "loose_accuracy": 0.5, "loose_scores": [1.0, 1.0, 0.0, 0.0]}


def test_accuracies_are_of_prompts_and_of_instructions():
    def row(number: int, answer: str, *checks: dict[str, Any]) -> dict[str, Any]:
        references = [as_reference(check) for check in read_checks(list(checks), "row")]
        told = {"row": number, "measure": "answer", "turn": 1, "num_tokens": 1, "ended": True, "repetition": 0.0}
        return {**told, "answer": answer, "checks": references}

    comma, quotation = ({"kind": "instruction", "id": name} for name in ("punctuation:no_comma", "startend:quotation"))
    capitals = {"kind": "instruction", "id": "change_case:capital_word_frequency", "capital_frequency": 1, "capital_relation": "less than"}
    exact = {"kind": "exact_answer", "answer": "b"}
    results = [
        row(0, '"a"', comma, quotation, capitals),  # all three
        row(1, 'Sure, so:\n"a"', comma, quotation, capitals),  # the last one; loosely all
        row(2, "a, b", comma),  # none
        row(3, "a", comma, exact),  # the instruction, and not the other check
    ]
    grade(results)
    measured = measure_results(results)
    expected = {
        "answers passed": 1 / 4,
        "exact_answer": 0.0,
        "prompt_level_strict_acc": 2 / 4,
        "inst_level_strict_acc": 5 / 8,
        "prompt_level_loose_acc": 3 / 4,
        "inst_level_loose_acc": 7 / 8,
    }
    assert {name: measured[name].value for name in expected} == pytest.approx(expected)
    assert measured["inst_level_loose_acc"].weights == {0: 3.0, 1: 3.0, 2: 1.0, 3: 1.0}


def test_eval_measures_rows_of_ifeval_and_refuses_what_no_answer_can_follow(
    posttrain: Callable[..., Ended], pipeline_file: Path, tmp_path: Path
) -> None:
    rows = [
        {"key": number, "prompt": f"how many birds? {number}", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        for number in range(3)
    ]
    data = tmp_path / "ifeval.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("run", pipeline_file, "--root", tmp_path / "runs", "--only", "eval")
    settings = ("stages.eval.inputs={policies: base, data: chat}", f"sources.chat.data={data}")
    ended = posttrain(*arguments, *settings)
    assert ended.code == 0, ended.err
    for name in ("prompt_level_strict_acc", "inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc"):
        assert name in ended.out
    data.write_text(data.read_text() + json.dumps({**rows[0], "kwargs": [{"num_words": 3}]}) + "\n")
    ended = posttrain(*arguments, *settings, "--rebuild", "eval")
    assert ended.code == 2
    assert f"{data}:4: checks[0] (punctuation:no_comma).num_words: unknown key" in ended.err
