"""The local launcher: ranks forked from one warm parent on this machine.

Importing torch, transformers and trl takes 10 to 20 seconds in every process. So one parent, Python's fork server,
imports them once, and each phase of each stage is a fresh set of processes forked from it in well under a second. The
parent runs nothing else: it has no CUDA context, and no thread but the allocator's own. While a stage trains, one more
process of the lowest priority prepares the data of stages that come later (`posttrain/ahead.py`).
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import connection, forkserver, get_context, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain import disk
from posttrain.artifact import FILE as ARTIFACT_FILE
from posttrain.artifact import OUTPUT
from posttrain.error import EXIT_PREEMPTED, EXIT_USER, STOP_SIGNALS, Preempted, StageFailed, heed_signals
from posttrain.heartbeat import Lookout
from posttrain.launch.words import raise_words
from posttrain.ledger import PREFLIGHT_FILE, Attempt, LeaseLost
from posttrain.progress import TRAIN, Watcher
from posttrain.worker import Phase, work_ahead, worker

if TYPE_CHECKING:
    from rich.console import Console

PRELOAD = ["__main__", "posttrain.warm"]
PRELOAD_DEEPSPEED = ["deepspeed.runtime.zero.muon.muon_optimizer"]
"""What its engine imports as it is set up, of any optimizer: torch's compiler with it, which takes seconds of each rank."""
LIBRARIES = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads look for work so often before they sleep: as long as it takes from one product to the next. By default it is thirty
    # times as long, and where other work runs on the same cores, each waits for the other's turn to end.
    "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
}
"""The environment in which libraries are imported: a rank says by itself later how many threads it computes with."""
POLL_S = 0.2
STOP_WITHIN_S = 8.0
"""How long ranks may take to stop after another rank's end, before they are killed: without it they can save nothing."""
SAVE_WITHIN_S = 600.0
"""How long they may take to save and stop when the driver was signalled. Whoever has no time for it kills the driver, or
presses Ctrl-C again."""
MARGIN_S = 5.0
"""Seconds of the time limit that are left beside those of a step and of saving."""


@contextmanager
def local_launcher(console: "Console", deadline: float, *, has_deepspeed: bool = False) -> Iterator[Callable[[Path, Attempt], None]]:
    """Start the warm parent, whose imports go on in the background, and yield the function that launches a stage.

    It raises `Preempted`, its state saved, so that all has ended by `deadline`, a time of the monotonic clock.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *(PRELOAD_DEEPSPEED if has_deepspeed else ())])
    # Libraries that start threads at import would have them in the parent, where a fork loses them.
    with _environment(**LIBRARIES, POSTTRAIN_DRIVER=str(os.getpid())):
        # What stops a run is for the driver to hear, and the parent inherits this: `timeout` and systemd signal all processes at once,
        # and ranks die with their parent before they have saved. Blocked and not ignored, so that a rank that was just forked, and
        # does not listen yet, still gets its own.
        resource_tracker.ensure_running()  # which would unblock SIGTERM between the two
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            signal.signal(signal.SIGINT, before)

    def launch(directory: Path, attempt: Attempt) -> None:
        with Watcher(directory, attempt.name, console) as watcher, ExitStack() as background:
            if not (directory / OUTPUT).is_dir():
                (directory / PREFLIGHT_FILE).unlink(missing_ok=True)  # it tells of the attempt before
                try:
                    _run_phase(directory, attempt, "prepare", 1, watcher, deadline)
                finally:
                    tell_summary(directory, console)
                _run_phase(
                    directory,
                    attempt,
                    "run",
                    attempt.num_processes,
                    watcher,
                    deadline,
                    started=lambda: background.enter_context(_working_ahead(directory, attempt)),
                )
            _run_phase(directory, attempt, "verify", 1, watcher, deadline)
        if not (directory / ARTIFACT_FILE).is_file():
            raise StageFailed(f"stages.{attempt.name}: ended without an artifact; its logs are in {attempt.logs(directory)}")

    yield launch


def tell_summary(directory: Path, console: "Console") -> None:
    """Print what the stage's preparation found out about its data."""
    for line in (disk.read_json(directory / PREFLIGHT_FILE) or {}).get("summary", []):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _working_ahead(directory: Path, attempt: Attempt) -> Iterator[None]:
    """While the block runs, have the data of later stages prepared. What is not done by its end is not waited for."""
    if not attempt.ahead:
        yield
        return
    process = get_context("forkserver").Process(target=work_ahead, args=(directory,), name=f"{attempt.name}:ahead")
    started: list[ForkServerProcess] = []
    try:
        process.start()
        started.append(process)
        yield
    finally:
        _stop(started, STOP_WITHIN_S)


