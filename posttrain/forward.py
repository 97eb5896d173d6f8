"""The forward pass of every training stage, of the reference, and of whatever else scores tokens: one core for all.

`attach` gives a causal language model the call that TRL's losses make, `model(..., labels=..., fused_lm_head=True)`, on this
core: the backbone over a layout (see `layout`), then the head on scored positions alone (see `head`). TRL gets what it would
get from its own, per-token log-probabilities in a padded grid, so each of its losses works unchanged.
"""

import functools
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from posttrain.batch import deal, sized_batches
from posttrain.data.samples import IGNORED
from posttrain.fsdp import reset
from posttrain.head import score
from posttrain.layout import (
    Group,
    Layout,
    Masks,
    Unsupported,
    grid,
    lay_out,
    making_masks,
    measure,
    number_sequences,
    pair_group,
    restore_attention,
    teach_attention,
)
from posttrain.ranks import shares_of_all_ranks
from posttrain.sequence import ALONE, Piece, Team, why_never_exact

Floats = npt.NDArray[np.float32]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""How much the log-probability of a token may differ between layouts, in nats: ten times what rounding does. A token that sees
what it must not see, or stands elsewhere, differs by more in some of the sequences that are looked at."""
PROBE = (((7, (9, 5)), (4, (3, 12))), ((1, (2, 2)), (23, (1, 31))))
"""Groups that layouts are compared on: lengths of a prompt and of its two answers."""


@dataclass
class Output(FusedCausalLMOutput):  # type: ignore[misc,unused-ignore]
    """What TRL's losses read of a forward pass, and what they have no place for."""

    top_probs: torch.Tensor | None = None


class Predicted(NamedTuple):
    """The counted tokens of a sequence, each field `(n,)`, in float32."""

    log_probs: Floats
    top_probs: Floats
    """Probability of the token that was likeliest in its place."""
    is_top1: Floats
    """1 where it is that one, else 0."""


