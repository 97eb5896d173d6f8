"""The runner, read top to bottom: Node -> plan -> decide -> execute -> commands.

    python pipeline.py plan configs/quickstart.yaml       what would run, and why
    python pipeline.py run configs/quickstart.yaml        run what is not finished; safe to repeat

Imports no torch.
"""

import errno
import functools
import json
import math
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from posttrain import artifact, disk, footprint, ledger, planner, smoke
from posttrain.checkpoint import last_complete
from posttrain.config import (
    DataSource,
    HostsLauncher,
    KubernetesLauncher,
    LauncherConfig,
    LocalLauncher,
    ModelSource,
    Nodes,
    PipelineConfig,
    SlurmLauncher,
    fields_help,
    identity,
    nearest,
    read_launcher,
    read_pipeline,
    validate,
)
from posttrain.error import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_GATE,
    EXIT_PREEMPTED,
    EXIT_USER,
    STOP_SIGNALS,
    GateFailed,
    Preempted,
    StageFailed,
    UserError,
    heed_signals,
)
from posttrain.recipe import TrainingConfig
from posttrain.selection import read_selection
from posttrain.stage import ArtifactKind, Input, Stage, StageConfig, load_stage
from posttrain.verdict import Verdict, read_verdict

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.doctor import Finding
    from posttrain.launch import Launch
    from posttrain.launch.jobs import Fate, Job
    from posttrain.launch.queue import Order

Action = Literal["run", "resume", "skip", "reuse", "rebuild", "drift", "damaged", "running", "blocked"]
WORK: tuple[Action, ...] = ("run", "resume", "rebuild")
ANEW: tuple[Action, ...] = ("run", "rebuild")
STARTED = time.monotonic()
PLAIN_LINE_EVERY_S = 10.0
NUM_AHEAD = 2
"""Later stages whose data are prepared while a stage trains."""
NOTABLE_DRIFT = 0.05
"""Difference of logits, in standard deviations of all of them, from which on a published model is said not to be the trained one."""


# --- Node ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pinned:
    """A source of the pipeline file, pinned to what it holds."""

    name: str
    source: ModelSource | DataSource
    fingerprint: str


@dataclass(frozen=True)
class Node:
    """A stage of the pipeline file with its checked config, wired to what it reads."""

    name: str
    stage: Stage[Any]
    config: StageConfig
    inputs: Mapping[str, tuple["Node | Pinned", ...]]
    launcher: LauncherConfig
    """That of the pipeline, with what the stage wants otherwise."""
    num_processes: int
    identity: Mapping[str, Any]
    """Kind of the stage, and what of its config changes the bytes of its output."""
    fingerprint: str
    run: str
    root: Path
    directory: Path
    built_on: frozenset[str]
    """The names of all that it reads, directly or through other stages."""
    judged: Sequence[str] = ()
    """Policies that nothing builds on where its verdict is that they failed."""
    gates: Sequence["Node"] = ()
    """Stages above whose verdict may keep it from starting: they judge a policy that it builds on."""

    @property
    def reads(self) -> list["Node | Pinned"]:
        """All inputs, of all roles."""
        return [entry for entries in self.inputs.values() for entry in entries]

    @property
    def waits_for(self) -> list["Node | Pinned"]:
        """What has to be finished before it starts."""
        return [*self.reads, *self.gates]


@dataclass(frozen=True)
class Decision:
    """What is to be done about a node, and why."""

    action: Action
    why: str
    build: str | None = None
    """Id of the finished build that later stages would read; None where it is yet to be made."""
    found: artifact.Artifact | None = field(default=None, repr=False)
    """The build of another run, to be reused."""


# --- plan ------------------------------------------------------------------------------------------------------------


def plan(config: PipelineConfig, root: Path) -> list[Node]:
    """The stages of a pipeline, wired and fingerprinted, in order. Reads nothing but the hashes of its sources."""
    if root.exists() and not root.is_dir():
        raise UserError(f"--root {root}: is a file; give the directory of all runs")
    hashes = disk.HashCache(root / ".hashes.json")
    known: dict[str, Node | Pinned] = {}
    for name, source in config.sources.items():
        known[name] = Pinned(name, source, artifact.fingerprint_source(source, f"sources.{name}", hashes))
    hashes.save()
    nodes: list[Node] = []
    judges: list[Node] = []
    for name, raw in config.stages.items():
        known[name] = node = _wire(name, dict(raw), config, known, judges, root)
        nodes.append(node)
        if node.judged:
            judges.append(node)
    return nodes


def _wire(
    name: str, raw: dict[str, Any], config: PipelineConfig, known: Mapping[str, Node | Pinned], judges: Sequence[Node], root: Path
) -> Node:
    at = f"stages.{name}"
    stage = load_stage(raw.get("kind", name), f"{at}.kind" if "kind" in raw else at)
    raw.pop("kind", None)
    wires = raw.pop("inputs", {})
    settings = validate(stage.config, raw, at)
    inputs = _read_wires(f"{at}.inputs", wires, stage, config, known)
    settings.check_inputs(inputs, at)
    launcher = _launcher_of(settings, config.launcher, at)
    num_processes = _num_processes(settings, launcher, at)
    settings.check(num_processes, at)
    identical = {"kind": stage.kind, **identity(settings, at)}
    recipe = {
        "version": stage.version,
        "config": identical,
        "inputs": {role: [entry.fingerprint for entry in entries] for role, entries in inputs.items()},
    }
    fingerprint = disk.hash_json(recipe)
    directory = root / config.run / name
    judged = stage.judges(settings, _policies_of(inputs), at) if stage.judges else ()
    reads = [entry for entries in inputs.values() for entry in entries]
    built_on = frozenset(entry.name for entry in reads).union(*(entry.built_on for entry in reads if isinstance(entry, Node)))
    gates = tuple(gate for gate in judges if built_on.intersection(gate.judged))
    return Node(
        name,
        stage,
        settings,
        inputs,
        launcher,
        num_processes,
        identical,
        fingerprint,
        config.run,
        root,
        directory,
        built_on,
        judged,
        gates,
    )


def _policies_of(inputs: Mapping[str, Sequence[Node | Pinned]]) -> dict[str, list[str]]:
    """The policies that each report among the inputs is about."""
    reports = [entry for entries in inputs.values() for entry in entries if isinstance(entry, Node) and entry.stage.output == "report"]
    return {report.name: [policy.name for policy in report.inputs["policies"]] for report in reports}


def _launcher_of(settings: StageConfig, launcher: LauncherConfig, at: str) -> LauncherConfig:
    if (kind := settings.launcher.get("kind", launcher.kind)) != launcher.kind:
        raise UserError(f"{at}.launcher.kind: is {kind!r}, and the pipeline's is {launcher.kind!r}; a stage changes other fields only")
    fields = launcher.model_dump(exclude_unset=True)
    return read_launcher(f"{at}.launcher", {**fields, **settings.launcher, "kind": launcher.kind})


def _num_processes(settings: StageConfig, launcher: LauncherConfig, at: str) -> int:
    if isinstance(launcher, Nodes | HostsLauncher) and settings.num_processes not in (None, launcher.num_processes):
        ranks = f"{launcher.num_processes // launcher.tasks_per_node} nodes with {launcher.tasks_per_node} each"
        raise UserError(f"{at}.num_processes: {settings.num_processes}, and its launcher says {ranks}; set {at}.launcher instead")
    return settings.num_processes or launcher.num_processes or num_devices()


def _read_wires(
    at: str, wires: object, stage: Stage[Any], config: PipelineConfig, known: Mapping[str, Node | Pinned]
) -> dict[str, tuple[Node | Pinned, ...]]:
    if not isinstance(wires, dict):
        needed = ", ".join(role for role, given in stage.inputs.items() if not given.optional)
        spare = ", ".join(role for role, given in stage.inputs.items() if given.optional)
        also = f"; {spare} may be left out" if spare else ""
        raise UserError(f"{at}: must map each of {needed} to a source or an earlier stage{also}")
    for role in wires:
        if role not in stage.inputs:
            raise UserError(f"{at}.{role}: {stage.kind} reads no such input; {nearest(str(role), list(stage.inputs))}")
    inputs = {}
    for role, wanted in stage.inputs.items():
        if role not in wires:
            if wanted.optional:
                continue
            raise UserError(f"{at}.{role}: missing; name a {wanted.kind}: {_candidates(wanted.kind, known)}")
        names = wires[role] if isinstance(wires[role], list) else [wires[role]]
        if not names or (len(names) > 1 and not wanted.many):
            raise UserError(f"{at}.{role}: takes {'at least one name' if wanted.many else 'exactly one name'}, got {wires[role]!r}")
        if len(set(map(str, names))) < len(names):
            raise UserError(f"{at}.{role}: {wires[role]!r} names an input twice; name it once")
        inputs[role] = tuple(_find(f"{at}.{role}", name, wanted.kind, config, known) for name in names)
    return inputs


def _find(at: str, name: object, kind: ArtifactKind, config: PipelineConfig, known: Mapping[str, Node | Pinned]) -> Node | Pinned:
    if not isinstance(name, str) or name not in known:
        if isinstance(name, str) and name in config.stages:
            raise UserError(f"{at}: {name!r} does not stand above; an input must be a source or an earlier stage")
        raise UserError(f"{at}: {name!r} is neither a source nor an earlier stage; {nearest(str(name), list(known))}")
    entry = known[name]
    if kind not in _kinds(entry):
        raise UserError(f"{at}: {name!r} is a {_kinds(entry)[0]}, not a {kind}; {_candidates(kind, known)} would fit")
    return entry


def _kinds(entry: Node | Pinned) -> list[ArtifactKind]:
    if isinstance(entry, Node):
        return [entry.stage.output]
    return ["dataset"] if isinstance(entry.source, DataSource) else ["policy", "reward_model"]


def _candidates(kind: ArtifactKind, known: Mapping[str, Node | Pinned]) -> str:
    return ", ".join(name for name, entry in known.items() if kind in _kinds(entry)) or "nothing above"


