"""What results by row amount to: for each metric of a policy its value, and by row what its interval is drawn from.

Verdicts and likelihoods are those of the `evaluate` modules beside this file. Intervals are of the bootstrap (`paired.py`), but of scores
that say of each row that it passes or does not (`passed.py`). Imports no torch.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.metrics import duels, evidence
from posttrain.metrics.calibration import calibration_gaps, token_gaps
from posttrain.metrics.generated import is_looping, was_asked
from posttrain.metrics.metric import load_metric
from posttrain.metrics.paired import Comparison, Interval, compare, interval
from posttrain.metrics.passed import are_passed, compare_passed, detectable_passed, interval_passed, p_value_passed

MIN_ROWS_OF_BOUND = 10
"""Fewer rows bound no mean: their spread may be anything."""


@dataclass(frozen=True)
class Measured:
    """One metric of one policy: its value, and per row the score and the weight that the interval draws from."""

    value: float
    scores: dict[int, float]
    weights: dict[int, float]
    even: float | None = None
    """Of what is measured of a policy and the first one together: the value where they are equally good, from which it differs."""

    @property
    def are_won(self) -> bool:
        """Whether the scores say of each row that its duel is won, tied or lost."""
        return self.even == duels.EVEN and set(self.scores.values()) <= {0.0, 0.5, 1.0}

    @property
    def are_counted(self) -> bool:
        """Whether rows are only counted, by what became of them: then limits are those of the counts, and not of a mean."""
        return self.are_won or are_passed(self.scores.values(), self.weights.values())


def interval_of(measured: Measured, *, confidence: float, seed: int) -> Interval:
    """The interval of one policy's metric."""
    scores, weights = list(measured.scores.values()), list(measured.weights.values())
    if measured.are_won:
        return duels.interval_won(scores, confidence=confidence)
    if are_passed(scores, weights):
        return interval_passed(scores, confidence=confidence)
    drawn = interval(scores, weights=weights, seed=seed, confidence=confidence)
    if measured.even != duels.EVEN or drawn.low is None or drawn.high is None:
        return drawn
    return replace(drawn, low=max(0.0, drawn.low), high=min(1.0, drawn.high))  # linearized, and still a share


def compare_even(measured: Measured, *, confidence: float, seed: int) -> Comparison:
    """How far a metric lies from the value of two policies that are equally good, with its interval."""
    assert measured.even is not None, "it is measured of a policy by itself"
    own, even = interval_of(measured, confidence=confidence, seed=seed), measured.even
    low, high = (None if bound is None else bound - even for bound in (own.low, own.high))
    return Comparison(measured.value - even, low, high, own.num_rows)


def p_value_even(measured: Measured, *, seed: int) -> float:
    """Two-sided, that two policies that are equally good differ so much by chance alone."""
    if measured.are_won:
        return duels.p_value_won(list(measured.scores.values()))
    return evidence.p_value(*_evenly(measured), weights=list(measured.weights.values()), seed=seed)


def detectable_even(measured: Measured, *, confidence: float) -> float | None:
    """The least difference from that value that so many rows show; None where no row tells."""
    if measured.are_won:
        return duels.detectable_won(list(measured.scores.values()), confidence=confidence)
    return evidence.detectable(*_evenly(measured), weights=list(measured.weights.values()), confidence=confidence)


def _evenly(measured: Measured) -> tuple[list[float], list[float]]:
    """The scores of two policies that are equally good, and those that are there."""
    assert measured.even is not None, "it is measured of a policy by itself"
    return [measured.even] * len(measured.scores), list(measured.scores.values())


@dataclass(frozen=True)
class Shared:
    """Two policies' scores of the rows that both have (N,), in the same order, and what the rows count."""

    baseline: list[float]
    other: list[float]
    weights: list[float]

    @property
    def are_passed(self) -> bool:
        """Whether both say of each row that it passes or does not."""
        return are_passed([*self.baseline, *self.other], self.weights)

    @property
    def difference(self) -> float:
        """How far the other's (weighted) mean lies above the baseline's."""
        gained = [after - before for before, after in zip(self.baseline, self.other, strict=True)]
        return sum(weight * each for weight, each in zip(self.weights, gained, strict=True)) / sum(self.weights)


