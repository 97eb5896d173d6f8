"""Verdicts: whether policies keep the limits that gates set them, as `gate` writes it and as the runner, `status` and the report read it.

    output/verdict.json   of each gate what was measured, the limit, and whether it passed
    output/table.json     the same for people

Imports nothing heavy: `plan` reads verdicts.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from posttrain import disk

FILE = "verdict.json"
OnFail = Literal["stop", "warn"]
COLUMNS = ("gate", "value", "limit", "rows", "verdict")
BRACKETS = "in brackets: a lower and an upper bound, each by itself with the confidence of the gate; without one, the 95% interval"
"""What a table of gates says below."""


@dataclass(frozen=True)
class Judged:
    """What one gate found: a value, or a rise or drop from another policy's on the very same rows, held against a limit."""

    metric: str
    policy: str
    vs: str | None
    """The policy that it is compared with."""
    limit: str
    """Which: min, max, max_rise, max_drop, min_rise or min_drop."""
    at: float
    """Where the limit lies."""
    value: float
    low: float | None
    """Of its interval; None where there are too few rows. With `confidence`, each bound holds with that by itself, else both at 95 %."""
    high: float | None
    confidence: float | None
    """With which the limit has to be kept; None where the value alone decides."""
    num_rows: int
    passed: bool

    @property
    def words(self) -> str:
        """The whole of it in one line."""
        return f"{self.what} is {self.shown}, {self.wanted}"

    @property
    def what(self) -> str:
        """What is measured."""
        if self.vs is None:
            return f"{self.metric} of {self.policy}"
        return f"{self.limit.partition('_')[2]} of {self.metric} from {self.vs} to {self.policy}"

    @property
    def shown(self) -> str:
        """The value, and the bound that decides."""
        if self.confidence is None:
            return f"{self.value:.4g}"
        is_upper = self.limit.startswith("max")
        bound = self.high if is_upper else self.low
        if bound is None:
            return f"{self.value:.4g} ({self.num_rows} rows, too few for a bound)"
        return f"{self.value:.4g} ({'at most' if is_upper else 'at least'} {bound:.4g} with {_percent(self.confidence)} confidence)"

    @property
    def wanted(self) -> str:
        """The limit."""
        return f"{self.limit} {self.at:g}"

    @property
    def cells(self) -> tuple[str, ...]:
        """What a table says of it, under `COLUMNS`."""
        return (
            self.what,
            f"{self.value:.4g}" + ("" if self.low is None or self.high is None else f" ({self.low:.4g} to {self.high:.4g})"),
            self.wanted + ("" if self.confidence is None else f" with {_percent(self.confidence)} confidence"),
            str(self.num_rows),
            "passed" if self.passed else "FAILED",
        )


@dataclass(frozen=True)
class Verdict:
    """What all gates of a stage found, and what follows where one failed."""

    on_fail: OnFail
    gates: list[Judged]

    @property
    def failed(self) -> list[Judged]:
        """The gates that failed."""
        return [gate for gate in self.gates if not gate.passed]

    @property
    def stopped(self) -> list[str]:
        """The policies that nothing may build on."""
        return list(dict.fromkeys(gate.policy for gate in self.failed)) if self.on_fail == "stop" else []

    @property
    def fault(self) -> str:
        """The first gate that failed, and how many more did; empty where all passed."""
        more = f", and {len(self.failed) - 1} more" if len(self.failed) > 1 else ""
        return f"{self.failed[0].words}{more}" if self.failed else ""

    @property
    def words(self) -> str:
        """Whether all passed, or the first that did not."""
        return f"failed: {self.fault}" if self.failed else "passed"

    def write(self, output: Path) -> None:
        """Write it into the directory `output`."""
        output.mkdir(parents=True, exist_ok=True)
        gates = [{**asdict(gate), "words": gate.words} for gate in self.gates]
        disk.write_json(output / FILE, {"passed": not self.failed, "on_fail": self.on_fail, "gates": gates})
        disk.write_json(output / "table.json", self._table())

    def _table(self) -> dict[str, Any]:
        notes = [BRACKETS]
        if self.failed:
            follows = "nothing builds on {}" if self.on_fail == "stop" else "on_fail: warn, so what builds on {} goes on"
            notes.append(f"failed: {follows.format(', '.join(dict.fromkeys(gate.policy for gate in self.failed)))}")
        return {"columns": list(COLUMNS), "rows": [list(gate.cells) for gate in self.gates], "notes": notes}


def _percent(share: float) -> str:
    return f"{100 * share:.10g}%"


def read_verdict(output: Path) -> Verdict | None:
    """The verdict in a stage's `output`; None where there is none, or it cannot be read: then its stage is damaged, and says so."""
    try:
        found = disk.read_json(output / FILE)
        return None if found is None else TypeAdapter(Verdict).validate_python(found)
    except (OSError, ValueError):
        return None
