"""Gates against values by hand and their promised error in simulation; and what a failed one keeps from starting. Nothing is trained here:
evaluations are written by hand, and a stand-in builds all stages but gates."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import pipeline
from posttrain import artifact, disk, ledger
from posttrain.config import read_pipeline, validate
from posttrain.error import GateFailed, UserError
from posttrain.gating import Report, hold
from posttrain.launch import jobs
from posttrain.metrics import paired
from posttrain.metrics.measured import Measured
from posttrain.provenance import now
from posttrain.report import page, read
from posttrain.results import write_results
from posttrain.verdict import read_verdict
from stages.gate import Gate
from tests.conftest import REPOSITORY, Commands, Ended
from tests.posttrain.report.conftest import answer_results, nll_results

Cli = Callable[..., Ended]
PIPELINE = """
run: r
smoke: false
sources:
  base: {model: HERE/base}
  chat: {data: HERE/chat.jsonl}
  prefs: {data: HERE/prefs.jsonl}
  heldout: {data: HERE/heldout.jsonl}
stages:
  sft: {inputs: {policy: base, data: chat}}
  first: {kind: eval, inputs: {policies: [base, sft], data: heldout}}
  quality: {kind: gate, inputs: {reports: first}, gates: [{metric: answers passed, min: 0.5}]}
  dpo: {inputs: {policy: sft, data: prefs}}
  side: {kind: dpo, inputs: {policy: base, data: prefs}}
  last: {kind: eval, inputs: {policies: [sft, dpo, side], data: heldout}}
