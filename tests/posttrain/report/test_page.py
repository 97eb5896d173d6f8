"""The page is one file that loads nothing and runs nothing but its own script, whatever data and models say; it draws what was logged."""

import base64
import hashlib
import html.parser
import json
import re

import pytest

import pipeline
from posttrain.report import curves, draw, page, read
from tests.posttrain.report.conftest import POLICIES, Made, answer_results

HOSTILE = [
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "\"><svg onload=window.pwned=1>' autofocus onfocus=window.pwned=1 x='",
    "</style><style>*{display:none}</style><link rel=stylesheet href=https://evil.example/a.css>",
    "<a href='javascript:window.pwned=1'>x</a>{{ 7 * 7 }}{% raw %}",
    "--><iframe srcdoc='<script>parent.window.pwned=1</script>'></iframe>\u202e\u0000\ud800",
]


class Read(html.parser.HTMLParser):
    """Elements with their attributes, and all text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.own: dict[str, str] = {"script": "", "style": ""}
        self._in: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._in = tag if tag in self.own else None

    def handle_endtag(self, tag: str) -> None:
        self._in = None

    def handle_data(self, data: str) -> None:
        if self._in:
            self.own[self._in] += data
        else:
            self.text += data


def hostile_run(make_run, name: str = "shown") -> Made:
    """A run in which every text that data, models or users write is hostile."""
    results = [result for policy in POLICIES for result in answer_results(policy, HOSTILE, HOSTILE[:3] + ["other"] * 3)]
    table = {
        "columns": ["metric", "rows", *POLICIES],
        "rows": [
            ["answers passed", "6", "0.500 (0.400 to 0.600)", "0.700 (+0.200, +0.100 to +0.300)", HOSTILE[1]],
            [HOSTILE[0], HOSTILE[1], *HOSTILE[2:5]],
        ],
        "notes": HOSTILE,
    }
    steps = [{"step": step, "loss": 2.0 / step, **{text: float(step) for text in HOSTILE[:5]}} for step in range(1, 60)]
    made: Made = make_run(name, prompts=HOSTILE, results=results, table=table, steps=steps, system_prompt=HOSTILE[0])
    sft = made.directory / "sft"
    (sft / "preflight.json").write_text(json.dumps({"summary": HOSTILE}))
    said = {
        "step": 1,
        "origin": HOSTILE[1],
        "prompt": [{"role": HOSTILE[2], "content": HOSTILE[0]}],
        "completion": HOSTILE[0],
        "reward": 1.0,
    }
    (made.directory / "dpo" / "completions.jsonl").write_text(json.dumps({**said, "rewards": {HOSTILE[0]: 1.0, HOSTILE[1]: 2.0}}) + "\n")
    return made


def page_of(made: Made, *, watch: bool = False) -> str:
    directory, list_rows = pipeline._open_run(str(made.config), (), made.root)
    return page.run_page(read.read_run(directory, list_rows()), watch=watch)


@pytest.mark.parametrize("watch", [False, True])
def test_what_is_hostile_stands_there_as_text(make_run, watch):
    text = page_of(hostile_run(make_run), watch=watch)
    text.encode()  # a lone surrogate would not do
    found = Read(text)
    tags = [tag for tag, _ in found.elements]
    assert tags.count("script") == tags.count("style") == 1
    assert not set(tags) & {"img", "iframe", "object", "embed", "link", "base", "form", "foreignobject", "use", "image", "animate", "set"}
    for tag, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action", "srcdoc"):
            assert str(attributes.get(name, "#")).startswith("#")
    for hostile in HOSTILE:
        assert hostile.partition("\u202e")[0] in found.text, "shown, but as text"
    assert "\\u202e\\x00\\ud800" in found.text and "{{ 7 * 7 }}" in found.text and "{{ 7 * 7 }}" not in found.own["script"]


def test_only_its_own_script_may_run_and_nothing_may_be_fetched(make_run):
    made = make_run()
    for watch in (False, True):
        found = Read(page_of(made, watch=watch))
        (policy,) = [str(attributes["content"]) for tag, attributes in found.elements if attributes.get("http-equiv")]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        digest = base64.b64encode(hashlib.sha256(found.own["script"].encode()).digest()).decode()
        assert rules.pop("script-src") == f"'sha256-{digest}'"
        assert rules.pop("style-src") == "'unsafe-inline'"
        assert rules.pop("connect-src", None) == ("'self'" if watch else None)
        assert set(rules.values()) == {"'none'"} and "default-src" in rules
        assert not re.search(r"url\(|@import|eval|innerHTML", found.own["style"] + found.own["script"].replace("outerHTML", ""))


def test_the_page_tells_of_every_part_of_the_run(make_run):
    table = {
        "columns": ["metric", "rows", *POLICIES],
        "rows": [["nll", "2", "2.000 (1.900 to 2.100)", "1.5 (-0.5)", "1.4 (-0.6, -0.7 to -0.4, p 0.004)"]],
        "notes": ["so sure"],
    }
    results = [result for policy in POLICIES for result in answer_results(policy, ["yes", "no"], ["yes", "yes"])]
    text = Read(page_of(make_run(results=results, table=table))).text
    for words in (
        "one?",
        "two?",
        "2.000",
        "1.900 to 2.100",
        "-0.500",
        "(-0.700 to -0.400, p 0.004)",
        "so sure",
        "loss 2 → 1 in 2 steps",
        "learning_rate",
        "0.05 process-hours",
        "c0ffee, with changes",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("metric", "low", "high", "p", "said"),
    [
        ("nll", -0.2, -0.1, "0.004", "good"),
        ("nll", -0.2, -0.1, "<0.001", "good"),
        ("nll", -0.2, -0.1, "", "good"),
        ("nll", -0.2, -0.1, "0.096", "even"),
        ("nll", 0.1, 0.2, "0.049", "bad"),
        ("answers passed", 0.1, 0.2, "0.010", "good"),
        ("answers passed", -0.1, 0.2, "<0.001", "even"),
        ("answer tokens", 10.0, 20.0, "<0.001", "even"),
    ],
)
def test_a_difference_is_called_better_only_where_interval_and_p_agree(metric, low, high, p, said):
    assert page.verdict(metric, low, high, p) == said


def test_what_the_first_tiles_say_is_what_the_rows_show(make_run):
    def tile(cell: str) -> str:
        table = {
            "columns": ["metric", "rows", *POLICIES],
            "rows": [["answers passed", "9", "0.5 (0.4 to 0.6)", "0.5 (+0.0)", cell]],
            "notes": [],
        }
        found = Read(page_of(make_run(f"shown{len(cell)}", table=table))).text
        return " ".join(found[found.index("answers passed, dpo") :].split("rows kept")[0].split())

    assert "base 50.0%, sft 50.0%; no clear difference from base" in tile("0.6 (+0.1, +0.01 to +0.2, p 0.400)")
    assert "base 50.0%, sft 50.0%; better than base" in tile("0.6 (+0.1, +0.01 to +0.2, p 0.04)")
    assert "base 50.0%, sft 50.0%stages finished" in tile("0.6 (+0.1)"), "where nothing says how sure it is, nothing is claimed"


def test_a_count_of_tokens_has_not_the_decimals_of_a_loss(make_run):
    rows = [
        ["answer tokens", "9", "49.794 (40.873 to 58.905)", "44.270 (-5.524, -18.238 to +6.890, p 1.000)", "-"],
        ["nll", "9", "10.794 (9.873 to 11.905)", "10.782 (-0.012, -0.014 to -0.010, p <0.001)", "-"],
    ]
    table = {"columns": ["metric", "rows", *POLICIES], "rows": rows, "notes": []}
    text = Read(page_of(make_run(table=table))).text
    for words in (
        "49.8",
        "40.9 to 58.9",
        "-5.5 (-18.2 to +6.9, p 1.000)",
        "10.794",
        "-0.012 (-0.014 to -0.010, p <0.001)",
        "lower is better",
    ):
        assert words in text, words
    assert "49.79" not in text


def test_the_same_run_gives_the_same_page(make_run):
    made = make_run()
    assert page_of(made) == page_of(made)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_a_curve_lies_where_its_values_are():
    points = [(1.0, 3.0), (4.0, 7.0), (9.0, -2.0), (10.0, 0.0)]
    picture = draw.draw(curves.Chart("x", "", [curves.Curve("x", points, [])], True))
    left, top, width, height = picture.box
    (low, high), (least, most) = picture.steps, picture.values
    wanted = [(left + width * (step - low) / (high - low), top + height * (most - value) / (most - least)) for step, value in points]
    (path,) = re.findall(r'd="([^"]*)" style="[^"]*stroke: var\(--curve-1\)', picture.svg)
    drawn = [tuple(map(float, place.split())) for place in re.split("[ML]", path) if place.strip()]
    assert [x for x, _ in drawn] == pytest.approx([x for x, _ in wanted], abs=0.1)
    assert [y for _, y in drawn] == pytest.approx([y for _, y in wanted], abs=0.1)


def test_a_picture_takes_its_colours_from_the_page_and_gives_it_no_style():
    chart = curves.Chart("x", "", [curves.Curve(str(number), [(0.0, number), (1.0, 2.0)], []) for number in range(8)], True)
    picture = draw.draw(chart)
    assert not re.search(r"#[0-9a-f]{6}|<style|<defs| id=|clip-path|font-family|http", picture.svg)
    assert set(re.findall(r"var\(([^)]*)\)", picture.svg)) == {*(f"--curve-{number}" for number in range(1, 7)), "--line", "--dim"}
    assert set(re.findall(r"<text[^>]*>([^<]*)<", picture.svg)) >= {"0", "2", "4"}, "ticks stay text, and are not rounded away"
    assert "step" in re.findall(r"<text[^>]*>([^<]*)<", picture.svg) and "font-size" not in picture.svg


@pytest.mark.parametrize("points", [[(5.0, 1.0)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, 1e300), (2.0, -1e300)], [(1.0, 1e-12), (2.0, 2e-12)]])
def test_any_values_can_be_drawn(points):
    picture = draw.draw(curves.Chart("x", "", [curves.Curve("x", points, [])], True))
    assert "var(--curve-1)" in picture.svg and picture.steps[0] < picture.steps[1] and picture.values[0] < picture.values[1]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_beside_the_run(make_run, posttrain):
    made = make_run()
    ended = posttrain("report", made.config, "--root", made.root)
    assert ended.code == 0 and str(made.directory / "report.html") in ended.out
    assert (made.directory / "report.html").read_text() == page_of(made)
    assert posttrain("status", made.config, "--root", made.root).code == 0, "and it is no stage of it"
    by_name = posttrain("report", "shown", "--root", made.root, "--html", made.root / "other" / "x.html")
    assert by_name.code == 0 and (made.root / "other" / "x.html").is_file()
    ended = posttrain("report", made.config, "--root", made.root, "--json")
    told = json.loads(ended.out)
    assert ended.code == 0 and [stage["name"] for stage in told["stages"]] == ["sft", "dpo", "eval"]
    assert told["stages"][0]["steps"] == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_a_run_that_was_never_begun_has_a_page_too(make_run, posttrain, tmp_path):
    made = make_run(until="sft")
    ended = posttrain("report", made.config, "run=other", "--root", made.root, "--html", tmp_path / "x.html")
    assert ended.code == 0
    assert "not started" in (tmp_path / "x.html").read_text() and not (made.root / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "nowhere: is neither a pipeline file that was run nor a run under"),
        (("shown", "run=x"), "run=x: changes a pipeline file, and shown is none"),
        (("shown", "--watch", "--html", "x.html"), "--watch: serves the page, so leave out --html"),
        (("shown", "--port", "80"), "--port 80: is for --watch only"),
    ],
)
def test_a_wrong_question_is_one_line(make_run, posttrain, arguments, words):
    made = make_run(until="sft")
    ended = posttrain("report", *arguments, "--root", made.root)
    assert ended.code == 2 and words in ended.err and len(ended.err.splitlines()) == 1
