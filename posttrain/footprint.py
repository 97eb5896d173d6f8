"""Footprint: how many bytes a stage will take on disk, foretold from headers and file sizes alone. Imports no torch.

    prepared      token ids and masks of its data, and what a reference gives them
    checkpoints   as many as are kept and the one being written: of each trained weight the weight and AdamW's two moments, fp32;
                  of a merge its weights, until they are published
                  with `select` also the weights of as many steps, and one more, in fp32
    output        the published weights in their type, and the files beside them
    completions   what a policy that learns from its own answers said: each as long as it may be
    total         prepared + output + completions: what stays     peak   all: what is there while the output is verified

Weights are counted exactly, by the headers of their safetensors files; data are estimated, by their bytes and the size of the
vocabulary. What cannot be known here, such as the size of a model that is yet to be fetched from the Hub, is None.
"""

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from posttrain.config import DataSource, ModelSource, is_hub_id
from posttrain.recipe import LoraRecipe, TrainingConfig
from posttrain.stage import ArtifactKind, StageConfig

MAX_HEADER_BYTES = 100_000_000
"""Longest header that the format allows; a longer one is no safetensors file."""
STATE_BYTES = 12
"""Bytes that a checkpoint keeps for each trained weight."""
WEIGHT_BYTES = 4
"""Bytes that are kept of each trained weight of a step that may be published."""
TOKEN_BYTES, PAIR_TOKEN_BYTES, SPLIT_TOKEN_BYTES = 8, 5, 11
"""Bytes of a prepared token: its id and its label; of a pair its id, and for some its log-probability under the reference. Of one that is
split into two answers, where a third of it is the prompt: that twice, and of answers two log-probabilities, as each is also put to
another prompt."""
ROW_BYTES = 90
"""Bytes that are kept of a prepared row beside its tokens."""
FRAME_BYTES = 80
"""Bytes of a row in its file that are no text: names of fields, quotes and brackets."""
REPORTED_ROW_BYTES = 250
"""Bytes that a report keeps of a row for each policy."""
ANSWER_BYTES = 4
"""Bytes of text in a token that a policy says, about."""
COMPLETION_BYTES = 350
"""Bytes that are kept of a completion beside the texts: names of fields, where the prompt stands, rewards."""
PROMPT_SHARE = 1 / 3
"""Of a pair, about."""
EXPANSION = {".gz": 4.0, ".parquet": 3.0}
"""Bytes of text in a byte of a compressed file, about."""
SAMPLE_BYTES = 1 << 16
USUAL_ROW_BYTES = 1000
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
STORED_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
"""Bytes of the whole numbers that safetensors names; what is not here has one."""


@dataclass(frozen=True)
class Weights:
    """A model, as far as its files tell without being read."""

    matrices: Mapping[str, tuple[int, int]] = field(repr=False)
    """Name of each floating-point tensor of two dimensions to its shape: what may get an adapter."""
    num_parameters: int
    """Numbers in all floating-point tensors."""
    fixed_bytes: int
    """Size of all other tensors, whose type stays what it is."""
    dtype: str
    vocabulary_size: int
    other_bytes: int
    """Size of all that is published beside the weights."""

    def num_bytes(self, dtype: str) -> int:
        """Size of the weights, published in that type."""
        return self.num_parameters * BYTES[dtype] + self.fixed_bytes


@dataclass(frozen=True)
class Rows:
    """Data, as far as their files tell: bytes of text, and about how many rows."""

    num_bytes: float
    num_rows: float
    are_pairs: bool = False


Content = Weights | Rows | None
"""What an artifact holds; None where that cannot be known yet."""


@dataclass(frozen=True)
class Footprint:
    """What a stage takes on disk, in bytes; None is unknown."""

    prepared: int | None
    checkpoints: int | None
    output: int | None
    completions: int | None = 0

    @property
    def total(self) -> int | None:
        """What stays when it has finished."""
        return _sum([self.prepared, self.output, self.completions])

    @property
    def peak(self) -> int | None:
        """What is there at most, just before it finishes."""
        return _sum([self.total, self.checkpoints])

    def as_json(self) -> dict[str, int | None]:
        """All figures by name."""
        return {name: getattr(self, name) for name in ("prepared", "checkpoints", "output", "completions", "total", "peak")}