"""
NAMES = ("sft", "first", "quality", "dpo", "side", "last")


@dataclass
class Project(Commands):
    """A pipeline with a gate amid it, whose evaluations find what `shares` and `nlls` say of each policy."""

    here: Path
    call: Cli
    shares: dict[str, int] = field(default_factory=lambda: {"base": 1, "sft": 6, "dpo": 9, "side": 2})
    """How many of ten rows a policy passes."""
    built: list[str] = field(default_factory=list)

    def stage(self, name: str) -> Path:
        return self.root / "r" / name

    def change(self, before: str, after: str) -> None:
        text = self.config.read_text()
        assert before in text
        self.config.write_text(text.replace(before, after))

    def run(self, code: int, *arguments: str) -> list[str]:
        """Run, to end with that exit code; the names of the stages that were built for it."""
        before = len(self.built)
        ended = self.ended("run", *arguments)
        assert ended.code == code, ended.err + ended.out
        return self.built[before:]

    def rows(self, command: str = "plan", *arguments: str) -> dict[str, dict[str, Any]]:
        ended = self.ended(command, "--json", *arguments)
        assert ended.code == 0, ended.err
        return {row["stage"]: row for row in json.loads(ended.out)}

    def actions(self, *arguments: str) -> str:
        return " ".join(row["action"] for row in self.rows("plan", *arguments).values())

    def finish(self, directory: Path, attempt: ledger.Attempt) -> None:
        """What a launcher does: here gates are what they are, and all else is pretended."""
        attempt, stage, context = ledger.open_context(directory, rank=0, local_rank=0, world_size=1)
        metrics: Mapping[str, float] = {}
        if attempt.kind == "gate":
            assert stage.prepare is not None
            stage.prepare(context)
            metrics = stage.run(context)
        elif attempt.kind == "eval":
            self._evaluate(context.output, [given.name for given in context.inputs["policies"]])
        else:
            context.output.mkdir()
            (context.output / "model.safetensors").write_text(attempt.token)
        self.built.append(attempt.name)
        artifact.record_output(directory, context.output)
        disk.publish_directory(context.output, directory / artifact.OUTPUT)
        artifact.write_artifact(
            directory,
            kind=stage.output,
            fingerprint=attempt.fingerprint,
            identity=attempt.identity,
            version=attempt.version,
            inputs=attempt.input_builds,
            metrics=metrics,
            provenance={"started": attempt.started, "finished": now()},
        )

    def _evaluate(self, output: Path, policies: Sequence[str]) -> None:
        answers = {name: ["yes"] * self.shares[name] + ["no"] * (10 - self.shares[name]) for name in policies}
        write_report(output, policies, [line for name in policies for line in answer_results(name, answers[name], ["yes"] * 10)])


def write_report(output: Path, policies: Sequence[str], results: Sequence[Mapping[str, Any]]) -> None:
    output.mkdir(parents=True)
    (output / "table.json").write_text(json.dumps({"columns": ["metric", "rows", *policies], "rows": [], "notes": []}))
    write_results(output, results)


@pytest.fixture
def project(tmp_path: Path, posttrain: Cli, monkeypatch: pytest.MonkeyPatch) -> Project:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "chat.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    (tmp_path / "prefs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "another"}\n')
    (tmp_path / "pipeline.yaml").write_text(PIPELINE.replace("HERE", str(tmp_path)))
    made = Project(tmp_path, posttrain)

    @contextmanager
    def open_launcher(*_: object, **__: object) -> Iterator[Callable[..., None]]:
        yield made.finish

    monkeypatch.setattr("posttrain.launch.open_launcher", open_launcher)
    return made


# --- one gate against values by hand -----------------------------------------------------------------------------------


def measured(scores: Sequence[float], weights: Sequence[float] | None = None) -> Measured:
    weights = [1.0] * len(scores) if weights is None else [float(weight) for weight in weights]
    value = float(np.average(scores, weights=weights))
    return Measured(value, dict(enumerate(map(float, scores))), dict(enumerate(weights)))


def report(**policies: Measured) -> Report:
    return Report("eval", list(policies), {name: {"m": found} for name, found in policies.items()})


def gate(**fields: Any) -> Gate:
    return validate(Gate, {"metric": "m", **fields}, "gates.0")


FOUR = report(a=measured([0.2, 0.6, 0.4, 0.8], [1, 1, 1, 3]), b=measured([0.3, 0.5, 0.6, 0.8], [1, 1, 1, 3]))
"""Their weighted means are 0.6 and 3.8 / 6, so b is above a by 1 / 30."""


@pytest.mark.parametrize(
    ("fields", "value", "passed"),
    [
        ({"min": 0.63}, 3.8 / 6, True),
        ({"min": 0.64}, 3.8 / 6, False),
        ({"max": 0.64}, 3.8 / 6, True),
        ({"max": 0.63}, 3.8 / 6, False),
        ({"policy": "a", "min": 0.6}, 0.6, True),
        ({"vs": "a", "max_rise": 0.04}, 1 / 30, True),
        ({"vs": "a", "max_rise": 0.03}, 1 / 30, False),
        ({"vs": "a", "min_rise": 0.03}, 1 / 30, True),
        ({"vs": "a", "min_rise": 0.04}, 1 / 30, False),
        ({"vs": "a", "max_drop": 0.0}, -1 / 30, True),
        ({"vs": "a", "min_drop": 0.0}, -1 / 30, False),
        ({"policy": "a", "vs": "b", "max_drop": 0.03}, 1 / 30, False),
        ({"policy": "a", "vs": "b", "min_drop": 0.03}, 1 / 30, True),
    ],
    ids=str,
)
def test_without_confidence_the_value_decides(fields: dict[str, Any], value: float, passed: bool) -> None:
    found = hold(gate(**fields), [FOUR], 0, "gates.0")
    assert (found.value, found.passed, found.num_rows) == (pytest.approx(value), passed, 4)
    assert found.low is not None and found.high is not None and found.low <= found.value <= found.high


def test_a_value_that_only_rounding_keeps_from_its_limit_keeps_it() -> None:
    rows = report(a=measured([1.0] + [0.0] * 9), b=measured([1.0] * 3 + [0.0] * 7))
    assert hold(gate(vs="a", min_rise=0.2), [rows], 0, "").passed and hold(gate(vs="a", max_rise=0.2), [rows], 0, "").passed


def test_with_confidence_the_bound_on_the_side_of_the_limit_decides() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(3, 2, 200)
    gained = rng.normal(0.2, 0.5, 200)
    rows = report(a=measured(list(hard)), b=measured(list(hard + gained)))
    error = gained.std(ddof=1) / np.sqrt(200)
    low, high = gained.mean() - 1.645 * error, gained.mean() + 1.645 * error
    for slack, passes in ((0.1, True), (-0.1, False)):
        assert hold(gate(vs="a", max_rise=high + slack * error, confidence=0.95), [rows], 0, "").passed == passes
        assert hold(gate(vs="a", min_rise=low - slack * error, confidence=0.95), [rows], 0, "").passed == passes
    found = hold(gate(policy="a", vs="b", max_drop=0.1, confidence=0.95), [rows], 0, "")
    assert (found.value, found.low, found.high) == pytest.approx((gained.mean(), low, high), abs=0.1 * error), (
        "a drop is a rise from behind"
    )


def test_of_rows_that_pass_or_not_the_bound_is_exact() -> None:
    rows = report(a=measured([1.0] * 20), b=measured([1.0] * 20))
    alone = 0.05 ** (1 / 20)  # so likely that all 20 pass, it is seen with a probability of 5 %
    assert not hold(gate(min=alone + 1e-6, confidence=0.95), [rows], 0, "").passed
    assert hold(gate(min=alone - 1e-6, confidence=0.95), [rows], 0, "").passed
    assert not hold(gate(vs="a", max_drop=1 - alone - 1e-6, confidence=0.95), [rows], 0, "").passed, "20 rows that agree are not all rows"
    assert hold(gate(vs="a", max_drop=1 - alone + 1e-6, confidence=0.95), [rows], 0, "").passed


def test_too_few_rows_show_nothing() -> None:
    found = hold(gate(max=100.0, confidence=0.95), [report(a=measured([0.5, 0.7, 0.6]))], 0, "")
    assert (found.passed, found.low) == (False, None)
    assert found.words == "m of a is 0.6 (3 rows, too few for a bound), max 100"
    assert hold(gate(max=100.0), [report(a=measured([0.5]))], 0, "").passed


# --- the promise: a policy exactly at its limit passes once in twenty --------------------------------------------------

NUM_DRAWS = 1000
AT_MOST = 0.05 + 3 * np.sqrt(0.05 * 0.95 / NUM_DRAWS)


def paired_shares(rng: np.random.Generator, num_rows: int, lose: float, gain: float) -> Report:
    """Rows that the second policy loses or gains with these probabilities."""
    fate = rng.choice(3, num_rows, p=[lose, gain, 1 - lose - gain])
    hard = rng.random(num_rows) < 0.5
    before, after = np.where(fate == 0, 1, np.where(fate == 1, 0, hard)), np.where(fate == 0, 0, np.where(fate == 1, 1, hard))
    return report(a=measured(before), b=measured(after))


def paired_nlls(rng: np.random.Generator, rise: float) -> Report:
    """40 rows of unequal length whose nll rises so much in the mean."""
    tokens = rng.integers(5, 50, 40)
    hard = rng.gamma(4, 0.5, 40)
    return report(a=measured(hard, tokens), b=measured(hard + rng.normal(rise, 0.3, 40), tokens))


CASES: dict[str, tuple[dict[str, Any], Callable[[np.random.Generator], Report]]] = {
    "a share and min": ({"min": 0.7}, lambda rng: report(a=measured(rng.random(80) < 0.7))),
    "a high share and min": ({"min": 0.98}, lambda rng: report(a=measured(rng.random(60) < 0.98))),
    "a share and max": ({"max": 0.1}, lambda rng: report(a=measured(rng.random(80) < 0.1))),
    "a share and max_drop": ({"vs": "a", "max_drop": 0.05}, lambda rng: paired_shares(rng, 100, 0.15, 0.10)),
    "a share and max_drop, hardly a row changes": ({"vs": "a", "max_drop": 0.02}, lambda rng: paired_shares(rng, 60, 0.02, 0.0)),
    "a share and min_rise": ({"vs": "a", "min_rise": 0.1}, lambda rng: paired_shares(rng, 100, 0.05, 0.15)),
    "a mean and max_rise": ({"vs": "a", "max_rise": 0.05}, lambda rng: paired_nlls(rng, 0.05)),
    "a mean and min_drop": ({"vs": "a", "min_drop": 0.05}, lambda rng: paired_nlls(rng, -0.05)),
    "a mean and max": ({"max": 2.0}, lambda rng: report(a=measured(rng.normal(2.0, 1.0, 12)))),
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_policy_at_its_limit_passes_once_in_twenty_times_at_most(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "NUM_RESAMPLES", 999)
    fields, draw = CASES[name]
    limit = gate(**fields, confidence=0.95)
    passed = [hold(limit, [draw(np.random.default_rng(seed))], seed, "").passed for seed in range(NUM_DRAWS)]
    assert np.mean(passed) <= AT_MOST
    assert np.mean([hold(gate(**fields), [draw(np.random.default_rng(seed))], seed, "").passed for seed in range(50)]) > 0.2, "by luck"


def test_a_policy_well_on_the_right_side_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "NUM_RESAMPLES", 499)
    for fields, draw in (
        ({"min": 0.7}, lambda rng: report(a=measured(rng.random(200) < 0.85))),
        ({"vs": "a", "max_drop": 0.05}, lambda rng: paired_shares(rng, 400, 0.05, 0.08)),
        ({"vs": "a", "max_rise": 0.2}, lambda rng: paired_nlls(rng, 0.0)),
    ):
        limit = gate(**fields, confidence=0.95)
        assert np.mean([hold(limit, [draw(np.random.default_rng(seed))], seed, "").passed for seed in range(100)]) >= 0.9


def test_many_gates_are_not_passed_wrongly_more_often_than_one() -> None:
    def all_pass(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        return all(
            hold(gate(min=0.5, confidence=0.95), [report(a=measured(rng.random(60) < share))], seed, "").passed
            for share in (0.5, 0.9, 0.9, 0.9)
        )

    assert np.mean([all_pass(seed) for seed in range(NUM_DRAWS)]) <= AT_MOST, "one of them is violated, and has to be passed"


# --- what is asked wrongly -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "stages.quality.gates.0: 'nll' has no limit; set one of min, max"),
        ({"vs": "base"}, "stages.quality.gates.0: 'nll' has no limit; set one of max_rise, max_drop, min_rise, min_drop"),
        ({"min": 1, "max_rise": 2}, "stages.quality.gates.0.max_rise: stands beside min; make two gates of them"),
        ({"max_rise": 1}, "stages.quality.gates.0.max_rise: compares with a policy that is not named; set vs, or set one of min, max"),
        ({"vs": "base", "min": 1}, "stages.quality.gates.0.min: says nothing of vs: base, or set one of max_rise"),
        ({"vs": "base", "max_rise": -1}, "stages.quality.gates.0.max_rise: input should be greater than or equal to 0, got -1"),
        ({"min": 1, "confidence": 0.5}, "stages.quality.gates.0.confidence: input should be greater than 0.5"),
        ({"min": 1, "polcy": "sft"}, "stages.quality.gates.0.polcy: unknown key; did you mean 'policy'?"),
        ({"min": 1, "policy": "sfd"}, "stages.quality.gates.0.policy: 'sfd' is in no report of first; did you mean 'sft'?"),
        ({"min": 1, "policy": "dpo"}, "stages.quality.gates.0.policy: 'dpo' is in no report of first; known: base, sft"),
        ({"vs": "side", "max_rise": 1}, "stages.quality.gates.0.vs: 'side' is in no report of first; "),
        ({"vs": "sft", "max_rise": 1}, "stages.quality.gates.0.vs: 'sft' would be compared with itself; known: base"),
    ],
    ids=str,
)
def test_what_the_config_alone_shows_to_be_wrong_is_refused_by_the_plan(project: Project, fields: dict[str, Any], message: str) -> None:
    wrong = json.dumps([{"metric": "nll", **fields}])
    assert project.refused("plan", f"stages.quality.gates={wrong}").startswith(message)


def test_a_gate_reads_reports_and_has_one_gate_at_least(project: Project) -> None:
    assert "stages.quality.inputs.reports: 'sft' is a policy, not a report; first would fit" in project.refused(
        "plan", "stages.quality.inputs.reports=sft"
    )
    assert project.refused("plan", "stages.quality.gates=[]").startswith("stages.quality.gates: none listed; add at least one, such as {")


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (
            [{"metric": "answer passed", "min": 0.5}],
            "stages.quality.gates.0.metric: 'answer passed' is not measured of sft by first; did you mean 'answers passed'?",
        ),
        (
            [{"metric": "answers passed", "min": 0}, {"metric": "nll", "max": 1}],
            "stages.quality.gates.1.metric: 'nll' is not measured of sft by first; "
            "known: answer tokens, answers passed, looping, repetition, unstopped",
        ),
    ],
)
def test_a_metric_that_was_not_measured_is_refused_when_the_report_is_there(
    project: Project, gates: list[dict[str, Any]], message: str
) -> None:
    assert project.refused("run", f"stages.quality.gates={json.dumps(gates)}") == message
    assert project.built == ["sft", "first"]


def test_several_reports_are_asked_by_name(project: Project) -> None:
    project.change("  quality: {", "  again: {kind: eval, inputs: {policies: [base, sft], data: prefs}}\n  quality: {")
    project.change("{reports: first}", "{reports: [first, again]}")
    assert "stages.quality.gates.0.policy: missing; 2 reports are read, so name whose 'answers passed' is meant" in project.refused()
    project.change("passed, min", "passed, policy: sft, min")
    assert (
        project.refused("run") == "stages.quality.gates.0.metric: 'answers passed' of sft is measured by first and again; "
        "make a stage of gates for each of them"
    )


def test_scores_of_other_tokens_are_not_compared() -> None:
    rows = report(a=measured([1.0, 2.0], [2, 2]), b=measured([1.0, 2.0], [2, 3]))
    with pytest.raises(UserError, match=r"^gates\.0\.vs: m of b and of a are of other rows, or of other tokens in the same rows$"):
        hold(gate(vs="a", max_rise=1), [rows], 0, "gates.0")


# --- the verdict -----------------------------------------------------------------------------------------------------------


def test_the_verdict_is_an_artifact_that_says_what_was_held_against_what(project: Project) -> None:
    gates = [
        {"metric": "answers passed", "min": 0.5},
        {"metric": "answers passed", "vs": "base", "min_rise": 0.5, "confidence": 0.9},
        {"metric": "answers passed", "policy": "base", "max": 0.05},
    ]
    project.run(3, f"stages.quality.gates={json.dumps(gates)}")
    finished = artifact.read_artifact(project.stage("quality"))
    assert finished is not None and finished.kind == "verdict" and dict(finished.metrics) == {"passed": 1, "failed": 2}
    told = json.loads((finished.output / "verdict.json").read_text())
    assert (told["passed"], told["on_fail"]) == (False, "stop")
    first, second, third = told["gates"]
    assert first["words"] == "answers passed of sft is 0.6, min 0.5" and first["passed"] and first["num_rows"] == 10
    assert (first["low"], first["high"]) == pytest.approx((0.2624, 0.8784), abs=1e-4), "Clopper and Pearson's of 6 in 10"
    assert (second["value"], second["passed"], second["limit"], second["at"]) == (0.5, False, "min_rise", 0.5)
    assert second["low"] < 0.5 and second["words"].startswith("rise of answers passed from base to sft is 0.5 (at least ")
    assert second["words"].endswith(" with 90% confidence), min_rise 0.5")
    assert third["policy"] == "base" and not third["passed"]
    shown = project.ended("run", f"stages.quality.gates={json.dumps(gates)}").out
    assert "FAILED" in shown and "failed: nothing builds on sft, base" in shown


def test_a_report_that_was_measured_by_hand_is_judged_as_it_says(tmp_path: Path) -> None:
    from posttrain.gating import read_report

    results = nll_results("a", [2.0, 9.0], [2, 3]) + answer_results("a", ["x", "y"], ["x", "x"]) + nll_results("b", [4.0, 6.0], [2, 3])
    write_report(tmp_path / "eval", ["a", "b"], results)
    found = read_report("eval", tmp_path / "eval")
    assert found.policies == ["a", "b"]
    assert (found.measured["a"]["nll"].value, found.measured["b"]["nll"].value) == pytest.approx((11 / 5, 10 / 5))
    assert found.measured["a"]["answers passed"].value == 0.5 and "answers passed" not in found.measured["b"]


# --- what follows ----------------------------------------------------------------------------------------------------------

STRICT = "stages.quality.gates=[{metric: answers passed, min: 0.9}]"
WHY = "gate quality failed: answers passed of sft is 0.6, min 0.9"


def test_where_all_gates_pass_all_goes_on(project: Project) -> None:
    assert project.run(0) == list(NAMES)
    assert project.actions() == "skip skip skip skip skip skip"
    assert project.rows("status")["quality"]["verdict"] == "passed"
    assert "verdict" not in project.rows("status")["first"]


def test_what_builds_on_a_policy_that_failed_does_not_start_and_what_does_not_goes_on(project: Project) -> None:
    ended = project.ended("run", STRICT)
    assert ended.code == 3
    assert ended.err == "gate failed: stages.quality: answers passed of sft is 0.6, min 0.9; dpo, last did not start\n"
    assert project.built == ["sft", "first", "quality", "side"]
    assert f"dpo  blocked: {WHY}" in ended.out and "--stage side" in ended.out, "the last policy that there is"
    rows = project.rows("plan", STRICT)
    assert {name: row["action"] for name, row in rows.items()} == dict.fromkeys(NAMES, "skip") | {"dpo": "blocked", "last": "blocked"}
    assert rows["dpo"]["why"] == rows["last"]["why"] == WHY
    status = project.ended("status", STRICT).out
    assert "failed: answers passed of sft is 0.6, min 0.9" in status and WHY in status


def test_the_same_command_says_the_same_at_once(project: Project) -> None:
    first = project.ended("run", STRICT)
    project.built.clear()
    again = project.ended("run", STRICT)
    assert (again.code, again.err, project.built) == (3, first.err, [])


def test_without_a_stop_the_run_goes_on_and_says_so(project: Project) -> None:
    warn = (STRICT, "stages.quality.on_fail=warn")
    assert project.run(0, *warn) == list(NAMES)
    assert project.rows("status", *warn)["quality"]["verdict"] == "failed: answers passed of sft is 0.6, min 0.9"
    assert "on_fail: warn, so what builds on sft goes on" in project.ended("run", *warn).out


def test_a_gate_at_the_end_fails_the_run_too(project: Project) -> None:
    project.change("{metric: answers passed, min: 0.5}", "{metric: answers passed, policy: base, min: 0.9}")
    ended = project.ended("run", "--until", "quality")
    assert (ended.code, ended.err) == (3, "gate failed: stages.quality: answers passed of base is 0.1, min 0.9\n")
    assert project.rows()["side"]["action"] == "blocked", "it builds on base, and dpo on what was made of base"


def test_another_limit_is_drift_like_any_other_change(project: Project) -> None:
    project.run(3, STRICT)
    line = project.refused("run")
    assert line.startswith("stages.quality.gates: ") and "--rebuild quality" in line
    assert project.run(0, "--rebuild", "quality") == ["quality", "dpo", "last"]
    assert read_verdict(project.root / "r" / ".old" / "quality" / "1" / "output") is not None, "what was found before is kept"


def test_a_policy_that_was_built_again_is_judged_again(project: Project) -> None:
    project.run(3, STRICT)
    project.shares["sft"] = 10
    assert project.actions(STRICT, "--rebuild", "sft") == "rebuild rebuild rebuild run skip run"
    assert project.run(0, STRICT, "--rebuild", "sft") == ["sft", "first", "quality", "dpo", "last"]


def test_what_is_finished_stays_and_only_new_work_is_blocked(project: Project) -> None:
    project.run(0)
    project.run(3, STRICT, "--rebuild", "quality", "--only", "quality")
    assert project.actions(STRICT) == "skip skip skip skip skip skip"
    assert project.actions(STRICT, "--rebuild", "dpo") == "skip skip skip blocked skip blocked"
    assert project.run(3, STRICT, "--rebuild", "dpo") == []


def test_a_stage_chosen_without_the_gate_before_it_waits_for_the_verdict(project: Project) -> None:
    project.run(0, "--until", "first")
    line = project.refused("run", "--only", "dpo")
    assert line == "stages.quality: a chosen stage goes by its verdict, and it is not ready (run: not started); choose it too"
    assert project.run(0, "--only", "side") == ["side"]
    project.run(3, STRICT, "--only", "quality")
    ended = project.ended("run", STRICT, "--only", "dpo")
    assert (ended.code, ended.err.count("dpo did not start")) == (3, 1)


def test_a_verdict_of_another_run_counts_here_too(project: Project) -> None:
    project.run(3, STRICT)
    assert project.actions(STRICT, "run=other") == "reuse reuse reuse blocked reuse blocked"
    assert project.run(3, STRICT, "run=other") == []


def test_the_page_shows_gates_with_their_intervals(project: Project) -> None:
    gates = "stages.quality.gates=[{metric: answers passed, min: 0.9, confidence: 0.99}, {metric: answers passed, vs: base, min_rise: 0.1}]"
    project.run(3, gates)
    directory, list_rows = pipeline._open_run(str(project.config), (gates,), project.root)
    text = page.run_page(read.read_run(directory, list_rows()))
    for words in (
        "✗ failed",
        "✓ passed",
        "1 of 2 gates passed",
        "with 99% confidence",
        "rise from base",
        "blocked by a gate",
        "min_rise 0.1",
    ):
        assert words in text, words


def test_the_shipped_pipeline_with_gates_is_wired(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPOSITORY)
    nodes = {node.name: node for node in pipeline.plan(read_pipeline(Path("configs/tiny_gate.yaml")), tmp_path)}
    assert [gate.name for gate in nodes["dpo"].gates] == ["learned"] == [gate.name for gate in nodes["better"].gates]
    assert list(nodes["learned"].judged) == ["sft", "sft"]


# --- jobs of a cluster -------------------------------------------------------------------------------------------------------

SLURM = "launcher={kind: slurm}"
SBATCH = """#!/bin/sh
number=$(cat HERE/number); echo $((number + 1)) > HERE/number
for script; do :; done
cp "$script" "HERE/given.$number"
echo "$number|PENDING|(Priority)" >> HERE/queue
echo "$number"
"""
SQUEUE = """#!/bin/sh
cat HERE/queue
"""


@pytest.fixture
def cluster(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    (project.here / "number").write_text("11")
    (project.here / "queue").touch()
    (project.here / "bin").mkdir()
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE}.items():
        (project.here / "bin" / name).write_text(text.replace("HERE", str(project.here)))
        (project.here / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(project.here / "bin"), prepend=":")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return project


def waits(project: Project) -> dict[str, str]:
    """Of each job that was given to Slurm those that it comes after, by stage."""
    found = {}
    for path in sorted(project.here.glob("given.*")):
        options = dict(line.removeprefix("#SBATCH ").partition("=")[::2] for line in path.read_text().splitlines() if "#SBATCH" in line)
        found[options["--job-name"].removeprefix("r.")] = options.get("--dependency", "")
    return found


def test_what_builds_on_a_judged_policy_comes_after_the_gates_job(cluster: Project) -> None:
    ended = cluster.ended("submit", SLURM)
    assert ended.code == 0, ended.err
    assert waits(cluster) == {
        "sft": "",
        "first": "afterok:11",
        "quality": "afterok:12",
        "dpo": "afterok:11:13",
        "side": "",
        "last": "afterok:11:14:15:13",
    }


def test_a_failed_gate_fails_its_job_and_is_what_status_says(cluster: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.run(0, "--until", "first")
    assert cluster.ended("submit", SLURM, STRICT).code == 0
    assert waits(cluster) == {"quality": "", "dpo": "afterok:11", "side": "", "last": "afterok:12:13:11"}
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    step = cluster.call("step", cluster.stage(".jobs") / "quality" / "pipeline.json", "--stage", "quality", "--root", cluster.root)
    assert (step.code, step.err) == (3, "gate failed: stages.quality: answers passed of sft is 0.6, min 0.9\n")
    monkeypatch.delenv("SLURM_JOB_ID")
    (cluster.here / "queue").write_text("11|FAILED|(NonZeroExitCode)\n12|CANCELLED|(DependencyNeverSatisfied)\n13|PENDING|(Priority)\n")
    told = {row["stage"]: row for row in json.loads(cluster.ended("status", SLURM, STRICT, "--json").out)}
    states = {name: (row["job"]["state"], row["job"]["why"]) for name, row in told.items() if "job" in row}
    assert states["quality"] == ("failed", "stages.quality: answers passed of sft is 0.6, min 0.9")
    assert states["dpo"] == ("cancelled", "quality failed") and told["dpo"]["why"] == WHY
    run = cluster.root / "r"
    with pytest.raises(GateFailed, match=r"is 0\.6, min 0\.9$"):
        jobs.follow(run, jobs.read_jobs(run)["quality"], Console())


def test_after_a_failed_gate_only_what_does_not_build_on_it_is_submitted(cluster: Project) -> None:
    cluster.run(3, STRICT, "--until", "dpo")
    ended = cluster.ended("submit", SLURM, STRICT)
    assert (ended.code, list(waits(cluster))) == (3, ["side"])
    assert ended.err == "gate failed: stages.quality: answers passed of sft is 0.6, min 0.9; dpo, last did not start\n"


def test_a_job_that_finds_the_gate_failed_does_not_start(cluster: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.run(0, "--until", "first")
    cluster.ended("submit", SLURM, STRICT)
    cluster.run(3, STRICT, "--only", "quality")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    before = list(cluster.built)
    step = cluster.call("step", cluster.stage(".jobs") / "dpo" / "pipeline.json", "--stage", "dpo", "--root", cluster.root)
    assert (step.code, cluster.built) == (3, before)
    assert "dpo did not start" in step.err