def num_devices() -> int:
    """GPUs that this process may use, without asking torch; 1 on a machine that has none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    return max(1, _num_gpus_here())


@functools.cache
def _num_gpus_here() -> int:
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


# --- decide ----------------------------------------------------------------------------------------------------------


def decide(
    node: Node,
    builds: Mapping[str, str | None],
    rebuild: Sequence[str] = (),
    list_finished: Callable[[Path], Mapping[str, list[artifact.Artifact]]] = ledger.list_finished,
) -> Decision:
    """What to do about a node, given the build of each of its inputs (None: yet to be made). Reads disk, writes nothing."""
    if holder := ledger.lease_holder(node.directory):
        return Decision("running", f"being built by {holder}")
    finished = artifact.read_artifact(node.directory)
    attempt = ledger.read_attempt(node.directory)
    pending = [entry.name for entry in node.reads if builds[entry.name] is None]
    wanted = {entry.name: {"id": builds[entry.name] or "", "fingerprint": entry.fingerprint} for entry in node.reads}
    if node.name in rebuild and (finished or attempt):
        return Decision("rebuild", "asked for")
    if finished:
        return _decide_finished(node, finished, pending, wanted)
    if not pending and (found := _find_finished(node, wanted, list_finished)):
        return Decision("reuse", f"finished as {found.directory}", found.id, found)
    if attempt is None:
        return Decision("run", "not started")
    state = _resumable(node.directory)
    if state is None and (fault := _published_fault(node.directory)):
        return Decision("damaged", fault)
    if state is None:
        return Decision("run", f"attempt {attempt.number} left nothing to resume")
    if changes := differences(node, attempt, attempt.input_builds):
        return Decision("drift", f"{changes}, but {state} is of the old config")
    if again := pending or _changed(attempt.input_builds, wanted):
        return Decision("rebuild", f"{', '.join(again)} was built again since {state}")
    return Decision("resume", f"from {state}")


def _decide_finished(node: Node, finished: artifact.Artifact, pending: list[str], wanted: dict[str, dict[str, str]]) -> Decision:
    if changes := differences(node, finished, finished.inputs):
        return Decision("drift", f"{changes}, but it finished {finished.finished}")
    if not finished.output.is_dir():
        return Decision("rebuild", "its output is gone")
    if pending:
        return Decision("rebuild", f"{', '.join(pending)} will be built")
    if again := _changed(finished.inputs, wanted):
        return Decision("rebuild", f"{', '.join(again)} was built again")
    if fault := next(artifact.faults(finished, None), None):
        return Decision("damaged", fault)
    return Decision("skip", f"finished {finished.finished}", finished.id)


def _find_finished(
    node: Node, wanted: dict[str, dict[str, str]], list_finished: Callable[[Path], Mapping[str, list[artifact.Artifact]]]
) -> artifact.Artifact | None:
    """A finished build of this very recipe from these very inputs, in another directory under the root."""
    found = [build for build in list_finished(node.root).get(node.fingerprint, []) if build.directory != node.directory]
    return next((build for build in found if build.inputs == wanted and not any(artifact.faults(build, None))), None)


def hold_back(node: Node, decision: Decision, verdicts: Mapping[str, Verdict]) -> Decision:
    """The decision, or none to start what builds on a policy that failed a gate, given the verdicts that there are."""
    if not node.gates or decision.action not in (*WORK, "reuse"):
        return decision
    for gate in node.gates:
        if gate.name in verdicts and node.built_on.intersection(verdicts[gate.name].stopped):
            return Decision("blocked", f"gate {gate.name} failed: {verdicts[gate.name].fault}")
    return decision


def _verdict_of(node: Node, decision: Decision) -> dict[str, Verdict]:
    """By its name, the verdict of a node that has a finished one."""
    if node.stage.output != "verdict" or decision.build is None:
        return {}
    found = read_verdict(decision.found.output if decision.found else node.directory / artifact.OUTPUT)
    return {node.name: found} if found else {}


def _changed(builds: Mapping[str, Mapping[str, str]], wanted: Mapping[str, Mapping[str, str]]) -> list[str]:
    return [name for name in wanted if builds[name] != wanted[name]]


def differences(node: Node, recorded: artifact.Artifact | ledger.Attempt, builds: Mapping[str, Mapping[str, str]]) -> str:
    """Field by field, what the user changed since a recipe and the builds it read were recorded; empty where nothing did, or
    only in stages above, which tell by themselves."""
    defaults = {name: info.get_default(call_default_factory=True) for name, info in type(node.config).model_fields.items()}
    changes = []
    for name in sorted(recorded.identity.keys() | node.identity.keys()):
        before, after = recorded.identity.get(name, defaults.get(name)), node.identity.get(name, defaults.get(name))
        if before != after:
            changes.append(f"stages.{node.name}.{name}: {_plain(before)} -> {_plain(after)}")
    if recorded.version != node.stage.version:
        changes.append(f"stages.{node.name}: stage {node.stage.kind} went from version {recorded.version} to {node.stage.version}")
    names = list(dict.fromkeys(entry.name for entry in node.reads))
    if names != list(builds):
        changes.append(f"stages.{node.name}.inputs: {', '.join(builds)} -> {', '.join(names)}")
        return "; ".join(changes)
    other = {entry.name: entry for entry in node.reads if builds[entry.name]["fingerprint"] != entry.fingerprint}
    changes += [f"sources.{name}: changed" for name, entry in other.items() if isinstance(entry, Pinned)]
    if not changes and not other and recorded.fingerprint != node.fingerprint:
        changes.append(f"stages.{node.name}.inputs: in other roles than before")
    return "; ".join(changes)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _resumable(directory: Path) -> str | None:
    if (directory / artifact.OUTPUT).is_dir() and _published_fault(directory) is None:
        return "its published output"
    last = last_complete(directory / "checkpoints")
    return f"the checkpoint of step {last.step}" if last else None


def _published_fault(directory: Path) -> str | None:
    """What is wrong, by its files' sizes, with an output that was published and not verified yet; None where there is none."""
    return next(artifact.published_faults(directory, None), None) if (directory / artifact.OUTPUT).is_dir() else None


def decide_all(nodes: Sequence[Node], rebuild: Sequence[str] = ()) -> list[tuple[Node, Decision]]:
    """A decision for each node, each knowing those above it."""
    builds: dict[str, str | None] = {}
    verdicts: dict[str, Verdict] = {}
    decided = []
    list_finished = functools.cache(ledger.list_finished)  # read once for all nodes
    for node in nodes:
        builds.update({entry.name: entry.fingerprint for entry in node.reads if isinstance(entry, Pinned)})
        decision = hold_back(node, decide(node, builds, rebuild, list_finished), verdicts)
        builds[node.name] = decision.build
        verdicts |= _verdict_of(node, decision)
        decided.append((node, decision))
    return decided


def select(nodes: Sequence[Node], only: str | None, start: str | None, until: str | None, rebuild: Sequence[str]) -> list[Node]:
    """The nodes that `--only`, `--from` and `--until` leave. Raises `UserError` on an unknown stage."""
    names = [node.name for node in nodes]
    for option, name in [("--only", only), ("--from", start), ("--until", until), *(("--rebuild", name) for name in rebuild)]:
        if name is not None and name not in names:
            raise UserError(f"{option} {name}: no such stage; {nearest(name, names)}")
    if only is not None:
        if start is not None or until is not None:
            raise UserError(f"--only {only}: leaves nothing for --from and --until to choose; give one or the other")
        start = until = only
    first = names.index(start) if start else 0
    last = names.index(until) if until else len(names) - 1
    if first > last:
        raise UserError(f"--from {start} --until {until}: {start} comes after {until}; swap them")
    return list(nodes[first : last + 1])


# --- execute ---------------------------------------------------------------------------------------------------------


def execute(
    nodes: Sequence[Node],
    selected: Sequence[Node],
    rebuild: Sequence[str],
    launcher: LauncherConfig,
    console: "Console",
    deadline: float = math.inf,
    tried: Sequence[Node] = (),
) -> None:
    """Do what `decide` says for each selected node, in order, until `deadline` is near. The only function with side effects.

    Those that are to be `tried`, chosen or not, are tried as soon as they can be.
    """
    from posttrain.launch import open_launcher

    decisions = _decide_chosen(nodes, selected, rebuild)
    with ExitStack() as stack:
        launch = None
        if work := [node for node in selected if decisions[node.name].action in WORK]:
            launch = stack.enter_context(open_launcher(launcher, console, deadline, has_deepspeed=_has_deepspeed(work)))
        builds: dict[str, str | None] = {name: decision.build for name, decision in decisions.items()}
        verdicts = _verdicts_beside(nodes, selected, decisions)
        for index, node in enumerate(selected):
            builds.update({entry.name: entry.fingerprint for entry in node.reads if isinstance(entry, Pinned)})
            decision = hold_back(node, _distrust(node, decide(node, builds, rebuild), builds, console), verdicts)
            _refuse(node, decision)
            console.print(f"{node.name}  {decision.action}: {decision.why}", highlight=False, soft_wrap=True)
            if decision.action in WORK:
                if launch is None:  # what was to be reused is gone since
                    launch = stack.enter_context(open_launcher(launcher, console, deadline, has_deepspeed=_has_deepspeed([node])))
                past = {before.name for before in selected[:index]}
                _try([each for each in tried if each.name not in past and decisions[each.name].action in ANEW], launch, console)
                to_do = [later for later in selected[index + 1 :] if decisions[later.name].action in WORK]
                _build(node, decision.action, launch, measured_on(nodes), to_do)
            elif decision.found:
                _reuse(node, decision.found)
            done = artifact.read_artifact(node.directory)
            if decision.action in WORK and node.stage.output == "dataset":
                _show_table(node, console)  # what stages train on next; a report comes at the end
            if decision.action in WORK and done:
                _tell_rounding(node, done, console)
            builds[node.name] = done.id if done and decision.action != "blocked" else None
            for name, verdict in _verdict_of(node, Decision("skip", "", builds[node.name])).items():
                verdicts[name] = verdict
                console.print(f"  {verdict.words}", highlight=False, soft_wrap=True)


def _verdicts_beside(nodes: Sequence[Node], selected: Sequence[Node], decisions: Mapping[str, Decision]) -> dict[str, Verdict]:
    """The verdicts of the stages that are not chosen."""
    chosen = {node.name for node in selected}
    return {name: found for node in nodes if node.name not in chosen for name, found in _verdict_of(node, decisions[node.name]).items()}


def gate_failure(nodes: Sequence[Node], selected: Sequence[Node]) -> GateFailed | None:
    """What the chosen stages end with where one of them is a gate that failed, or is blocked by one."""
    decided = decide_all(nodes)
    found = [(node, verdict) for node, decision in decided for verdict in _verdict_of(node, decision).values() if verdict.stopped]
    blocked = [node for node, decision in decided if node in selected and decision.action == "blocked"]
    for gate, verdict in found:
        kept = [node.name for node in blocked if gate in node.gates]
        if gate in selected or kept:
            follows = f"; {', '.join(kept)} did not start" if kept else ""
            return GateFailed(f"stages.{gate.name}: {verdict.fault}{follows}")
    return None


def _has_deepspeed(nodes: Sequence[Node]) -> bool:
    return any(isinstance(node.config, TrainingConfig) and node.config.deepspeed is not None for node in nodes)


def _decide_chosen(
    nodes: Sequence[Node], selected: Sequence[Node], rebuild: Sequence[str], coming: Collection[str] = ()
) -> dict[str, Decision]:
    """All decisions, by stage. Raises `UserError` where a chosen one cannot be built, or what it waits for is neither there nor coming."""
    decisions = {node.name: decision for node, decision in decide_all(nodes, rebuild)}
    for node in nodes:
        action, why = decisions[node.name].action, decisions[node.name].why
        if node in selected:
            _refuse(node, decisions[node.name])
        elif action not in ("skip", "blocked") and node.name not in coming and any(node in later.waits_for for later in selected):
            reads = "reads it" if any(node in later.reads for later in selected) else "goes by its verdict"
            raise UserError(f"stages.{node.name}: a chosen stage {reads}, and it is not ready ({action}: {why}); choose it too")
    return decisions


