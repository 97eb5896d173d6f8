"""Nodes: whether the machines that a job is given fit together, found out in a minute and not after hours of training.

    driver   gather()    one task a node: python -m posttrain.nodes DIRECTORY, which lies on the disk that all should share
    node     probe()     versions, source, disk, clock, memory, GPUs, Hub cache   -> node_N.json
             measure()   products here, links to the next nodes, an all-reduce    -> timed_N.json; the only part that imports torch
    driver   judge()     the findings, each with the node that is to blame

Every part has a time limit; a node that does not keep it is named too.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil

import posttrain
from posttrain import disk
from posttrain.doctor import CLOCKS_APART_S, LITTLE_MEMORY_BYTES, NO_DISK_BYTES, NVIDIA, SLOW_BYTES_PER_S, WRITTEN_BYTES, Finding, State
from posttrain.error import UserError
from posttrain.parallel import num_cores

DIRECTORY = ".nodes"
"""Below the root of all runs: what nodes say, and which were found fit."""
FIT_FILE = "fit.json"
FIT_FOR_S = 24 * 3600.0
"""How long nodes that were found fit are taken to be so; clocks, disks and speeds change."""
ANSWER_WITHIN_S = 60.0
"""How long one part of a probe may take."""
SEEN_WITHIN_S = 60.0
"""How long a network disk may take to show what another node wrote."""
TIMED_WITHIN_S = 600.0
"""How long nodes may take to import torch, find one another and measure."""
POLL_S = 0.1
SLOW_SHARE = 0.6
"""Share of the usual speed below which a node is slow."""
SLOW_LINK_BYTES_PER_S = 50e6
PRODUCT = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices that are multiplied."""
LINK_BYTES = {"cpu": 1 << 23, "cuda": 1 << 28}
REPEATED = 5
Record = Mapping[str, Any]
T = TypeVar("T")


# --- on a node -------------------------------------------------------------------------------------------------------


def probe(directory: Path, wanted: Record, number: int) -> dict[str, Any]:
    """What can be said of this node without any other. What took too long or failed stands under `failed`."""
    failed: dict[str, str] = {}

    def within(what: str, look: Callable[[], T]) -> T | None:
        found: list[T] = []
        errors: list[str] = []

        def work() -> None:
            try:
                found.append(look())
            except Exception as error:
                errors.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])

        thread = threading.Thread(target=work, daemon=True)  # a dead network disk answers nobody, and cannot be interrupted
        thread.start()
        thread.join(ANSWER_WITHIN_S)
        if found:
            return found[0]
        failed[what] = errors[0] if errors else f"no answer within {ANSWER_WITHIN_S:.0f} s"
        return None

    memory = psutil.virtual_memory()
    written, read = within("shared directory", lambda: _disk_speed(directory, number)) or (0.0, 0.0)
    return {
        "number": number,
        "host": socket.gethostname(),
        "packages": within("packages", packages) or {},
        "source": within("source", source) or {},
        "written_bytes_per_s": written,
        "read_bytes_per_s": read,
        "clock_apart_s": within("clock", lambda: _clock_apart(directory, number)) or 0.0,
        "free_disk_bytes": within("disk", lambda: disk.free_bytes(directory)) or 0,
        "free_memory_bytes": memory.available,
        "num_cores": num_cores(),
        "num_gpus": len(list(NVIDIA.glob("gpus/*"))),
        "missing_models": within("Hub cache", lambda: _missing_models(wanted["models"])) or [],
        "failed": failed,
    }


def packages() -> dict[str, str]:
    """Name of each installed package to its version, and of Python itself."""
    found = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions() if each.metadata["Name"]}
    return {**found, "python": platform.python_version()}


def source() -> dict[str, str]:
    """Name of each file of this project's code to its hash."""
    top = Path(posttrain.__file__).parents[1]
    files = [top / "pipeline.py", *(path for name in ("posttrain", "stages") for path in sorted((top / name).rglob("*.py")))]
    return {str(path.relative_to(top)): disk.hash_file(path) for path in files if path.is_file()}


def _disk_speed(directory: Path, number: int) -> tuple[float, float]:
    """Bytes a second to write, synced, and to read again, not from this node's own memory where the system heeds that."""
    path = directory / f"speed_{number}"
    chunk = os.urandom(disk.CHUNK_BYTES)
    try:
        started = time.monotonic()
        with path.open("wb") as file:
            for _ in range(WRITTEN_BYTES // disk.CHUNK_BYTES):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        written = time.monotonic()
        with path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(disk.CHUNK_BYTES):
                pass
        return WRITTEN_BYTES / (written - started), WRITTEN_BYTES / (time.monotonic() - written)
    finally:
        path.unlink(missing_ok=True)


def _clock_apart(directory: Path, number: int) -> float:
    """Seconds by which the clock here is ahead of that of whoever keeps the disk."""
    path = directory / f"clock_{number}"
    path.touch()
    try:
        return time.time() - path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)


