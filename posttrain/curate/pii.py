"""Personal data is masked: addresses and numbers that would lead to a person become `[EMAIL_1]`, `[PHONE_1]`, and so on."""

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain.curate.each import Verdict, judge_each
from posttrain.curate.rows import map_messages, map_texts
from posttrain.curate.step import Bench, Candidate, Outcome, Step
from posttrain.data.rows import Message, Row
from posttrain.error import UserError

Kind = Literal["email", "ip", "phone", "card", "iban"]
Found = tuple[int, int, str]
"""Where something stands in a text, and what it is, in a form that is the same however it is written."""

EMAIL = re.compile(
    r"(?:(?<![\w.+/:@-])|(?<=mailto:))[A-Za-z0-9][\w.+-]{0,63}@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w@-])"
)
NOBODYS_DOMAINS = re.compile(r"(?:^|\.)(?:example\.(?:com|org|net|edu)|example|test|invalid|localhost|local)$")
"""Reserved for documentation and tests (RFC 2606, RFC 6761)."""
IPV4 = re.compile(r"(?<![\w.:-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
IPV6 = re.compile(r"(?<![\w.:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:.])")
VERSION_BEFORE = re.compile(
    r"(?:\b(?:versions?|ver|v|releases?|builds?|firmware|sections?|chapters?|clauses?|articles?)\.?|§)[\s:=]*\Z", re.IGNORECASE
)
PHONE_LIKE = re.compile(r"(?<![\w.])[+(]?\(?\d[\d\s().-]{5,}\d")
INTERNATIONAL = re.compile(r"\+\d")
SUM_BEFORE = re.compile(r"[\d*/=^]\s*\Z")
SUM_AFTER = re.compile(r"\s*[*/+=^]|\s+-\s+\d")
GROUPED = re.compile(r"\d[\s().-]+\d")
CARD = re.compile(r"(?<![\w.-])(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}|\d{4}([ -])\d{6}\2\d{5}|\d{13,16})(?![\w-]|\.\d)")
CARD_BEFORE = re.compile(r"\b(?:card|visa|mastercard|amex|american express|discover|cc)\b[^\n]{0,40}\Z", re.IGNORECASE)
CARD_PREFIX = re.compile(r"4|5[1-5]|2[2-7]|3[47]|6(?:011|4[4-9]|5)")
IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")


class Pii(Step):
    """Mask e-mail and IP addresses, phone and card numbers and IBANs, in prompts, answers and the arguments of tool calls.

    The same address becomes the same mask wherever it stands in a row. What is masked is sure to be what it looks like: checksums
    are right, numbering plans fit, addresses are public ones; so some personal data is missed. Versions, dates, plain
    numbers, private networks and the addresses reserved for examples stay. Names of people are not looked for.
    """

    name = "pii"
    kinds: list[Kind] = Field(["email", "ip", "phone", "card", "iban"], min_length=1)
    """What is masked."""
    phone_regions: list[str] = ["US"]
    """Countries whose phone numbers are known without `+` and country code, by ISO 3166 code."""

    @model_validator(mode="after")
    def _has_effect(self) -> "Pii":
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds: {self.kinds} names one twice; name it once")
        return self

    def check(self, at: str) -> None:
        """Refuse a country that has no numbering plan."""
        import phonenumbers

        from posttrain.config import nearest

        for region in self.phone_regions:
            if region not in phonenumbers.SUPPORTED_REGIONS:
                raise UserError(
                    f"{at}.phone_regions: {region!r} is no country's code; {nearest(region, list(phonenumbers.SUPPORTED_REGIONS))}"
                )

    def run(self, candidates: Sequence[Candidate], bench: Bench) -> Outcome:
        """Mask every row."""
        kinds = [kind for kind in FINDERS if kind in self.kinds]

        def judge(row: Row) -> Verdict | None:
            masks = Masks(kinds, self.phone_regions)
            masked = map_messages(map_texts(row, masks.mask), lambda message: _with_arguments(message, masks.mask))
            return Verdict(row=masked, changes=frozenset(masks.numbers)) if masks.numbers else None

        return judge_each(candidates, judge, bench)


class Masks:
    """The masks of one row: what is found first gets number 1 of its kind."""

    def __init__(self, kinds: Sequence[Kind], regions: Sequence[str]) -> None:
        self.numbers: dict[str, dict[str, int]] = {}
        self._kinds = kinds
        self._regions = regions

    def mask(self, text: str) -> str:
        """The text with everything masked that is found in it."""
        for kind in self._kinds:
            pieces, end = [], 0
            for start, stop, what in FINDERS[kind](text, self._regions):
                known = self.numbers.setdefault(kind, {})
                number = known.setdefault(what, len(known) + 1)
                pieces += [text[end:start], f"[{kind.upper()}_{number}]"]
                end = stop
            text = "".join([*pieces, text[end:]])
        return text


def _emails(text: str, _: Sequence[str]) -> Iterator[Found]:
    for found in EMAIL.finditer(text) if "@" in text else ():
        name, _, domain = found[0].lower().rpartition("@")
        if name != "git" and not NOBODYS_DOMAINS.search(domain):
            yield found.start(), found.end(), found[0].lower()


def _ips(text: str, _: Sequence[str]) -> Iterator[Found]:
    found_all = [*IPV4.finditer(text), *(IPV6.finditer(text) if "::" in text or text.count(":") > 6 else ())]
    for found in sorted(found_all, key=lambda each: each.start()):
        try:
            address = ipaddress.ip_address(found[0])
        except ValueError:
            continue
        if address.is_global and not address.is_multicast and not VERSION_BEFORE.search(text, max(0, found.start() - 20), found.start()):
            yield found.start(), found.end(), address.compressed


def _ibans(text: str, _: Sequence[str]) -> Iterator[Found]:
    for found in IBAN.finditer(text):
        from stdnum import iban

        if iban.is_valid(found[0]):
            yield found.start(), found.end(), iban.compact(found[0])


def _cards(text: str, _: Sequence[str]) -> Iterator[Found]:
    for found in CARD.finditer(text):
        from stdnum import luhn

        digits = re.sub(r"\D", "", found[0])
        # One plain number in ten passes the checksum, so one without groups needs a word that says what it is.
        told = len(digits) < len(found[0]) or CARD_BEFORE.search(text, max(0, found.start() - 60), found.start())
        if told and CARD_PREFIX.match(digits) and luhn.is_valid(digits):
            yield found.start(), found.end(), digits


def _phones(text: str, regions: Sequence[str]) -> Iterator[Found]:
    if not PHONE_LIKE.search(text):
        return
    import phonenumbers

    matches: dict[int, Any] = {}
    for region in regions or ["ZZ"]:  # a region that none has: only numbers with `+` are found
        for match in phonenumbers.PhoneNumberMatcher(text, region, leniency=phonenumbers.Leniency.STRICT_GROUPING):
            # A number without groups may count anything, and so may one in a sum.
            told = INTERNATIONAL.match(match.raw_string) or GROUPED.search(match.raw_string)
            if told and not SUM_BEFORE.search(text, max(0, match.start - 3), match.start) and not SUM_AFTER.match(text, match.end):
                matches.setdefault(match.start, match)
    end = 0
    for start in sorted(matches):
        match = matches[start]
        if start >= end:
            end = match.end
            yield start, end, phonenumbers.format_number(match.number, phonenumbers.PhoneNumberFormat.E164)


FINDERS: dict[Kind, Callable[[str, Sequence[str]], Iterator[Found]]] = {
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "ip": _ips,
    "phone": _phones,
}
"""In this order, since the digits of an IBAN or a card may look like a phone number."""


def _with_arguments(message: Message, change: Callable[[str], str]) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _in_values(call["function"]["arguments"], change)}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}  # type: ignore[typeddict-item]


def _in_values(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _in_values(inner, change) for name, inner in value.items()}
    return [_in_values(inner, change) for inner in value] if isinstance(value, list) else value
