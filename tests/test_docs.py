"""The documentation: its site has no broken link, says all that the code has, loads nothing from elsewhere, and what it shows works."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click
import pytest

from pipeline import cli, plan
from posttrain.config import DataSource, PipelineConfig, is_hub_id, load_yaml, read_launcher, read_source, validate
from posttrain.stage import load_stage
from stages import STAGES
from tests.conftest import REPOSITORY, Ended

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "benchmarks" / "README.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
PARTS = ("run", "sources", "stages", "launcher", "smoke")
OURS = re.compile(r"(?:(?:\.venv/bin/|\$\(BIN\)/)?python )?pipeline\.py |posttrain (?=[a-z]+( |$))")
PATH = re.compile(r"(?<![\w./-])(?:(?:configs|ds_configs|stages|posttrain|tests)/[\w./-]+\.\w+|benchmarks/\w+\.py)")
BUILD = """
import json, sys
from mkdocs.__main__ import cli
cli(["build", "--strict", "--site-dir", sys.argv[1]], standalone_mode=False)
print(json.dumps(sorted(sys.modules)))
"""


# --- the site --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """The site as it was built, and the modules that building it took."""

    path: Path
    modules: list[str]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    path = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-c", BUILD, str(path)]
    built = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    return Site(path, json.loads(built.stdout.splitlines()[-1]))


class Read(HTMLParser):
    """What a page loads, and the texts that stand in `<code>`."""

    LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.codes: list[str] = []
        self.is_code = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value for name, value in attrs if value and (tag, name) in self.LOADED]
        if tag == "code":
            self.is_code = True
            self.codes.append("")

    def handle_endtag(self, tag: str) -> None:
        self.is_code = self.is_code and tag != "code"

    def handle_data(self, data: str) -> None:
        if self.is_code:
            self.codes[-1] += data


def test_the_site_is_built_without_a_broken_link_and_without_torch(site: Site) -> None:
    assert {"mkdocs", "posttrain.config"} <= set(site.modules)
    assert not {"torch", "transformers", "trl"} & set(site.modules)


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_has_a_page_with_all_of_its_fields(kind: str, site: Site, posttrain: Callable[..., Ended]) -> None:
    page = site.path / "stages" / f"{kind}.html"
    fields = {entry["name"] for entry in json.loads(posttrain("stages", kind, "--json").out)}
    assert fields
    assert fields <= set(Read(page).codes)
    assert "Fields of its own" in page.read_text(encoding="utf-8")


def test_a_command_has_a_section_with_all_of_its_options(site: Site, posttrain: Callable[..., Ended]) -> None:
    sections = re.split(r'<h2 id="', (site.path / "commands.html").read_text(encoding="utf-8"))
    shown = {name: set(re.findall(r"--[a-z-]+", section)) for section in sections for name in [section.partition('"')[0]]}
    commands = {name for name, command in cli.commands.items() if not command.hidden}
    assert commands == shown.keys() & cli.commands.keys()
    for name in commands:
        assert set(re.findall(r"--[a-z-]+", posttrain(name, "--help").out)) - {"--help"} <= shown[name]


def test_pages_load_nothing_from_elsewhere(site: Site) -> None:
    pages = list(site.path.rglob("*.html"))
    assert len(pages) > len(STAGES)
    loads = [load for page in pages for load in Read(page).loads]
    assert any(load.endswith(".css") for load in loads) and any(load.endswith(".js") for load in loads)
    assert [load for load in loads if "//" in load] == []
    for style in site.path.rglob("*.css"):
        assert re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)]*", style.read_text(encoding="utf-8")) == []
    # Material would fetch the library that draws these.
    assert [page for page in pages if 'class="mermaid"' in page.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_a_link_leads_somewhere_where_pages_are_read_in_the_repository_too(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, f"{path}#{anchor}"


# --- what pages show -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A piece of a page: a fenced block with its language, or a piece of code within a line, whose language is `inline`."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def at(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def read_shown(page: Path) -> Iterator[Shown]:
    """All blocks and pieces of code of a page."""
    language, block, start = None, [], 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if fence := re.fullmatch(r"\s*```(\w*)\s*", line):
            if language is None:
                language, block, start = fence[1], [], number + 1
            else:
                yield Shown(page, start, language, "\n".join(block))
                language = None
        elif language is not None:
            block.append(line)
        elif line.startswith("    ") and OURS.match(line.strip()):
            yield Shown(page, number, "bash", line.strip())
        else:
            yield from (Shown(page, number, "inline", code) for code in re.findall(r"`([^`]+)`", line))
    assert language is None, f"{page}: a block is not closed"


SHOWN = [shown for page in PAGES for shown in read_shown(page)]


def list_pipelines() -> list[Any]:
    """The YAML blocks that are a pipeline or a part of one; what a cluster is told is not."""
    blocks = [shown for shown in SHOWN if shown.language == "yaml" and not re.search(r"^apiVersion:", shown.text, re.MULTILINE)]
    return [pytest.param(shown.text, id=shown.at) for shown in blocks]


def list_commands() -> list[Any]:
    """The commands of the pipeline that pages show, from the name on, and whether they are to be typed as they stand."""
    found = []
    for shown in SHOWN:
        lines = shown.text.replace("\\\n", " ").splitlines() if shown.language in ("bash", "inline") else []
        for offset, line in enumerate(lines):
            if begins := OURS.match(line.strip()):
                is_typed = shown.language == "bash"
                found.append(pytest.param(line.strip()[begins.end() :], is_typed, id=f"{shown.page.stem}:{shown.line + offset}"))
    return found


def check_stages(stages: Mapping[str, Any]) -> None:
    for name, entry in stages.items():
        raw = dict(entry)
        stage = load_stage(raw.pop("kind", name), name)
        inputs = raw.pop("inputs", {})
        assert set(inputs) <= set(stage.inputs)
        settings = validate(stage.config, raw, f"stages.{name}")
        if deepspeed := getattr(settings, "deepspeed", None):
            assert (REPOSITORY / deepspeed).is_file()


def stand_in(config: PipelineConfig) -> None:
    """Put something where the sources of a pipeline would lie, below the current directory."""
    for source in config.sources.values():
        paths = source.paths if isinstance(source, DataSource) else [source.model]
        for path in (Path(path) for path in paths if not is_hub_id(path.partition("@")[0])):
            assert not path.is_absolute()
            file = path if isinstance(source, DataSource) else path / "config.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}\n")


@pytest.mark.parametrize("text", list_pipelines())
def test_a_pipeline_that_is_shown_is_accepted(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = load_yaml(text)
    if not set(raw) & set(PARTS):
        raw = {"stages": raw}
    assert set(raw) <= set(PARTS)
    check_stages(raw.get("stages", {}))
    for name, source in raw.get("sources", {}).items():
        read_source(f"sources.{name}", source)
    read_launcher("launcher", raw.get("launcher", {}))
    if {"run", "sources", "stages"} <= set(raw):
        config = validate(PipelineConfig, raw, "")
        # A tracker that is shown need not be installed.
        monkeypatch.setattr("posttrain.recipe.TRACKER_LIBRARIES", defaultdict(lambda: ("json",)))
        monkeypatch.chdir(tmp_path)
        stand_in(config)
        assert [node.name for node in plan(config, tmp_path / "runs")] == list(raw["stages"])


@pytest.mark.parametrize("command, is_typed", list_commands())
def test_a_command_that_is_shown_exists_with_these_options(command: str, is_typed: bool) -> None:
    name, *words = shlex.split(command, comments=True)
    words = words[: next((place for place, word in enumerate(words) if word in ("|", ">", "&&", ";")), len(words))]
    assert name in cli.commands
    try:
        cli.commands[name].make_context(name, list(words))  # which it empties
    except click.MissingParameter:
        assert not is_typed
    except click.exceptions.Exit:
        assert "--help" in words


def test_pages_show_pipelines_and_commands() -> None:
    assert len(list_pipelines()) > 8 and len(list_commands()) > 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_what_a_page_names_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for shown in read_shown(page):
        for line in shown.text.splitlines():
            if made := re.match(r"(?:NO_\S+ )?make ([a-z-]+)", line.strip()):
                assert made[1] in targets, shown.at
        for path in PATH.findall(shown.text):
            assert (REPOSITORY / path).exists(), f"{shown.at}: {path}"


def test_all_troubles_say_what_is_seen_what_is_done_and_how_to_check() -> None:
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    troubles = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    assert [int(trouble.partition(".")[0]) for trouble in troubles] == list(range(1, 26))
    for trouble in troubles:
        assert re.findall(r"^\*\*(.+?)\*\*", trouble, re.MULTILINE) == ["Symptom.", "What posttrain does.", "Check."]
        assert "```bash" in trouble or "As for" in trouble or "The same as for" in trouble
