"""The losses and advantages of RL against TRL's own, given the same numbers, and against the papers' formulas."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from trl import GRPOTrainer, RLOOTrainer

from posttrain.policy_losses import group_advantages, grpo, importance_weights, leave_one_out, rloo, token_scales

NUM, WIDTH, LONGEST = 6, 9, 12
METRICS = ("gather", "gather_for_metrics")


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Six completions of unlike length, with a reference that is near for some tokens and far for others."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([9, 1, 4, 7, 2, 9])
    mask = (torch.arange(WIDTH) < lengths[:, None]).float()
    log_probs = -torch.rand((NUM, WIDTH), generator=draw) * 4
    return {
        "log_probs": log_probs.requires_grad_(),
        "reference": log_probs.detach() + torch.randn((NUM, WIDTH), generator=draw),
        "mask": mask,
        "advantages": torch.randn(NUM, generator=draw),
    }


def trl_loss(trainer: Any, batch: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    """What TRL's trainer computes, told our log-probabilities in place of those of a model."""
    accelerator = SimpleNamespace(num_processes=1, reduce=lambda value, **_: value, **{name: lambda value: value for name in METRICS})
    itself = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch["log_probs"], torch.zeros(NUM, WIDTH), None),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=accelerator,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        epsilon_high=0.2,
        epsilon_low=0.2,
        importance_sampling_level="token",
        max_completion_length=LONGEST,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm="ratio" in batch,
        vllm_importance_sampling_correction=True,
        **settings,
    )
    ids = torch.zeros((NUM, WIDTH), dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": ids[:, :2] + 1,
        "completion_ids": ids,
        "completion_mask": batch["mask"],
        "advantages": batch["advantages"],
        "ref_per_token_logps": batch["reference"],
        "num_items_in_batch": batch["mask"].sum(),
        "importance_sampling_ratio": batch.get("ratio"),
        "old_logps": (batch["log_probs"].detach() * batch["mask"]).sum(1),
    }
    loss: torch.Tensor = trainer._compute_loss(itself, None, inputs)
    return loss


def gradient(loss: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, batch["log_probs"], retain_graph=True)
    return found


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_grpo_is_that_of_trl(batch: dict[str, torch.Tensor], loss_type: Any, beta: float) -> None:
    lengths = batch["mask"].sum(1).long().numpy()
    scales = torch.tensor(token_scales(lengths, loss_type, LONGEST), dtype=torch.float32)
    ours = grpo(batch["log_probs"], batch["mask"], batch["advantages"], scales, beta=beta, reference=batch["reference"]).mean()
    theirs = trl_loss(GRPOTrainer, batch, loss_type=loss_type, beta=beta)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(ours, batch), gradient(theirs, batch), rtol=1e-5, atol=1e-7)


def test_what_an_engine_sampled_counts_as_in_trl(batch: dict[str, torch.Tensor]) -> None:
    log_ratios = np.array([0.1, -0.2, 0.0, np.log(2.99), np.log(3.01), -5.0])
    weights = importance_weights(log_ratios, 3.0)
    np.testing.assert_allclose(weights, [np.exp(0.1), np.exp(-0.2), 1, 2.99, 0, np.exp(-5)])
    scales = torch.tensor(token_scales(batch["mask"].sum(1).long().numpy(), "dapo", LONGEST), dtype=torch.float32)
    weighted = batch["advantages"] * torch.tensor(weights, dtype=torch.float32)
    ours = grpo(batch["log_probs"], batch["mask"], weighted, scales, beta=0.3, reference=batch["reference"]).mean()
    batch["ratio"] = torch.tensor(weights, dtype=torch.float32)[:, None]
    theirs = trl_loss(GRPOTrainer, batch, loss_type="dapo", beta=0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(ours, batch), gradient(theirs, batch), rtol=1e-5, atol=1e-7)


def test_rloo_is_that_of_trl(batch: dict[str, torch.Tensor]) -> None:
    ours = rloo(batch["log_probs"], batch["mask"], batch["advantages"]).mean()
    theirs = trl_loss(RLOOTrainer, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(ours, batch), gradient(theirs, batch), rtol=1e-5, atol=1e-7)


def test_the_loss_of_each_is_that_of_the_formula_in_numpy(batch: dict[str, torch.Tensor]) -> None:
    log_probs, mask, reference, advantages = (
        batch[name].detach().double().numpy() for name in ("log_probs", "mask", "reference", "advantages")
    )
    scales = torch.tensor(token_scales(mask.sum(1).astype(np.int64), "grpo", LONGEST))
    ours = grpo(*(batch[name] for name in ("log_probs", "mask", "advantages")), scales, beta=0.3, reference=batch["reference"])
    for number in range(NUM):
        there = mask[number] > 0
        apart = (reference - log_probs)[number, there]
        expected = np.mean(-advantages[number] + 0.3 * (np.exp(apart) - apart - 1))
        assert float(ours[number].detach()) == pytest.approx(expected, rel=1e-5)


def test_advantages_are_those_of_the_papers() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 3.0, 1.0, -1.0]])
    for row, found in zip(rewards, group_advantages(rewards, "group"), strict=True):
        spread = np.sqrt(sum((reward - sum(row) / 4) ** 2 for reward in row) / 3)
        np.testing.assert_allclose(found, [(reward - sum(row) / 4) / (spread + 1e-4) for reward in row])
    np.testing.assert_allclose(group_advantages(rewards, "none"), rewards - rewards.mean(1, keepdims=True))
    np.testing.assert_allclose(group_advantages(rewards, "batch") * (rewards.std(ddof=1) + 1e-4), group_advantages(rewards, "none"))
    for row, found in zip(rewards, leave_one_out(rewards), strict=True):
        np.testing.assert_allclose(found, [row[k] - np.mean(np.delete(row, k)) for k in range(4)])
    assert not group_advantages(rewards, "group")[1].any(), "what is all the same says nothing"
