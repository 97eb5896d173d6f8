"""The table of an evaluation: what each policy measures, and how it differs from the first one, as sure as the rows make it.

    table.json    columns, rows, notes    for people: one cell a policy, such as `0.908 (+0.206, +0.171 to +0.244, p <0.001)`
                  results                 the same for programs, and an interval of every value

Imports no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.metrics import evidence
from posttrain.metrics.measured import (
    Measured,
    compare_even,
    compare_shared,
    detectable_even,
    detectable_of,
    interval_of,
    p_value_even,
    p_value_of,
    shared_rows,
)
from posttrain.metrics.paired import Comparison


def compare_measured(measured: Mapping[str, Mapping[str, Measured]], *, confidence: float, seed: int) -> list[dict[str, Any]]:
    """Of each metric of each policy, the first being the baseline, its value with an interval, and its `difference` from the baseline
    where that has the metric too, or of what is measured of both together from the value of policies that are `even`: its value with an
    interval, p by itself and among all, and what the rows can detect.

    A difference that is not `comparable` has nothing else: a row counts as another number of tokens.
    """
    baseline = next(iter(measured))
    results = []
    for name in dict.fromkeys(name for metrics in measured.values() for name in metrics):
        for policy, metrics in measured.items():
            if (got := metrics.get(name)) is None:
                continue
            own = interval_of(got, confidence=confidence, seed=seed)
            result = {"metric": name, "policy": policy, "num_rows": len(got.scores), "value": got.value, "low": own.low, "high": own.high}
            if got.even is not None:
                result["difference"] = _from_even(got, confidence, seed)
            elif policy != baseline and (base := measured[baseline].get(name)) is not None:
                result["difference"] = _difference(base, got, confidence, seed)
            results.append(result)
    tested = [difference for _, difference in _tested(results)]
    for difference, adjusted in zip(tested, evidence.adjust([each["p"] for each in tested]), strict=True):
        difference["p_adjusted"] = adjusted
    return results


def _difference(base: Measured, got: Measured, confidence: float, seed: int) -> dict[str, Any]:
    shared = shared_rows(base, got)
    if shared is None:
        return {"comparable": False}
    difference = compare_shared(shared, confidence=confidence, seed=seed)
    p, detectable = p_value_of(shared, seed=seed), detectable_of(shared, confidence=confidence)
    return {"comparable": True, **_told(difference, p, detectable, is_share=shared.are_passed)}


def _from_even(got: Measured, confidence: float, seed: int) -> dict[str, Any]:
    difference = compare_even(got, confidence=confidence, seed=seed)
    p, detectable = p_value_even(got, seed=seed), detectable_even(got, confidence=confidence)
    return {"comparable": True, "even": got.even, **_told(difference, p, detectable, is_share=True)}


def _told(difference: Comparison, p: float, detectable: float | None, *, is_share: bool) -> dict[str, Any]:
    return {
        "value": difference.difference,
        "low": difference.low,
        "high": difference.high,
        "num_rows": difference.num_rows,
        "p": p,
        "detectable": detectable,
        "is_share": is_share,
    }


def _tested(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The differences that could be drawn, each with the name of its metric."""
    return [(result["metric"], found) for result in results if (found := result.get("difference")) and found["comparable"]]


def make_table(results: Sequence[Mapping[str, Any]], policies: Sequence[str], *, confidence: float) -> dict[str, Any]:
    """What `table.json` holds."""
    found = {(result["metric"], result["policy"]): result for result in results}
    rows = []
    for name in dict.fromkeys(result["metric"] for result in results):
        num_rows = next(found[name, policy]["num_rows"] for policy in policies if (name, policy) in found)
        rows.append([name, str(num_rows), *(_cell(found.get((name, policy))) for policy in policies)])
    notes = [_legend(results, policies[0], confidence), *_evens(results, policies[0]), *_limits(results)]
    return {"columns": ["metric", "rows", *policies], "rows": rows, "notes": notes, "results": list(results)}


def describe(results: Sequence[Mapping[str, Any]]) -> str:
    """All that is measured under one name, in a line."""
    shown = (f"{result['metric']} {_cell(result)}" for result in results)
    return f"{results[0]['policy']}: {', '.join(shown)} of {results[0]['num_rows']} rows"


def _cell(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "-"
    if (difference := result.get("difference")) is None:
        spread = "" if result["low"] is None else f" ({result['low']:.3f} to {result['high']:.3f})"
        return f"{result['value']:.3f}{spread}"
    if not difference["comparable"]:
        return f"{result['value']:.3f} (other tokens than the baseline's: not comparable)"
    if difference["low"] is None:
        return f"{result['value']:.3f} ({difference['value']:+.3f})"
    p = difference["p_adjusted"]
    shown = f"p {p:.3f}" if p >= 0.001 else "p <0.001"
    return f"{result['value']:.3f} ({difference['value']:+.3f}, {difference['low']:+.3f} to {difference['high']:+.3f}, {shown})"


def _legend(results: Sequence[Mapping[str, Any]], baseline: str, confidence: float) -> str:
    own = f"in brackets: of {baseline} its interval ({confidence:.0%})"
    if not (num_tested := len(_tested(results))):
        return own
    corrected = f", corrected for all {num_tested} differences here (Holm)" if num_tested > 1 else ""
    difference = f"of the others the paired difference from {baseline}, its interval and p"
    return f"{own}, {difference}: how likely chance alone gives as large a one{corrected}"


def _evens(results: Sequence[Mapping[str, Any]], baseline: str) -> list[str]:
    """What is measured of a policy and the first one together."""
    found = {name: difference["even"] for name, difference in _tested(results) if "even" in difference}
    return [f"{' and '.join(found)} against {baseline}: the difference is from {even:g}" for even in sorted(set(found.values()))]


def _limits(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each number of rows, the least differences that it shows; where policies differ, of the one that is harder to tell."""
    found: dict[int, dict[str, str]] = {}
    tested = _tested(results)
    for name, difference in sorted(tested, key=lambda entry: -(entry[1]["detectable"] or 0.0)):
        if difference["detectable"] is not None:
            shown = f"{100 * difference['detectable']:.1f} points" if difference["is_share"] else f"{difference['detectable']:.3f}"
            found.setdefault(difference["num_rows"], {}).setdefault(name, f"{shown} of {name}")
    order = list(dict.fromkeys(name for name, _ in tested))
    return [
        f"{num_rows} rows cannot see a difference under {' or '.join(least[name] for name in order if name in least)} "
        f"({evidence.POWER:.0%} power)"
        for num_rows in dict.fromkeys(difference["num_rows"] for _, difference in tested)
        if (least := found.get(num_rows))
    ]
