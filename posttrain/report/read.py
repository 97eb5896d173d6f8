"""Reading: all that a report says of a run, as plain data, from what the run left on disk.

Nothing here needs a process to be alive, and nothing is trusted: a line that was cut off, a file of another version or one that is
gone leaves out what it would have said. What a stage writes beside `artifact.json` is for people, so none of it is checked by hash.
"""

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from posttrain import artifact, disk, ledger
from posttrain.config import DataSource, ModelSource, read_source
from posttrain.error import UserError
from posttrain.results import read_results
from posttrain.selection import Selection, read_selection
from posttrain.stage import load_stage
from posttrain.verdict import Verdict, read_verdict

MAX_SAMPLES = 200
"""Rows whose answers are shown of one evaluation, evenly spread over all."""
MAX_SAMPLED_STEPS = 12
"""Steps of which sampled completions are shown, evenly spread from the first to the last."""
MAX_DROPPED = 3
"""Dropped rows that are shown for each reason of a curation."""
MAX_CHARACTERS = 3000
"""Longest text that is shown whole."""
PREFLIGHT_FIGURES = {
    "num_tokens", "num_trained_tokens", "length_quantiles", "shares", "counts", "limits", "exceeded", "examples", "summary",
}  # fmt: skip
NUMBER = r"[+-]?\d+(?:\.\d+)?"
SPREAD = rf"(?P<low>{NUMBER}) to (?P<high>{NUMBER})"
CELLS = (
    rf"(?P<value>{NUMBER})(?: \({SPREAD}\)| \([a-z][^)]*\))?",
    rf"(?P<value>{NUMBER}) \((?P<difference>[+-]\d+(?:\.\d+)?)(?:, {SPREAD})?(?:, p (?P<p><?[01]\.\d+))?\)",
)
"""Cells of an evaluation's table: a value with its interval, and one with its difference from the first policy, its interval and p."""


@dataclass(frozen=True)
class Source:
    """What enters a run from outside."""

    name: str
    kind: str
    fingerprint: str
    source: dict[str, Any]
    """As the pipeline file has it, without what is the default."""


@dataclass(frozen=True)
class Cell:
    """One metric of one policy, as the evaluation's table says it."""

    text: str
    value: float | None = None
    difference: float | None = None
    """From the first policy."""
    low: float | None = None
    """Of the interval of the value, or of the difference where there is one."""
    high: float | None = None
    p: str = ""
    """How likely chance alone gives as large a difference, such as `0.004` or `<0.001`."""


@dataclass(frozen=True)
class Answer:
    """What one policy answered to one prompt."""

    policy: str
    text: str
    passed: bool | None
    """Whether it passes all checks of its row; None where the row has none."""
    outcome: float | None = None
    """Of its duel with the first policy's answer: 1 won, 1/2 tied, 0 lost; None where none was held, or no verdict could be read."""
    words: tuple[str, ...] = ()
    """What the judge said of the two."""


