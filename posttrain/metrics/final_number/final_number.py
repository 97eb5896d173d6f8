"""`evaluate` module: the share of answers that pass their `final_number` check; what passes is in posttrain/metrics/check.py."""

from posttrain.metrics import answers


class FinalNumber(answers.AnswerMetric):
    """Accuracy over answers, each with its own `final_number` spec."""

    kind = "final_number"


METRIC = FinalNumber
