"""The card of an exported model: how it came about, what was measured of it, and what is not known, as the Hub reads such cards.

All of it is read from the records of the run. No path, host or command line of this machine gets into it, and no row of the data.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from posttrain.config import DataSource, ModelSource, is_hub_id
from posttrain.inspection import visible
from posttrain.report.read import Evaluation, RunReport, StageReport
from posttrain.verdict import BRACKETS, COLUMNS, Judged

TEMPLATE = Path(__file__).parent / "card.md.j2"
UNKNOWN = "unknown"
TASKS = {"policy": "text-generation", "reward_model": "text-classification"}
DATA_FIGURES = {
    "num_rows_read": "rows read",
    "num_rows": "rows trained on",
    "num_tokens": "tokens",
    "num_trained_tokens": "of them trained",
    "num_steps": "steps",
}
"""What of the preflight is told, and how it is called."""
LAST_FIGURES = ("mean_loss", "loss", "rewards/accuracies", "rewards/margins", "kl")
"""What of a stage's own last metrics is told, where it has them."""


@dataclass(frozen=True)
class Check:
    """Something that was compared between what a stage published and what was exported."""

    what: str
    found: str
    is_same: bool | None
    """None where it was not checked."""


@dataclass(frozen=True)
class Origin:
    """A source that the chain reads."""

    name: str
    kind: str
    where: str
    """A Hub id with its commit, or the names of files."""
    hub_ids: list[str]
    license: str
    settings: dict[str, Any]
    fingerprint: str


@dataclass(frozen=True)
class Measure:
    """One metric of the exported policy, in one evaluation."""

    evaluation: str
    data: str
    metric: str
    num_rows: str
    value: float
    text: str
    """As the evaluation's table says it, with its interval, or its difference from the baseline and what is said of that."""
    baseline: str
    """Name of the policy that it is compared with; empty where it is that one."""
    baseline_text: str


def stages_above(run: RunReport, name: str) -> list[StageReport]:
    """A stage and all that it was made from, in the order of the run."""
    by_name = {stage.name: stage for stage in run.stages}
    found: set[str] = set()
    left = [name]
    while left:
        here = left.pop()
        if here in by_name and here not in found:
            found.add(here)
            left += [read for names in by_name[here].reads.values() for read in names]
    return [stage for stage in run.stages if stage.name in found]


def make_card(run: RunReport, name: str, sources: Mapping[str, ModelSource | DataSource], checks: Sequence[Check]) -> ModelCard:
    """The card of what stage `name` made, which is finished; `sources` are those of the pipeline file."""
    chain = stages_above(run, name)
    stage = next(stage for stage in chain if stage.name == name)
    read = list(dict.fromkeys(read for each in chain for names in each.reads.values() for read in names))
    origins = [_origin(source, sources[source], run) for source in read if source in sources]
    models, data = ([origin for origin in origins if origin.kind == kind] for kind in ("model", "data"))
    evaluations = list(_evaluations(run, stage))
    measures = [measure for by, found in evaluations for measure in _measures(by, found, name)]
    judged = list(_judged(run, name, [by for by, _ in evaluations]))
    results = [_result(stage, measure, sources) for measure in measures] + list(_own_results(stage))
    licenses = {origin.license for origin in models} - {UNKNOWN}
    bases = [hub_id for origin in models for hub_id in origin.hub_ids]
    metadata = ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases or None,
        datasets=[hub_id for origin in data for hub_id in origin.hub_ids] or None,
        license=licenses.pop() if len(licenses) == 1 else None,
        library_name="transformers",
        pipeline_tag=TASKS[stage.output],
        tags=["posttrain", *dict.fromkeys(each.kind for each in chain)],
        eval_results=results or None,
        model_name=f"{run.name}-{name}" if results else None,
    )
    card: ModelCard = ModelCard.from_template(
        metadata,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        run=run.name,
        stage=stage,
        chain=[_line(each) for each in chain],
        models=[_row(origin) for origin in models],
        data=[_row(origin) for origin in data],
        figures=[figures for each in chain if (figures := _data_figures(each))],
        measures=[_measure_row(measure) for measure in measures],
        notes=[(code(by.name), escape(visible(note))) for by, found in evaluations for note in found.notes],
        gate_columns=["stage", *COLUMNS],
        gates=[(code(by), *map(code, gate.cells)) for by, gate in judged],
        gate_note=BRACKETS,
        own=[(code(key), f"{value:.4g}") for key, value in stage.metrics.items() if key.startswith("heldout/")],
        limits=list(_limits(stage, chain, origins, measures, judged)),
        checks=[(check.what, {True: "same", False: "differs", None: "not checked"}[check.is_same], check.found) for check in checks],
        provenance=[(what, code(value)) for what, value in _provenance(run, stage)],
    )
    return card