def submit(
    nodes: Sequence[Node],
    selected: Sequence[Node],
    rebuild: Sequence[str],
    pipeline: PipelineConfig,
    console: "Console",
    is_dry: bool = False,
) -> list["Job"]:
    """Give a cluster a job for each selected node that is not finished, after the jobs of those that it waits for; or, dry, print what it
    would be given.

    Every job decides again when it starts. All are taken back where one is refused.
    """
    from posttrain.launch import jobs

    run = (nodes[0].root / nodes[0].run).absolute()
    submitted: list[Job] = []
    with ExitStack() as stack:
        if not is_dry:
            stack.enter_context(jobs.held(run))
        going = jobs.active(run)
        if busy := [f"{node.name} has job {going[node.name].number}" for node in selected if node.name in going]:
            raise UserError(f"{run}: {', '.join(busy)}, which waits or runs; `status` tells how it is, `cancel` ends it")
        decisions = _decide_chosen(nodes, selected, rebuild, going)
        builds: dict[str, str | None] = {name: decision.build for name, decision in decisions.items()}
        verdicts = _verdicts_beside(nodes, selected, decisions)
        numbers = {name: job.number for name, job in going.items()}
        plain = pipeline.model_dump(mode="json", exclude_unset=True)
        try:
            for node in selected:
                builds.update({entry.name: entry.fingerprint for entry in node.reads if isinstance(entry, Pinned)})
                decision = decide(node, builds, rebuild)
                decision = hold_back(node, decision if is_dry else _distrust(node, decision, builds, console), verdicts)
                _refuse(node, decision)
                verdicts |= _verdict_of(node, decision)
                console.print(f"{node.name}  {decision.action}: {decision.why}", highlight=False, soft_wrap=True)
                if decision.action in WORK:
                    after = {entry.name: numbers[entry.name] for entry in node.waits_for if entry.name in numbers}
                    order = _order(node, run, after, is_rebuild=node.name in rebuild, is_dry=is_dry)
                    if is_dry:
                        click.echo(order.text())
                        numbers[node.name] = order.placeholder
                    else:
                        submitted.append(jobs.submit(run, node.launcher.kind, order, after, plain))
                        numbers[node.name] = submitted[-1].number
                        waits = f", after {', '.join(f'{number} ({name})' for name, number in after.items())}" if after else ""
                        console.print(f"  job {numbers[node.name]}{waits}", highlight=False, soft_wrap=True)
                    builds[node.name] = None
                elif decision.found and not is_dry:
                    _reuse(node, decision.found)
                    done = artifact.read_artifact(node.directory)
                    builds[node.name] = done.id if done else None
                else:
                    builds[node.name] = decision.build
        except BaseException:
            jobs.cancel(run, submitted)
            raise
    return submitted


def _order(node: Node, run: Path, after: Mapping[str, str], *, is_rebuild: bool, is_dry: bool) -> "Order":
    from posttrain.launch import jobs
    from posttrain.launch.kubernetes import Manifest, job_name
    from posttrain.launch.slurm import Script

    root = node.root.absolute()
    driver = ["step", str(jobs.snapshot(run, node.name)), "--stage", node.name, "--root", str(root)]
    if is_rebuild:
        attempt = ledger.read_attempt(node.directory)
        driver += ["--replaces", attempt.token if attempt else ""]
    if isinstance(node.launcher, KubernetesLauncher):
        if not any(root.is_relative_to(directory) for directory in node.launcher.volumes):
            seen = ", ".join(node.launcher.volumes)
            raise UserError(f"stages.{node.name}.launcher.volumes: pods see {seen}, and --root {root} lies in none of them")
        token = "dryrun" if is_dry else secrets.token_hex(3)
        name = job_name(node.run, node.name, token)
        # The image has an interpreter, and this project, of its own.
        return Manifest(node.run, node.name, node.launcher, name, Path.cwd(), ["-m", "pipeline", *driver], after)
    assert isinstance(node.launcher, SlurmLauncher), "the commands see to that"
    return Script(
        run=node.run,
        stage=node.name,
        launcher=node.launcher,
        output=run / node.name / "logs" / "job_%j.log",
        directory=Path.cwd(),
        command=[sys.executable, str(Path(__file__).resolve()), *driver],
        after=list(after.values()),
    )


def _execute_by_jobs(
    nodes: Sequence[Node], selected: Sequence[Node], rebuild: Sequence[str], pipeline: PipelineConfig, console: "Console"
) -> None:
    """`execute`, with one job after another, each followed to its end; one that waits or runs already is followed too."""
    from posttrain.launch import jobs

    run = (nodes[0].root / nodes[0].run).absolute()
    going = jobs.active(run)
    _decide_chosen(nodes, [node for node in selected if node.name not in going], rebuild, going)
    for node in selected:
        job = jobs.active(run).get(node.name)
        if job is not None:
            console.print(f"{node.name}  running: job {job.number}, submitted {job.submitted}", highlight=False, soft_wrap=True)
        for each in [job] if job else submit(nodes, [node], [name for name in rebuild if name == node.name], pipeline, console):
            with suppress(GateFailed):  # what does not build on it goes on
                jobs.follow(run, each, console)


def _refuse(node: Node, decision: Decision) -> None:
    if decision.action == "drift":
        raise UserError(f"{decision.why}; build it again with --rebuild {node.name}, or give the run a new name with run=NAME")
    if decision.action == "running":
        raise UserError(f"stages.{node.name}: {decision.why}; wait for it, or stop it")
    if decision.action == "damaged":
        raise _damaged(node, decision.why)


def _damaged(node: Node, fault: str) -> UserError:
    return UserError(f"stages.{node.name}: {fault}; put that right, or build the stage again with --rebuild {node.name}")


def _distrust(node: Node, decision: Decision, builds: Mapping[str, str | None], console: "Console") -> Decision:
    """The decision, or, where the build that it would reuse turns out damaged, one without it: only now is every byte looked at."""
    if decision.found is None:
        return decision
    fault = next(artifact.faults(decision.found, disk.hash_file), None)
    if fault is None:
        return decision
    console.print(f"{node.name}  not reused: {fault}", highlight=False, soft_wrap=True)
    return decide(node, builds, list_finished=lambda _: {})


def measured_on(nodes: Sequence[Node]) -> list[Pinned]:
    """The data sets that stages which write a report measure on: none of their rows should be trained on."""
    read = {entry.name: entry for node in nodes if node.stage.output == "report" for entry in node.reads if isinstance(entry, Pinned)}
    return [entry for entry in read.values() if isinstance(entry.source, DataSource)]


def _build(node: Node, action: Action, launch: "Launch", held_out: Sequence[Pinned], to_do: Sequence[Node]) -> None:
    with _held(node):
        if action != "rebuild" and artifact.read_artifact(node.directory):
            raise UserError(f"stages.{node.name}: another process finished it just now; run the same command again to go on from there")
        if action == "resume":
            _drop_damaged_output(node)
        else:
            _move_aside(node)
        try:
            launch(node.directory, _start(node, held_out, _foresee(to_do)))
        except StageFailed as failure:
            if disk.is_full(node.directory):  # then the stage could not even leave word of why it failed
                raise OSError(errno.ENOSPC, str(failure)) from failure
            raise


def _reuse(node: Node, found: artifact.Artifact) -> None:
    with _held(node):
        _move_aside(node)
        _start(node)
        for name in (artifact.RECORD, *artifact.EVIDENCE):
            if (found.directory / name).is_file():
                disk.link_file(found.directory / name, node.directory / name)
        aside = node.directory / "output.partial"
        disk.link_tree(found.output, aside)
        disk.publish_directory(aside, node.directory / artifact.OUTPUT)
        disk.write_text(node.directory / artifact.FILE, (found.directory / artifact.FILE).read_text(encoding="utf-8"))


@contextmanager
def _held(node: Node) -> Iterator[None]:
    with disk.explain_disk_errors(f"stages.{node.name}"):
        node.directory.mkdir(parents=True, exist_ok=True)
        with ledger.lease(node.directory):
            yield


def _move_aside(node: Node, names: Sequence[str] = ledger.BUILT) -> Path | None:
    return disk.move_aside([node.directory / name for name in names], node.root / node.run / ".old" / node.name)


def _drop_damaged_output(node: Node) -> None:
    """Move aside an output that was published, is not verified yet, and is not what was published; a checkpoint publishes it again."""
    if not (node.directory / artifact.OUTPUT).is_dir():
        return
    fault = next(artifact.published_faults(node.directory, disk.hash_file), None)
    if fault is None:
        return
    if last_complete(node.directory / "checkpoints") is None:
        raise _damaged(node, fault)
    kept = _move_aside(node, (artifact.OUTPUT, artifact.RECORD, *artifact.EVIDENCE))
    click.echo(f"  {fault}: it was moved to {kept}, and is published again from the last checkpoint")


def _foresee(to_do: Sequence[Node]) -> list[dict[str, Any]]:
    """What `ledger.Foreseen` holds of the next stages that train on rows which are there already."""
    found = []
    for node in [node for node in to_do if node.stage.encoder is not None][:NUM_AHEAD]:
        try:
            policy, first = _tokenizing_policy(node)
            record = {"name": node.name, "kind": node.stage.kind, "config": node.config.model_dump(mode="json")}
            contract = None if first is node.config else {"chat_template": first.chat_template, "system_prompt": first.system_prompt}
            found.append({**record, "policy": _record(policy), "contract": contract, "data": _record(node.inputs["data"][0])})
        except UserError:
            continue  # its data, say, are yet to be made
    return found


def _start(node: Node, held_out: Sequence[Pinned] = (), ahead: Sequence[dict[str, Any]] = (), *, is_smoke: bool = False) -> ledger.Attempt:
    return ledger.start_attempt(
        node.directory,
        stage=node.stage,
        name=node.name,
        run=node.run,
        root=node.root,
        fingerprint=node.fingerprint,
        identity=node.identity,
        config=node.config,
        inputs={role: [_record(entry) for entry in entries] for role, entries in node.inputs.items()},
        held_out=[_record(entry) for entry in held_out],
        ahead=ahead,
        num_processes=node.num_processes,
        is_smoke=is_smoke,
    )


def _read_entry(entry: Node | Pinned) -> tuple[Input, str]:
    """A source, or the output of a finished stage, as a stage reads it, and the id of that build. Raises `UserError`."""
    if isinstance(entry, Pinned):
        return Input(entry.name, _kinds(entry)[0], entry.fingerprint, entry.source), entry.fingerprint
    finished = artifact.read_artifact(entry.directory)
    if finished is None:
        raise UserError(f"stages.{entry.name}: is not finished, so what it makes cannot be read; run it first (--until {entry.name})")
    return Input(entry.name, finished.kind, entry.fingerprint, ledger.output_source(finished)), finished.id


def _record(entry: Node | Pinned) -> dict[str, Any]:
    given, build = _read_entry(entry)
    source = given.source.model_dump(mode="json")
    return {"name": given.name, "kind": given.kind, "fingerprint": given.fingerprint, "id": build, "source": source}


# --- smoke -----------------------------------------------------------------------------------------------------------


def to_be_tried(nodes: Sequence[Node], choice: bool | list[str] | None) -> list[Node]:
    """Those of the nodes that are tried for two steps before they are built, as the pipeline file or the user chose."""
    able = [node for node in nodes if isinstance(node.config, TrainingConfig)]
    if isinstance(choice, list):
        return [node for node in able if node.name in choice]
    return [node for node in able if (_pays_to_try(node) if choice is None else choice)]


def _pays_to_try(node: Node) -> bool:
    """Whether what cannot work would be known late, or at the cost of many."""
    assert isinstance(node.config, TrainingConfig), "others take no steps"
    is_long = node.config.max_steps is None or node.config.max_steps >= smoke.WORTH_STEPS
    return is_long and (not isinstance(node.launcher, LocalLauncher) or min(node.num_processes, num_devices()) > 1)


def _smoke_key(node: Node) -> str:
    assert isinstance(node.config, TrainingConfig), "others are not tried"
    return smoke.key_of(node.fingerprint, node.config, node.launcher, node.num_processes)


