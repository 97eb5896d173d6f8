"""Figures of a reward model, by hand and by other libraries."""

import numpy as np
import pytest
from scipy import stats

from posttrain.reward import rate, reward_group


def test_an_answer_is_scored_at_its_last_token_that_is_no_padding() -> None:
    group = reward_group([1, 2], [[3, 4, 9], [5, 9, 9]], pad=9)
    assert group.branches == [[3, 4, 9], [5, 9]]
    assert group.counted == [[False, False, True], [False, True]]


def test_figures_by_hand() -> None:
    rewards = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 3.0], [5.0, 1.0]])
    lengths = np.array([[10, 10], [20, 10], [10, 30], [100, 95]])
    found = rate(rewards, lengths, ["a", "a", "b", "b"])
    assert found["accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert found["length_matched_accuracy"] == 1.0 and found["num_length_matched"] == 2
    assert found["accuracy of a"] == 0.5 and found["accuracy of b"] == 0.75
    assert found["length_correlation"] == pytest.approx(stats.spearmanr(rewards.ravel(), lengths.ravel()).statistic)
    assert found["mean_margin"] == 1.0


def test_a_reward_that_is_length_says_so() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, (300, 2))
    found = rate(lengths / 10.0, lengths, [""] * 300)
    assert found["length_correlation"] == pytest.approx(1.0)
