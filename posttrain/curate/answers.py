"""Steps that drop rows for what their answers say: refusals, remains of web pages, unfilled templates, broken markup.

They look for what is surely wrong, since a good row that is dropped is gone unseen: what stands in code, or is what the prompt
asks for, does not count. Of a pair the chosen answer is read; the rejected one is there to be bad.
"""

import re
from collections.abc import Sequence

from pydantic import Field, model_validator

from posttrain.curate.each import Verdict, excerpt, judge_each
from posttrain.curate.rows import prompt_of, texts_of
from posttrain.curate.step import Bench, Candidate, Outcome, Step
from posttrain.curate.text import FENCE, learned, without_code
from posttrain.data.rows import Row

# --- refusals --------------------------------------------------------------------------------------------------------

AI = (
    r"(?:(?:large |artificial )?(?:ai|a\.i\.|artificial intelligence)(?: (?:language model|assistant|model|chatbot|bot|system|program))?"
    r"|(?:large )?language model|chatbot|virtual assistant|machine learning model)"
)
SORRY = (
    r"(?:(?:unfortunately|sorry|(?:my )?apologies|i apologi[sz]e|i(?:'m| am) (?:so |very |really |truly )?(?:sorry|afraid))\b"
    r"[^.!?\n]{0,40}?[,.]?\s*(?:but |that )?)?"
)
CANNOT = r"(?:can't|cannot|can not|could not|couldn't|won't|will not|(?:am|'m) (?:currently |still )?(?:unable|not able|not allowed) to)"
SERVE = (
    r"(?:assist|help(?! but)|comply|fulfill?|provide|generate|create|answer|complete|continue|offer|engage|respond|process|access|"
    r"retrieve|browse|search|open|view|watch|listen|perform|produce|support|discuss|predict|recommend|(?:directly|actually|physically) \w+)"
)
OWN = (
    r"(?:access to|enough information|personal (?:opinions?|preferences?|experiences?|beliefs?|feelings?|information)|real-time|"
    r"(?:any )?(?:consciousness|feelings|emotions)|an? physical|the (?:ability|capability|capabilities|capacity) to)"
)
REFUSALS = [
    rf"as an? {AI}(?:,|\s+(?:i|my|developed|created|trained|designed|without)\b)",
    rf"{SORRY}as an? {AI},? i\b",
    rf"{SORRY}i(?:'m| am) (?:just |only |merely |simply )?an? {AI}(?:,? (?:and|so|which means|therefore))?,? (?:i )?"
    r"(?:can't|cannot|do not|don't|am not|am unable|unable|lack|have no)\b",
    rf"{SORRY}i ?{CANNOT} {SERVE}\b",
    rf"{SORRY}i (?:currently )?(?:don't|do not) (?:currently )?(?:have|possess) {OWN}\b",
    r"(?:it is|it's|it would be) (?:not |in)appropriate(?: or \w+)? (?:for me to|to (?:discuss|provide|generate|create|answer|guess))\b",
    r"(?:it is|it's) against my (?:programming|guidelines|policy)\b",
    r"my (?:programming|guidelines|knowledge cutoff|training data) (?:do(?:es)? not|prohibits?|only|prevents?|ends?|is limited)\b",
]
"""Beginnings of a sentence that refuses, or in which a model speaks of itself."""


class Refusals(Step):
    """Drop rows with an answer that opens by refusing, or by speaking as a language model.

    Only the beginnings of the first sentences are read: an answer that mentions such words later on is kept, and so is one
    that declines something else, such as an invitation in a letter that was asked for.
    """

    name = "refusals"
    num_sentences: int = Field(2, ge=1)
    """Sentences of an answer that are read."""
    patterns: list[str] = []
    """Further regular expressions for the beginning of a sentence, in any case."""

    @model_validator(mode="after")
    def _are_patterns(self) -> "Refusals":
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"patterns: {pattern!r} is not a regular expression ({error}); mend it") from None
        return self

    def run(self, candidates: Sequence[Candidate], bench: Bench) -> Outcome:
        """Read the opening of every answer that is learned."""
        pattern = re.compile("|".join(f"(?:{each})" for each in [*REFUSALS, *self.patterns]), re.IGNORECASE)

        def judge(row: Row) -> Verdict | None:
            for answer in learned(row):
                for sentence in _sentences(answer)[: self.num_sentences]:
                    if pattern.match(sentence.replace("’", "'")):
                        return Verdict("refusal", excerpt(sentence))
            return None

        return judge_each(candidates, judge, bench)