def _find_smoke(node: Node, passed: Mapping[str, smoke.Found]) -> smoke.Found | None:
    """How the stage fared when it was tried as it is now, or that another one passed which was the same."""
    return smoke.find(node.directory, functools.partial(_smoke_key, node), passed)


def _chosen_to_be_tried(nodes: Sequence[Node], selected: Sequence[Node], pipeline: PipelineConfig, is_tried: bool | None) -> list[Node]:
    """Those of the chosen nodes that are to be tried. Raises `UserError` where a stage is named of which nothing can be."""
    able = [node.name for node in to_be_tried(nodes, True)]
    for name in pipeline.smoke if isinstance(pipeline.smoke, list) else []:
        if name not in able:
            raise UserError(f"smoke: {name!r} trains nothing, so there are no steps to try; {nearest(name, able)}")
    return to_be_tried(selected, pipeline.smoke if is_tried is None else is_tried)


def _trying(pipeline: PipelineConfig, tried: Sequence[Node]) -> PipelineConfig:
    """The pipeline whose jobs try these stages, each job those of them that its nodes are fit for."""
    return pipeline.model_copy(update={"smoke": [node.name for node in tried]})


def _is_alike(node: Node, other: Node) -> bool:
    """Whether a stage can be tried in the job of another: on as many nodes, with as many ranks and GPUs each."""
    shape = {"num_nodes", "gpus_per_node", "processes_per_node", "cpus_per_process"}
    return node.launcher.model_dump(include=shape) == other.launcher.model_dump(include=shape)


def _try(nodes: Sequence[Node], launch: "Launch", console: "Console", *, is_again: bool = False) -> dict[str, smoke.Found]:
    """Try those of the nodes, in order, that did not pass yet, as far as what they read is there; what was found, by stage.

    Raises as a launcher does where one fails.
    """
    before = smoke.list_passed(nodes[0].root) if nodes else {}
    found = {node.name: known for node in nodes if (known := _find_smoke(node, before)) and known.passed}
    left = {node.name for node in nodes if (is_again or node.name not in found) and _has_rows(node)}
    if not left:
        return found
    # Another policy of the same architecture does in place of one; in place of a reward model none does.
    judges = [entry for node in nodes if node.name in left for entry in node.inputs.get("reward", ()) if isinstance(entry, Node)]
    left |= {judge.name for judge in judges if artifact.read_artifact(judge.directory) is None}
    tried: dict[str, Node] = {}
    with smoke.workplace(nodes[0].root / nodes[0].run, console) as place:
        for node in (node for node in nodes if node.name in left):
            trial = _as_trial(node, tried, place)
            if trial is None:
                continue
            (policy,) = trial.inputs["policy"]
            console.print(f"{node.name}  smoke: {smoke.NUM_STEPS} steps from {policy.name}", highlight=False, soft_wrap=True)
            assert isinstance(trial.config, TrainingConfig), "others are not tried"
            begin = functools.partial(_start, trial, is_smoke=True)
            given = smoke.Trial(node.name, _smoke_key(node), trial.config, node.num_processes, trial.directory, begin)
            found[node.name] = passed = smoke.try_out(given, launch, node.directory)
            console.print(f"  passed in {passed.seconds:.0f} s: {passed.said}", highlight=False, soft_wrap=True)
            tried[node.name] = trial
    return found


def _has_rows(node: Node) -> bool:
    """Whether the data that it trains on are there."""
    read = [entry for role, entries in node.inputs.items() if not _is_measured_on(node, role) for entry in entries]
    made = [entry for entry in read if isinstance(entry, Node) and entry.stage.output == "dataset"]
    return all(artifact.read_artifact(entry.directory) for entry in made)


def _is_measured_on(node: Node, role: str) -> bool:
    """Whether an input is data that a stage which trains could do without."""
    return node.stage.inputs[role].optional and node.stage.inputs[role].kind == "dataset"


def _as_trial(node: Node, tried: Mapping[str, Node], place: Path) -> Node | None:
    """A node as it is tried: shortened, below `place`, reading what trials made; None where what it reads is yet to be made."""
    assert isinstance(node.config, TrainingConfig), "others are not tried"
    config = smoke.shorten(node.config)
    inputs: dict[str, tuple[Node | Pinned, ...]] = {}
    for role, entries in node.inputs.items():
        if _is_measured_on(node, role):
            continue
        found = [_stand_in(entry, node.config, tried) for entry in entries]
        there = [each for each in found if each is not None]
        if len(there) < len(found):
            return None
        inputs[role] = tuple(entry for entry, _ in there)
        if role == "policy":
            ((_, first),) = there
            config = config.model_copy(update={"chat_template": first.chat_template, "system_prompt": first.system_prompt})
    return replace(node, config=config, inputs=inputs, directory=place / node.name)


def _stand_in(entry: Node | Pinned, reader: TrainingConfig, tried: Mapping[str, Node]) -> tuple[Node | Pinned, TrainingConfig] | None:
    """What is read in place of an input that may be yet to be made, and the settings by which its chat contract is established.

    In this order: what a trial made, itself, a policy above it, which is of the same architecture. None where there is nothing yet.
    """
    if isinstance(entry, Pinned):
        return entry, reader
    if entry.name in tried:
        return tried[entry.name], reader
    if artifact.read_artifact(entry.directory):
        return entry, reader
    above = entry.inputs.get("policy") or entry.inputs.get("policies")
    if entry.stage.output != "policy" or above is None:
        return None
    return _stand_in(above[0], entry.config if isinstance(entry.config, TrainingConfig) else reader, tried)


def _tell_smokes(rows: Sequence[tuple[Node, Decision]], choice: bool | list[str] | None) -> dict[str, str]:
    """By stage, how it fared when it was tried as it is now, or that it is to be tried, or is being."""
    due = {node.name for node in to_be_tried([node for node, decision in rows if decision.action in ANEW], choice)}
    passed = smoke.list_passed(rows[0][0].root) if due else {}
    told = {}
    for node in to_be_tried([node for node, _ in rows], True):
        found = _find_smoke(node, passed if node.name in due else {})
        if found is not None:
            told[node.name] = str(found)
        elif node.name in due:
            place = node.directory.parent / smoke.DIRECTORY
            told[node.name] = "running" if (place / node.name).is_dir() and ledger.lease_holder(place) else "due"
    return told


def _short_smoke(told: str | None) -> str:
    """What a table has room for: why one failed, and else no more than that it passed or is due."""
    return told if told and told.startswith("failed") else (told or "").partition(":")[0]


# --- commands --------------------------------------------------------------------------------------------------------


