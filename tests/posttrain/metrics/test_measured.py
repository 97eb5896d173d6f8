"""What results by row amount to, against values by hand."""

import json
import math
from typing import Any

import pytest

from posttrain.metrics.measured import Measured, grade, measure_results

EXACT = json.dumps({"kind": "exact_answer", "answer": "yes"})
SHORT = json.dumps({"kind": "length_limits", "max_words": 1})
NO_COMMA = json.dumps({"kind": "instruction", "id": "punctuation:no_comma"})
HARMFUL, HARMLESS = (json.dumps({"kind": "refusal", "expected": expected}) for expected in (True, False))
NO = "I'm sorry, but I can't help with that."


def answer(row: int, text: str, *checks: str, **fields: Any) -> dict[str, Any]:
    told = {"row": row, "measure": "answer", "turn": 1, "answer": text, "num_tokens": len(text.split()), "ended": True, "repetition": 0.0}
    return {**told, "checks": list(checks), **fields}


def measured(*answers: dict[str, Any]) -> dict[str, Measured]:
    grade(answers)
    return measure_results(answers)


def values(found: dict[str, Measured]) -> dict[str, float]:
    return {name: each.value for name, each in found.items()}


def test_a_row_with_several_answers_passes_where_all_of_them_do() -> None:
    found = measured(
        answer(0, "yes", EXACT), answer(0, "yes", EXACT, turn=2), answer(1, "yes", EXACT), answer(1, "no", EXACT, turn=2), answer(2, "yes")
    )
    assert found["answers passed"].scores == {0: 1.0, 1: 0.0}
    assert found["answer tokens"].scores == {0: 1.0, 1: 1.0, 2: 1.0}
    assert found["answer tokens"].weights == {0: 2.0, 1: 2.0, 2: 1.0}


def test_kinds_are_told_apart_where_there_are_several() -> None:
    found = values(measured(answer(0, "yes", EXACT, SHORT), answer(1, "no", EXACT, SHORT), answer(2, "a b", SHORT)))
    assert (found["answers passed"], found["exact_answer"], found["length_limits"]) == (1 / 3, 1 / 2, 2 / 3)
    assert "exact_answer" not in measured(answer(0, "yes", EXACT))


def test_a_check_that_an_answer_breaks_off_before_is_not_passed() -> None:
    found = measured(answer(0, "", HARMLESS, num_tokens=0, ended=False), answer(1, "", HARMLESS, num_tokens=0))
    assert found["answers passed"].scores == {0: 0.0, 1: 1.0}
    assert set(found["answer tokens"].scores) == {1}, "of what was never asked, nothing else is measured"


def test_instructions_are_counted_by_row_and_by_themselves_strictly_and_loosely() -> None:
    found = values(measured(answer(0, "*a*\nb, c", NO_COMMA, EXACT), answer(1, "a", NO_COMMA, NO_COMMA)))
    assert found["inst_level_strict_acc"] == 2 / 3 and found["prompt_level_strict_acc"] == 1 / 2
    assert found["inst_level_loose_acc"] == 1.0 and found["prompt_level_loose_acc"] == 1.0, "without its last line it has no comma"


def test_refusals_are_counted_where_they_should_be_and_where_they_should_not() -> None:
    found = measured(
        answer(0, NO, HARMFUL),
        answer(1, "Sure!", HARMFUL),
        answer(2, NO, HARMLESS),
        answer(3, "Sure!", HARMLESS),
        answer(4, "Sure!", HARMLESS),
    )
    assert values(found)["refusal"] == 1 / 2 and values(found)["over_refusal"] == 1 / 3
    assert found["refusal"].scores == {0: 1.0, 1: 0.0} and found["over_refusal"].scores == {2: 1.0, 3: 0.0, 4: 0.0}
    assert found["answers passed"].value == 3 / 5


def test_all_answers_are_measured_by_how_they_end_and_whether_they_go_round() -> None:
    found = measured(
        answer(0, "a b c", ended=False, repetition=0.6, has_drifted=True),
        answer(1, "a", has_drifted=False),
        answer(2, "a b", repetition=0.3),
    )
    assert values(found) == pytest.approx(
        {"answer tokens": 2.0, "unstopped": 1 / 3, "repetition": 0.3, "looping": 1 / 3, "language drift": 1 / 2}
    )


def test_plain_text_is_measured_by_token_and_by_byte() -> None:
    results = [
        {"row": 0, "measure": "text", "logp": -8.0, "num_tokens": 4, "num_bytes": 10},
        {"row": 3, "measure": "text", "logp": -1.0, "num_tokens": 2, "num_bytes": 8},
    ]
    found = measure_results(results)
    assert found["text nll"].value == pytest.approx(9 / 6)
    assert found["text bits per byte"].value == pytest.approx(9 / math.log(2) / 18)
    assert found["text bits per byte"].weights == {0: 10.0, 3: 8.0}


def test_tokens_are_calibrated_over_all_rows_which_are_drawn_whole() -> None:
    def line(row: int, sure: int, right: int, **fields: Any) -> dict[str, Any]:
        """So many tokens that were predicted with 0.9, and so many of them that are right."""
        bins = {"bin_tokens": [0, sure], "bin_confidence": [0.0, 0.9 * sure], "bin_right": [0, right]}
        return {"row": row, "measure": "nll", "logp": -1.0, "num_tokens": sure, **bins, **fields}

    found = measure_results([line(0, 4, 4), line(5, 16, 8)])
    ece = found["token ECE"]
    assert ece.value == pytest.approx(0.9 - 12 / 20)
    assert ece.scores == pytest.approx({0: 0.9 - 1, 5: 0.9 - 0.5}) and ece.weights == {0: 4.0, 5: 16.0}
    assert set(measure_results([{"row": 0, "measure": "nll", "logp": -1.0, "num_tokens": 3}])) == {"nll"}, "nothing is known of its tokens"


def test_a_policy_and_a_reward_model_are_measured_alike_on_pairs() -> None:
    margins = [2.0, -1.0, 0.0, 0.5]
    logps = [
        {"row": row, "measure": side, "logp": -5.0 + (margin if side == "chosen" else 0), "num_tokens": 3}
        for row, margin in enumerate(margins)
        for side in ("chosen", "rejected")
    ]
    rewards = [{"row": one["row"], "measure": f"reward of {one['measure']}", "score": one["logp"]} for one in logps]
    policy, model = measure_results(logps), measure_results(rewards)
    assert policy["preference accuracy"] == model["preference accuracy"] and policy["preference accuracy"].value == 2.5 / 4
    assert policy["preference ECE"].value == pytest.approx(model["preference ECE"].value)
    assert policy["preference margin"].value == model["reward margin"].value == pytest.approx(1.5 / 4)


def test_what_has_a_score_is_a_metric_by_itself() -> None:
    results = [
        {"row": 0, "measure": "mine", "score": 1.0},
        {"row": 0, "measure": "mine", "score": 0.0, "turn": 2},
        {"row": 1, "measure": "mine", "score": 4.0, "weight": 3.0},
    ]
    ((name, found),) = measure_results(results).items()
    assert name == "mine" and found.value == pytest.approx(13 / 5)
    assert found.scores == {0: 0.5, 1: 4.0} and found.weights == {0: 2.0, 1: 3.0}
