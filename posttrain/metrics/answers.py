"""What the `evaluate` modules of the answer checkers share: texts and specs in, scores and their mean out."""

import json
from typing import Any, ClassVar

import datasets  # type: ignore[import-untyped,unused-ignore]
import evaluate  # type: ignore[import-untyped,unused-ignore]

from posttrain.error import UserError
from posttrain.metrics.check import KINDS, Check, read_check, score

INPUTS = """
    predictions: list[str], the answers.
    references: list[str], for each answer the check's spec as JSON, `kind` included.
Returns {"accuracy": share of the answers that pass, "scores": list of 0.0 or 1.0}.
"""


class AnswerMetric(evaluate.Metric):  # type: ignore[misc,unused-ignore]
    """Scores each answer by its own check; a subclass names the kind of check that it takes."""

    kind: ClassVar[str]

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=KINDS[self.kind].__doc__ or "", citation="", inputs_description=INPUTS, features=features)

    def _compute(self, *, predictions: list[str], references: list[str]) -> dict[str, Any]:
        if not predictions:
            raise ValueError(f"{self.kind}: no rows to score")
        scores = [
            score(self._read(spec, f"references[{row}]"), answer)
            for row, (answer, spec) in enumerate(zip(predictions, references, strict=True))
        ]
        return {"accuracy": sum(scores) / len(scores), "scores": scores}

    def _read(self, spec: str, at: str) -> Check:
        try:
            raw = json.loads(spec)
        except ValueError as error:
            raise UserError(f"{at}: not JSON ({error})") from None
        check = read_check(raw, at)
        if check.kind != self.kind:
            raise UserError(f"{at}.kind: {check.kind!r} given to the metric {self.kind!r}; give each check to the metric of its own kind")
        return check