class _InOrder(click.Group):
    """Commands are listed as they stand here, which is about the order in which they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 140}, no_args_is_help=False)
def cli() -> None:
    """Turn a base language model into a chat model: one file names data and stages, one command runs the chain."""


_config = click.argument("config", type=click.Path(path_type=Path))
_overrides = click.argument("overrides", nargs=-1, metavar="[key=value ...]")
_root = click.option("--root", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Directory of all runs.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_only = click.option("--only", metavar="STAGE", help="Only this stage; what it reads must be finished.")
_from = click.option("--from", "start", metavar="STAGE", help="From this stage on; what is before it must be finished.")
_until = click.option("--until", metavar="STAGE", help="Up to this stage.")
_rebuild = click.option("--rebuild", metavar="STAGE", multiple=True, help="Build this stage again although it is finished; repeatable.")
_smoke = click.option(
    "--smoke/--no-smoke",
    "is_tried",
    default=None,
    help="First try two steps of each stage that trains, or do not; by default as `smoke` of the pipeline file says.",
)


@cli.command("plan")
@_config
@_overrides
@_only
@_from
@_until
@_rebuild
@click.option(
    "--memory", is_flag=True, help="Also what each stage that trains needs on each GPU, how long it takes, and what it would fit on."
)
@_root
@_json
def plan_command(
    config: Path,
    overrides: tuple[str, ...],
    only: str | None,
    start: str | None,
    until: str | None,
    rebuild: tuple[str, ...],
    memory: bool,
    root: Path,
    as_json: bool,
) -> None:
    """What would run, and why. Changes nothing."""
    pipeline = read_pipeline(config, overrides)
    nodes = plan(pipeline, root)
    selected = select(nodes, only, start, until, rebuild)
    chosen = {node.name for node in selected}
    rows = [(node, decision) for node, decision in decide_all(nodes, rebuild) if node.name in chosen]
    smokes = _tell_smokes(rows, pipeline.smoke)
    held: dict[str, footprint.Content] = {}
    footprints = foretell(nodes, held)
    estimates = estimate(nodes, held)
    warning = _disk_warning(root, [(footprints[node.name], node.name) for node, decision in rows if decision.action in WORK])
    if as_json:
        plain = [
            {
                **_plan_row(node, decision),
                "trains": _trained(node),
                "disk_bytes": footprints[node.name].as_json(),
                "needs": found.as_json() if (found := estimates.get(node.name)) else None,
                "smoke": smokes.get(node.name),
            }
            for node, decision in rows
        ]
        click.echo(json.dumps(plain, indent=1))
    else:
        sizes = {name: _show_footprint(found) for name, found in footprints.items()}
        lines = []
        for node, made in rows:
            reads = " ".join(entry.name for entry in node.reads)
            needs = _show_needs(node, estimates)
            tried = [_short_smoke(smokes.get(node.name))] if smokes else []
            lines.append((node.name, node.stage.kind, reads, _trained(node), sizes[node.name], *needs, *tried, made.action, made.why))
        shown = ["smoke"] if smokes else []
        _print_table(("stage", "kind", "reads", "trains", "disk", "memory", "time", *shown, "action", "why"), lines)
        if memory:
            _print_needs([(node.name, found) for node, _ in rows if (found := estimates.get(node.name))])
    if warning:
        click.echo(f"warning: {_one_line(warning)}", err=True)


def foretell(nodes: Sequence[Node], held: dict[str, footprint.Content]) -> dict[str, footprint.Footprint]:
    """What each stage will take on disk, by its name; puts what each source and output holds into `held`."""
    found = {}
    for node in nodes:
        held.update({entry.name: footprint.read_content(entry.source) for entry in node.reads if isinstance(entry, Pinned)})
        inputs = {role: [held[entry.name] for entry in entries] for role, entries in node.inputs.items()}
        found[node.name], held[node.name] = footprint.foretell(
            node.config, node.stage.output, inputs, prepares=node.stage.encoder is not None
        )
    return found


def estimate(nodes: Sequence[Node], held: Mapping[str, footprint.Content]) -> dict[str, planner.Estimate | None]:
    """What each stage that trains needs of memory and time, by its name; None where its model is not here yet."""
    shapes: dict[str, planner.Shape | None] = {}
    found: dict[str, planner.Estimate | None] = {}
    for node in nodes:
        for entry in node.reads:
            if isinstance(entry, Pinned) and isinstance(entry.source, ModelSource) and entry.name not in shapes:
                shapes[entry.name] = planner.read_shape(entry.source)
        start = next((entries[0].name for role, entries in node.inputs.items() if role in ("policy", "policies")), "")
        shapes[node.name] = shapes.get(start)
        if isinstance(node.config, TrainingConfig):
            judges = [shapes.get(entry.name) for entry in node.inputs.get("reward", ())]
            found[node.name] = _estimate(node, node.config, shapes.get(start), judges, held)
    return found


def _estimate(
    node: Node,
    config: TrainingConfig,
    shape: planner.Shape | None,
    judges: Sequence[planner.Shape | None],
    held: Mapping[str, footprint.Content],
) -> planner.Estimate | None:
    from posttrain.hardware import detect, find
    from posttrain.parallel import num_cores

    launcher = node.launcher
    # Nothing is known here of other machines.
    name = launcher.hardware or (detect() if isinstance(launcher, LocalLauncher) else None)
    hardware = None if name is None else find(name, num_cores())
    model, rows = held.get(node.inputs["policy"][0].name), held.get(node.inputs["data"][0].name)
    num_trained = None
    if config.lora is not None:
        num_trained = footprint.adapter_parameters(model, config.lora) if isinstance(model, footprint.Weights) else None
    if shape is None or None in judges or (config.lora is not None and num_trained is None):
        return None
    job = planner.job_of(
        node.stage.kind,
        config,
        shape,
        world_size=node.num_processes,
        per_node=node.num_processes if isinstance(launcher, LocalLauncher) else launcher.tasks_per_node,
        is_gpu=hardware is None or hardware.is_gpu,
        num_trained=num_trained,
        rows=rows if isinstance(rows, footprint.Rows) else None,
        judges=[judge for judge in judges if judge is not None],
    )
    return planner.estimate(shape, job, hardware, launcher.price_per_hour, may_add_nodes=isinstance(launcher, Nodes))


def _refuse_unfit(nodes: Sequence[Node], selected: Sequence[Node], rebuild: Sequence[str]) -> None:
    """Raise `UserError` where a stage that is to be built cannot fit on the hardware that the user named."""
    named = {node.name for node in selected if node.launcher.hardware is not None}
    if not named:
        return
    held: dict[str, footprint.Content] = {}
    foretell(nodes, held)
    estimates = estimate(nodes, held)
    for node, decision in decide_all(nodes, rebuild):
        found = estimates.get(node.name)
        if node.name in named and decision.action in WORK and found is not None and found.fits is False:
            raise UserError(f"stages.{node.name}: {planner.explain_misfit(found)}")


def _show_needs(node: Node, estimates: Mapping[str, planner.Estimate | None]) -> tuple[str, str]:
    """Memory of each process, and time, of a stage that trains."""
    if node.name not in estimates:
        return "", ""
    found = estimates[node.name]
    if found is None:
        return "?", "?"
    each = disk.show_bytes(found.memory.total)
    memory = each if found.world_size == 1 else f"{found.world_size} x {each}"
    total_s = found.time.total_s if found.time is not None else None
    return f"{memory}, too much" if found.fits is False else memory, _show_time(total_s)


def _show_time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for size, unit, least in ((86400, "d", 2), (3600, "h", 1.5), (60, "min", 1.5)):
        if seconds >= size * least:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _print_needs(rows: Sequence[tuple[str, planner.Estimate]]) -> None:
    lines = []
    for name, found in rows:
        parts = [f"{part} {disk.show_bytes(size)}" for part, size in found.memory.parts().items() if size]
        usable = "?" if found.capacity_bytes is None else disk.show_bytes(found.capacity_bytes)
        where = f"{found.world_size} x {found.hardware or 'a GPU that is not named (launcher.hardware)'}"
        total = disk.show_bytes(found.memory.total)
        time = found.time
        speed = "?" if time is None else f"{time.tokens_per_s:,.0f}"
        hours = "?" if time is None or time.gpu_hours is None else f"{time.gpu_hours:,.1f}"
        price = "?" if time is None or time.price is None else f"{time.price:,.2f}"
        least = found.recommendation.text if found.recommendation is not None else "?"
        lines.append((name, where, found.memory.phase, total, usable, " + ".join(parts), speed, hours, price, least))
    columns = ("stage", "on", "peaks in", "memory", "usable", "which is", "tokens/s", "GPU-hours", "price", "fits with as little as")
    _print_table(columns, lines)


def _show_footprint(found: footprint.Footprint) -> str:
    total, peak = ("?" if size is None else disk.show_bytes(size) for size in (found.total, found.peak))
    return total if total == peak else f"{total}, peak {peak}"


def _disk_warning(root: Path, to_do: Sequence[tuple[footprint.Footprint, str]]) -> str | None:
    """What to say where the disk is foretold to fill up on the way; what is not known counts nothing."""
    place = next(path for path in (root.absolute(), *root.absolute().parents) if path.is_dir())
    free, left = disk.free_bytes(place), 0
    for found, name in to_do:
        stays = sum(size or 0 for size in (found.prepared, found.output, found.completions))
        needed = left + stays + (found.checkpoints or 0)
        if needed > free:
            said = f"{disk.show_bytes(free)} are free in {place}, and with stages.{name} about {disk.show_bytes(needed)} will be needed"
            return f"{said}; free some, as `clean` does, or choose another --root"
        left += stays
    return None


@cli.command("run")
@_config
@_overrides
@_only
@_from
@_until
@_rebuild
@click.option("--time-limit", metavar="TIME", help="Save and stop in order before this is over, such as 90s, 45m or 3.5h.")
@_smoke
@_root
def run_command(
    config: Path,
    overrides: tuple[str, ...],
    only: str | None,
    start: str | None,
    until: str | None,
    rebuild: tuple[str, ...],
    time_limit: str | None,
    is_tried: bool | None,
    root: Path,
) -> None:
    """Run all that is not finished. Safe to repeat: finished stages are skipped, cut-off ones resumed."""
    deadline = math.inf if time_limit is None else STARTED + _seconds(time_limit)
    pipeline = read_pipeline(config, overrides)
    nodes = plan(pipeline, root)
    selected = select(nodes, only, start, until, rebuild)
    _refuse_unfit(nodes, selected, rebuild)
    console = _console()
    tried = _chosen_to_be_tried(nodes, selected, pipeline, is_tried)
    if isinstance(pipeline.launcher, Nodes):
        if time_limit is not None:
            raise UserError(f"--time-limit {time_limit}: is for processes on this machine; a job's is set in its launcher")
        _execute_by_jobs(nodes, selected, rebuild, _trying(pipeline, tried), console)
    else:
        execute(nodes, selected, rebuild, pipeline.launcher, console, deadline, tried)
    _show_results(console, selected, config, overrides)
    if failure := gate_failure(nodes, selected):
        raise failure


@cli.command("smoke")
@_config
@_overrides
@_only
@_from
@_until
@click.option("--again", "is_again", is_flag=True, help="Also what has passed already.")
@_root
@_json
def smoke_command(
    config: Path,
    overrides: tuple[str, ...],
    only: str | None,
    start: str | None,
    until: str | None,
    is_again: bool,
    root: Path,
    as_json: bool,
) -> None:
    """Try two steps of each stage that trains, on its longest samples: train, save, publish, reload, resume. Builds no stage."""
    from posttrain.launch import open_launcher

    pipeline = read_pipeline(config, overrides)
    if isinstance(pipeline.launcher, Nodes):
        raise UserError(f"launcher.kind: {pipeline.launcher.kind}, whose nodes are not here; use submit --smoke: its jobs begin with that")
    nodes = plan(pipeline, root)
    tried = to_be_tried(select(nodes, only, start, until, ()), True)
    if not tried:
        raise UserError(f"{config}: none of the chosen stages trains, so there are no steps to try")
    console = _console(stderr=as_json)
    with open_launcher(pipeline.launcher, console, math.inf, has_deepspeed=_has_deepspeed(tried)) as launch:
        found = _try(tried, launch, console, is_again=is_again)
    rows = {node.name: str(found.get(node.name, "not yet: what it reads is yet to be made")) for node in tried}
    if as_json:
        click.echo(json.dumps([{"stage": name, "smoke": told} for name, told in rows.items()], indent=1))
    else:
        _print_table(("stage", "smoke"), list(rows.items()))


@cli.command("submit")
@_config
@_overrides
@_only
@_from
@_until
@_rebuild
@click.option("--dry-run", is_flag=True, help="Only print what the cluster would be given.")
@_smoke
@_root
def submit_command(
    config: Path,
    overrides: tuple[str, ...],
    only: str | None,
    start: str | None,
    until: str | None,
    rebuild: tuple[str, ...],
    dry_run: bool,
    is_tried: bool | None,
    root: Path,
) -> None:
    """Give a cluster a job for each stage that is not finished; nothing stays alive here."""
    pipeline = read_pipeline(config, overrides)
    if not isinstance(pipeline.launcher, Nodes):
        raise UserError(f"launcher.kind: {pipeline.launcher.kind} starts no jobs; set `launcher: {{kind: slurm}}`, or use `run`")
    nodes = plan(pipeline, root)
    selected = select(nodes, only, start, until, rebuild)
    _refuse_unfit(nodes, selected, rebuild)
    pipeline = _trying(pipeline, _chosen_to_be_tried(nodes, selected, pipeline, is_tried))
    submitted = submit(nodes, selected, rebuild, pipeline, _console(stderr=dry_run), dry_run)
    if submitted:
        click.echo(f"submitted {', '.join(job.number for job in submitted)}; `status` tells how it goes on")
    if failure := gate_failure(nodes, selected):
        raise failure


@cli.command("step", hidden=True)
@_config
@click.option("--stage", required=True, metavar="STAGE", help="Which one.")
@click.option("--replaces", metavar="ATTEMPT", help="Build it again, where this is still the last attempt at it.")
@click.option("--after", metavar="STAGE=JOB", multiple=True, help="Only wait until that job has ended well; repeatable.")
@click.option("--max-restarts", type=click.IntRange(min=0), default=0, help="How often the cluster begins it again after a crash.")
@_root
def step_command(config: Path, stage: str, replaces: str | None, after: tuple[str, ...], max_restarts: int, root: Path) -> None:
    """One stage, within the job that `submit` made of it."""
    from posttrain.launch import jobs, kubernetes

    pipeline, console = read_pipeline(config), _console()
    run = root / pipeline.run
    if after:
        jobs.wait_for_others(run, stage, dict(entry.split("=", 1) for entry in after), console)
        return
    if isinstance(pipeline.launcher, KubernetesLauncher) and not kubernetes.is_first_pod():
        (node,) = select(plan(pipeline, root), stage, None, None, ())
        assert isinstance(node.launcher, KubernetesLauncher), "a stage changes other fields only"
        kubernetes.join(node.launcher, node.directory)
        return
    with jobs.reported(run, stage, pipeline.launcher.kind, max_restarts):
        nodes = plan(pipeline, root)
        selected = select(nodes, stage, None, None, ())
        (node,) = selected
        jobs.wait_for_lease(node.directory, console)
        attempt = ledger.read_attempt(node.directory)
        rebuild = [stage] if replaces == (attempt.token if attempt else "") else []
        later = nodes[nodes.index(node) :]
        tried = [each for each in to_be_tried(later, pipeline.smoke) if _is_alike(each, node)]
        execute(nodes, selected, rebuild, node.launcher, console, tried=tried)
        if failure := gate_failure(nodes, selected):
            raise failure


@cli.command("cancel")
@click.argument("run", metavar="CONFIG_OR_RUN")
@click.option("--only", metavar="STAGE", help="Only the job of this stage, and so those that wait for it.")
@_root
def cancel_command(run: str, only: str | None, root: Path) -> None:
    """Take the jobs of a run from the cluster's queue; those that run save first."""
    from posttrain.launch import jobs

    directory = (root / (read_pipeline(Path(run)).run if Path(run).is_file() else run)).absolute()
    if not (directory / ledger.JOBS).is_dir():
        raise UserError(f"{run}: no job was submitted for {directory}; `status` lists what there is")
    with jobs.held(directory):
        going = jobs.active(directory)
        if only is not None and only not in going:
            raise UserError(f"--only {only}: no job of it waits or runs; {nearest(only, list(going)) if going else 'none does'}")
        for line in jobs.cancel(directory, [job for name, job in going.items() if only in (None, name)]):
            click.echo(line)
    if not going:
        click.echo(f"no job of {directory} waits or runs")


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None or not float(found[1]):
        raise UserError(f"--time-limit {text}: is no length of time; give one such as 90s, 45m or 3.5h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


@cli.command("status")
@click.argument("config", type=click.Path(path_type=Path), required=False)
@_overrides
@_root
@_json
def status_command(config: Path | None, overrides: tuple[str, ...], root: Path, as_json: bool) -> None:
    """Stages, progress and metrics; without CONFIG, of every run under the root."""
    if config is None:
        rows = {path: _recorded_row(path) for path in _recorded_stages(root)}
    else:
        pipeline = read_pipeline(config, overrides)
        decided = decide_all(plan(pipeline, root))
        smokes = _tell_smokes(decided, pipeline.smoke)
        rows = {
            node.directory: {**_plan_row(node, decision), **_state(node.directory), "smoke": smokes.get(node.name)}
            for node, decision in decided
        }
    fates = functools.cache(_fates)  # asked once for each run
    jobs = {path: fate for path in rows if (fate := fates(path.parent).get(path.name))}
    if as_json:
        click.echo(json.dumps([{**row, **({"job": asdict(jobs[path])} if path in jobs else {})} for path, row in rows.items()], indent=1))
        return
    lines = []
    is_tried = any(row["smoke"] for row in rows.values())
    for path, row in rows.items():
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in list(row["metrics"].items())[:4])
        label = f"{row['run']}/{row['stage']}" if "run" in row else row["stage"]
        job = [str(jobs.get(path, ""))] if jobs else []
        told = row["why"] if row["action"] == "blocked" else row.get("verdict") or row.get("selected") or _progress_text(row)
        tried = [_short_smoke(row["smoke"])] if is_tried else []
        lines.append((label, row["kind"], row["action"], *job, *tried, told, metrics, row["output"] or ""))
    shown = [*(["job"] if jobs else []), *(["smoke"] if is_tried else [])]
    _print_table(("stage", "kind", "action", *shown, "progress", "metrics", "output"), lines)


