"""The shipped `evaluate` modules: their values against hand-computed ones, and loading them where there is nothing to rely on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from setuptools import find_packages

from posttrain.error import UserError
from posttrain.metrics.check import KINDS, as_reference, read_check, score
from posttrain.metrics.metric import METRICS, load_metric

REPO_ROOT = Path(__file__).resolve().parents[3]
FOLDER = REPO_ROOT / "posttrain" / "metrics"

ANSWERS = {
    "exact_answer": [("Paris", {"answer": "Paris"}), ("Rome", {"answer": "Paris"}), ("é", {"answer": ["e\u0301"]}), ("", {"answer": "x"})],
    "final_number": [("#### 1,080", {"answer": 1080}), ("50%", {"answer": "50"}), ("5 then 7", {"answer": 5}), ("", {"answer": 0})],
    "regex_match": [("a1", {"pattern": r"\d"}), ("a1", {"pattern": r"\d", "full": True}), ("", {"pattern": "x"})],
    "json_validity": [("{}", {}), ("NaN", {}), ('```json\n{"a": 1}\n```', {"required_keys": ["a"]}), ("", {})],
    "length_limits": [("a b c", {"max_words": 3}), ("a b c", {"max_words": 2}), ("", {"min_words": 1})],
    "refusal": [("I can't help with that.", {"expected": True}), ("Sure!", {"expected": False}), ("Sure!", {"expected": True})],
    "instruction": [("a", {"id": "punctuation:no_comma"}), ("a, b", {"id": "punctuation:no_comma"}), ('"a"', {"id": "startend:quotation"})],
}


def test_assistant_nll_weighs_tokens_and_not_rows():
    result = load_metric("assistant_nll").compute(predictions=[2.0, 30.0, 0.0], references=[4, 10, 2])
    assert result["nll"] == pytest.approx(32 / 16)
    assert result["perplexity"] == pytest.approx(np.exp(2.0))
    assert result["scores"] == [0.5, 3.0, 0.0]


def test_assistant_nll_is_the_weighted_mean_of_its_scores():
    rng = np.random.default_rng(0)
    num_tokens = rng.integers(1, 100, 50)
    result = load_metric("assistant_nll").compute(predictions=rng.gamma(2, size=50) * num_tokens, references=num_tokens)
    assert result["nll"] == pytest.approx(np.average(result["scores"], weights=num_tokens))


def test_a_perplexity_beyond_floats_is_infinite():
    assert load_metric("assistant_nll").compute(predictions=[1e6], references=[1])["perplexity"] == np.inf


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "no rows"),
        ([1.0, float("nan")], [1, 1], r"predictions\[1\]: nan is not finite"),
        ([float("inf")], [1], r"predictions\[0\]: inf is not finite"),
        ([1.0], [0], r"references\[0\]: 0 scored tokens"),
        ([1.0, 2.0], [1], "Mismatch in the number"),
    ],
)
def test_assistant_nll_refuses_what_has_no_value(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        load_metric("assistant_nll").compute(predictions=predictions, references=references)


def test_preference_counts_wins_and_half_of_ties_by_sum_and_by_token():
    predictions = [[-10.0, -20.0], [-30.0, -20.0], [-5.0, -5.0], [-12.0, -9.0]]
    references = [[10, 10], [30, 10], [5, 10], [12, 9]]
    result = load_metric("preference").compute(predictions=predictions, references=references)
    assert result["margins"] == [10.0, -10.0, 0.0, -3.0]
    assert result["scores"] == [1.0, 0.0, 0.5, 0.0]
    assert result["accuracy"] == 0.375
    assert result["margin"] == -0.75
    # Per token: -1 against -2, -1 against -2, -1 against -0.5, -1 against -1.
    assert result["accuracy_per_token"] == 0.625
    assert result["margin_per_token"] == pytest.approx((1 + 1 - 0.5 + 0) / 4)


def test_swapping_chosen_and_rejected_mirrors_preference():
    rng = np.random.default_rng(1)
    logps, num_tokens = -rng.gamma(2, size=(40, 2)), rng.integers(1, 50, (40, 2))
    metric = load_metric("preference")
    there = metric.compute(predictions=logps, references=num_tokens)
    back = metric.compute(predictions=logps[:, ::-1], references=num_tokens[:, ::-1])
    assert there["margin"] == pytest.approx(np.mean(logps[:, 0] - logps[:, 1]))
    assert there["accuracy"] == np.mean(logps[:, 0] > logps[:, 1])
    for name, centre in (("accuracy", 1), ("accuracy_per_token", 1), ("margin", 0), ("margin_per_token", 0)):
        assert there[name] + back[name] == pytest.approx(centre)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "no pairs"),
        ([[-1.0, float("nan")]], [[1, 1]], r"predictions\[0\]: \[-1.0, nan\] is not finite"),
        ([[-1.0, None]], [[1, 1]], r"predictions\[0\]: \[-1.0, None\] is not finite"),
        ([[-1.0, -2.0]], [[1, 0]], r"references\[0\]: \[1, 0\] tokens"),
        ([[-1.0]], [[1, 1]], "expected format"),
    ],
)
def test_preference_refuses_what_has_no_value(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        load_metric("preference").compute(predictions=predictions, references=references)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_answer_metric_gives_the_scores_of_its_checks_and_their_mean(kind):
    answers = [answer for answer, _ in ANSWERS[kind]]
    checks = [read_check({"kind": kind, **fields}, "row") for _, fields in ANSWERS[kind]]
    result = load_metric(kind).compute(predictions=answers, references=[as_reference(check) for check in checks])
    assert result["scores"] == [score(check, answer) for check, answer in zip(checks, answers, strict=True)]
    assert result["accuracy"] == pytest.approx(np.mean(result["scores"]))
    assert 0 < result["accuracy"] < 1


def test_an_answer_metric_names_the_row_of_a_bad_reference():
    good = json.dumps({"kind": "regex_match", "pattern": "a"})
    for bad, message in (
        ("{", r"^references\[1\]: not JSON"),
        (json.dumps({"kind": "regex_match", "pattern": "a)"}), r"^references\[1\]\.pattern: not a regular expression"),
        (json.dumps({"kind": "json_validity"}), r"^references\[1\]\.kind: 'json_validity' given to the metric 'regex_match'"),
    ):
        with pytest.raises(UserError, match=message):
            load_metric("regex_match").compute(predictions=["a", "a"], references=[good, bad])


def test_an_answer_metric_refuses_no_rows():
    with pytest.raises(ValueError, match="exact_answer: no rows"):
        load_metric("exact_answer").compute(predictions=[], references=[])


def test_a_metric_is_named_like_its_folder_and_can_be_used_again():
    for name in METRICS:
        assert load_metric(name).name == name
    metric = load_metric("assistant_nll")
    assert [metric.compute(predictions=[nll], references=[1])["nll"] for nll in (1.0, 2.0)] == [1.0, 2.0]


def test_an_unknown_metric_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="no metric is called 'asistant_nll'; did you mean 'assistant_nll'"):
        load_metric("asistant_nll")


def test_every_metric_is_one_folder_that_a_package_build_includes():
    assert {path.parent.name for path in FOLDER.glob("*/*.py")} == set(METRICS)
    assert {f"posttrain.metrics.{name}" for name in METRICS} <= set(find_packages(str(REPO_ROOT)))
    assert all((FOLDER / name / f"{name}.py").is_file() for name in METRICS)


OFFLINE = """
import socket
socket.socket.connect = None
from posttrain.metrics.metric import METRICS, load_metric
metrics = {name: load_metric(name) for name in METRICS}
print(metrics["assistant_nll"].compute(predictions=[2.0], references=[4])["nll"])
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=REPO_ROOT, capture_output=True, text=True, env=environment, timeout=300
    )


def test_all_metrics_load_without_network_or_a_writable_cache_and_leave_nothing_behind(tmp_path):
    done = run(OFFLINE, HF_HOME="/dev/null/unwritable", HOME="/dev/null/unwritable", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0.5\n"
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


LIBRARY = """
import json, os, socket, sys
socket.socket.connect = None
import evaluate
from posttrain.metrics.metric import METRICS, load_metric

def agree():
    for name in METRICS:
        metric = evaluate.load(f"posttrain/metrics/{name}")
        assert metric.name == name, metric.name
        assert metric.features == load_metric(name).features
    result = evaluate.load("posttrain/metrics/final_number").compute(
        predictions=["#### 7", "8"], references=[json.dumps({"kind": "final_number", "answer": 7})] * 2)
    assert result == {"accuracy": 0.5, "scores": [1.0, 0.0]}, result

children = []
for _ in range(4):
    if (child := os.fork()) == 0:
        agree()
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def test_evaluate_loads_every_folder_too_in_several_processes_at_once(tmp_path):
    done = run(LIBRARY, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
