"""The ledger: what the disk says of each stage of each run. Reading it needs no process to be alive.

    <root>/<run>/<stage>/   stage.json       what is being, or was last, attempted: all that a worker is told
                            lease.json       who is at it; its time of change is the heartbeat
                            prepared.json    which prepared data the attempt trains on
                            preflight.json   what they hold, and what of that is limited
                            checkpoints/     resumable state, private to the stage
                            output/          the finished output (output.partial/ while it is built)
                            output.json      size and hash of all that was published, until and after it is verified
                            artifact.json    written last: the stage finished
                            metrics.jsonl    one line for each logged step
                            tensorboard/     the same as event files, where the stage reports to TensorBoard
                            heldout.jsonl    what was measured on held-out rows, a line each time
                            selected.json    which step was published, of those that were measured
                            progress.json    phase, step and speed, for who watches
                            logs/attempt_N/  stdout and stderr of each rank, where it was last, and what was prepared ahead
                            smoke.json       how it fared when it was tried for two steps (`posttrain/smoke.py`)
    <root>/<run>/.old/<stage>/N/             what a rebuild moved aside
    <root>/<run>/.jobs/<stage>/              the stage's last job of Slurm (`posttrain/launch/jobs.py`)
    <root>/<run>/.smoke/<stage>/             the stage while it is tried, and the logs of one that failed (`posttrain/smoke.py`)
    <root>/.prepared/  <root>/.hashes.json   shared by all runs

Every file is replaced as a whole, so a reader at any moment sees a state that once was. Nothing here asks a file system for
locks, which network disks have or have not: of many that want the same, a hard link that can be made only once chooses one.
"""

import hashlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from posttrain import disk
from posttrain.artifact import EVIDENCE, OUTPUT, RECORD, Artifact, check_files, fingerprint_source, read_artifact
from posttrain.artifact import FILE as ARTIFACT_FILE
from posttrain.config import DataSource, ModelSource, read_source, validate
from posttrain.error import Preempted, UserError
from posttrain.provenance import now
from posttrain.stage import Input, Stage, StageConfig, StageContext, load_stage

HEARTBEAT_S = 5.0
LEASE_EXPIRES_S = 60.0
LEASE = "lease.json"
PREFLIGHT_FILE = "preflight.json"
JOBS = ".jobs"
BUILT = (
    "stage.json",
    "prepared.json",
    "reference.json",
    PREFLIGHT_FILE,
    "layout.json",
    "checkpoints",
    OUTPUT,
    "output.partial",
    RECORD,
    *EVIDENCE,
    ARTIFACT_FILE,
    "metrics.jsonl",
    "heldout.jsonl",
    "progress.json",
    "tensorboard",
)
"""All that a build leaves in the stage directory, beside its logs."""


@dataclass(frozen=True)
class Attempt:
    """The content of `stage.json`: everything that a worker is told, and what the next decision compares with."""

    name: str
    kind: str
    run: str
    root: str
    version: int
    fingerprint: str
    identity: dict[str, Any]
    config: dict[str, Any]
    inputs: dict[str, list[dict[str, Any]]]
    """Role to its inputs: name, kind, fingerprint, id, and the source or output to read."""
    held_out: list[dict[str, Any]]
    """Data sets that evaluations of the pipeline measure on, each like an input."""
    num_processes: int
    number: int
    started: str
    token: str
    ahead: list[dict[str, Any]] = field(default_factory=list)
    """Stages that come later and whose rows can be prepared meanwhile: what `Foreseen` holds, as plain JSON."""
    is_smoke: bool = False
    """Whether the stage is only tried, on its longest samples."""
    earlier: list[dict[str, Any]] = field(default_factory=list)
    """Attempts at the same build before this one: of each `started`, `seconds` until it was last heard of, and `num_processes`."""

    def logs(self, directory: Path) -> Path:
        """Where the ranks of this attempt at the stage in `directory` write what they say."""
        return directory / "logs" / f"attempt_{self.number}"

    @property
    def input_builds(self) -> dict[str, dict[str, str]]:
        """Name of each input to its `id` and `fingerprint`."""
        return {entry["name"]: {"id": entry["id"], "fingerprint": entry["fingerprint"]} for role in self.inputs.values() for entry in role}


