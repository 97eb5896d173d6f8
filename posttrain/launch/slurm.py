"""The Slurm launcher: a job for each stage, with the driver inside of it.

    where one submits   sbatch, a script for each stage, after the jobs of the stages that it reads; then nothing stays alive
    in the job          the driver: decide again -> lease -> stage.json -> srun -> one worker a rank (prepare, run, verify)

SIGUSR2 some minutes before the time limit, or a preemption: the ranks save and end, and the job requeues itself. Where a node is
lost, Slurm requeues it, or the driver does, if the other ranks find out first. Slurm schedules and cancels; nothing here does.
What is known of jobs lies beside the stages (`posttrain/launch/jobs.py`).
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import posttrain
from posttrain import disk
from posttrain.artifact import FILE as ARTIFACT_FILE
from posttrain.artifact import OUTPUT
from posttrain.config import SlurmLauncher
from posttrain.error import EXIT_PREEMPTED, Preempted, StageFailed, UserError, heed_signals
from posttrain.launch.local import LIBRARIES, POLL_S, SAVE_WITHIN_S, tell_summary
from posttrain.ledger import PREFLIGHT_FILE, Attempt, LeaseLost
from posttrain.progress import Watcher
from posttrain.worker import CORES, ERROR_FILE

if TYPE_CHECKING:
    from rich.console import Console

ANSWER_WITHIN_S = 120.0
"""How long a command of Slurm may take to answer."""
KILL_WITHIN_S = 60.0
"""How long srun may take to end its ranks by force."""
ENDED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+)")
"""What srun says of ranks that end otherwise than well: node, ranks and how."""
STOPPED = (f"Exited with exit code {EXIT_PREEMPTED}", "Terminated", "User defined signal 2")
"""How ranks end that are asked to; by the signal itself where they do not listen yet."""


# --- the commands of Slurm -------------------------------------------------------------------------------------------


class Refused(UserError):
    """A command of Slurm said no."""


def call(*command: str) -> str:
    """What a command of Slurm prints. Raises `UserError` where it is missing or does not answer, `Refused` where it says no."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWER_WITHIN_S)
    except OSError:
        raise UserError(f"{command[0]}: is not on the PATH here; use a node that has Slurm's commands, or launcher.kind=local") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: no answer within {ANSWER_WITHIN_S:.0f} s; is Slurm up? `scontrol ping` says so") from None
    if done.returncode:
        raise Refused(f"{command[0]}: {(done.stderr.strip().splitlines() or ['refused without a word'])[-1]}")
    return done.stdout


