"""The forward pass of every training stage, of the reference, and of whatever else scores tokens: one core for all.

`attach` gives a causal language model the call that TRL's losses make, `model(..., labels=..., fused_lm_head=True)`, on this
core: the backbone over a layout (see `layout`), then the head on scored positions alone (see `head`). TRL gets what it would
get from its own, per-token log-probabilities in a padded grid, so each of its losses works unchanged.
"""

import functools
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from posttrain.batch import deal, sized_batches
from posttrain.data.samples import IGNORED
from posttrain.head import score
from posttrain.layout import (
    Group,
    Layout,
    Unsupported,
    grid,
    lay_out,
    measure,
    number_sequences,
    pair_group,
    restore_attention,
    teach_attention,
    without_mask,
)

Floats = npt.NDArray[np.float32]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""How much the log-probability of a token may differ between layouts, in nats: ten times what rounding does. A token that sees
what it must not see, or stands elsewhere, differs by more in some of the sequences that are looked at."""
PROBE = (((7, (9, 5)), (4, (3, 12))), ((1, (2, 2)), (23, (1, 31))))
"""Groups that layouts are compared on: lengths of a prompt and of its two answers."""


def attach(model: PreTrainedModel, *, outputs: Collection[str] = ("log_probs",), temperature: float = 1.0) -> None:
    """Replace the model's fused forward by ours; `outputs` are the fields of `head.Scores` that are wanted.

    Log-probabilities are those of softmax(logits / temperature). The forward without `fused_lm_head` stays the model's own, and so
    does generation.
    """
    scale, softcap = _logit_transform(model.config.get_text_config())
    scale, softcap = scale / temperature, None if softcap is None else softcap / temperature

    def head(hidden: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        table: Any = model.get_output_embeddings()
        with maybe_gather_lm_head_ctx(table.weight, table.bias):
            return score(hidden, table.weight, table.bias, targets, scale=scale, softcap=softcap, outputs=outputs)._asdict()

    _attach(model, head)


def attach_rewards(model: PreTrainedModel) -> None:
    """The same for a reward model: what its head says where a token is predicted stands in the place of that token's log-probability.

    So a group whose branches end with one more token, which alone is counted, is scored at the end of each branch.
    """
    score_head: Any = model.score
    _attach(model, lambda hidden, _: {"log_probs": score_head(hidden)[:, 0].float()})


def _attach(model: PreTrainedModel, head: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """`head` is given hidden states `(N, H)` and the tokens `(N,)` to be predicted from them, and answers with fields `(N,)`."""
    plain = functools.partial(type(model).forward, model)
    config = model.config.get_text_config()

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, laid: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return plain(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        mask = labels != IGNORED
        kwargs["use_cache"] = False
        if laid is None:
            backbone = self.base_model(*args, **kwargs)
            hidden, targets = backbone.last_hidden_state[:, :-1][mask], labels[mask]
        else:
            kwargs |= {"input_ids": laid["input_ids"], "position_ids": laid["position_ids"], "attention_mask": None}
            with without_mask():
                backbone = self.base_model(**kwargs, laid=laid)
            hidden, targets = backbone.last_hidden_state[0].index_select(0, laid["predictors"]), laid["targets"]
        scores = head(hidden, targets)
        # Selected positions are scored, and TRL reads a padded grid.
        places = mask.reshape(-1).nonzero()[:, 0] if laid is None else laid["places"]
        in_grid = {name: values.new_zeros(mask.numel()).index_copy(0, places, values).view(mask.shape) for name, values in scores.items()}
        return FusedCausalLMOutput(label_mask=mask, aux_loss=_aux_loss(config, backbone, kwargs), **in_grid)

    model.forward = types.MethodType(forward, model)


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """What a model's own forward does to its logits: a factor, then a soft bound. The names are those of the model families."""
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name)), softcap
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:
        return float(scaling if config.model_type == "hyperclovax" else 1 / scaling), softcap
    return 1.0, softcap


