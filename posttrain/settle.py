"""Settling: in which layout a stage computes, and how many tokens at once. Decided when the model is there, and recorded.

Nothing here changes what is learned, beyond rounding; a run that resumes keeps what its first attempt settled on. Where a
stage is to be deterministic, neither time nor what else runs on the machine decides anything.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from posttrain import disk
from posttrain.error import UserError
from posttrain.forward import exact_layouts, score_batch, to_batch, to_device
from posttrain.layout import Group, Layout, measure
from posttrain.stage import StageContext

FILE = "layout.json"
MOST_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens at once beyond which a step gets no faster: its matrix multiplications are as fast as they get."""
SHARE_OF_MEMORY = 0.5
"""Share of the free memory that activations may take; the rest is for gradients, the optimizer's work and what else runs."""
PROBED_TOKENS = 512
"""Tokens of the samples that layouts are timed on."""
WORTH_PROBING = 100
"""Layouts are timed if the run computes so many times as many tokens as that costs."""


@dataclass(frozen=True)
class Settled:
    """How a stage computes."""

    layout: Layout
    micro_batch_tokens: int
    recompute: bool
    """Whether activations are computed again in the backward pass, for want of memory, though the config does not ask for it."""
    why: list[str]
    """What decided it, for the log and the record."""


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
    path = context.directory / FILE
    kept = disk.read_json(path) if is_resuming else None
    if kept is not None and config.layout in ("auto", kept["layout"]) and config.micro_batch_tokens in (None, kept["micro_batch_tokens"]):
        exact_layouts(call, model, [kept["layout"]], longest)
        recompute = kept["recompute"] and config.gradient_checkpointing is None
        return _apply(Settled(kept["layout"], kept["micro_batch_tokens"], recompute, ["as before it was cut off"]), model)
    wanted = [config.layout] if config.layout != "auto" else list(layouts)
    exact, reason = exact_layouts(call, model, wanted, longest)
    why = [reason] if reason else []
    if config.layout != "auto" and exact != wanted:
        raise UserError(f"{context.at}.layout: the model cannot be computed {config.layout} ({reason}); set it to auto")
    layout = exact[0]
    if config.layout == "auto" and layout != "padded" and num_tokens >= WORTH_PROBING * PROBED_TOKENS and not config.is_deterministic:
        layout, timed = _fastest(call, model, groups, [layout, "padded"], pad)
        why.append(timed)
    each, free = _bytes_per_token(model, groups, layout, pad), _free_bytes(model, context.world_size, of_all=config.is_deterministic)
    recompute = config.gradient_checkpointing is None and not is_sharded(model) and each * longest > SHARE_OF_MEMORY * free
    if recompute:
        why.append(f"activations are computed again, since those of the longest sample ({longest:,} tokens) would not fit into memory")
        each /= model.config.get_text_config().num_hidden_layers
    tokens = config.micro_batch_tokens
    if tokens is None:
        tokens = max(1, min(most_tokens(model), int(SHARE_OF_MEMORY * free / each)))
        why.append(f"a token takes {each / 2**20:.2f} MiB, and there are {free / 2**30:.1f} GiB for them")
    settled = _apply(_agree(Settled(layout, tokens, recompute, why)), model)
    if context.is_main:
        disk.write_json(path, asdict(settled))
        print(
            f"computes {settled.layout}, {settled.micro_batch_tokens} tokens at once: {'; '.join(settled.why) or 'as the config says'}",
            flush=True,
        )
    return settled


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
    """Tokens at once that are worth computing where the model is."""
    return MOST_TOKENS["cuda" if model.device.type == "cuda" else "cpu"]


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether DeepSpeed ZeRO-3 holds the parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _bytes_per_token(model: PreTrainedModel, groups: Callable[[Sequence[int]], list[Group]], layout: Layout, pad: int) -> float:
    """Bytes that the forward pass keeps for the backward pass, for each token.

    Counted; under ZeRO-3, where a forward pass alone would disturb what follows, by Korthikanti et al., 2022 (arXiv 2205.05198,
    eq. 2 without the attention scores): 34 bytes for each layer and hidden unit at 16 bits.
    """
    config = model.config.get_text_config()
    if is_sharded(model):
        width = 17 * torch.empty(0, dtype=model.dtype).element_size()
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
    return float(sum(seen.values()) / cost)


def _free_bytes(model: PreTrainedModel, world_size: int, *, of_all: bool) -> float:
    """Memory for one rank's activations, once gradients and the optimizer's state are there: of what is free now, or, so that
    a second run finds the same, of all that the machine has."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    held = sum(parameter.nbytes for parameter in model.parameters()) if of_all else 0
    to_come = trained * 12 + held  # a gradient and AdamW's two moments, in float32
    if model.device.type == "cuda":
        return max(0.0, torch.cuda.mem_get_info(model.device)[of_all] - to_come)
    local = min(world_size, torch.cuda.device_count() or world_size)
    memory = psutil.virtual_memory()
    return max(0.0, float(memory.total if of_all else memory.available) / local - to_come)


def _agree(settled: Settled) -> Settled:
    """The main rank's layout, and the fewest tokens that any rank can afford."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return settled
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, settled)
    tokens = min(each.micro_batch_tokens for each in every)
    return Settled(every[0].layout, tokens, any(each.recompute for each in every), every[0].why)


def _apply(settled: Settled, model: PreTrainedModel) -> Settled:
    if settled.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return settled