def _missing_models(models: Sequence[Sequence[str]]) -> list[str]:
    """Those models of the Hub that cannot be had here: this node is offline, and its cache does not hold them."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        return []
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    missing = []
    for name, revision in models:
        if not (cache / f"models--{name.replace('/', '--')}" / "snapshots" / revision).is_dir():
            missing.append(name)
    return missing


def measure(number: int, size: int, address: str, port: int) -> dict[str, Any]:
    """Speed of products on this node, of its links to the nodes before and after it, and of an all-reduce. All nodes call it."""
    import torch
    import torch.distributed as dist

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(num_cores())

    def seconds(work: Callable[[], object]) -> float:
        """The shortest time that it takes, after once to warm up."""
        times = []
        for _ in range(REPEATED + 1):
            started = time.perf_counter()
            work()
            if kind == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
        return min(times[1:])

    side = PRODUCT[kind]
    matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16 if kind == "cuda" else torch.float32)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"tcp://{address}:{port}",
        rank=number,
        world_size=size,
        timeout=timedelta(seconds=TIMED_WITHIN_S / 2),
    )
    try:
        dist.barrier()
        found: dict[str, Any] = {"products_per_s": 2 * side**3 / seconds(lambda: matrix @ matrix), "links": {}}
        payload = torch.ones(LINK_BYTES[kind] // 4, device=device)
        for first, second in links(size):
            dist.barrier()
            if number not in (first, second):
                continue

            def there_and_back(first: int = first, second: int = second) -> None:
                for sender, receiver in ((first, second), (second, first)):
                    if number == sender:
                        dist.send(payload, receiver)
                    else:
                        dist.recv(payload, sender)

            other = second if number == first else first
            found["links"][str(other)] = 2 * LINK_BYTES[kind] / seconds(there_and_back)
        dist.barrier()
        found["all_reduce_bytes_per_s"] = LINK_BYTES[kind] / seconds(lambda: dist.all_reduce(payload))
        return found
    finally:
        dist.destroy_process_group()


def links(size: int) -> list[tuple[int, int]]:
    """The pairs of nodes whose link is timed: each with the next one, so that every node has two where there are more than two."""
    pairs = [(number, number + 1) for number in range(size - 1)]
    return [*pairs, (0, size - 1)] if size > 2 else pairs


def main(arguments: Sequence[str]) -> int:
    """Probe and measure this node, one of those that the environment of srun tells of, or that of `gather`."""
    directory = Path(arguments[0])
    number, size = (int(os.environ[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS"))
    wanted = _await(directory / "wanted.json")
    if wanted is None:
        print(f"{socket.gethostname()}: {directory} cannot be seen here", file=sys.stderr)
        return 1
    disk.write_json(directory / f"node_{number}.json", probe(directory, wanted, number))
    if number == 0:
        address = "127.0.0.1" if wanted["is_local"] else socket.gethostname()
        with socket.socket() as free:
            free.bind((address, 0))
            port = free.getsockname()[1]
        disk.write_json(directory / "meet.json", {"address": address, "port": port})
    unseen = [other for other in range(size) if _await(directory / f"node_{other}.json") is None]
    meet = _await(directory / "meet.json")
    if unseen or meet is None:
        disk.write_json(directory / f"timed_{number}.json", {"unseen": unseen})
        return 1
    try:
        timed = measure(number, size, meet["address"], meet["port"])
    except Exception as error:
        timed = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    disk.write_json(directory / f"timed_{number}.json", {"unseen": [], **timed})
    return 0


def _await(path: Path) -> Any:
    """The JSON in a file, as soon as it is there; None where it does not come in time."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while (found := disk.read_json(path)) is None and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return found


# --- in the driver ---------------------------------------------------------------------------------------------------