def attach(model: PreTrainedModel, *, outputs: Collection[str] = ("log_probs",), temperature: float = 1.0, team: Team = ALONE) -> None:
    """Replace the model's fused forward by ours; `outputs` are the fields of `head.Scores` that are wanted.

    Those that are not are None. Log-probabilities are those of softmax(logits / temperature). The forward without `fused_lm_head` stays
    the model's own, and so does generation. Ranks of a `team` each compute a piece of what they are all called with, and give the same
    answer; with `whole=True` each computes all of it by itself.
    """
    scale, softcap = _logit_transform(model.config.get_text_config())
    scale, softcap = scale / temperature, None if softcap is None else softcap / temperature

    def head(hidden: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        table: Any = model.get_output_embeddings()
        with maybe_gather_lm_head_ctx(table.weight, table.bias):
            scores = score(hidden, table.weight, table.bias, targets, scale=scale, softcap=softcap, outputs=outputs)
        return {name: values for name, values in scores._asdict().items() if name in outputs}

    _attach(model, head, team)


def attach_rewards(model: PreTrainedModel, *, team: Team = ALONE) -> None:
    """The same for a reward model: what its head says where a token is predicted stands in the place of that token's log-probability.

    So a group whose branches end with one more token, which alone is counted, is scored at the end of each branch.
    """
    score_head: Any = model.score
    _attach(model, lambda hidden, _: {"log_probs": score_head(hidden)[:, 0].float()}, team)


def _attach(model: PreTrainedModel, head: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]], team: Team) -> None:
    """`head` is given hidden states `(N, H)` and the tokens `(N,)` to be predicted from them, and answers with fields `(N,)`."""
    plain = functools.partial(type(model).forward, model)
    config = model.config.get_text_config()

    @functools.wraps(type(model).forward)
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, laid: dict[str, Any] | None = None, whole: bool = False, **kwargs: Any
    ) -> Any:
        if not fused_lm_head:
            return plain(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        mask = labels != IGNORED
        kwargs["use_cache"] = False
        masks: Masks = "own"
        if laid is None:
            places = mask.reshape(-1).nonzero()[:, 0]
            # Rows of what a model computes have a position more than those of the grid, whose first token nothing predicts.
            predictors, targets = places + places // mask.shape[1], labels[mask]
        else:
            places, predictors, targets, masks = laid["places"], laid["predictors"], laid["targets"], "none"
            kwargs |= {"input_ids": laid["input_ids"], "position_ids": laid["position_ids"], "attention_mask": None, "laid": laid}
        piece = None
        if not (whole or team.is_alone):
            rows = kwargs["input_ids"]
            piece = Piece(team, rows.shape[1])
            positions = torch.arange(piece.length, device=rows.device)[None] if laid is None else kwargs["position_ids"]
            kwargs |= {"input_ids": piece.cut(rows), "position_ids": piece.cut(positions), "piece": piece}
            masks = "whole" if laid is None else "none"
            mine, predictors = piece.find(predictors)
            places, targets = places[mine], targets[mine]
        with making_masks(masks):
            backbone = self.base_model(*args, **kwargs)
        scores = head(backbone.last_hidden_state.flatten(0, 1).index_select(0, predictors), targets)
        # Selected positions are scored, and TRL reads a padded grid, into which it also writes: FSDP wants it to be no view.
        cells = torch.unravel_index(places, mask.shape)
        in_grid = {name: values.new_zeros(mask.shape).index_put(cells, values) for name, values in scores.items()}
        if piece is not None:
            in_grid = {name: team.sum(values) for name, values in in_grid.items()}
        return Output(label_mask=mask, aux_loss=_aux_loss(config, backbone, kwargs, piece), **in_grid)

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


def _aux_loss(config: Any, backbone: Any, kwargs: dict[str, Any], piece: Piece | None) -> Any:
    """The load-balancing loss of a mixture of experts, where its router's logits were asked for."""
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = backbone.router_logits
    if piece is not None:
        logits = tuple(piece.join(each.unflatten(0, (-1, piece.width))).flatten(0, 1) for each in logits)
    return load_balancing_loss_func(logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask"))


def exact_layouts(
    call: Callable[..., Any], model: PreTrainedModel, layouts: Sequence[Layout], longest: int, *, team: Team = ALONE
) -> tuple[list[Layout], str]:
    """Those of `layouts` in which the model computes what it computes in padded rows, and why it is not all of them.

    Decided by what its config says of its attention, then by computing: the log-probabilities of random tokens in each
    layout are compared with those in padded rows. `call` is the attached model, or what wraps it; `longest` is the longest
    sequence to come, in tokens. All ranks call it.

    The ranks of a `team` compare what they compute together with padded rows that each computes by itself. Raises `Unsupported` where
    they are the same in no layout.
    """
    if set(layouts) <= {"padded"} and team.is_alone:
        return list(layouts), ""
    config = model.config.get_text_config()
    reasons = []
    if reason := _limit(config, longest):
        layouts, reasons = ["padded"], [reason]
    if team.is_alone and reasons:
        return ["padded"], reason
    if not team.is_alone and (reason := why_never_exact(config, longest)):
        raise Unsupported(reason)
    try:
        teach_attention(model)
    except (Unsupported, ValueError) as error:
        if not team.is_alone:
            raise Unsupported(str(error)) from error
        return ["padded"], str(error)
    vocabulary = config.vocab_size
    draw = np.random.default_rng(0)
    exact: list[Layout] = []
    # A piece of a row is no row to a model that looks at neighbours in other ways, and where it stumbles over that is its own.
    refusals = (Unsupported, TypeError) if team.is_alone else (Unsupported, TypeError, RuntimeError, ValueError, IndexError)
    training = model.training
    model.eval()
    for layout in layouts if team.is_alone or "padded" in layouts else [*layouts, "padded"]:
        if layout not in layouts and exact:
            break  # it is there for want of what was asked for
        worst = 0.0
        try:
            for lengths in PROBE:
                groups = [pair_group(_tokens(draw, vocabulary, p), [_tokens(draw, vocabulary, t) for t in ts]) for p, ts in lengths]
                padded = score_batch(call, model, groups, "padded", pad=0, whole=True)[0]
                laid = score_batch(call, model, groups, layout, pad=0)[0]
                worst = max(worst, *(float(np.abs(a - b).max()) for a, b in zip(padded, laid, strict=True)))
        except refusals as error:
            reset(call)
            reasons.append(f"{layout}: {' '.join(str(error).split())[:200]}")
            continue
        if worst <= TOLERANCE.get(computing_dtype(model), TOLERANCE[torch.bfloat16]):
            exact.append(layout)
        else:
            reasons.append(f"{layout}: log-probabilities differ by {worst:.2g} from those in padded rows")
    model.train(training)
    if not (exact or team.is_alone):
        raise Unsupported("; ".join(reasons))
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


def computing_dtype(model: PreTrainedModel) -> torch.dtype:
    """The type that a model's matrices are multiplied in."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


# --- scoring ---------------------------------------------------------------------------------------------------------


def score_batch(
    call: Callable[..., Any], model: PreTrainedModel, groups: Sequence[Group], layout: Layout, *, pad: int, whole: bool = False
) -> list[list[Floats]]:
    """The log-probability of every counted token, `[group][branch]` -> `(n,)`, of groups that are computed at once.

    `whole` is as in `attach`.
    """
    return [
        [log_probs for (log_probs,) in branches]
        for branches in _score_fields(call, model, groups, layout, ("log_probs",), pad=pad, whole=whole)
    ]


@torch.no_grad()
def _score_fields(
    call: Callable[..., Any],
    model: PreTrainedModel,
    groups: Sequence[Group],
    layout: Layout,
    fields: Sequence[str],
    *,
    pad: int,
    whole: bool = False,
) -> list[list[list[Floats]]]:
    """Those fields of `head.Scores` of every counted token, `[group][branch][field]` -> `(n,)`."""
    batch = to_batch(groups, layout, pad)
    output = call(**to_device(batch, model.device), fused_lm_head=True, whole=whole)
    values = [getattr(output, field).float().cpu().numpy() for field in fields]
    wanted = output.label_mask.cpu().numpy()
    found: list[list[list[Floats]]] = [[] for _ in groups]
    for (number, _), row in number_sequences(groups).items():
        found[number].append([each[row][wanted[row]] for each in values])
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

    `call` is the model, or what wraps it; it scores as in evaluation. Ranks of a team have one number, and count as one.
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
    return shares_of_all_ranks(mine)


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
        attach(model, outputs=Predicted._fields)
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

    def predict(self, groups: Sequence[Group]) -> list[list[Predicted]]:
        """The same, with what else there is to know of the very same distributions."""
        found = _score_fields(self.model, self.model, groups, self.layout, Predicted._fields, pad=self.pad)
        return [[Predicted(*fields) for fields in branches] for branches in found]