# --- what a job is made of: pure functions ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """All that the script of a job says."""

    run: str
    stage: str
    launcher: SlurmLauncher
    log: Path
    """`%j` in its name stands for the number of the job."""
    directory: Path
    """Where it runs: paths of the pipeline file are relative to it."""
    command: Sequence[str]
    """The driver."""
    after: Sequence[str]
    """Numbers of the jobs that must end well before."""

    def text(self) -> str:
        """The script, as `sbatch` takes it."""
        launcher = self.launcher
        options = {
            "--job-name": f"{self.run}.{self.stage}",
            "--output": _unpattern(self.log),
            "--open-mode": "append",
            "--chdir": str(self.directory),
            "--partition": launcher.partition,
            "--account": launcher.account,
            "--qos": launcher.qos,
            "--nodes": launcher.num_nodes,
            "--ntasks-per-node": launcher.tasks_per_node,
            "--gpus-per-node": launcher.gpus_per_node or None,
            "--cpus-per-task": launcher.cpus_per_process,
            "--time": launcher.time,
            "--signal": f"B:USR2@{launcher.save_before_s}",
            "--dependency": ":".join(["afterok", *self.after]) if self.after else None,
        }
        given = [f"{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
        given += ["--requeue", "--kill-on-invalid-dep=yes", *launcher.sbatch]
        return "\n".join(
            [
                "#!/bin/bash",
                f"# Stage {self.stage} of the run {self.run}, as `submit` wrote it. The driver below decides again what is to be done.",
                *(f"#SBATCH {option}" for option in given),
                "",
                "# The time limit is near, and nothing has begun yet.",
                "trap 'scontrol requeue \"$SLURM_JOB_ID\"' USR2",
                *launcher.setup,
                "# In place of this shell, so that the signal before the time limit reaches it.",
                f"exec {shlex.join(self.command)}",
                "",
            ]
        )


def _unpattern(path: Path) -> str:
    """`path`, whose name alone is a pattern to `sbatch`."""
    return f"{str(path.parent).replace('%', '%%')}/{path.name}"


def rank_command(
    launcher: SlurmLauncher, directory: Path, *, address: str, port: int, mounts: Sequence[Path], alone: bool = False
) -> list[str]:
    """What starts the ranks of a stage in `directory` from within its job; with `alone`, one rank on the first node."""
    nodes, here = (1, 1) if alone else (launcher.num_nodes, launcher.tasks_per_node)
    cores = launcher.cpus_per_process
    worker = ["-m", "posttrain.worker", str(directory)]
    tasks_here, cores_each = here, cores
    if launcher.ranks == "torchrun":
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={address}:{port}", f"--rdzv-id={port}"]
        # It hands on what it is sent, and gives its workers the time to save.
        signals = ["--signals-to-handle=SIGTERM,SIGUSR2", f"--shutdown-timeout={SAVE_WITHIN_S:.0f}"]
        worker = ["-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={here}", *rendezvous, *signals, *worker]
        tasks_here, cores_each = 1, cores and cores * here
    python = launcher.python or (sys.executable if launcher.container is None else "python")
    srun = [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes * tasks_here}",
        f"--ntasks-per-node={tasks_here}",
        *([f"--cpus-per-task={cores_each}"] if cores_each else []),
        "--mpi=none",
        "--export=ALL",
        # The main rank verifies when the others are done; but if one fails, the others can only wait for it in vain.
        "--wait=0",
        "--kill-on-bad-exit=1",
    ]
    return [*srun, *_in_container(launcher, mounts), python, *worker]


def _in_container(launcher: SlurmLauncher, mounts: Sequence[Path]) -> list[str]:
    if launcher.container is None:
        return []
    paths = [*map(str, mounts), *launcher.container_mounts]
    if launcher.container_runtime == "pyxis":
        seen = ",".join(f"{path}:{path}" for path in paths)
        return [f"--container-image={launcher.container}", f"--container-mounts={seen}", f"--container-workdir={paths[0]}"]
    gpus = ["--nv"] if launcher.gpus_per_node else []
    return ["apptainer", "exec", *gpus, *(f"--bind={path}" for path in paths), f"--pwd={paths[0]}", launcher.container]


# --- in the job ------------------------------------------------------------------------------------------------------


