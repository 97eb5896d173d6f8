"""Prepared data: rows as token ids and masks, made once by all cores before any process group exists.

Kept under the root, keyed by all that decides its content, and shared by every stage and run that needs the same. Rows
stream from their files through forked workers into one Arrow file, so memory does not grow with the data. A directory
without its manifest, which is written last, is never read, nor one whose files are not what the manifest says.
"""

import fcntl
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from posttrain import disk
from posttrain.artifact import fingerprint_source
from posttrain.batch import Sizes
from posttrain.data.rows import AnyRow, Row, question
from posttrain.data.samples import Encoder, Fault, LeftOut, TooLong
from posttrain.data.source import OpenSource, open_source, unit_bits
from posttrain.error import UserError
from posttrain.footprint import Rows, read_content
from posttrain.parallel import map_chunks
from posttrain.progress import Progress
from posttrain.stage import Input, StageContext

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

FILE = "prepared.json"
DATA = "data"
"""Role of the rows that are learned from."""
ROWS_AT_ONCE = 500
"""Rows of a chunk that one worker encodes: small enough to be few in memory, large enough to be worth sending."""
ROWS_LOOKED_AT = 200_000
"""Rows among which a stage that is only tried looks for its longest samples, where its data are more and not prepared yet."""
LEAST_TRIED = 64
"""Samples that it has at least, though a step may be of fewer: some losses compare samples with others."""
SAID_BY_ROW = (
    "row", "origin", "length", "num_trained", "fingerprint", "question", "is_cut", "is_unstopped", "is_asked_otherwise", "label", "margin",
)  # fmt: skip
"""Columns beside the encoder's own: which row it was, and what the preflight looks at."""


