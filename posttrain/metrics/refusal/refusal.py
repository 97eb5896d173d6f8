"""`evaluate` module: the share of answers that refuse, or do not, as their `refusal` check expects; see posttrain/metrics/refusals.py."""

from posttrain.metrics import answers


class Refusal(answers.AnswerMetric):
    """Accuracy over answers, each with its own `refusal` spec."""

    kind = "refusal"


METRIC = Refusal
