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

from posttrain.config import SlurmLauncher
from posttrain.error import EXIT_PREEMPTED, Preempted, StageFailed, UserError, heed_signals
from posttrain.heartbeat import Lookout, describe, num_fruitless, read_beat
from posttrain.launch.local import LIBRARIES, POLL_S, SAVE_WITHIN_S
from posttrain.launch.one_launch import Following, following, is_published
from posttrain.launch.queue import Queued, Refused, call
from posttrain.launch.words import raise_words
from posttrain.ledger import Attempt, LeaseLost
from posttrain.nodes import check_nodes, python_path, refuse
from posttrain.worker import CORES

if TYPE_CHECKING:
    from rich.console import Console

NODES_WITHIN_MIN = 15
"""Time limit of a job that only looks at nodes, in minutes."""
KILL_WITHIN_S = 60.0
"""How long srun may take to end its ranks by force."""
ENDED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+)")
"""What srun says of ranks that end otherwise than well: node, ranks and how."""
STOPPED = (f"Exited with exit code {EXIT_PREEMPTED}", "Terminated", "User defined signal 2")
"""How ranks end that are asked to; by the signal itself where they do not listen yet."""


# --- the commands of Slurm -------------------------------------------------------------------------------------------


def _call(*command: str) -> str:
    return call(*command, cluster="Slurm", check="scontrol ping")


class SlurmQueue:
    """Slurm, by its commands."""

    name = "Slurm"

    def ask(self, numbers: Sequence[str]) -> dict[str, Queued]:
        """What `squeue` says of them."""
        try:
            said = _call("squeue", "--noheader", "--states=all", f"--jobs={','.join(numbers)}", "--format=%i|%T|%R")
        except Refused as refused:
            if "Invalid job id" in str(refused):
                return {}
            raise
        found = [line.strip().split("|", 2) for line in said.splitlines()]
        return {number: Queued(state, where) for number, state, where in found}

    def give(self, path: Path) -> str:
        """The number that `sbatch` gives it."""
        return _call("sbatch", "--parsable", str(path)).split(";")[0].strip()

    def withdraw(self, number: str) -> str | None:
        """A plain `scancel` would end the ranks along with the driver, so the driver alone is told."""
        _call("scancel", "--state=PENDING", number)
        queued = self.ask([number]).get(number)
        if queued is None or queued.state != "RUNNING":
            return None
        _call("scancel", "--batch", "--signal=TERM", number)
        return queued.where

    def here(self) -> str | None:
        """As Slurm tells each process of a job."""
        return os.environ.get("SLURM_JOB_ID")

    def again(self, number: str) -> str | None:
        """Requeue it, where Slurm still calls it running: else it was ended for good, and would be raised from the dead."""
        try:
            queued = self.ask([number]).get(number)
            if queued is None or queued.state != "RUNNING":
                return f"Slurm says that it is {queued.state.lower() if queued else 'known no more'}"
            _call("scontrol", "requeue", number)
        except UserError as error:
            return str(error)
        return None


