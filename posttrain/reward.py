"""Rewards: one number for an answer, by a model with a score head, and how well such numbers tell better answers from worse.

A reward is read off the last token of an answer, as transformers' sequence classification does: the last that is no padding. So an
answer never ends with the pad token here.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from scipy import stats
from transformers import PreTrainedModel

from posttrain.batch import deal
from posttrain.forward import score_batch
from posttrain.layout import Group, Layout, measure

Floats = npt.NDArray[np.float64]
CONFIDENCE = 0.95
NUM_BINS = 10
"""Bins of equal size that predicted probabilities are compared in with how often they come true."""
ALIKE = 0.1
"""Answers are of like length if they differ by no more than this share of the longer one."""


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
    """The rewards of groups of two, `(N, 2)`, on every rank, computed by all of them. `call` is the model as it was trained."""
    training = model.training
    model.eval()
    # No rank may be without work: under ZeRO-3 each forward pass is a collective.
    numbers = list(range(len(groups))) * -(-world_size // len(groups))
    mine: dict[int, list[float]] = {}
    for micro_batch in deal(numbers, measure([groups[number] for number in numbers], layout), micro_batch_tokens, world_size)[rank]:
        found = score_batch(call, model, [groups[number] for number in micro_batch], layout, pad=pad)
        mine |= {number: [float(branch[0]) for branch in branches] for number, branches in zip(micro_batch, found, strict=True)}
    model.train(training)
    every: list[Any] = [mine] * world_size
    if world_size > 1:
        dist.all_gather_object(every, mine)
    merged = {number: both for part in every for number, both in part.items()}
    return np.array([merged[number] for number in range(len(groups))])


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


def expected_calibration_error(difference: Floats) -> float:
    """Mean distance, weighted by their sizes, of confidence and accuracy in bins of the confidence, which is at least a half."""
    confidence = torch.sigmoid(torch.from_numpy(np.abs(difference))).numpy()
    is_right = (difference > 0) + 0.5 * (difference == 0)
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = [abs(confidence[bins == number].sum() - is_right[bins == number].sum()) for number in range(NUM_BINS)]
    return float(sum(gaps) / len(difference))
