"""Whether gates keep their promised error rates: on rows of real evaluations drawn anew, and on policies that are trained to be worse.

  python benchmarks/gates.py [--seeds N] [--draws N] [--resamples N] [--keep DIR] [--json FILE]

Trained: `configs/tiny_gate.yaml` with each seed, and again with the two answers of every pair swapped, so that DPO learns what it should
not. Its gates have to pass the one and to fail the other.

Drawn: the results by row of SFT and DPO, of the first seed, are taken for the whole truth. From them as many rows are drawn again and
again, with replacement, and judged as a gate judges an evaluation. So what is true is known: both policies as they are, or apart by a
given difference or none (of rows that one policy passes and the other does not, chance says by how many more it is the second; of other
scores, the difference is moved). D is the least difference that the evaluation says its rows can show. How often a gate may be wrong:

  at a limit        the policy is exactly there, and `confidence` is 0.95: it passes in 5 % at most                       (the promise)
  table             equal policies differ with p < 0.05 in 5 % at most, and a difference of D is missed in 20 %            (80% power)
  equal, D allowed  fails in 20 % at most, and so does one that is better by D and has to be better: a bound on one side sees more

`over` says that the share of wrong ones is more than that, and by chance in one of a hundred tables such as this (the binomial test).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from measured import read_lines, run_measured
from numpy.typing import NDArray
from scipy.stats import binomtest

from posttrain.config import validate
from posttrain.gating import Report, hold, read_report
from posttrain.metrics import evidence, paired
from posttrain.metrics.measured import Measured, Shared, detectable_of, p_value_of, shared_rows
from posttrain.verdict import Verdict, read_verdict
from stages.gate import Gate

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "tiny_gate.yaml"
PAIRS = ROOT / "posttrain" / "quickstart" / "data" / "pairs.jsonl"
BETTER = {"answers passed": "rise", "nll": "drop", "preference accuracy": "rise", "preference margin": "rise"}
"""Metrics that are drawn, and which way is better."""
WORSE = {"rise": "drop", "drop": "rise"}
CONFIDENCE = 0.95
SURE = 0.01


@dataclass(frozen=True)
class Truth:
    """What is taken for the truth about a metric: scores before and after, and weights, each (N,)."""

    metric: str
    before: NDArray[np.float64]
    after: NDArray[np.float64]
    weights: NDArray[np.float64]

    @property
    def shared(self) -> Shared:
        """As the evaluation compares them."""
        return Shared(self.before.tolist(), self.after.tolist(), self.weights.tolist())

    def report(self, rng: np.random.Generator, by: float | None) -> Report:
        """An evaluation of as many rows, of two policies as they are, or that truly differ `by` so much."""
        rows = rng.integers(len(self.before), size=len(self.before))
        before, after, weights = self.before[rows], self.after[rows], self.weights[rows]
        if by is not None and self.shared.are_passed:
            share = float(np.mean(self.before != self.after))
            # Where more would have to differ than do, rows that both pass, or both do not, join them.
            differ = (before != after) | (rng.random(len(rows)) < max(0.0, abs(by) - share) / (1 - share))
            wins = rng.random(len(rows)) < (1 + by / max(share, abs(by))) / 2
            before, after = np.where(differ, ~wins, before).astype(float), np.where(differ, wins, after).astype(float)
        elif by is not None:
            after = after + by - self.shared.difference
        return Report("drawn", ["a", "b"], {"a": {self.metric: _measured(before, weights)}, "b": {self.metric: _measured(after, weights)}})


@dataclass(frozen=True)
class Case:
    """Something that may be judged wrongly, and how often it may."""

    metric: str
    what: str
    at_most: float
    is_wrong: Callable[[np.random.Generator, int], bool]


def main() -> None:
    """Train, judge, draw, print the tables, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds are trained")
    parser.add_argument("--draws", type=int, default=1000, help="how often rows are drawn")
    parser.add_argument("--resamples", type=int, default=paired.NUM_RESAMPLES, help="of each bootstrap and each test, as in an evaluation")
    parser.add_argument("--keep", type=Path, help="directory of the runs, which are kept; by default one that is taken down")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    paired.NUM_RESAMPLES = evidence.NUM_RESAMPLES = arguments.resamples
    with tempfile.TemporaryDirectory(prefix="posttrain-gates-") as scratch:
        root = arguments.keep or Path(scratch)
        trained = [train(seed, root / f"seed_{seed}") for seed in range(arguments.seeds)]
        report = read_report("eval", root / "seed_0" / "tiny-gate" / "eval" / "output")
    for number, good_and_bad in enumerate(trained):
        for name, verdict in good_and_bad.items():
            print(f"seed {number}  {name:<8}  {'passed' if not verdict.failed else 'FAILED'}  " + "; ".join(g.words for g in verdict.gates))
    listed = list(cases(report))
    drawn = [judge_draws(case, arguments.draws, SURE / len(listed)) for case in listed]
    if arguments.json is not None:
        told = [{name: [gate.words for gate in verdict.failed] for name, verdict in each.items()} for each in trained]
        arguments.json.write_text(json.dumps({"failed_gates": told, "drawn": drawn}, indent=1) + "\n", encoding="utf-8")
    if any(each["over"] for each in drawn) or any(each["good"].failed or not each["swapped"].failed for each in trained):
        sys.exit("the promise is not kept")


