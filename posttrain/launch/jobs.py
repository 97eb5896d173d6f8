"""Jobs: what a run has given to a cluster, and what became of that. No process need be alive to tell.

    <root>/<run>/.jobs/<stage>/   pipeline.json   the resolved pipeline file that the job works from, whatever is edited later
                                  script.sbatch   what was given to Slurm, or jobset.yaml, what to Kubernetes
                                  job.json        the job: its number, those it waits for, and whether it was cancelled
                                  started.json    what the pods of Kubernetes are to do, since its driver began
                                  ended.json      how its driver ended, where it lived to say so

Each is of the last job of that stage. A number is whatever the cluster calls a job by. Slurm forgets a job minutes after its end, and not
every node can ask: then what lies here speaks.
"""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain import artifact, disk, ledger
from posttrain.error import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_GATE,
    EXIT_PREEMPTED,
    EXIT_USER,
    GateFailed,
    Preempted,
    StageFailed,
    UserError,
    heed_signals,
)
from posttrain.launch.kubernetes import KubernetesQueue
from posttrain.launch.queue import Order, Queue, Queued, Refused
from posttrain.launch.slurm import SlurmQueue
from posttrain.progress import Watcher
from posttrain.provenance import now

if TYPE_CHECKING:
    from rich.console import Console

QUEUES: Mapping[str, Queue] = {"slurm": SlurmQueue(), "kubernetes": KubernetesQueue()}
"""The kinds of launchers that give a cluster jobs."""
ASK_EVERY_S = 5.0
SHOW_EVERY_S = 0.5
WORD_WITHIN_S = 15.0
"""How long a network disk may take to show what another node wrote last."""


@dataclass(frozen=True)
class Job:
    """A stage's last job, as it was submitted."""

    stage: str
    kind: str
    """Kind of its launcher."""
    number: str
    log: str
    submitted: str
    after: dict[str, str] = field(default_factory=dict)
    """The stages whose jobs it waits for, and the numbers of these."""
    cancelled: bool = False
    """Whether it was asked to end for good, so that it must not requeue itself."""


State = Literal["queued", "running", "done", "stopped", "failed", "cancelled", "unknown"]


@dataclass(frozen=True)
class Fate:
    """What became of a stage's last job."""

    job: str
    state: State
    why: str

    def __str__(self) -> str:
        return f"{self.job} {self.state}{f': {self.why}' if self.why else ''}"


# --- records ---------------------------------------------------------------------------------------------------------


def read_jobs(run: Path) -> dict[str, Job]:
    """The last job of each stage of the run in that directory, by stage. A record that was damaged counts as none."""
    return {path.parent.name: job for path in sorted((run / ledger.JOBS).glob("*/job.json")) if (job := _read_job(path))}


def _read_job(path: Path) -> Job | None:
    try:
        return Job(**disk.read_sealed(path))
    except (OSError, ValueError, TypeError):
        return None


def _write_job(run: Path, job: Job) -> None:
    disk.write_sealed(_of_stage(run, job.stage) / "job.json", asdict(job))


def _of_stage(run: Path, stage: str) -> Path:
    return run / ledger.JOBS / stage


