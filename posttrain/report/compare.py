"""Comparison: several runs beside each other, each held against the first: settings that differ, what was measured, what it cost.

Where two runs measured on the same rows, the difference is paired by row and has an interval (`posttrain.metrics.measured`);
where they did not, the values stand beside each other and no difference is claimed. What is the very same build in all runs is
named, and not held against itself.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import artifact
from posttrain.error import UserError
from posttrain.metrics.measured import Measured, difference_of, measure_results
from posttrain.report.page import flatten, show_duration
from posttrain.report.read import RunReport, StageReport, read_rows

NOT_LEARNED = ("tokens_per_s", "trained_tokens_per_s", "step_time_s", "checkpoint_bytes", "checkpoint_held_s")
NO_DATA = "other data"
NO_ROWS = "no row in common"
OTHER_TOKENS = "other tokens"
"""Why values are not compared: of other data, of none of the same rows, or of the same row as another number of tokens."""


@dataclass(frozen=True)
class Result:
    """One metric of one policy in one run."""

    value: float | None
    difference: float | None = None
    """From the first run, on the rows that both have."""
    low: float | None = None
    """Of the interval of the difference."""
    high: float | None = None
    why: str = ""
    """Why there is no difference, where both have a value."""

    @property
    def text(self) -> str:
        """As a table for the terminal says it."""
        if self.value is None:
            return "-"
        if self.difference is None:
            return f"{self.value:.3f}{f' ({self.why})' if self.why else ''}"
        spread = "" if self.low is None or self.high is None else f", {self.low:+.3f} to {self.high:+.3f}"
        return f"{self.value:.3f} ({self.difference:+.3f}{spread})"


@dataclass(frozen=True)
class Row:
    """One metric of one policy in all runs."""

    stage: str
    policy: str
    metric: str
    num_rows: int
    """Rows that the first run has of it."""
    results: list[Result]


@dataclass(frozen=True)
class Comparison:
    """Several runs, the first being what the others are compared with."""

    names: list[str]
    runs: list[RunReport]
    settings: list[tuple[str, list[Any]]]
    """Dotted name, and the value of each run, None where it has none; only where they differ."""
    rows: list[Row]
    """What evaluations measured."""
    metrics: list[tuple[str, list[float | None]]]
    """`<stage>.<metric>` of the stages that trained or curated, and the value of each run; only where they differ."""
    confidence: float | None
    """Of the intervals; None without an evaluation."""
    same: list[tuple[str, str]]
    """What is one build in all runs, so that nothing of it can differ: a stage, or `<stage>: <policy>` of an evaluation, and why."""

    @property
    def stages(self) -> list[str]:
        """Stages that logged steps in any of the runs, and are not one build in all of them."""
        same = {name for name, _ in self.same}
        return list(dict.fromkeys(stage.name for run in self.runs for stage in run.stages if stage.steps and stage.name not in same))

    def steps(self, name: str) -> dict[str, list[dict[str, float]]]:
        """What the stage of that name logged, by run."""
        found = {label: _stage(run, name) for label, run in zip(self.names, self.runs, strict=True)}
        return {label: stage.steps for label, stage in found.items() if stage and stage.steps}

    def tables(self) -> list[tuple[str, Sequence[str], list[list[str]]]]:
        """Title, columns and rows of what a terminal shows."""
        columns = ("", *self.names)
        costs = [["wall time", *(show_duration(run.seconds) for run in self.runs)]]
        costs.append(["process-hours", *(f"{run.process_hours:.3g}" for run in self.runs)])
        results = [
            [f"{row.stage}: {row.policy}: {row.metric}", str(row.num_rows), *(each.text for each in row.results)] for row in self.rows
        ]
        tables: list[tuple[str, Sequence[str], list[list[str]]]] = [
            ("settings that differ", columns, [[name, *map(_plain, values)] for name, values in self.settings]),
            ("measured", ("", "rows", *self.names), results),
            ("metrics of stages that differ", columns, [[name, *(_number(value) for value in values)] for name, values in self.metrics]),
            ("the same in all", ("", "why"), [list(each) for each in self.same]),
            ("cost", columns, costs),
        ]
        return [(title, header, rows) for title, header, rows in tables if rows]

    def as_json(self) -> dict[str, Any]:
        """The same for other programs."""
        return {
            "runs": [
                {"name": name, "directory": run.directory, "seconds": run.seconds, "process_hours": run.process_hours}
                for name, run in zip(self.names, self.runs, strict=True)
            ],
            "settings": {name: dict(zip(self.names, values, strict=True)) for name, values in self.settings},
            "measured": [
                {
                    "stage": row.stage,
                    "policy": row.policy,
                    "metric": row.metric,
                    "num_rows": row.num_rows,
                    "runs": {
                        name: {"value": each.value, "difference": each.difference, "low": each.low, "high": each.high, "why": each.why}
                        for name, each in zip(self.names, row.results, strict=True)
                    },
                }
                for row in self.rows
            ],
            "metrics": {name: dict(zip(self.names, values, strict=True)) for name, values in self.metrics},
            "confidence": self.confidence,
            "same": dict(self.same),
        }


def compare_runs(runs: Sequence[RunReport]) -> Comparison:
    """The runs beside each other. Raises `UserError` where one is given twice."""
    directories = [str(Path(run.directory).resolve()) for run in runs]
    for place, directory in enumerate(directories):
        if directory in directories[:place]:
            raise UserError(f"{runs[place].name}: is given twice; name each run once")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(Path(run.directory)) for run in runs]
    evaluated = [stage for run in runs for stage in run.stages if stage.evaluation]
    same = _same(runs)
    return Comparison(
        names,
        list(runs),
        _differing([_settings_of(run) for run in runs]),
        _measured(runs, {name for name, _ in same}),
        _metrics(runs),
        evaluated[0].config["confidence"] if evaluated else None,
        same,
    )


def _stage(run: RunReport, name: str) -> StageReport | None:
    return next((stage for stage in run.stages if stage.name == name), None)


def _settings_of(run: RunReport) -> dict[str, dict[str, Any]]:
    """By the source or stage that they are of, whose own name stands for what it is, settings by their dotted names."""
    found: dict[str, dict[str, Any]] = {}
    for source in run.sources:
        at = f"sources.{source.name}"
        found[at] = {at: source.fingerprint[:12], **flatten(source.source, f"{at}.")}
    for stage in run.stages:
        at = f"stages.{stage.name}"
        found[at] = {at: stage.kind, **flatten({"inputs": stage.reads, **stage.config, "num_processes": stage.num_processes}, f"{at}.")}
    if told := next((stage.provenance for stage in run.stages if stage.provenance), None):
        found["environment"] = {name: told.get(name) for name in ("commit", "python")} | flatten(told.get("versions", {}), "versions.")
    return found


def _differing(settings: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, list[Any]]]:
    """What differs among the runs that have a source or stage; where one has not, that alone is said of it."""
    found = []
    for owner in dict.fromkeys(owner for each in settings for owner in each):
        having = [each.get(owner) for each in settings]
        for name in dict.fromkeys(name for each in having if each is not None for name in each):
            told = [each.get(name) for each in having if each is not None]
            if any(value != told[0] for value in told) or (name == owner and None in having):
                found.append((name, [None if each is None else each.get(name) for each in having]))
    return found


def _metrics(runs: Sequence[RunReport]) -> list[tuple[str, list[float | None]]]:
    names = dict.fromkeys(
        (stage.name, metric)
        for run in runs
        for stage in run.stages
        if not stage.evaluation
        for metric in stage.metrics
        if metric not in NOT_LEARNED
    )
    found = []
    for name, metric in names:
        stages = [_stage(run, name) for run in runs]
        values = [stage.metrics.get(metric) if stage else None for stage in stages]
        if any(value != values[0] for value in values):
            found.append((f"{name}.{metric}", values))
    return found


def _same(runs: Sequence[RunReport]) -> list[tuple[str, str]]:
    """What is one build in all runs, and why it is: whole stages, and policies of which evaluations cannot but measure the same."""
    found = []
    for first in runs[0].stages:
        having = [stage for run in runs if (stage := _stage(run, first.name))]
        if len(having) < len(runs):
            continue
        if first.id is not None and all(stage.id == first.id for stage in having):
            found.append((first.name, f"one build, {first.id}"))
        elif first.evaluation and all(stage.evaluation for stage in having):
            for policy in first.evaluation.policies:
                if all(_decides(stage, policy) == _decides(first, policy) for stage in having):
                    found.append((f"{first.name}: {policy}", "one policy, measured by the same settings on the same data"))
    return found


def _decides(stage: StageReport, policy: str) -> list[Any]:
    """All that decides what an evaluation finds of a policy.

    It is how it measures; that policy and the first one, with which duels are held; and what else it reads: data, reward models.
    """
    beside = [name for role, names in stage.reads.items() if role != "policies" for name in names]
    return [stage.identity, stage.version, *(stage.inputs.get(name) for name in (policy, stage.reads["policies"][0], *beside))]


def _measured(runs: Sequence[RunReport], same: Collection[str]) -> list[Row]:
    """Of each evaluation that the first run has too, each policy and metric, but for what is `same`."""
    rows: list[Row] = []
    for first in runs[0].stages:
        if not first.evaluation or first.name in same:
            continue
        stages = [_stage(run, first.name) for run in runs]
        measured: list[dict[str, dict[str, Measured]]] = []
        for run, stage in zip(runs, stages, strict=True):
            by_policy: dict[str, list[dict[str, Any]]] = {}
            if stage and stage.evaluation:
                for line in read_rows(Path(run.directory) / stage.name / artifact.OUTPUT):
                    by_policy.setdefault(str(line.get("policy")), []).append(line)
            measured.append({policy: measure_results(results) for policy, results in by_policy.items()})
        for policy in dict.fromkeys(policy for each in measured for policy in each if f"{first.name}: {policy}" not in same):
            for metric in dict.fromkeys(metric for each in measured for metric in each.get(policy, {})):
                found = [each.get(policy, {}).get(metric) for each in measured]
                results = [_result(found[0], got, first, stage) for got, stage in zip(found, stages, strict=True)]
                base = found[0]
                rows.append(
                    Row(first.name, policy, metric, len(base.scores) if base else 0, [Result(base.value if base else None), *results[1:]])
                )
    return rows


def _result(base: Measured | None, got: Measured | None, first: StageReport, stage: StageReport | None) -> Result:
    if got is None or base is None or stage is None:
        return Result(got.value if got else None)
    if _data_of(first) != _data_of(stage):
        return Result(got.value, why=NO_DATA)
    if not base.scores.keys() & got.scores.keys():
        return Result(got.value, why=NO_ROWS)
    difference = difference_of(base, got, confidence=first.config["confidence"], seed=first.config["seed"])
    if difference is None:
        return Result(got.value, why=OTHER_TOKENS)
    return Result(got.value, difference.difference, difference.low, difference.high)


def _data_of(stage: StageReport) -> list[str]:
    """What its data sets hold, in order: rows are known by their place in them."""
    return [stage.inputs[name]["fingerprint"] for name in stage.reads.get("data", ())]


def _plain(value: object) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
