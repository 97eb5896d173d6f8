"""Jobs: what a run has given to Slurm, and what became of that. No process need be alive to tell.

    <root>/<run>/.jobs/<stage>/   pipeline.json   the resolved pipeline file that the job works from, whatever is edited later
                                  script.sbatch   what was given to Slurm
                                  job.json        the job: its number, those it waits for, and whether it was cancelled
                                  ended.json      how its driver ended, where it lived to say so

Each is of the last job of that stage. Slurm forgets a job minutes after its end, and not every node can ask it: then what lies here speaks.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain import artifact, disk, ledger
from posttrain.error import EXIT_CRASH, EXIT_DONE, EXIT_PREEMPTED, EXIT_USER, Preempted, StageFailed, UserError, heed_signals
from posttrain.launch.slurm import Refused, Script, call
from posttrain.progress import Watcher
from posttrain.provenance import now

if TYPE_CHECKING:
    from rich.console import Console

OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")
"""States in which a job neither runs nor will."""
ASK_EVERY_S = 5.0
SHOW_EVERY_S = 0.5
WORD_WITHIN_S = 15.0
"""How long a network disk may take to show what another node wrote last."""


@dataclass(frozen=True)
class Job:
    """A stage's last job, as it was submitted."""

    stage: str
    number: str
    log: str
    submitted: str
    after: dict[str, str] = field(default_factory=dict)
    """The stages whose jobs it waits for, and the numbers of these."""
    cancelled: bool = False
    """Whether it was asked to end for good, so that it must not requeue itself."""


@dataclass(frozen=True)
class Queued:
    """What Slurm says of a job."""

    state: str
    where: str
    """The nodes that it runs on, or in parentheses why it does not."""

    @property
    def is_over(self) -> bool:
        """Whether it neither runs nor will."""
        return self.state in OVER


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


def _read_end(run: Path, job: Job) -> dict[str, Any] | None:
    """Exit code and last words of the driver of that very job; None where it left none."""
    try:
        ended = disk.read_sealed(_of_stage(run, job.stage) / "ended.json")
    except (OSError, ValueError):
        return None
    return ended if ended and ended["job"] == job.number else None


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Be the only one who submits jobs of the run while the block runs. Raises `UserError` where another does."""
    directory = run / ledger.JOBS
    with disk.explain_disk_errors(str(directory)):
        directory.mkdir(parents=True, exist_ok=True)
        with ledger.lease(directory):
            yield


# --- asking Slurm ----------------------------------------------------------------------------------------------------


def ask(numbers: Iterable[str]) -> dict[str, Queued]:
    """What Slurm says of those of the jobs that it knows. Raises `UserError` where it cannot be asked."""
    wanted = ",".join(numbers)
    if not wanted:
        return {}
    try:
        said = call("squeue", "--noheader", "--states=all", f"--jobs={wanted}", "--format=%i|%T|%R")
    except Refused as refused:
        if "Invalid job id" in str(refused):
            return {}
        raise
    found = [line.strip().split("|", 2) for line in said.splitlines()]
    return {number: Queued(state, where) for number, state, where in found}


def active(run: Path) -> dict[str, Job]:
    """The stages that have a job which waits or runs. Raises `UserError` where Slurm cannot be asked."""
    jobs = read_jobs(run)
    known = ask(job.number for job in jobs.values())
    return {stage: job for stage, job in jobs.items() if job.number in known and not known[job.number].is_over}


def fates(run: Path) -> dict[str, Fate]:
    """What became of the last job of each stage, as far as can be told from here."""
    jobs = read_jobs(run)
    known: dict[str, Queued] | None
    try:
        known = ask(job.number for job in jobs.values())
    except UserError:
        known = None
    found: dict[str, Fate] = {}
    for job in sorted(jobs.values(), key=lambda job: int(job.number)):  # after those that it waits for
        above = {stage: found[stage] for stage, number in job.after.items() if stage in found and found[stage].job == number}
        state, why = _fate(job, _read_end(run, job), known, above)
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
        return "unknown", "Slurm cannot be asked here"
    return "failed", f"{queued.state if queued else 'it ended'}, and its driver left no word; its log is {job.log}"


# --- where one submits -----------------------------------------------------------------------------------------------


def snapshot(run: Path, stage: str) -> Path:
    """Where the pipeline file that a stage's job works from is kept."""
    return _of_stage(run, stage) / "pipeline.json"


def submit(run: Path, script: Script, after: Mapping[str, str], pipeline: Mapping[str, Any]) -> Job:
    """Give a script to Slurm, and write down the job that it became. `after` are the stages whose jobs it waits for.

    To be called while the run is `held`. Raises `UserError` where Slurm refuses it.
    """
    path = _of_stage(run, script.stage) / "script.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    script.log.parent.mkdir(parents=True, exist_ok=True)
    disk.write_json(snapshot(run, script.stage), pipeline)
    disk.write_text(path, script.text())
    try:
        number = call("sbatch", "--parsable", str(path)).split(";")[0].strip()
    except Refused as refused:
        raise Refused(f"stages.{script.stage}: {refused}; the script is {path}") from None
    job = Job(script.stage, number, str(script.log).replace("%j", number), now(), dict(after))
    _write_job(run, job)
    return job