def _sentences(text: str) -> list[str]:
    """The beginning of a text, cut at the ends of sentences and lines."""
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+|\n+", text[:1000].strip()) if sentence]


# --- remains of web pages --------------------------------------------------------------------------------------------

BOILERPLATE = {
    "cookie": r"\b(?:we|(?:this|our) (?:web)?site) uses? cookies|\baccept (?:all )?cookies",
    "subscri": r"click here to (?:un)?subscribe|(?:subscribe to|sign up for) (?:our|the|my) (?:\w+ )?(?:newsletter|mailing list|channel)",
    "click": r"click here (?:to|for) (?:read|view|see|download|learn|more|register|continue|access)",
    "lorem": r"lorem ipsum",
    "copyright": r"(?:©|\(c\)|\bcopyright)\s*(?:©\s*)?(?:19|20)\d\d\b[^.\n]{0,60}|all rights reserved",
    "javascript": r"(?:please )?enable javascript|javascript (?:is|seems to be) disabled",
    "share": r"share (?:this|on)(?: \w+)? ?(?:: ?|on |via |with )?(?:facebook|twitter|linkedin|pinterest|whatsapp)\b|pin it on pinterest",
    "comment": r"leave a (?:reply|comment) cancel reply|you must be logged in to (?:post|comment)",
    "read": r"\(?\b(?:continue reading|read more)\s*(?:→|»|>>|\.\.\.|…)",
    "advert": r"^\s*advertisement\s*$|skip to (?:main )?content",
}
"""Remains of web pages, by the word that a prompt which asks for them would hold."""


class Boilerplate(Step):
    """Drop rows with remains of a web page in an answer: cookie notices, footers, calls to subscribe, filler text.

    What the prompt speaks of is no remain: an answer about cookies may mention them.
    """

    name = "boilerplate"

    def run(self, candidates: Sequence[Candidate], bench: Bench) -> Outcome:
        """Read every answer that is learned."""
        kinds = {about: re.compile(pattern, re.IGNORECASE | re.MULTILINE) for about, pattern in BOILERPLATE.items()}

        def judge(row: Row) -> Verdict | None:
            prompt = prompt_of(row).lower()
            for prose in map(without_code, learned(row)):
                for about, pattern in kinds.items():
                    if (found := pattern.search(prose)) and about not in prompt:
                        return Verdict("boilerplate", excerpt(found[0]))
            return None

        return judge_each(candidates, judge, bench)


# --- unfilled templates ----------------------------------------------------------------------------------------------

TO_FILL_IN = (
    "Your|YOUR|My|MY|Insert|INSERT|Enter|ENTER|Recipient|RECIPIENT|Sender|SENDER|Company|COMPANY|Client|CLIENT|Customer|CUSTOMER|Employer|"
    "EMPLOYER|Hiring Manager|Manager|Name|NAME|First Name|Last Name|Full Name|Date|DATE|Address|ADDRESS|Phone Number|Email|City|CITY|"
    "State|Position|Job Title|Product|PRODUCT|Event|School|University|Friend"
)
PLACEHOLDERS = [
    r"\{\{\s*[^\W\d][\w .|-]{0,60}\}\}(?!\})",
    r"\$\{[A-Za-z_][\w.]{1,60}\}(?![^\n$]*\$(?!\{))",
    rf"\[(?:{TO_FILL_IN})(?:'s|’s)?(?:[ /,_-]+[A-Za-z'’.]+){{0,5}}\](?![(\[])",
    r"<(?:insert|your|enter)[ _-][^<>\n]{1,60}>|<INSERT[^<>\n]{0,60}>",
]
MATHS_BEFORE = re.compile(r"(?:\\[A-Za-z]+|[\\{}^_$])\Z")
"""What stands before braces that belong to a formula."""
ASKS_FOR_TEMPLATE = re.compile(
    r"\b(?:templates?|templating|placeholders?|fill[- ]in|blanks?|jinja2?|mustache|handlebars|jsx|vue|angular|liquid|bash|shell|"
    r"string interpolation|f-strings?|format string|code|script|function)\b",
    re.IGNORECASE,
)


