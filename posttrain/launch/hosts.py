"""The launcher of hosts: on each of some machines that share their files, one torchrun, started by ssh from where the driver runs.

    driver -> ssh HOST -> python -m posttrain.tether -> torchrun -> one worker a rank (prepare, run, verify)

ssh hands on no signals, and what it has started outlives it. So torchrun is tethered to the other end of the connection: what the driver
says there is how many seconds ranks have to save and end, and where the connection breaks, because the driver or its machine is gone,
they have some too. A machine that is gone breaks its connection in turn; then the driver stops the others, and says which it was.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import posttrain
from posttrain.config import HostsLauncher
from posttrain.error import Preempted, StageFailed, UserError, heed_signals
from posttrain.launch.local import LIBRARIES, POLL_S, SAVE_WITHIN_S, STOP_WITHIN_S
from posttrain.launch.one_launch import following, is_published
from posttrain.launch.words import raise_words
from posttrain.ledger import Attempt, LeaseLost
from posttrain.worker import CORES

if TYPE_CHECKING:
    from rich.console import Console

OPTIONS = ("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=6")
"""A machine that says nothing for half a minute is gone."""
BROKEN = 255
"""Exit code of ssh itself; those of commands are theirs."""
KILL_WITHIN_S = 15.0
"""How long a machine may take beyond what its ranks have."""


# --- what is started: a pure function --------------------------------------------------------------------------------


def host_command(launcher: HostsLauncher, directory: Path, node: int, *, here: Path, alone: bool = False) -> list[str]:
    """What starts the ranks of one of the machines, in the directory `here`; with `alone`, one rank on it and none elsewhere."""
    nodes, each = (1, 1) if alone else (len(launcher.hosts), launcher.processes_per_host)
    python = launcher.python or sys.executable
    torchrun = [
        python,
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        f"--node-rank={node}",
        f"--nproc-per-node={each}",
        f"--master-addr={launcher.hosts[0].rpartition('@')[2]}",
        f"--master-port={launcher.port}",
        # It hands on what it is sent, and gives its workers the time to save.
        "--signals-to-handle=SIGTERM",
        f"--shutdown-timeout={SAVE_WITHIN_S:.0f}",
        "-m",
        "posttrain.worker",
        str(directory),
    ]
    variables = {
        **LIBRARIES,
        **({CORES: str(launcher.cpus_per_process)} if launcher.cpus_per_process else {}),
        "PYTHONPATH": str(Path(posttrain.__file__).parents[1]),
    }
    words = [f"{name}={value}" for name, value in variables.items()]
    lines = [*launcher.setup, f"cd {shlex.quote(str(here))} || exit 2"]
    lines.append(f"exec env {shlex.join([*words, python, '-m', 'posttrain.tether', *torchrun])}")
    return ["ssh", *OPTIONS, *launcher.ssh, launcher.hosts[node], "\n".join(lines)]


# --- where the driver runs -------------------------------------------------------------------------------------------


@contextmanager
def hosts_launcher(launcher: HostsLauncher, console: "Console", deadline: float) -> Iterator[Callable[[Path, Attempt], None]]:
    """The function that launches a stage on the machines. It raises `Preempted`, its state saved, so that all has ended by `deadline`, a
    time of the monotonic clock."""

    def launch(directory: Path, attempt: Attempt) -> None:
        alone = is_published(directory)
        nodes = 1 if alone else len(launcher.hosts)
        commands = [host_command(launcher, directory.absolute(), node, here=Path.cwd(), alone=alone) for node in range(nodes)]
        with following(directory, attempt, console, deadline=deadline) as follow:
            _run_hosts(launcher.hosts, commands, directory, attempt, follow.look)

    yield launch


def _run_hosts(
    hosts: Sequence[str], commands: Sequence[Sequence[str]], directory: Path, attempt: Attempt, look: Callable[[], None]
) -> None:
    """Run what is started on the machines to its end. Raises as a launcher does."""
    sessions: list[subprocess.Popen[bytes]] = []
    within_s = 0.0
    try:
        for command in commands:
            # Ctrl-C is for the driver to hear: in a session of its own, ssh does not.
            sessions.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))
        while any(each.poll() is None for each in sessions) and all(each.poll() in (None, 0) for each in sessions):
            time.sleep(POLL_S)
            look()
        within_s = STOP_WITHIN_S
    except FileNotFoundError:
        raise UserError("ssh: is not on the PATH here; install it, or use launcher.kind=local") from None
    except LeaseLost:
        raise  # another driver builds the stage, and must find nobody else at it
    except (Preempted, KeyboardInterrupt):
        within_s = SAVE_WITHIN_S
        raise
    finally:
        codes = [each.poll() for each in sessions]
        _stop(sessions, within_s)
    for host, code in zip(hosts, codes, strict=False):
        if code == BROKEN:
            raise StageFailed(f"stages.{attempt.name}: the connection to {host} broke or could not be made, so the others were stopped")
    raise_words(directory, attempt)
    for host, code in zip(hosts, codes, strict=False):
        if code:
            logs = attempt.logs(directory)
            raise StageFailed(f"stages.{attempt.name}: its ranks on {host} ended (exit code {code}); the logs are in {logs}")


def _stop(sessions: Sequence[subprocess.Popen[bytes]], within_s: float) -> None:
    """Have what is left on the machines end, in order where it can within so many seconds."""
    with heed_signals(lambda signum: None):
        left = [each for each in sessions if each.poll() is None]
        for each in left:
            assert each.stdin is not None, "it was opened as a pipe"
            with suppress(OSError):
                each.stdin.write(f"{within_s:.0f}\n".encode())
                each.stdin.close()
        deadline = time.monotonic() + within_s + KILL_WITHIN_S
        while any(each.poll() is None for each in left) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for each in sessions:
            if each.poll() is None:
                each.kill()
            each.wait()
            if each.stdin is not None:
                with suppress(OSError):
                    each.stdin.close()