def read_attempt(directory: Path) -> Attempt | None:
    """The last attempt in the stage directory, or None. A `stage.json` that cannot be read counts as none."""
    try:
        record = disk.read_json(directory / "stage.json")
        return None if record is None else Attempt(**record)
    except (ValueError, TypeError):
        return None


def start_attempt(
    directory: Path, *, stage: Stage[Any], name: str, run: str, root: Path, fingerprint: str, identity: Mapping[str, Any],
    config: StageConfig, inputs: dict[str, list[dict[str, Any]]], num_processes: int,
    held_out: Sequence[dict[str, Any]] = (), ahead: Sequence[dict[str, Any]] = (), is_smoke: bool = False,
) -> Attempt:  # fmt: skip
    """Write `stage.json` for a new attempt, with a log directory of its own."""
    logs = directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    numbers = [path.name.removeprefix("attempt_") for path in logs.glob("attempt_*")]
    number = 1 + max((int(text) for text in numbers if text.isdecimal()), default=0)
    (logs / f"attempt_{number}").mkdir()
    earlier = _earlier(directory, fingerprint)
    (directory / "progress.json").unlink(missing_ok=True)  # it tells of the attempt before
    attempt = Attempt(
        name=name,
        kind=stage.kind,
        run=run,
        root=str(root),
        version=stage.version,
        fingerprint=fingerprint,
        identity=dict(identity),
        config=config.model_dump(mode="json"),
        inputs=inputs,
        held_out=list(held_out),
        num_processes=num_processes,
        number=number,
        started=now(),
        token=uuid.uuid4().hex,
        ahead=list(ahead),
        is_smoke=is_smoke,
        earlier=earlier,
    )
    disk.write_json(directory / "stage.json", asdict(attempt))
    return attempt


def _earlier(directory: Path, fingerprint: str) -> list[dict[str, Any]]:
    """What the next attempt says of those before it, at what it is to build."""
    last = read_attempt(directory)
    if last is None or last.fingerprint != fingerprint:
        return []
    heard = max(
        (path.stat().st_mtime for path in (directory / "progress.json", *last.logs(directory).glob("*")) if path.is_file()), default=0.0
    )
    seconds = max(0.0, heard - datetime.fromisoformat(last.started).timestamp())
    return [*last.earlier, {"started": last.started, "seconds": seconds, "num_processes": last.num_processes}]


def open_context(directory: Path, *, rank: int, local_rank: int, world_size: int) -> tuple[Attempt, Stage[Any], StageContext[Any]]:
    """What a worker needs, read from `stage.json` alone."""
    attempt = read_attempt(directory)
    if attempt is None:
        raise UserError(f"{directory}: holds no readable stage.json; start the stage with `run`")
    stage = load_stage(attempt.kind, attempt.name)
    config = validate(stage.config, attempt.config, f"stages.{attempt.name}")
    inputs = {role: tuple(map(_read_input, entries)) for role, entries in attempt.inputs.items()}
    context = StageContext(
        name=attempt.name,
        config=config,
        inputs=inputs,
        directory=directory,
        root=Path(attempt.root),
        held_out=tuple(map(_read_input, attempt.held_out)),
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        is_smoke=attempt.is_smoke,
    )
    return attempt, stage, context


@dataclass(frozen=True)
class Foreseen:
    """A stage that comes later, with what is known of it already."""

    stage: Stage[Any]
    name: str
    config: StageConfig
    policy: Input
    """Its input policy, or the nearest policy above that is there: the chat contract travels unchanged."""
    contract: dict[str, str | None] | None
    """Settings by which the stage that reads `policy` establishes the contract; None where that is the foreseen stage itself."""
    data: Input


