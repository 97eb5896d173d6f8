"""`evaluate` module: how often, and by how much, a policy finds the chosen answer likelier than the rejected one.

  accuracy = share of pairs with logp_chosen > logp_rejected, a tie counting half      margin = mean(logp_chosen - logp_rejected)

The sums favour short answers; the same per token divides each log-probability by the tokens of its answer first.
"""

import math
from typing import Any

import datasets  # type: ignore[import-untyped,unused-ignore]
import evaluate  # type: ignore[import-untyped,unused-ignore]

INPUTS = """
    predictions: list of [logp_chosen, logp_rejected], each summed over the tokens of the answer, in nats.
    references: list of [num_tokens_chosen, num_tokens_rejected], at least 1 each.
Returns {"accuracy", "margin" (nats), "accuracy_per_token", "margin_per_token" (nats per token),
"scores": 0.0, 0.5 or 1.0 of each pair, "margins": nats of each pair}.
"""


class Preference(evaluate.Metric):  # type: ignore[misc,unused-ignore]
    """Accuracy and margin over preference pairs, by sums and per token."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "predictions": datasets.List(datasets.Value("float64"), length=2),
                "references": datasets.List(datasets.Value("int64"), length=2),
            }
        )
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, *, predictions: list[list[float]], references: list[list[int]]) -> dict[str, Any]:
        if not predictions:
            raise ValueError("preference: no pairs to score")
        _check(predictions, references)
        margins = [chosen - rejected for chosen, rejected in predictions]
        margins_per_token = [c / n_c - r / n_r for (c, r), (n_c, n_r) in zip(predictions, references, strict=True)]
        scores = [_win(margin) for margin in margins]
        return {
            "accuracy": _mean(scores),
            "margin": _mean(margins),
            "accuracy_per_token": _mean([_win(margin) for margin in margins_per_token]),
            "margin_per_token": _mean(margins_per_token),
            "scores": scores,
            "margins": margins,
        }


def _check(predictions: list[list[float]], references: list[list[int]]) -> None:
    for row, (logps, num_tokens) in enumerate(zip(predictions, references, strict=True)):
        # A NaN compares as not greater, so it would pass for a lost pair.
        if any(logp is None or not math.isfinite(logp) for logp in logps):
            raise ValueError(f"preference: predictions[{row}]: {logps} is not finite")
        if any(count is None or count < 1 for count in num_tokens):
            raise ValueError(f"preference: references[{row}]: {num_tokens} tokens; leave out a pair with an empty answer")


def _win(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


METRIC = Preference
