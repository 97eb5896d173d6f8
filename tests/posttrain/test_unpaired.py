"""Every prompt gets the answer to another one, and every answer stands in for one other."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.error import UserError
from posttrain.layout import grid, pair_group
from posttrain.unpaired import add_labels, mismatch, weigh_answers


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_mismatched_answers_are_the_same_set_to_other_questions(asked: list[int]) -> None:
    questions = np.array(asked, dtype=np.uint64)
    if 2 * max(map(asked.count, asked)) > len(asked):
        with pytest.raises(UserError, match="rows ask the same"):
            mismatch(questions, "stages.kto")
        return
    other = mismatch(questions, "stages.kto")
    assert sorted(other.tolist()) == list(range(len(asked)))
    assert all(asked[there] != question for there, question in zip(other.tolist(), asked, strict=True))


def test_a_batch_gets_labels_masks_and_sums_and_counts_by_them() -> None:
    batch: dict[str, Any] = dict(grid([pair_group([1, 2], [[3, 4]]), pair_group([5], [[6, 7, 8]]), pair_group([9], [[1]])], 0))
    references = [np.array(each, dtype=np.float32) for each in ([-1, -2], [-4, -8, -16], [-32])]
    made = add_labels(batch, np.array([True, False, True]), references)
    assert made["completion_mask"].tolist() == [[0, 0, 1, 1], [0, 1, 1, 1], [0, 1, 0, 0]]
    assert made["ref_logps"].tolist() == [-3, -28, -32] and made["label"].dtype == torch.bool
    sides = {f"{name}/chosen": 2 for name in ("rewards", "logps")} | {f"{name}/rejected": 1 for name in ("rewards", "logps")}
    tokens = {"entropy": 6, "logits/chosen": 3, "logits/rejected": 3}
    assert weigh_answers(made) == {"": 3, **tokens, **sides, "rewards/margins": 0}
