"""`evaluate` module: the share of answers that pass their `length_limits` check; what passes is in posttrain/metrics/check.py."""

from posttrain.metrics import answers


class LengthLimits(answers.AnswerMetric):
    """Accuracy over answers, each with its own `length_limits` spec."""

    kind = "length_limits"


METRIC = LengthLimits
