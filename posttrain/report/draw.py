"""Drawing: a chart as SVG that takes its colours and its typeface from the page, so that one picture serves light, dark and print.

matplotlib finds the ticks and writes the picture; text stays text. No data get into it but numbers.
"""

import io
import re
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from posttrain.report.curves import Chart, show_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points: TypeAlias = tuple[tuple[float, float], ...]
WIDTH, HEIGHT = 340.0, 170.0
"""Of the picture, in its own units; the page scales it."""
LEFT, RIGHT, TOP, BOTTOM = 44.0, 8.0, 6.0, 20.0
"""Room around the curves, for the labels of the ticks."""
SIZE = 9.5
"""Of the text of ticks, for which there is to be room; the page says how large it is."""
PAD = 5.0
"""Between the curves and the labels of the ticks."""
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.2, 1.5, 1.2)))
"""Of the first, second, ... curve, so that colour is not all that tells them apart."""
NUM_COLOURS = 6
COLOURS = {f"#0a0b{number:02x}": f"var(--curve-{number})" for number in range(1, NUM_COLOURS + 1)} | {
    "#0a0bf0": "var(--line)",
    "#0a0bf1": "var(--dim)",
}
"""What matplotlib is told, and what the page is to see in its place."""
GRID, TEXT = "#0a0bf0", "#0a0bf1"
_drawing = threading.Lock()
"""matplotlib's settings are those of the whole process."""


@dataclass(frozen=True)
class Picture:
    """A chart as SVG, and where in it a step and a value lie."""

    svg: str
    steps: tuple[float, float]
    """Of the left and the right end of the box that the curves are in."""
    values: tuple[float, float]
    """Of its lower and its upper end."""

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, width and height of the box, in units of the picture."""
        return LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM


def draw(chart: Chart) -> Picture:
    """The picture of a chart."""
    return _draw(tuple((tuple(curve.points), tuple(curve.mean)) for curve in chart.curves))


@lru_cache(maxsize=512)
def _draw(curves: tuple[tuple[Points, Points], ...]) -> Picture:
    with _drawing:
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "posttrain", "font.family": "DejaVu Sans", "font.size": SIZE}):
            figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
            figure.patch.set_visible(False)
            axes = figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, (WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT))
            for number, (points, mean) in enumerate(curves):
                colour = f"#0a0b{1 + number % NUM_COLOURS:02x}"
                look: dict[str, Any] = {
                    "color": colour,
                    "linestyle": DASHES[number % len(DASHES)],
                    "clip_on": False,
                    "solid_capstyle": "round",
                }
                alone = len(points) == 1
                axes.plot(
                    *_columns(points * 2 if alone else points),
                    **look,
                    linewidth=5 if alone else 1 if mean else 1.5,
                    alpha=0.35 if mean else 1,
                )
                if mean:
                    axes.plot(*_columns(mean), **look, linewidth=1.6)
            _dress(axes)
            written = io.StringIO()
            figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
            return Picture(_clean(written.getvalue()), axes.get_xlim(), axes.get_ylim())


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _dress(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.margins(x=0.01, y=0.06)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=TEXT, pad=PAD)
    # Beside the labels of the steps, where nothing else stands.
    axes.annotate("step", (0, 0), (-10, -PAD), "axes fraction", "offset points", color=TEXT, ha="right", va="top")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: show_number(value)))


def _clean(svg: str) -> str:
    """The picture without what is for a file of its own, such as a style that would be that of the whole page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>.*?</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" aria-hidden="true" focusable="false">', svg, count=1)
    svg = re.sub(r' (?:id|clip-path)="[^"]*"| transform="rotate\(-0 [^"]*"|font-(?:family|size): [^;]*; ', "", svg)
    svg = re.sub(r' (d|x|y)="([^"]*)"', lambda found: f' {found[1]}="{_round(found[2])}"', svg)
    svg = re.sub(r"#0a0b[0-9a-f]{2}", lambda found: COLOURS[found[0]], svg)
    return re.sub(r"\s*\n\s*", " ", re.sub(r"</?g>\s*", "", svg)).strip()


def _round(places: str) -> str:
    return re.sub(r"-?\d+\.\d{2,}", lambda found: f"{float(found[0]):.1f}", places)
