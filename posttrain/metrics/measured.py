"""What results by row amount to: for each metric of a policy its value, and by row what its interval is drawn from.

The values are those of the `evaluate` modules beside this file. Imports no torch.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.metrics.metric import load_metric
from posttrain.metrics.paired import Comparison, Interval, compare, interval


@dataclass(frozen=True)
class Measured:
    """One metric of one policy: its value, and per row the score and the weight that the interval draws from."""

    value: float
    scores: dict[int, float]
    weights: dict[int, float]


def interval_of(measured: Measured, *, confidence: float, seed: int) -> Interval:
    """The bootstrap interval of one policy's metric."""
    return interval(list(measured.scores.values()), weights=list(measured.weights.values()), seed=seed, confidence=confidence)


def difference_of(base: Measured, other: Measured, *, confidence: float, seed: int) -> Comparison | None:
    """The paired difference from `base` on the rows that both have; None where the same row counts as another number of tokens."""
    shared = [row for row in other.scores if row in base.scores]
    if any(other.weights[row] != base.weights[row] for row in shared):
        return None
    return compare(
        [base.scores[row] for row in shared],
        [other.scores[row] for row in shared],
        weights=[base.weights[row] for row in shared],
        seed=seed,
        confidence=confidence,
    )


def measure_results(results: Iterable[Mapping[str, Any]]) -> dict[str, Measured]:
    """The metrics that the results of one policy give, each a row and a measure as `rows.jsonl` of a report holds them."""
    by_measure: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for result in results:
        by_measure[result["measure"]][result["row"]] = result
    measured: dict[str, Measured] = {}
    if by_measure["nll"]:
        measured["nll"] = _nll(by_measure["nll"])
    if by_measure["chosen"]:
        measured |= _preference(by_measure["chosen"], by_measure["rejected"])
    if by_measure["answer"]:
        measured |= _answers(by_measure["answer"])
    return measured


def _nll(results: dict[int, Mapping[str, Any]]) -> Measured:
    computed = load_metric("assistant_nll").compute(
        predictions=[-result["logp"] for result in results.values()], references=[result["num_tokens"] for result in results.values()]
    )
    weights = {row: float(result["num_tokens"]) for row, result in results.items()}
    return Measured(computed["nll"], dict(zip(results, computed["scores"], strict=True)), weights)


def _preference(chosen: dict[int, Mapping[str, Any]], rejected: dict[int, Mapping[str, Any]]) -> dict[str, Measured]:
    computed = load_metric("preference").compute(
        predictions=[[chosen[row]["logp"], rejected[row]["logp"]] for row in chosen],
        references=[[chosen[row]["num_tokens"], rejected[row]["num_tokens"]] for row in chosen],
    )
    once = dict.fromkeys(chosen, 1.0)
    return {
        "preference accuracy": Measured(computed["accuracy"], dict(zip(chosen, computed["scores"], strict=True)), once),
        "preference margin": Measured(computed["margin"], dict(zip(chosen, computed["margins"], strict=True)), once),
    }


def _answers(results: dict[int, Mapping[str, Any]]) -> dict[str, Measured]:
    """Each checker's accuracy over the rows that carry it, and `answers`: the share of rows that pass all their checks.

    Of instructions there are four, by the names of lm-evaluation-harness: of rows that follow all of theirs and of single
    instructions, both strictly and loosely. Rows pass, or not, by the strict ones.
    """
    by_kind: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for row, result in results.items():
        for reference in result["checks"]:
            by_kind[_kind(reference)].append((row, result["answer"], reference))
    passed: dict[int, float] = dict.fromkeys(results, 1.0)
    measured: dict[str, Measured] = {}
    for kind, cases in sorted(by_kind.items()):
        computed = load_metric(kind).compute(predictions=[c[1] for c in cases], references=[c[2] for c in cases])
        scores: dict[int, float] = {}
        for (row, _, _), score in zip(cases, computed["scores"], strict=True):
            scores[row] = min(score, scores.get(row, 1.0))
            passed[row] = min(score, passed[row])
        if kind == "instruction":
            measured |= _instructions([row for row, _, _ in cases], computed)
        else:
            measured[kind] = Measured(sum(scores.values()) / len(scores), scores, dict.fromkeys(scores, 1.0))
    overall = Measured(sum(passed.values()) / len(passed), passed, dict.fromkeys(passed, 1.0))
    return {"answers passed": overall, **(measured if len(measured) > 1 else {})}


def _instructions(rows: Sequence[int], computed: dict[str, Any]) -> dict[str, Measured]:
    """`rows` names the row of each instruction. Of single ones, a row's score is a share, and its weight how many it has."""
    measured = {}
    for how, accuracy, scores in (
        ("strict", computed["accuracy"], computed["scores"]),
        ("loose", computed["loose_accuracy"], computed["loose_scores"]),
    ):
        by_row: dict[int, list[float]] = defaultdict(list)
        for row, score in zip(rows, scores, strict=True):
            by_row[row].append(score)
        whole = {row: min(each) for row, each in by_row.items()}
        shares = {row: sum(each) / len(each) for row, each in by_row.items()}
        weights = {row: float(len(each)) for row, each in by_row.items()}
        measured[f"prompt_level_{how}_acc"] = Measured(sum(whole.values()) / len(whole), whole, dict.fromkeys(whole, 1.0))
        measured[f"inst_level_{how}_acc"] = Measured(accuracy, shares, weights)
    return measured


def _kind(reference: str) -> str:
    kind: str = json.loads(reference)["kind"]
    return kind
