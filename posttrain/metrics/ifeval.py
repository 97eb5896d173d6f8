"""Instructions that a program can verify: the 25 of IFEval (Zhou et al., 2023, arXiv:2311.07911), as checks that a row may carry.

  strict   the answer follows the instruction as it stands
  loose    one of eight forms of it does: with and without its first line, its last line, and all `*`

What each instruction asks is what lm-evaluation-harness 0.4.13 decides it by, so that figures compare with published ones;
benchmarks/ifeval_agreement.py holds every one against it. Where that one fails, errs or draws lots, this one differs:
  1. Keywords, forbidden words and the marks of sections and postscripts are texts; there they are regular expressions, by which
     `C++` is found in `cat`, and `(` is an error.
  2. A letter may be any character; there, one that is not of a to z becomes a random letter.
  3. What is missing, 0 or out of range is refused; there it becomes a random value. Only `num_bullets: 0` has a meaning.
  4. A language may be any of langdetect's; there it must be one of thirty.
  5. The draws by which langdetect guesses a language are always the same ones; there they are new ones each time.
"""

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import regex  # type: ignore[import-untyped,unused-ignore]
from pydantic import AfterValidator, Field, field_validator, model_validator

from posttrain.config import Config, nearest, validate
from posttrain.error import UserError


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank; fill it in")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]
Count = Annotated[int, Field(ge=1)]
Relation = Literal["less than", "at least"]
Bound = tuple[float, float]
"""The least and the most, each inclusive."""


class Instruction(Config):
    """The answer follows one of IFEval's 25 instructions; `id` says which, and the other fields are that instruction's own."""

    kind: Literal["instruction"]
    id: str
    """Id of the instruction, such as `punctuation:no_comma`."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Modules of the extra `ifeval` without which it cannot be decided."""

    def holds(self, answer: str) -> bool:
        """Whether an answer that is not blank follows the instruction."""
        raise NotImplementedError

    @property
    def bounds(self) -> dict[str, Bound]:
        """What the instruction bounds. Two whose bounds on one thing do not meet cannot both be followed."""
        return {}


class Keywords(Instruction):
    """Each keyword is found, in whatever case, also inside a longer word."""

    id: Literal["keywords:existence"]
    keywords: Annotated[list[Text], Field(min_length=1)]
    """Texts to find."""

    def holds(self, answer: str) -> bool:
        return all(_count(keyword, answer) for keyword in self.keywords)

    @property
    def bounds(self) -> dict[str, Bound]:
        return {_quoted(keyword): (1, math.inf) for keyword in self.keywords}


class ForbiddenWords(Instruction):
    """None of the words is found as a word of its own, in whatever case."""

    id: Literal["keywords:forbidden_words"]
    forbidden_words: Annotated[list[Text], Field(min_length=1)]
    """Words not to find."""

    def holds(self, answer: str) -> bool:
        return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) for word in self.forbidden_words)


class Counted(Instruction):
    """An instruction that says how many of something there shall be."""

    def count(self, answer: str) -> int:
        """How many there are."""
        raise NotImplementedError

    def holds(self, answer: str) -> bool:
        (low, high), *_ = self.bounds.values()
        return low <= self.count(answer) <= high


class KeywordFrequency(Counted):
    """A keyword is found so often, in whatever case, also inside longer words."""

    id: Literal["keywords:frequency"]
    keyword: Text
    """Text to find; white space around it does not count."""
    frequency: Count
    """How often."""
    relation: Relation
    """Which side of `frequency` is asked for."""

    def count(self, answer: str) -> int:
        return _count(self.keyword.strip(), answer)

    @property
    def bounds(self) -> dict[str, Bound]:
        return {_quoted(self.keyword.strip()): _side(self.relation, self.frequency)}


class LetterFrequency(Counted):
    """A letter is found so often, in either case."""

    id: Literal["keywords:letter_frequency"]
    letter: Text
    """One character."""
    let_frequency: Count
    """How often."""
    let_relation: Relation
    """Which side of `let_frequency` is asked for."""

    @field_validator("letter")
    @classmethod
    def _one(cls, letter: str) -> str:
        if len(letter) != 1:
            raise ValueError(f"must be one character, got {letter!r}")
        return letter

    def count(self, answer: str) -> int:
        return answer.lower().count(self.letter.lower())

    @property
    def bounds(self) -> dict[str, Bound]:
        return {f"letter {self.letter.lower()!r}": _side(self.let_relation, self.let_frequency)}