def check_nodes(
    root: Path,
    hosts: Sequence[str],
    command: Callable[[Path], Sequence[str]] | None,
    *,
    num_gpus: int,
    models: Sequence[tuple[str, str]] = (),
    is_again: bool = False,
) -> list[Finding]:
    """What is to be said of these nodes; nothing where they were found fit a while ago, by the same code, unless `is_again`.

    `command` is what starts the tasks, one a node, for the directory that they work in; None starts as many here. `num_gpus` is
    what each must have, `models` the Hub ids, with commits, that each must be able to read.
    """
    key = disk.hash_json({"hosts": sorted(hosts), "packages": packages(), "source": source(), "gpus": num_gpus, "models": list(models)})
    top = root / DIRECTORY
    fit = _read_fit(top / FIT_FILE)
    if not is_again and key in fit:
        return []
    with disk.explain_disk_errors(str(top)):
        top.mkdir(parents=True, exist_ok=True)
        directory = top / uuid.uuid4().hex
        directory.mkdir()
        try:
            wanted = {"models": [list(model) for model in models], "is_local": command is None}
            disk.write_json(directory / "wanted.json", wanted)
            records, timed = gather(directory, len(hosts), None if command is None else command(directory))
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        findings = judge(hosts, records, timed, num_gpus=num_gpus)
        if not any(finding.state == "fault" for finding in findings):
            disk.write_sealed(top / FIT_FILE, {**fit, key: time.time()})
    return findings


def _read_fit(path: Path) -> dict[str, float]:
    """When nodes were found fit, of those that still count as such."""
    try:
        found = disk.read_sealed(path) or {}
    except (OSError, ValueError):
        return {}
    return {key: at for key, at in found.items() if time.time() - at < FIT_FOR_S}


def gather(directory: Path, size: int, command: Sequence[str] | None) -> tuple[list[Record | None], list[Record | None]]:
    """What each node says of itself and what it measured, None where it says nothing in time."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    given: list[tuple[Sequence[str], Mapping[str, str]]]
    if command is None:
        here = [sys.executable, "-m", "posttrain.nodes", str(directory)]
        given = [(here, {**environment, "SLURM_PROCID": str(number), "SLURM_NTASKS": str(size)}) for number in range(size)]
    else:
        given = [(command, environment)]
    with _started(given) as processes:
        deadline = time.monotonic() + ANSWER_WITHIN_S + SEEN_WITHIN_S + TIMED_WITHIN_S
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(POLL_S)
    return [_read(directory / f"node_{number}.json") for number in range(size)], [
        _read(directory / f"timed_{number}.json") for number in range(size)
    ]


@contextmanager
def _started(given: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes for the block, of which nothing is left after it."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command, environment in given:
            processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment))
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(ANSWER_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def python_path() -> str:
    """Where Python finds this project, whatever directory it is started in."""
    return os.pathsep.join(filter(None, [str(Path(posttrain.__file__).parents[1]), os.environ.get("PYTHONPATH")]))


def _read(path: Path) -> Record | None:
    try:
        found: Record | None = disk.read_json(path)
    except (OSError, ValueError):
        return None
    return found


def judge(hosts: Sequence[str], records: Sequence[Record | None], timed: Sequence[Record | None], *, num_gpus: int) -> list[Finding]:
    """What is to be said of nodes, the worst first; one line for each that is wrong, and one for all that are right."""
    findings = []
    names = [record["host"] if record else host for host, record in zip(hosts, records, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} (process {number})" for number, name in enumerate(names)]
    present = {name: record for name, record in zip(names, records, strict=True) if record is not None}
    for name in names:
        if name not in present:
            findings.append(_fault(name, "gave no answer in the shared directory", "see that it mounts the root of all runs"))
    for what, mend in (("packages", "install the same there"), ("source", "let all nodes run one copy of the project")):
        findings += _unlike({name: record[what] for name, record in present.items()}, what, mend)
    for name, record in present.items():
        findings += [_fault(name, f"{what}: {why}", "mend it, or leave the node out") for what, why in record["failed"].items()]
        findings += _by_itself(name, record, num_gpus)
    measured = {name: record for name, record in zip(names, timed, strict=True) if record is not None and "products_per_s" in record}
    # What one node lacks the others feel: the reason comes first.
    for name, each in zip(names, timed, strict=True):
        if each is None and name in present:
            findings.append(_fault(name, f"did not measure within {TIMED_WITHIN_S:.0f} s", "see whether torch can be imported there"))
    for name, each in zip(names, timed, strict=True):
        if each is not None and each["unseen"]:
            unseen = ", ".join(names[number] for number in each["unseen"])
            findings.append(_fault(name, f"does not see what {unseen} wrote", "see that both mount the same disk"))
    for name, each in zip(names, timed, strict=True):
        if each is not None and "failed" in each:
            findings.append(_fault(name, f"cannot talk to the others: {each['failed']}", "see NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME"))
    findings += _slow(names, measured)
    if not findings and measured:
        findings.append(_praise(names, present, measured))
    return sorted(findings, key=lambda finding: ["fault", "warning", "ok"].index(finding.state))


def _fault(name: str, found: str, mend: str, state: State = "fault") -> Finding:
    return Finding(name, state, found, mend)


def _unlike(values: Mapping[str, Mapping[str, str]], what: str, mend: str) -> Iterator[Finding]:
    """The nodes whose packages or files are not those that most have; the first node's, where there are as many of one as of another."""
    if not values:
        return
    counts = Counter(json.dumps(value, sort_keys=True) for value in values.values() if value)
    if len(counts) < 2:
        return
    usual: dict[str, str] = json.loads(counts.most_common(1)[0][0])
    other = next(name for name, value in values.items() if value == usual)
    for name, value in values.items():
        differing = [key for key in sorted(value.keys() | usual.keys()) if value.get(key) != usual.get(key)]
        if value and differing:  # where it has none, it says why
            first = differing[0]
            if what == "packages":
                said = f"has {first} {value.get(first, 'not at all')}, and {other} {usual.get(first, 'not at all')}"
            else:
                said = f"has another {first} than {other}" if first in value else f"lacks {first}, which {other} has"
            more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
            yield _fault(name, f"{said}{more}", mend)