@cli.command("stages")
@click.argument("kind", required=False)
@_json
def stages_command(kind: str | None, as_json: bool) -> None:
    """The kinds of stages, or the fields of one KIND."""
    from stages import STAGES

    if kind is None:
        stages = [load_stage(name, name) for name in STAGES]
        if as_json:
            kinds = [{"kind": s.kind, "inputs": {r: i.kind for r, i in s.inputs.items()}, "output": s.output} for s in stages]
            click.echo(json.dumps(kinds, indent=1))
            return
        lines = [(s.kind, ", ".join(f"{role}: {i.kind}" for role, i in s.inputs.items()), s.output, s.summary) for s in stages]
        _print_table(("kind", "reads", "writes", "what it does"), lines)
        return
    stage = load_stage(kind, "KIND")
    rows = fields_help(stage.config)
    for name, part in (stage.parts() if stage.parts else {}).items():
        rows += [(name, "", "", (part.__doc__ or "").splitlines()[0]), *fields_help(part, f"{name}.")]
    if as_json:
        click.echo(json.dumps([dict(zip(("name", "type", "default", "help"), row, strict=True)) for row in rows], indent=1))
        return
    _print_table(("field", "type", "default", "help"), rows)


@cli.command("chat")
@_config
@click.argument("words", nargs=-1, metavar="[STAGE ...] [key=value ...]")
@click.option("--stage", metavar="STAGE", help="Whose policy to talk to, or the name of a source; by default the last finished one.")
@click.option("--compare", is_flag=True, help="Put each question to several: `--compare base sft dpo`.")
@click.option("--prompt", metavar="TEXT", help="Ask this one thing, print the answer and end.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--temperature", type=click.FloatRange(min=0), help="Draw tokens at random; by default the likeliest is taken, as at 0.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), help="Draw from the fewest that hold this probability.")
@click.option("--top-k", type=click.IntRange(min=0), help="Draw from so many of the likeliest tokens.")
@click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), help="Above 1, make what was there already less likely.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest answer, in tokens; by default 1024.")
@click.option("--seed", type=click.IntRange(min=0, max=2**32), help="Seed of what is drawn; by default 0.")
@click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Keep conversations as rows of this JSONL file.")
@click.option("--serve", is_flag=True, help="Serve the policy to programs of this machine instead, by the API of OpenAI.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port for --serve; by default 8000.")
@_root
def chat_command(
    config: Path,
    words: tuple[str, ...],
    stage: str | None,
    compare: bool,
    prompt: str | None,
    system: str | None,
    save: Path | None,
    serve: bool,
    port: int | None,
    root: Path,
    **sampling: float | int | None,
) -> None:
    """Talk to the policy of a stage, or to several at once."""
    names = [word for word in words if "=" not in word] if compare else [stage] if stage is not None else []
    overrides = [word for word in words if not compare or "=" in word]
    chosen = {name: value for name, value in sampling.items() if value is not None}
    _check_chat({"--stage": stage, "--prompt": prompt, "--system": system, "--save": save, **chosen}, names, compare, serve, port)
    policies = _policies(plan(read_pipeline(config, overrides), root), names, "--compare" if compare else "--stage", config)
    given = [_read_entry(policy)[0] for policy in policies]
    for policy in policies:
        _check_files(policy)
    if serve:
        from posttrain import serving

        (policy,) = policies
        if not isinstance(policy, Node):
            raise UserError(f"--stage {policy.name}: is a source, and only what a stage made is served; name a stage")
        serving.serve(policy.directory, port=port or serving.PORT)
    from posttrain.conversation import Conversation, Sampling, ask, open_speakers, talk

    settings = Sampling(**chosen)  # type: ignore[arg-type]
    conversation = Conversation(open_speakers(given), settings, system=system, file=save)
    if prompt is None:
        talk(conversation, _console())
    else:
        ask(conversation, prompt, _console())


def _check_chat(given: Mapping[str, object], names: Sequence[str], compare: bool, serve: bool, port: int | None) -> None:
    """Raise `UserError` where options of `chat` do not go together."""
    for option, value in given.items():
        name = option if option.startswith("--") else f"--{option.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} {value}: is not finite; give a number")
        if value is not None and serve and option != "--stage":
            raise UserError(f"{name}: is for a conversation here, and with --serve clients say that; leave it out")
    if compare and serve:
        raise UserError("--compare: one server answers for one policy; name it with --stage")
    if compare and given["--stage"] is not None:
        raise UserError(f"--stage {given['--stage']}: is one policy; name all that are to be compared after --compare")
    if compare and len(set(names)) < max(2, len(names)):
        raise UserError(f"--compare {' '.join(names)}: name two policies or more, each once, such as `--compare sft dpo`")
    if port is not None and not serve:
        raise UserError(f"--port {port}: is for --serve only; leave it out")


def _policies(nodes: Sequence[Node], names: Sequence[str], option: str, config: Path) -> list[Node | Pinned]:
    """The policies of those names, of stages and sources; without any, that of the last stage that has finished one. Raises `UserError`."""
    if not names:
        finished = [node for node in nodes if node.stage.output == "policy" and artifact.read_artifact(node.directory)]
        if not finished:
            raise UserError(f"{config}: no finished policy to talk to; run the pipeline first")
        return [finished[-1]]
    known = {entry.name: entry for node in nodes for entry in [*node.reads, node] if "policy" in _kinds(entry)}
    if unknown := next((name for name in names if name not in known), None):
        raise UserError(f"{option} {unknown}: no stage of that name makes a policy; {nearest(unknown, list(known))}")
    return [known[name] for name in names]


@cli.command("export")
@_config
@_overrides
@click.option("--stage", required=True, metavar="STAGE", help="Whose policy or reward model.")
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Directory to write; it must not be there yet.")
@click.option("--gguf", metavar="TYPE", help="Also a GGUF of this type, such as q8_0 or bf16, by llama.cpp's converter.")
@click.option("--push", metavar="REPO", help="Upload it to this repository of the Hub, a private one where it is new.")
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest file of weights.")
@_root
@_json
def export_command(
    config: Path,
    overrides: tuple[str, ...],
    stage: str,
    to: Path,
    gguf: str | None,
    push: str | None,
    max_shard_size: str,
    root: Path,
    as_json: bool,
) -> None:
    """Write a stage's model, with a card that tells all about it, as a plain Hugging Face directory to pass on."""
    nodes = plan(read_pipeline(config, overrides), root)
    able = [node.name for node in nodes if node.stage.output in ("policy", "reward_model")]
    if stage not in able:
        raise UserError(f"--stage {stage}: no stage of that name makes a model; {nearest(stage, able)}")
    node = next(node for node in nodes if node.name == stage)
    rows = decide_all(nodes)
    decisions = {each.name: decision for each, decision in rows}
    for each in _above(node):
        if (decision := decisions[each.name]).action != "skip":
            raise UserError(f"stages.{each.name}: {decision.action}: {decision.why}; what is exported must be finished, so run it first")
        _check_files(each)
    from posttrain import export
    from posttrain.report import read

    export.check_request(to, gguf=gguf, push=push, max_shard_size=max_shard_size)
    finished = artifact.read_artifact(node.directory)
    assert finished is not None, "it is to be skipped"
    run = read.read_run(node.directory.parent, [_plan_row(each, decision) for each, decision in rows])
    sources = {entry.name: entry.source for each in nodes for entry in each.reads if isinstance(entry, Pinned)}
    with disk.explain_disk_errors(f"--to {to}"):
        checks = export.export(finished, run, sources, to, gguf=gguf, max_shard_size=max_shard_size)
    if as_json:
        click.echo((to / export.RECORD).read_text(encoding="utf-8"), nl=False)
    else:
        results = {True: "same", False: "differs", None: "not checked"}
        _print_table(("what", "result", "found"), [(check.what, results[check.is_same], check.found) for check in checks])
        click.echo(f"wrote {to}, with its card in {export.CARD} and the checks in {export.RECORD}")
    if push is not None:
        click.echo(f"pushed: {export.push_to_hub(to, push)}", err=as_json)


def _above(node: Node) -> list[Node]:
    """A stage, and all stages that it was made from, those first."""
    above = [each for entry in node.reads if isinstance(entry, Node) for each in _above(entry)]
    return list({each.name: each for each in [*above, node]}.values())