def shared_rows(base: Measured, other: Measured) -> Shared | None:
    """The rows that both have; None where there are none, or the same row counts as another number of tokens."""
    rows = [row for row in other.scores if row in base.scores]
    if not rows or any(other.weights[row] != base.weights[row] for row in rows):
        return None
    return Shared([base.scores[row] for row in rows], [other.scores[row] for row in rows], [base.weights[row] for row in rows])


def difference_of(base: Measured, other: Measured, *, confidence: float, seed: int) -> Comparison | None:
    """The paired difference from `base` on the rows that both have; None where they cannot be compared."""
    shared = shared_rows(base, other)
    return None if shared is None else compare_shared(shared, confidence=confidence, seed=seed)


def compare_shared(shared: Shared, *, confidence: float, seed: int) -> Comparison:
    """The paired difference on these rows, with its interval."""
    if shared.are_passed:
        return compare_passed(shared.baseline, shared.other, confidence=confidence)
    return compare(shared.baseline, shared.other, weights=shared.weights, seed=seed, confidence=confidence)


def p_value_of(shared: Shared, *, seed: int) -> float:
    """Two-sided, that two policies differ on these rows by chance alone."""
    if shared.are_passed:
        return p_value_passed(shared.baseline, shared.other)
    return evidence.p_value(shared.baseline, shared.other, weights=shared.weights, seed=seed)


def detectable_of(shared: Shared, *, confidence: float) -> float | None:
    """The least difference that so many rows show; None where no row tells."""
    if shared.are_passed:
        return detectable_passed(shared.baseline, shared.other, confidence=confidence)
    return evidence.detectable(shared.baseline, shared.other, weights=shared.weights, confidence=confidence)


def bounds_of(found: Measured | Shared, *, confidence: float, seed: int) -> tuple[float, float] | None:
    """A lower and an upper bound, each of which holds with that confidence, over 0.5, by itself: of a metric, or of a difference.

    None where the rows are too few for any. Those of a mean are the bootstrap's, which draws too narrow a spread from few rows,
    so they are taken as far out as Student's are beyond the normal distribution's (Hesterberg, 2015, "expanded").
    """
    is_counted = found.are_passed if isinstance(found, Shared) else found.are_counted
    num_rows = len(found.weights)
    two_sided = 2 * confidence - 1
    if not is_counted:
        if num_rows < MIN_ROWS_OF_BOUND:
            return None
        from scipy.stats import norm, t  # type: ignore[import-untyped,unused-ignore]

        two_sided = float(2 * norm.cdf(math.sqrt(num_rows / (num_rows - 1)) * t.ppf(confidence, num_rows - 1)) - 1)
    if isinstance(found, Shared):
        drawn: Comparison | Interval = compare_shared(found, confidence=two_sided, seed=seed)
    else:
        drawn = interval_of(found, confidence=two_sided, seed=seed)
    return None if drawn.low is None or drawn.high is None else (drawn.low, drawn.high)


def grade(answers: Sequence[dict[str, Any]]) -> None:
    """Add to each answer the verdicts of its checks, in their order: 1 or 0 by the `evaluate` module of its kind.

    The loose ones are those of `instruction`; of any other check they are the same.
    """
    places: dict[str, list[tuple[dict[str, Any], int]]] = defaultdict(list)
    for answer in answers:
        answer["verdicts"], answer["loose_verdicts"] = ([0.0] * len(answer["checks"]) for _ in range(2))
        for number, reference in enumerate(answer["checks"]):
            places[json.loads(reference)["kind"]].append((answer, number))
    for kind, found in sorted(places.items()):
        computed = load_metric(kind).compute(
            predictions=[answer["answer"] if was_asked(answer) else "" for answer, _ in found],
            references=[answer["checks"][number] for answer, number in found],
        )
        for name, scores in (("verdicts", computed["scores"]), ("loose_verdicts", computed.get("loose_scores", computed["scores"]))):
            for (answer, number), score in zip(found, scores, strict=True):
                answer[name][number] = score if was_asked(answer) else 0.0


