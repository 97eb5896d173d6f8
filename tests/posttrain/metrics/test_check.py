"""The checks that a row may carry: what each accepts, what each refuses, and what a bad one says."""

import json
import logging
import math
import re
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.error import UserError
from posttrain.metrics.check import KINDS, as_number, as_reference, final_number, read_check, read_checks, read_turn_checks, score

REPO_ROOT = Path(__file__).resolve().parents[3]
GSM8K = REPO_ROOT.parent / "shared" / "data" / "gsm8k_train" / "train.jsonl"


def passes(text: str, kind: str, /, **fields: Any) -> bool:
    return score(read_check({"kind": kind, **fields}, "row"), text) == 1.0


# exact_answer


def test_an_exact_answer_may_stand_in_white_space():
    assert passes(" \n Paris\t", "exact_answer", answer="Paris")
    assert passes("Paris", "exact_answer", answer=" Paris\n")
    assert not passes("Paris.", "exact_answer", answer="Paris")
    assert not passes("", "exact_answer", answer="Paris")


def test_any_of_several_exact_answers_will_do():
    assert passes("NYC", "exact_answer", answer=["New York", "NYC", "NYC"])
    assert not passes("York", "exact_answer", answer=["New York", "NYC"])


def test_case_counts_unless_it_is_ignored_and_folds_beyond_ascii():
    assert not passes("paris", "exact_answer", answer="Paris")
    assert passes("paris", "exact_answer", answer="Paris", ignore_case=True)
    assert passes("STRASSE", "exact_answer", answer="straße", ignore_case=True)


def test_inner_white_space_counts_unless_it_is_collapsed():
    assert not passes("New  York", "exact_answer", answer="New York")
    assert passes("New \n\u00a0York", "exact_answer", answer="New York", collapse_whitespace=True)
    assert not passes("NewYork", "exact_answer", answer="New York", collapse_whitespace=True)


def test_composed_and_decomposed_unicode_are_one_text():
    assert passes("cafe\u0301", "exact_answer", answer="caf\u00e9")
    assert passes("CAFE\u0301", "exact_answer", answer="caf\u00e9", ignore_case=True)
    assert not passes("cafe", "exact_answer", answer="caf\u00e9")


@settings(deadline=None)
@given(st.text(), st.booleans(), st.booleans())
def test_every_text_is_its_own_exact_answer(text, ignore_case, collapse_whitespace):
    assert passes(text, "exact_answer", answer=text, ignore_case=ignore_case, collapse_whitespace=collapse_whitespace)


# final_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 72.", "72"),
        ("First 5, then 7, so 12 in all", "12"),
        ("It costs 1,234.5 dollars", "1234.5"),
        ("1,234,567.89", "1234567.89"),
        ("in 12,34 and 1,2345", "2345"),
        ("one of 1,2,3", "3"),
        ("-3", "-3"),
        ("x = -3", "-3"),
        ("x = \u22123", "-3"),
        ("+3", "3"),
        ("$12", "12"),
        ("-$12.50", "-12.50"),
        ("$-12", "-12"),
        (r"so it is \$1,000.00.", "1000.00"),
        ("$$x = 18$$", "18"),
        (r"\boxed{42}", "42"),
        ("**42**", "42"),
        ("50%", "50"),
        (r"50\%", "50"),
        ("from 50%-60%", "60"),
        ("5-3", "3"),
        ("(2)-3", "3"),
        ("pages 10-12", "12"),
        ("- 3 apples", "3"),
        ("so it is ...5", "5"),
        (".5", "0.5"),
        ("2.5e-3", "0.0025"),
        ("1E3 m", "1000"),
        ("10km", "10"),
        ("6 grams of CO2", "6"),
        ("4 in v1.5", "4"),
        ("1/2", "2"),
        ("at 10:30", "30"),
        ("answer:42", "42"),
        ("答案是42。", "42"),
        ("４２", "42"),
        ("007", "7"),
        ("#### 72", "72"),
        ("48/2 = 24\n#### 1,080", "1080"),
        ("#### -5.", "-5"),
        ("#### $12", "12"),
        ("####72%\n", "72"),
        ("#### 72\n\nQuestion: what is 5 + 6?", "72"),
        ("#### 72\nQuestion: 5?\n#### 5", "72"),
        ("#### 1. Add the numbers\nThey sum to 9.", "9"),
        ("#### 72 clips", "72"),
    ],
)
def test_the_final_number_of_a_text(text, expected):
    assert final_number(text) == Decimal(expected)