class ResponseLanguage(Instruction):
    """The answer is in a language, as langdetect guesses it. An answer without a word to guess by counts as following."""

    id: Literal["language:response_language"]
    language: str
    """Code of langdetect's, such as `de` or `zh-cn`."""
    needs = ("langdetect",)

    @field_validator("language")
    @classmethod
    def _known(cls, language: str) -> str:
        if language not in (known := _languages()):
            raise ValueError(f"{language!r} is no language that langdetect knows; {nearest(language, known)}")
        return language

    def holds(self, answer: str) -> bool:
        return _language(answer) in (self.language, None)


class Sentences(Counted):
    """So many sentences, by Punkt's model of English (Kiss and Strunk, 2006)."""

    id: Literal["length_constraints:number_sentences"]
    num_sentences: Count
    """How many."""
    relation: Relation
    """Which side of `num_sentences` is asked for."""
    needs = ("nltk", "punkt")

    def count(self, answer: str) -> int:
        return len(_sentences(answer))

    @property
    def bounds(self) -> dict[str, Bound]:
        return {"sentences": _side(self.relation, self.num_sentences)}


class Paragraphs(Instruction):
    """Exactly so many paragraphs with `***` between them; an empty one may stand only before the first or after the last."""

    id: Literal["length_constraints:number_paragraphs"]
    num_paragraphs: Count
    """How many."""

    def holds(self, answer: str) -> bool:
        paragraphs = [part.strip() for part in answer.split("***")]
        return all(paragraphs[1:-1]) and sum(map(bool, paragraphs)) == self.num_paragraphs

    @property
    def bounds(self) -> dict[str, Bound]:
        return {"paragraphs divided by ***": (self.num_paragraphs, self.num_paragraphs)}


class Words(Counted):
    """So many words; a word is a run of letters, marks, digits and underscores."""

    id: Literal["length_constraints:number_words"]
    num_words: Count
    """How many."""
    relation: Relation
    """Which side of `num_words` is asked for."""

    def count(self, answer: str) -> int:
        return len(WORD.findall(answer))

    @property
    def bounds(self) -> dict[str, Bound]:
        return {"words": _side(self.relation, self.num_words)}


# Of the engine `regex`, as in NLTK: to `re`, the marks on Indic and Arabic letters are no part of a word.
WORD = regex.compile(r"\w+")


class FirstWord(Instruction):
    """Exactly so many paragraphs with an empty line between them, of which one begins with a word, in whatever case."""

    id: Literal["length_constraints:nth_paragraph_first_word"]
    num_paragraphs: Count
    """How many paragraphs."""
    nth_paragraph: Count
    """Which one, from 1."""
    first_word: Text
    """Its first word, without any of . , ? ! ' and double quotes."""

    @field_validator("first_word")
    @classmethod
    def _possible_word(cls, first_word: str) -> str:
        if _first_word(first_word) != first_word.lower():
            raise ValueError(f"must be one word without . , ? ! or quotes, since a first word ends there, got {first_word!r}")
        return first_word

    @model_validator(mode="after")
    def _possible(self) -> "FirstWord":
        if self.nth_paragraph > self.num_paragraphs:
            raise ValueError(f"nth_paragraph: {self.nth_paragraph} is above num_paragraphs {self.num_paragraphs}, so no answer can pass")
        return self

    def holds(self, answer: str) -> bool:
        paragraphs = answer.split("\n\n")
        if sum(bool(paragraph.strip()) for paragraph in paragraphs) != self.num_paragraphs:
            return False
        nth = paragraphs[self.nth_paragraph - 1]
        return bool(nth.strip()) and _first_word(nth) == self.first_word.lower()

    @property
    def bounds(self) -> dict[str, Bound]:
        return {"paragraphs divided by an empty line": (self.num_paragraphs, self.num_paragraphs)}


def _first_word(paragraph: str) -> str:
    word = paragraph.split()[0].lstrip("'").lstrip('"')
    return re.split(r"""[.,?!'"]""", word, maxsplit=1)[0].lower()


