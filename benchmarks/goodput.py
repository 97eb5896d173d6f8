"""How much of its time a large training run gets on, when machines fail: in closed form, and simulated. No GPU, and no training.

    python benchmarks/goodput.py [--gpus N] [--seed N]      the tables of docs/scale.md

A run computes for T seconds, stops for H while its state is copied, and so on; what was copied counts W seconds later, when it is on
disk. A failure throws it back to the last copy that counts, after R seconds in which nothing is computed and failures come too. With
failures at random, M seconds apart on average (M of one GPU by the number of GPUs), the share of time that is computed for good is

    goodput = T / (M exp((R + W) / M) (exp((T + H) / M) - 1))

which for W = 0 is what Daly has (2006, Future Generation Computer Systems 22, p. 303-312), turned around. It is the most at about

    T = sqrt(2 H M)                                                         Young, 1974 (Communications of the ACM 17, p. 530-531)
    T = sqrt(2 H M) (1 + sqrt(H / 2 M) / 3 + H / 18 M) - H   for H < 2 M    Daly, 2006; else M

neither of which R and W change. The simulation knows none of this: it goes from one event to the next.
"""

import argparse
from dataclasses import dataclass
from math import exp, gamma, log, sqrt
from typing import Any

import numpy as np

HOUR, DAY = 3600.0, 86400.0


# --- what is published -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """How often somebody's GPUs, or what is around them, ended a run."""

    name: str
    failures: float
    days: float
    gpus: float
    source: str

    @property
    def gpu_mttf_s(self) -> float:
        """Seconds of one GPU between failures, on average."""
        return self.gpus * self.days * DAY / self.failures


RECORDS = [
    Record("Llama 3 405B", 419, 54, 16384, "Dubey et al., 2024 (arXiv 2407.21783), sec. 3.3.4 and table 5: unexpected interruptions"),
    Record(
        "Meta RSC-1, hardware", 6.50, 1, 8000, "Kokolis et al., 2024 (arXiv 2410.21680): 6.50 failures in 1,000 node-days, 8 A100 a node"
    ),
    Record("Meta RSC-2, hardware", 2.34, 1, 8000, "the same: 2.34 in 1,000 node-days"),
    Record("Meta RSC-1, 1,024-GPU jobs", 1, 7.9 / 24, 1024, "the same: a mean time to failure of 7.9 hours"),
    Record(
        "OPT-175B", 35 + 70, 60, 992, "Zhang et al., 2022 (arXiv 2205.01068), sec. 2.5: 35 restarts by hand, over 70 others, in two months"
    ),
    Record("BLOOM", 1.5, 7, 400, "Bekman, 2022 (Hugging Face, The Technology Behind BLOOM Training): one or two GPUs a week of about 400"),
    Record("504 B200", 10, 55, 504, "Lablup, 2026 (arXiv 2605.09370): 10 failures of GPUs by their XID in 55 days"),
]
RESTART_S = 11 * 60.0
"""From a failure to training again: the median interval of automatic retries in Lablup, 2026."""
DISK = 2.3e12 / 40
"""Bytes a second of a parallel file system: BLOOM wrote 2.3 TB in 40 s (bigscience, train/tr11-176B-ml/chronicles.md)."""
HOST_LINK = 50e9
"""Bytes a second at which a GPU's state is copied to the memory of its machine: most of PCIe 5 x16, an assumption."""
STATE_BYTES = 12
"""Bytes of a checkpoint for each trained parameter (`posttrain/footprint.py`)."""
PARAMETERS = 70.6e9


# --- in closed form --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run on machines that fail; all in seconds."""

    mttf_s: float
    """Between failures of any of its GPUs, on average."""
    held_s: float
    """That training stops for a checkpoint."""
    written_s: float = 0.0
    """After which a checkpoint counts."""
    restart_s: float = 0.0


def goodput(run: Run, interval_s: float) -> float:
    """Share of the time that is computed for good, with checkpoints after so much computing."""
    lost = run.mttf_s * exp((run.restart_s + run.written_s) / run.mttf_s)
    return interval_s / (lost * (exp((interval_s + run.held_s) / run.mttf_s) - 1))


def young(run: Run) -> float:
    """The best interval, to first order."""
    return sqrt(2 * run.held_s * run.mttf_s)


def daly(run: Run) -> float:
    """The best interval, to a higher order."""
    ratio = run.held_s / (2 * run.mttf_s)
    return young(run) * (1 + sqrt(ratio) / 3 + ratio / 9) - run.held_s if ratio < 1 else run.mttf_s


# --- simulated -------------------------------------------------------------------------------------------------------