def _aux_loss(config: Any, backbone: Any, kwargs: dict[str, Any]) -> Any:
    """The load-balancing loss of a mixture of experts, where its router's logits were asked for."""
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(backbone.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask"))


def exact_layouts(call: Callable[..., Any], model: PreTrainedModel, layouts: Sequence[Layout], longest: int) -> tuple[list[Layout], str]:
    """Those of `layouts` in which the model computes what it computes in padded rows, and why it is not all of them.

    Decided by what its config says of its attention, then by computing: the log-probabilities of random tokens in each
    layout are compared with those in padded rows. `call` is the attached model, or what wraps it; `longest` is the longest
    sequence to come, in tokens. All ranks call it.
    """
    if set(layouts) <= {"padded"}:
        return list(layouts), ""
    if reason := _limit(model.config.get_text_config(), longest):
        return ["padded"], reason
    try:
        teach_attention(model)
    except (Unsupported, ValueError) as error:
        return ["padded"], str(error)
    vocabulary = model.config.get_text_config().vocab_size
    draw = np.random.default_rng(0)
    exact: list[Layout] = []
    reasons = []
    training = model.training
    model.eval()
    for layout in layouts:
        worst = 0.0
        try:
            for lengths in PROBE:
                groups = [pair_group(_tokens(draw, vocabulary, p), [_tokens(draw, vocabulary, t) for t in ts]) for p, ts in lengths]
                padded, laid = (score_batch(call, model, groups, name, pad=0)[0] for name in ("padded", layout))
                worst = max(worst, *(float(np.abs(a - b).max()) for a, b in zip(padded, laid, strict=True)))
        except (Unsupported, TypeError) as error:
            reasons.append(f"{layout}: {error}")
            continue
        if worst <= TOLERANCE.get(_computing_dtype(model), TOLERANCE[torch.bfloat16]):
            exact.append(layout)
        else:
            reasons.append(f"{layout}: log-probabilities differ by {worst:.2g} from those in padded rows")
    model.train(training)
    return exact or ["padded"], "; ".join(reasons)


def _limit(config: Any, longest: int) -> str:
    """Why sequences of that length are more than plain causal attention to this model; empty where they are not."""
    for name in ("sliding_window", "attention_chunk_size"):
        limit = getattr(config, name, None)
        if limit is not None and limit < longest and getattr(config, "use_sliding_window", True):
            return f"its attention reaches {limit} tokens back, and the longest sequence has {longest}"
    return ""


def _tokens(draw: np.random.Generator, vocabulary: int, count: int) -> list[int]:
    tokens: list[int] = draw.integers(0, vocabulary, count).tolist()
    return tokens


def _computing_dtype(model: PreTrainedModel) -> torch.dtype:
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


# --- scoring ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_batch(
    call: Callable[..., Any], model: PreTrainedModel, groups: Sequence[Group], layout: Layout, *, pad: int
) -> list[list[Floats]]:
    """The log-probability of every counted token, `[group][branch]` -> `(n,)`, of groups that are computed at once."""
    batch = to_batch(groups, layout, pad)
    output = call(**to_device(batch, model.device), fused_lm_head=True)
    log_probs = output.log_probs.float().cpu().numpy()
    wanted = output.label_mask.cpu().numpy()
    found: list[list[Floats]] = [[] for _ in groups]
    for (number, _), row in number_sequences(groups).items():
        found[number].append(log_probs[row][wanted[row]])
    return found


def score_all(
    call: Callable[..., Any],
    model: PreTrainedModel,
    groups: Sequence[Group],
    layout: Layout,
    *,
    pad: int,
    micro_batch_tokens: int,
    rank: int,
    world_size: int,
) -> list[list[Floats]]:
    """The log-probability of every counted token, `[group][branch]` -> `(n,)`, on every rank, computed by all of them.

    `call` is the model, or what wraps it; it scores as in evaluation.
    """
    training = model.training
    model.eval()
    # No rank may be without work: under ZeRO-3 each forward pass is a collective.
    numbers = list(range(len(groups))) * -(-world_size // len(groups))
    mine: dict[int, list[Floats]] = {}
    for micro_batch in deal(numbers, measure([groups[number] for number in numbers], layout), micro_batch_tokens, world_size)[rank]:
        found = score_batch(call, model, [groups[number] for number in micro_batch], layout, pad=pad)
        mine |= dict(zip(micro_batch, found, strict=True))
    model.train(training)
    every: list[Any] = [mine] * world_size
    if world_size > 1:
        dist.all_gather_object(every, mine)
    merged = {number: branches for part in every for number, branches in part.items()}
    return [merged[number] for number in range(len(groups))]


def to_batch(groups: Sequence[Group], layout: Layout, pad: int) -> dict[str, Any]:
    """What an attached model is called with, beside `fused_lm_head=True`."""
    batch: dict[str, Any] = grid(groups, pad)
    return batch if layout == "padded" else {**batch, "laid": lay_out(groups, layout)}


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors in dicts, lists and tuples, moved."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: to_device(each, device) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(each, device) for each in value)
    return value


class Scorer:
    """Scores groups under a loaded model, in the fastest layout that is exact for it."""

    def __init__(self, model: PreTrainedModel, *, longest: int, pad: int) -> None:
        attach(model)
        self.model = model.eval()
        self.pad = pad
        self.layout = exact_layouts(model, model, ["shared"], longest)[0][0]

    def detach(self) -> None:
        """Give the model its own attention back, for what else is done with it."""
        restore_attention(self.model)

    def batches(self, groups: Sequence[Group], tokens_at_once: int) -> Iterator[list[int]]:
        """Which groups to score at once, the longest first."""
        return sized_batches(measure(groups, self.layout), tokens_at_once)

    def score(self, groups: Sequence[Group]) -> list[list[Floats]]:
        """The log-probability of every counted token, `[group][branch]` -> `(n,)`, all groups at once."""
        return score_batch(self.model, self.model, groups, self.layout, pad=self.pad)
