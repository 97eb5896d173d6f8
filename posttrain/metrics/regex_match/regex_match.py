"""`evaluate` module: the share of answers that pass their `regex_match` check; what passes is in posttrain/metrics/check.py."""

from posttrain.metrics import answers


class RegexMatch(answers.AnswerMetric):
    """Accuracy over answers, each with its own `regex_match` spec."""

    kind = "regex_match"


METRIC = RegexMatch
