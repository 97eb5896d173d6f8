"""The checks that a row of data may carry, such as `{"kind": "final_number", "answer": 72}`, and how each scores an answer.

A check is a rule with one right outcome; no model judges. The `evaluate` modules beside this file call `score` below, so a
check means the same wherever it is used. Importing this imports no torch and no evaluate.

Every check sees the answer without its surrounding white space, but for `instruction`, which may ask for some.

Patterns come with the data, so they are untrusted. The syntax is that of Python's `re`, which has no recursion; the engine is
`regex`, which can stop after a time limit; and counted repeats are bounded, since `regex` unrolls them while compiling.
"""

import json
import logging
import math
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal
from typing import Any, Literal, assert_never

import regex  # type: ignore[import-untyped,unused-ignore]
from pydantic import Field, field_validator, model_validator

from posttrain.config import Config, nearest, validate
from posttrain.error import UserError
from posttrain.metrics.ifeval import Instruction, follows, read_instruction, refuse_contradictions
from posttrain.metrics.refusals import is_refusal

MATCH_TIMEOUT_S = 1.0
MAX_PATTERN_CHARACTERS = 2000
MAX_UNROLLED_CHARACTERS = 100_000

logger = logging.getLogger(__name__)


class ExactAnswer(Config):
    """The answer is the expected text, or one of several. Canonically equivalent Unicode (composed or not) is equal."""

    kind: Literal["exact_answer"]
    answer: str | list[str]
    """The expected text, or a list of texts of which any one will do."""
    ignore_case: bool = False
    """Compare without regard to case, by Unicode case folding."""
    collapse_whitespace: bool = False
    """Compare with every run of white space inside the texts as one space."""

    @field_validator("answer", mode="before")
    @classmethod
    def _texts(cls, answer: object) -> object:
        texts = answer if isinstance(answer, list) else [answer]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"must be a text, or a list of at least one, got {_short(answer)}")
        return answer


class FinalNumber(Config):
    """The last number in the answer is the expected one; a line `#### N` settles which number is the last, as in GSM8K."""

    kind: Literal["final_number"]
    answer: int | float | str
    """The expected number, such as 1234.5 or `1,234.5`. A `$` or `%` is not a scale: `50%` is 50."""
    tolerance: int | float = 0
    """Largest absolute difference that still counts, in units of the answer."""

    @field_validator("answer", mode="before")
    @classmethod
    def _number(cls, answer: object) -> object:
        if isinstance(answer, bool) or not isinstance(answer, int | float | str) or as_number(answer) is None:
            raise ValueError(f'{_short(answer)} is no number; write it like 1234.5 or "1,234.5"')
        return answer

    @field_validator("tolerance", mode="before")
    @classmethod
    def _distance(cls, tolerance: object) -> object:
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
            raise ValueError(f"must be a finite number of at least 0, got {_short(tolerance)}")
        return tolerance


