"""Settling: in which layout a stage computes, and how many tokens at once. Decided when the model is there, and recorded.

Nothing here changes what is learned, beyond rounding; a run that resumes keeps what its first attempt settled on. Where a
stage is to be deterministic, neither time nor what else runs on the machine decides anything.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from posttrain import disk, fsdp
from posttrain.error import UserError
from posttrain.forward import computing_dtype, exact_layouts, score_batch, to_batch, to_device
from posttrain.layout import Group, Layout, Unsupported, measure
from posttrain.machine import multiplies_bf16
from posttrain.ranks import of_all_ranks
from posttrain.recipe import MOST_TOKENS, SHARE_OF_MEMORY
from posttrain.sequence import team_of
from posttrain.stage import StageContext

FILE = "layout.json"
PROBED_TOKENS = 512
"""Tokens of the samples that layouts are timed on."""
WORTH_PROBING = 100
"""Layouts are timed if the run computes so many times as many tokens as that costs."""


@dataclass(frozen=True)
class Settled:
    """How a stage computes."""

    layout: Layout
    micro_batch_tokens: int
    """Of one rank; a team computes as many times as many at once as it has ranks."""
    recompute: bool
    """Whether activations are computed again in the backward pass, for want of memory, though the config does not ask for it."""
    why: list[str]
    """What decided it, for the log and the record."""
    sequence_parallel_size: int = 1
    """What it was decided for."""


def settle(
    context: StageContext[Any],
    call: Callable[..., Any],
    model: PreTrainedModel,
    groups: Callable[[Sequence[int]], list[Group]],
    *,
    longest: int,
    num_tokens: int,
    layouts: Sequence[Layout],
    pad: int,
    is_resuming: bool,
) -> Settled:
    """Choose among `layouts`, the best first, and a number of tokens. All ranks call it, and get the same.

    `call` is the model as it is trained; `groups` gives samples by their numbers; `longest` is the longest sequence and
    `num_tokens` all that the run computes. Raises `UserError` where the config asks for a layout that the model cannot take.
    """
    config = context.config
    size = config.sequence_parallel_size
    path = context.directory / FILE
    kept = disk.read_json(path) if is_resuming else None
    if kept is not None and kept.get("sequence_parallel_size", 1) != size:
        kept = None  # of other ranks, to which a token takes another memory
    if kept is not None and config.layout in ("auto", kept["layout"]) and config.micro_batch_tokens in (None, kept["micro_batch_tokens"]):
        exact_for(context, call, model, [kept["layout"]], longest)
        recompute = kept["recompute"] and config.gradient_checkpointing is None
        return _apply(Settled(kept["layout"], kept["micro_batch_tokens"], recompute, ["as before it was cut off"], size), model)
    wanted = [config.layout] if config.layout != "auto" else list(layouts)
    exact, reason = exact_for(context, call, model, wanted, longest)
    why = [reason] if reason else []
    if config.layout != "auto" and exact != wanted:
        raise UserError(f"{context.at}.layout: the model cannot be computed {config.layout} ({reason}); set it to auto")
    layout = exact[0]
    if config.layout == "auto" and layout != "padded" and num_tokens >= WORTH_PROBING * PROBED_TOKENS and not config.is_deterministic:
        layout, timed = _fastest(call, model, groups, [layout, "padded"], pad)
        why.append(timed)
    each = _bytes_per_token(model, groups, layout, pad, size)
    free = _free_bytes(call, model, context.world_size, of_all=config.is_deterministic)
    recompute = config.gradient_checkpointing is None and not is_sharded(model) and each * longest / size > SHARE_OF_MEMORY * free
    if recompute:
        why.append(f"activations are computed again, since those of the longest sample ({longest:,} tokens) would not fit into memory")
        each /= model.config.get_text_config().num_hidden_layers
    tokens = config.micro_batch_tokens
    if tokens is None:
        tokens = max(1, min(most_tokens(model), int(SHARE_OF_MEMORY * free / each)))
        why.append(f"a token takes {each / 2**20:.2f} MiB, and there are {free / 2**30:.1f} GiB for them")
    settled = _apply(_agree(Settled(layout, tokens, recompute, why, size)), model)
    if context.is_main:
        disk.write_json(path, asdict(settled))
        print(
            f"computes {settled.layout}, {settled.micro_batch_tokens} tokens at once: {'; '.join(settled.why) or 'as the config says'}",
            flush=True,
        )
        if config.bf16 is None and not config.uses_bf16 and multiplies_bf16():
            print("computes in float32; this CPU multiplies in bfloat16, too, so `bf16: true` may be up to twice as fast", flush=True)
    return settled


def exact_for(
    context: StageContext[Any], call: Callable[..., Any], model: PreTrainedModel, layouts: Sequence[Layout], longest: int
) -> tuple[list[Layout], str]:
    """`exact_layouts` for the ranks of a stage. Raises `UserError` where they cannot compute this model together."""
    try:
        return exact_layouts(call, model, layouts, longest, team=team_of(context))
    except Unsupported as error:
        at = f"{context.at}.sequence_parallel_size"
        raise UserError(f"{at}: ranks cannot compute sequences of this model together ({error}); set it to 1") from error


def _fastest(
    call: Callable[..., Any], model: PreTrainedModel, groups: Callable[[Sequence[int]], list[Group]], layouts: Sequence[Layout], pad: int
) -> tuple[Layout, str]:
    """The layout in which a forward pass over some samples takes least time, and what each took."""
    some: list[Group] = []
    for number in range(8):
        more = groups([number])
        if some and sum(group.num_tokens(layouts[0]) for group in [*some, *more]) > PROBED_TOKENS:
            break
        some += more
    training = model.training
    model.eval()
    seconds: dict[Layout, float] = {}
    for _ in range(2):  # the first one also warms up
        for layout in layouts:
            start = time.perf_counter()
            score_batch(call, model, some, layout, pad=pad)
            seconds[layout] = time.perf_counter() - start
    model.train(training)
    fastest = min(layouts, key=lambda layout: seconds[layout])
    return fastest, "a probe took " + ", ".join(f"{seconds[layout] * 1000:.0f} ms {layout}" for layout in layouts)


def most_tokens(model: PreTrainedModel) -> int:
    """Tokens at once that are worth computing where the model is, and in the type that it computes in."""
    if model.device.type == "cuda":
        return MOST_TOKENS["cuda"]
    return MOST_TOKENS["cpu" if computing_dtype(model) == torch.float32 else "cpu in 16 bits"]


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether DeepSpeed ZeRO-3 or FSDP holds the parameters."""
    return fsdp.is_sharded(model) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _bytes_per_token(
    model: PreTrainedModel, groups: Callable[[Sequence[int]], list[Group]], layout: Layout, pad: int, team_size: int
) -> float:
    """Bytes that the forward pass keeps for the backward pass, for each token that a rank computes.

    Counted; where ranks share the model out, and a forward pass alone would disturb what follows, by Korthikanti et al., 2022 (arXiv
    2205.05198, eq. 2 without the attention scores): 34 bytes for each layer and hidden unit at 16 bits.
    """
    config = model.config.get_text_config()
    if is_sharded(model):
        width = 17 * torch.empty(0, dtype=computing_dtype(model)).element_size()
        return float(width * config.hidden_size * (1 if model.is_gradient_checkpointing else config.num_hidden_layers))
    seen: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    some = groups([0])
    batch = to_batch(some, layout, pad)
    device = model.device
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = model(**to_device(batch, device), fused_lm_head=True)
    del output
    (cost,) = measure(some, layout).computed.tolist()
    return float(sum(seen.values()) / cost * team_size)


