"""The runner, read top to bottom: Node -> plan -> decide -> execute -> commands.

    python pipeline.py plan configs/quickstart.yaml       what would run, and why
    python pipeline.py run configs/quickstart.yaml        run what is not finished; safe to repeat

Imports no torch.
"""

import errno
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from posttrain import artifact, disk, ledger
from posttrain.checkpoint import last_complete
from posttrain.config import (
    DataSource,
    LauncherConfig,
    ModelSource,
    PipelineConfig,
    fields_help,
    identity,
    nearest,
    read_pipeline,
    validate,
)
from posttrain.error import EXIT_CRASH, EXIT_DONE, EXIT_PREEMPTED, EXIT_USER, Preempted, StageFailed, UserError, heed_signals
from posttrain.stage import ArtifactKind, Input, Stage, StageConfig, load_stage

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.launch import Launch

Action = Literal["run", "resume", "skip", "reuse", "rebuild", "drift", "running"]
WORK: tuple[Action, ...] = ("run", "resume", "rebuild")
NUM_AHEAD = 2
"""Later stages whose data are prepared while a stage trains."""


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
    num_processes: int
    identity: Mapping[str, Any]
    """Kind of the stage, and what of its config changes the bytes of its output."""
    fingerprint: str
    run: str
    root: Path
    directory: Path

    @property
    def reads(self) -> list["Node | Pinned"]:
        """All inputs, of all roles."""
        return [entry for entries in self.inputs.values() for entry in entries]


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
    nodes = []
    num_processes = config.launcher.num_processes or num_devices()
    for name, raw in config.stages.items():
        known[name] = node = _wire(name, dict(raw), config, known, root, num_processes)
        nodes.append(node)
    return nodes


def _wire(
    name: str, raw: dict[str, Any], config: PipelineConfig, known: Mapping[str, Node | Pinned], root: Path, num_processes: int
) -> Node:
    at = f"stages.{name}"
    stage = load_stage(raw.get("kind", name), f"{at}.kind" if "kind" in raw else at)
    raw.pop("kind", None)
    wires = raw.pop("inputs", {})
    settings = validate(stage.config, raw, at)
    inputs = _read_wires(f"{at}.inputs", wires, stage, config, known)
    num_processes = settings.num_processes or num_processes
    settings.check(num_processes, at)
    identical = {"kind": stage.kind, **identity(settings, at)}
    recipe = {
        "version": stage.version,
        "config": identical,
        "inputs": {role: [entry.fingerprint for entry in entries] for role, entries in inputs.items()},
    }
    fingerprint = disk.hash_json(recipe)
    directory = root / config.run / name
    return Node(name, stage, settings, inputs, num_processes, identical, fingerprint, config.run, root, directory)


def _read_wires(
    at: str, wires: object, stage: Stage[Any], config: PipelineConfig, known: Mapping[str, Node | Pinned]
) -> dict[str, tuple[Node | Pinned, ...]]:
    if not isinstance(wires, dict):
        raise UserError(f"{at}: must map each of {', '.join(stage.inputs)} to a source or an earlier stage")
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
    return max(1, len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))


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
    return Decision("skip", f"finished {finished.finished}", finished.id)


def _find_finished(
    node: Node, wanted: dict[str, dict[str, str]], list_finished: Callable[[Path], Mapping[str, list[artifact.Artifact]]]
) -> artifact.Artifact | None:
    """A finished build of this very recipe from these very inputs, in another directory under the root."""
    found = list_finished(node.root).get(node.fingerprint, [])
    return next((build for build in found if build.directory != node.directory and build.inputs == wanted and build.output.is_dir()), None)


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
    if (directory / artifact.OUTPUT).is_dir():
        return "its published output"
    last = last_complete(directory / "checkpoints")
    return f"the checkpoint of step {last.step}" if last else None


def decide_all(nodes: Sequence[Node], rebuild: Sequence[str] = ()) -> list[tuple[Node, Decision]]:
    """A decision for each node, each knowing those above it."""
    builds: dict[str, str | None] = {}
    decided = []
    list_finished = functools.cache(ledger.list_finished)  # read once for all nodes
    for node in nodes:
        builds.update({entry.name: entry.fingerprint for entry in node.reads if isinstance(entry, Pinned)})
        decision = decide(node, builds, rebuild, list_finished)
        builds[node.name] = decision.build
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


