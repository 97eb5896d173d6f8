"""Layouts hold every token where the padded grid has it, and attention in them is that of each sequence by itself."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.samples import IGNORED
from posttrain.layout import Group, _attend, conversation_group, grid, lay_out, measure, pair_group

QUICK = settings(max_examples=60, deadline=None)
LAYOUTS = ("packed", "shared")
TOKENS = st.integers(1, 99)


@st.composite
def some_groups(draw: st.DrawFn) -> list[Group]:
    """One to four groups of one to four branches, with and without a prefix, some tokens scored and some not."""
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        branches = draw(st.lists(st.lists(TOKENS, min_size=1, max_size=9), min_size=1, max_size=4))
        prefix = draw(st.lists(TOKENS, max_size=6))
        groups.append(Group(prefix, branches, [draw(st.lists(st.booleans(), min_size=len(b), max_size=len(b))) for b in branches]))
    return groups


def sequences_of(groups: list[Group]) -> list[tuple[list[int], list[bool]]]:
    """All sequences in the order in which TRL has pairs, with what of each is scored."""
    found = []
    for branch in range(max(len(group.branches) for group in groups)):
        for group in groups:
            if branch < len(group.branches):
                counted = [False] * len(group.prefix) + list(group.counted[branch])
                found.append(([*group.prefix, *group.branches[branch]], [False, *counted[1:]]))
    return found


# --- padded ------------------------------------------------------------------------------------------------------------


def test_two_pairs_in_a_grid_are_as_here_by_hand() -> None:
    groups = [pair_group([1, 2], [[3], [4, 5, 6]]), Group([], [[7, 8, 9]], [[True, False, True]])]
    padded = {name: values.tolist() for name, values in grid(groups, 0).items()}
    assert padded["input_ids"] == [[1, 2, 3, 0, 0], [7, 8, 9, 0, 0], [1, 2, 4, 5, 6]]
    assert padded["attention_mask"] == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    no = IGNORED
    assert padded["labels"] == [[no, no, 3, no, no], [no, no, 9, no, no], [no, no, 4, 5, 6]]


@QUICK
@given(groups=some_groups())
def test_a_grid_holds_each_sequence_in_its_row(groups: list[Group]) -> None:
    padded = grid(groups, 0)
    for row, (ids, counted) in enumerate(sequences_of(groups)):
        n = len(ids)
        assert padded["input_ids"][row, :n].tolist() == ids and not padded["input_ids"][row, n:].any()
        assert padded["attention_mask"][row].tolist() == [1] * n + [0] * (padded["input_ids"].shape[1] - n)
        labels = [token if is_counted else IGNORED for token, is_counted in zip(ids, counted, strict=True)]
        assert padded["labels"][row].tolist() == labels + [IGNORED] * (padded["input_ids"].shape[1] - n)


# --- packed and shared -------------------------------------------------------------------------------------------------


def test_a_pair_laid_out_is_as_here_by_hand() -> None:
    groups = [pair_group([1, 2], [[3], [4, 5]])]
    packed, shared = (lay_out(groups, layout) for layout in LAYOUTS)
    assert packed["input_ids"].tolist() == [[1, 2, 3, 1, 2, 4, 5]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert packed["predictors"].tolist() == [1, 4, 5]
    assert shared["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert shared["position_ids"].tolist() == [[0, 1, 2, 2, 3]]
    assert shared["predictors"].tolist() == [1, 1, 3], "the first token of both answers is predicted from the last of the prompt"
    assert shared["targets"].tolist() == packed["targets"].tolist() == [3, 4, 5]
    assert shared["places"].tolist() == packed["places"].tolist() == [1, 4, 5], "in a grid of two rows of three"


@pytest.mark.parametrize("layout", LAYOUTS)
@QUICK
@given(groups=some_groups())
def test_every_sequence_is_read_whole_and_every_token_computed_once(layout: Any, groups: list[Group]) -> None:
    laid = lay_out(groups, layout)
    ids, positions = laid["input_ids"][0], laid["position_ids"][0]
    flat = torch.cat([table.reshape(-1) for table in laid["rows"]])
    assert flat[laid["owned"]].tolist() == list(range(len(ids))), "each token owns a place that reads that token"
    assert len(ids) == sum(group.num_tokens(layout) for group in groups)
    rows = []
    for table in laid["rows"]:
        for row in table:
            # After the end of a sequence stands the token 0 of the packed row; a sequence's positions count up from 0.
            length = next((n for n in range(len(row)) if int(positions[row[n]]) != n), len(row))
            rows.append(tuple(ids[row[:length]].tolist()))
    read = sorted(tuple(ids[part].tolist()) for part in laid["keys"].split(laid["lengths_k"].tolist()))
    assert read == sorted(tuple(sequence) for sequence, _ in sequences_of(groups))
    assert all(any(row[: len(sequence)] == sequence for row in rows) for sequence in read)
    owned = [int(n) for n in laid["lengths_q"]]
    assert sum(owned) == len(ids)
    starts = np.cumsum([0, *owned])
    for start, number, part in zip(starts, owned, laid["keys"].split(laid["lengths_k"].tolist()), strict=False):
        assert part[len(part) - number :].tolist() == list(range(start, start + number)), "queries are the end of their keys"
        assert positions[part].tolist() == list(range(len(part)))


@pytest.mark.parametrize("layout", LAYOUTS)
@QUICK
@given(groups=some_groups())
def test_scored_tokens_and_what_predicts_them_are_those_of_the_grid(layout: Any, groups: list[Group]) -> None:
    laid, padded = lay_out(groups, layout), grid(groups, 0)
    labels = padded["labels"][:, 1:].reshape(-1)
    before = padded["input_ids"][:, :-1].reshape(-1)
    assert sorted(laid["places"].tolist()) == (labels != IGNORED).nonzero()[:, 0].tolist()
    assert laid["targets"].tolist() == labels[laid["places"]].tolist()
    assert laid["input_ids"][0][laid["predictors"]].tolist() == before[laid["places"]].tolist()
    width = padded["labels"].shape[1] - 1
    assert laid["position_ids"][0][laid["predictors"]].tolist() == (laid["places"] % max(width, 1)).tolist()


@QUICK
@given(groups=some_groups())
def test_copies_are_all_further_readings_of_a_token_and_none_comes_twice_at_once(groups: list[Group]) -> None:
    laid = lay_out(groups, "shared")
    flat = torch.cat([table.reshape(-1) for table in laid["rows"]])
    for tokens, places in laid["copies"]:
        assert len(set(tokens.tolist())) == len(tokens)
        assert flat[places].tolist() == tokens.tolist()
    places = [place for _, at in laid["copies"] for place in at.tolist()]
    assert len(set(places) | set(laid["owned"].tolist())) == len(places) + len(laid["owned"])
    assert len(places) == sum(len(group.prefix) * (len(group.branches) - 1) for group in groups)
    assert lay_out(groups, "packed")["copies"] == []


# --- what it costs -----------------------------------------------------------------------------------------------------


@QUICK
@given(groups=some_groups())
def test_a_group_costs_the_tokens_that_are_computed_for_it(groups: list[Group]) -> None:
    for layout in LAYOUTS:
        assert measure(groups, layout).computed.sum() == lay_out(groups, layout)["input_ids"].numel()
    padded = measure(groups, "padded")
    assert padded.is_padded and padded.longest.max() * padded.sequences.sum() == grid(groups, 0)["input_ids"].numel()


def test_a_lone_sequence_costs_the_same_in_every_layout() -> None:
    group = conversation_group([1, 2, 3], [False, True, True])
    assert [measure([group], layout).computed.tolist() for layout in ("shared", "packed", "padded")] == [[3]] * 3


# --- attention ---------------------------------------------------------------------------------------------------------


def attention_of_each(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, laid: dict[str, Any]) -> torch.Tensor:
    """The reference: each sequence by itself, softmax written out; `(N, H, D)`."""
    num_heads, num_shared = q.shape[1], q.shape[1] // k.shape[1]
    output = torch.zeros_like(q)
    for whole, number in zip(laid["keys"].split(laid["lengths_k"].tolist()), laid["lengths_q"].tolist(), strict=True):
        for head in range(num_heads):
            scores = q[whole, head] @ k[whole, head // num_shared].T / q.shape[-1] ** 0.5
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            attended = scores.softmax(dim=-1) @ v[whole, head // num_shared]
            own = whole[len(whole) - number :]
            output = output.index_put((own, torch.tensor(head)), attended[len(whole) - number :])
    return output


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=15, deadline=None)
@given(groups=some_groups(), num_shared=st.sampled_from([1, 2]))
def test_attention_and_its_gradients_are_those_of_every_sequence_alone(layout: Any, groups: list[Group], num_shared: int) -> None:
    laid = lay_out(groups, layout)
    n = laid["input_ids"].numel()
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((n, heads, 4), generator=draw, dtype=torch.float64) for heads in (2, 2 // num_shared, 2 // num_shared))
    weights = torch.randn((n, 2, 4), generator=draw, dtype=torch.float64)
    found = []
    for attend in (lambda *qkv: _attend(*qkv, laid, None, 0.0), lambda *qkv: attention_of_each(*qkv, laid)):
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        output = attend(*leaves)
        (output * weights).sum().backward()
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequences_of_unlike_length_are_attended_apart(layout: Any) -> None:
    groups = [pair_group([1] * 5, [[2] * 40, [3]]), pair_group([4], [[5], [6] * 20])]
    laid = lay_out(groups, layout)
    assert len(laid["rows"]) == 4
    assert sum(table.numel() for table in laid["rows"]) == 45 + 6 + 2 + 21, "no place for padding, where no two are alike"
