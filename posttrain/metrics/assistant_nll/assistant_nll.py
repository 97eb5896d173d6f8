"""`evaluate` module: how well a policy predicts the assistant's tokens of held-out chats.

  nll = sum over rows of the summed negative log-likelihood / sum over rows of the scored tokens      perplexity = exp(nll)

Every token weighs the same, so this is not the mean of the rows' own values; pass the tokens of each row as weights to
posttrain.metrics.paired for its interval.
"""

import math
from typing import Any

import datasets  # type: ignore[import-untyped,unused-ignore]
import evaluate  # type: ignore[import-untyped,unused-ignore]

INPUTS = """
    predictions: list[float], the negative log-likelihood of each row, summed over its scored tokens, in nats.
    references: list[int], the number of scored tokens of each row, at least 1.
Returns {"nll": nats per token, "perplexity": its exponential, "scores": nats per token of each row}.
"""


class AssistantNll(evaluate.Metric):  # type: ignore[misc,unused-ignore]
    """Negative log-likelihood per token, over all rows."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, *, predictions: list[float], references: list[int]) -> dict[str, Any]:
        if not predictions:
            raise ValueError("assistant_nll: no rows to score")
        for row, (nll, num_tokens) in enumerate(zip(predictions, references, strict=True)):
            if nll is None or not math.isfinite(nll):
                raise ValueError(f"assistant_nll: predictions[{row}]: {nll} is not finite")
            if num_tokens is None or num_tokens < 1:
                raise ValueError(f"assistant_nll: references[{row}]: {num_tokens} scored tokens; leave out a row that has none")
        nll = math.fsum(predictions) / sum(references)
        scores = [total / num_tokens for total, num_tokens in zip(predictions, references, strict=True)]
        return {"nll": nll, "perplexity": _exp(nll), "scores": scores}


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


METRIC = AssistantNll