def cancel(run: Path, jobs: Sequence[Job]) -> list[str]:
    """Ask jobs to end for good: those that wait are taken from the queue, those that run save first. Says of each what was done."""
    said = []
    for job in sorted(jobs, key=lambda job: -int(job.number)):  # first those that wait for others
        _write_job(run, replace(job, cancelled=True))
        call("scancel", "--state=PENDING", job.number)
        queued = ask([job.number]).get(job.number)
        if queued is not None and queued.state == "RUNNING":
            call("scancel", "--batch", "--signal=TERM", job.number)
            said.append(f"{job.stage}  job {job.number} on {queued.where} was asked to save and end")
        else:
            said.append(f"{job.stage}  job {job.number} was taken from the queue")
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
    while ((ended := _read_end(run, job)) is None or not _is_seen(run, job, ended)) and time.monotonic() < deadline:
        time.sleep(SHOW_EVERY_S)
    if ended is None:
        how = last.state if last else "Slurm knows it no more"
        raise StageFailed(f"stages.{job.stage}: job {job.number} ended ({how}) without a word of its driver; its log is {job.log}")
    if ended["code"] == EXIT_USER:
        raise UserError(ended["message"])
    if ended["code"] == EXIT_PREEMPTED:
        raise Preempted(ended["message"])
    if ended["code"] != EXIT_DONE:
        raise StageFailed(ended["message"])


def _follow(run: Path, job: Job, watcher: Watcher, console: "Console") -> Queued | None:
    """Show how a job gets on until it is over; the last that Slurm said of it."""
    said, last, times_over = "", None, 0
    while True:
        try:
            queued = ask([job.number]).get(job.number)
            last = queued or last
            times_over = times_over + 1 if queued is None or queued.is_over else 0
            line = f"job {job.number} is {queued.state.lower()} {queued.where}" if queued else f"job {job.number} is known no more"
        except UserError as error:  # Slurm may be restarted meanwhile
            line = str(error)
        if line != said:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
            said = line
        # Between its end and its place in the queue a job that is requeued may look as if it were over.
        ended = _read_end(run, job)
        if times_over > 1 or (times_over and ended is not None and ended["code"] != EXIT_PREEMPTED):
            return last
        until = time.monotonic() + ASK_EVERY_S
        while time.monotonic() < until:
            if last is not None and last.state == "RUNNING":
                watcher.show()
            time.sleep(SHOW_EVERY_S)


def _is_seen(run: Path, job: Job, ended: Mapping[str, Any]) -> bool:
    """Whether what a driver says that it finished is to be seen from here."""
    return ended["code"] != EXIT_DONE or artifact.read_artifact(run / job.stage) is not None


# --- in the job ------------------------------------------------------------------------------------------------------


@contextmanager
def reported(run: Path, stage: str) -> Iterator[None]:
    """Leave word of how the driver of a stage's job ends, and requeue the job where the driver was asked to make room."""
    number = os.environ.get("SLURM_JOB_ID")
    if number is None:
        raise UserError("step: is what a job of Slurm does; `submit` makes jobs of the stages")
    path = _of_stage(run, stage) / "ended.json"

    def tell(code: int, message: str) -> None:
        with suppress(OSError):  # on a full disk the exit code still speaks
            disk.write_sealed(path, {"job": number, "code": code, "message": message, "ended": now()})

    path.unlink(missing_ok=True)  # it tells of the start before
    try:
        yield
        tell(EXIT_DONE, "")
    except Preempted as stopped:
        with heed_signals(lambda signum: None):
            fault = "another has its stage" if isinstance(stopped, ledger.LeaseLost) else _requeue(run, stage, number)
            if fault:
                print(f"job {number} is not requeued: {fault}", flush=True)
                tell(EXIT_PREEMPTED, str(stopped))
        raise
    except UserError as error:
        tell(EXIT_USER, str(error))
        raise
    except BaseException as error:
        tell(EXIT_CRASH, str(error) if isinstance(error, StageFailed) else f"{type(error).__name__}: {error}")
        raise


def _requeue(run: Path, stage: str, number: str) -> str | None:
    """Requeue this very job; why not, where it is not."""
    job = read_jobs(run).get(stage)
    if job is not None and job.number == number and job.cancelled:
        return "it was cancelled"
    try:
        queued = ask([number]).get(number)
        # Else Slurm itself ended it: it is cancelled, out of time, or requeued already.
        if queued is None or queued.state != "RUNNING":
            return f"it is {queued.state.lower() if queued else 'known no more'}"
        call("scontrol", "requeue", number)
    except UserError as error:
        return str(error)
    return None


def wait_for_lease(directory: Path, console: "Console") -> None:
    """Wait while the driver of a job that was requeued may still be at the stage: on a node that is lost, its lease has to run out."""
    deadline = time.monotonic() + 2 * ledger.LEASE_EXPIRES_S
    said = False
    while (holder := ledger.lease_holder(directory)) and time.monotonic() < deadline:
        if not said:
            console.print(f"  waiting for the lease of {holder}", markup=False, highlight=False)
            said = True
        time.sleep(1)