def _read_end(run: Path, stage: str, number: str) -> dict[str, Any] | None:
    """Exit code and last words of the driver of the stage's job of that number, and its crashes so far; None where it left none."""
    try:
        ended = disk.read_sealed(_of_stage(run, stage) / "ended.json")
    except (OSError, ValueError):
        return None
    return ended if ended and ended["job"] == number else None


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Be the only one who submits jobs of the run while the block runs. Raises `UserError` where another does."""
    directory = run / ledger.JOBS
    with disk.explain_disk_errors(str(directory)):
        directory.mkdir(parents=True, exist_ok=True)
        with ledger.lease(directory):
            yield


# --- asking the cluster ----------------------------------------------------------------------------------------------


def ask(jobs: Collection[Job]) -> dict[str, Queued]:
    """What their clusters say of those of the jobs that they know. Raises `UserError` where one cannot be asked."""
    found: dict[str, Queued] = {}
    for kind, queue in QUEUES.items():
        if numbers := [job.number for job in jobs if job.kind == kind]:
            found |= queue.ask(numbers)
    return found


def active(run: Path) -> dict[str, Job]:
    """The stages that have a job which waits or runs. Raises `UserError` where the cluster cannot be asked."""
    jobs = read_jobs(run)
    known = ask(jobs.values())
    return {stage: job for stage, job in jobs.items() if job.number in known and not known[job.number].is_over}


def fates(run: Path) -> dict[str, Fate]:
    """What became of the last job of each stage, as far as can be told from here."""
    jobs = read_jobs(run)
    known: dict[str, Queued] | None
    try:
        known = ask(jobs.values())
    except UserError:
        known = None
    found: dict[str, Fate] = {}
    for job in _in_order(jobs.values()):
        above = {stage: found[stage] for stage, number in job.after.items() if stage in found and found[stage].job == number}
        state, why = _fate(job, _read_end(run, job.stage, job.number), known, above)
        found[job.stage] = Fate(job.number, state, why)
    return found


def _fate(job: Job, ended: Mapping[str, Any] | None, known: Mapping[str, Queued] | None, above: Mapping[str, Fate]) -> tuple[State, str]:
    queued = known.get(job.number) if known is not None else None
    if queued is not None and queued.state == "PENDING":
        waits = [stage for stage, fate in above.items() if fate.state in ("queued", "running")]
        return "queued", f"after {', '.join(waits)}" if waits else queued.where.strip("()")
    if queued is not None and not queued.is_over:
        return "running", queued.where if queued.state == "RUNNING" else queued.state.lower()
    if ended is not None and ended["code"] == EXIT_DONE:
        return "done", ""
    if ended is not None and ended["code"] != EXIT_PREEMPTED:
        return "failed", ended["message"]
    if ended is not None:
        return "cancelled" if job.cancelled else "stopped", ended["message"]
    broken = next((f"{stage} {fate.state}" for stage, fate in above.items() if fate.state in ("failed", "cancelled", "stopped")), None)
    if broken or job.cancelled or (queued is not None and queued.state == "CANCELLED"):
        return "cancelled", broken or "asked for"
    if known is None:
        return "unknown", f"{QUEUES[job.kind].name} cannot be asked here"
    return "failed", f"{queued.state if queued else 'it ended'}, and its driver left no word; its log is {job.log}"


def _in_order(jobs: Collection[Job]) -> list[Job]:
    """The last jobs of stages, each after those that it waits for."""
    named = {job.stage: job for job in jobs}
    waits = {
        stage: [above for above, number in job.after.items() if above in named and named[above].number == number]
        for stage, job in named.items()
    }
    return [named[stage] for stage in TopologicalSorter(waits).static_order()]


# --- where one submits -----------------------------------------------------------------------------------------------


def snapshot(run: Path, stage: str) -> Path:
    """Where the pipeline file that a stage's job works from is kept."""
    return _of_stage(run, stage) / "pipeline.json"


def submit(run: Path, kind: str, order: Order, after: Mapping[str, str], pipeline: Mapping[str, Any]) -> Job:
    """Give an order to the cluster, and write down the job that it became. `after` are the stages whose jobs it waits for.

    To be called while the run is `held`. Raises `UserError` where the cluster refuses it.
    """
    path = _of_stage(run, order.stage) / order.file
    path.parent.mkdir(parents=True, exist_ok=True)
    (run / order.stage / "logs").mkdir(parents=True, exist_ok=True)
    disk.write_json(snapshot(run, order.stage), pipeline)
    disk.write_text(path, order.text())
    try:
        number = QUEUES[kind].give(path)
    except Refused as refused:
        raise Refused(f"stages.{order.stage}: {refused}; the script is {path}") from None
    job = Job(order.stage, kind, number, order.log(number), now(), dict(after))
    _write_job(run, job)
    return job


