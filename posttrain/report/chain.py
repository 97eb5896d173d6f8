"""The chain as a picture: sources and stages in order, a line each, and what is read running down beside them in lanes.

A lane belongs to one source or stage from the line where it stands to the last one that reads it, and then is free again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from posttrain.report.read import RunReport, StageReport


@dataclass(frozen=True)
class Line:
    """One source or stage of the picture, and what passes by it."""

    name: str
    kind: str
    """Kind of artifact that it is or makes."""
    stage: StageReport | None
    """None for a source."""
    lane: int
    joins: list[tuple[int, str]]
    """Lanes of what it reads, each with its kind."""
    passes: list[tuple[int, str]]
    """Lanes that run on beside it, each with the kind of what is in it."""
    goes_on: bool
    """Whether a later stage reads it."""
    reads: list[str]


@dataclass(frozen=True)
class Chain:
    """The lines, from the first to the last."""

    lines: list[Line]

    @cached_property
    def num_lanes(self) -> int:
        """How many lanes lie side by side."""
        return 1 + max((max([line.lane, *(lane for lane, _ in [*line.joins, *line.passes])]) for line in self.lines), default=0)


@dataclass(frozen=True)
class _Entry:
    name: str
    kind: str
    stage: StageReport | None
    reads: tuple[str, ...] = ()


def lay_out(run: RunReport) -> Chain:
    """The picture of a run: each source stands above the first stage that reads it."""
    entries = _entries(run)
    kinds = {entry.name: entry.kind for entry in entries}
    last_read = {name: place for place, entry in enumerate(entries) for name in entry.reads}
    lanes: list[str | None] = []
    lines = []
    for place, entry in enumerate(entries):
        joins = [(lanes.index(name), kinds[name]) for name in entry.reads]
        ending = [name for name in entry.reads if last_read[name] == place]
        before = [(lane, name) for lane, name in enumerate(lanes) if name is not None]
        lane = _lane_of(entry, ending, lanes, kinds)
        for name in ending:
            lanes[lanes.index(name)] = None
        while len(lanes) <= lane:
            lanes.append(None)
        goes_on = entry.name in last_read
        lanes[lane] = entry.name if goes_on else None
        passes = [(number, kinds[name]) for number, name in before if name not in ending]
        lines.append(Line(entry.name, entry.kind, entry.stage, lane, joins, passes, goes_on, list(entry.reads)))
    return Chain(lines)


def _entries(run: RunReport) -> list[_Entry]:
    kinds = {source.name: source.kind for source in run.sources}
    placed: set[str] = {stage.name for stage in run.stages}
    entries = []
    for stage in run.stages:
        reads = tuple(dict.fromkeys(name for names in stage.reads.values() for name in names))
        for role, names in stage.reads.items():
            for name in names:
                if name not in placed:
                    placed.add(name)
                    entries.append(_Entry(name, kinds.get(name, "policy" if role.startswith("polic") else "dataset"), None))
        known = tuple(name for name in reads if name in {entry.name for entry in entries})
        entries.append(_Entry(stage.name, stage.output, stage, known))
    return entries


def _lane_of(entry: _Entry, ending: Sequence[str], lanes: Sequence[str | None], kinds: dict[str, str]) -> int:
    """That of what it goes on from, a policy before data, or else the first free one."""
    taken_over = sorted(ending, key=lambda name: (kinds[name] != entry.kind, lanes.index(name)))
    if taken_over:
        return lanes.index(taken_over[0])
    return next((lane for lane, name in enumerate(lanes) if name is None), len(lanes))
