"""Kill runs at many random moments and say how many came out as if nothing had happened: `python -m tests.faults.soak 200`.

The last line is `identical: K of N`; exit code 1 where K < N. A point that did not come out identical keeps its files.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tests.faults.harness import CHAINS, warm_up
from tests.faults.kills import Report, Whole, draw, run_point, run_whole


def soak(here: Path, num_points: int, *, seed: int, jobs: int, warm: bool) -> list[Report]:
    """Run the points, `jobs` of them side by side, and say what became of each on stderr."""
    warm_up()
    chains = {name: make(here / name) for name, make in CHAINS.items()}
    with ThreadPoolExecutor(jobs) as pool:
        # Side by side too, so that the time which moments are drawn from is that of runs which are not alone.
        whole = dict(zip(chains, pool.map(partial(run_whole, warm=warm), chains.values()), strict=True))
        for variant, each in whole.items():
            print(f"a whole run, {variant}: {each.seconds:.1f} s", file=sys.stderr, flush=True)
        points = [pool.submit(_run, here, number, whole, seed, warm) for number in range(num_points)]
        reports = []
        try:
            for point in as_completed(points):
                reports.append(point.result())
                _tell(reports, num_points)
        finally:
            pool.shutdown(cancel_futures=True)  # on Ctrl-C those that run come to their end
    return sorted(reports, key=lambda report: report.number)


def _run(here: Path, number: int, whole: dict[str, Whole], seed: int, warm: bool) -> Report:
    variant = list(CHAINS)[number % len(CHAINS)]
    kills = draw(seed, number, whole[variant].seconds)
    return run_point(here / f"point-{number}", number, variant, kills, whole[variant], warm=warm)


def _tell(reports: Sequence[Report], num_points: int) -> None:
    last = reports[-1]
    met = ", ".join(f"{kind} in {phase}" for kind, phase in zip(last.kinds, last.phases, strict=False))
    said = "identical" if not last.problems else "NOT IDENTICAL: " + "; ".join(last.problems)
    print(f"{len(reports)}/{num_points}  point {last.number}, {last.variant}: {met}: {said}", file=sys.stderr, flush=True)


def table(reports: Sequence[Report]) -> list[str]:
    """Lines: phase, how often a kill met it and by whom it was meant, how many of those points came out identical."""
    by_phase: dict[str, list[Report]] = defaultdict(list)
    kinds: dict[str, list[str]] = defaultdict(list)
    for report in reports:
        for kind, phase in zip(report.kinds, report.phases, strict=False):
            by_phase[phase].append(report)
            kinds[phase].append(kind)
    lines = [f"{'phase':<40} {'kills':>5} {'identical':>9}   by"]
    for phase, found in sorted(by_phase.items()):
        same = sum(not report.problems for report in found)
        by = ", ".join(f"{kind} {kinds[phase].count(kind)}" for kind in sorted(set(kinds[phase])))
        lines.append(f"{phase:<40} {len(found):>5} {same:>9}   {by}")
    num_kills = sum(map(len, kinds.values()))
    redone = [report.steps_redone for report in reports]
    lines.append(f"{len(reports)} points, {num_kills} kills; steps redone: {sum(redone)}, at most {max(redone)} in a point")
    return lines


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("num_points", type=int, nargs="?", default=200, metavar="N", help="how many runs are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the kinds of kills")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--cold", action="store_true", help="each driver imports its libraries anew, and may be killed while it does")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    given = parser.parse_args()
    here = Path(tempfile.mkdtemp(prefix="soak-"))
    reports = soak(here, given.num_points, seed=given.seed, jobs=given.jobs, warm=not given.cold)
    same = sum(not report.problems for report in reports)
    if given.json:
        print(json.dumps({"identical": same, "of": len(reports), "points": [asdict(report) for report in reports]}, indent=1))
    else:
        print("\n".join([*table(reports), f"identical: {same} of {len(reports)}"]))
    if same < len(reports):
        print(f"what is left of the others: {here}", file=sys.stderr)
        return 1
    shutil.rmtree(here)
    return 0


if __name__ == "__main__":
    sys.exit(main())