@pytest.mark.parametrize("text", ["", "   ", "no number", "H2O", "x_1", "####", "$", "%", "-", "...", "²"])
def test_a_text_without_a_number_has_no_final_number_and_fails(text):
    assert final_number(text) is None
    assert not passes(text, "final_number", answer=0)


@settings(deadline=None)
@given(
    st.text(alphabet=st.characters(exclude_categories=["Nd"])),
    st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12),
)
def test_a_number_written_with_thousands_and_after_any_words_is_found_exactly(words, number):
    assert final_number(f"{words} {number:,f}") == number
    assert final_number(f"{words} {number:f}.") == number
    assert final_number(f"{words} ${number:f}") == number


@settings(deadline=None)
@given(st.text())
def test_any_text_has_a_final_number_or_none_and_never_an_error(text):
    found = final_number(text)
    assert found is None or found.is_finite()


@settings(deadline=None)
@given(st.integers(), st.integers(-9, 9), st.integers(0, 9))
def test_the_tolerance_is_inclusive(number, offset, tolerance):
    assert passes(str(number + offset), "final_number", answer=number, tolerance=tolerance) == (abs(offset) <= tolerance)


def test_decimals_are_compared_exactly_and_not_as_binary_fractions():
    assert 0.1 + 0.2 != 0.3
    assert passes("0.30", "final_number", answer=0.3)
    assert passes("0.31", "final_number", answer=0.3, tolerance=0.01)
    assert not passes("0.3100001", "final_number", answer=0.3, tolerance=0.01)
    assert not passes("0.1" + "0" * 40 + "1", "final_number", answer=0, tolerance=0.1)
    for number in (10**40, -(10**40)):
        assert passes(str(number), "final_number", answer=number)
        assert not passes(str(number + 1), "final_number", answer=number)
    assert not passes("1e9999", "final_number", answer=0.1)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_from_the_data_is_the_decimal_it_is_written_as(number):
    assert Fraction(as_number(number)) == Fraction(repr(number))


def test_an_expected_number_may_be_a_text_with_thousands_currency_or_percent():
    for answer in (1080, 1080.0, "1080", "1,080", " $1,080 ", "1,080.00", "1080%"):
        assert passes("so 1080", "final_number", answer=answer)


def test_a_long_run_of_digits_takes_linear_time():
    started = time.perf_counter()
    for text in ("1" * 2_000_000, "a" + "1" * 200_000, "1," * 100_000, ",111" * 50_000, "$" * 200_000, "-" * 200_000, "1." * 100_000):
        passes(text, "final_number", answer=1)
    assert time.perf_counter() - started < 3


@pytest.mark.real
@pytest.mark.skipif(not GSM8K.exists(), reason=f"no GSM8K at {GSM8K}")
def test_every_gsm8k_answer_passes_its_own_final_number_and_no_other():
    rows = [json.loads(line) for line in GSM8K.open(encoding="utf-8")]
    assert len(rows) == 7473
    for row in rows:
        number = row["answer"].split("####")[1].strip()
        assert passes(row["answer"], "final_number", answer=number), row
        assert passes(f"The answer is ${number}.", "final_number", answer=number), row
        assert not passes(row["answer"], "final_number", answer=int(number.replace(",", "")) + 1), row


# regex_match


def test_a_pattern_is_searched_for_unless_it_must_match_the_whole_answer():
    assert passes("I think it is B, surely", "regex_match", pattern=r"\b[A-D]\b")
    assert not passes("I think it is B", "regex_match", pattern="[A-D]", full=True)
    assert passes(" B\n", "regex_match", pattern="[A-D]", full=True)
    assert not passes("", "regex_match", pattern="[A-D]")
    assert passes("", "regex_match", pattern="")
    assert passes("YES", "regex_match", pattern="(?i)^yes$")
    assert passes("naïve 東京", "regex_match", pattern=r"\w+ 東京", full=True)


SAFE_PATTERNS = st.sampled_from(
    [r"a+b?", r"[ab]{2}", r"^a|b$", r"(a)(b)\1", r"(?i)A", r"\bab\b", r".", r"a(?=b)", r"(?<!a)b", r"[^a\s]", r"a.*?b"]
)


