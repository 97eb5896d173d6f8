"""What a command costs, how fast this machine multiplies matrices, and how many operations a model needs: shared by the benchmarks."""

import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLE_EVERY_S = 0.1
SHARES_EVERY_S = 1.0
"""Proportional set sizes are summed up by the kernel page by page, so they are asked for less often."""
PEAK_SIZES = (1024, 2048, 4096)
PEAK_REPEATS = 5
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """What a command took, all its processes counted."""

    wall_s: float
    cpu_user_s: float
    cpu_system_s: float
    page_faults: int
    peak_process_bytes: int
    """The most that the process which computed most had resident, shared pages counted as its own."""
    peak_tree_bytes: int
    """The most that all processes held at once, a shared page counted once."""


def run_measured(command: Sequence[str], *, env: Mapping[str, str], log: Path, watch: Callable[[], None] | None = None) -> Usage:
    """Run a command to its end with its output in `log`, calling `watch` all along. Raises `RuntimeError` where it fails."""
    processes: dict[int, tuple[float, float, int, int]] = {}
    peak_tree = 0
    shares_at = start = time.monotonic()
    with log.open("wb") as output:
        child = subprocess.Popen(command, env={**os.environ, **env}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while child.poll() is None:
                pids = tree(child.pid)
                for pid in pids:
                    if used := _used(pid):
                        peak = max(used[3], processes[pid][3] if pid in processes else 0)  # one that has ended holds nothing
                        processes[pid] = (*used[:3], peak)
                if time.monotonic() - shares_at > SHARES_EVERY_S:
                    peak_tree = max(peak_tree, sum(map(_share, pids)))
                    shares_at = time.monotonic()
                if watch is not None:
                    watch()
                time.sleep(SAMPLE_EVERY_S)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)
                child.wait()
    wall_s = time.monotonic() - start
    if child.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise RuntimeError(f"{' '.join(command)}\nended with {child.returncode}:\n{tail}")
    user, system, faults, _ = (sum(values) for values in zip(*processes.values(), strict=True))
    busiest = max(processes.values(), key=lambda used: used[0] + used[1])
    return Usage(wall_s, user, system, int(faults), busiest[3], peak_tree)


def tree(pid: int) -> list[int]:
    """A process and all below it that are there now."""
    children: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += map(int, path.read_text().split())
        except OSError:
            continue
    return [pid, *(below for child in children for below in tree(child))]


def _used(pid: int) -> tuple[float, float, int, int] | None:
    """Seconds in user and system mode, page faults, and the most bytes resident, of a process that is still there."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return int(fields[11]) / TICKS_PER_S, int(fields[12]) / TICKS_PER_S, int(fields[7]) + int(fields[9]), int(peak.split()[1]) * 1024


def _share(pid: int) -> int:
    """Bytes of a process, each page divided by the number of processes that share it."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def matmul_peaks() -> dict[str, float]:
    """Operations a second of large square products with all threads, by precision, measured in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_matmul_peaks)


def _matmul_peaks() -> dict[str, float]:
    import torch

    peaks = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        speeds = []
        for size in PEAK_SIZES:
            a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
            for _ in range(PEAK_REPEATS):
                start = time.perf_counter()
                a @ b
                speeds.append(2 * size**3 / (time.perf_counter() - start))
        peaks[name] = max(speeds)
    return peaks


@dataclass(frozen=True)
class Shape:
    """What of a model decides how much it computes."""

    layer_weights: int
    """Weights of matrices that every token is multiplied by, the head's not counted."""
    head_weights: int
    attention_width: int
    """Width of the queries, all layers and heads together."""

    def forward_flops(self, tokens: int, scored: int, attended: float) -> float:
        """Operations of one pass: the layers for every token, the head where a token is scored, and `attended` pairs of tokens."""
        return 2 * (self.layer_weights * tokens + self.head_weights * scored) + 4 * self.attention_width * attended


def causal_pairs(length: int) -> float:
    """Pairs of tokens that causal attention compares: half the square."""
    return length**2 / 2


def read_shape(model: Path) -> Shape:
    """The shape of the model in a directory, from its config alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        built: Any = AutoModelForCausalLM.from_config(config)
    head = built.get_output_embeddings()
    linear = [module for module in built.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        sum(module.weight.numel() for module in linear),
        head.weight.numel(),
        config.num_hidden_layers * config.num_attention_heads * width,
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