class Placeholders(Step):
    """Drop rows with an answer that was never filled in: `{{name}}`, `[Your Name]`, `<INSERT DATE>`, `${VAR}`.

    Code does not count, nor formulas, nor an answer to a prompt that speaks of templates or code, or has the same placeholder.
    """

    name = "placeholders"

    def run(self, candidates: Sequence[Candidate], bench: Bench) -> Outcome:
        """Read every answer that is learned."""
        patterns = [re.compile(pattern) for pattern in PLACEHOLDERS]

        def judge(row: Row) -> Verdict | None:
            prompt = prompt_of(row)
            for prose in map(without_code, learned(row)):
                for found in (found for pattern in patterns for found in pattern.finditer(prose)):
                    in_formula = MATHS_BEFORE.search(prose, max(0, found.start() - 20), found.start())
                    if not in_formula and found[0] not in prompt and not ASKS_FOR_TEMPLATE.search(prompt):
                        return Verdict("unfilled placeholder", found[0])
            return None

        return judge_each(candidates, judge, bench)


# --- broken markup ---------------------------------------------------------------------------------------------------

INLINE_TAGS = "a|abbr|b|big|cite|code|del|details|dfn|em|i|ins|kbd|mark|q|s|samp|small|strike|strong|sub|summary|sup|tt|u|var"
PAGE_TAGS = (
    "article|aside|blockquote|body|button|center|dd|div|dl|dt|fieldset|figure|font|footer|form|h1|h2|h3|h4|h5|h6|head|header|html|iframe|"
    "img|input|li|link|main|meta|nav|ol|option|p|pre|script|section|select|span|style|table|tbody|td|tfoot|th|thead|tr|ul"
)
TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)(?:\s[^<>]*)?(/?)>")
ASKS_FOR_MARKUP = re.compile(
    r"\b(?:html5?|xml|svg|css|xhtml|tags?|markup|web ?pages?|web ?sites?|jsx|react|vue|php|javascript|code|script|hyperlinks?)\b|</?\w+",
    re.IGNORECASE,
)
DELIMITER_ROW = re.compile(r"\|?(?:\s*:?-{3,}:?\s*\|)+(?:\s*:?-{3,}:?\s*)?")


class Markup(Step):
    """Drop rows with broken markup in an answer: a code fence never closed, HTML left over or not closed, a table cut off.

    HTML in code does not count, nor where the prompt asks for it; balanced inline tags, as in `H<sub>2</sub>O`, and line breaks
    are part of Markdown.
    """

    name = "markup"

    def run(self, candidates: Sequence[Candidate], bench: Bench) -> Outcome:
        """Read every answer that is learned."""
        return judge_each(candidates, _judge_markup, bench)


def _judge_markup(row: Row) -> Verdict | None:
    for answer in learned(row):
        if (line := _open_fence(answer)) is not None:
            return Verdict("open code fence", excerpt(line))
        prose = without_code(answer)
        if (problem := _html_problem(prose)) and not ASKS_FOR_MARKUP.search("\n".join([prompt_of(row), *texts_of(row)[:1]])):
            return problem
        if (line := _cut_table(prose)) is not None:
            return Verdict("table cut off", excerpt(line))
    return None


def _open_fence(text: str) -> str | None:
    """The line of a code fence that is never closed, or None."""
    fence, opened = "", None
    for line in text.split("\n") if "```" in text or "~~~" in text else ():
        found = FENCE.fullmatch(line)
        if fence and found and found[1].startswith(fence) and not found[2].strip():
            fence, opened = "", None
        elif not fence and found and not (found[1][0] == "`" and "`" in found[2]):
            fence, opened = found[1], line
    return opened


def _html_problem(text: str) -> Verdict | None:
    """The first tag that is left over from a page, or not balanced."""
    open_tags: list[tuple[str, str]] = []
    for found in TAG.finditer(text):
        shown, name = excerpt(found[0]), found[2].lower()
        if name in PAGE_TAGS.split("|"):
            return Verdict("HTML left over", shown)
        if name not in INLINE_TAGS.split("|") or found[3]:
            continue
        if not found[1]:
            open_tags.append((name, shown))
        elif not open_tags or open_tags.pop()[0] != name:
            return Verdict("HTML not closed", shown)
    return Verdict("HTML not closed", open_tags[-1][1]) if open_tags else None


def _cut_table(text: str) -> str | None:
    """The last line of a Markdown table at the end of a text, where its row is not closed or there is no row at all; or None."""
    lines = [line.strip() for line in text.rstrip().split("\n")]
    start = len(lines)
    while start > 0 and "|" in lines[start - 1]:
        start -= 1
    table = lines[start:]
    if len(table) < 2 or not DELIMITER_ROW.fullmatch(table[1]):
        return None
    closed = table[0].endswith("|") and table[1].endswith("|")
    return table[-1] if len(table) == 2 or (closed and not table[-1].endswith("|")) else None
