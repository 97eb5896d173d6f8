"""The page in a real browser, as a person uses it: with a mouse, with the keyboard, on a phone, on paper, and while the run goes on."""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from posttrain.progress import Progress
from posttrain.report.serve import PageServer
from tests.conftest import REPOSITORY
from tests.posttrain.report.conftest import POLICIES, answer_results
from tests.posttrain.report.test_page import hostile_run, page_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here; `make browser` installs one")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`visit(page or address, **context)`: the tab, with what it asked for in `.asked` and what it complained of in `.said`."""
    contexts = []

    def call(what: str, **settings: Any) -> Any:
        context = chromium.new_context(**({"viewport": {"width": 1280, "height": 900}} | settings))
        contexts.append(context)
        tab = context.new_page()
        tab.asked, tab.said = [], []
        tab.on("request", lambda request: tab.asked.append(request.url))
        tab.on("console", lambda message: tab.said.append(message.text))
        tab.on("pageerror", lambda error: tab.said.append(str(error)))
        tab.on("dialog", lambda dialog: (tab.said.append("a dialog"), dialog.dismiss()))
        if not what.startswith("http"):
            (tmp_path / "page.html").write_text(what)
            what = (tmp_path / "page.html").as_uri()
        tab.goto(what)
        return tab

    yield call
    for context in contexts:
        context.close()


def shown_run(make_run: Any) -> Any:
    """A run of three policies and 60 prompts: base passes none, sft the even rows, dpo all but row 3."""
    wanted = [f"word{row}" for row in range(60)]
    answers = {
        "base": ["no"] * 60,
        "sft": [text if row % 2 == 0 else "no" for row, text in enumerate(wanted)],
        "dpo": [text if row != 3 else "no" for row, text in enumerate(wanted)],
    }
    results = [result for policy in POLICIES for result in answer_results(policy, answers[policy], wanted)]
    steps = [{"step": step, "loss": 10.0 / step, "entropy": 1.0} for step in range(1, 21)]
    return make_run(prompts=[f"prompt number {row}" for row in range(60)], results=results, steps=steps)


@needs_chromium
def test_it_loads_nothing_says_nothing_and_can_be_used(make_run, visit):
    tab = visit(page_of(shown_run(make_run)), color_scheme="light")
    assert len(tab.asked) == 1 and tab.said == []
    shown = tab.locator(".sample:visible")
    assert shown.count() == 20 and tab.locator("#samples-eval output").inner_text() == "20 of 60"
    tab.get_by_role("button", name="20 more").click()
    assert shown.count() == 40
    tab.get_by_label("show").select_option("fail")
    assert shown.count() == 1 and "prompt number 3" in shown.inner_text() and shown.inner_text().count("fails") == 3
    tab.get_by_label("show").select_option("gained")
    assert tab.locator("#samples-eval output").inner_text() == "20 of 59"
    tab.get_by_role("searchbox").fill("WORD5")
    assert tab.locator("#samples-eval output").inner_text() == "11 of 11", "5 and 50 to 59"
    assert len(tab.asked) == 1 and tab.said == []


@needs_chromium
def test_the_theme_follows_the_system_until_it_is_chosen(make_run, visit):
    text = page_of(make_run())

    def ground(tab: Any) -> str:
        return str(tab.evaluate("getComputedStyle(document.body).backgroundColor"))

    light, dark = visit(text, color_scheme="light"), visit(text, color_scheme="dark")
    assert ground(light) == "rgb(255, 255, 255)" and ground(dark) != ground(light)
    stroke = "getComputedStyle(document.querySelector('svg.plot path[style*=curve]')).stroke"
    assert light.evaluate(stroke) != dark.evaluate(stroke), "pictures go with it"
    button = dark.get_by_role("button", name="Theme")
    button.click()
    assert button.inner_text() == "Theme: light" and ground(dark) == ground(light)
    dark.reload()
    assert button.inner_text() == "Theme: light" and ground(dark) == ground(light), "and it is remembered"
    dark.emulate_media(media="print")
    dark.locator("#theme").evaluate("button => button.click()")
    assert ground(dark) == ground(light), "paper is white"


