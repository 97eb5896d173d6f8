"""Pages: plain data -> one HTML file that needs nothing else, and in which nothing that data or models say can run or be fetched.

All that is put in is escaped, also within attributes; what cannot be seen is spelt. The only script is ours, named by its hash.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import disk
from posttrain.inspection import visible
from posttrain.report import chain, curves, draw
from posttrain.report.read import RunReport, StageReport
from posttrain.verdict import Judged

if TYPE_CHECKING:
    from jinja2 import Environment

    from posttrain.report.compare import Comparison

HERE = Path(__file__).parent
WATCH_EVERY_S = 3
STATES = {
    "skip": "finished",
    "reuse": "reused",
    "running": "running",
    "run": "to do",
    "resume": "cut off",
    "rebuild": "to be built again",
    "drift": "config changed",
    "damaged": "damaged",
    "blocked": "blocked by a gate",
}
LOWER_IS_BETTER = {
    "nll", "token ECE", "text nll", "text bits per byte", "preference ECE", "over_refusal", "unstopped", "repetition", "looping",
    "language drift",
}  # fmt: skip
NEITHER_IS_BETTER = {"preference margin", "answer tokens"}
"""The one grows and shrinks with how sure a policy is of all that it says; of the other it depends on what was asked."""
DECIMALS = {"answer tokens": 1, "preference margin": 2}
"""Of what is not a share or of its size, for which three would claim too much."""
SIGNIFICANCE = 0.05
"""A difference whose p is not below is not called better or worse, whatever its interval says: of many, some are apart by chance alone."""


def run_page(run: RunReport, *, watch: bool = False) -> str:
    """The page of one run; `watch`: as it is served, which asks for news."""
    return _render("run.html.j2", watch=watch, run=run, chain=chain.lay_out(run), tiles=_tiles(run), environments=_environments(run))


def comparison_page(comparison: "Comparison") -> str:
    """The page of several runs."""
    return _render("compare.html.j2", watch=False, comparison=comparison)


def _render(name: str, *, watch: bool, **values: Any) -> str:
    from markupsafe import Markup

    style, script = (HERE / "look.css").read_text() + (HERE / "page.css").read_text(), (HERE / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    policy += "; connect-src 'self'" if watch else ""
    # Both are ours, and neither holds what would end the element that it stands in.
    ours = {"style": Markup(style), "script": Markup(script)}  # noqa: S704
    return _environment().get_template(name).render(policy=policy, watch=WATCH_EVERY_S if watch else None, **ours, **values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: _readable(value) if type(value) is str else value,
    )
    environment.filters |= {
        "bytes": disk.show_bytes,
        "duration": show_duration,
        "moment": show_moment,
        "number": curves.show_number,
        "percent": lambda share: f"{share:.1%}" if share < 0.1 else f"{share:.0%}",
        "plain": lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str),
        "short": lambda digest: digest[:12],
        "flat": flatten,
    }
    environment.globals |= {
        "STATES": STATES,
        "charts": _charts,
        "main_charts": lambda charts: [chart for chart in charts if chart["is_main"]],
        "other_charts": lambda charts: [chart for chart in charts if not chart["is_main"]],
        "charts_of": curves.charts_of,
        "overlaid": curves.overlaid,
        "verdict": verdict,
        "hint": _hint,
        "plain": lambda metric: f"%.{DECIMALS.get(metric, 3)}f",
        "signed": lambda metric: f"%+.{DECIMALS.get(metric, 3)}f",
        "forest": _forest,
        "gate_line": _gate_line,
        "fate": _fate,
        "sampled_rows": _sampled_rows,
        "dashes": ["", "5 1.5", "1.5 1.2", "6 1.2 1.5 1.2"],
        "num_colours": draw.NUM_COLOURS,
    }
    return environment


def _readable(text: str) -> str:
    """With what cannot be seen in it, or stand in a file, spelt."""
    return visible(text.encode("utf-8", "backslashreplace").decode())


def show_duration(seconds: float | None) -> str:
    """A time such as `42 s`, `3 min 05 s`, `2 h 10 min` or `3 d 4 h`; a dash for none."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def show_moment(seconds: float | None) -> str:
    """A time of day in UTC; a dash for none."""
    return "–" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            found |= flatten(entry, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = entry
    return found


# --- results ---------------------------------------------------------------------------------------------------------


def _tiles(run: RunReport) -> list[dict[str, str]]:
    """What one wants to know first: how the policies fare, how long it took."""
    tiles = []
    for stage in run.stages:
        if stage.evaluation and stage.evaluation.rows:
            names = [name for name, _, _ in stage.evaluation.rows]
            name = next((name for name in ("answers passed", "preference accuracy", "nll") if name in names), names[0])
            cells = stage.evaluation.rows[names.index(name)][2]
            values = [_as_share(name, cell.value) for cell in cells]
            chosen = stage.evaluation.policies[-1]
            before = ", ".join(f"{policy} {value}" for policy, value in zip(stage.evaluation.policies[:-1], values[:-1], strict=True))
            if cells[-1].low is not None and len(cells) > 1:
                found = verdict(name, cells[-1].low, cells[-1].high, cells[-1].p)
                told = {"good": "better than", "bad": "worse than", "even": "no clear difference from"}[found]
                before += f"; {told} {stage.evaluation.policies[0]}"
            tiles.append({"title": f"{name}, {chosen}", "value": values[-1], "more": before or stage.name})
    for stage in run.stages:
        if stage.curation:
            kept = stage.curation.num_rows_out / max(1, stage.curation.num_rows_in)
            more = f"{stage.curation.num_rows_out:,} of {stage.curation.num_rows_in:,}"
            tiles.append({"title": f"rows kept by {stage.name}", "value": f"{kept:.0%}", "more": more})
    tiles = tiles[:3]
    if verdicts := [stage.verdict for stage in run.stages if stage.verdict]:
        failed = [gate for found in verdicts for gate in found.failed]
        num_gates = sum(len(found.gates) for found in verdicts)
        more = f"failed: {', '.join(gate.what for gate in failed)}" if failed else "all"
        tiles.append({"title": "gates passed", "value": f"{num_gates - len(failed)} of {num_gates}", "more": more})
    unfinished = [stage.name for stage in run.stages if not stage.is_finished]
    more = f"not yet: {', '.join(unfinished)}" if unfinished else "all"
    tiles.append({"title": "stages finished", "value": f"{len(run.stages) - len(unfinished)} of {len(run.stages)}", "more": more})
    hours = f"{curves.show_number(run.process_hours)} process-hours"
    tiles.append({"title": "wall time", "value": show_duration(run.seconds), "more": hours})
    return tiles


def _as_share(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    is_share = 0 <= value <= 1 and any(word in name for word in ("passed", "accuracy", "acc", "win_rate"))
    return f"{value:.1%}" if is_share else f"{value:.3f}"


def verdict(metric: str, low: float | None, high: float | None, p: str = "") -> str:
    """Whether the interval of a difference, and its p where there is one, say `good` or `bad`, or leave it open: `even`."""
    if low is None or high is None or low <= 0 <= high or metric in NEITHER_IS_BETTER:
        return "even"
    if p and float(p.removeprefix("<")) >= SIGNIFICANCE:
        return "even"
    return "good" if (high < 0) == (metric in LOWER_IS_BETTER) else "bad"


def _hint(metric: str) -> str:
    """Which way a metric is better, where that is not plain."""
    return "lower is better" if metric in LOWER_IS_BETTER else ""


def _forest(cell: Any, cells: Iterable[Any]) -> dict[str, float] | None:
    """Where the difference of a cell and its interval lie on a line of 100 from the widest of the row's; None without an interval."""
    if cell.difference is None or cell.low is None or cell.high is None:
        return None
    widest = max(abs(bound) for each in cells if each.difference is not None and each.low is not None for bound in (each.low, each.high))
    scale = 48 / widest if widest else 0.0
    return {name: round(50 + scale * getattr(cell, name), 1) for name in ("low", "high", "difference")}


def _gate_line(gate: Judged) -> dict[str, float]:
    """Where the limit of a gate, its value and the bounds of that lie on a line of 100 that holds them all."""
    places = {"limit": gate.at, "value": gate.value, "low": gate.low or 0.0, "high": gate.high or 0.0}
    least, most = min(places.values()), max(places.values())
    scale = 96 / (most - least) if most > least else 0.0
    return {name: round(2 + scale * (place - least), 1) for name, place in places.items()}


def _fate(sample: Any) -> str:
    """How the answers to one prompt fare, as words that a filter asks for."""
    passed = [answer.passed for answer in sample.answers]
    if None in passed:
        return "unchecked"
    words = ["differ"] if len(set(passed)) > 1 else ["pass"] if passed[0] else ["fail"]
    if passed[-1] and not passed[0]:
        words.append("gained")
    if passed[0] and not passed[-1]:
        words.append("lost")
    return " ".join(words)


# --- charts ----------------------------------------------------------------------------------------------------------


def _charts(found: Sequence[curves.Chart]) -> list[dict[str, Any]]:
    """Charts with their pictures, and for the script where in these a step lies."""
    from markupsafe import Markup

    shown = []
    for chart in found:
        picture = draw.draw(chart)
        told = {
            "box": picture.box,
            "steps": picture.steps,
            "curves": [
                {"label": curve.label, "points": [[step, _rounded(value)] for step, value in curve.points]} for curve in chart.curves
            ],
        }
        # matplotlib wrote it, of numbers alone.
        svg = Markup(picture.svg.replace("<svg ", '<svg class="plot" ', 1))  # noqa: S704
        shown.append(
            {
                "title": chart.title,
                "unit": chart.unit,
                "summary": chart.summary,
                "is_main": chart.is_main,
                "has_mean": any(curve.mean for curve in chart.curves),
                "curves": [(curve.label, curve.points[-1][1]) for curve in chart.curves],
                "svg": svg,
                "told": json.dumps(told, separators=(",", ":")),
            }
        )
    return shown


def _rounded(value: float) -> float:
    return value if value == 0 else round(value, 5 - math.floor(math.log10(abs(value))))


def _sampled_rows(steps: Sequence[Mapping[str, float]], most: int = 12) -> list[Mapping[str, float]]:
    """Some of the logged steps, evenly spread, for a table."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


# --- environment -----------------------------------------------------------------------------------------------------


def _environments(run: RunReport) -> list[tuple[list[str], dict[str, str]]]:
    """The distinct surroundings that stages were built in, each with the names of these."""
    found: dict[str, tuple[list[str], dict[str, str]]] = {}
    for stage in run.stages:
        if told := _environment_of(stage):
            found.setdefault(json.dumps(told), ([], told))[0].append(stage.name)
    return list(found.values())


def _environment_of(stage: StageReport) -> dict[str, str]:
    told = stage.provenance
    if not told:
        return {}
    commit = told.get("commit") or "not known"
    versions = {name: version for name, version in told.get("versions", {}).items() if version}
    return {
        "posttrain": str(told.get("posttrain", "")),
        "commit": f"{commit}{', with changes that are not committed' if told.get('dirty') else ''}",
        "python": str(told.get("python", "")),
        **{name: str(version) for name, version in versions.items()},
        "host": str(told.get("host", "")),
        "platform": str(told.get("platform", "")),
        "command": " ".join(map(str, told.get("argv", []))),
    }


def write_page(path: Path, page: str) -> None:
    """Put the page in the place of what is at `path`, as a whole."""
    with disk.explain_disk_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_text(path, page)
