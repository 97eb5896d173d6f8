"""`evaluate` module: the share of answers that follow their `instruction`; what follows it is in posttrain/metrics/ifeval.py.

Beside the strict `accuracy` and `scores` it gives `loose_accuracy` and `loose_scores`.
"""

from typing import Any

from posttrain.metrics import answers, ifeval


class Instruction(answers.AnswerMetric):
    """Accuracy over answers, each with its own `instruction` spec."""

    kind = "instruction"

    def _compute(self, *, predictions: list[str], references: list[str]) -> dict[str, Any]:
        strict = super()._compute(predictions=predictions, references=references)
        loose = []
        for row, (answer, spec) in enumerate(zip(predictions, references, strict=True)):
            check = self._read(spec, f"references[{row}]")
            assert isinstance(check, ifeval.Instruction)
            loose.append(float(ifeval.follows_loosely(check, answer)))
        return {**strict, "loose_accuracy": sum(loose) / len(loose), "loose_scores": loose}


METRIC = Instruction
