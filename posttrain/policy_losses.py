"""Losses of a policy on completions that it sampled itself, as functions of log-probabilities, and the advantages that weigh them.

A step learns once from what was sampled for it, so the policy that samples is the one that learns: their ratio is 1, of which
only the gradient counts, and there is nothing to clip. What another engine sampled is weighed by `importance_weights`.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
LEAST_SPREAD = 1e-4
"""Added to a standard deviation that is divided by."""

# --- losses: log-probabilities and mask are (S, T), advantages (S,), for S completions of at most T tokens ------------


def grpo(
    log_probs: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    scales: torch.Tensor,
    *,
    beta: float,
    reference: torch.Tensor,
) -> torch.Tensor:
    """Group relative policy optimization: the loss of each completion, `(S,)`, whose mean is the loss of the batch.

    scale * sum over tokens of -ratio * A + beta * KL. Shao et al., 2024 (arXiv 2402.03300), eq. 3. `scales` `(S,)` say which kind it
    is, see `token_scales`; `reference` are the log-probabilities under the policy to stay near.
    """
    ratio = torch.exp(log_probs - log_probs.detach())
    each = -ratio * advantages[:, None]
    if beta:
        each = each + beta * divergence(log_probs, reference)
    return (each * mask).sum(1) * scales


def rloo(log_probs: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """REINFORCE with a leave-one-out baseline: the loss of each completion, `(S,)`, which is one action as a whole.

    -ratio * A. Ahmadian et al., 2024 (arXiv 2402.14740), sec. 3.2; what they subtract for divergence is part of the reward.
    """
    total = (log_probs * mask).sum(1)
    return -torch.exp(total - total.detach()) * advantages


def divergence(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The divergence from the reference, estimated at each token that the policy sampled: never negative, and right on average.

    exp(d) - d - 1 with d = log ref - log pi (Schulman, 2020, "Approximating KL divergence", k3).
    """
    difference = reference - log_probs
    return torch.expm1(difference) - difference


def token_scales(num_tokens: npt.NDArray[np.int64], loss_type: Literal["grpo", "dr_grpo", "dapo"], max_completion_length: int) -> Floats:
    """What the sum over a completion's tokens is multiplied by, for all completions of a step, in the shape of `num_tokens`.

    grpo      1 / its tokens: completions count the same (Shao et al., 2024)
    dr_grpo   1 / the most tokens that it may have (Liu et al., 2025, arXiv 2503.20783)
    dapo      completions / their tokens, over the whole step: tokens count the same (Yu et al., 2025, arXiv 2503.14476)
    """
    if loss_type == "grpo":
        return 1 / num_tokens
    same = 1 / max_completion_length if loss_type == "dr_grpo" else num_tokens.size / num_tokens.sum()
    return np.full(num_tokens.shape, same)


def importance_weights(log_ratios: Floats, clip_max: float) -> Floats:
    """How much completions count that were sampled by something near the policy; `log_ratios` are log pi - log sampler of each.

    Their ratio, and 0 where it is over `clip_max`: such a completion says more of how the two differ than of the policy (Yao et al.,
    2025, "Your efficient RL framework secretly brings you off-policy RL training"; TRL's `sequence_mask`).
    """
    ratios: Floats = np.exp(log_ratios)
    return np.where(ratios > clip_max, 0.0, ratios)


# --- advantages: rewards are (B, G), of G completions to each of B prompts -------------------------------------------


def group_advantages(rewards: Floats, scale_rewards: Literal["group", "batch", "none"]) -> Floats:
    """By how much each reward is above the mean of its group, in standard deviations of its group, or of all, or as it is."""
    advantages: Floats = rewards - rewards.mean(1, keepdims=True)
    if scale_rewards == "none":
        return advantages
    spread = rewards.std(1, ddof=1, keepdims=True) if scale_rewards == "group" else rewards.std(ddof=1)
    scaled: Floats = advantages / (spread + LEAST_SPREAD)
    return scaled


def leave_one_out(rewards: Floats) -> Floats:
    """By how much each reward is above the mean of the others of its group."""
    others: Floats = (rewards.sum(1, keepdims=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others