@cli.command("inspect")
@_config
@click.argument("stage")
@_overrides
@click.option("--row", "rows", type=click.IntRange(min=0), multiple=True, metavar="N", help="The row of this number; repeatable.")
@click.option("--worst", type=click.Choice(["length", "loss"]), help="The rows that are longest, or that the policy finds hardest.")
@click.option("--num-rows", type=click.IntRange(min=1), default=3, show_default=True, help="How many rows to show.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write them as one page to this file.")
@_root
@_json
def inspect_command(
    config: Path,
    stage: str,
    overrides: tuple[str, ...],
    rows: tuple[int, ...],
    worst: str | None,
    num_rows: int,
    html: Path | None,
    root: Path,
    as_json: bool,
) -> None:
    """What a stage will train on: its rows as the model sees them, with what is trained, cut or left out."""
    if rows and worst:
        raise UserError(f"--row {rows[0]}: leaves nothing for --worst to choose; give one or the other")
    nodes = plan(read_pipeline(config, overrides), root)
    node = next((node for node in nodes if node.name == stage), None)
    if node is None:
        raise UserError(f"{stage}: no such stage; {nearest(stage, [node.name for node in nodes])}")
    if node.stage.encoder is None:
        able = [other.name for other in nodes if other.stage.encoder is not None]
        raise UserError(
            f"{stage}: stages of the kind {node.stage.kind} train on no rows; {nearest(stage, able) if able else 'no stage does'}"
        )
    above, first = _tokenizing_policy(node)
    policy, _ = _read_entry(above)
    data, _ = _read_entry(node.inputs["data"][0])
    for entry in (above, node.inputs["data"][0]):
        _check_files(entry)

    from posttrain import inspection
    from posttrain.data.prepared import describe_formats
    from posttrain.data.source import open_source
    from posttrain.models import load_tokenizer

    at = f"stages.{stage}"
    tokenizer, contract = load_tokenizer(policy, at, chat_template=first.chat_template, system_prompt=first.system_prompt)
    encoder = node.stage.encoder(node.config, tokenizer, contract, at)
    source = open_source(data.data, f"{at}: {data.name}")
    console = _console()

    def losses(chosen: list[Any]) -> list[float]:
        from rich.progress import track

        found = inspection.losses_of(encoder, policy, tokenizer, contract, chosen, at)
        silent = as_json or not console.is_terminal
        computed = dict(track(found, f"scoring under {policy.name}", total=len(chosen), console=console, disable=silent))
        return [computed.get(number, 0.0) for number in range(len(chosen))]

    chosen = inspection.choose(source, encoder, rows=rows, worst=worst, num_rows=num_rows, losses=losses)
    inspected = [inspection.inspect(encoder, tokenizer, index, row, loss) for index, row, loss in chosen]
    if as_json:
        click.echo(json.dumps([inspection.as_json(row) for row in inspected], ensure_ascii=False))
    summary = [*describe_formats(source), f"chat contract of {policy.name}: an answer ends with {contract.stop_tokens[0]}"]
    if html is not None:
        inspection.write_html(inspected, html, title=f"{config}: {stage}", summary=summary)
        console.print(f"wrote {html}", highlight=False)
    if not as_json and html is None:
        for line in summary:
            console.print(line, highlight=False, soft_wrap=True)
        for row in inspected:
            inspection.show(row, console)


@cli.command("report")
@click.argument("run", metavar="CONFIG_OR_RUN")
@_overrides
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write it to this file; by default report.html of the run.")
@click.option("--watch", is_flag=True, help="Serve the page to browsers of this machine instead, as it is while the run goes on.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port for --watch; by default a free one.")
@_root
@_json
def report_command(run: str, overrides: tuple[str, ...], html: Path | None, watch: bool, port: int, root: Path, as_json: bool) -> None:
    """One page of all that a run left on disk, to look at, print or send."""
    if watch and (html is not None or as_json):
        raise UserError(f"--watch: serves the page, so leave out {'--json' if as_json else '--html'}")
    if port and not watch:
        raise UserError(f"--port {port}: is for --watch only; leave it out")
    directory, list_rows = _open_run(run, overrides, root)
    from posttrain.report import page, read

    if watch:
        _watch(lambda: page.run_page(read.read_run(directory, list_rows()), watch=True), port)
        return
    found = read.read_run(directory, list_rows())
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
    if html is not None or not as_json:
        path = html or directory / "report.html"
        page.write_page(path, page.run_page(found))
        click.echo(f"wrote {path}", err=as_json)


def _watch(render: Callable[[], str], port: int) -> None:
    from posttrain.report.serve import PageServer

    try:
        server = PageServer(port, render)
    except OSError as error:
        raise UserError(f"--port {port}: cannot be listened on ({error.strerror}); leave it out for a free one") from None
    with server:
        server.page()  # what is wrong with the run is said here, and not to a browser
        click.echo(f"the page is at {server.url} for as long as this command runs")
        server.serve_forever()


def _open_run(run: str, overrides: Sequence[str], root: Path) -> tuple[Path, Callable[[], Sequence[Mapping[str, Any]]]]:
    """The directory of a run, given as to `_find_run`, and what tells of its stages in order what is to be done about each."""
    from posttrain import inventory
    from posttrain.report.read import in_order

    if Path(run).is_file():
        nodes = plan(read_pipeline(Path(run), overrides), root)
        return nodes[0].directory.parent, lambda: [_plan_row(node, decision) for node, decision in decide_all(nodes)]
    if overrides:
        raise UserError(f"{overrides[0]}: changes a pipeline file, and {run} is none; leave it out")
    directory = _find_run(run, root)
    return directory, lambda: in_order([_recorded_row(stage) for stage in inventory.list_stages(directory)])


@cli.command("compare")
@click.argument("runs", nargs=-1, required=True, metavar="CONFIG_OR_RUN...")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write them, with their curves, as one page to this file.")
@_root
@_json
def compare_command(runs: tuple[str, ...], html: Path | None, root: Path, as_json: bool) -> None:
    """Runs beside each other, each held against the first: what differs in their settings, what they measured, what they cost."""
    if len(runs) < 2:
        raise UserError(f"{runs[0]}: there is nothing to compare it with; name two runs or more")
    opened = [_open_run(run, (), root) for run in runs]
    from posttrain.report import compare, page, read

    comparison = compare.compare_runs([read.read_run(directory, list_rows()) for directory, list_rows in opened])
    if as_json:
        click.echo(json.dumps(comparison.as_json(), indent=1))
    else:
        for title, columns, rows in comparison.tables():
            click.echo(f"\n{title}")
            _print_table(columns, rows)
    if html is not None:
        page.write_page(html, page.comparison_page(comparison))
        click.echo(f"wrote {html}", err=as_json)


@cli.command("verify")
@click.argument("runs", nargs=-1, required=True, metavar="CONFIG_OR_RUN...")
@_root
@_json
def verify_command(runs: tuple[str, ...], root: Path, as_json: bool) -> None:
    """Read all that runs hold, and compare it with what was recorded when it was written."""
    from posttrain import inventory

    pieces = {piece.path: piece for run in runs for piece in inventory.list_pieces(_find_run(run, root))}
    checked = []
    with _reading(sum(piece.num_bytes for piece in pieces.values()), as_json) as advance:
        for piece in pieces.values():
            checked.append((piece, list(piece.faults())))
            advance(piece.num_bytes)
    if as_json:
        plain = [
            {"run": each.run, "stage": each.stage, "what": each.what, "path": str(each.path), "bytes": each.num_bytes, "faults": faults}
            for each, faults in checked
        ]
        click.echo(json.dumps(plain, indent=1))
    else:
        lines = []
        for piece, faults in checked:
            first, *others = faults or ["whole" if piece.mend else ""]
            lines.append((f"{piece.run}/{piece.stage}", piece.what, disk.show_bytes(piece.num_bytes), first))
            lines += [("", "", "", fault) for fault in others]
        _print_table(("stage", "what", "size", "found"), lines)
    for piece, faults in checked:
        if faults:
            where = "" if str(piece.path) in faults[0] else f"{piece.path}: "
            raise UserError(f"{piece.run}/{piece.stage}: {piece.what}: {where}{faults[0]}; {piece.mend}")


