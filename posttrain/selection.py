"""Selection: which step of a training a stage publishes, where `select` asks for the best of those that were measured. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain import disk

FILE = "selected.json"
PREFIX = "heldout/"
"""What measurements are called by, where they stand among other metrics."""
Best = Literal["low", "high"]


@dataclass(frozen=True)
class Selection:
    """The step that is published, and all that it was chosen from."""

    metric: str
    best: Best
    step: int
    value: float
    measured: list[tuple[int, float]]
    """Each step that was measured, with its value, by step."""

    @property
    def words(self) -> str:
        """A line about it."""
        others = ", ".join(f"{step}: {value:.4g}" for step, value in self.measured if step != self.step)
        best = {"low": "lowest", "high": "highest"}[self.best]
        return f"step {self.step}, {self.metric} {self.value:.4g}" + (f", {best} of {len(self.measured)} ({others})" if others else "")


def choose(measured: Sequence[Mapping[str, Any]], metric: str, best: Best) -> Selection | None:
    """The best of the measurements, each with its `step`, by that metric: of equal ones the first; None where no value is a number."""
    name = metric.removeprefix(PREFIX)
    values = [(int(each["step"]), float(each.get(name, math.nan))) for each in measured]
    finite = [(step, value) for step, value in values if math.isfinite(value)]
    if not finite:
        return None
    sign = 1 if best == "low" else -1
    step, value = min(finite, key=lambda each: sign * each[1])
    return Selection(metric, best, step, value, values)


def write_selection(directory: Path, selection: Selection) -> None:
    """Leave it beside what the stage publishes."""
    disk.write_json(directory / FILE, asdict(selection))


def read_selection(directory: Path) -> Selection | None:
    """What was selected in the stage directory; None where the last step is published, or nothing is yet."""
    try:
        found = disk.read_json(directory / FILE)
        return None if found is None else Selection(**{**found, "measured": [(step, value) for step, value in found["measured"]]})
    except (OSError, ValueError, TypeError, KeyError):
        return None  # it is for people; what was published does not depend on it