def execute(nodes: Sequence[Node], selected: Sequence[Node], rebuild: Sequence[str], launcher: LauncherConfig, console: "Console") -> None:
    """Do what `decide` says for each selected node, in order. The only function with side effects."""
    from posttrain.launch import open_launcher

    decisions = {node.name: decision for node, decision in decide_all(nodes, rebuild)}
    for node in nodes:
        if node in selected:
            _refuse(node, decisions[node.name])
        elif decisions[node.name].action != "skip" and any(node in later.reads for later in selected):
            action, why = decisions[node.name].action, decisions[node.name].why
            raise UserError(f"stages.{node.name}: a chosen stage reads it, and it is not ready ({action}: {why}); choose it too")
    with ExitStack() as stack:
        launch = None
        if any(decisions[node.name].action in WORK for node in selected):
            launch = stack.enter_context(open_launcher(launcher, console))
        builds: dict[str, str | None] = {name: decision.build for name, decision in decisions.items()}
        for index, node in enumerate(selected):
            builds.update({entry.name: entry.fingerprint for entry in node.reads if isinstance(entry, Pinned)})
            decision = decide(node, builds, rebuild)
            _refuse(node, decision)
            console.print(f"{node.name}  {decision.action}: {decision.why}", highlight=False, soft_wrap=True)
            if decision.action in WORK:
                if launch is None:  # what was to be reused is gone since
                    launch = stack.enter_context(open_launcher(launcher, console))
                to_do = [later for later in selected[index + 1 :] if decisions[later.name].action in WORK]
                _build(node, decision.action, launch, measured_on(nodes), to_do)
            elif decision.found:
                _reuse(node, decision.found)
            done = artifact.read_artifact(node.directory)
            builds[node.name] = done.id if done else None


def _refuse(node: Node, decision: Decision) -> None:
    if decision.action == "drift":
        raise UserError(f"{decision.why}; build it again with --rebuild {node.name}, or give the run a new name with run=NAME")
    if decision.action == "running":
        raise UserError(f"stages.{node.name}: {decision.why}; wait for it, or stop it")


def measured_on(nodes: Sequence[Node]) -> list[Pinned]:
    """The data sets that stages which write a report measure on: none of their rows should be trained on."""
    read = {entry.name: entry for node in nodes if node.stage.output == "report" for entry in node.reads if isinstance(entry, Pinned)}
    return [entry for entry in read.values() if isinstance(entry.source, DataSource)]


def _build(node: Node, action: Action, launch: "Launch", held_out: Sequence[Pinned], to_do: Sequence[Node]) -> None:
    with _held(node):
        if action != "rebuild" and artifact.read_artifact(node.directory):
            raise UserError(f"stages.{node.name}: another process finished it just now; run the same command again to go on from there")
        if action != "resume":
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
        for name in ledger.EVIDENCE:
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


def _move_aside(node: Node) -> None:
    disk.move_aside([node.directory / name for name in ledger.BUILT], node.root / node.run / ".old" / node.name)


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


def _start(node: Node, held_out: Sequence[Pinned] = (), ahead: Sequence[dict[str, Any]] = ()) -> ledger.Attempt:
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


# --- commands --------------------------------------------------------------------------------------------------------


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False)
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


@cli.command("plan")
@_config
@_overrides
@_only
@_from
@_until
@_rebuild
@_root
@_json
def plan_command(
    config: Path,
    overrides: tuple[str, ...],
    only: str | None,
    start: str | None,
    until: str | None,
    rebuild: tuple[str, ...],
    root: Path,
    as_json: bool,
) -> None:
    """What would run, and why. Changes nothing."""
    nodes = plan(read_pipeline(config, overrides), root)
    selected = select(nodes, only, start, until, rebuild)
    chosen = {node.name for node in selected}
    rows = [(node, decision) for node, decision in decide_all(nodes, rebuild) if node.name in chosen]
    if as_json:
        click.echo(json.dumps([_plan_row(node, decision) for node, decision in rows], indent=1))
        return
    lines = [(node.name, node.stage.kind, " ".join(e.name for e in node.reads), decision.action, decision.why) for node, decision in rows]
    _print_table(("stage", "kind", "reads", "action", "why"), lines)


@cli.command("run")
@_config
@_overrides
@_only
@_from
@_until
@_rebuild
@_root
def run_command(
    config: Path, overrides: tuple[str, ...], only: str | None, start: str | None, until: str | None, rebuild: tuple[str, ...], root: Path
) -> None:
    """Run all that is not finished. Safe to repeat: finished stages are skipped, cut-off ones resumed."""
    pipeline = read_pipeline(config, overrides)
    nodes = plan(pipeline, root)
    selected = select(nodes, only, start, until, rebuild)
    console = _console()
    execute(nodes, selected, rebuild, pipeline.launcher, console)
    _show_results(console, selected, config, overrides)