def cancel(run: Path, jobs: Sequence[Job]) -> list[str]:
    """Ask jobs to end for good: those that wait are taken from the queue, those that run save first. Says of each what was done."""
    said = []
    for job in reversed(_in_order(jobs)):  # first those that wait for others
        _write_job(run, replace(job, cancelled=True))
        where = QUEUES[job.kind].withdraw(job.number)
        told = f"on {where} was asked to save and end" if where else "was taken from the queue"
        said.append(f"{job.stage}  job {job.number} {told}")
    return said


def follow(run: Path, job: Job, console: "Console") -> None:
    """Show how a job gets on, to its end. Raises what its driver ended with; when interrupted, after its state was saved."""
    with Watcher(run / job.stage, job.stage, console) as watcher:
        try:
            last = _follow(run, job, watcher, console)
        except (KeyboardInterrupt, Preempted):
            for line in cancel(run, [job]):
                console.print(line, markup=False, highlight=False)
            with heed_signals(lambda signum: None):
                _follow(run, job, watcher, console)
            raise
    deadline = time.monotonic() + WORD_WITHIN_S
    while ((ended := _read_end(run, job.stage, job.number)) is None or not _is_seen(run, job, ended)) and time.monotonic() < deadline:
        time.sleep(SHOW_EVERY_S)
    if ended is None:
        how = last.state if last else f"{QUEUES[job.kind].name} knows it no more"
        raise StageFailed(f"stages.{job.stage}: job {job.number} ended ({how}) without a word of its driver; its log is {job.log}")
    if ended["code"] == EXIT_USER:
        raise UserError(ended["message"])
    if ended["code"] == EXIT_PREEMPTED:
        raise Preempted(ended["message"])
    if ended["code"] == EXIT_GATE:
        raise GateFailed(ended["message"])
    if ended["code"] != EXIT_DONE:
        raise StageFailed(ended["message"])


def _follow(run: Path, job: Job, watcher: Watcher, console: "Console") -> Queued | None:
    """Show how a job gets on until it is over; the last that Slurm said of it."""
    said, last, times_over = "", None, 0
    while True:
        try:
            queued = ask([job]).get(job.number)
            last = queued or last
            times_over = times_over + 1 if queued is None or queued.is_over else 0
            line = f"job {job.number} is {queued.state.lower()} {queued.where}" if queued else f"job {job.number} is known no more"
        except UserError as error:  # it may be restarted meanwhile
            line = str(error)
        if line != said:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
            said = line
        # Between its end and its place in the queue a job that is requeued may look as if it were over.
        ended = _read_end(run, job.stage, job.number)
        if times_over > 1 or (times_over and ended is not None and ended["code"] != EXIT_PREEMPTED):
            return last
        until = time.monotonic() + ASK_EVERY_S
        while time.monotonic() < until:
            if last is not None and last.state == "RUNNING":
                watcher.show()
            time.sleep(SHOW_EVERY_S)


def _is_seen(run: Path, job: Job, ended: Mapping[str, Any]) -> bool:
    """Whether what a driver says that it finished is to be seen from here."""
    return ended["code"] not in (EXIT_DONE, EXIT_GATE) or artifact.read_artifact(run / job.stage) is not None


# --- in the job ------------------------------------------------------------------------------------------------------


