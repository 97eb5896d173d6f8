"""`evaluate` module: the share of answers that pass their `json_validity` check; what passes is in posttrain/metrics/check.py."""

from posttrain.metrics import answers


class JsonValidity(answers.AnswerMetric):
    """Accuracy over answers, each with its own `json_validity` spec."""

    kind = "json_validity"


METRIC = JsonValidity