@dataclass(frozen=True)
class Sample:
    """One row of an evaluation, with what each policy answered."""

    row: int
    prompt: list[dict[str, str]] | None
    """Messages, each a role and a content; None where the data are not there any more, or not the same."""
    checks: list[str]
    answers: list[Answer]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation measured."""

    policies: list[str]
    rows: list[tuple[str, str, list[Cell]]]
    """Name of the metric, number of rows, and a cell for each policy."""
    notes: list[str]
    samples: list[Sample]
    num_samples: int
    """Rows that were answered, of which `samples` shows some."""


@dataclass(frozen=True)
class Dropped:
    """A row that a curation left out; empty where nothing is known."""

    origin: str
    step: str
    reason: str
    detail: str
    match: str
    """The row that it repeats."""
    text: str


@dataclass(frozen=True)
class Curation:
    """What a curation kept and dropped, step by step."""

    num_rows_in: int
    num_rows_out: int
    steps: list[dict[str, Any]]
    """As `report.json` has them: step, rows_out, dropped, changed, reasons, settings."""
    dropped: list[Dropped]
    """Some of the rows that were dropped, for each reason."""


@dataclass(frozen=True)
class Completion:
    """One sampled answer, and what it was rewarded with."""

    text: str
    reward: float
    rewards: dict[str, float]
    """By what rewards it."""
    kl: float | None
    num_tokens: int | None


@dataclass(frozen=True)
class Completions:
    """What a policy that learns from its own answers said to one prompt, at one step."""

    step: int
    prompt: list[dict[str, str]]
    best: Completion
    worst: Completion
    num_completions: int


@dataclass(frozen=True)
class StageReport:
    """What is known of one stage of a run."""

    name: str
    kind: str
    output: str
    """Kind of artifact that it makes."""
    action: str
    """What a run would do about it, or that one is at it: an action of `plan`."""
    why: str
    reads: dict[str, list[str]]
    """Role to the names of what the last attempt read; before there is one, of what it is going to."""
    inputs: dict[str, dict[str, str]]
    """Name of each input to the `id` and `fingerprint` that were read."""
    id: str | None
    """That of the finished build."""
    fingerprint: str | None
    identity: dict[str, Any]
    """What of its config changes its output, where that is not the default."""
    version: int | None
    """Of the stage's code, which another output of the same config makes another."""
    config: dict[str, Any]
    attempts: int
    num_processes: int
    started: float | None
    """Seconds since the epoch."""
    ended: float | None
    """When the last attempt ended, or now while it goes on, or when it was last heard of."""
    seconds: float | None
    """Of all attempts at what is there, each from its start until it ended or was last heard of."""
    process_seconds: float
    """The same, of all processes together."""
    is_reused: bool
    """Whether another run built it."""
    progress: dict[str, Any] | None
    metrics: dict[str, float]
    steps: list[dict[str, float]]
    """The logged steps, each with `step` and finite values."""
    layout: dict[str, Any] | None
    preflight: dict[str, Any] | None
    """As `preflight.json` has it, or its summary alone."""
    curation: Curation | None
    evaluation: Evaluation | None
    verdict: Verdict | None
    """What its gates found."""
    heldout: list[dict[str, float]]
    """Measurements on held-out rows while it trained, by step."""
    selection: Selection | None
    """Which of these steps is published; None where the last one is."""
    completions: list[Completions]
    files: dict[str, dict[str, Any]]
    provenance: dict[str, Any]
    logs: str | None
    """Where the ranks of the last attempt wrote what they had to say."""

    @property
    def is_finished(self) -> bool:
        """Whether its output is there and may be read."""
        return self.id is not None

    @property
    def process_hours(self) -> float:
        """Hours of all its processes together; none where another run built it."""
        return 0.0 if self.is_reused else self.process_seconds / 3600


