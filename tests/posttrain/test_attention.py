"""Attention by products of matrices, against the same in float64."""

import pytest
import torch

from posttrain import attention
from posttrain.attention import LONGEST, Products, attend


def inputs(rows: int, heads: int, keys: int, width: int, size: int, values: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Query, key, value, and the gradient of what comes out, laid out as a model gives them."""
    torch.manual_seed(0)
    shapes = ((heads, size), (keys, size), (keys, values), (heads, values))
    return tuple(torch.randn(rows, width, *shape).transpose(1, 2).to(dtype).requires_grad_() for shape in shapes)


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """By the book."""
    width, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    future = torch.ones(width, width, dtype=torch.bool).triu(1)
    return (scale * query @ key.transpose(2, 3)).masked_fill(future, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize(
    ("rows", "heads", "keys", "width", "size", "values"),
    [(2, 4, 4, 17, 8, 8), (3, 9, 3, 64, 64, 64), (1, 6, 1, 33, 16, 8), (1, 2, 2, 1, 4, 4)],
)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_products_give_what_attention_gives_forward_and_backward(
    rows: int, heads: int, keys: int, width: int, size: int, values: int, dtype: torch.dtype, within: float
) -> None:
    *given, gradient = inputs(rows, heads, keys, width, size, values, dtype)
    found = Products.apply(*given, 0.3)
    query, key, value = (each.double() for each in given)
    expected = exact(query, key, value, 0.3)
    pairs = [(found, expected)]
    pairs += zip(torch.autograd.grad(found, given, gradient), torch.autograd.grad(expected, given, gradient.double()), strict=True)
    for one, other in pairs:
        assert one.dtype == dtype
        assert float((one.double() - other).detach().norm()) <= within * float(other.detach().norm()) + 1e-12


def test_a_token_sees_nothing_that_comes_after_it() -> None:
    query, key, value, _ = (each.detach() for each in inputs(1, 3, 3, 20, 8, 8, torch.bfloat16))
    before = Products.apply(query, key, value, 0.5)
    key[:, :, 11:], value[:, :, 11:] = 100, -100
    assert torch.equal(Products.apply(query, key, value, 0.5)[:, :, :11], before[:, :, :11])


@pytest.mark.parametrize("is_fast", [True, False])
def test_either_way_attention_is_the_same(is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "multiplies_bf16", lambda: is_fast)
    for width in (40, LONGEST, LONGEST + 1):
        query, key, value, _ = (each.detach() for each in inputs(1, 4, 2, width, 16, 16, torch.bfloat16))
        expected = exact(query.double(), key.double(), value.double(), 0.25)
        found = attend(query, key, value, scale=None, dropout=0.0)
        assert float((found.double() - expected).norm()) <= 1e-2 * float(expected.norm())
