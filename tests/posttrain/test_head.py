"""The head against log-softmax in float64 and against autograd, whole and in pieces."""

import itertools
from typing import Any

import pytest
import torch

from posttrain import head
from posttrain.head import Scores, score

ALL = frozenset(Scores._fields)
SIZES = (23, 8, 17)
"""Scored tokens, width, vocabulary."""


def inputs(*, has_bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, Any, Any, torch.Tensor]:
    """Hidden states, weight, bias and targets, all that can have a gradient with one."""
    draw = torch.Generator().manual_seed(seed)
    n, d, v = SIZES
    hidden, weight = torch.randn((n, d), generator=draw).to(dtype), torch.randn((v, d), generator=draw).to(dtype)
    bias = torch.randn(v, generator=draw).to(dtype).requires_grad_() if has_bias else None
    return hidden.requires_grad_(), weight.requires_grad_(), bias, torch.randint(0, v, (n,), generator=draw)


def logits_of(hidden: Any, weight: Any, bias: Any, scale: float = 1.0, softcap: float | None = None) -> torch.Tensor:
    """The definition, `(n, V)`, in float64."""
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def by_definition(hidden: Any, weight: Any, bias: Any, targets: torch.Tensor, **transform: Any) -> Scores:
    logits = logits_of(hidden, weight, bias, **transform)
    log_probs = logits.log_softmax(dim=1)
    wanted = log_probs.gather(1, targets[:, None])[:, 0]
    return Scores(
        wanted,
        -(log_probs.exp() * log_probs).sum(dim=1),
        log_probs.exp().square().sum(dim=1).log(),
        logits.mean(dim=1),
        logits.argmax(dim=1) == targets,
        log_probs.exp().max(dim=1).values,
    )


TRANSFORMS: list[dict[str, Any]] = [{}, {"scale": 0.25}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 1.5}]


@pytest.fixture(params=[1, 5, 23, 256], ids=lambda size: f"{size} at once")
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(head, "PROJECTED_AT_ONCE", request.param)
    return int(request.param)


@pytest.fixture(params=["kept", "some kept", "computed again"])
def keeping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    num_bytes = {"kept": head.KEPT_BYTES, "some kept": 11 * SIZES[2] * 4, "computed again": 0}
    monkeypatch.setattr(head, "KEPT_BYTES", num_bytes[request.param])
    return str(request.param)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("has_gradient", [False, True], ids=["scoring", "training"])
def test_every_output_is_that_of_the_definition(at_once: int, has_bias: bool, has_gradient: bool, transform: dict[str, Any]) -> None:
    given = inputs(has_bias=has_bias)
    with torch.set_grad_enabled(has_gradient):
        found = score(*given, **transform, outputs=ALL)
    with torch.no_grad():
        expected = by_definition(*given, **transform)
    for name, values in found._asdict().items():
        if values.dtype == torch.bool:
            assert values.tolist() == getattr(expected, name).tolist()
        else:
            torch.testing.assert_close(values.detach().double(), getattr(expected, name), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_gradients_are_those_of_autograd(at_once: int, keeping: str, has_bias: bool, transform: dict[str, Any]) -> None:
    # Of unlike size and sign, as DPO's are.
    weights = torch.linspace(-2, 3, SIZES[0])
    gradients = []
    for ours in (True, False):
        *leaves, targets = inputs(has_bias=has_bias)
        log_probs = (score if ours else by_definition)(*leaves, targets, **transform)[0]
        (log_probs * weights).sum().backward()
        gradients.append([leaf.grad for leaf in leaves if leaf is not None])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needed", [names for size in (1, 2) for names in itertools.combinations(("hidden", "weight", "bias"), size)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_only_what_needs_a_gradient_gets_one_and_that_a_right_one(
    needed: tuple[str, ...], softcap: float | None, keeping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "PROJECTED_AT_ONCE", 7)
    gradients = []
    for ours in (True, False):
        *leaves, targets = inputs()
        for name, leaf in zip(("hidden", "weight", "bias"), leaves, strict=True):
            leaf.requires_grad_(name in needed)
        (score if ours else by_definition)(*leaves, targets, softcap=softcap)[0].square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for found, expected in zip(*gradients, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_batch_without_a_scored_token_has_no_scores_and_no_gradient(softcap: float | None) -> None:
    hidden, weight, bias, targets = inputs()
    found = score(hidden[:0], weight, bias, targets[:0], softcap=softcap, outputs=ALL)
    assert all(len(values) == 0 for values in found)
    found.log_probs.sum().backward()
    for leaf in (hidden, weight, bias):
        assert leaf.grad is None or not leaf.grad.any()


def test_only_log_probs_carry_a_gradient() -> None:
    found = score(*inputs(), outputs=ALL)
    assert [name for name, values in found._asdict().items() if values.requires_grad] == ["log_probs"]


def test_what_is_not_asked_for_is_zero() -> None:
    found = score(*inputs(), outputs=["log_probs"])
    assert not any(getattr(found, name).any() for name in ("entropy", "mean_logits", "log_sum_sq_probs", "top_probs"))


def test_logits_far_beyond_the_range_of_exp_are_no_matter() -> None:
    hidden, weight, bias, targets = inputs()
    with torch.no_grad():
        found = score(hidden * 300, weight, bias, targets, outputs=ALL)
        expected = by_definition(hidden * 300, weight, bias, targets)
    torch.testing.assert_close(found.log_probs.double(), expected.log_probs, rtol=1e-5, atol=1e-3)
    assert found.entropy.isfinite().all()


def test_of_equally_likely_tokens_the_first_is_the_likeliest_as_argmax_has_it() -> None:
    found = score(torch.ones(2, 3), torch.ones(5, 3), None, torch.tensor([0, 4]), outputs=["top_probs"])
    assert found.is_top1.tolist() == [True, False]
    assert found.top_probs.tolist() == pytest.approx([0.2, 0.2])
    assert found.log_probs.tolist() == pytest.approx([-torch.tensor(5.0).log().item()] * 2)


def test_in_bfloat16_it_is_as_near_to_the_truth_as_autograd_is(keeping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "PROJECTED_AT_ONCE", 7)
    exact = inputs(has_bias=True)
    by_definition(*exact).log_probs.sum().backward()
    given = inputs(has_bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = score(*given, outputs=ALL)
    assert found.log_probs.dtype == torch.float32
    found.log_probs.sum().backward()
    with torch.no_grad():
        expected = by_definition(*exact)
    for name in ("log_probs", "entropy", "mean_logits"):
        assert float((getattr(found, name).double() - getattr(expected, name)).abs().max()) < 0.1, name
    for leaf, true in zip(given[:3], exact[:3], strict=True):
        assert leaf.grad.dtype == torch.float32, "the weights are, so their gradients are"
        assert float((leaf.grad - true.grad).norm() / true.grad.norm()) < 0.02