def read_content(source: ModelSource | DataSource) -> Content:
    """What a source holds; None where it is not on this disk or cannot be read."""
    try:
        return _read_weights(Path(source.model)) if isinstance(source, ModelSource) else _read_rows(source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None  # whoever loads it will say what is wrong with it


def foretell(
    config: StageConfig, kind: ArtifactKind, inputs: Mapping[str, Sequence[Content]], *, prepares: bool
) -> tuple[Footprint, Content]:
    """What a stage that writes that kind of artifact takes, and what its output will hold. `prepares`: whether it trains on rows."""
    models = [content for role in inputs.values() for content in role if not isinstance(content, Rows)]
    data = [content for role in inputs.values() for content in role if not isinstance(content, Weights)]
    rows = _join(data) if data and all(isinstance(content, Rows) for content in data) else None
    if kind == "dataset":
        return _foretell_rows(config, rows)
    if kind == "verdict":
        return Footprint(0, 0, 0), None
    if kind == "report":
        return Footprint(0, 0, None if rows is None else int(rows.num_rows * len(models) * REPORTED_ROW_BYTES)), None
    first = models[0] if models else None
    if first is None:
        return Footprint(None if prepares else 0, None, None), None
    prepared: int | None = 0
    if prepares:
        splits_pairs = getattr(config, "splits_pairs", False)
        prepared = None if rows is None else _prepared_bytes(rows, first.vocabulary_size, splits_pairs=splits_pairs)
    save_dtype = getattr(config, "save_dtype", "auto")
    dtype = first.dtype if save_dtype == "auto" else save_dtype
    output: int | None = first.num_bytes(dtype) + first.other_bytes
    checkpoints: int | None = first.num_bytes(dtype)  # a merge writes its weights before they are published
    if isinstance(config, TrainingConfig):
        trained = first.num_parameters if config.lora is None else adapter_parameters(first, config.lora)
        checkpoints = None if trained is None else trained * (_num_checkpoints(config) * STATE_BYTES + _num_weights(config) * WEIGHT_BYTES)
        if config.lora is not None:
            output = None if trained is None else _sum([output, trained * BYTES["float32"]])
    return Footprint(prepared, checkpoints, output, _completions_bytes(config, inputs.get("data", ()))), replace(first, dtype=dtype)


def _foretell_rows(config: StageConfig, rows: Rows | None) -> tuple[Footprint, Content]:
    """The same of a stage that writes rows: the rows it reads, and where it samples answers to them as long ones as there may be."""
    if rows is None:
        return Footprint(0, 0, None), None
    num_answers = getattr(config, "num_generations", 0)
    if not num_answers:
        return Footprint(0, 0, int(rows.num_bytes)), rows
    answers_bytes = rows.num_rows * getattr(config, "max_completion_length", 0) * ANSWER_BYTES
    output = getattr(config, "output", "")
    num_kept = {"pairs": 2, "best": 1}.get(output, num_answers)
    made = Rows(rows.num_bytes + num_kept * answers_bytes, rows.num_rows * (num_answers if output == "all" else 1), output == "pairs")
    return Footprint(0, 0, int(made.num_bytes + num_answers * answers_bytes)), made


def adapter_parameters(weights: Weights, lora: LoraRecipe) -> int | None:
    """Numbers in the adapters of a model; None where no module of it is known to be meant."""
    total = 0
    for name, shape in weights.matrices.items():
        module, _, last = name.rpartition(".")
        if last == "weight" and _is_target(module, lora.target_modules):
            total += lora.r * sum(shape) + (shape[0] if lora.use_dora else 0)
    return total or None


def _is_target(module: str, targets: str | list[str]) -> bool:
    if targets == "all-linear":
        return not is_table(module)  # tables are no linear modules, and peft leaves the head out
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def is_table(module: str) -> bool:
    """Whether a module is a table with a vector for each token or position, or a head: what no layer multiplies with."""
    return re.search(r"(^|\.)(\w*embed\w*|wte|wpe|lm_head|embed_out|output|score)$", module) is not None


def _num_checkpoints(config: TrainingConfig) -> int:
    """How many lie there at once at most: those that are kept, and the one being written."""
    kept = config.keep.save_total_limit + (config.keep.metric_for_best_model is not None)
    ever = math.ceil(config.max_steps / config.save_steps) if config.max_steps and config.save_minutes is None else kept + 1
    return min(kept + 1, ever)


def _num_weights(config: TrainingConfig) -> int:
    """Of how many steps the weights alone lie there at once at most: of those that kept checkpoints name, the last one, and one being
    written. Those of the last step are never kept so."""
    if config.select is None or config.eval_steps is None:
        return 0
    ever = math.ceil(config.max_steps / config.eval_steps) - 1 if config.max_steps else math.inf
    return int(min(config.keep.save_total_limit + 2, ever))


def _completions_bytes(config: StageConfig, data: Sequence[Content]) -> int | None:
    """What is kept of all answers that a policy learns from, each with its prompt."""
    if not isinstance(config, TrainingConfig) or not hasattr(config, "num_generations"):
        return 0
    rows = _join(data) if data and all(isinstance(content, Rows) for content in data) else None
    if rows is None or not rows.num_rows:
        return None
    num_steps = config.max_steps or math.ceil(rows.num_rows * config.num_train_epochs / config.global_batch_size)
    prompt = rows.num_bytes / rows.num_rows * (PROMPT_SHARE if rows.are_pairs else 1)
    answer = getattr(config, "max_completion_length", 0) * ANSWER_BYTES
    return int(num_steps * config.global_batch_size * config.num_generations * (prompt + answer + COMPLETION_BYTES))


def num_tokens(rows: Rows, vocabulary_size: int) -> float:
    """About how many tokens all rows have, the prompt of a pair once."""
    # Bytes of English in a token: about 2 with a vocabulary of a thousand, 3.7 with one of 32 thousand, 4.3 with 128 thousand.
    each = max(1.0, math.log2(max(2, vocabulary_size)) / 3 - 1.3)
    return max(rows.num_bytes - rows.num_rows * FRAME_BYTES, rows.num_bytes / 4) / each


def _prepared_bytes(rows: Rows, vocabulary_size: int, *, splits_pairs: bool) -> int:
    is_split = rows.are_pairs and splits_pairs
    each = SPLIT_TOKEN_BYTES if is_split else PAIR_TOKEN_BYTES if rows.are_pairs else TOKEN_BYTES
    kept_rows = rows.num_rows * (2 if is_split else 1)
    return int(num_tokens(rows, vocabulary_size) * each + kept_rows * ROW_BYTES + vocabulary_size * 8)


def _join(data: Sequence[Content]) -> Rows:
    held = [rows for rows in data if isinstance(rows, Rows)]
    return Rows(sum(rows.num_bytes for rows in held), sum(rows.num_rows for rows in held), all(rows.are_pairs for rows in held))


def _sum(parts: Sequence[int | None]) -> int | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


# --- what files tell -------------------------------------------------------------------------------------------------


def _read_weights(directory: Path) -> Weights | None:
    if not directory.is_dir():
        return None
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or config
    index = directory / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    tensors = {name: described for shard in shards for name, described in read_header(directory / shard).items()}
    beside = [path for path in directory.iterdir() if path.is_file() and path.suffix != ".safetensors" and not path.name.startswith(".")]
    dtype = config.get("dtype") or config.get("torch_dtype")
    floating = {name: shape for name, (stored, shape) in tensors.items() if stored.startswith(("F", "BF"))}
    return Weights(
        matrices={name: (shape[0], shape[1]) for name, shape in floating.items() if len(shape) == 2},
        num_parameters=sum(map(math.prod, floating.values())),
        fixed_bytes=sum(
            math.prod(shape) * STORED_BYTES.get(stored, 1) for name, (stored, shape) in tensors.items() if name not in floating
        ),
        dtype=dtype if dtype in BYTES else "float32",
        vocabulary_size=int(text.get("vocab_size", 0)),
        other_bytes=sum(path.stat().st_size for path in beside),
    )


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name of each tensor in a safetensors file to its type and shape. Raises `ValueError` or `struct.error` where it is none."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path}: a header of {length:,} bytes is none")
        header = json.loads(file.read(length))
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__"}


def _read_rows(source: DataSource) -> Rows | None:
    num_bytes = num_rows = 0.0
    are_pairs = source.format == "preference"
    for entry in source.paths:
        if is_hub_id(entry.partition("@")[0]):
            return None
        path = Path(entry)
        expansion = EXPANSION.get(path.suffix.lower(), 1.0)
        size = path.stat().st_size * expansion
        num_bytes += size
        with path.open("rb") as file:
            sample = file.read(SAMPLE_BYTES)
        num_rows += size / (len(sample) / max(1, sample.count(b"\n")) if expansion == 1 and sample else USUAL_ROW_BYTES)
        are_pairs |= b"rejected" in sample
    share = {"all": 1.0, "held_out": source.held_out, "train": 1 - source.held_out}[source.part]
    if source.max_samples is not None and num_rows:
        share = min(share, source.max_samples / num_rows)
    return Rows(num_bytes * share, num_rows * share, are_pairs)
