"""The head: log-probabilities of wanted tokens, from hidden states, without the logits ever existing whole.

Only positions that are scored are projected, some at a time. A plain loss keeps the logits of every position, turns them into
float32, and keeps the probabilities too: 49,152 numbers thrice for each token of a small model.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch

PROJECTED_AT_ONCE = 256
"""Scored positions that are projected at once: enough for a full matrix multiplication, and few enough for a CPU's cache."""
KEPT_BYTES = 2**29
"""Probabilities that may be kept from the forward for the backward pass, in bytes; what is beyond is computed again."""


class Scores(NamedTuple):
    """What is known of each scored token, each `(n,)`, in float32; only `log_probs` has a gradient."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    """Of the distribution that the token was predicted by, in nats."""
    log_sum_sq_probs: torch.Tensor
    """log of the sum of that distribution's squares; 0 unless asked for."""
    mean_logits: torch.Tensor
    is_top1: torch.Tensor
    """Whether it is the likeliest token, of equally likely ones the first."""
    top_probs: torch.Tensor
    """Probability of the likeliest token; 0 unless asked for."""


def score(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    outputs: Collection[str] = ("log_probs",),
) -> Scores:
    """Score `targets` `(n,)` by the hidden states before them `(n, d)` and the head's `weight` `(V, d)` and `bias` `(V,)`.

    Logits are multiplied by `scale`, then bound by `softcap`. Fields beyond those of `outputs` are 0.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        kind = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(kind), weight.to(kind)
        bias = None if bias is None else bias.to(kind)
    return Scores(*_Score.apply(hidden, weight.to(hidden.dtype), bias, targets, scale, softcap, frozenset(outputs)))


class _Score(torch.autograd.Function):
    """With p the probabilities of a row and g the gradient of its log-probability,

      d/d hidden = g * scale * (W[target] - p W)          d/d W = scale * (onehot - p)^T (g hidden)

    p W is computed on the way forward, where it also gives the entropy: it is log sum exp - scale * hidden . (p W). So a
    backward pass that has kept p is one matrix multiplication, with no pass over `(n, V)` besides.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: float,
        softcap: float | None,
        outputs: frozenset[str],
    ) -> tuple[torch.Tensor, ...]:
        log_probs, entropy, log_sum_sq_probs, mean_logits, top_probs = hidden.new_zeros((5, len(hidden)), dtype=torch.float32)
        is_top1 = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        has_gradient = any(ctx.needs_input_grad)
        num_kept = KEPT_BYTES // (hidden.element_size() * len(weight)) if has_gradient and softcap is None else 0
        mixed = torch.empty_like(hidden) if has_gradient and softcap is None else None
        kept: list[torch.Tensor] = []
        for start in range(0, len(hidden), PROJECTED_AT_ONCE):
            part = slice(start, min(start + PROJECTED_AT_ONCE, len(hidden)))
            logits = _project(hidden[part], weight, bias, scale, softcap)
            wanted = logits.gather(1, targets[part, None])[:, 0]
            highest, likeliest = logits.max(dim=1)
            probs = logits.softmax(dim=1)
            top = probs.gather(1, likeliest[:, None])[:, 0]
            normalizer = highest - top.log()
            log_probs[part] = wanted - normalizer
            is_top1[part] = likeliest == targets[part]
            if "top_probs" in outputs:
                top_probs[part] = top
            if "mean_logits" in outputs and softcap is not None:
                mean_logits[part] = logits.mean(dim=1)
            if "log_sum_sq_probs" in outputs:
                log_sum_sq_probs[part] = torch.linalg.vecdot(probs, probs).log()
            if mixed is not None:
                lowered = probs.to(weight.dtype)
                mixed[part] = lowered @ weight
                if part.stop <= num_kept:
                    kept.append(lowered)
            if "entropy" in outputs:
                if mixed is not None and bias is None and mixed.dtype == torch.float32:
                    expected = scale * torch.linalg.vecdot(hidden[part], mixed[part])
                else:
                    expected = torch.linalg.vecdot(probs, logits)
                entropy[part] = normalizer - expected
        if "mean_logits" in outputs and softcap is None:
            mean_logits = scale * ((hidden @ weight.mean(dim=0)).float() + (0.0 if bias is None else bias.float().mean()))
        ctx.save_for_backward(hidden, weight, bias, targets, mixed, *kept)
        ctx.scale, ctx.softcap = scale, softcap
        ctx.mark_non_differentiable(entropy, log_sum_sq_probs, mean_logits, is_top1, top_probs)
        return log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1, top_probs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        hidden, weight, bias, targets, mixed, *kept = ctx.saved_tensors
        scale = ctx.scale
        g = gradients[0][:, None]
        grad_hidden = torch.empty_like(hidden) if mixed is None else (g * scale * (weight[targets] - mixed)).to(hidden.dtype)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        if grad_weight is None and grad_bias is None and mixed is not None:
            return grad_hidden, None, None, None, None, None, None
        for number, start in enumerate(range(0, len(hidden), PROJECTED_AT_ONCE)):
            part = slice(start, start + PROJECTED_AT_ONCE)
            if mixed is None:
                capped = _project(hidden[part], weight, bias, scale, ctx.softcap)
                slope = scale * (1 - (capped / ctx.softcap).square())
                rows = -capped.softmax(dim=1)
                rows.scatter_add_(1, targets[part, None], torch.ones_like(rows[:, :1]))
                rows *= g[part] * slope
                lowered = rows.to(weight.dtype)
                grad_hidden[part] = lowered @ weight
                if grad_weight is not None:
                    grad_weight.addmm_(lowered.t(), hidden[part])
                if grad_bias is not None:
                    grad_bias += rows.sum(dim=0)
                continue
            probs = (
                kept[number] if number < len(kept) else _project(hidden[part], weight, bias, scale, None).softmax(dim=1).to(weight.dtype)
            )
            if grad_weight is not None:
                scaled = (g[part] * scale * hidden[part]).to(weight.dtype)
                grad_weight.addmm_(probs.t(), scaled, alpha=-1)
                grad_weight.index_add_(0, targets[part], scaled)
            if grad_bias is not None:
                slope = (g[part, 0] * scale).to(probs.dtype)
                grad_bias -= torch.mv(probs.t(), slope)
                grad_bias.index_add_(0, targets[part], slope)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _project(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float | None) -> torch.Tensor:
    """Logits `(n, V)` in float32."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if scale != 1:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits
