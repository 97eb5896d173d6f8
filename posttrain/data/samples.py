"""Samples: a row as a training stage sees it, in token ids and masks, or why it cannot be trained on.

An encoder first makes the whole sequences of a row, which `inspect` shows, and of these the sample, cut to `max_length`.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from posttrain import disk
from posttrain.chat import ChatContract, Encoded, TrainOn, encode, encode_prompt
from posttrain.data.rows import Conversation, Message, Pair, Row, asked_messages, split_pairs
from posttrain.error import UserError
from posttrain.sandbox import OverLimit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not trained, as transformers has it."""
OnOverflow = Literal["error", "drop", "truncate"]
Fault = Literal["refused", "untrained", "identical", "over_max_length"]
"""Why a row is left out: the template cannot render it, it trains nothing, its two answers are the same, it is too long."""


class LeftOut(UserError):
    """A row that cannot be trained on."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.fault, str(self))


class TooLong(UserError):
    """A row over `max_length`, where none is wanted."""

    def __init__(self, what: str, else_do: str, length: int) -> None:
        """`what` is wrong with which row, and `else_do` is what to do where `max_length` is not raised to `length`, in tokens."""
        super().__init__(f"{what}; raise it, or {else_do}")
        self.what, self.else_do, self.length = what, else_do, length

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.else_do, self.length)


@dataclass(frozen=True, slots=True)
class Sample:
    """One row, ready to be trained on."""

    columns: dict[str, list[int]]
    targets: list[int]
    """Ids of the tokens that are trained."""
    length: int
    """Tokens that a model reads for it, both answers of a pair and their prompt for each counted."""
    is_cut: bool
    is_unstopped: bool
    """Whether an answer is cut off before its stop token."""
    is_asked_otherwise: bool
    """Whether an answer begins otherwise than it is asked for."""
    label: bool | None = None
    """Whether its answer is desirable, where rows are learned by that."""
    margin: float | None = None
    """By how much the chosen answer of a pair is the better, where its row says so."""

    @property
    def fingerprint(self) -> int:
        """64 bits that two samples share if they are the same, their labels aside."""
        hashed = hashlib.blake2b(digest_size=8)
        for name, ids in self.columns.items():
            hashed.update(f"{name} {len(ids)} ".encode())
            hashed.update(np.asarray(ids, dtype=np.int32).tobytes())
        return int.from_bytes(hashed.digest(), "big")


@dataclass(frozen=True)
class Encoder:
    """Makes samples of rows, for one stage and one policy."""

    sequences: Callable[[Row], dict[str, Encoded]]
    """The whole of what a row says: one sequence for a conversation, named by its label; `chosen` and `rejected` for a pair."""
    cut: Callable[[Row, dict[str, Encoded]], Sample]
    """The sample made of the sequences of a row. Raises `LeftOut`."""
    columns: tuple[str, ...]
    """Columns of the samples, each of token ids."""
    key: dict[str, Any]
    """All that decides what it makes of a row, as plain JSON."""
    max_length: int
    vocabulary_size: int
    splits_pairs: bool = False
    """Whether it takes a pair as two rows, each an answer with a label."""

    def rows(self, rows: Iterable[Row]) -> Iterable[Row]:
        """The rows as it takes them; a sample has its number among these."""
        return split_pairs(rows) if self.splits_pairs else rows

    def encode(self, row: Row) -> Sample:
        """The sample of a row. Raises `LeftOut`, and `UserError` where the whole stage cannot go on."""
        return self.cut(row, self.sequences(row))


def conversation_encoder(
    tokenizer: "PreTrainedTokenizerBase",
    contract: ChatContract,
    *,
    max_length: int,
    on_overflow: OnOverflow,
    at: str,
    train_on: TrainOn = "all",
) -> Encoder:
    """An encoder of conversations into `input_ids` and `labels`, both `(T,)`: only assistant turns and their stops are labels."""
    stop = contract.stop_tokens[0]

    def sequences(row: Row) -> dict[str, Encoded]:
        if not isinstance(row, Conversation):
            raise UserError(f"{row.origin}: is a preference pair, and {at} trains on conversations")
        if row.label is not None:
            raise UserError(
                f"{row.origin}: is a labelled answer, and {at} trains on conversations; "
                "take undesirable answers out, and set format: of the source to one without label"
            )
        if not any(message["role"] == "assistant" for message in row.messages):
            raise LeftOut("untrained", f"{row.origin}: has no assistant turn, so there is nothing to train; drop the row")
        return {"": _encode(tokenizer, row.messages, row, stop, train_on)}

    def cut(row: Row, encoded: dict[str, Encoded]) -> Sample:
        (whole,) = encoded.values()
        is_long = _is_over(len(whole.ids), max_length, on_overflow, row.origin, at)
        ids, trained = whole.ids[:max_length], whole.trained[:max_length]
        # The first token is predicted from nothing, so it can never be a target.
        labels = [token if is_trained else IGNORED for token, is_trained in zip(ids, [False, *trained[1:]], strict=True)]
        targets = [label for label in labels if label != IGNORED]
        if not targets:
            if is_long:
                raise LeftOut("over_max_length", f"{row.origin}: nothing to train is left within {at}.max_length: {max_length}")
            raise LeftOut("untrained", f"{row.origin}: no token of it is trained; drop the row, or set train: true on an assistant turn")
        unstopped = is_long and whole.trained[max_length] and trained[-1]
        return Sample({"input_ids": ids, "labels": labels}, targets, len(ids), is_long, unstopped, whole.asked_otherwise)

    key = {"kind": "conversation", "train_on": train_on}
    return _encoder(tokenizer, contract, sequences, cut, ("input_ids", "labels"), key, max_length, on_overflow)


def pair_encoder(
    tokenizer: "PreTrainedTokenizerBase", contract: ChatContract, *, max_length: int, on_overflow: OnOverflow, at: str
) -> Encoder:
    """An encoder of preference pairs into `prompt_ids`, `chosen_ids` and `rejected_ids`, each `(T,)`, answers with their stops."""

    def sequences(row: Row) -> dict[str, Encoded]:
        if not isinstance(row, Pair):
            raise UserError(f"{row.origin}: is a conversation, and {at} learns from preference pairs")
        return {
            "chosen": _answered(tokenizer, contract, row, row.prompt, row.chosen, "chosen"),
            "rejected": _answered(tokenizer, contract, row, row.prompt, row.rejected, "rejected"),
        }

    def cut(row: Row, encoded: dict[str, Encoded]) -> Sample:
        assert isinstance(row, Pair), "its sequences are those of a pair"
        prompt, chosen = _split(encoded["chosen"])
        _, rejected = _split(encoded["rejected"])
        if chosen == rejected:
            raise LeftOut("identical", f"{row.origin}: chosen and rejected are the same answer; drop the row")
        longest = len(prompt) + max(len(chosen), len(rejected))
        is_long = _is_over(longest, max_length, on_overflow, row.origin, at)
        room = _room(prompt, max_length, row.origin, at)
        kept_chosen, kept_rejected = chosen[:room], rejected[:room]
        if kept_chosen == kept_rejected:
            raise LeftOut(
                "identical", f"{row.origin}: cut to {at}.max_length: {max_length}, nothing tells chosen and rejected apart; raise it"
            )
        return Sample(
            {"prompt_ids": prompt, "chosen_ids": kept_chosen, "rejected_ids": kept_rejected},
            kept_chosen + kept_rejected,
            2 * len(prompt) + len(kept_chosen) + len(kept_rejected),
            is_long,
            is_long,
            encoded["chosen"].asked_otherwise,
            margin=row.margin,
        )

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return _encoder(tokenizer, contract, sequences, cut, columns, {"kind": "pair"}, max_length, on_overflow)


def unpaired_encoder(
    tokenizer: "PreTrainedTokenizerBase", contract: ChatContract, *, max_length: int, on_overflow: OnOverflow, at: str
) -> Encoder:
    """An encoder of answers with labels into `prompt_ids` and `completion_ids`, each `(T,)`; a pair is taken as two such answers."""

    def sequences(row: Row) -> dict[str, Encoded]:
        assert isinstance(row, Conversation), "pairs are split"
        if row.label is None:
            raise UserError(
                f"{row.origin}: is a conversation without a label, and {at} learns from answers with one, true or false; "
                "add label to the rows, or name its column with columns:"
            )
        answers = (index for index, message in enumerate(row.messages) if message["role"] == "assistant" and message.get("train", True))
        start = next(answers, None)
        if start is None:
            raise LeftOut("untrained", f"{row.origin}: its answer is train: false; drop the row, or take that out")
        answered = _answered(tokenizer, contract, row, row.messages[:start], row.messages[start:], "the answer")
        return {"desirable" if row.label else "undesirable": answered}

    def cut(row: Row, encoded: dict[str, Encoded]) -> Sample:
        ((name, whole),) = encoded.items()
        prompt, answer = _split(whole)
        is_long = _is_over(len(whole.ids), max_length, on_overflow, row.origin, at)
        kept = answer[: _room(prompt, max_length, row.origin, at)]
        columns = {"prompt_ids": prompt, "completion_ids": kept}
        return Sample(columns, kept, len(prompt) + len(kept), is_long, is_long, whole.asked_otherwise, name == "desirable")

    encoder = _encoder(tokenizer, contract, sequences, cut, ("prompt_ids", "completion_ids"), {"kind": "unpaired"}, max_length, on_overflow)
    return replace(encoder, splits_pairs=True)


def prompt_encoder(
    tokenizer: "PreTrainedTokenizerBase",
    contract: ChatContract,
    *,
    max_length: int,
    max_completion_length: int,
    on_overflow: OnOverflow,
    at: str,
) -> Encoder:
    """An encoder of what is asked into `input_ids` `(T,)`, which leave room for an answer within `max_length`. Nothing of it is trained."""

    def sequences(row: Row) -> dict[str, Encoded]:
        messages = asked_messages(row)
        if not any(message["role"] in ("user", "tool") for message in messages):
            raise LeftOut("refused", f"{row.origin}: asks nothing that could be answered; drop the row")
        try:
            ids = encode_prompt(tokenizer, messages, row.tools, row.origin)
        except OverLimit:
            raise
        except UserError as error:
            raise LeftOut("refused", str(error)) from None
        return {"": Encoded(ids, [False] * len(ids))}

    def cut(row: Row, encoded: dict[str, Encoded]) -> Sample:
        (whole,) = encoded.values()
        if len(whole.ids) + max_completion_length > max_length:
            message = (
                f"{row.origin}: the prompt has {len(whole.ids)} tokens, which with {at}.max_completion_length: {max_completion_length} is "
                f"over {at}.max_length: {max_length}"
            )
            if on_overflow == "error":
                raise TooLong(message, f"set {at}.on_overflow: drop", len(whole.ids) + max_completion_length)
            raise LeftOut("over_max_length", message)
        return Sample({"input_ids": whole.ids}, [], len(whole.ids), is_cut=False, is_unstopped=False, is_asked_otherwise=False)

    key = {"kind": "prompt", "max_completion_length": max_completion_length}
    return _encoder(tokenizer, contract, sequences, cut, ("input_ids",), key, max_length, on_overflow)


def encode_pair(tokenizer: "PreTrainedTokenizerBase", contract: ChatContract, row: Pair) -> tuple[list[int], list[int], list[int]]:
    """Token ids of the prompt and of the two answers, each answer up to and with its stop token."""
    prompt, chosen = _split(_answered(tokenizer, contract, row, row.prompt, row.chosen, "chosen"))
    prompt_of_rejected, rejected = _split(_answered(tokenizer, contract, row, row.prompt, row.rejected, "rejected"))
    assert prompt == prompt_of_rejected, "a prompt is tokenized before its answer exists"
    return prompt, chosen, rejected


def _answered(
    tokenizer: "PreTrainedTokenizerBase", contract: ChatContract, row: Row, prompt: list[Message], answer: list[Message], name: str
) -> Encoded:
    """A prompt and one answer of a row, of which only the answer is trained; `name` is what the row calls it."""
    if len(answer) != 1:
        raise LeftOut(
            "refused",
            f"{row.origin}: {name} holds {len(answer)} messages, and what stands between answers would be learned with them; "
            "give single answers, with all before them in the prompt",
        )
    context = [_trained(message, False) if message["role"] == "assistant" else message for message in prompt]
    encoded = _encode(tokenizer, [*context, _trained(answer[0], True)], row, contract.stop_tokens[0], "last")
    end = len(encoded.trained) - encoded.trained[::-1].index(True)
    # What the template puts after the stop token is nothing that a pair is compared by.
    return replace(encoded, ids=encoded.ids[:end], trained=encoded.trained[:end])


def _split(encoded: Encoded) -> tuple[list[int], list[int]]:
    start = encoded.trained.index(True)
    return encoded.ids[:start], encoded.ids[start:]


def _encode(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], row: Row, stop: str, train_on: TrainOn) -> Encoded:
    try:
        return encode(tokenizer, messages, row.tools, stop, row.origin, train_on=train_on)
    except (LeftOut, OverLimit):
        raise
    except UserError as error:
        raise LeftOut("refused", str(error)) from None


def _room(prompt: list[int], max_length: int, origin: str, at: str) -> int:
    """Tokens of an answer that fit behind the prompt. Raises `LeftOut` where none does."""
    if len(prompt) >= max_length:
        raise LeftOut("over_max_length", f"{origin}: the prompt alone has {len(prompt)} tokens, over {at}.max_length: {max_length}")
    return max_length - len(prompt)


def _trained(message: Message, train: bool) -> Message:
    return {**message, "train": train}


def _is_over(length: int, max_length: int, on_overflow: OnOverflow, origin: str, at: str) -> bool:
    """Whether to cut the row to `max_length`. Raises `LeftOut` where it is to be dropped, `TooLong` where neither is wanted."""
    if length <= max_length:
        return False
    message = f"{origin}: {length} tokens, over {at}.max_length: {max_length}"
    if on_overflow == "error":
        raise TooLong(message, f"set {at}.on_overflow to drop or truncate", length)
    if on_overflow == "drop":
        raise LeftOut("over_max_length", message)
    return True


def _encoder(
    tokenizer: "PreTrainedTokenizerBase",
    contract: ChatContract,
    sequences: Callable[[Row], dict[str, Encoded]],
    cut: Callable[[Row, dict[str, Encoded]], Sample],
    columns: tuple[str, ...],
    key: dict[str, Any],
    max_length: int,
    on_overflow: OnOverflow,
) -> Encoder:
    decides = {
        **key,
        # Under one and the same chat contract, two vocabularies give other ids.
        "tokenizer": _hash_tokenizer(tokenizer),
        "contract": contract.digest,
        "max_length": max_length,
        "on_overflow": on_overflow,
    }
    return Encoder(sequences, cut, columns, decides, max_length, len(tokenizer))


def _hash_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of all that turns text into ids; of the vocabulary alone where there is no `tokenizers` object to ask."""
    return disk.hash_json(tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab())
