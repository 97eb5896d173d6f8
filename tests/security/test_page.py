"""The page of `inspect`, and its lines on a terminal, show what data say and do nothing that data say."""

import html.parser
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from posttrain import inspection
from posttrain.inspection import Inspected, Token, visible
from tests.conftest import Ended

HOSTILE = [
    "<script>alert(1)</script>",
    "</span></pre><script src=//example.org/x.js></script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    '" onmouseover="alert(1)" x="',
    "<a href=javascript:alert(1)>x</a>",
    "<svg/onload=alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<style>@import url(//example.org/x.css)</style>",
    "<link rel=stylesheet href=//example.org/x.css>",
    "<meta http-equiv=refresh content='0;url=//example.org'>",
    "<base href=//example.org/>",
    "<form action=//example.org><input autofocus onfocus=alert(1)>",
    "</title><script>alert(1)</script>",
    "<!-- --!><script>alert(1)</script>",
    "]]><script>alert(1)</script>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;",
    "{{ 7 * 7 }}{% raw %}",
    "\u202egnp.exe",
    "a\u2066b\u2069\u200b\u061c\ufeff",
    "hidden\U000e0041\U000e0042 tag",
    "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m",
    "\x00\x08\x7f",
    "<ſcript>alert(1)</ſcript>",
    "+ADw-script+AD4-",
]
ALLOWED = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "ul",
    "li",
    "p",
    "span",
    "section",
    "h2",
    "pre",
    "details",
    "summary",
    "div",
}


class Page(html.parser.HTMLParser):
    """The tags of a page, their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.policy = ""
        self.said = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(tag, name) for name, _ in attrs}
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""

    def handle_data(self, data: str) -> None:
        self.said += data


def is_harmless(page: Page) -> bool:
    known = {("span", "class"), ("span", "title"), ("section", "id"), ("p", "class"), ("div", "class"), ("html", "lang")}
    metas = {("meta", name) for name in ("charset", "name", "content", "http-equiv")}
    return page.tags <= ALLOWED and page.attributes <= known | metas


@pytest.mark.parametrize("text", HOSTILE, ids=map(ascii, HOSTILE))
def test_nothing_in_the_data_becomes_a_part_of_the_page(text: str, tmp_path: Path) -> None:
    tokens = [Token(1, text, True, False, False), Token(2, text[:5], False, True, False), Token(3, text, True, False, True)]
    rows = [
        Inspected(0, text, {"": tokens}, f"refused: {text}", 1.0),
        Inspected(1, text, {"chosen": tokens, "rejected": tokens[::-1]}, text),
    ]
    path = tmp_path / "page.html"
    inspection.write_html(rows, path, title=text, summary=[text, text])
    page = Page(path.read_text(encoding="utf-8"))
    assert is_harmless(page)
    assert page.said.count(visible(text)) >= 8, "all of it is there to be read"
    assert not inspection.UNSEEN.search(path.read_text(encoding="utf-8"))
    assert "default-src 'none'" in page.policy and "script" not in page.policy


def test_a_page_of_a_hostile_file_is_harmless(posttrain: Callable[..., Ended], pipeline_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "<img src=x onerror=alert(1)>.jsonl"
    data.write_text("".join(json.dumps({"prompt": text, "completion": text}) + "\n" for text in HOSTILE))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": text, "chosen": text + "a", "rejected": text + "b"}) + "\n" for text in HOSTILE))
    sources = (f"sources.chat.data={json.dumps(str(data))}", f"sources.prefs.data={pairs}")
    for stage in ("sft", "dpo"):
        page = tmp_path / f"{stage}.html"
        ended = posttrain(
            "inspect",
            pipeline_file,
            stage,
            "--root",
            tmp_path / "runs",
            *sources,
            "--num-rows",
            "99",
            "--html",
            page,
            f"stages.{stage}.max_length=256",
        )
        assert ended.code == 0, ended.err
        shown = Page(page.read_text(encoding="utf-8"))
        assert is_harmless(shown)
        assert "<script>alert(1)</script>" in shown.said


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "pipe"])
def test_what_is_printed_cannot_steer_a_terminal(is_terminal: bool) -> None:
    text = "a\x1b]52;c;ZXZpbA==\x07b\x1b[2Jc\x9bd\u202ee"
    console = Console(file=io.StringIO(), force_terminal=is_terminal, color_system=None, width=200)
    inspection.show(Inspected(0, text, {"": [Token(1, text, True, False, False)]}, f"refused: {text}"), console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert not inspection.UNSEEN.search(printed.replace("\x1b[0m", "").replace("\x1b[1m", ""))
    assert printed.count("\\x1b]52;c;ZXZpbA==\\x07b\\x1b[2Jc\\x9bd\\u202ee") == 3


def test_words_and_emoji_are_shown_as_they_are() -> None:
    for text in ("שלום עולم", "naïve\tcafé\n", "👩\u200d👩\u200d👧", "می\u200cخواهم", "日本語"):
        assert visible(text) == text
