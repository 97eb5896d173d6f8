"""Intake: the rows of all data inputs become candidates, and those that do not fit their format are dropped, with the reason."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from posttrain.curate.records import is_answered, is_bare
from posttrain.curate.step import Candidate
from posttrain.data.files import Record
from posttrain.data.formats import holds
from posttrain.data.source import OpenSource, open_source, read_records
from posttrain.error import UserError
from posttrain.progress import Progress
from posttrain.stage import Input, StageContext

DOES_NOT_FIT = "does not fit"


@dataclass(frozen=True, slots=True)
class Misfit:
    """A record that does not fit its format: where it stands, what is wrong with it, and the record itself."""

    index: int
    source: str
    origin: str
    problem: str
    record: Record


@dataclass(frozen=True, slots=True)
class Intake:
    """All that was read. Candidates and misfits share one numbering, in the order in which they were met."""

    sources: list[str]
    candidates: list[Candidate] = field(default_factory=list)
    misfits: list[Misfit] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Rows read, fitting or not."""
        return len(self.candidates) + len(self.misfits)


def open_sources(context: StageContext[Any]) -> list[tuple[Input, OpenSource]]:
    """The opened data inputs, all of conversations, all of pairs or all of labelled answers. Raises `UserError`."""
    opened = [(given, _open(context, given)) for given in context.inputs["data"]]
    kinds = sorted({holds(source.entries[0].format): given.name for given, source in reversed(opened)}.items())
    if len(kinds) > 1:
        (one, a), (other, b) = kinds[:2]
        raise UserError(f"{context.at}.inputs.data: {a} holds {one} and {b} {other}; curate them in two stages")
    return opened


def read_rows(context: StageContext[Any], progress: Progress) -> Intake:
    """Read every data input to its end. Raises `UserError` where a file is damaged, or no row of an input fits."""
    opened = open_sources(context)
    intake = Intake([given.name for given, _ in opened])
    progress.phase("read")
    for given, source in opened:
        met: dict[str, tuple[int, str]] = {}
        for row in source.rows():
            _note_misfits(source, met, intake.num_rows)
            intake.candidates.append(Candidate(intake.num_rows + len(met), given.name, row))
            if len(intake.candidates) % 1000 == 0:
                progress.step(len(intake.candidates))
        _note_misfits(source, met, intake.num_rows)
        records = dict(_records(source)) if met else {}
        for origin, (index, problem) in met.items():
            intake.misfits.append(Misfit(index, given.name, origin, problem, records[origin]))
    _check_answers(context, intake)
    return intake


def _note_misfits(source: OpenSource, met: dict[str, tuple[int, str]], num_rows: int) -> None:
    """Number those that the source met since the last call: it has them in order, and the new ones at the end."""
    new = list(islice(reversed(source.invalid), len(source.invalid) - len(met)))
    for origin in reversed(new):
        met[origin] = (num_rows + len(met), source.invalid[origin])


def _open(context: StageContext[Any], given: Input) -> OpenSource:
    # Whatever the source says of rows that do not fit: here they are part of the account.
    return open_source(given.data.model_copy(update={"invalid_rows": "drop"}), f"{context.at}: {given.name}")


def _records(source: OpenSource) -> Iterator[tuple[str, Record]]:
    """The records of the misfits, as they stand in the files, with their places."""
    for path in source.source.paths:
        yield from ((origin, record) for origin, record in read_records(source.source, path, source.at) if origin in source.invalid)


def _check_answers(context: StageContext[Any], intake: Intake) -> None:
    """Refuse prompts without answers among conversations with answers: no one format would hold both."""
    bare = next((candidate.row for candidate in intake.candidates if is_bare(candidate.row)), None)
    answered = next((candidate.row for candidate in intake.candidates if is_answered(candidate.row)), None)
    if bare and answered:
        raise UserError(
            f"{context.at}.inputs.data: {bare.origin} is a prompt without an answer and {answered.origin} has one; "
            "curate them in two stages"
        )
