"""Losses on pairs against their papers' formulas, written out in numpy."""

import numpy as np
import pytest
import torch

from posttrain.pair_losses import cpo, orpo, simpo

DRAW = np.random.default_rng(0)
NUM = DRAW.integers(1, 40, (2, 16)).astype(np.float64)
LOGPS = -DRAW.gamma(2.0, 1.5, (2, 16)) * NUM


def tensors() -> list[torch.Tensor]:
    return [torch.tensor(values, dtype=torch.float64) for values in (LOGPS[0], LOGPS[1], NUM[0], NUM[1])]


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.log1p(np.exp(-x))


def test_orpo_is_the_papers() -> None:
    chosen, rejected = np.exp(LOGPS / NUM)
    ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
    expected = -LOGPS[0] / NUM[0] - 0.3 * log_sigmoid(np.log(ratio))
    loss, figures = orpo(*tensors(), beta=0.3)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(figures["log_odds_chosen"].numpy(), np.log(ratio), rtol=1e-9)


def test_orpo_of_an_answer_that_is_certain_is_finite_with_its_gradient() -> None:
    chosen = torch.zeros(1, requires_grad=True)
    loss, _ = orpo(chosen, torch.tensor([-3.0]), torch.ones(1), torch.ones(1), beta=0.1)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and chosen.grad is not None and torch.isfinite(chosen.grad).all()


def test_simpo_is_the_papers() -> None:
    margin = 2.5 * (LOGPS[0] / NUM[0] - LOGPS[1] / NUM[1]) - 1.4
    loss, _ = simpo(*tensors(), beta=2.5, simpo_gamma=1.4, cpo_alpha=0.0)
    np.testing.assert_allclose(loss.numpy(), -log_sigmoid(margin), rtol=1e-10)
    loss, _ = simpo(*tensors(), beta=2.5, simpo_gamma=1.4, cpo_alpha=0.5)
    np.testing.assert_allclose(loss.numpy(), -log_sigmoid(margin) - 0.5 * LOGPS[0] / NUM[0], rtol=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cpo_is_the_papers(smoothing: float) -> None:
    margin = 0.1 * (LOGPS[0] - LOGPS[1])
    expected = -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin) - LOGPS[0] / NUM[0]
    loss, _ = cpo(*tensors(), beta=0.1, label_smoothing=smoothing, cpo_alpha=1.0)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-10)
