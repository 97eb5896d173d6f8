"""What leads to a person is masked, the same everywhere in a row; what only looks like it stays."""

import re
from typing import Any

import pytest

from posttrain.curate.pii import Pii
from posttrain.curate.rows import texts_of
from posttrain.data.rows import Conversation, Row
from posttrain.error import UserError
from tests.posttrain.curate.bench import apply, chat

PERSONAL = [
    ("Write to anna.berg@posteo.de today.", "Write to [EMAIL_1] today."),
    ("mailto:j+x@mail.co.uk, please", "mailto:[EMAIL_1], please"),
    ("<a.b@c-d.io>", "<[EMAIL_1]>"),
    ("The server is at 93.184.216.34:8080.", "The server is at [IP_1]:8080."),
    ("ping 2606:4700:4700::1111 now", "ping [IP_1] now"),
    ("Call +49 30 901820 or (650) 253-0000.", "Call [PHONE_1] or [PHONE_2]."),
    ("Tel. 650-253-0000", "Tel. [PHONE_1]"),
    ("+442083661177", "[PHONE_1]"),
    ("It is 4111 1111 1111 1111, valid to 12/29.", "It is [CARD_1], valid to 12/29."),
    ("3782-822463-10005", "[CARD_1]"),
    ("my card 5555555555554444", "my card [CARD_1]"),
    ("Pay to DE89 3704 0044 0532 0130 00.", "Pay to [IBAN_1]."),
    ("GB82WEST12345698765432", "[IBAN_1]"),
]
NOT_PERSONAL = [
    "user@example.com and root@localhost and git@github.com:o/r.git",
    "@dataclass and a @ b and foo@bar",
    "Version 1.2.3.4, v10.0.19.44, firmware 8.8.4.4 and section 5.6.7.8",
    "127.0.0.1, 10.0.0.7, 192.168.1.1, 172.16.0.9, 0.0.0.0, 203.0.113.5 and 256.1.1.1",
    "1.2.3.4.5 is no address, nor is 1.2.3",
    "12:30:45 and std::vector and ::1 and fe80::1",
    "On 2024-10-05, 05/10/2024, 05.10.2024 or 20241005",
    "From 1939-1945 and 2001-2010, pages 120-135",
    "It has 6502530000 parts and 13 digits: 4539578763621486.",
    "3600000000000 + 62426244000 + 198472480000",
    "821091117+4908374100427 is a sum, and 650 253 0000 * 2 = 13",
    "The ISBN is 978-3-16-148410-0 and the ISSN 0378-5955.",
    "4111 1111 1111 1112 fails its checksum; so does DE89 3704 0044 0532 0130 01.",
    "pi is 3.14159265358979, and 2**64 is 18446744073709551616",
    "Dial 112 or 911, room 4-201, $1,234,567.89",
    "0.6931471805 1.6094379124 2.3025850930",
    "|1|234|5678|\n|2|345|6789|",
]


@pytest.mark.parametrize("text, masked", PERSONAL)
def test_personal_data_is_masked(text: str, masked: str) -> None:
    outcome = apply(Pii(), [chat(text), chat("nothing")])
    assert texts_of(outcome.kept[0].row)[1] == masked
    assert outcome.changes == {kind.lower(): 1 for kind in re.findall(r"\[([A-Z]+)_1\]", masked)}


@pytest.mark.parametrize("text", NOT_PERSONAL)
def test_what_is_not_personal_stays(text: str) -> None:
    row: Row = chat(text)
    (kept,) = apply(Pii(), [row]).kept
    assert texts_of(kept.row)[1] == text
    assert kept.row is row


def test_the_same_address_is_the_same_mask_in_the_whole_row_and_numbers_start_anew_in_the_next() -> None:
    first = chat("I wrote to B@mail.org and c@mail.org.", prompt="Write to b@mail.org, call +1 (650) 253-0000.")
    second = chat("c@mail.org; 650-253-0000; +1 650-253-0000")
    outcome = apply(Pii(), [first, second])
    assert [texts_of(kept.row) for kept in outcome.kept] == [
        ["Write to [EMAIL_1], call [PHONE_1].", "I wrote to [EMAIL_1] and [EMAIL_2]."],
        ["Tell me about it.", "[EMAIL_1]; [PHONE_1]; [PHONE_1]"],
    ]
    assert outcome.changes == {"email": 2, "phone": 2}


def test_arguments_of_tool_calls_are_masked_as_the_text_is() -> None:
    arguments: dict[str, Any] = {"to": ["b@mail.org"], "copies": 2, "body": {"text": "call +442083661177"}}
    messages: list[Any] = [
        {"role": "user", "content": "Write to b@mail.org"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "send", "arguments": arguments}}],
        },
    ]
    (kept,) = apply(Pii(), [Conversation(messages, None, [], "x")]).kept
    assert isinstance(kept.row, Conversation)
    call = kept.row.messages[1]["tool_calls"][0]["function"]
    assert call == {"name": "send", "arguments": {"to": ["[EMAIL_1]"], "copies": 2, "body": {"text": "call [PHONE_1]"}}}
    assert arguments["to"] == ["b@mail.org"], "what came before is as it was"


def test_masking_twice_changes_nothing_more() -> None:
    once = apply(Pii(), [chat(text) for text, _ in PERSONAL]).kept
    twice = apply(Pii(), [kept.row for kept in once])
    assert [kept.row for kept in twice.kept] == [kept.row for kept in once]
    assert twice.changes == {}


def test_only_the_kinds_that_are_asked_for_are_masked() -> None:
    (kept,) = apply(Pii(kinds=["ip"], phone_regions=[]), [chat("a@mail.org 93.184.216.34 +442083661177")]).kept
    assert texts_of(kept.row)[1] == "a@mail.org [IP_1] +442083661177"


def test_numbers_without_a_country_code_are_those_of_the_regions() -> None:
    text = "030 901820 and (650) 253-0000 and +44 20 8366 1177"

    def masked(regions: list[str]) -> str:
        return texts_of(apply(Pii(phone_regions=regions), [chat(text)]).kept[0].row)[1]

    assert masked([]) == "030 901820 and (650) 253-0000 and [PHONE_1]"
    assert masked(["DE"]).startswith("[PHONE_1] and")
    assert masked(["DE", "US"]) == "[PHONE_1] and [PHONE_2] and [PHONE_3]"
    with pytest.raises(UserError, match=r"s.phone_regions: 'UK' is no country's code"):
        Pii(phone_regions=["UK"]).check("s")


@pytest.mark.real
def test_no_chat_template_takes_a_mask_for_a_control_token(stories: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    ids = tokenizer("[EMAIL_1] [IP_2] [PHONE_3] [CARD_4] [IBAN_5]", add_special_tokens=False).input_ids
    assert not set(ids) & set(tokenizer.all_special_ids)