@needs_chromium
def test_a_chart_is_read_by_pointer_and_by_keyboard(make_run, visit):
    tab = visit(page_of(shown_run(make_run)))
    chart = tab.locator("#stage-sft .chart").first
    assert chart.get_attribute("aria-label").startswith("loss. loss: 10 at step 1, 0.5 at step 20, between 0.5 and 10.")
    told = chart.locator("output")
    chart.focus()
    for key, words in (
        ("ArrowRight", "step 1: loss 10"),
        ("ArrowRight", "step 2: loss 5"),
        ("End", "step 20: loss 0.5"),
        ("ArrowLeft", "step 19: loss 0.5263"),
    ):
        tab.keyboard.press(key)
        assert told.inner_text() == words
    box = chart.locator("svg.plot").bounding_box()
    tab.mouse.move(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
    assert told.inner_text() == "step 20: loss 0.5"
    tab.mouse.move(0, 0)
    assert told.inner_text() == ""


@needs_chromium
def test_all_that_can_be_operated_is_reached_by_keyboard_and_has_a_name(make_run, visit):
    tab = visit(page_of(shown_run(make_run)))
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip" and tab.locator(".skip").bounding_box()["x"] >= 0
    seen = set()
    for _ in range(60):
        seen.add(
            tab.evaluate("document.activeElement.tagName + ' ' + (document.activeElement.id || document.activeElement.dataset.name || '')")
        )
        tab.keyboard.press("Tab")
    assert {"BUTTON theme", "SELECT fate", "INPUT words", "FIGURE loss", "SUMMARY "} <= seen
    named = "each.ariaLabel || each.labels?.length || each.innerText || each.ariaLabelledByElements?.length"
    nameless = tab.locator("button, select, input, figure, [role=region], section, nav").evaluate_all(
        f"all => all.filter(each => each.offsetParent && !({named})).map(each => each.outerHTML)"
    )
    assert nameless == []
    levels = tab.locator("h1, h2, h3, h4, h5").evaluate_all("all => all.map(each => Number(each.tagName[1]))")
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels)), "no level is skipped"


