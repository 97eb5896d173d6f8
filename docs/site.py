"""The site's hook: pages that are made from the code, so that nothing is written twice, and links that lead out of docs/.

  stages/<kind>.md   one for each stage: its file's docstring, what it reads and writes, every field, a config that uses it
  commands.md        every command with its options
  pipeline-file.md   the fields of sources and launchers
  benchmarks.md, contributing.md, changelog.md     files of the repository that lie elsewhere

Imports no torch, as `posttrain stages` does not.
"""

import functools
import inspect
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from pipeline import cli
from posttrain.config import LAUNCHERS, Config, DataSource, ModelSource, fields_help, read_yaml
from posttrain.stage import Role, Stage, load_stage
from stages import STAGES

ROOT = Path(__file__).parent.parent
TAKEN = {
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "pipeline.py": "commands.md",
    "posttrain/config.py": "pipeline-file.md",
    "stages/__init__.py": "stages/index.md",
    **{f"stages/{kind}.py": f"stages/{kind}.md" for kind in STAGES},
}
"""Files of the repository that have a page, or of which one is made, by its path in the site. Links name the files, so that they lead
somewhere where pages are read as they lie in the repository, too."""
LINK = re.compile(r"(?P<open>\[(?P<text>[^\]]*)\]\()(?P<path>[^)#:\s]+)(?P<rest>(?:#[^)]*)?\))")


# --- pages -----------------------------------------------------------------------------------------------------------