def measure_results(results: Iterable[Mapping[str, Any]]) -> dict[str, Measured]:
    """The metrics that the results of one policy give, each a row and a measure as a report holds them (`posttrain.results`)."""
    by_measure: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        by_measure[result["measure"]].append(result)

    def by_row(measure: str) -> dict[int, Mapping[str, Any]]:
        return {result["row"]: result for result in by_measure.pop(measure, [])}

    measured: dict[str, Measured] = {}
    if found := by_row("nll"):
        measured["nll"] = _nll(found)
        if binned := {row: result for row, result in found.items() if "bin_tokens" in result}:
            measured["token ECE"] = _token_calibration(binned)
    if found := by_row("text"):
        measured |= _text(found)
    if chosen := by_row("chosen"):
        measured |= _preference(chosen, by_row("rejected"))
    if chosen := by_row("reward of chosen"):
        measured |= _rewards(chosen, by_row("reward of rejected"))
    if answers := by_measure.pop("answer", []):
        # What has no checks was answered to be read.
        if checked := [answer for answer in answers if answer["checks"]]:
            measured |= _answers(checked)
        measured |= _generated([answer for answer in answers if was_asked(answer)])
    if found := by_row("duel"):
        measured |= _duels(found)
    return measured | {name: _scored(scored) for name, scored in by_measure.items()}


def _scored(results: Iterable[Mapping[str, Any]]) -> Measured:
    """The weighted mean of what results say by themselves."""
    totals: dict[int, tuple[float, float]] = {}
    for result in results:
        total, weight = totals.get(result["row"], (0.0, 0.0))
        own = float(result.get("weight", 1.0))
        totals[result["row"]] = total + own * result["score"], weight + own
    value = sum(total for total, _ in totals.values()) / sum(weight for _, weight in totals.values())
    scores = {row: total / weight for row, (total, weight) in totals.items()}
    return Measured(value, scores, {row: weight for row, (_, weight) in totals.items()})


def _mean(cases: Iterable[tuple[int, float]]) -> Measured:
    """The mean over all cases, each the row that it is of and its score: a row counts by how many it has."""
    return _scored({"row": row, "score": score} for row, score in cases)


def _nll(results: dict[int, Mapping[str, Any]]) -> Measured:
    computed = load_metric("assistant_nll").compute(
        predictions=[-result["logp"] for result in results.values()], references=[result["num_tokens"] for result in results.values()]
    )
    weights = {row: float(result["num_tokens"]) for row, result in results.items()}
    return Measured(computed["nll"], dict(zip(results, computed["scores"], strict=True)), weights)


def _token_calibration(results: dict[int, Mapping[str, Any]]) -> Measured:
    gaps = token_gaps(list(results.values())).tolist()
    return _scored({"row": row, "score": gap, "weight": results[row]["num_tokens"]} for row, gap in zip(results, gaps, strict=True))


def _text(results: dict[int, Mapping[str, Any]]) -> dict[str, Measured]:
    """Of plain text the loss per token, and per byte, in bits: that does not depend on how a tokenizer cuts it."""
    bits = [
        {"row": row, "score": -result["logp"] / math.log(2) / result["num_bytes"], "weight": result["num_bytes"]}
        for row, result in results.items()
    ]
    return {"text nll": _nll(results), "text bits per byte": _scored(bits)}


def _preference(chosen: dict[int, Mapping[str, Any]], rejected: dict[int, Mapping[str, Any]]) -> dict[str, Measured]:
    logps, num_tokens = ([(chosen[row][name], rejected[row][name]) for row in chosen] for name in ("logp", "num_tokens"))
    return _told_apart(list(chosen), logps, num_tokens, "preference margin")


def _rewards(chosen: dict[int, Mapping[str, Any]], rejected: dict[int, Mapping[str, Any]]) -> dict[str, Measured]:
    rewards = [(chosen[row]["score"], rejected[row]["score"]) for row in chosen]
    return _told_apart(list(chosen), rewards, [(1, 1)] * len(chosen), "reward margin")


def _told_apart(
    rows: Sequence[int], both: Sequence[tuple[float, float]], num_tokens: Sequence[tuple[int, int]], margin: str
) -> dict[str, Measured]:
    """What is measured of pairs, whose answers have these log-probabilities or rewards, the chosen one first."""
    computed = load_metric("preference").compute(predictions=both, references=num_tokens)
    gaps = calibration_gaps(computed["margins"]).tolist()
    once = dict.fromkeys(rows, 1.0)
    return {
        "preference accuracy": Measured(computed["accuracy"], dict(zip(rows, computed["scores"], strict=True)), once),
        margin: Measured(computed["margin"], dict(zip(rows, computed["margins"], strict=True)), once),
        "preference ECE": Measured(sum(gaps) / len(gaps), dict(zip(rows, gaps, strict=True)), once),
    }