def _by_itself(name: str, record: Record, num_gpus: int) -> Iterator[Finding]:
    show = disk.show_bytes
    if record["num_gpus"] < num_gpus:
        yield _fault(name, f"has {record['num_gpus']} GPUs, and {num_gpus} are wanted", "leave the node out; nvidia-smi there says why")
    if record["missing_models"]:
        found = f"is offline, and its cache lacks {', '.join(record['missing_models'])}"
        yield _fault(name, found, "set HF_HOME to a disk that all share, or fetch it there")
    if "disk" not in record["failed"] and record["free_disk_bytes"] < NO_DISK_BYTES:
        yield _fault(name, f"has {show(record['free_disk_bytes'])} left in the root of all runs", "free some")
    if abs(record["clock_apart_s"]) > CLOCKS_APART_S:
        found = f"has a clock {abs(record['clock_apart_s']):,.0f} s {'ahead of' if record['clock_apart_s'] > 0 else 'behind'} the disk's"
        yield _fault(name, found, "set it by NTP")
    if record["free_memory_bytes"] < LITTLE_MEMORY_BYTES:
        yield _fault(name, f"has {show(record['free_memory_bytes'])} of memory left", "see what else runs there", "warning")
    for verb, speed in (("writes", record["written_bytes_per_s"]), ("reads", record["read_bytes_per_s"])):
        if 0 < speed < SLOW_BYTES_PER_S:
            yield _fault(name, f"{verb} {show(int(speed))} a second of the root of all runs", "see how it mounts that disk", "warning")


def _slow(names: Sequence[str], measured: Mapping[str, Record]) -> Iterator[Finding]:
    """The nodes that compute or talk slower than the others. A slow link is blamed on the node all of whose links are slow."""
    if len(measured) < 2:
        return
    products = {name: record["products_per_s"] for name, record in measured.items()}
    usual = max(products.values()) if len(products) < 3 else statistics.median(products.values())
    for name, speed in products.items():
        if speed < SLOW_SHARE * usual:
            yield _fault(name, f"computes at {speed / usual:.0%} of the others' speed", "leave the node out, or expect to wait", "warning")
    best = {name: max(record["links"].values()) for name, record in measured.items() if record["links"]}
    if len(best) < 3:
        slowest = min(best.values(), default=SLOW_LINK_BYTES_PER_S)
        if slowest < SLOW_LINK_BYTES_PER_S:
            found = f"talk at {disk.show_bytes(int(slowest))} a second"
            yield _fault(" and ".join(best), found, "see NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME", "warning")
        return
    usual = statistics.median(best.values())
    for name, speed in best.items():
        if speed < SLOW_SHARE * usual:
            found = f"talks at {speed / usual:.0%} of the others' speed, {disk.show_bytes(int(speed))} a second"
            yield _fault(name, found, "leave the node out, or see to its network", "warning")


def _praise(names: Sequence[str], present: Mapping[str, Record], measured: Mapping[str, Record]) -> Finding:
    show = disk.show_bytes
    first = next(iter(present.values()))
    slowest = min(record["all_reduce_bytes_per_s"] for record in measured.values())
    written = min(record["written_bytes_per_s"] for record in present.values())
    found = f"the same {len(first['packages'])} packages and {len(first['source'])} files of code"
    found += f", {show(int(written))} a second to the root" + (f", {show(int(slowest))} a second all-reduced" if len(names) > 1 else "")
    return Finding(", ".join(names), "ok", found)


def refuse(findings: Sequence[Finding]) -> None:
    """Raise `UserError` for the first node that is wrong."""
    for finding in findings:
        if finding.state == "fault":
            raise UserError(f"nodes: {finding.what}: {finding.found}; {finding.mend}")


if __name__ == "__main__":
    sys.stdout.flush()
    code = main(sys.argv[1:])
    os._exit(code)  # a thread may hang on a dead disk
