"""`evaluate` module: the share of answers that pass their `exact_answer` check; what passes is in posttrain/metrics/check.py."""

from posttrain.metrics import answers


class ExactAnswer(answers.AnswerMetric):
    """Accuracy over answers, each with its own `exact_answer` spec."""

    kind = "exact_answer"


METRIC = ExactAnswer
