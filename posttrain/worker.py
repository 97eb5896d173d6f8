"""The worker: one rank of one phase of one stage. Knows its stage directory and its rank, and nothing else.

Started by the local launcher (forked from the warm parent), or from the rank variables that torchrun or srun set:

    torchrun --nproc-per-node 2 -m posttrain.worker runs/x/sft
    srun python -m posttrain.worker runs/x/sft

Under these a rank goes through all phases in one process, and sends its output to its own log.

Phases: `prepare` (main rank alone, no process group), `run` (all ranks, one process group), `verify` (main rank alone,
after the process group ended, in a process of its own under the local launcher): reload what was published apart from the
live model, compare, and write `artifact.json`. Beside `run`, the local launcher has one more process prepare data ahead.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Literal, NoReturn

from posttrain import artifact, disk, heartbeat
from posttrain.error import EXIT_CRASH, EXIT_DONE, EXIT_PREEMPTED, EXIT_USER, STOP_SIGNALS, Preempted, UserError, heed_signals
from posttrain.ledger import Attempt, check_inputs, open_context, read_attempt
from posttrain.parallel import num_cores
from posttrain.provenance import provenance
from posttrain.selection import read_selection
from posttrain.stage import Stage, StageContext

Phase = Literal["prepare", "run", "verify"]
ERROR_FILE = "rank_{rank}.error.json"
AHEAD_LOG = "ahead.log"
CORES = "POSTTRAIN_CORES"
"""Names the environment variable that says how many cores each rank has for itself; without it they share those of the machine."""
METRICS_FILE = "final_metrics.json"
WAIT_FOR_PREPARE_S = 24 * 3600
LOWEST_PRIORITY = 19
AGAIN_S = 2.0

_is_ending = threading.Event()
"""Set once it is settled how this process ends: signals change nothing any more."""


def worker(directory: Path, phase: Phase, rendezvous: Mapping[str, str]) -> None:
    """Run one phase in a process forked for it, with its output in the attempt's log; ends the process."""
    # A lone rank must not look like one of many: accelerate would wrap its model for a group of one.
    os.environ.update(
        rendezvous if rendezvous["WORLD_SIZE"] != "1" else {name: rendezvous[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
    )
    _end_with_driver()
    hear_signals()
    rank = int(rendezvous["RANK"])
    attempt, stage, context = open_context(
        directory, rank=rank, local_rank=int(rendezvous["LOCAL_RANK"]), world_size=int(rendezvous["WORLD_SIZE"])
    )
    with _log_to(attempt.logs(directory) / f"rank_{rank}.log"):
        code = _run(attempt, stage, context, [phase])
    _end(code)


def hear_signals() -> None:
    """Hear what asks a rank to stop, also if it was sent since the fork; Ctrl-C the driver hears too, and asks for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def work_ahead(directory: Path) -> None:
    """Prepare the data of later stages, in a process forked for it, with what the training leaves of a core; ends the process."""
    _end_with_driver()
    hear_signals()
    os.nice(LOWEST_PRIORITY)
    attempt = read_attempt(directory)
    assert attempt is not None, "the launcher is given the attempt that it was read from"
    with _log_to(attempt.logs(directory) / AHEAD_LOG):
        try:
            from posttrain.ahead import prepare_ahead

            with heed_signals(_stop):  # so that nothing half-made is left
                prepare_ahead(directory, attempt)
        except Preempted as stopped:
            print(f"stopped: {stopped}", file=sys.stderr)
        except BaseException:
            traceback.print_exc()
    _end(EXIT_DONE)


def _stop(signum: int) -> None:
    if _is_ending.is_set():
        return
    # What a handler raises is lost where Python calls back from C, in a fork or a destructor: then it is raised again.
    again = threading.Timer(AGAIN_S, lambda: None if _is_ending.is_set() else os.kill(os.getpid(), signum))
    again.daemon = True
    again.start()
    raise Preempted(f"by {signal.Signals(signum).name}")


def _end(code: int) -> NoReturn:
    # Libraries leave threads and exit hooks behind that can hang or crash an interpreter on its way out; all that
    # matters is on disk by now.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(arguments: list[str]) -> int:
    """Run all phases in this process, with rank and rendezvous from the environment of torchrun or srun."""
    if len(arguments) != 1:
        print("error: usage: python -m posttrain.worker STAGE_DIRECTORY", file=sys.stderr)
        return EXIT_USER
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ:
        names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
        os.environ.update({name: os.environ[slurm] for name, slurm in names.items()}, LOCAL_WORLD_SIZE=str(_num_tasks_here()))
    directory = Path(arguments[0]).resolve()
    rank, local_rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    if world_size == 1:  # a lone rank must not look like one of many, as in `worker`
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    try:
        attempt, stage, context = open_context(directory, rank=rank, local_rank=local_rank, world_size=world_size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    log = attempt.logs(directory) / f"rank_{rank}.log"
    if context.is_main:
        print(f"{attempt.name}: ranks log to {log.parent}", flush=True)
    with _log_to(log):
        print(f"rank {rank} of {world_size} on {socket.gethostname()}", flush=True)
        # What was published in an attempt before needs but to be verified.
        return _run(attempt, stage, context, ["verify"] if (directory / artifact.OUTPUT).is_dir() else ["prepare", "run", "verify"])


def _num_tasks_here() -> int:
    """How many tasks of the step srun started on this node, of what it says of all nodes: `2(x3),1`."""
    counts: list[int] = []
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ["SLURM_NTASKS"])):
        counts += [int(count)] * int(repeated or 1)
    return counts[int(os.environ.get("SLURM_NODEID", "0"))]


def _run(attempt: Attempt, stage: Stage[Any], context: StageContext[Any], phases: list[Phase]) -> int:
    """Run the phases; whatever goes wrong is left in the attempt's logs for the driver to read. Returns the exit code."""
    # Phases that can save more than what lies on disk already take the signals themselves. None is put back: the process ends with this.
    for number in STOP_SIGNALS:
        signal.signal(number, lambda signum, _: _stop(signum))
    try:
        with disk.explain_disk_errors(context.at):
            heartbeat.begin(attempt.logs(context.directory), context.rank, attempt.fingerprint)
            for phase in phases:
                heartbeat.tell(phase)
                if phase == "prepare":
                    _prepare(attempt, stage, context)
                elif phase == "run":
                    _train(stage, context)
                elif context.is_main:
                    _verify(attempt, stage, context)
        heartbeat.tell(heartbeat.ENDED)
        _is_ending.set()
        return EXIT_DONE
    except Preempted as stopped:
        _is_ending.set()
        print(f"stopped: {stopped}", file=sys.stderr)
        return EXIT_PREEMPTED
    except UserError as error:
        _is_ending.set()
        print(f"error: {error}", file=sys.stderr)
        _report(context, attempt, "user", str(error))
        return EXIT_USER
    except BaseException as error:
        _is_ending.set()
        traceback.print_exc()
        _report(context, attempt, "crash", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        return EXIT_CRASH


def _prepare(attempt: Attempt, stage: Stage[Any], context: StageContext[Any]) -> None:
    marker = attempt.logs(context.directory) / f"prepared.{attempt.token}"
    if context.is_main:
        check_inputs(attempt)
        if stage.prepare is not None:
            stage.prepare(context)
        marker.touch()
        return
    # The other ranks wait on the disk, not in a collective: tokenizing may outlast any collective's time limit.
    deadline = time.monotonic() + WAIT_FOR_PREPARE_S
    while not marker.exists():
        if (marker.parent / ERROR_FILE.format(rank=0)).exists() or time.monotonic() > deadline:
            raise UserError(f"{context.at}: preparing on rank 0 failed; its message stands in its log")
        time.sleep(0.2)


def _train(stage: Stage[Any], context: StageContext[Any]) -> None:
    import torch

    from posttrain.machine import make_ready

    os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    cores = os.environ.get(CORES)
    make_ready(max(1, num_cores() // int(cores)) if cores else int(os.environ.get("LOCAL_WORLD_SIZE", context.world_size)))
    with _process_group(context):
        metrics = stage.run(context)
    if context.is_main:
        disk.write_json(context.directory / METRICS_FILE, metrics)
        artifact.record_output(context.directory, context.output)
        disk.publish_directory(context.output, context.directory / artifact.OUTPUT)


@contextlib.contextmanager
def _process_group(context: StageContext[Any]) -> Iterator[None]:
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(context.local_rank)
    if context.world_size == 1:
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    # A rank that fails keeps its connections until it ends, so that it has said why before the others say that they lost it.
    yield
    dist.barrier()
    dist.destroy_process_group()


def _verify(attempt: Attempt, stage: Stage[Any], context: StageContext[Any]) -> None:
    metrics = dict(disk.read_json(context.directory / METRICS_FILE) or {})
    if stage.output in ("policy", "reward_model"):
        from posttrain.models import verify_published

        metrics |= verify_published(context, stage.output)
    # To remove large files takes as long as to hash them.
    removal = threading.Thread(target=_remove_checkpoints, args=(context,))
    removal.start()
    artifact.write_artifact(
        context.directory,
        kind=stage.output,
        fingerprint=attempt.fingerprint,
        identity=attempt.identity,
        version=attempt.version,
        inputs=attempt.input_builds,
        metrics=metrics,
        provenance={
            **provenance(attempt.started),
            **({"selection": asdict(selection)} if (selection := read_selection(context.directory)) else {}),
            "config": attempt.config,
            "num_processes": attempt.num_processes,
            "sources": {entry["name"]: entry["source"] for role in attempt.inputs.values() for entry in role},
        },
    )
    removal.join()


def _remove_checkpoints(context: StageContext[Any]) -> None:
    """Once the output is verified, a resumed attempt goes on from it; a stage that is only tried has yet to go on from one of them."""
    if not context.is_smoke:
        shutil.rmtree(context.checkpoints, ignore_errors=True)


def _report(context: StageContext[Any], attempt: Attempt, kind: str, message: str) -> None:
    heartbeat.flush()
    with contextlib.suppress(OSError):  # on a full disk the message still stands in the log and the exit code still speaks
        record = {"kind": kind, "message": message, "time": time.time()}
        disk.write_json(attempt.logs(context.directory) / ERROR_FILE.format(rank=context.rank), record)


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Send stdout and stderr, of this process and of the libraries in it, to `path`."""
    with open(path, "a", buffering=1, encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield


def _end_with_driver() -> None:
    """End this process when the driver is gone, however it went, so that a killed driver leaves nothing behind."""
    driver = parent_process()
    assert driver is not None, "the local launcher starts workers as child processes"

    def watch() -> None:
        driver.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _end(main(sys.argv[1:]))