@settings(deadline=None)
@given(SAFE_PATTERNS, st.text(alphabet="ab \nA"), st.booleans())
def test_patterns_mean_what_they_mean_in_re(pattern, text, full):
    expected = (re.fullmatch if full else re.search)(pattern, text.strip())
    assert passes(text, "regex_match", pattern=pattern, full=full) == (expected is not None)


@pytest.mark.parametrize(("pattern", "answer"), [("(a|a)*$", "a" * 5000 + "b"), (r"(\w+\s?)+$", "word " * 5000 + "!")])
def test_a_catastrophic_pattern_is_cut_off_scored_zero_and_logged(pattern, answer, caplog):
    started = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        assert not passes(answer, "regex_match", pattern=pattern)
    assert time.perf_counter() - started < 10
    assert "counts as no match" in caplog.text


@pytest.mark.parametrize(
    "pattern",
    ["(((a{1000}){1000}){1000}){1000}", "(?x)(a{1000}) # once\n{1000}", "a" * 2001, "(?:" * 500 + "a" + ")" * 500, "a{99999999999}"],
)
def test_a_pattern_that_would_explode_while_compiling_is_refused(pattern):
    started = time.perf_counter()
    with pytest.raises(UserError, match=r"^row\.pattern: "):
        passes("a", "regex_match", pattern=pattern)
    assert time.perf_counter() - started < 5


def test_counted_repeats_of_usual_patterns_are_allowed():
    assert passes("2024-01-31T12:30:59", "regex_match", pattern=r"\d{4}-\d{2}-\d{2}T(\d{2}:){2}\d{2}", full=True)
    assert passes("ab" * 50 + "-" + "f" * 64, "regex_match", pattern=r"(?:ab){50}-[0-9a-f]{64}", full=True)


# json_validity


@pytest.mark.parametrize(
    "answer",
    [
        '{"a": 1}',
        "[]",
        "null",
        '"text"',
        "-1.5e3",
        " \n[1, 2]\n ",
        '{"é": "東京 \\ud83d\\ude00"}',
        "1" * 5000,
        "1e999",
        '```json\n{"a": 1}\n```',
        'Here it is:\n\n```JSON\n{"a":\n 1}\n```\nHope this helps!',
        "``` json\r\n[1]\r\n```",
        '  ```json\n  {"a": 1}\n  ```',
        '["```json"]',
        '["a\u2028b"]',
    ],
)
def test_strict_json_is_valid_bare_or_in_one_fence(answer):
    assert passes(answer, "json_validity")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "text",
        "{'a': 1}",
        '{"a": 1,}',
        "NaN",
        '{"a": NaN}',
        "[Infinity]",
        "[-Infinity]",
        '{"a": 1, "a": 2}',
        '{"o": {"a": 1, "a": 1}}',
        '{"a": 1} and more',
        '["line\nbreak"]',
        "[01]",
        "[.5]",
        "[١]",
        "\ufeff{}",
        "True",
        "[" * 100_000,
        "```json\n{}\n```\n```json\n{}\n```",
        "```json\n{}",
        "```\n{}\n```",
        "```json\n```",
        '```json\n{"a": NaN}\n```',
    ],
)
def test_what_is_not_strict_json_is_invalid(answer):
    assert not passes(answer, "json_validity")


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.booleans(),
)
def test_what_json_writes_is_valid_exactly_where_all_its_numbers_are_finite(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    finite = not any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in leaves(value))
    assert passes(text, "json_validity") == finite
    assert passes(f"Sure!\n```json\n{text}\n```\n", "json_validity") == finite


def leaves(value: Any) -> list[Any]:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if inner is None else [leaf for one in inner for leaf in leaves(one)]


def test_required_keys_are_those_of_the_outermost_object():
    assert passes('{"a": null, "b": 2, "c": 3}', "json_validity", required_keys=["a", "b"])
    assert not passes('{"a": {"b": 1}}', "json_validity", required_keys=["a", "b"])
    assert not passes('["a"]', "json_validity", required_keys=["a"])
    assert not passes('"a"', "json_validity", required_keys=["a"])
    assert passes("[]", "json_validity", required_keys=[])


def test_many_open_fences_take_linear_time():
    started = time.perf_counter()
    assert not passes("```json\n" * 100_000, "json_validity")
    assert time.perf_counter() - started < 3


