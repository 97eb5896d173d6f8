"""The account of a curation: where every row went, step by step, and the files that say so.

    rows.jsonl      the rows that are kept, as later stages read them
    dropped.jsonl   the rows that are not: which step, why, in favour of which other row, and the row as it then was
    report.json     what every step did, by source: rows in and out, reasons, what was mended, facts, settings
    table.json      the same in short, for people

Nothing here depends on when or where it was made, so the same data and config give the same bytes.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.curate.intake import DOES_NOT_FIT, Intake
from posttrain.curate.records import is_bare, to_record
from posttrain.curate.step import Candidate, Outcome, Step
from posttrain.data import json_text
from posttrain.data.files import Record

READ = "read"
"""What the account calls the reading, beside the names of steps."""
REASONS_SHOWN = 3


@dataclass(frozen=True)
class Entry:
    """What one step did."""

    step: str
    settings: Mapping[str, Any]
    rows_in: Mapping[str, int]
    """By source, as are the rows out."""
    rows_out: Mapping[str, int]
    reasons: Mapping[str, int]
    num_changed: int
    changes: Mapping[str, int]
    facts: Mapping[str, Any]

    @property
    def num_in(self) -> int:
        """Rows that it was given."""
        return sum(self.rows_in.values())

    @property
    def num_out(self) -> int:
        """Rows that it kept."""
        return sum(self.rows_out.values())


class Account:
    """Follows the candidates through the steps. After each of them every row read is kept, or dropped for a reason."""

    def __init__(self, intake: Intake) -> None:
        self.candidates: Sequence[Candidate] = intake.candidates
        self.dropped: list[Record] = [
            _dropped(misfit.index, misfit.origin, misfit.source, READ, DOES_NOT_FIT, misfit.problem, None, _plain(misfit.record))
            for misfit in intake.misfits
        ]
        self._intake = intake
        self._origins = {candidate.index: candidate.row.origin for candidate in intake.candidates}
        given = Counter([candidate.source for candidate in intake.candidates] + [misfit.source for misfit in intake.misfits])
        self.entries = [Entry(READ, {}, given, self._by_source(), self._reasons(self.dropped), 0, {}, {})]

    def settle(self, step: Step, outcome: Outcome) -> None:
        """Enter what a step decided about all candidates. Raises `AssertionError` where it is not an account of each of them."""
        rows = {candidate.index: candidate for candidate in self.candidates}
        _check(step, list(rows), outcome)
        dropped = []
        for drop in outcome.dropped:
            out = rows[drop.index]
            record = to_record(out.row, as_prompt=is_bare(out.row))
            dropped.append(_dropped(drop.index, out.row.origin, out.source, step.name, drop.reason, drop.detail, drop.match, record))
        before = self._by_source()
        num_changed = sum(kept.row is not rows[kept.index].row and kept.row != rows[kept.index].row for kept in outcome.kept)
        self.candidates = outcome.kept
        self.dropped += dropped
        settings = step.model_dump(mode="json")
        reasons = self._reasons(dropped)
        entry = Entry(step.name, settings, before, self._by_source(), reasons, num_changed, outcome.changes, outcome.facts)
        self.entries.append(entry)
        assert len(self.candidates) + len(self.dropped) == self._intake.num_rows, "every row is kept or dropped"

    def why_empty(self) -> str:
        """Which step dropped the most, and why, for the message that nothing is left."""
        worst = max(self.entries, key=lambda entry: entry.num_in - entry.num_out)
        reason, count = max(worst.reasons.items(), key=lambda item: item[1])
        total = self._intake.num_rows
        return f"no row is left of {total:,}; {worst.step} dropped the most, {count:,} as {reason!r}; loosen it, or leave it out"

    def metrics(self) -> dict[str, float]:
        """Rows in and out, and dropped and changed by each step; a step that is listed twice counts as one."""
        dropped, changed = Counter[str](), Counter[str]()
        for entry in self.entries:
            dropped[f"dropped_{entry.step}"] += entry.num_in - entry.num_out
            changed[f"changed_{entry.step}"] += entry.num_changed
        counts = {"num_rows_in": self._intake.num_rows, "num_rows_out": len(self.candidates), **dropped}
        return {name: float(count) for name, count in {**counts, **{name: n for name, n in changed.items() if n}}.items()}

    def write(self, output: Path, seed: int) -> None:
        """Write the four files into a new directory `output`."""
        if output.exists():
            shutil.rmtree(output)  # of an attempt that was cut off while it wrote
        output.mkdir(parents=True)
        as_prompt = any(is_bare(candidate.row) for candidate in self.candidates)
        _write_lines(output / "rows.jsonl", (to_record(candidate.row, as_prompt=as_prompt) for candidate in self.candidates))
        _write_lines(output / "dropped.jsonl", sorted(self.dropped, key=lambda record: record["index"]))
        (output / "report.json").write_text(_dump(self.report(seed), indent=1), encoding="utf-8")
        (output / "table.json").write_text(_dump(self.table(), indent=1), encoding="utf-8")

    def report(self, seed: int) -> dict[str, Any]:
        """The whole account, as JSON for other programs."""
        first = self.entries[0]
        now = self._by_source()
        return {
            "seed": seed,
            "num_rows_in": self._intake.num_rows,
            "num_rows_out": len(self.candidates),
            "sources": {name: {"rows_in": first.rows_in[name], "rows_out": now[name]} for name in self._intake.sources},
            "steps": [
                {
                    "step": entry.step,
                    "settings": entry.settings,
                    "rows_in": entry.num_in,
                    "rows_out": entry.num_out,
                    "dropped": entry.num_in - entry.num_out,
                    "reasons": dict(entry.reasons),
                    "changed": entry.num_changed,
                    "changes": dict(entry.changes),
                    "facts": dict(entry.facts),
                    "sources": {n: {"rows_in": entry.rows_in[n], "rows_out": entry.rows_out[n]} for n in self._intake.sources},
                }
                for entry in self.entries
            ],
        }

    def table(self) -> dict[str, Any]:
        """What `run` prints at its end: a line for each step, and one for all."""
        rows = [
            [
                entry.step,
                f"{entry.num_in:,}",
                f"{entry.num_in - entry.num_out:,}",
                f"{entry.num_changed:,}",
                f"{entry.num_out:,}",
                _why(entry),
            ]
            for entry in self.entries
        ]
        total, left = self._intake.num_rows, len(self.candidates)
        rows.append(["all", f"{total:,}", f"{total - left:,}", "", f"{left:,}", f"{left / total:.1%} of the rows are kept"])
        first, now = self.entries[0].rows_in, self._by_source()
        notes = [f"{name}: {now[name]:,} of {first[name]:,} rows are kept" for name in self._intake.sources if len(first) > 1]
        notes.append("dropped.jsonl beside the kept rows holds each dropped row, with the reason")
        return {"columns": ["step", "rows in", "dropped", "changed", "rows out", "why"], "rows": rows, "notes": notes}

    def _by_source(self) -> Mapping[str, int]:
        counts = Counter(candidate.source for candidate in self.candidates)
        return {name: counts[name] for name in self._intake.sources}

    def _reasons(self, dropped: Iterable[Record]) -> Mapping[str, int]:
        return dict(Counter(record["reason"] for record in dropped).most_common())


def _check(step: Step, given: list[int], outcome: Outcome) -> None:
    kept, dropped = [candidate.index for candidate in outcome.kept], [drop.index for drop in outcome.dropped]
    what = f"the step {step.name}"
    assert len(set(kept)) == len(kept) and len(set(dropped)) == len(dropped), f"{what} decided about a row twice"
    assert not set(kept) & set(dropped), f"{what} kept and dropped the same row"
    assert set(kept) | set(dropped) == set(given), f"{what} lost a row, or made one up"
    position = {index: number for number, index in enumerate(given)}
    assert kept == sorted(kept, key=position.__getitem__), f"{what} changed the order of the rows"
    assert all(drop.reason for drop in outcome.dropped), f"{what} dropped a row without a reason"


def _dropped(
    index: int, origin: str, source: str, step: str, reason: str, detail: str, match: str | None, row: Record
) -> Record:  # fmt: skip
    return {
        "index": index,
        "origin": origin,
        "source": source,
        "step": step,
        "reason": reason,
        "detail": detail,
        "match": match,
        "row": row,
    }


def _plain(record: Record) -> Record:
    """A record of any content, such as a Parquet file may hold, as JSON can hold it."""
    return {str(name): value if json_text.problem_with(value) is None else repr(value) for name, value in record.items()}


def _why(entry: Entry) -> str:
    counts = [*entry.reasons.items(), *entry.changes.items()]
    shown = ", ".join(f"{count:,} {what}" for what, count in counts[:REASONS_SHOWN])
    return shown + (f" and {len(counts) - REASONS_SHOWN} more kinds" if len(counts) > REASONS_SHOWN else "")


def _write_lines(path: Path, records: Iterable[Record]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(_dump(record) + "\n")


def _dump(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