@contextmanager
def _reading(num_bytes: int, as_json: bool) -> Iterator[Callable[[int], None]]:
    """Show on stderr how far reading so many bytes has come: a bar on a terminal, a line now and then elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    if console.is_terminal and not as_json:
        with Progress(BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task("", total=num_bytes)
            yield lambda count: bar.advance(task, count)
        return
    done, said = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        if time.monotonic() - said > PLAIN_LINE_EVERY_S:
            said = time.monotonic()
            click.echo(f"read {disk.show_bytes(done)} of {disk.show_bytes(num_bytes)}", err=True)

    yield advance


def _find_run(name: str, root: Path) -> Path:
    """The directory of a run, given by a pipeline file, by its name under the root, or itself. Raises `UserError`."""
    from posttrain import inventory

    path = Path(name)
    if path.is_file():
        path = root / read_pipeline(path).run
    elif not (path.is_dir() and inventory.list_stages(path)):
        path = root / name
    if not inventory.list_stages(path):
        known = [run.name for run in inventory.list_runs(root)]
        hint = nearest(name, known) if known else f"there is none under {root}"
        raise UserError(f"{name}: is neither a pipeline file that was run nor a run under {root}; {hint}")
    return path


@cli.command("clean")
@click.argument("run", metavar="CONFIG_OR_RUN")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
@_root
@_json
def clean_command(run: str, dry_run: bool, yes: bool, root: Path, as_json: bool) -> None:
    """Delete what a run does not need any more: old builds, checkpoints of finished stages, what was cut off, unused prepared data."""
    from posttrain import inventory

    directory = _find_run(run, root)
    spares = inventory.list_spares(directory, directory.parent)
    if as_json:
        click.echo(json.dumps([{"path": str(spare.path), "why": spare.why, "bytes": spare.num_bytes} for spare in spares], indent=1))
    elif spares:
        _print_table(("what", "frees", "path"), [(spare.why, disk.show_bytes(spare.num_bytes), str(spare.path)) for spare in spares])
    else:
        click.echo(f"{directory} holds nothing that can be spared")
    if dry_run or not spares:
        return
    total = disk.show_bytes(sum(spare.num_bytes for spare in spares))
    if not yes:
        if not sys.stdin.isatty() or as_json:
            raise UserError(f"{directory}: {total} can be freed, and there is nobody to ask; say --yes to delete, --dry-run to only look")
        if not click.confirm(f"delete all of this, {total}?"):
            return
    with disk.explain_disk_errors(f"while {directory} is cleaned"):
        deleted = list(inventory.delete(spares, directory.parent))
    if not as_json:
        kept = f"; {len(spares) - len(deleted)} are in use by now and were left" if len(deleted) < len(spares) else ""
        click.echo(f"freed {disk.show_bytes(sum(spare.num_bytes for spare in deleted))}{kept}")


@cli.command("doctor")
@_overrides
@click.option("--resume", "config", type=click.Path(path_type=Path), metavar="CONFIG", help="Kill a stage of this pipeline and run it on.")
@click.option("--stage", metavar="STAGE", help="Which stage to kill; by default the first one that trains.")
@click.option("--steps", type=click.IntRange(min=2), default=4, show_default=True, help="Steps that it trains.")
@_root
@_json
def doctor_command(overrides: tuple[str, ...], config: Path | None, stage: str | None, steps: int, root: Path, as_json: bool) -> None:
    """What is wrong with this machine; with --resume, whether a stage that is killed and run again ends as if it had not been."""
    if config is not None:
        _rehearse(config, overrides, stage, steps, root, as_json)
        return
    if overrides or stage is not None:
        raise UserError(f"{overrides[0] if overrides else '--stage'}: is for --resume CONFIG only; leave it out")
    from posttrain import doctor

    findings = []
    for finding in doctor.examine(root):
        findings.append(finding)
        if not as_json:
            _print_finding(finding)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    if faults := [finding for finding in findings if finding.state == "fault"]:
        raise UserError(f"{faults[0].what}: {faults[0].found}; {faults[0].mend}")


def _print_finding(finding: "Finding") -> None:
    colour = {"ok": "green", "warning": "yellow", "fault": "red"}[finding.state]
    mend = f"; {finding.mend}" if finding.mend else ""
    click.echo(f"  {click.style(f'{finding.state:8}', colour)} {finding.what}: {_one_line(finding.found)}{mend}")


@cli.command("nodes")
@_config
@_overrides
@_root
@_json
def nodes_command(config: Path, overrides: tuple[str, ...], root: Path, as_json: bool) -> None:
    """Whether the nodes that stages run on fit together: libraries, code, shared disk, clocks, GPUs, and their speed."""
    from posttrain.nodes import check_nodes, refuse

    pipeline = read_pipeline(config, overrides)
    widest = max(plan(pipeline, root), key=lambda node: node.num_processes)
    launcher = widest.launcher
    models = {
        (source.model, source.revision) for source in pipeline.sources.values() if isinstance(source, ModelSource) and source.revision
    }
    if isinstance(launcher, SlurmLauncher):
        from posttrain.launch.slurm import node_command

        slurm, mounts = launcher, [Path.cwd(), root.absolute()]
        findings = check_nodes(
            root.absolute(),
            [f"node {number} of {launcher.num_nodes}" for number in range(1, launcher.num_nodes + 1)],
            lambda directory: node_command(slurm, directory, mounts, is_job=False),
            num_gpus=launcher.gpus_per_node,
            models=sorted(models),
            is_again=True,
        )
    elif isinstance(launcher, LocalLauncher):
        here = [socket.gethostname()] * widest.num_processes
        findings = check_nodes(root.absolute(), here, None, num_gpus=0, models=sorted(models), is_again=True)
    else:
        raise UserError(f"launcher.kind: {launcher.kind}, whose nodes cannot be asked from here; this is for slurm and local")
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            _print_finding(finding)
    refuse(findings)


def _rehearse(config: Path, overrides: Sequence[str], stage: str | None, steps: int, root: Path, as_json: bool) -> None:
    import tempfile

    from posttrain.recipe import TrainingConfig
    from posttrain.rehearsal import Rehearsal, few_steps

    pipeline = read_pipeline(config, overrides)
    if not isinstance(pipeline.launcher, LocalLauncher):
        raise UserError(f"launcher.kind: {pipeline.launcher.kind}, and a rehearsal is for this machine; give `launcher={{kind: local}}`")
    training = [node.name for node in plan(pipeline, root) if isinstance(node.config, TrainingConfig)]
    if not training:
        raise UserError(f"{config}: no stage of it trains, so there is nothing to kill")
    if stage is not None and stage not in training:
        raise UserError(f"--stage {stage}: no stage of that name trains; {nearest(stage, training)}")
    stage = stage or training[0]
    short = training[: training.index(stage) + 1]
    few = [f"stages.{name}.{setting}={value}" for name in short for setting, value in few_steps(steps).items()]
    with disk.explain_disk_errors("the rehearsal"):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rehearsal.", dir=root) as scratch:
            directory = Path(scratch, pipeline.run, stage)
            command = [sys.executable, str(Path(__file__).resolve())]
            rehearsal = Rehearsal(command, [str(config), *overrides, *few, "smoke=false"], directory, Path(scratch), steps)
            differences = rehearsal.differences((lambda _: None) if as_json else click.echo)
    if as_json:
        click.echo(json.dumps({"stage": stage, "exact": not differences, "differences": differences}, indent=1))
    elif not differences:
        click.echo(f"{stage}: resume is exact: the same bytes in every published file, and the same loss at every step")
    if differences:
        raise StageFailed(f"stages.{stage}: resume is not exact: {'; '.join(differences)}")


def _tokenizing_policy(node: Node) -> tuple[Node | Pinned, Any]:
    """The nearest policy above a stage that is there to be read, and the config that a chat contract would be established by."""
    first, entry = node.config, node.inputs["policy"][0]
    # What is made of several policies is known once it is there.
    while isinstance(entry, Node) and "policy" in entry.inputs and not artifact.read_artifact(entry.directory):
        first, entry = entry.config, entry.inputs["policy"][0]
    return entry, first


def _check_files(entry: Node | Pinned) -> None:
    """Raise `UserError` where the output of a finished stage, which is about to be read, is not what was published."""
    if isinstance(entry, Node) and (finished := artifact.read_artifact(entry.directory)):
        hashes = disk.HashCache(entry.root / ".hashes.json")
        artifact.check_files(finished, hashes)
        hashes.save()


def _trained(node: Node) -> str:
    """Which weights a stage trains, and which it keeps frozen as its reference; nothing for one that trains none."""
    if not isinstance(node.config, TrainingConfig):
        return ""
    (start,), lora = node.inputs["policy"], node.config.lora
    what = f"all of {start.name}" if lora is None else f"adapters on {start.name}{' in 4 bits' if lora.load_in_4bit else ''}"
    return what if node.stage.reference is None else f"{what}; reference: {node.inputs[node.stage.reference][0].name}, frozen"


def _plan_row(node: Node, decision: Decision) -> dict[str, Any]:
    return {
        "stage": node.name,
        "kind": node.stage.kind,
        "action": decision.action,
        "why": decision.why,
        "fingerprint": node.fingerprint,
        "inputs": {role: [entry.name for entry in entries] for role, entries in node.inputs.items()},
    }


def _recorded_stages(root: Path) -> list[Path]:
    """The directories of all stages that were begun, or given to a cluster."""
    begun = {path.parent for path in root.glob("*/*/stage.json")}
    return sorted(begun | {path.parents[2] / path.parent.name for path in root.glob(f"*/{ledger.JOBS}/*/job.json")})


def _fates(run: Path) -> Mapping[str, "Fate"]:
    """What became of the jobs of a run, by stage; nothing where it never had one."""
    if not (run / ledger.JOBS).is_dir():
        return {}
    from posttrain.launch import jobs

    return jobs.fates(run)


def _recorded_row(directory: Path) -> dict[str, Any]:
    attempt = ledger.read_attempt(directory)
    action, why = _recorded_state(directory)
    return {
        "run": directory.parent.name,
        "stage": directory.name,
        "kind": attempt.kind if attempt else "",
        "action": action,
        "why": why,
        "fingerprint": attempt.fingerprint if attempt else None,
        "inputs": {role: [e["name"] for e in entries] for role, entries in attempt.inputs.items()} if attempt else {},
        **_state(directory),
        "smoke": str(found) if (found := smoke.read_found(directory)) else None,
    }


def _recorded_state(directory: Path) -> tuple[Action, str]:
    """What a run would do about a stage whose config is not known here."""
    if holder := ledger.lease_holder(directory):
        return "running", f"being built by {holder}"
    if finished := artifact.read_artifact(directory):
        fault = next(artifact.faults(finished, None), None)
        return ("damaged", fault) if fault else ("skip", f"finished {finished.finished}")
    if state := _resumable(directory):
        return "resume", f"from {state}"
    return "run", "left nothing to resume"


def _state(directory: Path) -> dict[str, Any]:
    finished = artifact.read_artifact(directory)
    try:
        progress = disk.read_json(directory / "progress.json")
    except ValueError:
        progress = None
    return {
        "metrics": dict(finished.metrics) if finished else {},
        "progress": progress,
        "output": str(finished.output) if finished else None,
        **({"verdict": verdict.words} if finished and (verdict := read_verdict(finished.output)) else {}),
        **({"selected": selection.words} if finished and (selection := read_selection(directory)) else {}),
    }


def _progress_text(row: Mapping[str, Any]) -> str:
    progress = row["progress"]
    if row["output"] is not None:
        return "finished"  # whatever phase was its last
    if not progress:
        return ""
    steps = f" {progress['step']}/{progress['num_steps']}" if progress.get("num_steps") else ""
    at = f"{progress['phase']}{steps}"
    return at if row["action"] == "running" else f"stopped at {at}"


def _show_results(console: "Console", selected: Sequence[Node], config: Path, overrides: Sequence[str]) -> None:
    finished = [node for node in selected if artifact.read_artifact(node.directory)]
    for node in finished:
        if node.stage.output != "dataset":
            _show_table(node, console)
    policies = [node.name for node in finished if node.stage.output == "policy"]
    if policies:
        again = " ".join([str(config), *overrides])
        console.print(f"talk to it:  python pipeline.py chat {again} --stage {policies[-1]}", highlight=False, soft_wrap=True)


def _tell_rounding(node: Node, done: artifact.Artifact, console: "Console") -> None:
    """Say so where a model that was published in a coarse type is not quite the one that was trained."""
    drift = done.metrics.get("handoff_logit_drift", 0.0)
    if drift > NOTABLE_DRIFT and getattr(node.config, "save_dtype", None) != "float32":
        console.print(
            f"  {node.name}: what is published answers a little otherwise than what was trained: logits differ by {drift:.2g} of their "
            f"spread, as weights are rounded to the type of the input; stages.{node.name}.save_dtype: float32 keeps them whole",
            highlight=False,
            soft_wrap=True,
        )


def _show_table(node: Node, console: "Console") -> None:
    """Print what a finished stage has to tell, where it has a table."""
    path = node.directory / artifact.OUTPUT / "table.json"
    if path.is_file():
        content = disk.read_json(path)
        _print_table(content["columns"], content["rows"])
        for note in content["notes"]:
            console.print(note, highlight=False, soft_wrap=True)


def _console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    # What users write may hold square brackets, which are not markup. A pipe or a log file has no width: lines there are not broken.
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(markup=False, stderr=stderr) if is_terminal else Console(markup=False, width=10_000, no_color=True, stderr=stderr)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if sys.stdout.isatty():
        _print_fitted(columns, rows)
        return
    from rich.cells import cell_len  # how many columns of a terminal a text takes

    lines = [[_one_line(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        click.echo(f"  {'   '.join(cells)}".rstrip())


def _print_fitted(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in colours, its cells broken to the width of the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    colours = {"run": "cyan", "resume": "cyan", "rebuild": "yellow", "running": "magenta"}
    colours |= dict.fromkeys(("drift", "damaged", "blocked"), "red")
    table = Table(*columns, box=box.SIMPLE_HEAD)
    action = columns.index("action") if "action" in columns else None
    for row in rows:
        table.add_row(*(Text(cell, colours.get(cell, "green")) if index == action else cell for index, cell in enumerate(row)))
    _console().print(table)


def _stop(signum: int) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # `timeout` sends it twice, and stages are being stopped in order by then
    if why := ledger.lost_lease():
        raise ledger.LeaseLost(why)
    raise Preempted(f"by {signal.Signals(signum).name}")


def main() -> int:
    """Run one command; the exit code says whose turn it is: 0 done, 1 crash, 2 your input, 3 a gate, 75 run again."""
    try:
        with heed_signals(_stop):
            cli(standalone_mode=False)
        return EXIT_DONE
    except UserError as error:
        click.echo(f"error: {_one_line(str(error))}", err=True)
        return EXIT_USER
    except click.ClickException as error:
        click.echo(f"error: {_one_line(error.format_message()).rstrip('.')}; --help says what there is", err=True)
        return EXIT_USER
    except (Preempted, click.Abort, KeyboardInterrupt) as stopped:
        click.echo(f"stopped: {str(stopped) or 'interrupted'}; run the same command again to go on", err=True)
        return EXIT_PREEMPTED
    except GateFailed as failure:
        click.echo(f"gate failed: {_one_line(str(failure))}", err=True)
        return EXIT_GATE
    except StageFailed as failure:
        click.echo(f"failed: {_one_line(str(failure))}", err=True)
        return EXIT_CRASH


def _one_line(message: str) -> str:
    """`message` with what would break the line, or play tricks on a terminal, written as an escape."""
    if message.isprintable():
        return message
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)


def entry() -> None:
    """The installed command `posttrain`."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
