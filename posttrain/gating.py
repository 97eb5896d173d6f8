"""Gating: limits held against what evaluations measured, by row, so that a difference is one on the very same rows.

A gate without `confidence` goes by the value. With it, the bound on the side of the limit has to keep the limit: a policy that does
not keep it passes with a probability of 1 - confidence at most. So it is with many gates of which all must pass, uncorrected: to pass
wrongly, the one that the policy violates has to be passed (the intersection-union test; Berger, 1982).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import disk
from posttrain.config import nearest
from posttrain.error import UserError
from posttrain.metrics.measured import Measured, Shared, bounds_of, compare_shared, interval_of, measure_results, shared_rows
from posttrain.results import read_results
from posttrain.stage import StageContext
from posttrain.verdict import Judged, Verdict

if TYPE_CHECKING:
    from stages.gate import Gate, GateConfig

SHOWN_CONFIDENCE = 0.95
"""Of the interval that is shown of a gate which has no confidence of its own."""
ROUNDING = 1e-9
"""By so much a value may miss its limit: 0.3 - 0.1 is not 0.2."""


@dataclass(frozen=True)
class Report:
    """What one evaluation measured."""

    name: str
    policies: list[str]
    measured: Mapping[str, Mapping[str, Measured]]
    """By policy and metric."""


def read_report(name: str, directory: Path) -> Report:
    """The report that an evaluation wrote there."""
    results: dict[str, list[dict[str, Any]]] = {policy: [] for policy in disk.read_json(directory / "table.json")["columns"][2:]}
    for result in read_results(directory):
        if result["policy"] in results:
            results[result["policy"]].append(result)
    return Report(name, list(results), {policy: measure_results(found) for policy, found in results.items()})


def judge(context: StageContext["GateConfig"]) -> Verdict:
    """Hold every gate against the reports. Raises `UserError` where one asks for what was not measured, or cannot be compared."""
    reports = [read_report(given.name, given.report) for given in context.inputs["reports"]]
    config = context.config
    gates = [hold(gate, reports, config.seed, f"{context.at}.gates.{number}") for number, gate in enumerate(config.gates)]
    return Verdict(config.on_fail, gates)


def hold(gate: "Gate", reports: Sequence[Report], seed: int, at: str) -> Judged:
    """Hold one gate, whose config path is `at`, against the reports. Raises `UserError`."""
    policy = gate.policy or reports[0].policies[-1]  # the plan saw to it that there is one report then
    report = _find(gate, policy, reports, at)
    got = report.measured[policy][gate.metric]
    limit, wanted = gate.limit
    found: Measured | Shared = got
    value = got.value
    if gate.vs is not None:
        base = report.measured[gate.vs].get(gate.metric)
        shared = None if base is None else shared_rows(base, got)
        if shared is None:
            raise UserError(f"{at}.vs: {gate.metric} of {policy} and of {gate.vs} are of other rows, or of other tokens in the same rows")
        found, value = shared, shared.difference
    low, high = _spread(found, gate.confidence, seed)
    if limit.endswith("drop"):  # a rise seen from the other side
        value, low, high = 0.0 - value, _negated(high), _negated(low)
    is_upper = limit.startswith("max")
    decides = value if gate.confidence is None else high if is_upper else low
    passed = decides is not None and (decides <= wanted + ROUNDING if is_upper else decides >= wanted - ROUNDING)
    return Judged(gate.metric, policy, gate.vs, limit, wanted, value, low, high, gate.confidence, len(found.weights), passed)


def _spread(found: Measured | Shared, confidence: float | None, seed: int) -> tuple[float | None, float | None]:
    """A bound on each side, with that confidence by itself; without one, the interval that is shown."""
    if confidence is not None:
        return bounds_of(found, confidence=confidence, seed=seed) or (None, None)
    if isinstance(found, Shared):
        difference = compare_shared(found, confidence=SHOWN_CONFIDENCE, seed=seed)
        return difference.low, difference.high
    own = interval_of(found, confidence=SHOWN_CONFIDENCE, seed=seed)
    return own.low, own.high


def _negated(bound: float | None) -> float | None:
    return None if bound is None else 0.0 - bound


def _find(gate: "Gate", policy: str, reports: Sequence[Report], at: str) -> Report:
    """The one report that has the metric of the policy, and the policy that it is compared with."""
    able = [report for report in reports if {policy, gate.vs or policy} <= set(report.policies)]
    having = [report for report in able if gate.metric in report.measured[policy]]
    if not having:
        known = list(dict.fromkeys(metric for report in able for metric in report.measured[policy]))
        where = " or ".join(report.name for report in able)
        raise UserError(f"{at}.metric: {gate.metric!r} is not measured of {policy} by {where}; {nearest(gate.metric, known)}")
    if len(having) > 1:
        names = " and ".join(report.name for report in having)
        raise UserError(f"{at}.metric: {gate.metric!r} of {policy} is measured by {names}; make a stage of gates for each of them")
    return having[0]