def foreseen(attempt: Attempt) -> list[Foreseen]:
    """What `stage.json` says of later stages."""
    return [
        Foreseen(
            stage=(stage := load_stage(record["kind"], record["name"])),
            name=record["name"],
            config=validate(stage.config, record["config"], f"stages.{record['name']}"),
            policy=_read_input(record["policy"]),
            contract=record["contract"],
            data=_read_input(record["data"]),
        )
        for record in attempt.ahead
    ]


def _read_input(entry: dict[str, Any]) -> Input:
    return Input(entry["name"], entry["kind"], entry["fingerprint"], read_source(entry["name"], entry["source"]))


def output_source(artifact: Artifact) -> ModelSource | DataSource:
    """How a later stage reads the output of a finished one."""
    output = artifact.output.resolve()
    if artifact.kind == "dataset":
        return read_source(str(output), {"data": str(output / "rows.jsonl")})
    return ModelSource(model=str(output))


def list_finished(root: Path) -> dict[str, list[Artifact]]:
    """All finished builds under `root`, by fingerprint."""
    found: dict[str, list[Artifact]] = {}
    for path in sorted(root.glob(f"*/*/{ARTIFACT_FILE}")):
        try:
            artifact = read_artifact(path.parent)
        except UserError:
            continue  # another run's damage is that run's to report
        if artifact:
            found.setdefault(artifact.fingerprint, []).append(artifact)
    return found


def check_inputs(attempt: Attempt) -> None:
    """Raise `UserError` where what the attempt is to read is not what it was planned on: another build, changed or damaged.

    To be called before anything is read. Reads only files that changed since they last were.
    """
    hashes = disk.HashCache(Path(attempt.root) / ".hashes.json")
    for entry in (entry for role in attempt.inputs.values() for entry in role):
        name, source = entry["name"], read_source(entry["name"], entry["source"])
        if entry["id"] == entry["fingerprint"]:
            if fingerprint_source(source, f"sources.{name}", hashes) != entry["fingerprint"]:
                raise UserError(f"sources.{name}: changed since stages.{attempt.name} was planned; run the same command again")
            continue
        path = Path(source.model if isinstance(source, ModelSource) else source.paths[0])
        finished = read_artifact(path.parent if path.name == OUTPUT else path.parent.parent)
        if finished is None or finished.id != entry["id"]:
            raise UserError(f"stages.{name}: was built again since stages.{attempt.name} was planned; run the same command again")
        check_files(finished, hashes)
    hashes.save()


# --- the lease -------------------------------------------------------------------------------------------------------
#
# `lease.json` holds who is at it. Whoever finds that process dead links its own record to a name made of the dead one's
# content: a link that can be made once only, however many try and however late. Then, alone, it replaces `lease.json`. A
# holder is thus the last of a chain that begins at `lease.json`, most often the first of it too.


class LeaseLost(Preempted):
    """Another process took the stage over, so nothing more may be written to it: not even what is at hand may be saved."""


@dataclass(frozen=True)
class Holder:
    """Who holds a stage's lease."""

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@dataclass(frozen=True)
class _Link:
    """One lease of the chain, as it is on disk."""

    path: Path
    content: bytes
    beat: float
    """When it was last touched, by the clock of whoever keeps the disk."""

    @property
    def successor(self) -> Path:
        """Where the one that takes over from this one puts itself."""
        return self.path.with_name(f".lease.after.{hashlib.sha256(self.content).hexdigest()[:32]}")

    def holder(self, now_s: float) -> Holder | None:
        """Who it names, if that process is alive at that time."""
        try:
            record = json.loads(self.content)
            holder = Holder(record["host"], record["pid"], record["since"])
            # A process of this machine can be asked after: it may have been suspended for long, or have died just now.
            alive = _born(record["pid"]) == record["born"] if record["machine"] == _machine() else now_s - self.beat <= LEASE_EXPIRES_S
        except (ValueError, KeyError, TypeError):
            return None  # no `lease` wrote it
        return holder if alive else None


