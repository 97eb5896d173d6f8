"""Sources: the rows that one `DataSource` of a config names, over all its files, as one stream that can be read again.

A source is read from its files each time, in an order that depends on the config and the content alone. The steps, in
order: read and convert each entry; keep the asked side of the held-out split; draw (mixture weights, `max_samples`). Where
something is drawn, a first pass counts and a second one picks, so that only positions are ever held.

Every choice is a hash of the seed and of what is chosen, never the state of a random generator: a prompt stays on its side
of the split whatever rows and files stand around it, and another version of Python draws the same rows.
"""

import hashlib
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from posttrain.config import DataSource, is_hub_id, nearest
from posttrain.data.files import Record, Records, open_file, open_hub
from posttrain.data.formats import LAYOUTS, Format, check_columns, convert, detect, holds, rename
from posttrain.data.json_text import names, show
from posttrain.data.rows import AnyRow, Row, Text, prompt_text
from posttrain.error import UserError


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of `data`, and the format it is read in; `detected` says that the columns told, not the config."""

    path: str
    format: Format
    detected: bool


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A source whose entries exist and whose formats are known. Made by `open_source`."""

    at: str
    source: DataSource
    entries: list[Entry]
    invalid: dict[str, str] = field(default_factory=dict)
    """Where each row stands that was left out because it does not fit, and why; filled as rows are read."""

    def rows(self) -> Iterator[Row]:
        """The rows, all `Conversation` or all `Pair`; each call reads anew and gives the same.

        Raises `UserError` where a record is wrong, naming its place and field, where it is plain text, and where no row is left at all.
        """
        for row in self.all_rows():
            if isinstance(row, Text):
                raise UserError(
                    f"{row.origin}: is plain text, and only eval reads that, to measure forgetting; "
                    "give conversations or pairs, or name the columns that hold them with columns:"
                )
            yield row

    def all_rows(self) -> Iterator[AnyRow]:
        """The same, of a source that may also hold plain text."""
        num_rows = 0
        for row in self._drawn():
            num_rows += 1
            yield row
        if num_rows == 0:
            raise UserError(f"{self.at}: {self._why_empty()}")

    def _drawn(self) -> Iterator[AnyRow]:
        if self.source.weights is None and self.source.max_samples is None:
            return self._concatenated()
        counts = [sum(1 for _ in self._kept(entry)) for entry in self.entries]
        if self.source.weights is not None:
            return self._mixed(counts)
        return _pick(self._concatenated(), draw(sum(counts), self._limit(sum(counts)), self.source.seed, "all"))

    def _concatenated(self) -> Iterator[AnyRow]:
        for entry in self.entries:
            yield from self._kept(entry)

    def _mixed(self, counts: list[int]) -> Iterator[AnyRow]:
        """The drawn rows of every entry in file order, spread evenly over the whole."""
        for entry, count in zip(self.entries, counts, strict=True):
            if count == 0:
                raise UserError(f"{self.at}: weights: {entry.path} has no rows to take a share of; {self._why_empty()}")
        takes = self._takes(counts)
        streams = [self._placed(index, count, take) for index, (count, take) in enumerate(zip(counts, takes, strict=True))]
        for _, _, row in heapq.merge(*streams, key=lambda placed: placed[:2]):
            yield row

    def _placed(self, index: int, num_rows: int, take: int) -> Iterator[tuple[float, int, AnyRow]]:
        """`take` rows of one entry, each with its place in [0, 1]: a random point in its own slot of `take` equal ones."""
        seed = self.source.seed
        rows = _pick(self._kept(self.entries[index]), draw(num_rows, take, seed, str(index)))
        for slot, row in enumerate(rows):
            yield (slot + unit(seed, f"place {index} {slot}")) / take, index, row

    def _takes(self, counts: list[int]) -> list[int]:
        """How many rows each entry gives: as many as the scarcest allows at the shares asked for, within a row of each share."""
        weights = [Fraction(repr(weight)) for weight in self.source.weights or []]
        shares = [weight / sum(weights) for weight in weights]
        total = self._limit(math.floor(min(count / share for count, share in zip(counts, shares, strict=True))))
        takes = [math.floor(total * share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda index: takes[index] - total * shares[index])
        for index in by_remainder[: total - sum(takes)]:
            takes[index] += 1
        return takes

    def _limit(self, num_rows: int) -> int:
        return num_rows if self.source.max_samples is None else min(num_rows, self.source.max_samples)

    def _kept(self, entry: Entry) -> Iterator[AnyRow]:
        """The rows of one entry that are on the asked side of the held-out split, in file order."""
        source = self.source
        for position, record in read_records(source, entry.path, self.at):
            try:
                row = convert(rename(record, source.columns), entry.format, position)
            except UserError as error:
                if source.invalid_rows == "error":
                    raise
                self.invalid[position] = str(error)
                continue
            if source.part == "all" or is_held_out(row, source) == (source.part == "held_out"):
                yield row

    def _why_empty(self) -> str:
        source = self.source
        if source.part != "all":
            return f"no prompt falls on the {source.part} side of held_out: {source.held_out}; change held_out or seed, or add data"
        if self.invalid:
            return f"data: no row fits its format; the first: {next(iter(self.invalid.values()))}"
        return "data: holds no rows; add some"


def open_source(source: DataSource, at: str) -> OpenSource:
    """Open every entry of `source` and settle its format, from the config or from the columns of its first record.

    `at` is the dotted config path of the source, such as `sources.chat`, with which errors about it as a whole begin. Raises
    `UserError` where an entry cannot be opened or holds nothing, where its format is in doubt, or where entries do not mix.
    """
    _check_settings(source, at)
    _check_columns(source, at)
    entries = [_open_entry(source, path, at) for path in source.paths]
    check_columns(source.columns, [entry.format for entry in entries], f"{at}: columns")
    kinds = sorted({holds(entry.format): entry for entry in reversed(entries)}.items(), key=lambda kind: kind[0])
    if len(kinds) > 1:
        (one, a), (other, b) = kinds[:2]
        raise UserError(f"{at}: data: {a.path} holds {one} ({a.format}) and {b.path} {other} ({b.format}); make them two sources")
    return OpenSource(at, source, entries)


def is_held_out(row: AnyRow, source: DataSource) -> bool:
    """Whether the prompt of `row` is on the held-out side: by the seed and the prompt alone, wherever the row stands."""
    return unit(source.seed, prompt_text(row)) < source.held_out


def unit(seed: int, text: str) -> float:
    """A number in [0, 1), even over texts and the same on every machine."""
    return (unit_bits(f"{seed}\n{text}") >> 11) / 2**53


def unit_bits(text: str) -> int:
    """64 bits, even over texts and the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def draw(num_rows: int, take: int, seed: int, salt: str) -> Sequence[int]:
    """`take` of the positions `0..num_rows-1`, ascending, without repetition; all of them where `take` is no less."""
    if take >= num_rows:
        return range(num_rows)
    return sorted(heapq.nsmallest(take, range(num_rows), key=lambda position: unit(seed, f"draw {salt} {position}")))


def _pick(rows: Iterator[AnyRow], positions: Sequence[int]) -> Iterator[AnyRow]:
    """The rows at the ascending `positions`; reads no further than the last of them."""
    wanted = iter(positions)
    next_position = next(wanted, None)
    for position, row in enumerate(rows if positions else ()):
        if position == next_position:
            yield row
            if (next_position := next(wanted, None)) is None:
                return


def read_records(source: DataSource, path: str, at: str) -> Records:
    """The raw records of one entry of `source`. Raises `UserError`, beginning with `at`."""
    name, _, revision = path.partition("@")
    try:
        if is_hub_id(name):
            return open_hub(name, revision=revision, subset=source.subset, split=source.split)
        return open_file(path, source.column_names)
    except UserError as error:
        raise UserError(f"{at}: data: {error}") from None


def _open_entry(source: DataSource, path: str, at: str) -> Entry:
    first = _first(source, path, at)
    if source.format is not None:
        return Entry(path, source.format, detected=False)
    return Entry(path, detect(rename(first, source.columns), f"{at}: format: {path}"), detected=True)


def _first(source: DataSource, path: str, at: str) -> Record:
    first = next(read_records(source, path, at), None)
    if first is None:
        raise UserError(f"{at}: data: {path} holds no rows; add some, or leave it out")
    return first[1]


def _check_settings(source: DataSource, at: str) -> None:
    for_hub = [key for key, default in (("subset", None), ("split", "train")) if getattr(source, key) != default]
    if for_hub and not any(is_hub_id(path.partition("@")[0]) for path in source.paths):
        raise UserError(f"{at}: {for_hub[0]}: {show(getattr(source, for_hub[0]))} has no effect on local files; leave it out")


def _check_columns(source: DataSource, at: str) -> None:
    """Refuse a rename to what is no field, or of a column that no entry has: neither would ever take effect."""
    check_columns(source.columns, LAYOUTS, f"{at}: columns")
    for ours, theirs in source.columns.items():
        # The first record nearly always settles it; a column that JSONL rows leave out at first may still come later.
        if not any(theirs in record for path in source.paths for _, record in read_records(source, path, at)):
            known = list(_first(source, source.paths[0], at))
            hint = nearest(theirs, known) if len(known) <= 12 else f"known: {names(known)}"
            raise UserError(f"{at}: columns.{ours}: {show(theirs)} is no column of {source.paths[0]}; {hint}")