@dataclass(frozen=True)
class Prepared:
    """Where prepared data lies, and what went into it."""

    path: Path
    num_read: int
    """Rows that fit their format; each is a sample, or left out."""
    num_rows: int
    num_tokens: int
    num_trained_tokens: int
    left_out: dict[str, int]
    """How many rows are left out for each fault."""
    examples: dict[str, str]
    """What was wrong with the first row of each fault."""
    num_invalid: int
    first_invalid: str | None
    """What was wrong with the first row that does not fit its format."""
    formats: list[str]
    """How each file was read, and whether its columns told or the config."""
    columns: list[str]
    """Columns of token ids, which are what is trained on."""
    num_pairs_split: int = 0
    """Pairs that were taken as two answers with labels; each is two of the rows read."""

    def load(self) -> "Dataset":
        """The samples, mapped from disk: the encoder's columns."""
        return self.samples.select_columns(self.columns)

    @cached_property
    def samples(self) -> "Dataset":
        """The samples with all that is known of each."""
        from datasets import Dataset

        return Dataset.from_file(str(self.path / "rows.arrow"))

    def column(self, name: str) -> npt.NDArray[Any]:
        """One number of each sample, `(num_rows,)`."""
        return np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in self.samples.data.column(name).chunks])

    @cached_property
    def labels(self) -> npt.NDArray[np.bool_] | None:
        """Whether the answer of each sample is desirable, `(num_rows,)`; None where samples have no labels."""
        return self.column("label").astype(bool) if "completion_ids" in self.columns else None

    def num_listed(self, name: str) -> npt.NDArray[np.int64]:
        """How many token ids each sample has in a column of them, `(num_rows,)`."""
        import pyarrow.compute as pc

        lengths = [pc.list_value_length(chunk).to_numpy(zero_copy_only=False) for chunk in self.samples.data.column(name).chunks]
        return np.concatenate(lengths).astype(np.int64)

    def sizes(self, layout: str) -> Sizes:
        """What each sample costs in a layout (see `posttrain.layout`): a lone sequence, or a pair that shares its prompt."""
        if "chosen_ids" not in self.columns:
            longest = computed = self.column("length").astype(np.int64)
        else:
            prompt, chosen, rejected = (self.num_listed(name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
            longest = prompt + np.maximum(chosen, rejected)
            computed = prompt * (1 if layout == "shared" else 2) + chosen + rejected
        sequences = np.full_like(longest, 1 if "chosen_ids" not in self.columns else 2)
        return Sizes(longest, computed, sequences, is_padded=layout == "padded")

    def num_trained_by_token(self) -> npt.NDArray[np.int64]:
        """How often each token of the vocabulary is trained, `(vocabulary,)`."""
        counts: npt.NDArray[np.int64] = np.load(self.path / "trained.npy")
        return counts


def prepare(
    context: StageContext[Any],
    given: Input,
    encoder: Encoder,
    *,
    fatal: Collection[Fault] = (),
    num_processes: int | None = None,
    role: str = DATA,
) -> Prepared:
    """Encode every row of an input, or find it encoded already. Writes `prepared.json` into the stage directory.

    Those of another role than `data` come after these, and are told beside them. The first row with a fault that is `fatal` ends it;
    rows that are too long, where none is wanted, end it when all have been counted.
    Of several processes that want the same at once, one makes it, by default with all cores. A stage that is only tried gets the
    longest samples alone: of all rows where they are prepared already or are no more than can be in a minute, else of the first ones.
    """
    shelf = context.root / ".prepared"
    path = shelf / _key(context, given, encoder)
    hashes = disk.HashCache(context.root / ".hashes.json")
    most = None
    if context.is_smoke and not _is_whole(path, hashes) and _are_many(given):
        most = ROWS_LOOKED_AT
        path = shelf / disk.hash_json({"of": path.name, "first": most})[:32]
    if not _is_whole(path, hashes):
        shelf.mkdir(parents=True, exist_ok=True)
        progress = Progress(context.directory, is_main=context.is_main)
        with _alone(path, lambda: progress.phase("wait for another process that prepares the same data")):
            if not _is_whole(path, hashes):
                progress.phase("prepare data")
                disk.discard_damaged(path, hashes)
                _encode_rows(context, given, encoder, path, frozenset(fatal), progress, num_processes, most)
    if context.is_smoke:
        path = _choose_longest(path, max(context.config.global_batch_size, LEAST_TRIED), encoder, hashes)
    hashes.save()
    found = open_prepared(path)
    told = {"longest_tokens": int(found.sizes("padded").longest[0])} if context.is_smoke else {}
    pointer = context.directory / FILE
    if role == DATA:
        disk.write_json(pointer, {"path": str(path), **told})
    else:
        data = disk.read_json(pointer)
        disk.write_json(pointer, {**data, role: str(path), "paths": [data["path"], str(path)]})
    return found


def _are_many(given: Input) -> bool:
    """Whether the rows of an input may be more than are looked at for its longest."""
    content = read_content(given.source)
    return not isinstance(content, Rows) or content.num_rows > ROWS_LOOKED_AT


def _choose_longest(path: Path, count: int, encoder: Encoder, hashes: disk.HashCache) -> Path:
    """Where the longest samples of prepared data lie by themselves, the longest first."""
    import pyarrow as pa

    chosen = path.with_name(disk.hash_json({"of": path.name, "longest": count})[:32])
    if _is_whole(chosen, hashes):
        return chosen
    disk.discard_damaged(chosen, hashes)
    whole = open_prepared(path)
    longest = np.argsort(-whole.sizes("padded").longest, kind="stable")[:count]
    batch = pa.RecordBatch.from_pydict(whole.samples.select(longest).to_dict(), schema=_schema(encoder))
    with disk.new_entry(chosen) as (aside, record):
        with pa.OSFile(str(aside / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
            writer.write_batch(batch)
        tokens, trained = (int(whole.column(name)[longest].sum()) for name in ("length", "num_trained"))
        record |= disk.read_sealed(path / disk.MANIFEST)
        record |= {"num_rows": len(longest), "num_tokens": tokens, "num_trained_tokens": trained}
    return chosen


def read_prepared(context: StageContext[Any], role: str = DATA) -> Prepared:
    """What `prepare` made for this stage of its input of that role."""
    return open_prepared(Path(disk.read_json(context.directory / FILE)["path" if role == DATA else role]))


def open_prepared(path: Path) -> Prepared:
    """The prepared data in that directory."""
    manifest = disk.read_sealed(path / disk.MANIFEST)
    return Prepared(path, **{name: value for name, value in manifest.items() if name != "files"})


def describe_formats(source: OpenSource) -> list[str]:
    """How each entry of a source is read."""
    return [f"{entry.path} is {entry.format}" + (", as its columns tell" if entry.detected else "") for entry in source.entries]


def question_bits(row: AnyRow) -> int:
    """64 bits that two rows share if they ask the same, white space and letter case aside."""
    return unit_bits(question(row))


def _key(context: StageContext[Any], given: Input, encoder: Encoder) -> str:
    """What decides the content: the data by their bytes, the encoder, and the code."""
    hashes = disk.HashCache(context.root / ".hashes.json")
    data = fingerprint_source(given.data, f"{context.at}: {given.name}", hashes)
    hashes.save()
    return disk.hash_json({"code": _hash_code(), "data": data, "encoder": encoder.key})[:32]


@cache
def _hash_code() -> str:
    """Hash of the code that makes samples of files: ours by its text, that of libraries by version."""
    package = Path(__file__).parent
    ours = [package.parent / "chat.py", *sorted(package.glob("*.py"))]
    libraries = {name: version(name) for name in ("jinja2", "tokenizers", "transformers")}
    return disk.hash_json({"ours": [disk.hash_file(path) for path in ours], **libraries})


def _is_whole(path: Path, hashes: disk.HashCache) -> bool:
    return next(disk.entry_faults(path, hashes.hash_file), None) is None


@contextmanager
def _alone(path: Path, say_waiting: Callable[[], None]) -> Iterator[None]:
    """Wait until no other process makes `path`, and take away what a killed one left. A disk without locks lets all go on."""
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say_waiting()
                fcntl.flock(lock, fcntl.LOCK_EX)
            for left in path.parent.glob(f".{path.name}.partial-*"):
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            pass  # each then makes its own, and the first one done is kept
        yield


@dataclass(frozen=True)
class _Chunk:
    """What a worker made of some rows."""

    batch: "pa.RecordBatch"
    num_read: int
    num_tokens: int
    left_out: Counter[str]
    examples: dict[str, str]
    trained: tuple[npt.NDArray[Any], npt.NDArray[np.int64]]
    """The tokens that are trained, and how often each."""
    too_long: list[TooLong]
    """Rows that are, where none is wanted."""


@dataclass
class _Total:
    """The sums over all chunks."""

    trained: npt.NDArray[np.int64]
    num_read: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    first_too_long: TooLong | None = None
    num_too_long: int = 0
    longest: int = 0
    """Of the rows that are too long, in tokens."""

    def add(self, chunk: _Chunk) -> None:
        self.num_read += chunk.num_read
        self.num_rows += chunk.batch.num_rows
        self.num_tokens += chunk.num_tokens
        self.left_out += chunk.left_out
        self.examples = chunk.examples | self.examples
        tokens, counts = chunk.trained
        self.trained[tokens] += counts
        if chunk.too_long:
            self.first_too_long = self.first_too_long or chunk.too_long[0]
            self.num_too_long += len(chunk.too_long)
            self.longest = max(self.longest, *(row.length for row in chunk.too_long))

    def check_lengths(self) -> None:
        """Raise `UserError` where a row is too long: which is the first, how many are, and what would hold them all."""
        if (first := self.first_too_long) is None:
            return
        if self.num_too_long == 1:
            raise first
        others = f"{self.num_too_long - 1:,} more of {self.num_read:,} rows"
        raise UserError(f"{first.what}, as are {others}; raise it, to {self.longest:,} for all of them, or {first.else_do}")


def _encode_rows(
    context: StageContext[Any],
    given: Input,
    encoder: Encoder,
    path: Path,
    fatal: frozenset[Fault],
    progress: Progress,
    num_processes: int | None,
    most: int | None,
) -> None:
    """Encode all rows, or at most so many of the first."""
    source = open_source(given.data, f"{context.at}: {given.name}")
    with disk.new_entry(path) as (aside, record):
        chunks = _encode_chunks(encoder, islice(encoder.rows(source.rows()), most), fatal, num_processes)
        total = _write_rows(aside / "rows.arrow", chunks, encoder, progress)
        total.check_lengths()
        if not total.num_rows:
            raise UserError(f"{context.at}: no row of {given.name} is left to train on; the first: {next(iter(total.examples.values()))}")
        np.save(aside / "trained.npy", total.trained)
        record |= {
            "num_read": total.num_read,
            "num_rows": total.num_rows,
            "num_tokens": total.num_tokens,
            "num_trained_tokens": int(total.trained.sum()),
            "left_out": dict(total.left_out),
            "examples": total.examples,
            "num_invalid": len(source.invalid),
            "first_invalid": next(iter(source.invalid.values()), None),
            "formats": describe_formats(source),
            "columns": list(encoder.columns),
            "num_pairs_split": total.num_read // 2 if encoder.splits_pairs and source.entries[0].format == "preference" else 0,
        }


def _encode_chunks(encoder: Encoder, rows: Iterable[Row], fatal: frozenset[Fault], num_processes: int | None) -> Iterator[_Chunk]:
    return map_chunks(
        lambda chunk: _encode_chunk(encoder, chunk, fatal), enumerate(rows), chunk_size=ROWS_AT_ONCE, num_processes=num_processes
    )


def _encode_chunk(encoder: Encoder, rows: Sequence[tuple[int, Row]], fatal: frozenset[Fault]) -> _Chunk:
    import pyarrow as pa

    columns: dict[str, list[Any]] = {name: [] for name in (*encoder.columns, *SAID_BY_ROW)}
    left_out: Counter[str] = Counter()
    examples: dict[str, str] = {}
    targets: list[int] = []
    too_long: list[TooLong] = []
    for index, row in rows:
        try:
            sample = encoder.encode(row)
        except TooLong as fault:
            too_long.append(fault)
            continue
        except LeftOut as fault:
            if fault.fault in fatal:
                raise
            left_out[fault.fault] += 1
            examples.setdefault(fault.fault, str(fault))
            continue
        said = {
            **sample.columns,
            "row": index,
            "origin": row.origin,
            "length": sample.length,
            "num_trained": len(sample.targets),
            "fingerprint": sample.fingerprint,
            "question": question_bits(row),
            "is_cut": sample.is_cut,
            "is_unstopped": sample.is_unstopped,
            "is_asked_otherwise": sample.is_asked_otherwise,
            "label": sample.label,
            "margin": sample.margin,
        }
        for name, value in said.items():
            columns[name].append(value)
        targets += sample.targets
    batch = pa.RecordBatch.from_pydict(columns, schema=_schema(encoder))
    trained = np.unique(np.asarray(targets, dtype=np.int64), return_counts=True)
    return _Chunk(batch, len(rows), sum(columns["length"]), left_out, examples, trained, too_long)


def _schema(encoder: Encoder) -> "pa.Schema":
    import pyarrow as pa

    numbers = {"row": pa.int64(), "length": pa.int32(), "num_trained": pa.int32(), "fingerprint": pa.uint64(), "question": pa.uint64()}
    types = {**numbers, "origin": pa.string(), "margin": pa.float64()}
    return pa.schema(
        [(name, pa.list_(pa.int32())) for name in encoder.columns] + [(name, types.get(name, pa.bool_())) for name in SAID_BY_ROW]
    )


def _write_rows(path: Path, chunks: Iterable[_Chunk], encoder: Encoder, progress: Progress) -> _Total:
    import pyarrow as pa

    total = _Total(np.zeros(encoder.vocabulary_size, dtype=np.int64))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _schema(encoder)) as writer:
        for chunk in chunks:
            if chunk.batch.num_rows:
                writer.write_batch(chunk.batch)
            total.add(chunk)
            progress.step(total.num_read)
    return total
