"""Steps that mend the text of a row, or drop the row for its language or its length; and what a text is made of."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from posttrain.curate.each import Verdict, excerpt, judge_each
from posttrain.curate.rows import answer_texts_of, map_texts, prompt_of, texts_of
from posttrain.curate.step import Bench, Candidate, Outcome, Step
from posttrain.data.rows import Pair, Row
from posttrain.error import UserError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+(?:['’][^\W\d_]+)*")
"""A word; in scripts that are written without spaces, a character."""
FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})(.*)")
INLINE_CODE = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)")


def learned(row: Row) -> list[str]:
    """The answers that a row teaches: of a pair the chosen one."""
    messages = row.chosen if isinstance(row, Pair) else row.messages
    return [m["content"] for m in messages if m["role"] == "assistant" and m["content"] and m.get("train", True)]


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [word.lower() for word in WORD.findall(text)]


def without_code(text: str) -> str:
    """The text without fenced and inline code. A fence that is never closed runs to the end, as Markdown has it."""
    if "`" not in text and "~~~" not in text:
        return text
    kept, fence = [], ""
    for line in text.split("\n"):
        found = FENCE.fullmatch(line)
        if fence:
            if found and found[1].startswith(fence) and not found[2].strip():
                fence = ""
        elif found and not (found[1][0] == "`" and "`" in found[2]):
            fence = found[1]
        else:
            kept.append(line)
    return INLINE_CODE.sub(" ", "\n".join(kept))


# --- mending ---------------------------------------------------------------------------------------------------------

INVISIBLE = re.compile(r"[\u200b\u2060-\u2064\ufeff\ufff9-\ufffb\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""What shows nothing and says nothing, in any script: zero-width spaces, byte order marks, control characters."""
JOINERS = re.compile(r"(?<![^\x00-\u024f])[\u200c\u200d\u200e\u200f\u00ad](?![^\x00-\u024f])")
"""Joiners and direction marks among Latin letters. Persian, Indic and Hebrew text and emoji need them."""
NEWLINES = re.compile(r"\r\n?|[\u0085\u2028\u2029]")
INDENTED = re.compile(r"\n[ \t]+\S")


class Normalize(Step):
    """Mend text: mojibake, Unicode form (NFC), line ends, invisible characters, white space around it.

    Only text that is unmistakably UTF-8 read as another encoding is decoded again, as `ftfy` finds it (Speer, 2019). Quotes,
    ligatures and full-width letters stay as they were written, and so does every indentation.
    """

    name = "normalize"

    def run(self, candidates: Sequence[Candidate], bench: Bench) -> Outcome:
        """Mend every row; drop one of which a message has become empty."""
        import ftfy  # noqa: F401  # once, and not in each of the processes

        return judge_each(candidates, _mended, bench)


def _mended(row: Row) -> Verdict | None:
    changes: set[str] = set()
    mended = map_texts(row, lambda text: mend(text, changes))
    if not changes:
        return None
    if any(before.strip() and not after.strip() for before, after in zip(texts_of(row), texts_of(mended), strict=True)):
        return Verdict("empty", "a message holds nothing but white space and invisible characters")
    return Verdict(row=mended, changes=frozenset(changes))


def mend(text: str, changes: set[str]) -> str:
    """The text mended; what was done to it is added to `changes`. A mended text has nothing more to mend."""
    before = None
    while text != before:  # what one mends, another may read: a byte order mark comes out of mojibake
        before = text
        for what, change in MENDS.items():
            after = change(text)
            if after != text:
                changes.add(what)
                text = after
    return text


def _unify_newlines(text: str) -> str:
    return NEWLINES.sub("\n", text)


def _decode_again(text: str) -> str:
    if text.isascii():
        return text
    import ftfy

    return ftfy.fix_encoding(text)


def _remove_invisible(text: str) -> str:
    text = INVISIBLE.sub("", text)
    return text if text.isascii() else JOINERS.sub("", text)


