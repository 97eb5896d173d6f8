"""Prepared data: rows as token ids and masks, made once in one process before any process group exists.

Kept under the root, keyed by all that decides its content, and shared by every stage and run that needs the same. A
directory without its manifest, which is written last, is never read.
"""

import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import disk
from posttrain.chat import ChatContract, encode
from posttrain.data.rows import Conversation, Message, Pair, Row
from posttrain.data.source import OpenSource, open_source
from posttrain.error import UserError
from posttrain.stage import Input, StageContext

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Raised when the same rows give other tokens or masks than before."""
FILE = "prepared.json"
IGNORED = -100
"""Label of a token that is not trained, as transformers has it."""


@dataclass(frozen=True)
class Prepared:
    """Where prepared data lies, and what went into it."""

    path: Path
    num_rows: int
    num_tokens: int
    num_trained_tokens: int
    num_dropped: int
    num_truncated: int
    num_invalid: int
    formats: list[str]
    """How each file was read, and whether its columns told or the config."""
    first_invalid: str | None
    """What was wrong with the first row that was left out because it does not fit its format."""

    def describe(self, name: str) -> list[str]:
        """Lines that say what will be trained on."""
        lines = [f"{name}: {entry}" for entry in self.formats]
        lines.append(f"{name}: {self.num_rows:,} rows, {self.num_tokens:,} tokens, {self.num_trained_tokens:,} of them trained")
        if self.num_truncated or self.num_dropped:
            lines.append(f"{name}: over max_length: {self.num_truncated:,} rows cut, {self.num_dropped:,} left out")
        if self.num_invalid:
            lines.append(f"{name}: {self.num_invalid:,} rows left out that do not fit; the first: {self.first_invalid}")
        return lines

    def load(self) -> "Dataset":
        """The rows, mapped from disk."""
        from datasets import load_from_disk

        return load_from_disk(str(self.path / "rows"))


@dataclass(frozen=True)
class PreparedRow:
    """One prepared row, how many of its tokens are trained, and whether its end was cut off."""

    columns: dict[str, Any]
    length: int
    num_trained: int
    truncated: bool


@dataclass(frozen=True)
class Encoder:
    """Makes a prepared row of a row, or None of one that is to be left out."""

    encode: Callable[[Row], PreparedRow | None]
    tokenizer: str
    """Hash of the tokenizer: under one and the same chat contract, two vocabularies give other ids."""


def prepare(context: StageContext[Any], given: Input, encoder: Encoder, key: dict[str, Any]) -> Prepared:
    """Encode every row of an input, or find it encoded already.

    `key` holds all that the encoder depends on but data and tokenizer. Writes `prepared.json` into the stage directory.
    """
    digest = disk.hash_json({"version": VERSION, "data": given.fingerprint, "tokenizer": encoder.tokenizer, **key})
    path = context.root / ".prepared" / digest[:32]
    if not (path / "manifest.json").is_file():
        _encode_all(context, given, encoder, path)
    prepared = Prepared(path, **disk.read_json(path / "manifest.json"))
    write_summary(context, prepared.describe(given.name), path)
    return prepared


def write_summary(context: StageContext[Any], lines: list[str], path: Path | None = None) -> None:
    """Leave in the stage directory what the user is to be told of the data, and where they lie prepared."""
    disk.write_json(context.directory / FILE, {"path": str(path) if path else None, "summary": lines})


def read_prepared(context: StageContext[Any]) -> Prepared:
    """What `prepare` made for this stage."""
    path = Path(disk.read_json(context.directory / FILE)["path"])
    return Prepared(path, **disk.read_json(path / "manifest.json"))


def _encode_all(context: StageContext[Any], given: Input, encoder: Encoder, path: Path) -> None:
    from datasets import Dataset

    source = open_source(given.data, f"{context.at}: {given.name}")
    rows, num_dropped = [], 0
    for row in source.rows():
        encoded = encoder.encode(row)
        if encoded is None:
            num_dropped += 1
        else:
            rows.append(encoded)
    if not rows:
        raise UserError(f"{context.at}: no row of {given.name} is left to train on: {num_dropped} are over max_length; raise it")
    columns = {name: [row.columns[name] for row in rows] for name in rows[0].columns}
    manifest = {
        "num_rows": len(rows),
        "num_tokens": sum(row.length for row in rows),
        "num_trained_tokens": sum(row.num_trained for row in rows),
        "num_dropped": num_dropped,
        "num_truncated": sum(row.truncated for row in rows),
        "num_invalid": len(source.invalid),
        "formats": describe_formats(source),
        "first_invalid": next(iter(source.invalid.values()), None),
    }
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    aside.mkdir(parents=True)
    try:
        Dataset.from_dict({**columns, "length": [row.length for row in rows]}).save_to_disk(str(aside / "rows"))
        disk.write_json(aside / "manifest.json", manifest)
        if path.exists() and not (path / "manifest.json").is_file():
            shutil.rmtree(path)
        try:
            disk.publish_directory(aside, path)
        except OSError:
            if not (path / "manifest.json").is_file():  # unless another process was faster with the very same
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def describe_formats(source: OpenSource) -> list[str]:
    """How each entry of a source is read."""
    return [f"{entry.path} is {entry.format}" + (", as its columns tell" if entry.detected else "") for entry in source.entries]


def conversation_encoder(
    tokenizer: "PreTrainedTokenizerBase", contract: ChatContract, *, max_length: int, on_overflow: str, at: str
) -> Encoder:
    """An encoder of conversations into `input_ids` and `labels`, both `(T,)`: only assistant turns and their stops are labels."""

    def encode_row(row: Row) -> PreparedRow | None:
        if not isinstance(row, Conversation):
            raise UserError(f"{row.origin}: is a preference pair, and {at} trains on conversations")
        if not any(message["role"] == "assistant" for message in row.messages):
            raise UserError(f"{row.origin}: has no assistant turn, so there is nothing to train; drop the row")
        encoded = encode(tokenizer, row.messages, row.tools, contract.stop_tokens[0], row.origin)
        if _overflows(len(encoded.ids), max_length, on_overflow, row.origin, at):
            return None
        ids, trained = encoded.ids[:max_length], encoded.trained[:max_length]
        # The first token is predicted from nothing, so it can never be a target.
        labels = [token if is_trained else IGNORED for token, is_trained in zip(ids, [False, *trained[1:]], strict=True)]
        num_trained = sum(label != IGNORED for label in labels)
        if num_trained == 0:
            if len(encoded.ids) > max_length:
                return None
            raise UserError(f"{row.origin}: no token of it is trained; drop the row, or set train: true on an assistant turn")
        return PreparedRow({"input_ids": ids, "labels": labels}, len(ids), num_trained, len(encoded.ids) > max_length)

    return Encoder(encode_row, _hash_tokenizer(tokenizer))


def pair_encoder(tokenizer: "PreTrainedTokenizerBase", contract: ChatContract, *, max_length: int, on_overflow: str, at: str) -> Encoder:
    """An encoder of preference pairs into `prompt_ids`, `chosen_ids` and `rejected_ids`, each `(T,)`, answers with their stops."""

    def encode_row(row: Row) -> PreparedRow | None:
        if not isinstance(row, Pair):
            raise UserError(f"{row.origin}: is a conversation, and {at} learns from preference pairs")
        prompt, chosen, rejected = encode_pair(tokenizer, contract, row)
        if chosen == rejected:
            raise UserError(f"{row.origin}: chosen and rejected are the same answer; drop the row")
        longest = len(prompt) + max(len(chosen), len(rejected))
        if _overflows(longest, max_length, on_overflow, row.origin, at):
            return None
        room = max_length - len(prompt)
        cut_chosen, cut_rejected = chosen[: max(room, 0)], rejected[: max(room, 0)]
        if not cut_chosen or cut_chosen == cut_rejected:
            return None  # nothing is left that tells the two apart
        length = 2 * len(prompt) + len(cut_chosen) + len(cut_rejected)
        columns = {"prompt_ids": prompt, "chosen_ids": cut_chosen, "rejected_ids": cut_rejected}
        return PreparedRow(columns, length, len(cut_chosen) + len(cut_rejected), longest > max_length)

    return Encoder(encode_row, _hash_tokenizer(tokenizer))


def encode_pair(tokenizer: "PreTrainedTokenizerBase", contract: ChatContract, row: Pair) -> tuple[list[int], list[int], list[int]]:
    """Token ids of the prompt and of the two answers, each answer up to and with its stop token."""
    prompt, chosen = _split_answer(tokenizer, contract, row, row.chosen, "chosen")
    prompt_of_rejected, rejected = _split_answer(tokenizer, contract, row, row.rejected, "rejected")
    assert prompt == prompt_of_rejected, "a prompt is tokenized before its answer exists"
    return prompt, chosen, rejected


def _split_answer(
    tokenizer: "PreTrainedTokenizerBase", contract: ChatContract, row: Pair, answer: list[Message], name: str
) -> tuple[list[int], list[int]]:
    if len(answer) != 1:
        raise UserError(
            f"{row.origin}: {name} holds {len(answer)} messages, and what stands between answers would be learned with them; "
            "compare single answers, with all before them in the prompt"
        )
    context = [_trained(message, False) if message["role"] == "assistant" else message for message in row.prompt]
    encoded = encode(tokenizer, [*context, _trained(answer[0], True)], row.tools, contract.stop_tokens[0], row.origin)
    start = encoded.trained.index(True)
    return encoded.ids[:start], encoded.ids[start : start + sum(encoded.trained)]


def _trained(message: Message, train: bool) -> Message:
    return {**message, "train": train}


def _hash_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of all that turns text into ids; of the vocabulary alone where there is no `tokenizers` object to ask."""
    return disk.hash_json(tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab())


def _overflows(length: int, max_length: int, on_overflow: str, origin: str, at: str) -> bool:
    """Whether to leave the row out for its length. Raises `UserError` where the config wants neither that nor a cut."""
    if length <= max_length:
        return False
    if on_overflow == "error":
        raise UserError(
            f"{origin}: {length} tokens, over {at}.max_length: {max_length}; raise it, or set {at}.on_overflow to drop or truncate"
        )
    return on_overflow == "drop"