class Placeholders(Counted):
    """At least so many placeholders in square brackets, such as `[address]`, each on one line."""

    id: Literal["detectable_content:number_placeholders"]
    num_placeholders: Count
    """How many."""

    def count(self, answer: str) -> int:
        # Each `]` closes what the first `[` after the one before it opened.
        return sum("[" in before for line in answer.split("\n") for before in line.split("]")[:-1])

    @property
    def bounds(self) -> dict[str, Bound]:
        return {"placeholders": (self.num_placeholders, math.inf)}


class Postscript(Instruction):
    """A postscript's mark is found, in whatever case; in `P.S.` and `P.P.S` a blank may follow each dot."""

    id: Literal["detectable_content:postscript"]
    postscript_marker: Text
    """`P.S.`, `P.P.S` or another text; white space around it does not count."""

    def holds(self, answer: str) -> bool:
        marker = self.postscript_marker.strip()
        return re.search(POSTSCRIPTS.get(marker, re.escape(marker.lower())), answer.lower()) is not None


POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}


class Bullets(Counted):
    """Exactly so many bullet points: lines that begin with `*`, but not with `**`, or with `-`."""

    id: Literal["detectable_format:number_bullet_lists"]
    num_bullets: Annotated[int, Field(ge=0)]
    """How many."""

    def count(self, answer: str) -> int:
        return sum(len(pattern.findall(answer)) for pattern in BULLETS)

    @property
    def bounds(self) -> dict[str, Bound]:
        return {"bullet points": (self.num_bullets, self.num_bullets)}


# A `*` that has its line to itself takes the next line with it, as `[^*]` may be the end of a line.
BULLETS = (re.compile(r"^[^\S\n]*\*[^*].*$", re.MULTILINE), re.compile(r"^[^\S\n]*-", re.MULTILINE))


class ConstrainedResponse(Instruction):
    """One of IFEval's three answers is found: `My answer is yes.`, `... no.` or `... maybe.`"""

    id: Literal["detectable_format:constrained_response"]

    def holds(self, answer: str) -> bool:
        return any(f"My answer is {word}." in answer for word in ("yes", "no", "maybe"))


class Highlights(Counted):
    """At least so many texts between `*` on one line, such as `*highlighted*`; one between `**` counts once as well."""

    id: Literal["detectable_format:number_highlighted_sections"]
    num_highlights: Count
    """How many."""

    def count(self, answer: str) -> int:
        return sum(bool(found.strip("*").strip()) for pattern in HIGHLIGHTS for found in pattern.findall(answer))

    @property
    def bounds(self) -> dict[str, Bound]:
        return {"highlights": (self.num_highlights, math.inf)}


HIGHLIGHTS = (re.compile(r"\*[^\n*]*\*"), re.compile(r"\*\*[^\n*]*\*\*"))


class Sections(Counted):
    """At least so many marks of a section, each a word and a number, such as `Section 1`."""

    id: Literal["detectable_format:multiple_sections"]
    section_spliter: Text
    """The word, such as `Section` or `Day`, in this very case; white space around it does not count."""
    num_sections: Count
    """How many."""

    def count(self, answer: str) -> int:
        return len(re.findall(re.escape(self.section_spliter.strip()) + r"\s?\d+", answer))

    @property
    def bounds(self) -> dict[str, Bound]:
        return {f"sections {self.section_spliter.strip()!r}": (self.num_sections, math.inf)}


class JsonFormat(Instruction):
    """The answer, or what it holds between fences of ```, is JSON as Python's `json` takes it."""

    id: Literal["detectable_format:json_format"]

    def holds(self, answer: str) -> bool:
        text = answer.strip()
        for fence in ("```json", "```Json", "```JSON", "```"):
            text = text.removeprefix(fence)
        try:
            json.loads(text.removesuffix("```").strip())
        except (ValueError, RecursionError):
            return False
        return True


class Title(Instruction):
    """A title in double angular brackets on one line, such as `<<a title>>`."""

    id: Literal["detectable_format:title"]

    def holds(self, answer: str) -> bool:
        return any(map(_has_title, answer.split("\n")))


def _has_title(line: str) -> bool:
    start, end = line.find("<<"), line.rfind(">>")
    return 0 <= start <= end - 3 and bool(line[start:end].lstrip("<").rstrip(">").strip())


