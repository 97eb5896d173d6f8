"""Unpaired answers: each bears a label, desirable or not, and none knows of another answer to its prompt.

What KTO adds to them: for each prompt the answer to another one, by which it is estimated how far the policy has moved from its
reference.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from posttrain.batch import Indices, Sizes
from posttrain.data.prepared import Prepared
from posttrain.data.samples import IGNORED
from posttrain.error import UserError
from posttrain.layout import Group, Layout, pair_group

MISMATCH_VERSION = 1
"""Raised when `Mismatched` gives other answers."""


class Mismatched:
    """The prompts of a data set, each with the answer to another one: what the KL divergence from the reference is estimated on."""

    def __init__(self, prepared: Prepared, at: str) -> None:
        """Raises `UserError` where too few rows ask anything else than one and the same."""
        prompts, answers = prepared.num_listed("prompt_ids"), prepared.num_listed("completion_ids")
        self.other = mismatch(prepared.column("question"), at)
        # Cut to the longest sample: what it can be computed in, so can these.
        self.lengths: Indices = np.minimum(answers[self.other], (prompts + answers).max() - prompts)
        """Tokens of the mismatched answer of each sample, `(N,)`."""
        self._longest = prompts + self.lengths
        self._samples = prepared.load()

    def answers(self, samples: Sequence[int]) -> list[list[int]]:
        """Token ids of the mismatched answers of samples."""
        ids = self._samples[self.other[samples].tolist()]["completion_ids"]
        return [answer[:length] for answer, length in zip(ids, self.lengths[samples].tolist(), strict=True)]

    def groups(self, samples: Sequence[int]) -> list[Group]:
        """The prompts of samples, each with its mismatched answer alone."""
        prompts = self._samples[list(samples)]["prompt_ids"]
        return [pair_group(prompt, [answer]) for prompt, answer in zip(prompts, self.answers(samples), strict=True)]

    def sizes(self, layout: Layout) -> Sizes:
        """What these cost, of all samples."""
        return Sizes(self._longest, self._longest, np.ones_like(self._longest), is_padded=layout == "padded")


def mismatch(questions: npt.NDArray[np.uint64], at: str) -> Indices:
    """For each answer the number of one to another question, `(N,)`; `questions` `(N,)` are the same where the same is asked.

    Every answer is taken once, so that mismatched answers are the same set as matched ones: in the order of questions, each is
    as many places off as the most frequent question has answers. Raises `UserError` where one question has more than half of all.
    """
    order = np.argsort(questions, kind="stable")
    most = int(np.unique(questions, return_counts=True)[1].max())
    if 2 * most > len(questions):
        raise UserError(
            f"{at}: {most:,} of {len(questions):,} rows ask the same, so too few answer another prompt, by which the KL divergence is "
            f"estimated; add other prompts, or set {at}.loss_type: apo_zero_unpaired, which needs none"
        )
    other = np.empty(len(questions), dtype=np.int64)
    other[order] = np.roll(order, -most)
    return other


def add_labels(batch: dict[str, Any], labels: npt.NDArray[np.bool_], references: Sequence[npt.NDArray[np.float32]]) -> dict[str, Any]:
    """A micro-batch of answers as TRL's losses want it: `completion_mask` in place of labels, `label` and the reference's sums, `(B,)`.

    `ref_KL_logps` is there to be added to: what TRL takes from it is known of the whole global batch already.
    """
    completion_mask = (batch.pop("labels") != IGNORED).long()
    ref_logps = torch.tensor([float(log_probs.sum()) for log_probs in references])
    given = {"completion_mask": completion_mask, "label": torch.from_numpy(labels), "ref_logps": ref_logps}
    return {**batch, **given, "ref_KL_logps": torch.zeros(1)}


def weigh_answers(batch: dict[str, Any]) -> dict[str, float]:
    """By how much a micro-batch of answers counts in each of TRL's metrics: by its answers of a label, or by their tokens.

    Margins are no mean over micro-batches: they are the difference of the rewards of the whole global batch.
    """
    is_chosen, num_tokens = batch["label"], batch["completion_mask"].sum(1)
    weights = {"": float(len(is_chosen)), "entropy": float(num_tokens.sum()), "rewards/margins": 0.0}
    for side, of_side in (("chosen", is_chosen), ("rejected", ~is_chosen)):
        weights |= dict.fromkeys((f"rewards/{side}", f"logps/{side}"), float(of_side.sum()))
        weights[f"logits/{side}"] = float(num_tokens[of_side].sum())
    return weights
