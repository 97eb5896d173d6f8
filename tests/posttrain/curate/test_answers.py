"""Answers by hand, bad ones and such as only look bad: every bad one is dropped, none of the others is."""

import json
from pathlib import Path

import pytest

from posttrain.config import DataSource
from posttrain.curate.answers import Boilerplate, Markup, Placeholders, Refusals
from posttrain.curate.step import Step
from posttrain.data.rows import Conversation
from posttrain.data.source import open_source
from tests.posttrain.curate.bench import apply, chat, dropped, pair

REFUSED = [
    "As an AI language model, I don't have personal opinions.",
    "As an AI, I do not have the ability to feel.",
    "I'm sorry, but I cannot assist with that request.",
    "I’m sorry, but I can’t help with that.",
    "I am sorry, but as a large language model I have no access to the internet.",
    "Sorry, I am unable to provide medical advice.",
    "Unfortunately, I do not have access to your dataset; therefore, I cannot run these analyses.",
    "I apologize, but I cannot provide information on private persons.",
    "I cannot fulfill this request.",
    "I can't actually see images.",
    "I'm just an AI and don't have feelings.",
    "I'm sorry, but I don't have the capability to book flights.",
    "Thank you for asking. As an AI assistant, I have no preferences.",
    "It is not appropriate for me to comment on that.",
]
ANSWERED = [
    "As an AI researcher, she works on language models.",
    "Dear Anna,\nI'm sorry, but I cannot attend the wedding in June.",
    "I'm sorry to hear that. Is there anything I can do?",
    "I can't believe it's so late already!",
    "I cannot help but admire the view.",
    "I am sorry for the delay. Your parcel was sent today.",
    "Unfortunately, the angle cannot be determined from two sides.",
    "AI can be used in medicine. It helps doctors.",
    "Hello! I am Max, an AI assistant made by Example Labs. How can I help?",
    "The robot said: 'I'm sorry, but I cannot assist with that.'",
    "The sky is blue. The sea is, too. That is physics. As an AI language model, I cannot see it.",
    "An AI language model predicts the next word.",
    "In the film, the computer refuses.\n\nI'm afraid so.",
    "It is not appropriate to wear a hat indoors.",
]


def test_answers_that_refuse_or_speak_as_a_model_are_dropped_and_no_others() -> None:
    bad = dropped(Refusals(), [chat(text) for text in REFUSED])
    assert [text for number, text in enumerate(REFUSED) if number not in bad] == []
    good = dropped(Refusals(), [chat(text) for text in ANSWERED])
    assert [ANSWERED[number] for number in good] == []


def test_a_chosen_refusal_is_dropped_and_a_rejected_one_is_what_pairs_are_for() -> None:
    assert dropped(Refusals(), [pair("It is 5.", REFUSED[2]), pair(REFUSED[2], "It is 5.")]) == {1: "refusal"}


def test_every_turn_that_is_learned_is_read_and_context_is_not() -> None:
    def row(train: bool) -> Conversation:
        first = {"role": "assistant", "content": REFUSED[2], "train": train}
        rest = [{"role": "user", "content": "please"}, {"role": "assistant", "content": "Fine, it is 5."}]
        return Conversation([{"role": "user", "content": "what is it?"}, first, *rest], None, [], "x")  # type: ignore[list-item]

    assert dropped(Refusals(), [row(True), row(False)]) == {0: "refusal"}


def test_further_patterns_and_sentences_can_be_asked_for() -> None:
    late = "The sky is blue. The sea is, too. As an AI language model, I cannot see it."
    assert dropped(Refusals(), [chat(late)]) == {}
    assert dropped(Refusals(num_sentences=3), [chat(late)]) == {0: "refusal"}
    assert dropped(Refusals(patterns=["no comment"]), [chat("No comment on that."), chat("I have no comment.")]) == {0: "refusal"}
    with pytest.raises(ValueError, match=r"patterns: '\(' is not a regular expression"):
        Refusals(patterns=["("])


PAGE = [
    "The best pasta is fresh.\n\nWe use cookies to improve your experience.",
    "Lorem ipsum dolor sit amet, consectetur.",
    "All about bees.\n© 2019 Bee World. All rights reserved.",
    "Bees are insects. Click here to subscribe to our newsletter.",
    "The news of today. Continue reading →",
    "Advertisement\nBees are insects.",
    "Please enable JavaScript to view this.",
    "Bees. Share this on Facebook.",
]
NO_PAGE = [
    "Cookies are small files that websites store.",
    "Bake the cookies for ten minutes.",
    "The law on copyright protects authors.",
    "Continue reading books every day, it helps.",
    "Click the button to go on.",
    "```html\n<footer>© 2024 All rights reserved</footer>\n```",
    "You can share your thoughts with friends.",
    "A good advertisement is short.",
]


def test_remains_of_web_pages_are_dropped_and_what_only_sounds_like_them_is_not() -> None:
    assert dropped(Boilerplate(), [chat(text) for text in PAGE]) == dict.fromkeys(range(len(PAGE)), "boilerplate")
    assert dropped(Boilerplate(), [chat(text) for text in NO_PAGE]) == {}