def simulate(run: Run, interval_s: float, work_s: float, generator: np.random.Generator, shape: float = 1.0) -> float:
    """The time that a run takes for so much work, by the goodput: from one event to the next.

    Times between failures are of a Weibull distribution with that shape: 1 is failures at random, below 1 they come in bursts.
    """
    scale = run.mttf_s / gamma(1 + 1 / shape)
    now = safe = 0.0  # time, and work that a failure cannot take
    failure = scale * generator.weibull(shape)
    while safe < work_s:
        # One stretch without a failure: nothing to begin with, then computing and copying in turn.
        start, done, pending = now + run.restart_s * (now > 0), safe, []
        now = start
        while True:
            step = min(interval_s, work_s - done)
            now, done = now + step + run.held_s, done + step
            if now > failure:
                break
            pending.append((now + run.written_s, done))
            if done >= work_s:
                now += run.written_s
                break
        counted = [work for moment, work in pending if moment <= failure]
        safe = max([safe, *counted])
        if safe < work_s:
            now = failure
            failure += scale * generator.weibull(shape)
    return work_s / now


def slowest(num_ranks: int, spread: float, generator: np.random.Generator, num_steps: int = 2000) -> float:
    """By how much a step is longer than that of an average rank, where all wait for the slowest and ranks differ by chance.

    `spread` is the standard deviation of a rank's step by its mean, normally distributed.
    """
    return float(np.mean([(1 + spread * generator.standard_normal(num_ranks)).max() for _ in range(num_steps)])) - 1


# --- tables ----------------------------------------------------------------------------------------------------------


def state_of(num_gpus: int) -> dict[str, float]:
    """What a checkpoint of a model of 70 billion parameters costs on so many GPUs, written while training goes on."""
    size = STATE_BYTES * PARAMETERS
    return {"held_s": size / num_gpus / HOST_LINK, "written_s": size / DISK, "restart_s": RESTART_S}


def simulated(run: Run, interval_s: float, seed: int, shape: float = 1.0, repeats: int = 20) -> tuple[float, float]:
    """Mean of simulated goodputs, and its standard error, over work of 200 times the mean time to failure, or of 20,000 intervals."""
    generator = np.random.default_rng([seed, int(interval_s)])
    work_s = min(200 * run.mttf_s, 20000 * interval_s)
    found = [simulate(run, interval_s, work_s, generator, shape) for _ in range(repeats)]
    return float(np.mean(found)), float(np.std(found, ddof=1) / sqrt(repeats))


def print_table(columns: list[str], rows: list[list[Any]]) -> None:
    """As Markdown."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    num_gpus, seed = arguments.gpus, arguments.seed

    rows = []
    for record in RECORDS:
        run = Run(record.gpu_mttf_s / num_gpus, **state_of(num_gpus))
        foreground = Run(run.mttf_s, held_s=run.written_s, restart_s=run.restart_s)
        best = daly(foreground)
        cells = [f"{goodput(run, interval):.1%}" for interval in (30 * 60, 3 * HOUR)]
        mean, error = simulated(run, 30 * 60, seed)
        at_best = [f"{young(foreground) / 60:.0f}", f"{best / 60:.0f}", f"{goodput(foreground, best):.1%}"]
        often = [record.name, f"{record.gpu_mttf_s / DAY / 365:.1f}", f"{run.mttf_s / HOUR:.1f}"]
        rows.append([*often, *at_best, *cells, f"{mean:.1%} ± {error:.1%}"])
    print(f"{num_gpus:,} GPUs")
    columns = ["record", "years of a GPU", "hours of all", "Young min", "Daly min", "at that", "30 min", "3 h", "30 min, simulated"]
    print_table(columns, rows)

    rows = []
    for count in (8, 64, 256, 1000, 4096, 16384):
        run = Run(RECORDS[0].gpu_mttf_s / count, **state_of(count))
        cells = [f"{goodput(run, interval):.1%}" for interval in (5 * 60, 30 * 60, 3 * HOUR)]
        bursts, error = simulated(run, 30 * 60, seed, shape=0.7)
        rows.append([f"{count:,}", f"{run.mttf_s / HOUR:,.1f}", f"{run.held_s:.2f}", *cells, f"{bursts:.1%} ± {error:.1%}"])
    print("as often as Llama 3")
    print_table(["GPUs", "hours between failures", "held s", "5 min", "30 min", "3 h", "30 min, in bursts, simulated"], rows)

    generator = np.random.default_rng(seed)
    rows = []
    for count in (8, 64, 1000, 16384):
        cells = [f"{slowest(count, spread, generator, 500):+.1%}" for spread in (0.01, 0.03, 0.05)]
        rows.append([f"{count:,}", *cells, f"{0.03 * sqrt(2 * log(count)):+.1%}"])
    print("a step, where all wait for the slowest")
    print_table(["ranks", "spread 1 %", "3 %", "5 %", "3 %, by sqrt(2 ln N)"], rows)


if __name__ == "__main__":
    main()