@dataclass(frozen=True)
class RunReport:
    """What is known of a run."""

    name: str
    directory: str
    sources: list[Source]
    stages: list[StageReport]

    @property
    def as_of(self) -> float | None:
        """When something was last heard of it."""
        return max((moment for stage in self.stages for moment in (stage.started, stage.ended) if moment is not None), default=None)

    @property
    def is_running(self) -> bool:
        """Whether a process is at one of its stages."""
        return any(stage.action == "running" for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all stages that it built itself."""
        return sum(stage.seconds or 0.0 for stage in self.stages if not stage.is_reused)

    @property
    def process_hours(self) -> float:
        """Hours of all processes of all stages together."""
        return sum(stage.process_hours for stage in self.stages)


def read_run(directory: Path, rows: Sequence[Mapping[str, Any]]) -> RunReport:
    """All that is known of the run in `directory`; `rows` say of each stage, in order, what `plan` or `status` says of it."""
    stages = [_read_stage(directory / row["stage"], row) for row in rows]
    sources: dict[str, Source] = {}
    for row in rows:
        attempt = ledger.read_attempt(directory / row["stage"])
        for entry in [entry for role in attempt.inputs.values() for entry in role] if attempt else []:
            if entry["id"] == entry["fingerprint"]:
                sources[entry["name"]] = Source(entry["name"], entry["kind"], entry["fingerprint"], _set_fields(entry["source"]))
    return RunReport(directory.name, str(directory), list(sources.values()), stages)


def in_order(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of stages such that each stands below those that it reads; else by name."""
    by_name = {row["stage"]: row for row in sorted(rows, key=lambda row: str(row["stage"]))}
    reads = {name: [read for names in row["inputs"].values() for read in names if read in by_name] for name, row in by_name.items()}
    return [by_name[name] for name in TopologicalSorter(reads).static_order()]


def _read_stage(directory: Path, row: Mapping[str, Any]) -> StageReport:
    attempt = ledger.read_attempt(directory)
    try:
        payload = disk.read_sealed(directory / artifact.FILE) or {}
    except (OSError, ValueError):
        payload = {}  # its action says that it is damaged
    provenance = payload.get("provenance", {})
    progress = _read(directory / "progress.json")
    kind = attempt.kind if attempt else row["kind"]
    began = _seconds_of(provenance.get("started") or (attempt.started if attempt else None))
    ended = _seconds_of(provenance.get("finished"))
    if ended is None and row["action"] == "running":
        ended = time.time()
    elif ended is None and progress:
        ended = progress.get("updated")
    is_reused = bool(attempt and provenance and provenance["finished"] < attempt.started)
    spent = [] if began is None or ended is None else [(max(0.0, ended - began), attempt.num_processes if attempt else 1)]
    if attempt and not is_reused:
        spent += [(each["seconds"], each["num_processes"]) for each in attempt.earlier]
    output = directory / artifact.OUTPUT
    return StageReport(
        name=row["stage"],
        kind=kind,
        output=_output_kind(kind),
        action=row["action"],
        why=row["why"],
        reads={role: [entry["name"] for entry in entries] for role, entries in attempt.inputs.items()} if attempt else dict(row["inputs"]),
        inputs=dict(payload.get("inputs") or (attempt.input_builds if attempt else {})),
        id=payload.get("id"),
        fingerprint=payload.get("fingerprint") or (attempt.fingerprint if attempt else None),
        identity=dict(attempt.identity) if attempt else {},
        version=attempt.version if attempt else None,
        config=dict(attempt.config) if attempt else {},
        attempts=attempt.number if attempt else 0,
        num_processes=attempt.num_processes if attempt else 1,
        started=began,
        ended=ended,
        seconds=sum(seconds for seconds, _ in spent) if spent else None,
        process_seconds=sum(seconds * count for seconds, count in spent),
        is_reused=is_reused,
        progress=progress if row["action"] == "running" else None,
        metrics={name: value for name, value in payload.get("metrics", {}).items() if _is_finite(value)},
        steps=list(_read_steps(directory / "metrics.jsonl")),
        layout=_read(directory / "layout.json"),
        preflight=_read_preflight(directory / ledger.PREFLIGHT_FILE),
        curation=_read_curation(output) if kind == "curate" else None,
        evaluation=_read_evaluation(output, attempt) if attempt and kind == "eval" else None,
        verdict=read_verdict(output),
        heldout=list(_read_steps(directory / "heldout.jsonl")),
        selection=read_selection(directory),
        completions=_read_completions(directory / "completions.jsonl"),
        files=dict(payload.get("files", {})),
        provenance=dict(provenance),
        logs=str(attempt.logs(directory)) if attempt else None,
    )


def _output_kind(kind: str) -> str:
    try:
        return load_stage(kind, kind).output
    except UserError:
        return "dataset"  # a stage that another version had


def _set_fields(source: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not the default."""
    fields = (ModelSource if "model" in source else DataSource).model_fields
    return {name: value for name, value in source.items() if name not in fields or value != fields[name].default}


def _seconds_of(moment: object) -> float | None:
    try:
        return datetime.fromisoformat(str(moment)).timestamp() if moment else None
    except ValueError:
        return None


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- files -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None where there is none."""
    try:
        found = disk.read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a JSONL file, but for lines that hold none, such as one that is being written."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    found = json.loads(line)
                except ValueError:
                    continue
                if isinstance(found, dict):
                    yield found
    except OSError:
        return


def _read_steps(path: Path) -> Iterator[dict[str, float]]:
    for line in read_lines(path):
        if _is_finite(line.get("step")):
            yield {name: float(value) for name, value in line.items() if _is_finite(value)}


def shorten(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The text, or its beginning and how much more there is."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions, ascending and evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(place * (count - 1) / (most - 1)) for place in range(most)})


def _messages(messages: object) -> list[dict[str, str]]:
    """Messages as a role and a text; a call of a tool is its JSON."""
    found = []
    for message in messages if isinstance(messages, list) else []:
        if isinstance(message, dict):
            called = json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""
            content = "\n".join(filter(None, (str(message.get("content") or ""), called)))
            found.append({"role": str(message.get("role", "")), "content": shorten(content)})
    return found


def _read_preflight(path: Path) -> dict[str, Any] | None:
    found = _read(path)
    if found is None or found.keys() >= PREFLIGHT_FIGURES:
        return found
    return {"summary": found.get("summary", [])}


# --- curation --------------------------------------------------------------------------------------------------------


def _read_curation(output: Path) -> Curation | None:
    report = _read(output / "report.json")
    if report is None:
        return None
    shown: dict[tuple[str, str], int] = {}
    dropped = []
    for line in read_lines(output / "dropped.jsonl"):
        key = str(line.get("step")), str(line.get("reason"))
        shown[key] = shown.get(key, 0) + 1
        if shown[key] <= MAX_DROPPED:
            told = {name: str(line.get(name) or "") for name in ("origin", "step", "reason", "detail", "match")}
            told["detail"] = told["detail"].removeprefix(f"{told['origin']}: ")  # nothing is to be said twice
            told["reason"] = told["reason"].removeprefix(f"{told['step']}: ")
            dropped.append(Dropped(**told, text=shorten(_row_text(line.get("row")), 600)))
    try:
        steps = [
            {
                **{name: step[name] for name in ("step", "rows_out", "dropped", "changed", "settings")},
                "reasons": {reason.removeprefix(f"{step['step']}: "): count for reason, count in step["reasons"].items()},
            }
            for step in report["steps"]
        ]
        order = {step["step"]: place for place, step in enumerate(steps)}
        dropped.sort(key=lambda row: (order.get(row.step, len(order)), row.reason))
        return Curation(report["num_rows_in"], report["num_rows_out"], steps, dropped)
    except (KeyError, TypeError, AttributeError):
        return None


def _row_text(row: object) -> str:
    if not isinstance(row, dict):
        return ""
    if messages := _messages(row.get("messages")):
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return json.dumps({name: value for name, value in row.items() if name != "origin"}, ensure_ascii=False)


# --- evaluation ------------------------------------------------------------------------------------------------------


def _read_evaluation(output: Path, attempt: ledger.Attempt) -> Evaluation | None:
    table = _read(output / "table.json")
    if table is None:
        return None
    answered: dict[int, list[dict[str, Any]]] = {}
    duels: dict[tuple[int, str], dict[str, Any]] = {}
    for line in read_rows(output):
        if line["measure"] == "answer":
            answered.setdefault(line["row"], []).append(line)
        elif line["measure"] == "duel":
            duels[line["row"], line["policy"]] = line
    numbers = sorted(answered)
    chosen = [numbers[place] for place in _evenly(len(numbers), MAX_SAMPLES)]
    prompts = _read_prompts(attempt, set(chosen)) if chosen else {}
    samples = [_sample(row, prompts.get(row), answered[row], duels) for row in chosen]
    rows = [(name, count, [read_cell(cell) for cell in cells]) for name, count, *cells in table["rows"]]
    return Evaluation(table["columns"][2:], rows, table["notes"], samples, len(numbers))


def read_rows(output: Path) -> Iterator[dict[str, Any]]:
    """The results by row in the directory of an evaluation's report; nothing where they are gone or damaged."""
    try:
        yield from read_results(output)
    except (OSError, ValueError):
        return


def read_cell(text: str) -> Cell:
    """What a cell of an evaluation's table says, as numbers where it is one that `eval` wrote."""
    found = next((found for cell in CELLS if (found := re.fullmatch(cell, text))), None)
    if found is None:
        return Cell(text)
    numbers = {name: float(number) for name, number in found.groupdict().items() if number and name != "p"}
    return Cell(text, **numbers, p=found.groupdict().get("p") or "")


def _sample(
    row: int, prompt: list[dict[str, str]] | None, lines: Sequence[Mapping[str, Any]], duels: Mapping[tuple[int, str], Mapping[str, Any]]
) -> Sample:
    by_policy: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_policy.setdefault(line["policy"], []).append(line)
    checks = [check for line in next(iter(by_policy.values())) for check in line["checks"]]
    answers = [
        Answer(policy, shorten(_say(found)), _passes(found), duel.get("outcome"), tuple(map(shorten, _words(duel))))
        for policy, found in by_policy.items()
        for duel in [duels.get((row, policy), {})]
    ]
    return Sample(row, prompt, [_show_check(check) for check in dict.fromkeys(checks)], answers)


def _say(turns: Sequence[Mapping[str, Any]]) -> str:
    """The answers of a policy to one row; where it has several, each under its number."""
    if len(turns) == 1:
        return str(turns[0]["answer"])
    return "\n\n".join(f"[{turn['turn']}]\n{turn['answer']}" for turn in turns)


def _words(duel: Mapping[str, Any]) -> Iterator[str]:
    """What the judge said of a duel, each time with the answers in other places, or the two rewards."""
    for place, reply in zip(("first", "second"), duel.get("replies", ()), strict=False):
        yield f"[with this answer {place}] {reply}"
    if rewards := duel.get("rewards"):
        yield f"rewards: {rewards[0]:.4g} against {rewards[1]:.4g}"


def _passes(turns: Sequence[Mapping[str, Any]]) -> bool | None:
    verdicts = [verdict for turn in turns for verdict in turn["verdicts"]]
    return all(verdicts) if verdicts else None


def _show_check(check: str) -> str:
    try:
        read = json.loads(check)
        kind = read.pop("kind")
        if kind == "instruction":
            kind = read.pop("id")  # says it all
        given = (f"{name} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}" for name, value in read.items())
        return ": ".join(filter(None, (str(kind), ", ".join(given))))
    except (ValueError, AttributeError, KeyError):
        return check


def _read_prompts(attempt: ledger.Attempt, wanted: set[int]) -> dict[int, list[dict[str, str]]]:
    """What the rows of an evaluation ask, by their number; nothing where one of its data sets is not what it was."""
    from posttrain.data.rows import Text, asked_messages
    from posttrain.data.source import open_source

    hashes = disk.HashCache(Path(attempt.root) / ".hashes.json")
    found: dict[int, list[dict[str, str]]] = {}
    number = 0
    try:
        for entry in attempt.inputs["data"]:
            source = read_source(entry["name"], entry["source"])
            assert isinstance(source, DataSource)
            if not _is_unchanged(entry, source, hashes):
                return {}
            for row in open_source(source, entry["name"]).all_rows():
                if number in wanted and not isinstance(row, Text):
                    found[number] = _messages(asked_messages(row))
                number += 1
    except (UserError, OSError):
        return {}
    return found


def _is_unchanged(entry: Mapping[str, Any], source: DataSource, hashes: disk.HashCache) -> bool:
    """Whether a data set is still the one that was recorded as an input. Raises `UserError` where it is gone."""
    if entry["id"] == entry["fingerprint"]:
        return artifact.fingerprint_source(source, entry["name"], hashes) == str(entry["fingerprint"])
    finished = artifact.read_artifact(Path(source.paths[0]).parent.parent)
    return finished is not None and finished.id == entry["id"]


# --- completions -----------------------------------------------------------------------------------------------------


def _read_completions(path: Path) -> list[Completions]:
    """Of steps evenly spread, the first prompt with its best and its worst answer."""
    asked: dict[int, tuple[Any, list[dict[str, Any]]]] = {}
    for line in read_lines(path):
        if isinstance(line.get("step"), int) and _is_finite(line.get("reward")):
            key = line.get("origin"), line.get("prompt")
            first, lines = asked.setdefault(line["step"], (key, []))
            if key == first:
                lines.append(line)
    found = []
    steps = sorted(asked)
    for step in [steps[place] for place in _evenly(len(steps), MAX_SAMPLED_STEPS)]:
        (_, prompt), lines = asked[step]
        by_reward = sorted(lines, key=lambda line: -line["reward"])
        best, worst = _completion(by_reward[0]), _completion(by_reward[-1])
        found.append(Completions(step, _messages(prompt), best, worst, len(lines)))
    return found


def _completion(line: Mapping[str, Any]) -> Completion:
    rewards = {str(name): value for name, value in line.get("rewards", {}).items() if _is_finite(value)}
    return Completion(shorten(str(line.get("completion", ""))), line["reward"], rewards, line.get("kl"), line.get("num_tokens"))