class TwoResponses(Instruction):
    """Two different answers with `******` between them, which may stand before the first and after the second as well."""

    id: Literal["combination:two_responses"]

    def holds(self, answer: str) -> bool:
        parts = [part.strip() for part in answer.split("******")]
        given = [part for part in parts if part]
        return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


class RepeatPrompt(Instruction):
    """The answer begins with a text, in whatever case."""

    id: Literal["combination:repeat_prompt"]
    prompt_to_repeat: Text
    """The text; white space around it does not count."""

    def holds(self, answer: str) -> bool:
        return answer.strip().lower().startswith(self.prompt_to_repeat.strip().lower())


class EndPhrase(Instruction):
    """The answer ends with a phrase, in whatever case; double quotes may follow it."""

    id: Literal["startend:end_checker"]
    end_phrase: Text
    """The phrase; white space around it does not count."""

    def holds(self, answer: str) -> bool:
        return answer.strip().strip('"').lower().endswith(self.end_phrase.strip().lower())


class Quotation(Instruction):
    """The whole answer stands in straight double quotes."""

    id: Literal["startend:quotation"]

    def holds(self, answer: str) -> bool:
        text = answer.strip()
        return len(text) > 1 and text[0] == text[-1] == '"'


class CapitalWords(Counted):
    """So many words in capital letters, by NLTK's tokenizer, to which a word with a hyphen is one."""

    id: Literal["change_case:capital_word_frequency"]
    capital_frequency: Count
    """How many."""
    capital_relation: Relation
    """Which side of `capital_frequency` is asked for."""
    needs = ("nltk", "punkt")

    def count(self, answer: str) -> int:
        return sum(word.isupper() for word in _words(answer))

    @property
    def bounds(self) -> dict[str, Bound]:
        return {"words in capitals": _side(self.capital_relation, self.capital_frequency)}


class EnglishCapital(Instruction):
    """The whole answer is in capital letters and English."""

    id: Literal["change_case:english_capital"]
    needs = ("langdetect",)

    def holds(self, answer: str) -> bool:
        return answer.isupper() and _language(answer) in ("en", None)

    @property
    def bounds(self) -> dict[str, Bound]:
        return {"lowercase letters": (0, 0)}


class EnglishLowercase(Instruction):
    """The whole answer is in lowercase letters and English."""

    id: Literal["change_case:english_lowercase"]
    needs = ("langdetect",)

    def holds(self, answer: str) -> bool:
        return answer.islower() and _language(answer) in ("en", None)

    @property
    def bounds(self) -> dict[str, Bound]:
        return {"lowercase letters": (1, math.inf), "words in capitals": (0, 0)}


class NoComma(Instruction):
    """No comma."""

    id: Literal["punctuation:no_comma"]

    def holds(self, answer: str) -> bool:
        return "," not in answer


INSTRUCTIONS: dict[str, type[Instruction]] = {
    "keywords:existence": Keywords,
    "keywords:frequency": KeywordFrequency,
    "keywords:forbidden_words": ForbiddenWords,
    "keywords:letter_frequency": LetterFrequency,
    "language:response_language": ResponseLanguage,
    "length_constraints:number_sentences": Sentences,
    "length_constraints:number_paragraphs": Paragraphs,
    "length_constraints:number_words": Words,
    "length_constraints:nth_paragraph_first_word": FirstWord,
    "detectable_content:number_placeholders": Placeholders,
    "detectable_content:postscript": Postscript,
    "detectable_format:number_bullet_lists": Bullets,
    "detectable_format:constrained_response": ConstrainedResponse,
    "detectable_format:number_highlighted_sections": Highlights,
    "detectable_format:multiple_sections": Sections,
    "detectable_format:json_format": JsonFormat,
    "detectable_format:title": Title,
    "combination:two_responses": TwoResponses,
    "combination:repeat_prompt": RepeatPrompt,
    "startend:end_checker": EndPhrase,
    "startend:quotation": Quotation,
    "change_case:capital_word_frequency": CapitalWords,
    "change_case:english_capital": EnglishCapital,
    "change_case:english_lowercase": EnglishLowercase,
    "punctuation:no_comma": NoComma,
}