@cli.command("status")
@click.argument("config", type=click.Path(path_type=Path), required=False)
@_overrides
@_root
@_json
def status_command(config: Path | None, overrides: tuple[str, ...], root: Path, as_json: bool) -> None:
    """Stages, progress and metrics; without CONFIG, of every run under the root."""
    if config is None:
        rows = [_recorded_row(path.parent) for path in sorted(root.glob("*/*/stage.json"))]
    else:
        nodes = plan(read_pipeline(config, overrides), root)
        rows = [{**_plan_row(node, decision), **_state(node.directory)} for node, decision in decide_all(nodes)]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    lines = []
    for row in rows:
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in list(row["metrics"].items())[:4])
        label = f"{row['run']}/{row['stage']}" if "run" in row else row["stage"]
        lines.append((label, row["kind"], row["action"], _progress_text(row["progress"]), metrics, row["output"] or ""))
    _print_table(("stage", "kind", "action", "progress", "metrics", "output"), lines)


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
@_overrides
@click.option("--stage", metavar="STAGE", help="Whose policy to talk to; by default the last finished one.")
@click.option("--prompt", metavar="TEXT", help="Ask this one thing, print the answer and end.")
@_root
def chat_command(config: Path, overrides: tuple[str, ...], stage: str | None, prompt: str | None, root: Path) -> None:
    """Talk to a stage's policy."""
    nodes = plan(read_pipeline(config, overrides), root)
    policies = [node for node in nodes if node.stage.output == "policy"]
    if stage is not None:
        policies = [node for node in policies if node.name == stage]
        if not policies:
            raise UserError(f"--stage {stage}: no stage of that name makes a policy; {nearest(stage, [n.name for n in nodes])}")
    finished = [node for node in policies if artifact.read_artifact(node.directory)]
    if not finished:
        raise UserError(f"{stage or config}: no finished policy to talk to; run the pipeline first")
    from posttrain.generate import chat

    chat(finished[-1].directory / artifact.OUTPUT, name=finished[-1].name, prompt=prompt)


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


def _tokenizing_policy(node: Node) -> tuple[Node | Pinned, Any]:
    """The nearest policy above a stage that is there to be read, and the config that a chat contract would be established by."""
    first, entry = node.config, node.inputs["policy"][0]
    while isinstance(entry, Node) and not artifact.read_artifact(entry.directory):
        first, entry = entry.config, entry.inputs["policy"][0]
    return entry, first


def _plan_row(node: Node, decision: Decision) -> dict[str, Any]:
    return {
        "stage": node.name,
        "kind": node.stage.kind,
        "action": decision.action,
        "why": decision.why,
        "fingerprint": node.fingerprint,
        "inputs": {role: [entry.name for entry in entries] for role, entries in node.inputs.items()},
    }


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
    }


def _recorded_state(directory: Path) -> tuple[Action, str]:
    """What a run would do about a stage whose config is not known here."""
    if holder := ledger.lease_holder(directory):
        return "running", f"being built by {holder}"
    if finished := artifact.read_artifact(directory):
        return "skip", f"finished {finished.finished}"
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
    }


def _progress_text(progress: dict[str, Any] | None) -> str:
    if not progress:
        return ""
    steps = f" {progress['step']}/{progress['num_steps']}" if progress.get("num_steps") else ""
    return f"{progress['phase']}{steps}"


def _show_results(console: "Console", selected: Sequence[Node], config: Path, overrides: Sequence[str]) -> None:
    for node in selected:
        report = node.directory / artifact.OUTPUT / "table.json"
        if report.is_file():
            content = disk.read_json(report)
            _print_table(content["columns"], content["rows"])
            for note in content["notes"]:
                console.print(note, highlight=False, soft_wrap=True)
    policies = [node.name for node in selected if node.stage.output == "policy"]
    if policies:
        again = " ".join([str(config), *overrides])
        console.print(f"talk to it:  python pipeline.py chat {again} --stage {policies[-1]}", highlight=False, soft_wrap=True)


def _console() -> "Console":
    from rich.console import Console

    # What users write may hold square brackets, which are not markup. A pipe or a log file has no width: lines there are not broken.
    return Console(markup=False) if sys.stdout.isatty() else Console(markup=False, width=10_000, no_color=True)


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

    colours = {"run": "cyan", "resume": "cyan", "rebuild": "yellow", "drift": "red", "running": "magenta"}
    table = Table(*columns, box=box.SIMPLE_HEAD)
    action = columns.index("action") if "action" in columns else None
    for row in rows:
        table.add_row(*(Text(cell, colours.get(cell, "green")) if index == action else cell for index, cell in enumerate(row)))
    _console().print(table)


def _stop(signum: int) -> None:
    raise Preempted(f"stopped by {signal.Signals(signum).name}")


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
    except StageFailed as failure:
        click.echo(f"failed: {_one_line(str(failure))}", err=True)
        return EXIT_CRASH


def _one_line(message: str) -> str:
    """`message` with what would break the line, or play tricks on a terminal, written as an escape."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)


def entry() -> None:
    """The installed command `posttrain`."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