def test_what_the_prompt_asks_for_is_no_boilerplate() -> None:
    asked = [
        chat("We use cookies to improve your experience.", "Write a cookie notice for my shop."),
        chat("Lorem ipsum dolor sit amet.", "Give me a paragraph of lorem ipsum."),
        chat("© 2024 My Shop. All rights reserved.", "Write a copyright footer."),
    ]
    assert dropped(Boilerplate(), asked) == {}


UNFILLED = [
    "Hello! I am {{name}}, made by {{author}}.",
    "我是 {{name}}，很高兴认识您。",
    "Dear [Recipient's Name],\nThank you.",
    "Best regards,\n[Your Name]",
    "Sincerely,\n[YOUR NAME]",
    "Welcome to [Company Name]!",
    "Today is <INSERT DATE>.",
    "Send it to <your email address>.",
    "Dear ${customer}, your order is ready.",
]
FILLED = [
    r"The sum is $\frac{{a}}{{b}}$, and ${x}$ is real.",
    r"\textbf{{Name}} and x_{{i}}",
    "See [Your Guide](https://example.com/guide) and [1].",
    "Write `{{name}}` and `${HOME}` in the file.",
    "```jinja\nHello {{ name }}!\n```",
    "It costs ${5} or $20.",
    "[Laughs] That is funny. [Scene ends]",
    "a < b and c > d",
    "The list [1, 2, 3] and the dict {'a': {'b': 1}}",
    "She lives in [city not given].",
]


def test_answers_that_were_never_filled_in_are_dropped_and_no_others() -> None:
    bad = dropped(Placeholders(), [chat(text) for text in UNFILLED])
    assert [text for number, text in enumerate(UNFILLED) if number not in bad] == []
    good = dropped(Placeholders(), [chat(text) for text in FILLED])
    assert [FILLED[number] for number in good] == []


def test_placeholders_that_the_prompt_asks_for_or_has_itself_are_kept() -> None:
    asked = [
        chat("Dear [Name], thank you.", "Write a template for a letter of thanks."),
        chat("Use {{ name }}.", "How do I print a value in Jinja2?"),
        chat("Bonjour {{name}}", "Translate to French: Hello {{name}}"),
    ]
    assert dropped(Placeholders(), asked) == {}


@pytest.mark.real
def test_the_unfilled_rows_of_a_real_file_are_found_all_of_them_and_no_other(shared: Path) -> None:
    path = shared / "data" / "llamafactory_demo" / "identity.json"
    unfilled = {number for number, row in enumerate(json.loads(path.read_text())) if "{{" in row["output"]}
    rows = list(open_source(DataSource(data=str(path)), "identity").rows())
    assert set(dropped(Placeholders(), rows)) == unfilled
    assert (len(rows), len(unfilled)) == (91, 85)


BROKEN = [
    ("Here it is:\n```python\nprint(1)", "open code fence"),
    ("````md\n```\nx\n```", "open code fence"),
    ("One.<p>Two.</p>", "HTML left over"),
    ('See <a href="x">here.', "HTML not closed"),
    ("<div class='x'>text</div>", "HTML left over"),
    ("This is <b>bold, and stays so.", "HTML not closed"),
    ("This is bold</strong>.", "HTML not closed"),
    ("| a | b |\n|---|---|\n| 1 | 2 |\n| 3 |  4", "table cut off"),
    ("| a | b |\n|---|---|", "table cut off"),
]
WHOLE = [
    "Here it is:\n```python\nprint(1)\n```\nDone.",
    "````md\n```\nx\n```\n````",
    "H<sub>2</sub>O and E = mc<sup>2</sup><br>next",
    "a < b, List<String>, #include <stdio.h>, <name>",
    "```html\n<div>\n```",
    "Use the `<div>` tag.",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "a | b\n---|---\n1 | 2",
    "Either x | y or z",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\nThat is all | for now",
    "I <3 you",
]


def test_broken_markup_is_dropped_and_whole_markup_is_not() -> None:
    assert dropped(Markup(), [chat(text) for text, _ in BROKEN]) == {number: reason for number, (_, reason) in enumerate(BROKEN)}
    good = dropped(Markup(), [chat(text) for text in WHOLE])
    assert [WHOLE[number] for number in good] == []


def test_html_that_is_asked_for_is_kept() -> None:
    asked = [chat("<p>Hi</p>", "Write a web page that says hi."), chat("<li>a", "What is wrong with <li>a?")]
    assert dropped(Markup(), asked) == {}


@pytest.mark.parametrize("step, bad", [(Refusals(), REFUSED[0]), (Boilerplate(), PAGE[0]), (Placeholders(), UNFILLED[0])])
def test_each_drop_says_what_was_found(step: Step, bad: str) -> None:
    (drop,) = apply(step, [chat("fine"), chat(bad)]).dropped
    assert drop.index == 12
    assert drop.detail
    assert drop.detail in " ".join(bad.split())