def read_instruction(given: Mapping[str, Any], at: str) -> Instruction:
    """The validated instruction that `given`, without nulls, describes. Raises `UserError` beginning with `at`."""
    name = given.get("id")
    if name is None:
        raise UserError(f"{at}.id: missing; give the id of an instruction, such as punctuation:no_comma")
    if not isinstance(name, str) or name not in INSTRUCTIONS:
        raise UserError(f"{at}.id: no instruction is called {name!r}; {nearest(str(name), list(INSTRUCTIONS))}")
    cls = INSTRUCTIONS[name]
    if any(find_spec(module) is None for module in cls.needs):
        raise UserError(f'{at}: {name} needs {" and ".join(cls.needs)}; run: pip install "posttrain[ifeval]"')
    return validate(cls, given, f"{at} ({name})")


def refuse_contradictions(instructions: Sequence[Instruction], at: str) -> None:
    """Raise `UserError`, beginning with `at`, where no answer can follow two of the instructions of one row."""
    for one, other in combinations(instructions, 2):
        languages = (_asked_language(one), _asked_language(other))
        if None not in languages and languages[0] != languages[1]:
            raise UserError(f"{at}: no answer can follow both {one.id} ({languages[0]}) and {other.id} ({languages[1]}); drop one")
        for what, (low, high) in one.bounds.items():
            least, most = other.bounds.get(what, (0, math.inf))
            if max(low, least) > min(high, most):
                asked = f"{what}: {_in_words(low, high)} and {_in_words(least, most)}"
                raise UserError(f"{at}: no answer can follow both {one.id} and {other.id} ({asked}); change or drop one")


def _asked_language(instruction: Instruction) -> str | None:
    match instruction:
        case ResponseLanguage():
            return instruction.language
        case EnglishCapital() | EnglishLowercase():
            return "en"
        case _:
            return None


def _in_words(low: float, high: float) -> str:
    if low == high:
        return f"exactly {low}"
    return f"at least {low}" if high == math.inf else f"at most {high}"


def follows(instruction: Instruction, answer: str) -> bool:
    """Whether the answer, white space and all, follows the instruction. A blank answer follows none."""
    return bool(answer.strip()) and instruction.holds(answer)


def follows_loosely(instruction: Instruction, answer: str) -> bool:
    """Whether one of the eight forms of the answer follows the instruction."""
    lines = answer.split("\n")
    forms = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return any(follows(instruction, form) for form in (*forms, *(form.replace("*", "") for form in forms)))


def _count(text: str, answer: str) -> int:
    return len(re.findall(re.escape(text), answer, re.IGNORECASE))


def _quoted(keyword: str) -> str:
    return repr(keyword.lower())


def _side(relation: Relation, number: int) -> Bound:
    return (0, number - 1) if relation == "less than" else (number, math.inf)


# What the libraries of the extra `ifeval` say of a text.


def _languages() -> list[str]:
    from langdetect.detector_factory import PROFILES_DIRECTORY  # type: ignore[import-untyped,unused-ignore]

    return sorted(path.name for path in Path(PROFILES_DIRECTORY).iterdir())


@functools.cache
def _detectors() -> Any:
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    detectors = DetectorFactory()
    detectors.load_json_profile([(Path(PROFILES_DIRECTORY) / name).read_text(encoding="utf-8") for name in _languages()])
    detectors.set_seed(0)
    return detectors


def _language(text: str) -> str | None:
    """The likeliest language, None where nothing tells it, such as in digits."""
    from langdetect import LangDetectException

    detector = _detectors().create()
    detector.append(text)
    try:
        return str(detector.detect())
    except LangDetectException:
        return None


@functools.cache
def _splitter() -> Any:
    """NLTK's splitter with the very parameters of its English model, which NLTK itself would download."""
    import punkt
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer  # type: ignore[import-untyped,unused-ignore]

    model = punkt.load_model("english")
    parameters = PunktParameters()
    parameters.abbrev_types = set(model.abbrev_types)
    parameters.collocations = set(model.collocations)
    parameters.sent_starters = set(model.sent_starters)
    parameters.ortho_context.update(model.ortho_context)
    return PunktSentenceTokenizer(parameters)


def _sentences(text: str) -> list[str]:
    sentences: list[str] = _splitter().tokenize(text)
    return sentences


def _words(text: str) -> list[str]:
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = NLTKWordTokenizer()
    return [word for sentence in _sentences(text) for word in tokenizer.tokenize(sentence)]