@contextmanager
def reported(run: Path, stage: str, kind: str, max_restarts: int) -> Iterator[None]:
    """Leave word of how the driver of a stage's job ends, and have the job begun again where the driver was asked to make room.

    `max_restarts` is how often the cluster begins it again after a crash.
    """
    queue = _queue(kind)
    number = queue.here()
    if number is None:
        raise UserError(f"step: is what a job of {queue.name} does; `submit` makes jobs of the stages")
    path = _of_stage(run, stage) / "ended.json"
    before = _read_end(run, stage, number)

    def tell(code: int, message: str) -> None:
        crashes = (before["crashes"] if before else 0) + (code == EXIT_CRASH)
        is_final = code != EXIT_CRASH or crashes > max_restarts
        record = {"job": number, "code": code, "message": message, "ended": now(), "crashes": crashes, "is_final": is_final}
        with suppress(OSError):  # on a full disk the exit code still speaks
            disk.write_sealed(path, record)

    path.unlink(missing_ok=True)  # it tells of the start before
    try:
        yield
        tell(EXIT_DONE, "")
    except Preempted as stopped:
        with heed_signals(lambda signum: None):
            fault = "another has its stage" if isinstance(stopped, ledger.LeaseLost) else _again(run, stage, queue, number)
            if fault:
                print(f"job {number} is not begun again: {fault}", flush=True)
            if fault or (before and before["crashes"]):  # how many there were must not be forgotten
                tell(EXIT_PREEMPTED, str(stopped))
        raise
    except UserError as error:
        tell(EXIT_USER, str(error))
        raise
    except GateFailed as failure:
        tell(EXIT_GATE, str(failure))
        raise
    except BaseException as error:
        tell(EXIT_CRASH, str(error) if isinstance(error, StageFailed) else f"{type(error).__name__}: {error}")
        raise


def _queue(kind: str) -> Queue:
    if kind not in QUEUES:
        raise UserError(f"launcher.kind: {kind} starts no jobs; `run` is what works through the stages there")
    return QUEUES[kind]


def _again(run: Path, stage: str, queue: Queue, number: str) -> str | None:
    """Have this very job begun again; why not, where it is not."""
    job = read_jobs(run).get(stage)
    if job is not None and job.number == number and job.cancelled:
        return "it was cancelled"
    return queue.again(number)


def wait_for_others(run: Path, stage: str, after: Mapping[str, str], console: "Console") -> None:
    """Wait until the jobs of other stages, by their numbers, have ended well. Raises `UserError` where one can do so no more.

    For a cluster that knows of no jobs that wait for others. A job that ends without a word of its driver is waited for.
    """
    left, said = dict(after), ""
    while left:
        for above, number in list(left.items()):
            if broken := _broken(run, above, number):
                job = read_jobs(run).get(stage)
                if job is not None:
                    _write_job(run, replace(job, cancelled=True))
                raise UserError(f"stages.{stage}: waits in vain for stages.{above}, whose job {number} {broken}")
            ended = _read_end(run, above, number)
            if ended is not None and ended["code"] == EXIT_DONE:
                del left[above]
        if left and (line := ", ".join(f"{above} (job {number})" for above, number in left.items())) != said:
            console.print(f"  waiting for {line}", markup=False, highlight=False, soft_wrap=True)
            said = line
        if left:
            time.sleep(ASK_EVERY_S)


def _broken(run: Path, stage: str, number: str) -> str | None:
    """Why a job cannot end well any more, as far as its stage's files tell."""
    job, ended = read_jobs(run).get(stage), _read_end(run, stage, number)
    if job is not None and job.number != number:
        return f"was followed by job {job.number}"
    if ended is not None and ended["code"] not in (EXIT_DONE, EXIT_PREEMPTED) and ended["is_final"]:
        return f"failed: {ended['message']}"
    return "was cancelled" if job is not None and job.cancelled and (ended is None or ended["code"] != EXIT_DONE) else None


def wait_for_lease(directory: Path, console: "Console") -> None:
    """Wait while the driver of a job that was requeued may still be at the stage: on a node that is lost, its lease has to run out."""
    deadline = time.monotonic() + 2 * ledger.LEASE_EXPIRES_S
    said = False
    while (holder := ledger.lease_holder(directory)) and time.monotonic() < deadline:
        if not said:
            console.print(f"  waiting for the lease of {holder}", markup=False, highlight=False)
            said = True
        time.sleep(1)