# length_limits


@settings(deadline=None)
@given(st.lists(st.sampled_from(["word", "naïve", "x-y", "3.5"])), st.integers(0, 9), st.integers(0, 9))
def test_word_limits_are_inclusive(words, low, above):
    limits = {"min_words": low, "max_words": low + above}
    assert passes(" \n".join(words), "length_limits", **limits) == (low <= len(words) <= low + above)


def test_characters_are_code_points_of_the_stripped_answer():
    assert passes("  東京é  ", "length_limits", min_characters=3, max_characters=3)
    assert not passes("  東京é!", "length_limits", max_characters=3)
    assert passes("", "length_limits", max_characters=0)
    assert not passes(" \n", "length_limits", min_characters=1)


@pytest.mark.parametrize(
    ("text", "num_sentences"),
    [
        ("", 0),
        ("...", 0),
        ("No end", 1),
        ("One. Two! Three?", 3),
        ("It is 3.5 m.", 1),
        ("Really?! Yes...", 2),
        ('He said "no." Then left.', 2),
        ("東京です。大阪です！", 2),
        ("A title\n\nA sentence.", 2),
        ("Wrapped over\ntwo lines.", 1),
        ("See example.com now.", 1),
    ],
)
def test_sentences_end_at_marks_before_white_space_and_at_empty_lines(text, num_sentences):
    assert passes(text, "length_limits", min_sentences=num_sentences, max_sentences=num_sentences)


def test_a_long_run_of_marks_takes_linear_time():
    started = time.perf_counter()
    for text in ("!" * 200_000 + "a", ".'" * 100_000 + "a", "\n" * 200_000 + "a", "\n" + " " * 200_000 + "a", "。" * 200_000):
        passes("a" + text, "length_limits", max_sentences=1)
    assert time.perf_counter() - started < 3


# reading


def test_every_kind_reads_and_its_reference_reads_back_the_same():
    checks = read_checks(
        [
            {"kind": "exact_answer", "answer": ["é", "b"], "ignore_case": True},
            {"kind": "final_number", "answer": "1,234.5", "tolerance": 0.01},
            {"kind": "final_number", "answer": 10**30},
            {"kind": "regex_match", "pattern": r"^\d+$"},
            {"kind": "json_validity", "required_keys": ["name"]},
            {"kind": "length_limits", "max_words": 100},
            {"kind": "refusal", "expected": True},
            {"kind": "instruction", "id": "punctuation:no_comma"},
        ],
        "heldout.jsonl:12",
    )
    assert {check.kind for check in checks} == set(KINDS)
    assert [read_check(json.loads(as_reference(check)), "row") for check in checks] == checks


def test_a_key_that_is_null_counts_as_left_out():
    assert read_check({"kind": "regex_match", "pattern": "a", "answer": None, "full": None}, "row") == read_check(
        {"kind": "regex_match", "pattern": "a"}, "row"
    )