def code(value: object) -> str:
    """A value as a code span of a table, in which nothing that it holds means anything to Markdown."""
    text = " ".join(visible(str(value)).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`" if text else ""


def _origin(name: str, source: ModelSource | DataSource, run: RunReport) -> Origin:
    fingerprint = next((found.fingerprint for found in run.sources if found.name == name), "")
    if isinstance(source, ModelSource):
        hub_ids = [source.model] if source.revision else []
        where = f"{source.model}@{source.revision}" if source.revision else Path(source.model).name
        return Origin(name, "model", where, hub_ids, source.license or _own_license(source) or UNKNOWN, {}, fingerprint)
    hub_ids = [entry.partition("@")[0] for entry in source.paths if is_hub_id(entry.partition("@")[0])]
    where = ", ".join(entry if is_hub_id(entry.partition("@")[0]) else Path(entry).name for entry in source.paths)
    settings = source.model_dump(mode="json", exclude={"data", "license"}, exclude_defaults=True)
    return Origin(name, "data", where, hub_ids, source.license or UNKNOWN, settings, fingerprint)


def _own_license(source: ModelSource) -> str | None:
    """What the card of a model on this disk says."""
    import yaml

    path = Path(source.model) / "README.md"
    if source.revision is not None or not path.is_file():
        return None
    try:
        said = ModelCard.load(path, ignore_metadata_errors=True).data.license
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return None  # it is no card
    return said if isinstance(said, str) else None


def _evaluations(run: RunReport, stage: StageReport) -> Iterator[tuple[StageReport, Evaluation]]:
    """The finished evaluations of the run that read this very build."""
    for each in run.stages:
        found = each.evaluation
        if found is not None and each.is_finished and stage.name in found.policies and each.inputs[stage.name]["id"] == stage.id:
            yield each, found


def _measures(by: StageReport, found: Evaluation, name: str) -> Iterator[Measure]:
    """What an evaluation measured of the policy of that name."""
    place = found.policies.index(name)
    data = ", ".join(by.reads.get("data", []))
    for metric, num_rows, cells in found.rows:
        value = by.metrics.get(f"{name}.{metric}", cells[place].value)
        if value is not None:
            baseline = (found.policies[0], cells[0].text) if place else ("", "")
            of = metric.rpartition(".")[0] if metric.startswith("tasks.") else data
            yield Measure(by.name, of, metric, num_rows, value, cells[place].text, *baseline)


def _judged(run: RunReport, name: str, evaluations: Sequence[StageReport]) -> Iterator[tuple[str, Judged]]:
    """What gates found of the policy of that name, each with its stage, where all that they read of it are these evaluations."""
    builds = {each.name: each.id for each in evaluations}
    about = {each.name for each in run.stages if each.evaluation is not None and name in each.evaluation.policies}
    for each in run.stages:
        read = about.intersection(each.inputs)
        if each.verdict is None or not each.is_finished or not read:
            continue
        if all(each.inputs[report]["id"] == builds.get(report) for report in read):
            yield from ((each.name, gate) for gate in each.verdict.gates if gate.policy == name)


def _result(stage: StageReport, measure: Measure, sources: Mapping[str, ModelSource | DataSource]) -> EvalResult:
    read = [sources[name] for name in measure.data.split(", ") if name in sources]
    hub_ids = [entry.partition("@")[0] for source in read if isinstance(source, DataSource) for entry in source.paths]
    on_hub = len(hub_ids) == 1 and is_hub_id(hub_ids[0])
    return EvalResult(
        task_type=TASKS[stage.output],
        dataset_type=hub_ids[0] if on_hub else "local",
        dataset_name=measure.data,
        metric_type=re.sub(r"\W+", "_", measure.metric),
        metric_name=measure.metric,
        metric_value=measure.value,
    )


def _own_results(stage: StageReport) -> Iterator[EvalResult]:
    """What a stage measured itself on held-out rows, as one that makes a reward model does."""
    for key, value in stage.metrics.items():
        if key.startswith("heldout/"):
            name = key.removeprefix("heldout/")
            yield EvalResult(
                task_type=TASKS[stage.output],
                dataset_type="local",
                dataset_name=", ".join(stage.reads.get("heldout", ["heldout"])),
                metric_type=re.sub(r"\W+", "_", name),
                metric_name=name,
                metric_value=value,
            )


def _line(stage: StageReport) -> tuple[str, ...]:
    settings = ", ".join(f"{key}={value}" for key, value in stage.identity.items() if key != "kind")
    metrics = [f"{key} {stage.metrics[key]:.4g}" for key in LAST_FIGURES if key in stage.metrics]
    reads = ", ".join(name for names in stage.reads.values() for name in names)
    commit = str(stage.provenance.get("commit") or UNKNOWN)[:12]
    return code(stage.name), stage.kind, code(reads), code(settings), ", ".join(metrics), code(commit)


def _row(origin: Origin) -> tuple[str, ...]:
    settings = ", ".join(f"{key}={value}" for key, value in origin.settings.items())
    return code(origin.name), code(origin.where), code(origin.license), code(settings), code(origin.fingerprint[:16])


def _data_figures(stage: StageReport) -> tuple[str, ...]:
    found = stage.preflight or {}
    if "num_rows" not in found:
        return ()
    figures = [f"{found[key]:,}" if key in found else "" for key in DATA_FIGURES]
    faults = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in found.get("counts", {}).items() if count)
    return code(stage.name), *figures, faults or "none"


def _measure_row(measure: Measure) -> tuple[str, ...]:
    baseline = f"{measure.baseline}: {measure.baseline_text}" if measure.baseline else ""
    return code(measure.evaluation), code(measure.data), code(measure.metric), measure.num_rows, code(measure.text), code(baseline)


def _limits(
    stage: StageReport,
    chain: Sequence[StageReport],
    origins: Sequence[Origin],
    measures: Sequence[Measure],
    judged: Sequence[tuple[str, Judged]],
) -> Iterator[str]:
    measured = measures or any(key.startswith("heldout/") for key in stage.metrics)
    if not measured:
        yield "Nothing was measured of this model: no evaluation of its run has read it."
    else:
        yield "What was measured is in the table above, on those rows; nothing else was: no safety, bias or truthfulness beyond it."
        yield "Intervals tell how much the figures depend on which rows were drawn, and not on the seed of training."
    for by, gate in judged:
        if not gate.passed:
            yield f"A gate that it was held against failed, in {code(by)}: {code(gate.words)}."
    lengths = [f"{each.config['max_length']:,} in {each.name}" for each in chain if "max_length" in each.config]
    if lengths:
        yield f"Longest samples that were trained or scored, in tokens: {', '.join(lengths)}."
    if unknown := [origin.name for origin in origins if origin.license == UNKNOWN]:
        yield f"Licences are not known here of: {', '.join(map(code, unknown))}. Find them out before you pass the model on."
    if stage.provenance.get("dirty"):
        yield "The code that made it had changes that no commit holds."


def _provenance(run: RunReport, stage: StageReport) -> Iterator[tuple[str, object]]:
    said = stage.provenance
    yield "run and stage", f"{run.name}/{stage.name}"
    yield "build", stage.id
    yield "fingerprint of its recipe", stage.fingerprint
    yield "commit of posttrain", f"{said.get('commit') or UNKNOWN}{' with changes' if said.get('dirty') else ''}"
    yield "posttrain", said.get("posttrain", UNKNOWN)
    yield "python", said.get("python", UNKNOWN)
    yield from said.get("versions", {}).items()
    yield "processes", stage.num_processes
    yield "finished", said.get("finished", UNKNOWN)