@needs_chromium
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_width_is_too_narrow(make_run, visit, width):
    tab = visit(page_of(hostile_run(make_run)), viewport={"width": width, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@needs_chromium
def test_paper_shows_what_is_folded_and_no_tools(make_run, visit, tmp_path):
    tab = visit(page_of(shown_run(make_run)))
    assert not tab.get_by_text("entropy", exact=True).last.is_visible()
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    tab.emulate_media(media="print")
    assert tab.locator("#stage-sft .chart").count() == 2 and tab.locator("#stage-sft .chart").last.is_visible()
    assert not tab.locator("nav").is_visible() and not tab.get_by_role("button", name="Theme").is_visible()
    tab.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").stat().st_size > 10_000


@needs_chromium
def test_nothing_hostile_runs(make_run, visit):
    text = page_of(hostile_run(make_run))
    tab = visit(text)
    for details in tab.locator("details").all():
        details.evaluate("each => { each.open = true; }")
    tab.locator(".chart").first.focus()
    tab.keyboard.press("ArrowRight")
    tab.get_by_role("searchbox").fill("script")
    tab.wait_for_timeout(200)
    assert tab.evaluate("window.pwned") is None and len(tab.asked) == 1 and tab.said == []
    armed = text.replace("<main id", "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'><main id", 1)
    tab = visit(armed)
    assert tab.evaluate("window.pwned") is None and len(tab.said) >= 3, "and if it got in, the policy would stop it"


# --- while the run goes on -------------------------------------------------------------------------------------------


@pytest.fixture
def watched(make_run: Any) -> Iterator[tuple[Any, str]]:
    """A run, and the address of its page as `report --watch` serves it, in a process of its own."""
    made = shown_run(make_run)
    command = [sys.executable, "pipeline.py", "report", str(made.config), "--root", str(made.root), "--watch"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        line = process.stdout.readline()
        try:
            yield made, next(word for word in line.split() if word.startswith("http"))
        finally:
            process.send_signal(signal.SIGTERM)
            said = process.stderr.read()
    assert process.returncode == 75 and "Traceback" not in said, said


@needs_chromium
def test_a_served_page_follows_the_run_and_keeps_what_one_was_at(watched, visit):
    made, address = watched
    tab = visit(address)
    tab.wait_for_function("document.getElementById('watch').textContent === 'live'")
    tab.get_by_label("show").select_option("fail")
    tab.locator("#stage-sft details[data-name='more curves'] summary").click()
    tab.locator("#stage-sft .chart").first.focus()
    with (made.directory / "sft" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, "loss": 0.125, "entropy": 1.0}) + "\n")
    playwright.expect(tab.locator("#stage-sft .chart").first.locator("figcaption")).to_contain_text("0.125", timeout=30_000)
    assert tab.locator("#stage-sft details[data-name='more curves']").get_attribute("open") is not None
    assert tab.evaluate("document.activeElement.dataset.name") == "loss"
    assert tab.locator(".sample:visible").count() == 1, "what did not change was left alone"
    tab.keyboard.press("End")
    assert tab.locator("#stage-sft .chart").first.locator("output").inner_text() == "step 21: loss 0.125"
    assert tab.said == [] and set(tab.asked) == {address}


def test_only_this_machine_is_answered_and_only_with_the_page(watched):
    _, address = watched
    port = int(address.rstrip("/").rpartition(":")[2])

    def ask(path: str = "/", method: str = "GET", **headers: str) -> tuple[int, bytes, Any]:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        found = answer.status, answer.read(), answer.headers
        connection.close()
        return found

    status, page, headers = ask()
    assert status == 200 and b"</html>" in page and headers["Content-Type"] == "text/html; charset=utf-8"
    assert ask(If_None_Match=headers["ETag"])[:2] == (304, b"")
    assert ask(Host=f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1.evil.example:{port}", ""):
        status, said, _ = ask(Host=host)
        assert status == 421 and b"prompt number" not in said, host
    for path in ("/../pipeline.py", "/etc/passwd", "/?x", "/report.html"):
        assert ask(path)[0] == 404
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(method=method)[0] == 501


def test_a_running_stage_is_shown_as_it_is(make_run):
    import pipeline
    from posttrain import ledger

    made = make_run(until="sft")
    dpo = made.directory / "dpo"
    node = next(node for node in pipeline.plan(pipeline.read_pipeline(made.config), made.root) if node.name == "dpo")
    dpo.mkdir()
    with ledger.lease(dpo):
        pipeline._start(node)
        progress = Progress(dpo, is_main=True)
        progress.phase("train", 40)
        progress.step(40, loss=0.5)
        text = page_of(made, watch=True)
    assert "train 40 of 40" in text and text.count(">running<") >= 3


def test_a_page_is_not_made_anew_for_each_who_asks():
    made = []
    with PageServer(0, lambda: made.append("x") or "page") as server:
        assert {server.page() for _ in range(50)} == {b"page"} and len(made) == 1


def test_a_tab_that_is_closed_before_its_answer_is_no_error(capsys):
    asked, gone, answered = threading.Event(), threading.Event(), threading.Event()

    def render() -> str:
        asked.set()
        assert gone.wait(30)
        return "page" * 1_000_000

    class Server(PageServer):
        def shutdown_request(self, request: Any) -> None:
            super().shutdown_request(request)
            answered.set()

    with Server(0, render) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tab = socket.create_connection(("127.0.0.1", server.server_port))
        tab.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed at once, with what was not read
        tab.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n".encode())
        assert asked.wait(30)
        tab.close()
        gone.set()
        assert answered.wait(30)
        server.shutdown()
    assert capsys.readouterr().err == ""