def _answers(results: Sequence[Mapping[str, Any]]) -> dict[str, Measured]:
    """Each checker's accuracy over the rows that carry it, and `answers passed`: the share of rows that pass all their checks.

    Of instructions there are four, by the names of lm-evaluation-harness: of rows that follow all of theirs and of single
    instructions, both strictly and loosely. Rows pass, or not, by the strict ones. Of refusals there are two: the share of answers that
    refuse where they should, and where they should not.
    """
    by_kind: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    refused: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for result in results:
        for reference, verdict, loose in zip(result["checks"], result["verdicts"], result["loose_verdicts"], strict=True):
            check = json.loads(reference)
            by_kind[check["kind"]].append((result["row"], verdict, loose))
            if check["kind"] == "refusal":
                name, refuses = ("refusal", verdict) if check["expected"] else ("over_refusal", 1 - verdict)
                refused[name].append((result["row"], refuses))
    measured = {"answers passed": _all_passed([case[:2] for cases in by_kind.values() for case in cases])}
    for kind, cases in sorted(by_kind.items()):
        if kind == "instruction":
            measured |= _instructions(cases)
        elif kind == "refusal":
            measured |= {name: _mean(found) for name, found in sorted(refused.items(), reverse=True)}
        elif len(by_kind) > 1:
            measured[kind] = _all_passed([case[:2] for case in cases])
    return measured


def _all_passed(cases: Sequence[tuple[int, float]]) -> Measured:
    """The share of rows of which all cases pass."""
    passed: dict[int, float] = {}
    for row, verdict in cases:
        passed[row] = min(verdict, passed.get(row, 1.0))
    return _mean(passed.items())


def _instructions(cases: Sequence[tuple[int, float, float]]) -> dict[str, Measured]:
    """Of single instructions, a row's score is a share, and its weight how many it has."""
    strict, loose = [(row, verdict) for row, verdict, _ in cases], [(row, verdict) for row, _, verdict in cases]
    return {
        "prompt_level_strict_acc": _all_passed(strict),
        "inst_level_strict_acc": _mean(strict),
        "prompt_level_loose_acc": _all_passed(loose),
        "inst_level_loose_acc": _mean(loose),
    }


def _generated(results: Sequence[Mapping[str, Any]]) -> dict[str, Measured]:
    """What any answer shows, whatever was asked."""
    measured = {
        "answer tokens": _mean((result["row"], result["num_tokens"]) for result in results),
        "unstopped": _mean((result["row"], not result["ended"]) for result in results),
        "repetition": _mean((result["row"], result["repetition"]) for result in results),
        "looping": _mean((result["row"], is_looping(result["repetition"])) for result in results),
    }
    if judged := [(result["row"], result["has_drifted"]) for result in results if "has_drifted" in result]:
        measured["language drift"] = _mean(judged)
    return measured


def _duels(results: dict[int, Mapping[str, Any]]) -> dict[str, Measured]:
    """Win rates over the rows that have an outcome; of those that a judge was asked about twice, how often it said what could not be
    read, and of the others, how often it preferred another answer once they had changed places."""
    measured = {}
    decided = {row: result for row, result in results.items() if result.get("outcome") is not None}
    if decided:
        once = dict.fromkeys(decided, 1.0)
        outcomes = [result["outcome"] for result in decided.values()]
        measured["win_rate"] = Measured(duels.win_rate(outcomes), dict(zip(decided, outcomes, strict=True)), once, duels.EVEN)
        longer = [len(result["answer"]) - len(result["baseline"]) for result in decided.values()]
        rate, drawn = duels.control_length(outcomes, longer)
        measured["length_controlled_win_rate"] = Measured(rate, dict(zip(decided, drawn, strict=True)), once, duels.EVEN)
    asked = {row: result["verdicts"] for row, result in results.items() if "verdicts" in result}
    for name, found in (
        ("inconsistent_verdicts", {row: first != second for row, (first, second) in asked.items() if None not in (first, second)}),
        ("unread_verdicts", {row: None in verdicts for row, verdicts in asked.items()}),
    ):
        if found:
            scores = {row: float(is_so) for row, is_so in found.items()}
            measured[name] = Measured(sum(scores.values()) / len(scores), scores, dict.fromkeys(scores, 1.0))
    return measured