def _free_bytes(call: Any, model: PreTrainedModel, world_size: int, *, of_all: bool) -> float:
    """Memory for one rank's activations, once gradients and the optimizer's state are there: of what is free now, or, so that
    a second run finds the same, of all that the machine has."""
    to_come = bytes_to_come(call, model, world_size)
    if of_all:
        shared = world_size if is_sharded(model) else 1
        to_come += sum(num_elements(parameter) * parameter.element_size() for parameter in model.parameters()) / shared
    if model.device.type == "cuda":
        return max(0.0, torch.cuda.mem_get_info(model.device)[of_all] - to_come)
    local = min(world_size, torch.cuda.device_count() or world_size)
    memory = psutil.virtual_memory()
    return max(0.0, float(memory.total if of_all else memory.available) / local - to_come)


def bytes_to_come(call: Any, model: PreTrainedModel, world_size: int) -> float:
    """Bytes that gradients and AdamW's two moments, in float32, will take where this rank computes.

    ZeRO shares the moments out among ranks, from stage 2 on gradients too (Rajbhandari et al., 2020, arXiv 1910.02054, fig. 1), and so
    does FSDP; an optimizer that is offloaded has both elsewhere.
    """
    trained = sum(num_elements(parameter) for parameter in model.parameters() if parameter.requires_grad)
    if fsdp.is_sharded(model):
        return trained * 12 / world_size
    stage = call.zero_optimization_stage() if hasattr(call, "zero_optimization_stage") else 0
    if stage and model.device.type != "cpu" and call.zero_use_cpu_optimizer():
        return 0.0
    return trained * (4 / (world_size if stage >= 2 else 1) + 8 / (world_size if stage >= 1 else 1))


def num_elements(parameter: Any) -> int:
    """Elements of a parameter as a whole, of which this rank may hold a part."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _agree(settled: Settled) -> Settled:
    """The main rank's layout, and the fewest tokens that any rank can afford."""
    every = of_all_ranks(settled)
    tokens = min(each.micro_batch_tokens for each in every)
    return replace(every[0], micro_batch_tokens=tokens, recompute=any(each.recompute for each in every))


def _apply(settled: Settled, model: PreTrainedModel) -> Settled:
    if settled.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return settled