def _compose(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _strip(text: str) -> str:
    text = re.sub(r"\A(?:[^\S\n]*\n)+", "", text.rstrip())
    # The first line of indented code belongs to the lines below it.
    return text if INDENTED.search(text) else text.lstrip()


MENDS = {
    "line ends unified": _unify_newlines,
    "mojibake repaired": _decode_again,
    "invisible characters removed": _remove_invisible,
    "Unicode composed": _compose,
    "white space around it removed": _strip,
}
"""In this order: what is broken may hide in what is broken otherwise."""


# --- its language and its length -------------------------------------------------------------------------------------

LINK = re.compile(r"https?://\S+|www\.\S+|(?<!\S)\S{1,100}@\S+")
WIDE = "\u2e80"
"""From here on a letter says as much as three of an alphabet."""
NO_LANGUAGE = "zxx"


class Language(Step):
    """Drop rows whose answers are in another language, by `py3langid` (Lui and Baldwin, 2012; Barbaresi).

    Judged are the answers, without code and links: whoever asks for a translation gets an answer in the other language.
    """

    name = "language"
    allow: list[str] = Field(["en"], min_length=1)
    """ISO 639 codes of the languages that are kept, such as `en` or `zh`."""
    min_chars: int = Field(40, ge=1)
    """Letters that an answer must have to be judged, one of Chinese or Japanese counting three; a name has no language."""
    min_confidence: float = Field(0.7, gt=0, le=1)
    """Confidence in another language from which on a row is dropped."""

    def check(self, at: str) -> None:
        """Refuse a code that no language has."""
        from posttrain.config import nearest

        known = _identifier().labels
        for code in self.allow:
            if code not in known:
                raise UserError(f"{at}.allow: {code!r} is no language that py3langid knows; {nearest(code, known)}")

    def run(self, candidates: Sequence[Candidate], bench: Bench) -> Outcome:
        """Judge the answers of a conversation together, and those of a pair one by one."""
        _identifier()  # once, and not in each of the processes

        def judge(row: Row) -> Verdict | None:
            texts = answer_texts_of(row)
            for text in texts if isinstance(row, Pair) else ["\n".join(texts)]:
                language, confidence = language_of(text, min_letters=self.min_chars) or (NO_LANGUAGE, 0.0)
                if language not in (*self.allow, NO_LANGUAGE) and confidence >= self.min_confidence:
                    return Verdict("other language", f"{language} ({confidence:.2f}): {excerpt(_prose(text))}")
            return None

        return judge_each(candidates, judge, bench)


def language_of(text: str, *, min_letters: int) -> tuple[str, float] | None:
    """The ISO 639 code of the language of its prose, and how sure that is, at most 1; None where it has fewer letters."""
    prose = _prose(text)
    if sum(3 if letter > WIDE else 1 for letter in prose if letter.isalpha()) < min_letters:
        return None
    language, confidence = _identifier().classify(prose)
    return str(language), float(confidence)


def _prose(text: str) -> str:
    """The text without code and links."""
    return LINK.sub(" ", without_code(text))


@cache
def _identifier() -> "LanguageIdentifier":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class Length(Step):
    """Drop rows whose prompt or answer is too short or too long, and answers that go round in circles.

    The two shares of repeated text are those of Gopher's filters (Rae et al., 2021, appendix A.1.1), with limits for answers
    instead of web pages: a sum or a list repeats itself more than prose, so only what goes round and round is over them.
    """

    name = "length"
    min_prompt_words: int = Field(0, ge=0)
    """Fewest words of a prompt, all messages before the last answer together."""
    max_prompt_words: int | None = Field(None, ge=1)
    """Most words of a prompt."""
    min_answer_words: int = Field(0, ge=0)
    """Fewest words of the last answer; of a pair, of each of the two. A sign alone, such as `=`, is no word."""
    max_answer_words: int | None = Field(None, ge=1)
    """Most words of an answer."""
    max_duplicate_lines: float = Field(0.5, gt=0, le=1)
    """Share of an answer's lines, blank ones apart, that are the same as an earlier line of it."""
    max_top_ngram: float = Field(0.5, gt=0, le=1)
    """Share of an answer's words that lie in its most frequent sequence of four words, if that occurs more than twice."""
    min_repetition_words: int = Field(50, ge=1)
    """Words from which on an answer is measured for repetition; outside of code."""

    @model_validator(mode="after")
    def _in_order(self) -> "Length":
        for what in ("prompt", "answer"):
            least, most = getattr(self, f"min_{what}_words"), getattr(self, f"max_{what}_words")
            if most is not None and most < least:
                raise ValueError(f"max_{what}_words: {most} is below min_{what}_words, {least}; raise it")
        return self

    def run(self, candidates: Sequence[Candidate], bench: Bench) -> Outcome:
        """Count the words of every row."""
        return judge_each(candidates, self._judge, bench)

    def _judge(self, row: Row) -> Verdict | None:
        count = len(words(prompt_of(row)))
        if count < self.min_prompt_words:
            return Verdict("prompt too short", f"{count} words")
        if self.max_prompt_words is not None and count > self.max_prompt_words:
            return Verdict("prompt too long", f"{count} words")
        for answer in _last_answers(row):
            count = len(words(answer))
            if count < self.min_answer_words:
                return Verdict("answer too short", f"{count} words: {excerpt(answer)}")
            if self.max_answer_words is not None and count > self.max_answer_words:
                return Verdict("answer too long", f"{count} words")
        for answer in learned(row):
            if detail := self._repetition(without_code(answer)):
                return Verdict("repetitive", detail)
        return None

    def _repetition(self, text: str) -> str:
        sequence = words(text)
        if len(sequence) < self.min_repetition_words:
            return ""
        lines = [line.strip() for line in text.split("\n") if WORD.search(line)]
        share = 1 - len(set(lines)) / len(lines)
        if share > self.max_duplicate_lines:
            return f"{share:.0%} of its lines repeat an earlier one"
        ngram, count = Counter(zip(*(sequence[start:] for start in range(4)), strict=False)).most_common(1)[0]
        share = min(1.0, 4 * count / len(sequence))
        return f"{share:.0%} of its words are {' '.join(ngram)!r}" if count > 2 and share > self.max_top_ngram else ""


def _last_answers(row: Row) -> list[str]:
    """The last answer of a conversation or both of a pair; none where there is only a prompt, or a call of a tool."""
    if isinstance(row, Pair):
        answers = [row.chosen[-1], row.rejected[-1]]
    else:
        answers = [row.messages[-1]] if row.messages[-1]["role"] == "assistant" else []
    return [message["content"] for message in answers if "tool_calls" not in message]