def train(seed: int, root: Path) -> dict[str, Verdict]:
    """The verdict of the chain of that seed, and of the same chain with swapped pairs."""
    root.mkdir(parents=True, exist_ok=True)
    swapped = root / "swapped.jsonl"
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in read_lines(PAIRS)]
    swapped.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    verdicts = {}
    for name, run, changes in (("good", "tiny-gate", []), ("swapped", "swapped", [f"sources.prefs.data={swapped}"])):
        # A gate that fails is what is looked for, and would end the command with another code.
        changes += [f"run={run}", *(f"stages.{stage}.seed={seed}" for stage in ("sft", "dpo")), "stages.better.on_fail=warn"]
        command = [sys.executable, str(ROOT / "pipeline.py"), "run", str(CONFIG), *changes, "--root", str(root)]
        run_measured(command, env={"HF_HUB_OFFLINE": "1"}, log=root / f"{name}.log")
        verdict = read_verdict(root / run / "better" / "output")
        assert verdict is not None, "a run that ends well has finished all its stages"
        verdicts[name] = verdict
    return verdicts


def cases(report: Report) -> Iterator[Case]:
    """All that is drawn of an evaluation of two policies."""
    before, after = (report.measured[policy] for policy in report.policies)
    for metric, better in BETTER.items():
        shared = shared_rows(before[metric], after[metric])
        assert shared is not None, "both policies have the same contract"
        truth = Truth(metric, *(np.array(values) for values in (shared.baseline, shared.other, shared.weights)))
        yield from _cases_of(truth, better, after[metric].value)


def _cases_of(truth: Truth, better: str, value: float) -> Iterator[Case]:
    metric, difference = truth.metric, truth.shared.difference
    apart = detectable_of(truth.shared, confidence=CONFIDENCE)
    assert apart is not None, "the policies differ on some rows"
    sign = 1.0 if better == "rise" else -1.0
    way, at = ("rise" if difference > 0 else "drop"), abs(difference)

    def gated(by: float | None, passes: bool, **limit: Any) -> Callable[[np.random.Generator, int], bool]:
        gate = validate(Gate, {"metric": metric, "policy": "b", "confidence": CONFIDENCE, **limit}, "gate")
        return lambda rng, seed: hold(gate, [truth.report(rng, by)], seed, "gate").passed is passes

    def tested(by: float, finds: bool) -> Callable[[np.random.Generator, int], bool]:
        return lambda rng, seed: (_p_value(truth.report(rng, by), metric, seed) < 1 - CONFIDENCE) is finds

    promised, missed, drops, rises = 1 - CONFIDENCE, 1 - evidence.POWER, f"max_{WORSE[better]}", f"min_{better}"
    for side in ("min", "max"):
        yield Case(metric, f"{side}: at the limit", promised, gated(None, True, **{side: value}))
        yield Case(metric, f"{side}_{way}: at the limit", promised, gated(None, True, vs="a", **{f"{side}_{way}": at}))
    yield Case(metric, f"{drops}: 0, equal", promised, gated(0.0, True, vs="a", **{drops: 0.0}))
    yield Case(metric, f"{drops}: D, worse by D", promised, gated(-sign * apart, True, vs="a", **{drops: apart}))
    yield Case(metric, f"{drops}: D, equal", missed, gated(0.0, False, vs="a", **{drops: apart}))
    yield Case(metric, f"{rises}: 0, better by D", missed, gated(sign * apart, False, vs="a", **{rises: 0.0}))
    yield Case(metric, "p < 0.05, equal", promised, tested(0.0, True))
    yield Case(metric, "p >= 0.05, apart by D", missed, tested(sign * apart, False))


def _measured(scores: NDArray[np.float64], weights: NDArray[np.float64]) -> Measured:
    return Measured(float(np.average(scores, weights=weights)), dict(enumerate(scores.tolist())), dict(enumerate(weights.tolist())))


def _p_value(report: Report, metric: str, seed: int) -> float:
    shared = shared_rows(*(report.measured[policy][metric] for policy in report.policies))
    assert shared is not None, "the same rows were drawn for both"
    return p_value_of(shared, seed=seed)


def judge_draws(case: Case, num_draws: int, sure: float) -> dict[str, Any]:
    """How often it is wrong, printed and returned; `over` where so many would be by chance with a lower probability than `sure`."""
    wrong = sum(case.is_wrong(np.random.default_rng([number, 1]), number) for number in range(num_draws))
    over = bool(binomtest(wrong, num_draws, case.at_most, alternative="greater").pvalue < sure)
    share = wrong / num_draws
    print(f"{case.metric:<20}  {case.what:<30}  wrong {share:6.1%}  at most {case.at_most:.1%}{'  OVER' if over else ''}", flush=True)
    return {"metric": case.metric, "case": case.what, "wrong": share, "at_most": case.at_most, "over": over}


if __name__ == "__main__":
    main()
