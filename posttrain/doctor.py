"""Doctor: what is wrong with this machine, before a run finds out. Imports no torch itself: a process of its own tries that."""

import fcntl
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from posttrain import disk
from posttrain.parallel import num_cores

State = Literal["ok", "warning", "fault"]
IMPORT_WITHIN_S = 300.0
WRITTEN_BYTES = 1 << 25
SLOW_BYTES_PER_S = 50e6
NVIDIA = Path("/proc/driver/nvidia")
LITTLE_DISK_BYTES, NO_DISK_BYTES = 20e9, 100e6
LITTLE_MEMORY_BYTES = 4e9
LITTLE_SHARED_BYTES = 256e6
FEW_FILES = 1024
CLOCKS_APART_S = 5.0
TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "cpu": torch.backends.cpu.get_cpu_capability(),
    "cuda": torch.version.cuda,
    "devices": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if cuda else [],
    "bf16": cuda and torch.cuda.is_bf16_supported(),
    "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
    "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
}))
"""
DEEPSPEED = "import deepspeed, json; print(json.dumps({'version': deepspeed.__version__}))"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: State
    found: str
    mend: str = ""


def examine(root: Path) -> Iterator[Finding]:
    """All that can be found out here; `root` is the directory of all runs, or where it would be. Writes only below a directory
    of its own there, and deletes that."""
    for look in (_python, _libraries, _torch, _deepspeed, _compiler, _cores, _memory, _shared_memory, _open_files):
        yield from look()
    place = next(path for path in (root.absolute(), *root.absolute().parents) if path.is_dir())
    for look_at in (_free_disk, _file_system, _hub):
        yield from look_at(place)


def _python() -> Iterator[Finding]:
    metadata = _metadata()
    wanted = "" if metadata is None else metadata["Requires-Python"]
    yield _bounded("Python", platform.python_version(), wanted, "set the environment up again with a Python in these bounds")


def _libraries() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    metadata = _metadata()
    if metadata is None:
        yield Finding("libraries", "warning", "posttrain is not installed, so their bounds are not known", "pip install -e .")
        return
    wanted = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    wrong = []
    for requirement in (each for each in wanted if each.marker is None or each.marker.evaluate()):
        try:
            found = _bounded(requirement.name, importlib.metadata.version(requirement.name), str(requirement.specifier), "make setup")
        except importlib.metadata.PackageNotFoundError:
            found = Finding(requirement.name, "fault", f"is not installed, and {requirement} is wanted", "make setup")
        wrong += [found] if found.state != "ok" else []
    yield from wrong or [Finding("libraries", "ok", f"{len(wanted)} within the bounds of pyproject.toml")]


def _metadata() -> importlib.metadata.PackageMetadata | None:
    try:
        return importlib.metadata.metadata("posttrain")
    except importlib.metadata.PackageNotFoundError:
        return None


def _bounded(what: str, version: str, bounds: str, mend: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(bounds).contains(version, prereleases=True):
        return Finding(what, "ok", version)
    return Finding(what, "fault", f"{version} is not {bounds}", mend)


def _torch() -> Iterator[Finding]:
    said = _try(TORCH)
    if isinstance(said, str):
        yield Finding("torch", "fault", said, "make setup")
        return
    yield Finding(
        "torch",
        "ok" if said["gloo"] else "fault",
        f"computes on CPUs with {said['cpu']}" + ("" if said["gloo"] else ", without gloo"),
        "" if said["gloo"] else "install a build of torch with gloo, which several processes of a stage talk by",
    )
    there = list(NVIDIA.glob("gpus/*"))
    if said["devices"]:
        kinds = ", ".join(sorted(set(said["devices"])))
        state: State = "ok" if said["nccl"] and said["bf16"] else "warning"
        without = [name for name in ("nccl", "bf16") if not said[name]]
        mend = "several processes, and 16 bits, need these" if without else ""
        yield Finding("GPUs", state, f"{len(said['devices'])}: {kinds}" + (f", without {' and '.join(without)}" if without else ""), mend)
    elif there:
        why = f"torch was built for CUDA {said['cuda']}" if said["cuda"] else "this torch was built for CPUs only"
        yield Finding("GPUs", "fault", f"{len(there)} are there and torch can use none; {why}", "install the torch that fits the driver")
    else:
        yield Finding("GPUs", "ok", "none, so stages train on the CPU in 32 bits")


def _deepspeed() -> Iterator[Finding]:
    said = _try(DEEPSPEED)
    if isinstance(said, str):
        yield Finding("DeepSpeed", "fault", said, "make setup; stages without `deepspeed:` import it too")
    else:
        yield Finding("DeepSpeed", "ok", f"{said['version']} can be imported")


def _compiler() -> Iterator[Finding]:
    wanted = ["c++", *(["nvcc"] if NVIDIA.exists() else [])]
    if missing := [name for name in wanted if shutil.which(name) is None]:
        yield Finding("compiler", "warning", f"no {' and no '.join(missing)}", "install it: DeepSpeed compiles its own optimizers with it")
    else:
        yield Finding("compiler", "ok", ", ".join(wanted))


def _try(code: str) -> dict[str, Any] | str:
    """What `code` prints as JSON in a process of its own, or why it could not."""
    environment = os.environ if NVIDIA.exists() else {**os.environ, "DS_ACCELERATOR": "cpu"}
    try:
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_WITHIN_S, env=environment)
    except subprocess.TimeoutExpired:
        return f"its import did not end within {IMPORT_WITHIN_S:.0f} s"
    if ended.returncode < 0:
        return f"its import was killed by {signal.Signals(-ended.returncode).name}"
    if ended.returncode:
        return f"its import fails: {(ended.stderr.strip().splitlines() or ['without a word'])[-1]}"
    said: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return said


def _cores() -> Iterator[Finding]:
    usable, there = num_cores(), os.cpu_count() or 1
    load = os.getloadavg()[0]
    if load > usable:
        found = f"{usable} of {there} may be used, and {load:.1f} processes want to run"
        yield Finding("cores", "warning", found, "wait for what else runs here, or expect to share")
    else:
        yield Finding("cores", "ok", f"{usable} of {there} may be used")


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    found = f"{disk.show_bytes(memory.available)} of {disk.show_bytes(memory.total)} free"
    if memory.available < LITTLE_MEMORY_BYTES:
        yield Finding("memory", "warning", found, "end what else runs here; libraries alone take 1 GB in each process")
    else:
        yield Finding("memory", "ok", found)


def _shared_memory() -> Iterator[Finding]:
    place = Path("/dev/shm")  # noqa: S108 - it is where processes share memory
    if not place.is_dir():
        yield Finding("shared memory", "warning", "there is no /dev/shm", "mount one: NCCL and loaders of data pass tensors through it")
        return
    free = shutil.disk_usage(place).free
    if free < LITTLE_SHARED_BYTES:
        found = f"{disk.show_bytes(free)} free in /dev/shm"
        yield Finding("shared memory", "warning", found, "give the container more, as with docker's --shm-size or --ipc=host")
    else:
        yield Finding("shared memory", "ok", f"{disk.show_bytes(free)} free")


def _open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FEW_FILES:
        yield Finding("open files", "warning", f"at most {soft:,}", f"ulimit -n {min(hard, 65_536) if hard > 0 else 65_536}")
    else:
        yield Finding("open files", "ok", f"at most {soft:,}")


def _free_disk(place: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(place).free
    state: State = "fault" if free < NO_DISK_BYTES else "warning" if free < LITTLE_DISK_BYTES else "ok"
    mend = "" if state == "ok" else "free some, as `clean` does, or choose another --root; `plan` says how much a pipeline needs"
    yield Finding("disk", state, f"{disk.show_bytes(free)} free at {place}", mend)


def _file_system(place: Path) -> Iterator[Finding]:
    """Whether the disk of `place` can do what the ledger relies on, how fast it is, and what time it thinks it is."""
    another = "choose another --root"
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor.", dir=place) as scratch:
            file, link = Path(scratch, "file"), Path(scratch, "link")
            started = time.monotonic()
            with file.open("wb") as written:
                for _ in range(WRITTEN_BYTES // disk.CHUNK_BYTES):
                    written.write(os.urandom(disk.CHUNK_BYTES))
                written.flush()
                os.fsync(written.fileno())
            speed = WRITTEN_BYTES / (time.monotonic() - started)
            apart = file.stat().st_mtime - time.time()
            disk.sync_directory(Path(scratch))
            try:
                os.link(file, link)
                can_link = link.samefile(file)
            except OSError:
                can_link = False
            link.unlink(missing_ok=True)
            file.replace(link)
            can_lock = _can_lock(link)
    except OSError as error:
        yield Finding("root", "fault", f"{place} cannot be written ({error.strerror})", another)
        return
    if can_link:
        yield Finding("root", "ok", f"{place} can be written, synced, renamed and linked in")
    else:
        yield Finding("root", "fault", f"{place} knows no hard links, so two runs could build the same stage at once", another)
    if not can_lock:
        yield Finding("locks", "warning", f"{place} knows no locks", "nothing: at worst two runs prepare the same data at the same time")
    if speed < SLOW_BYTES_PER_S:
        found = f"writes {disk.show_bytes(int(speed))} a second"
        yield Finding("speed of the root", "warning", found, f"{another}, or save less often: a checkpoint is 12 bytes a trained weight")
    else:
        yield Finding("speed of the root", "ok", f"writes {disk.show_bytes(int(speed))} a second")
    if abs(apart) > CLOCKS_APART_S:
        found = f"the clock of {place} is {abs(apart):,.0f} s {'ahead of' if apart > 0 else 'behind'} the one here"
        yield Finding("clock", "warning", found, "set both by NTP: whether a process on another host still runs is judged by them")
    else:
        yield Finding("clock", "ok", f"that of {place} is the one here")


def _can_lock(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _hub(_: Path) -> Iterator[Finding]:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    place = next(path for path in (home, *home.parents) if path.exists())
    if not os.access(place, os.W_OK):
        yield Finding("Hugging Face cache", "warning", f"{home} cannot be written", "set HF_HOME to a directory that can")
    elif is_offline:
        yield Finding("Hugging Face cache", "ok", f"offline: of the Hub, only what {home} holds already can be read")
    else:
        yield Finding("Hugging Face cache", "ok", f"online: what is fetched from the Hub is kept in {home}")