def _chain(directory: Path) -> list[_Link]:
    """The leases of a stage, each taken over from the one before; empty where there is none."""
    links: list[_Link] = []
    path = directory / LEASE
    while True:
        try:
            with path.open("rb") as file:
                links.append(_Link(path, file.read(), os.fstat(file.fileno()).st_mtime))
        except FileNotFoundError:
            return links
        path = links[-1].successor


def lease_holder(directory: Path) -> Holder | None:
    """Who is at work on the stage, or None where nobody is or the heartbeat stopped. Writes nothing, so it goes by the clock here."""
    try:
        chain = _chain(directory)
    except OSError:
        return None
    return chain[-1].holder(time.time()) if chain else None


_lost: list[str] = []


def lost_lease() -> str | None:
    """Why this process must not go on, where the heartbeat found that its lease is another's; SIGTERM was sent to it then."""
    return _lost[0] if _lost else None


@contextmanager
def lease(directory: Path) -> Iterator[None]:
    """Hold the stage's lease, with a heartbeat, for as long as the block runs. Raises `UserError` where another has it."""
    pid = os.getpid()
    mine = {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "born": _born(pid),
        "since": now(),
        "token": uuid.uuid4().hex,
    }
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(directory, mine, ended), daemon=True)
    try:  # from before the file is there: a signal may come at any moment
        _take(directory, mine)
        beat.start()
        yield
    finally:
        ended.set()
        if beat.is_alive():
            beat.join()
        _lost.clear()
        with suppress(OSError):  # where the disk is gone, the lease ends by its silence
            if _holds(directory, mine):
                (directory / LEASE).unlink(missing_ok=True)


def _take(directory: Path, mine: Mapping[str, Any]) -> None:
    aside = directory / f".lease.{mine['token']}"
    taken = UserError(f"{directory}: another process began to build it just now; wait for it, or stop it")
    try:
        disk.write_json(aside, mine)
        before = _chain(directory)
        # Just written, so it bears the time of the clock that heartbeats are dated by, whatever the clock here says.
        if before and (holder := before[-1].holder(aside.stat().st_mtime)):
            raise UserError(f"{directory}: being built by {holder}; wait for it, or stop it")
        target = before[-1].successor if before else directory / LEASE
        try:
            os.link(aside, target)
        except FileExistsError:
            if aside.stat().st_nlink == 1:  # else it is there: a network disk that was asked twice says so
                raise taken from None
        if not _holds(directory, mine):  # what it was to take over from had been taken over, and its traces taken away
            target.unlink(missing_ok=True)
            raise taken
        if before:
            aside.replace(directory / LEASE)
            for link in before:
                link.successor.unlink(missing_ok=True)
    finally:
        aside.unlink(missing_ok=True)


def _beat(directory: Path, mine: Mapping[str, Any], ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_S):
        try:
            if _holds(directory, mine):
                os.utime(directory / LEASE)
                continue
            if not directory.is_dir():
                continue
        except OSError:
            continue  # a full or briefly absent disk must not end the work; the lease lives LEASE_EXPIRES_S without a beat
        _lost.append(f"{directory} was taken over by {lease_holder(directory) or 'another process'}, since this one was silent for long")
        os.kill(os.getpid(), signal.SIGTERM)
        return


def _holds(directory: Path, mine: Mapping[str, Any]) -> bool:
    """Whether the lease is still this one: a machine that slept for long may have lost it to another. Raises `OSError`."""
    chain = _chain(directory)
    try:
        return bool(chain and json.loads(chain[-1].content) == mine)
    except ValueError:
        return False


def _machine() -> str:
    """What tells apart the machines, or containers, in which a process id means another process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return f"no /proc here; process {os.getpid()}"  # nobody else can ask after it, so its heartbeat alone counts


def _born(pid: int) -> str | None:
    """When a process began, in clock ticks since the machine did; None where there is no such process, or it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else rest[18]