def _run_phase(
    directory: Path,
    attempt: Attempt,
    phase: Phase,
    world_size: int,
    watcher: Watcher,
    deadline: float,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Run a phase on fresh processes to its end. `started` is called once they are forked."""
    context = get_context("forkserver")
    port = str(free_port())
    ranks = []
    for rank in range(world_size):
        rendezvous = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        ranks.append(context.Process(target=worker, args=(directory, phase, rendezvous), name=f"{attempt.name}:{phase}:{rank}"))
    running: list[ForkServerProcess] = []
    lookout = Lookout(directory, attempt, world_size)
    within_s = STOP_WITHIN_S
    try:
        for process in ranks:
            process.start()
            running.append(process)
        started()
        while all(process.exitcode in (None, 0) for process in ranks) and any(process.exitcode is None for process in ranks):
            connection.wait([process.sentinel for process in ranks if process.exitcode is None], timeout=POLL_S)
            watcher.show()
            heed_deadline(attempt.name, watcher, deadline)
            lookout.look()
        if any(process.exitcode not in (None, 0, EXIT_USER, EXIT_PREEMPTED) for process in ranks):
            lookout.examine()
    except LeaseLost:
        within_s = 0.0  # another driver builds the stage, and must find nobody else at it
        raise
    except (Preempted, KeyboardInterrupt):
        within_s = SAVE_WITHIN_S
        raise
    except StageFailed:
        within_s = 0.0  # they hang
        raise
    finally:
        # On every way out (a rank that failed, an interrupt, a signal) no process is left behind.
        stopped = _stop(running, within_s)
    _raise_failure(directory, attempt, ranks, stopped, lookout)


def heed_deadline(name: str, watcher: Watcher, deadline: float) -> None:
    """Raise `Preempted` once no more time is left before `deadline`, of the monotonic clock, than it takes to stop in order."""
    if time.monotonic() > deadline - reserve_s(watcher):
        is_vain = watcher.state.get("phase") == TRAIN and "save_s" not in watcher.state
        why = ", and left none for a single step: give it longer" if is_vain else ""
        raise Preempted(f"stages.{name}: the time limit is near{why}")


def reserve_s(watcher: Watcher) -> float:
    """Seconds that it takes to stop in order: the rest of a step, and to save, as the ranks say.

    They say it from the first step on. Until then there is nothing new to save, and whoever stopped early would begin anew for ever.
    """
    state = watcher.state
    return float(MARGIN_S + state.get("step_time_s", 0.0) + 1.5 * state.get("save_s", 0.0))


def _stop(ranks: list[ForkServerProcess], within_s: float) -> list[ForkServerProcess]:
    """Ask the ranks that are left to save and stop, and kill those that do not in time, or all at once where Ctrl-C is pressed
    meanwhile. Returns whom it asked."""
    is_hurried = threading.Event()
    left = [process for process in ranks if process.exitcode is None]
    with heed_signals(lambda signum: None):
        before = signal.signal(signal.SIGINT, lambda *_: is_hurried.set())
        try:
            for process in left:
                process.terminate()
            deadline = time.monotonic() + within_s
            while any(process.exitcode is None for process in left) and time.monotonic() < deadline and not is_hurried.is_set():
                connection.wait([process.sentinel for process in left if process.exitcode is None], timeout=POLL_S)
            for process in left:
                if process.exitcode is None:
                    process.kill()
                    process.join()
        finally:
            signal.signal(signal.SIGINT, before)
    return left


def _raise_failure(
    directory: Path, attempt: Attempt, ranks: list[ForkServerProcess], stopped: list[ForkServerProcess], lookout: Lookout
) -> None:
    """Raise what the exit codes and the ranks' own words say; nothing where all went well."""
    codes = [process.exitcode or 0 for process in ranks]
    if not any(codes):
        return
    # A rank that was killed comes first: what the others then say is only that they lost it.
    for rank, process in enumerate(ranks):
        if codes[rank] < 0 and process not in stopped:
            hint = "; out of memory is the usual reason" if codes[rank] == -signal.SIGKILL else ""
            how = signal.Signals(-codes[rank]).name
            raise lookout.died(rank, f"rank {rank} ended (killed by {how}){hint}")
    raise_words(directory, attempt, lookout)
    # Those that were stopped, because another failed, say nothing about why.
    dead = next((rank for rank, code in enumerate(codes) if code not in (0, EXIT_PREEMPTED) and ranks[rank] not in stopped), None)
    if dead is None:
        raise Preempted(f"stages.{attempt.name} was asked to stop and saved its state")
    raise lookout.died(dead, f"rank {dead} ended (exit code {codes[dead]})")


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