class RegexMatch(Config):
    """A regular expression is found in the answer. No match within a second counts as none, and is logged."""

    kind: Literal["regex_match"]
    pattern: str
    """Regular expression in the syntax of Python's `re`; flags go inside, such as `(?i)`."""
    full: bool = False
    """The pattern must match the whole answer instead of a part of it."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        _check_pattern(pattern)
        return pattern


class JsonValidity(Config):
    """The answer, or the one block in it that is fenced as ```json, is strict JSON: no NaN, no key twice in one object."""

    kind: Literal["json_validity"]
    required_keys: list[str] | None = None
    """Keys that the outermost value, then an object, must have; by default any JSON value will do."""


class LengthLimits(Config):
    """The length of the answer is within limits, each of them inclusive."""

    kind: Literal["length_limits"]
    min_words: int | None = Field(None, ge=0)
    """Fewest words; a word is a run without white space."""
    max_words: int | None = Field(None, ge=0)
    """Most words."""
    min_characters: int | None = Field(None, ge=0)
    """Fewest characters, as Unicode code points."""
    max_characters: int | None = Field(None, ge=0)
    """Most characters."""
    min_sentences: int | None = Field(None, ge=0)
    """Fewest sentences; one ends at `.!?` before white space, at their full-width forms, or at an empty line."""
    max_sentences: int | None = Field(None, ge=0)
    """Most sentences. An abbreviation such as `Dr.` ends one too."""

    @model_validator(mode="after")
    def _possible(self) -> "LengthLimits":
        if all(low is None and high is None for low, high in self.bounds.values()):
            raise ValueError("no limit given; set at least one, such as max_words")
        for unit, (low, high) in self.bounds.items():
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{unit} {low} is above max_{unit} {high}, so no answer can pass")
        return self

    @property
    def bounds(self) -> dict[str, tuple[int | None, int | None]]:
        """Unit to `(least, most)`, each None where unlimited."""
        return {
            "words": (self.min_words, self.max_words),
            "characters": (self.min_characters, self.max_characters),
            "sentences": (self.min_sentences, self.max_sentences),
        }


class Refusal(Config):
    """The answer declines to do what was asked, or does not: the one is expected of a harmful prompt, the other of a harmless one."""

    kind: Literal["refusal"]
    expected: bool
    """Whether the answer should be a refusal; what counts as one is in refusals.py."""


Check = ExactAnswer | FinalNumber | RegexMatch | JsonValidity | LengthLimits | Refusal | Instruction

KINDS: dict[str, type[Check]] = {
    "exact_answer": ExactAnswer,
    "final_number": FinalNumber,
    "regex_match": RegexMatch,
    "json_validity": JsonValidity,
    "length_limits": LengthLimits,
    "refusal": Refusal,
    "instruction": Instruction,
}


def read_checks(checks: Sequence[Mapping[str, Any]], origin: str) -> list[Check]:
    """The validated checks of one row. `origin` says where the row stands, such as `heldout.jsonl:12`. Raises `UserError`."""
    if not isinstance(checks, Sequence) or isinstance(checks, str):
        raise UserError(f'{origin}: checks: must be a list of mappings such as {{"kind": "final_number", "answer": 72}}')
    read = [read_check(check, f"{origin}: checks[{index}]") for index, check in enumerate(checks)]
    refuse_contradictions([check for check in read if isinstance(check, Instruction)], origin)
    return read


def read_turn_checks(checks: Sequence[Mapping[str, Any]], origin: str, num_turns: int) -> list[list[Check]]:
    """The validated checks of each of the answers to one row, `(num_turns,)`.

    A check may say which answer it is of, by `turn`: a number from 1, or `each`; without it, it is of the last. Raises `UserError`.
    """
    turns: list[list[Check]] = [[] for _ in range(num_turns)]
    for index, raw in enumerate(checks):
        at = f"{origin}: checks[{index}]"
        check = read_check({key: value for key, value in raw.items() if key != "turn"}, at)
        turn = raw.get("turn")
        if turn == "each":
            asked = range(num_turns)
        elif turn is None:
            asked = range(num_turns - 1, num_turns)
        elif isinstance(turn, int) and not isinstance(turn, bool) and 1 <= turn <= num_turns:
            asked = range(turn - 1, turn)
        else:
            raise UserError(
                f'{at}.turn: must be a number from 1 to {num_turns}, as so often the row is answered, or "each", got {_short(turn)}'
            )
        for number in asked:
            turns[number].append(check)
    for found in turns:
        refuse_contradictions([check for check in found if isinstance(check, Instruction)], origin)
    return turns


def read_check(raw: object, at: str) -> Check:
    """The validated check that `raw` describes. A key that is null counts as left out, since Arrow files fill the keys that
    only other rows have with nulls. Raises `UserError` beginning with `at`."""
    if not isinstance(raw, Mapping):
        raise UserError(f'{at}: must be a mapping such as {{"kind": "final_number", "answer": 72}}, got {_short(raw)}')
    given = {key: value for key, value in raw.items() if value is not None}
    kind = given.get("kind")
    if kind is None:
        raise UserError(f"{at}.kind: missing; known: {', '.join(KINDS)}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{at}.kind: no check is called {_short(kind)}; {nearest(str(kind), list(KINDS))}")
    return read_instruction(given, at) if kind == "instruction" else validate(KINDS[kind], given, at)


def as_reference(check: Check) -> str:
    """`check` as the JSON text that the `evaluate` modules take as a reference."""
    return json.dumps(check.model_dump(exclude_defaults=True), ensure_ascii=False)


def score(check: Check, answer: str) -> float:
    """1.0 where `answer` passes `check`, else 0.0."""
    text = answer.strip()
    match check:
        case ExactAnswer():
            passed = _is_exact(check, text)
        case FinalNumber():
            passed = _is_final_number(check, text)
        case RegexMatch():
            passed = _matches(check, text)
        case JsonValidity():
            passed = _is_json(check, text)
        case LengthLimits():
            passed = _is_within(check, text)
        case Refusal():
            passed = is_refusal(text) == check.expected
        case Instruction():
            passed = follows(check, answer)
        case _:
            assert_never(check)
    return float(passed)


def _is_exact(check: ExactAnswer, text: str) -> bool:
    expected = [check.answer] if isinstance(check.answer, str) else check.answer
    return _canonical(check, text) in {_canonical(check, one) for one in expected}


def _canonical(check: ExactAnswer, text: str) -> str:
    text = unicodedata.normalize("NFC", text.strip())
    if check.ignore_case:
        text = unicodedata.normalize("NFC", text.casefold())
    return " ".join(text.split()) if check.collapse_whitespace else text


# Not a sign: the hyphen of `5-3`, `COVID-19` or `pages 10-12`. Not a number: the digits of `CO2` or `v1.5`.
NUMBER = re.compile(
    r"""
    (?: (?<![\w)\]}%-]) (?P<sign>[-+\u2212]) )?
    (?: \\?[$€£¥] (?P<inner>[-\u2212])? )?
    (?<![A-Za-z_\d]) (?<!\d\.)
    (?P<digits> (?: \d{1,3} (?: ,\d{3} )+ (?!\d) | \d+ ) (?: \.\d+ )? | (?<!\.)\.\d+ )
    (?P<exponent> [eE][+-]?\d{1,4} (?![A-Za-z_\d]) )?
    """,
    re.VERBOSE,
)
MARKER = "####"


def final_number(text: str) -> Decimal | None:
    """The number after the first `####` that has its line to itself, else the last number in `text`, else None.

    Understands `1,234.5`, `-3`, `.5`, `2e-3`, `$12`, `-$12` and `50%` (which is 50). A fraction `1/2` is two numbers.
    """
    for line in text.splitlines():
        if MARKER in line and (marked := as_number(line.partition(MARKER)[2].strip().rstrip("."))) is not None:
            return marked
    found = None
    for found in NUMBER.finditer(text):  # noqa: B007
        pass
    return _decimal(found) if found else None


def as_number(value: float | str) -> Decimal | None:
    """The exact decimal value of a number, or of a text that is one number and nothing else; else None."""
    if isinstance(value, str):
        found = NUMBER.fullmatch(value.strip().removesuffix("%").removesuffix("\\"))
        return _decimal(found) if found else None
    # The shortest text of a float is what the data says: 0.1, and not 0.1000000000000000055.
    number = Decimal(str(value))
    return number if number.is_finite() else None


def _decimal(found: re.Match[str]) -> Decimal:
    number = Decimal(found["digits"].replace(",", "") + (found["exponent"] or ""))
    return number.copy_negate() if found["inner"] or found["sign"] in ("-", "\u2212") else number


# The usual context rounds to 28 digits, and so do `-x` and `abs(x)` in it.
EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)


def _is_final_number(check: FinalNumber, text: str) -> bool:
    found, expected, tolerance = final_number(text), as_number(check.answer), as_number(check.tolerance)
    assert expected is not None and tolerance is not None
    return found is not None and EXACT.subtract(found, expected).copy_abs() <= tolerance


def _check_pattern(pattern: str) -> None:
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        raise ValueError(f"has {len(pattern)} characters; at most {MAX_PATTERN_CHARACTERS} are allowed")
    if (size := _unrolled_characters(pattern)) > MAX_UNROLLED_CHARACTERS:
        raise ValueError(f"its counted repeats unroll to {size} characters; at most {MAX_UNROLLED_CHARACTERS} are allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error) as error:
        raise ValueError(f"not a regular expression ({error.msg} at {error.pos or 0})") from None
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"not a usable regular expression ({error})") from None


# A repeat of a group, with what verbose mode allows in between; and a repeat of a single character or class.
GROUP_REPEAT = re.compile(r"\)\s*(?:#[^\n]*\n\s*)*\{\s*(\d+)")
SINGLE_REPEAT = re.compile(r"[^)\s]\s*\{\s*(\d+)")


def _unrolled_characters(pattern: str) -> int:
    """An upper bound, which takes every counted group as nested in every other."""
    groups = math.prod(max(int(count), 1) for count in GROUP_REPEAT.findall(pattern))
    return groups * (len(pattern) + sum(int(count) for count in SINGLE_REPEAT.findall(pattern)))


def _matches(check: RegexMatch, text: str) -> bool:
    compiled = regex.compile(check.pattern)
    try:
        found = (compiled.fullmatch if check.full else compiled.search)(text, timeout=MATCH_TIMEOUT_S)
    except TimeoutError:
        logger.warning(
            "pattern %s took over %g s on an answer of %d characters, so it counts as no match",
            _short(check.pattern),
            MATCH_TIMEOUT_S,
            len(text),
        )
        return False
    return found is not None


def _is_json(check: JsonValidity, text: str) -> bool:
    fenced = _json_blocks(text)
    try:
        value = _strict_json(fenced[0] if len(fenced) == 1 else text)
    except (ValueError, RecursionError):
        return False
    return not check.required_keys or (isinstance(value, dict) and all(key in value for key in check.required_keys))


def _json_blocks(text: str) -> list[str]:
    blocks: list[str] = []
    open_block: list[str] | None = None
    for line in text.split("\n"):
        if open_block is None:
            open_block = [] if line.replace(" ", "").strip().lower() == "```json" else None
        elif line.strip() == "```":
            blocks.append("\n".join(open_block))
            open_block = None
        else:
            open_block.append(line)
    return blocks


def _strict_json(text: str) -> object:
    # Numbers stay text: their values are not needed, and Python limits how many digits an int may have.
    return json.loads(text, parse_int=str, parse_float=str, parse_constant=_no_constant, object_pairs_hook=_unique_keys)


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(unique := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return unique


# The look-behind lets a run of marks be tried once, from its start: `!!!!...` would take quadratic time.
SENTENCE_END = re.compile(r"""(?<![.!?…])[.!?…]+["'”’)\]]*(?=\s|$)|[。！？]+[」』”’]*|\n[ \t]*\n""")


def _is_within(check: LengthLimits, text: str) -> bool:
    counts = {"words": len(text.split()), "characters": len(text), "sentences": _num_sentences(text)}
    return all(
        (low is None or counts[unit] >= low) and (high is None or counts[unit] <= high) for unit, (low, high) in check.bounds.items()
    )


def _num_sentences(text: str) -> int:
    return sum(bool(re.search(r"\w", piece)) for piece in SENTENCE_END.split(text))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
