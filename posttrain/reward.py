"""Rewards: one number for an answer, by a model with a score head, and how well such numbers tell better answers from worse.

A reward is read off the last token of an answer, as transformers' sequence classification does: the last that is no padding. So an
answer never ends with the pad token here.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.batch import token_batches
from posttrain.chat import ChatContract, check_contract, encode, read_contract, render
from posttrain.curate.threads import each_batch
from posttrain.data.rows import Conversation, Message
from posttrain.error import UserError
from posttrain.forward import score_all
from posttrain.layout import Group, Layout
from posttrain.metrics.calibration import expected_calibration_error
from posttrain.models import check_files
from posttrain.sandbox import OverLimit
from posttrain.stage import Input

Floats = npt.NDArray[np.float64]
CONFIDENCE = 0.95
ALIKE = 0.1
"""Answers are of like length if they differ by no more than this share of the longer one."""
TOKENS_AT_ONCE = 2048
"""Tokens of one batch of conversations, padding counted."""


def reward_group(prompt: Sequence[int], answers: Sequence[Sequence[int]], pad: int) -> Group:
    """A prompt and answers, each to be scored once, at its end: one more token is all that is counted (`forward.attach_rewards`)."""
    branches = [[*_ended(answer, pad), pad] for answer in answers]
    return Group(prompt, branches, [[False] * (len(branch) - 1) + [True] for branch in branches])


def _ended(answer: Sequence[int], pad: int) -> list[int]:
    ended = list(answer)
    while ended and ended[-1] == pad:
        ended.pop()
    return ended


def score_groups(
    call: Callable[..., Any],
    model: PreTrainedModel,
    groups: Sequence[Group],
    layout: Layout,
    *,
    pad: int,
    micro_batch_tokens: int,
    rank: int,
    world_size: int,
) -> Floats:
    """The rewards of N groups of G answers, `(N, G)`, on every rank, computed by all of them; arguments as of `score_all`."""
    scored = score_all(call, model, groups, layout, pad=pad, micro_batch_tokens=micro_batch_tokens, rank=rank, world_size=world_size)
    return np.array([[float(branch[0]) for branch in branches] for branches in scored])


def rate(rewards: Floats, lengths: npt.NDArray[np.int64], sources: Sequence[str]) -> dict[str, float]:
    """How well rewards `(N, 2)` of chosen and rejected answers, of `lengths` `(N, 2)` in tokens, tell them apart.

    accuracy                 share of pairs whose chosen answer has the higher reward, with its interval (Wilson, 1927); a tie counts half
    ece                      by how much the probability sigmoid(difference) is off, on average over bins (Guo et al., 2017)
    length_correlation       Spearman's correlation of reward and length over all answers: what of the reward is length
    length_matched_accuracy  accuracy on pairs of like length, where length says nothing
    """
    difference = rewards[:, 0] - rewards[:, 1]
    found = {"accuracy": _accuracy(difference), "mean_margin": float(difference.mean()), "num_pairs": float(len(difference))}
    interval = stats.binomtest(round(found["accuracy"] * len(difference)), len(difference)).proportion_ci(CONFIDENCE, "wilson")
    found |= {"accuracy_low": float(interval.low), "accuracy_high": float(interval.high), "ece": expected_calibration_error(difference)}
    if np.ptp(rewards) and np.ptp(lengths):
        found["length_correlation"] = float(stats.spearmanr(rewards.ravel(), lengths.ravel()).statistic)
    alike = np.abs(lengths[:, 0] - lengths[:, 1]) <= ALIKE * lengths.max(axis=1)
    if alike.any():
        found |= {"length_matched_accuracy": _accuracy(difference[alike]), "num_length_matched": float(alike.sum())}
    by_source: dict[str, list[int]] = defaultdict(list)
    for number, source in enumerate(sources):
        by_source[source].append(number)
    if len(by_source) > 1:
        found |= {f"accuracy of {source}": _accuracy(difference[numbers]) for source, numbers in by_source.items()}
    return found


def _accuracy(difference: Floats) -> float:
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


# --- rewards of what anyone wrote ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """How a reward model reads a conversation: as text, by its own tokenizer and template, whoever wrote it."""

    tokenizer: PreTrainedTokenizerBase
    contract: ChatContract | None
    """None of a model that no stage published, which is given all that its template renders."""

    def ids(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, origin: str) -> list[int]:
        """Token ids of a conversation that ends with an answer. Raises `UserError` where the template cannot render it."""
        if self.contract is None:
            text = render(self.tokenizer, messages, tools, origin)
            whole: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            return whole
        answered = [*messages[:-1], {**messages[-1], "train": True}]
        encoded = encode(self.tokenizer, answered, tools, self.contract.stop_tokens[0], origin, train_on="last")
        # What the template puts after the stop token was not there when the model learned to rate.
        return encoded.ids[: len(encoded.trained) - encoded.trained[::-1].index(True)]


def open_reader(given: Input, at: str) -> Reader:
    """How the reward model in `given` reads; loads no weights. Raises `UserError` where it is none, or cannot render a conversation."""
    source = given.model
    check_files(given, at)
    options: dict[str, Any] = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source.model, **options)
        tokenizer = AutoTokenizer.from_pretrained(source.model, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise _unusable(given, at, error) from error
    at = f"{at}: {given.name}"
    if config.num_labels != 1:
        raise UserError(f"{at}: {source.model} has {config.num_labels} labels, and a reward model has one; name another")
    if not isinstance(tokenizer.chat_template, str):
        raise UserError(f"{at}: {source.model} has no chat template; a reward model brings the one it was trained with")
    contract = read_contract(Path(source.model))
    if contract is not None:
        check_contract(contract, tokenizer, at)
    return Reader(tokenizer, contract)


def load_rewards(given: Input, at: str) -> PreTrainedModel:
    """The reward model itself, with its own score head, on the device that there is. Raises `UserError`."""
    source = given.model
    check_files(given, at)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            source.model,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=None if source.allow_pickle else True,
            weights_only=True,
            dtype="auto" if device == "cuda" else torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise _unusable(given, at, error) from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{at}: {given.name}: {source.model} has no weights for {missing[0]}; a reward model brings its own score head")
    rewards: PreTrainedModel = model.to(device).eval()
    return rewards


def _unusable(given: Input, at: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(f"{at}: {given.name}: {given.model.model} cannot be loaded as a reward model: {reason}")


def score_ids(model: PreTrainedModel, conversations: Sequence[Sequence[int]]) -> list[float]:
    """The reward of each conversation of token ids. A model that knows no pad token reads each by itself."""
    pad = model.config.get_text_config().pad_token_id
    rewards = [0.0] * len(conversations)

    def reward(batch: list[int]) -> None:
        input_ids = torch.full((len(batch), len(conversations[batch[0]])), pad or 0)
        mask = torch.zeros_like(input_ids)
        for row, number in enumerate(batch):
            input_ids[row, : len(conversations[number])] = torch.tensor(conversations[number])
            mask[row, : len(conversations[number])] = 1
        logits = model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device)).logits
        for number, score in zip(batch, logits[:, 0].float().tolist(), strict=True):
            rewards[number] = score

    each_batch(reward, token_batches(list(map(len, conversations)), TOKENS_AT_ONCE if pad is not None else 1))
    return rewards


def read_conversation(model: PreTrainedModel, reader: Reader, conversation: Conversation) -> list[int] | None:
    """What the model is given for a conversation that ends with an answer; None where it cannot render it, or read so much."""
    try:
        ids = reader.ids(conversation.messages, conversation.tools, conversation.origin)
    except OverLimit:
        raise
    except UserError:
        return None
    return ids if len(ids) <= getattr(model.config.get_text_config(), "max_position_embeddings", math.inf) else None


def rate_conversations(model: PreTrainedModel, reader: Reader, conversations: Sequence[Conversation]) -> list[float | None]:
    """The reward of the answer that each conversation ends with; None where the model cannot read it, or says nothing finite of it."""
    read = {number: ids for number, each in enumerate(conversations) if (ids := read_conversation(model, reader, each)) is not None}
    found = dict(zip(read, score_ids(model, list(read.values())), strict=True)) if read else {}
    return [reward if (reward := found.get(number)) is not None and math.isfinite(reward) else None for number in range(len(conversations))]


def check_readable(reader: Reader, conversations: Iterable[Conversation], at: str) -> None:
    """Raise `UserError`, beginning with `at`, where a reward model cannot read one of the conversations. Loads no weights."""
    for each in conversations:
        try:
            reader.ids(each.messages, each.tools, each.origin)
        except UserError as error:
            raise UserError(f"{at}: {error}") from None