def test_no_checks_are_no_checks():
    assert read_checks([], "row") == []


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"kind": "regex_match", "pattern": "ab()c)"}, "checks[0].pattern: not a regular expression (unbalanced parenthesis at 5)"),
        ({"kind": "regex_match", "pattern": "abc)"}, "checks[0].pattern: not a regular expression (unbalanced parenthesis at 3)"),
        ({"kind": "regex_match", "pattern": "(?R)?a"}, "checks[0].pattern: not a regular expression (unknown extension ?R at 1)"),
        ({"kind": "regex_match"}, "checks[0].pattern: missing; it is required"),
        ({"kind": "regex_match", "pattern": "a", "ful": True}, "checks[0].ful: unknown key; did you mean 'full'?"),
        ({"kind": "regex"}, "checks[0].kind: no check is called 'regex'; did you mean 'regex_match'?"),
        (
            {"kind": 3},
            "checks[0].kind: no check is called 3; "
            "known: exact_answer, final_number, instruction, json_validity, length_limits, refusal, regex_match",
        ),
        (
            {"answer": "a"},
            "checks[0].kind: missing; known: exact_answer, final_number, regex_match, json_validity, length_limits, refusal, instruction",
        ),
        ({"kind": "exact_answer", "answer": []}, "checks[0].answer: must be a text, or a list of at least one, got []"),
        ({"kind": "exact_answer", "answer": 5}, "checks[0].answer: must be a text, or a list of at least one, got 5"),
        ({"kind": "exact_answer", "answer": ["a", 5]}, "checks[0].answer: must be a text, or a list of at least one, got ['a', 5]"),
        ({"kind": "final_number", "answer": "1/2"}, "checks[0].answer: '1/2' is no number; write it like 1234.5 or \"1,234.5\""),
        ({"kind": "final_number", "answer": float("nan")}, 'checks[0].answer: nan is no number; write it like 1234.5 or "1,234.5"'),
        ({"kind": "final_number", "answer": True}, 'checks[0].answer: True is no number; write it like 1234.5 or "1,234.5"'),
        ({"kind": "final_number", "answer": 1, "tolerance": -1}, "checks[0].tolerance: must be a finite number of at least 0, got -1"),
        (
            {"kind": "final_number", "answer": 1, "tolerance": float("inf")},
            "checks[0].tolerance: must be a finite number of at least 0, got inf",
        ),
        ({"kind": "json_validity", "required_keys": "name"}, "checks[0].required_keys: input should be a valid list, got 'name'"),
        ({"kind": "length_limits"}, "checks[0]: no limit given; set at least one, such as max_words"),
        ({"kind": "length_limits", "min_words": 5, "max_words": 4}, "checks[0]: min_words 5 is above max_words 4, so no answer can pass"),
        ({"kind": "length_limits", "max_words": -1}, "checks[0].max_words: input should be greater than or equal to 0, got -1"),
        ("final_number", 'checks[0]: must be a mapping such as {"kind": "final_number", "answer": 72}, got \'final_number\''),
    ],
)
def test_a_bad_check_is_one_line_that_names_its_row_and_field(check, message):
    with pytest.raises(UserError) as error:
        read_checks([check], "heldout.jsonl:12")
    assert str(error.value) == f"heldout.jsonl:12: {message}"


def test_a_check_is_of_the_last_answer_or_of_those_that_it_names():
    first, last, each = ({"kind": "exact_answer", "answer": text} for text in "ABC")
    read = read_turn_checks([{**first, "turn": 1}, last, {**each, "turn": "each"}, {**last, "turn": None}], "row", 3)
    assert [[check.answer for check in checks] for checks in read] == [["A", "C"], ["C"], ["B", "C", "B"]]
    assert read_turn_checks([], "row", 2) == [[], []]
    assert read_turn_checks([last], "row", 1) == [read_checks([last], "row")]


@pytest.mark.parametrize("turn", [0, 3, -1, "last", True, 1.0, [1]])
def test_a_turn_that_no_answer_has_is_refused(turn):
    with pytest.raises(
        UserError, match=r'^row: checks\[0\]\.turn: must be a number from 1 to 2, as so often the row is answered, or "each"'
    ):
        read_turn_checks([{"kind": "exact_answer", "answer": "a", "turn": turn}], "row", 2)


def test_contradictions_are_those_of_one_answer():
    one, other = ({"kind": "instruction", "id": name} for name in ("change_case:english_capital", "change_case:english_lowercase"))
    assert len(read_turn_checks([{**one, "turn": 1}, {**other, "turn": 2}], "row", 2)) == 2
    with pytest.raises(UserError, match=r"^row: "):
        read_turn_checks([one, other], "row", 2)


def test_checks_that_are_no_list_are_refused():
    for checks in ({"kind": "regex_match"}, "regex_match", None):
        with pytest.raises(UserError, match=r"^row: checks: must be a list of mappings"):
            read_checks(checks, "row")


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(deadline=None)
@given(text=st.text())
def test_a_score_is_zero_or_one_for_any_text(kind, text):
    fields = {
        "refusal": {"expected": True},
        "exact_answer": {"answer": "a"},
        "final_number": {"answer": 1},
        "regex_match": {"pattern": "a+"},
        "json_validity": {},
        "length_limits": {"max_words": 2, "min_sentences": 1},
        "instruction": {"id": "length_constraints:number_words", "num_words": 2, "relation": "at least"},
    }
    assert score(read_check({"kind": kind, **fields[kind]}, "row"), text) in (0.0, 1.0)


def test_importing_the_checks_imports_nothing_heavy():
    code = "import sys, posttrain.metrics.check; print(sorted({'torch', 'evaluate', 'datasets', 'numpy', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"