@contextmanager
def slurm_launcher(launcher: SlurmLauncher, console: "Console") -> Iterator[Callable[[Path, Attempt], None]]:
    """The function that launches a stage on the nodes of the job that this process runs in."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if nodes is None:
        raise UserError("launcher.kind: slurm, and this is no job of Slurm; `submit` makes jobs of the stages")
    hosts = call("scontrol", "show", "hostnames", nodes).split()

    def launch(directory: Path, attempt: Attempt) -> None:
        is_published = (directory / OUTPUT).is_dir()
        if not is_published:
            (directory / PREFLIGHT_FILE).unlink(missing_ok=True)  # it tells of the attempt before
        port = _free_port(hosts[0])
        # What is published needs no other rank to be verified.
        mounts = [Path.cwd(), Path(attempt.root)]
        command = rank_command(launcher, directory, address=hosts[0], port=port, mounts=mounts, alone=is_published)
        environment = {
            **os.environ,
            **LIBRARIES,
            **({CORES: str(launcher.cpus_per_process)} if launcher.cpus_per_process else {}),
            "MASTER_ADDR": hosts[0],
            "MASTER_PORT": str(port),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(posttrain.__file__).parents[1]), os.environ.get("PYTHONPATH")])),
        }
        console.print(f"  {shlex.join(command)}", markup=False, highlight=False, soft_wrap=True)
        with Watcher(directory, attempt.name, console) as watcher:
            try:
                _run_ranks(command, environment, directory, attempt, watcher, console)
            except StageFailed as failure:
                if silent := _silent(hosts):
                    raise Preempted(f"stages.{attempt.name}: no answer from {', '.join(silent)}, so {failure}") from failure
                raise
        if not (directory / ARTIFACT_FILE).is_file():
            raise StageFailed(f"stages.{attempt.name}: ended without an artifact; its logs are in {attempt.logs(directory)}")

    yield launch


def _run_ranks(
    command: Sequence[str], environment: dict[str, str], directory: Path, attempt: Attempt, watcher: Watcher, console: "Console"
) -> None:
    """Run the ranks to their end. Raises as a launcher does."""
    ranks = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env=environment)
    said: list[str] = []
    listener = threading.Thread(target=_listen, args=(ranks.stderr, said), daemon=True)
    listener.start()
    is_told = (directory / OUTPUT).is_dir()
    try:
        while ranks.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                ranks.wait(POLL_S)
            watcher.show()
            if not is_told and (directory / PREFLIGHT_FILE).is_file():
                is_told = True
                tell_summary(directory, console)
    except LeaseLost:
        _end(ranks)  # another driver builds the stage, and must find nobody else at it
        raise
    except (Preempted, KeyboardInterrupt):
        with heed_signals(lambda signum: None):
            console.print("  asked to stop: the ranks save and end", highlight=False)
            ranks.send_signal(signal.SIGUSR2)  # which srun hands on
            with suppress(subprocess.TimeoutExpired):
                ranks.wait(SAVE_WITHIN_S)
            _end(ranks)
        raise
    listener.join(POLL_S)
    _raise_failure(directory, attempt, ranks.returncode, said)


def _end(ranks: subprocess.Popen[str]) -> None:
    """Kill the ranks that are left, by way of srun."""
    if ranks.poll() is None:
        ranks.terminate()
        try:
            ranks.wait(KILL_WITHIN_S)
        except subprocess.TimeoutExpired:
            ranks.kill()  # what is left of them ends with the job
            ranks.wait()


def _listen(stream: IO[str] | None, said: list[str]) -> None:
    """Hand on what srun says, and keep what it says of ranks."""
    for line in stream or []:
        sys.stderr.write(line)
        sys.stderr.flush()
        if line.startswith("srun: error:"):
            said.append(line.strip())


def _raise_failure(directory: Path, attempt: Attempt, code: int, said: Sequence[str]) -> None:
    """Raise what srun, its exit code and the ranks' own words say; nothing where all went well."""
    if code == 0:
        return
    at, logs = f"stages.{attempt.name}", attempt.logs(directory)
    # Who ended first is the reason for what comes after.
    first = next((found for line in said if (found := ENDED.match(line))), None)
    how = first[3] if first else ""
    if how in STOPPED:
        raise Preempted(f"{at} was asked to stop and saved its state")
    if first and not how.startswith("Exited with exit code"):
        raise StageFailed(f"{at}: rank {first[2]} ended on {first[1]} ({how}); the logs are in {logs}")
    begins = int(re.split("[,-]", first[2])[0]) if first else 0
    for rank in sorted(range(attempt.num_processes), key=lambda rank: rank != begins):
        if record := disk.read_json(logs / ERROR_FILE.format(rank=rank)):
            if record["kind"] == "user":
                raise UserError(record["message"])
            raise StageFailed(f"{at}: rank {rank}: {record['message']}; its log is {logs}/rank_{rank}.log")
    last = said[-1] if said else f"srun ended with exit code {code}"
    raise StageFailed(f"{at}: {last}; the logs are in {logs}")


def _silent(hosts: Sequence[str]) -> list[str]:
    """Which nodes of the job start nothing any more. Slurm itself finds that out later than the ranks that wait for one another."""
    if len(hosts) == 1:
        return []
    command = ["srun", "--overlap", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1", "--mpi=none"]
    try:
        done = subprocess.run(
            [*command, "--wait=0", "printenv", "SLURMD_NODENAME"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=KILL_WITHIN_S,
        )
    except subprocess.TimeoutExpired as late:
        heard = late.stdout if isinstance(late.stdout, str) else (late.stdout or b"").decode()
        return [host for host in hosts if host not in heard.split()]
    return [host for host in hosts if host not in done.stdout.split()]


def _free_port(host: str) -> int:
    """A TCP port that nobody listens on now at this node's own address."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