@functools.cache
def generated() -> dict[str, str]:
    """Path in the site to text, of every page that no file in docs/ holds."""
    pages = {"stages/index.md": _stages_page(), **{f"stages/{kind}.md": _stage_page(kind) for kind in STAGES}}
    pages |= {"commands.md": _commands_page(), "pipeline-file.md": _pipeline_page()}
    for taken in ("benchmarks/README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        pages[TAKEN[taken]] = (ROOT / taken).read_text(encoding="utf-8")
    return pages


def _stages_page() -> str:
    stages = [load_stage(kind, kind) for kind in STAGES]
    rows = [
        (f"[{stage.kind}]({stage.kind}.md)", ", ".join(map(_plain_role, stage.inputs.items())), stage.output, _escape(stage.summary))
        for stage in stages
    ]
    text = "A stage is one file in `stages/`; these pages are made from their docstrings and config classes."
    return f"# Stages\n\n{text}\n\n{_table(('kind', 'reads', 'writes', 'what it does'), rows)}"


def _stage_page(kind: str) -> str:
    stage = load_stage(kind, kind)
    parts = [f"# {kind}", f"**{_escape(stage.summary)}**", _prose(_docstring(stage))]
    parts += [f"More in [{guide.stem}](../{guide.name}#{kind})." for guide in _guides(kind)]
    rows = [(f"`{role}`", wanted.kind, _number(wanted)) for role, wanted in stage.inputs.items()]
    parts += ["## Inputs and output", _table(("input", "is", "given"), rows), f"It writes: {stage.output}."]
    if stage.reference is not None:
        parts.append(f"The policy in `{stage.reference}` is also kept frozen, as the reference that training is held to.")
    for title, text, fields in _field_groups(stage.config):
        parts += [f"## {title}", text, _field_table(fields)]
    for name, part in (stage.parts() if stage.parts else {}).items():
        parts += [f"## Step `{name}`", _escape((part.__doc__ or "").splitlines()[0])]
        parts += [_field_table(fields_help(part, f"{name}."))] if part.model_fields else []
    for path in _configs_with(kind)[:1]:
        text = path.read_text(encoding="utf-8").rstrip()
        parts += ["## In a pipeline", f"`{path.relative_to(ROOT)}`:", f"```yaml\n{text}\n```"]
    return "\n\n".join(parts)


def _field_groups(config: type[Config]) -> Iterator[tuple[str, str, list[tuple[str, str, str, str]]]]:
    """Title, text and fields of each class that a config is made of, its own fields first."""
    owner = {}
    for base in reversed(config.__mro__):
        owner.update(dict.fromkeys((name for name in inspect.get_annotations(base) if name in config.model_fields), base))
    rows = fields_help(config)
    for base in sorted(set(owner.values()), key=config.__mro__.index):
        fields = [row for row in rows if owner[row[0].partition(".")[0]] is base]
        bears_identity = base.__dict__.get("bears_identity", True)
        fingerprint = "They are part of the stage's fingerprint." if bears_identity else "They change no fingerprint."
        title = "Fields of its own" if base is config else f"Fields of `{base.__name__}`"
        yield title, f"{_escape(inspect.getdoc(base) or '')} {fingerprint}", fields


def _commands_page() -> str:
    parts = ["# Commands", _escape(inspect.getdoc(cli.callback) or "") + " `posttrain` is `python pipeline.py`, where it is installed."]
    for name, command in cli.commands.items():
        if command.hidden:
            continue
        context = click.Context(command, info_name=f"python pipeline.py {name}")
        parts += [f"## {name}", _escape(inspect.getdoc(command.callback) or ""), f"```text\n{command.get_usage(context)}\n```"]
        options = [
            found for parameter in command.params if isinstance(parameter, click.Option) and (found := parameter.get_help_record(context))
        ]
        rows = [(f"`{option}`", _escape(text)) for option, text in options]
        parts += [_table(("option", "what it does"), rows)] if rows else []
    return "\n\n".join(parts)


def _pipeline_page() -> str:
    text = "A file has the keys `run`, `sources`, `stages`, `launcher` and [`smoke`](smoke.md); [Concepts](concepts.md) says what they are."
    parts = ["# The pipeline file", f"{text} The fields of a stage stand on [its page](stages/index.md)."]
    classes = {"A model": ModelSource, "Data": DataSource, **{f"Launcher `{kind}`": launcher for kind, launcher in LAUNCHERS.items()}}
    for title, config in classes.items():
        parts += [f"## {title}", _escape(inspect.getdoc(config) or ""), _field_table(fields_help(config))]
    return "\n\n".join(parts)


# --- from code to Markdown -------------------------------------------------------------------------------------------


def _docstring(stage: Stage[Any]) -> str:
    return inspect.getdoc(inspect.getmodule(stage.run)) or ""


def _prose(docstring: str) -> str:
    """A docstring below its first line: what is indented is shown as it stands, the rest as text."""
    blocks: list[tuple[bool, list[str]]] = []
    for line in docstring.splitlines()[1:]:
        is_shown = line.startswith("  ")
        if not blocks or (line and blocks[-1][0] is not is_shown):
            blocks.append((is_shown, []))
        blocks[-1][1].append(line)
    texts = [textwrap.dedent("\n".join(lines)).strip("\n").replace("\nDifferences from ", "\n\nDifferences from ") for _, lines in blocks]
    return "\n\n".join(
        f"```text\n{text}\n```" if is_shown else re.sub(r"docs/([\w-]+)\.md", r"[\1](../\1.md)", _escape(text))
        for (is_shown, _), text in zip(blocks, texts, strict=True)
        if text
    )


def _escape(text: str) -> str:
    """Text whose words mean nothing to Markdown, but for what stands in backticks."""
    parts = text.split("`")
    return "`".join(part if number % 2 else re.sub(r"([*_<\[|])", r"\\\1", part) for number, part in enumerate(parts))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _field_table(fields: Sequence[tuple[str, str, str, str]]) -> str:
    # On a phone the first columns are what is seen.
    rows = [(f"`{name}`", _escape(text), f"`{default}`" if default else "", f"`{kind}`") for name, kind, default, text in fields]
    return _table(("field", "what it is", "default", "type"), rows)


def _plain_role(given: tuple[str, Role]) -> str:
    role, wanted = given
    return f"`{role}`{'…' if wanted.many else ''}{' (optional)' if wanted.optional else ''}"


def _number(wanted: Role) -> str:
    if wanted.many:
        return "none or several" if wanted.optional else "one or several"
    return "none or one" if wanted.optional else "one"


def _guides(kind: str) -> list[Path]:
    """The pages that have a section of the stage's name."""
    return [path for path in sorted(Path(__file__).parent.glob("*.md")) if f"\n## {kind}\n" in path.read_text(encoding="utf-8")]


def _configs_with(kind: str) -> list[Path]:
    """The shipped pipelines that have such a stage, those that run as they are last, the shortest first."""
    found = []
    for path in (ROOT / "configs").glob("*.yaml"):
        if any(raw.get("kind", name) == kind for name, raw in read_yaml(path)["stages"].items()):
            found.append(path)
    return sorted(found, key=lambda path: (path.stem.startswith(("tiny_", "quickstart")), path.stat().st_size))


# --- hooks of mkdocs -------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that a pattern of the navigation stands for in its place: all that are not named elsewhere in it."""
    on_disk = [str(path.relative_to(config.docs_dir)) for path in sorted(Path(config.docs_dir).rglob("*.md"))]
    pages = dict.fromkeys([*generated(), *on_disk])

    def named(entry: Any) -> Iterator[str]:
        for each in entry if isinstance(entry, list) else entry.values() if isinstance(entry, dict) else ():
            yield from named(each)
        if isinstance(entry, str):
            yield entry

    left = [page for page in pages if page not in set(named(config.nav))]

    def fill(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {title: fill(each) for title, each in entry.items()}
        if isinstance(entry, list):
            return [each for part in map(fill, entry) for each in (part if isinstance(part, list) else [part])]
        if "*" not in entry:
            return entry
        return [page for page in left if fnmatch(page, entry) and page.count("/") == entry.count("/")]

    config.nav = fill(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to other files of the repository to their pages; those to files without one become plain text."""
    uri = page.file.src_uri
    own = next((taken for taken, path in TAKEN.items() if path == uri and path in generated()), f"docs/{uri}")

    def lead(match: re.Match[str]) -> str:
        target = os.path.normpath(Path(own).parent / match["path"])
        if own.startswith("docs/") and target.startswith("docs/"):
            return match[0]
        if not (ROOT / target).exists():
            return match[0]  # broken, which mkdocs says
        path = TAKEN.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if path is None:
            return match["text"]
        return f"{match['open']}{os.path.relpath(path, Path(uri).parent)}{match['rest']}"

    return LINK.sub(lead, markdown)