# --- what a job is made of: pure functions ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """All that the script of a job says."""

    run: str
    stage: str
    launcher: SlurmLauncher
    output: Path
    """`%j` in its name stands for the number of the job."""
    directory: Path
    """Where it runs: paths of the pipeline file are relative to it."""
    command: Sequence[str]
    """The driver."""
    after: Sequence[str]
    """Numbers of the jobs that must end well before."""

    file = "script.sbatch"

    @property
    def placeholder(self) -> str:
        """Numbers are Slurm's to give."""
        return f"JOB-OF-{self.stage}"

    def log(self, number: str) -> str:
        """The file that `--output` names."""
        return str(self.output).replace("%j", number)

    def text(self) -> str:
        """The script, as `sbatch` takes it."""
        launcher = self.launcher
        options = {
            "--job-name": f"{self.run}.{self.stage}",
            "--output": _unpattern(self.output),
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


def node_command(launcher: SlurmLauncher, directory: Path, mounts: Sequence[Path], *, is_job: bool) -> list[str]:
    """What starts a task of `posttrain.nodes` on each node: of the job that this is, or else of one that it waits for."""
    cores = launcher.cpus_per_process
    options = {
        "--partition": launcher.partition,
        "--account": launcher.account,
        "--qos": launcher.qos,
        "--gpus-per-node": launcher.gpus_per_node or None,
        "--time": NODES_WITHIN_MIN,
    }
    asked = [] if is_job else [*(f"{name}={value}" for name, value in options.items() if value is not None), *launcher.sbatch]
    srun = ["srun", *asked, f"--nodes={launcher.num_nodes}", f"--ntasks={launcher.num_nodes}", "--ntasks-per-node=1"]
    srun += [f"--cpus-per-task={cores * launcher.tasks_per_node}"] if cores else []
    python = launcher.python or (sys.executable if launcher.container is None else "python")
    inside = _in_container(launcher, mounts)
    return [*srun, "--mpi=none", "--export=ALL", "--wait=0", *inside, python, "-m", "posttrain.nodes", str(directory)]


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
    hosts = _call("scontrol", "show", "hostnames", nodes).split()

    def launch(directory: Path, attempt: Attempt) -> None:
        _refuse_to_repeat(directory, attempt, launcher.max_requeues)
        port = _free_port(hosts[0])
        mounts = [Path.cwd(), Path(attempt.root)]
        command = rank_command(launcher, directory, address=hosts[0], port=port, mounts=mounts, alone=is_published(directory))
        environment = {
            **os.environ,
            **LIBRARIES,
            **({CORES: str(launcher.cpus_per_process)} if launcher.cpus_per_process else {}),
            "MASTER_ADDR": hosts[0],
            "MASTER_PORT": str(port),
            "PYTHONPATH": python_path(),
        }
        console.print(f"  {shlex.join(command)}", markup=False, highlight=False, soft_wrap=True)
        with following(directory, attempt, console, examine=lambda logs: _examine(hosts, logs)) as follow:
            try:
                if launcher.check_nodes and len(hosts) > 1:
                    _check_nodes(launcher, hosts, attempt, mounts, console)
                _run_ranks(command, environment, directory, attempt, follow, console)
            except StageFailed as failure:
                if silent := _silent(hosts):
                    raise Preempted(f"stages.{attempt.name}: no answer from {', '.join(silent)}, so {failure}") from failure
                raise

    yield launch


def _check_nodes(launcher: SlurmLauncher, hosts: Sequence[str], attempt: Attempt, mounts: Sequence[Path], console: "Console") -> None:
    """Raise `UserError` where a node of the job is not like the others."""
    sources = [entry["source"] for role in attempt.inputs.values() for entry in role]
    findings = check_nodes(
        Path(attempt.root),
        hosts,
        lambda directory: node_command(launcher, directory, mounts, is_job=True),
        num_gpus=launcher.gpus_per_node,
        models=sorted((source["model"], source["revision"]) for source in sources if source.get("revision")),
    )
    for finding in findings:
        console.print(f"  nodes: {finding.state}: {finding.what}: {finding.found}", markup=False, highlight=False, soft_wrap=True)
    refuse(findings)


def _refuse_to_repeat(directory: Path, attempt: Attempt, most: int) -> None:
    """Raise `StageFailed` where this job was requeued more often than that, in a row, and came no further by it."""
    times = min(num_fruitless(directory, attempt), int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    if times > most:
        last = read_beat(directory / "logs" / f"attempt_{attempt.number - 1}", 0)
        where = describe(last) if last else "its start"
        said = f"stages.{attempt.name}: was started {times + 1} times and came no further than to {where}"
        raise StageFailed(f"{said}; its logs are in {directory / 'logs'}; launcher.max_requeues allows more")


def _run_ranks(
    command: Sequence[str],
    environment: dict[str, str],
    directory: Path,
    attempt: Attempt,
    follow: Following,
    console: "Console",
) -> None:
    """Run the ranks to their end. Raises as a launcher does."""
    ranks = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env=environment)
    said: list[str] = []
    listener = threading.Thread(target=_listen, args=(ranks.stderr, said), daemon=True)
    listener.start()
    try:
        while ranks.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                ranks.wait(POLL_S)
            follow.look()
    except (LeaseLost, StageFailed):
        _end(ranks)  # another driver builds the stage, and must find nobody else at it; or they hang
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
    _raise_failure(directory, attempt, ranks.returncode, said, follow.lookout)


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


def _raise_failure(directory: Path, attempt: Attempt, code: int, said: Sequence[str], lookout: Lookout) -> None:
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
        begins = int(re.split("[,-]", first[2])[0])
        hint = "; out of memory is the usual reason" if how == "Killed" else ""
        raise lookout.died(begins, f"rank {first[2]} ended on {first[1]} ({how}){hint}")
    raise_words(directory, attempt, lookout)
    last = said[-1] if said else f"srun ended with exit code {code}"
    raise StageFailed(f"{at}: {last}; the logs are in {logs}")


def _examine(hosts: Sequence[str], logs: Path) -> dict[int, str]:
    """What the processes of all ranks do, as each node says of its own; those have written down their stacks then."""
    said = _on_each(hosts, sys.executable, "-m", "posttrain.heartbeat", str(logs))
    return {int(rank): process for rank, process in (line.split(maxsplit=1) for line in said.splitlines())}


def _silent(hosts: Sequence[str]) -> list[str]:
    """Which nodes of the job start nothing any more. Slurm itself finds that out later than the ranks that wait for one another."""
    if len(hosts) == 1:
        return []
    heard = _on_each(hosts, "printenv", "SLURMD_NODENAME").split()
    return [host for host in hosts if host not in heard]


def _on_each(hosts: Sequence[str], *command: str) -> str:
    """What a short command prints on all nodes of the job, beside what runs there; of those that answer in time."""
    srun = ["srun", "--overlap", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1", "--mpi=none", "--wait=0"]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    try:
        done = subprocess.run(
            [*srun, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=KILL_WITHIN_S, env=environment
        )
    except subprocess.TimeoutExpired as late:
        return late.stdout if isinstance(late.stdout, str) else (late.stdout or b"").decode()
    return done.stdout


def _free_port(host: str) -> int:
    """A TCP port that nobody listens on now at this node's own address."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
