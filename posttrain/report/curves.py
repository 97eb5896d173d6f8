"""Curves: what was logged by step, put into charts: what is compared stands in one, and what matters most comes first."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MAX_POINTS = 400
"""Points of a curve; of a longer one, the least and the greatest of each stretch are kept, so that no peak is lost."""
SMOOTHED_FROM = 40
"""Points from which on a curve is drawn with its running mean."""
SKIPPED = re.compile(r"step|epoch|num_prompts|num_pairs|num_length_matched|heldout/.*")


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    label: str
    points: list[tuple[float, float]]
    """Step and value, by step."""
    mean: list[tuple[float, float]]
    """Its exponential running mean; empty for a short curve."""


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes."""

    title: str
    unit: str
    curves: list[Curve]
    is_main: bool
    """Whether it is among what one looks at first."""

    @property
    def summary(self) -> str:
        """What it shows, for those who cannot see it."""
        return f"{self.title}{f' in {self.unit}' if self.unit else ''}. " + " ".join(_describe(curve) for curve in self.curves)


@dataclass(frozen=True)
class Kind:
    """Which logged names belong in one chart: a pattern, whose group `label` names the curve."""

    title: str
    pattern: str
    unit: str = ""
    is_main: bool = True
    is_noisy: bool = True
    """Whether its running mean says more than it does itself."""


KINDS = (
    Kind("loss", r"(?P<label>loss)"),
    Kind("reward", r"(?P<label>reward)"),
    Kind("reward margin", r"(?:rewards/)?(?P<label>margins?)"),
    Kind("reward accuracy", r"(?:rewards/)?(?P<label>accurac(?:y|ies))"),
    Kind("rewards", r"rewards/(?P<label>chosen|rejected)"),
    Kind("rewards by source", r"rewards/(?P<label>.+)/mean"),
    Kind("KL to the reference", r"(?P<label>kl)", "nats"),
    Kind("KL of a completion", r"(?P<label>kl/completion)", "nats"),
    Kind("gradient norm", r"(?P<label>grad_norm)"),
    Kind("learning rate", r"(?P<label>learning_rate)", is_noisy=False),
    Kind("speed", r"(?P<label>(?:trained_)?tokens)_per_s", "tokens/s"),
    Kind("memory", r"(?P<label>.*(?:memory|_bytes).*)", "bytes"),
    Kind("step time", r"(?P<label>step_time_s)", "s", is_main=False),
    Kind("entropy", r"(?P<label>entropy)", "nats", is_main=False),
    Kind("token accuracy", r"(?P<label>mean_token_accuracy)", is_main=False),
    Kind("log-probabilities", r"logps/(?P<label>chosen|rejected)", "nats", is_main=False),
    Kind("logits", r"logits/(?P<label>chosen|rejected)", is_main=False),
)
"""In the order in which they are shown; what fits none of them comes last, each in a chart of its own."""


def charts_of(steps: Sequence[Mapping[str, float]]) -> list[Chart]:
    """The charts of one stage's logged steps."""
    return overlaid({"": steps})


def overlaid(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Chart]:
    """The charts of several runs of a stage, in which each curve bears the name of its run too; a single one may have no name."""
    names = list(dict.fromkeys(name for steps in runs.values() for entry in steps for name in entry))
    grouped: dict[Kind, dict[str, str]] = {}
    for name in names:
        if SKIPPED.fullmatch(name):
            continue
        kind, label = _kind_of(name)
        grouped.setdefault(kind, {})[name] = label
    order = {kind.title: place for place, kind in enumerate(KINDS)}
    charts = []
    for kind, labels in sorted(grouped.items(), key=lambda item: order.get(item[0].title, len(order))):
        curves = []
        for run, steps in runs.items():
            for name, label in labels.items():
                points = [(entry["step"], entry[name]) for entry in steps if name in entry]
                shown = " ".join(filter(None, (run, label if len(labels) > 1 or not run else "")))
                if points:
                    curves.append(Curve(shown, thin(points), thin(_running_mean(points)) if kind.is_noisy else []))
        charts.append(Chart(kind.title, kind.unit, curves, kind.is_main))
    return charts


def _kind_of(name: str) -> tuple[Kind, str]:
    for kind in KINDS:
        if found := re.fullmatch(kind.pattern, name):
            return kind, found["label"].replace("_", " ")
    return Kind(name, re.escape(name), is_main=False), name


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """With the weight of a point halved every thirtieth of the curve, and without a pull toward zero at its start."""
    if len(points) < SMOOTHED_FROM:
        return []
    keep = 0.5 ** (30 / len(points))
    total = weight = 0.0
    found = []
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1
        found.append((step, total / weight))
    return found


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` of the points: all, or the least and the greatest of each of equal stretches, and the two ends."""
    if len(points) <= MAX_POINTS:
        return list(points)
    inner = range(1, len(points) - 1)
    num_stretches = (MAX_POINTS - 2) // 2
    kept = {0, len(points) - 1}
    for stretch in range(num_stretches):
        places = inner[len(inner) * stretch // num_stretches : len(inner) * (stretch + 1) // num_stretches]
        kept |= {min(places, key=lambda place: points[place][1]), max(places, key=lambda place: points[place][1])}
    return [points[place] for place in sorted(kept)]


def _describe(curve: Curve) -> str:
    values = [value for _, value in curve.points]
    (start, first), (end, last) = curve.points[0], curve.points[-1]
    low, high = min(values), max(values)
    return (
        f"{curve.label}: {show_number(first)} at step {start:.0f}, {show_number(last)} at step {end:.0f}, "
        f"between {show_number(low)} and {show_number(high)}."
    )


def show_number(value: float) -> str:
    """A number in at most some six characters, such as 0.0123, 1.5e-05, 12.3k or 4.1M."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[unit]:.3g}{unit}"
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.2g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"
