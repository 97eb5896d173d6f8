"""Planner: what memory, time and money a training stage needs, from the shape of its model alone. Imports no torch.

With P parameters, T of them trained, N ranks, and e bytes of a number in the forward pass (2 in bfloat16, 4 in float32), a rank holds

                  without DeepSpeed   ZeRO-1        ZeRO-2           ZeRO-3
    weights       4 P                 e P           e P              e P / N        frozen ones under adapters: e, or 0.52 in 4 bits
    gradients     4 T                 e T           e T / N          e T / N
    optimizer     8 T                 12 T / N      12 T / N         12 T / N       AdamW; of it 4 are weights in float32
                                      (Rajbhandari et al., 2020, arXiv 1910.02054, sec. 3.1 and 5: 2 + 2 + 12 bytes)

FSDP divides what there is without DeepSpeed by N, all of it, and computes with weights that it gathers at e bytes a number.

and beside them activations, which are counted by what PyTorch keeps for the backward pass, as Korthikanti et al., 2022 (arXiv
2205.05198, sec. 4.1) do, with their 34 s b h of a layer of GPT becoming what `_layer_bytes` says of the layers of today; logits of
scored positions (`posttrain/head.py`); the buffers of whoever sums up gradients; in RLHF a frozen reference, reward models and a
key-value cache. What is shown is the phase in which all that is the most.

A token costs 2 M operations forward, M being the weights that it is multiplied with, and 2 L a s in attention to s tokens before it
on average s / 2 (L layers with queries of width a: Kaplan et al., 2020, arXiv 2001.08361, table 1); backward twice that, or once where
weights are frozen; recomputed activations once more, without the head. So it is 6 M + 6 L a s; Chowdhery et al., 2022 (PaLM, arXiv
2204.02311, app. B) write 12 L a s, which is attention without a causal mask. A step takes the longest of: these operations at the
share of the peak that `hardware` assumes, launching kernels, and communication (2 T numbers a step, under ZeRO-3 the weights
twice or thrice for each micro-batch: Rajbhandari et al., sec. 7), which overlap; then the optimizer's pass over its state.
"""

import itertools
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from posttrain.config import ModelSource
from posttrain.footprint import Rows, is_table, num_tokens, read_header
from posttrain.hardware import Hardware
from posttrain.recipe import MAX_SHARD_BYTES, MOST_TOKENS, SHARE_OF_MEMORY, TrainingConfig

KEPT_BYTES = 2**29
"""Probabilities that the head keeps for the backward pass, as in `head`."""
PROJECTED_AT_ONCE = 256
CACHE_BYTES, ROWS_AT_ONCE = 2 * 2**30, 256
"""Key-value cache of sampling, as in `generate`."""
NUMBERS_ALIVE = 1_000_000_000
"""Numbers of gathered weights that ZeRO-3 keeps, by the default of `stage3_max_live_parameters`."""
BUCKET_NUMBERS = 500_000_000
"""Numbers of a bucket of ZeRO, by the default of `reduce_bucket_size`; `auto` is the square of the hidden size."""
NF4_BYTES = 4.127 / 8
"""Bytes of a weight in 4-bit NormalFloat with doubly quantized constants (Dettmers et al., 2023, arXiv 2305.14314, sec. 3)."""
MOMENT_BYTES = {"adafactor": 0, "sgd": 0, "lion": 4, "paged_lion_8bit": 1, "lion_8bit": 1, "adagrad": 4, "rmsprop": 4}
"""Bytes that an optimizer keeps of a trained number beside its weight; those of 8 bits keep 2, all others AdamW's 8."""
USABLE = 0.94
"""Share of a device's memory that may be planned with: the allocator's blocks never fit all that is asked for."""
BUS_SHARE, NETWORK_SHARE = 0.7, 0.35
"""Share of a link's speed that collectives reach, by the bus bandwidths that nccl-tests print for large messages; across nodes, for
those of a layer's size, half of that."""
LAUNCH_S, LAUNCH_SHARDED_S = 1e-3, 4e-3
"""Seconds in which a layer's forward pass is launched: a GPU that needs less waits. About a hundred kernels of 10 microseconds; under
DeepSpeed ZeRO-3 hooks of every module come on top. Both are what the shortest sequences in the table of Qwen's README take: 0.15 s
for a micro-batch of 32 layers with adapters, 0.5 s under ZeRO-3."""
DECODE_LAYER_S = 8e-4
"""The same for one token of each row in sampling, through the modules of transformers."""
SLOW_4BIT = 0.75
"""Speed with weights in 4 bits by that with whole ones, for their being dequantized: Qwen's README, 7B at 2,048 tokens."""
GLOO_THREADS = 2
MOST_NODES = 64
BESIDE = ("phase", "host", "publishing", "saving")
"""Fields of `Memory` that are not on the device."""
PAIRED = ("dpo", "orpo", "reward")
"""Kinds of stages whose samples are two answers to a prompt."""


# --- the shape of a model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What of a model decides what it costs."""

    num_parameters: int
    """Numbers in all its weights, those of tied tables once."""
    linear_parameters: int
    """Those of matrices that states are multiplied with in layers, all experts counted."""
    active_parameters: int
    """Of these, those that one token meets."""
    largest_layer: int
    hidden_size: int
    num_layers: int
    num_heads: int
    query_width: int
    key_width: int
    """Width of the keys, and of the values: that of the queries, or less where they share them."""
    hidden_width: int
    """Width of what a token goes through in the middle of an MLP, over all experts that it meets."""
    vocabulary_size: int
    is_gated: bool
    num_experts: int = 0
    experts_per_token: int = 0

    @property
    def head_parameters(self) -> int:
        """Numbers of the matrix that gives logits; also those of the table of input vectors."""
        return self.hidden_size * self.vocabulary_size


def read_shape(source: ModelSource) -> Shape | None:
    """The shape of a model on this disk, by its config and the headers of its weights; None where it is elsewhere, or cannot be told."""
    directory = Path(source.model)
    try:
        if not directory.is_dir():
            return None
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        index = directory / "model.safetensors.index.json"
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        tensors = {name: shape for shard in shards for name, (_, shape) in read_header(directory / shard).items()}
        return shape_of(config, tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, struct.error):
        return None  # whoever loads it will say what is wrong with it


def shape_of(config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]]) -> Shape:
    """The shape of a model, by its `config.json` and the shapes of its tensors. Raises `KeyError` where the config does not tell."""
    text = config.get("text_config") or config

    def told(*names: str) -> int:
        return int(next((text[name] for name in names if text.get(name) is not None), 0))

    hidden, num_layers = told("hidden_size", "n_embd", "d_model"), told("num_hidden_layers", "n_layer", "num_layers")
    heads = told("num_attention_heads", "n_head", "num_heads")
    if min(hidden, num_layers, heads, sum(map(math.prod, tensors.values()))) <= 0:
        raise KeyError("it has no weights, or its config does not say hidden_size, num_hidden_layers and num_attention_heads")
    head_width = told("head_dim") or hidden // heads
    num_experts = told("num_experts", "num_local_experts", "n_routed_experts")
    top = told("num_experts_per_tok", "moe_topk")
    intermediate = told("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden
    layers: dict[str, int] = {}
    linear = routed = 0
    for name, shape in tensors.items():
        if found := re.search(r"(?:^|\.)(?:layers|h|blocks|layer|block)\.(\d+)\.", name):
            layers[found[1]] = layers.get(found[1], 0) + math.prod(shape)
        module = name.removesuffix(".weight")
        if len(shape) < 2 or is_table(module):
            continue
        linear += math.prod(shape)
        if ".experts." in name:
            routed += math.prod(shape)
    wide = intermediate
    if num_experts and routed:
        shared = told("shared_expert_intermediate_size") or told("n_shared_experts") * told("moe_intermediate_size")
        wide = top * (told("moe_intermediate_size") or intermediate) + shared
    return Shape(
        num_parameters=sum(map(math.prod, tensors.values())),
        linear_parameters=linear,
        active_parameters=linear - routed + (routed * top // num_experts if num_experts else routed),
        largest_layer=max(layers.values(), default=linear // num_layers),
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=heads,
        query_width=heads * head_width,
        key_width=(told("num_key_value_heads") or heads) * head_width,
        hidden_width=wide,
        vocabulary_size=told("vocab_size"),
        is_gated=any("gate_proj" in name or "gate_up" in name or re.search(r"\.w3\.", name) for name in tensors),
        num_experts=num_experts if routed else 0,
        experts_per_token=top if routed else 0,
    )


# --- what a stage asks for -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What of a stage decides what it needs, beside its model."""

    kind: str
    world_size: int
    per_node: int
    """Ranks on each node."""
    team_size: int = 1
    """Ranks that compute a sample together."""
    zero_stage: int | None = None
    """None is training without DeepSpeed."""
    fsdp: str | None = None
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket_numbers: int | None = None
    """Numbers of a bucket of ZeRO; None is the square of the hidden size."""
    bf16: bool = True
    num_trained: int | None = None
    """Numbers of adapters; None trains all weights."""
    in_4bit: bool = False
    is_dora: bool = False
    moment_bytes: int = 8
    recompute: bool | None = None
    """Whether activations are computed again; None is where the longest sample needs it."""
    micro_batch_tokens: int | None = None
    max_length: int = 2048
    global_batch_size: int = 64
    num_generations: int = 1
    max_completion_length: int = 0
    is_eager: bool = False
    """Whether attention keeps its scores, the square of a sequence."""
    has_liger: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Largest file of published weights."""
    num_steps: int | None = None
    """None where it is not known."""
    tokens_per_row: float | None = None
    """Tokens of a sample on average, the prompt of a pair once; None is as many as there may be."""
    is_referenced: bool = False
    """Whether a frozen copy of the input policy is held."""
    judges: tuple[Shape, ...] = ()
    """Reward models that each rank holds whole."""

    @property
    def is_deepspeed(self) -> bool:
        return self.zero_stage is not None

    @property
    def e(self) -> int:
        """Bytes of a number in the forward pass."""
        return 2 if self.bf16 else 4

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a share of the weights alone."""
        return self.zero_stage == 3 or self.fsdp is not None

    @property
    def is_lowered(self) -> bool:
        """Whether the weights that are computed with are in the type of the forward pass, and not cast to it by autocast."""
        return self.is_deepspeed or self.fsdp is not None

    @property
    def sequences(self) -> int:
        """Sequences of a sample, which are computed together."""
        return 2 if self.kind in PAIRED else 1


def job_of(
    kind: str,
    config: TrainingConfig,
    shape: Shape,
    *,
    world_size: int,
    per_node: int,
    is_gpu: bool,
    num_trained: int | None,
    rows: Rows | None,
    judges: Sequence[Shape] = (),
) -> Job:
    """What a stage's config asks for. `num_trained` are numbers of its adapters; `rows` are its data, where they are known."""
    zero = _read_zero(config.deepspeed)
    stage, bucket = zero.get("stage"), zero.get("reduce_bucket_size", BUCKET_NUMBERS)
    completion = getattr(config, "max_completion_length", 0)
    generations = getattr(config, "num_generations", 1)
    per_row, num_steps = None, config.max_steps
    if rows is not None and rows.num_rows >= 1:
        longest = float(config.max_length * (2 if kind in PAIRED else 1))
        per_row = min(longest, max(1.0, num_tokens(rows, shape.vocabulary_size) / rows.num_rows))
        num_steps = num_steps or math.ceil(rows.num_rows * config.num_train_epochs / config.global_batch_size)
    return Job(
        kind=kind,
        world_size=world_size,
        per_node=per_node,
        team_size=config.sequence_parallel_size,
        zero_stage=(stage if stage in (1, 2, 3) else 0) if config.deepspeed else None,
        fsdp=config.fsdp if world_size > 1 else None,
        offload_optimizer=_is_offloaded(zero.get("offload_optimizer")),
        offload_weights=_is_offloaded(zero.get("offload_param")),
        bucket_numbers=int(bucket) if isinstance(bucket, int | float) and math.isfinite(bucket) else None,
        bf16=config.bf16 if config.bf16 is not None else is_gpu,
        num_trained=num_trained if config.lora is not None else None,
        in_4bit=config.lora is not None and config.lora.load_in_4bit,
        is_dora=config.lora is not None and config.lora.use_dora,
        moment_bytes=_moment_bytes(config.optim),
        recompute=config.gradient_checkpointing,
        micro_batch_tokens=config.micro_batch_tokens,
        max_length=config.max_length,
        global_batch_size=config.global_batch_size,
        num_generations=generations if kind == "rlhf" else 1,
        max_completion_length=completion if kind == "rlhf" else 0,
        has_liger=is_gpu and find_spec("liger_kernel") is not None,
        is_eager=config.attn_implementation == "eager",
        max_shard_bytes=config.max_shard_size,
        num_steps=num_steps,
        tokens_per_row=per_row,
        is_referenced=kind == "rlhf" and config.lora is None and bool(getattr(config, "beta", 0) or getattr(config, "kl_budget", None)),
        judges=tuple(judges),
    )


def _read_zero(path: str | None) -> dict[str, Any]:
    """The part of a DeepSpeed config that is about ZeRO; empty where there is none, or it cannot be read."""
    if path is None:
        return {}
    try:
        zero = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {})
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}  # the stage will say what is wrong with it
    return zero if isinstance(zero, dict) else {}


def _is_offloaded(part: object) -> bool:
    return isinstance(part, dict) and part.get("device", "none") != "none"


def _moment_bytes(optim: str) -> int:
    for name, size in MOMENT_BYTES.items():
        if optim == name or optim.startswith(f"{name}_"):
            return size
    return 2 if "8bit" in optim else 8


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank needs on its device in the phase in which it needs most, and beside that in the memory of its machine."""

    phase: str
    """`train`, the start of a backward pass; `backward`, its end; `step`, the optimizer's; `sample`; or `publish`, on a CPU."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    """Of collectives, gathered weights, copies in bfloat16, and what is there for a moment only."""
    frozen: int
    """Reference and reward models."""
    cache: int
    """Keys and values of sampling."""
    runtime: int
    host: int
    """What is offloaded, on a GPU."""
    publishing: int
    """What a rank puts together and writes at a time of what is published, in the memory of its machine."""
    saving: int
    """The copy of a checkpoint that is being written, in the memory of the machine; where that has no room for it, there is none."""

    @property
    def total(self) -> int:
        """All that must fit on the device."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """What is on the device, by name."""
        return {name: getattr(self, name) for name in _PARTS}


_PARTS = tuple(field.name for field in fields(Memory) if field.name not in BESIDE)


@dataclass(frozen=True)
class Computed:
    """How a stage computes, as `settle` would choose."""

    micro_batch_tokens: int
    """Tokens at once at most: as many as are asked for, or those of the longest sample."""
    recompute: bool
    num_micro_batches: int
    """Of a rank in a step."""


def settle(shape: Shape, job: Job, hardware: Hardware | None) -> Computed:
    """How many tokens a rank computes at once, and whether activations are computed again (`posttrain/settle.py`)."""
    longest = math.ceil(job.max_length * job.sequences / job.team_size)  # tokens of a rank's piece of it
    each = token_bytes(shape, job, recompute=False) + _logit_bytes(shape, job, 1)
    is_gpu = hardware is None or hardware.is_gpu
    recompute, most = bool(job.recompute), MOST_TOKENS["cuda" if is_gpu else "cpu in 16 bits" if job.bf16 else "cpu"]
    free = math.inf
    if hardware is not None:
        held = sum(_states(shape, job, is_apart=is_gpu)[:3]) + _bucket_bytes(shape, job) + _frozen_bytes(shape, job)
        free = max(0.0, hardware.memory_bytes / (1 if hardware.is_gpu else job.per_node) - held - hardware.runtime_bytes)
    if job.recompute is None and not job.is_sharded and each * longest > SHARE_OF_MEMORY * free:
        recompute = True
    if recompute:
        each = token_bytes(shape, job, recompute=True) + _logit_bytes(shape, job, 1)
    tokens = job.micro_batch_tokens or max(1, int(min(most, SHARE_OF_MEMORY * free / max(1, each))))
    # A rank never computes more at once than its share of a step; a sample that is longer stands alone.
    of_rank = math.ceil(job.global_batch_size * job.team_size / job.world_size) * job.num_generations * longest
    tokens = min(max(tokens, longest), of_rank)
    mean = job.tokens_per_row if job.tokens_per_row is not None else job.max_length * job.sequences
    total = job.global_batch_size / job.world_size * job.num_generations * (mean + job.max_completion_length)
    return Computed(tokens, recompute, max(1, math.ceil(total / tokens)))


def memory(shape: Shape, job: Job, hardware: Hardware | None) -> Memory:
    """What a rank needs at its peak."""
    return max(phases(shape, job, hardware), key=lambda phase: phase.total)


def phases(shape: Shape, job: Job, hardware: Hardware | None) -> list[Memory]:
    """What a rank needs in each phase."""
    computed = settle(shape, job, hardware)
    is_apart = hardware is None or hardware.is_gpu
    tokens, n, whole = computed.micro_batch_tokens, job.world_size, shape.num_parameters
    trained, is_full = _trained(shape, job), job.num_trained is None
    weights, gradients, optimizer, host = _states(shape, job, is_apart=is_apart)
    # Of the layer at hand there are gradients, as large as what they are of; recomputed, also what they are of.
    at_hand = tokens * _layer_bytes(shape, job) * (1 + computed.recompute)
    activations = tokens * token_bytes(shape, job, recompute=computed.recompute) + at_hand
    logits = _logit_bytes(shape, job, tokens) + PROJECTED_AT_ONCE * shape.vocabulary_size * 12
    gathered = 0
    if job.fsdp is not None:
        layers = whole if job.fsdp == "shard_grad_op" else whole - (shape.num_layers - 2) * shape.largest_layer  # one ahead of its time
        gathered = job.e * min(whole, layers)
    elif job.is_sharded:
        gathered = job.e * min(whole, NUMBERS_ALIVE)  # into places of their own, beside this rank's share
    elif job.bf16 and not job.is_deepspeed and is_full:
        gathered = 2 * (shape.linear_parameters + shape.head_parameters)  # autocast keeps a micro-batch's weights in bfloat16
    # The gradient of the head is made whole before it is added up; where tables are tied, that of the input vectors is too.
    momentary = job.e * shape.head_parameters if is_full and job.kind != "reward" else 0
    saving = (4 + job.moment_bytes) * trained // n
    idle = Memory(
        phase="train",
        weights=weights,
        gradients=0,
        optimizer=optimizer,
        activations=0,
        logits=0,
        buffers=_bucket_bytes(shape, job) + (0 if is_apart else _kept_bytes(shape, job)),
        frozen=_frozen_bytes(shape, job),
        cache=0,
        runtime=0 if hardware is None else hardware.runtime_bytes,
        host=host,
        publishing=_publishing_bytes(shape, job),
        saving=saving,
    )
    # Where a step is one micro-batch, gradients come as activations go; ZeRO-3 has a place for them from the start.
    accumulated = gradients if computed.num_micro_batches > 1 or job.zero_stage == 3 else 0
    busy = idle.buffers + gathered + momentary
    found = [replace(idle, gradients=accumulated, activations=activations, logits=logits, buffers=busy)]
    if computed.recompute:
        found.append(replace(idle, phase="backward", gradients=gradients, activations=at_hand, buffers=busy))
    stepping = idle.buffers + max(momentary, _step_bytes(shape, job))
    found.append(replace(idle, phase="step", gradients=gradients, buffers=stepping))
    if job.kind == "rlhf":
        sampled = idle.buffers + _rows_sampled(shape, job) * shape.vocabulary_size * 12
        sampled += job.e * whole if job.is_sharded else 0
        found.append(replace(idle, phase="sample", cache=_cache_bytes(shape, job), buffers=sampled))
    if not is_apart:
        found.append(replace(idle, phase="publish", buffers=idle.buffers + idle.publishing))
    return found


def token_bytes(shape: Shape, job: Job, *, recompute: bool) -> int:
    """Bytes that a forward pass keeps of each token through all layers, the head not counted; recomputed, the layers' inputs alone."""
    stream = 4 if job.bf16 and not job.is_lowered and job.num_trained is None else job.e
    if recompute:
        return shape.num_layers * shape.hidden_size * stream + 3 * shape.hidden_size * job.e
    return shape.num_layers * _layer_bytes(shape, job) + 3 * shape.hidden_size * job.e


def _layer_bytes(shape: Shape, job: Job) -> int:
    """Bytes that PyTorch keeps of each token of one layer for the backward pass, by the code of transformers' Llama.

    In float32 a norm keeps its input, the normed and what is multiplied with (3 h), attention queries, keys, values, what it gives
    and a copy of that (3 a + 2 k), an MLP its gate, the activated gate, the other branch and their product (4 i; 2 i without a gate).
    In bfloat16 norms still compute in float32 (8 h bytes). Under autocast the stream between layers is float32, and each matrix keeps
    its own copy of its input in bfloat16. Frozen weights let norms keep no normed states.
    """
    h, a, k = shape.hidden_size, shape.query_width, shape.key_width
    i = shape.hidden_width
    inner = (4 if shape.is_gated else 2) * i + 2 * shape.experts_per_token * h
    is_full = job.num_trained is None
    if not job.bf16:
        kept = 4 * ((6 if is_full else 4) * h + 3 * a + 2 * k + inner)
    elif job.is_lowered and job.has_liger and is_full:
        kept = 8 * h + 2 * (2 * a + 2 * k + inner - (i if shape.is_gated else 0))
    elif job.is_lowered:
        kept = (16 if is_full else 12) * h + 2 * (2 * a + 2 * k + inner)
    elif is_full:
        kept = 26 * h + 2 * (3 * a + 2 * k + inner)
    else:
        kept = 18 * h + 2 * (3 * a + 2 * k + inner)
    if job.is_dora:
        kept += job.e * (a + 2 * k + 2 * h + (2 if shape.is_gated else 1) * i)  # what each matrix gives, to be scaled
    if job.is_eager:
        kept += shape.num_heads * job.max_length * (6 if job.bf16 else 4)
    return kept


def _logit_bytes(shape: Shape, job: Job, tokens: int) -> int:
    """Bytes that the head keeps of so many tokens, all taken to be scored: states, mixed ones, and probabilities up to a bound."""
    if job.kind == "reward":
        return 0
    return 2 * tokens * shape.hidden_size * job.e + min(KEPT_BYTES, tokens * shape.vocabulary_size * job.e)


def _trained(shape: Shape, job: Job) -> int:
    return shape.num_parameters if job.num_trained is None else job.num_trained


def _weight_bytes(shape: Shape, job: Job) -> int:
    if job.num_trained is None:
        each = job.e if job.is_deepspeed else 4
        return each * shape.num_parameters // (job.world_size if job.is_sharded else 1)
    frozen = float(job.e * shape.num_parameters)
    if job.in_4bit:
        frozen -= (job.e - NF4_BYTES) * shape.linear_parameters
    adapters = job.num_trained * (job.e if job.is_deepspeed else 4)
    return int((frozen + adapters) / (job.world_size if job.is_sharded else 1))


def _states(shape: Shape, job: Job, *, is_apart: bool) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients and the optimizer's state on a rank's device, and of what is offloaded where that is another memory."""
    weights, optimizer = _weight_bytes(shape, job), _optimizer_bytes(shape, job)
    is_split = job.zero_stage == 2 or job.is_sharded
    gradients = (job.e if job.is_deepspeed else 4) * _trained(shape, job) // (job.world_size if is_split else 1)
    host = 0
    if job.offload_optimizer and is_apart:
        host, optimizer = host + optimizer, 0
        if is_split:
            host, gradients = host + gradients, 0
    if job.offload_weights and job.is_sharded and is_apart:
        host, weights = host + weights, 0
    return weights, gradients, optimizer, host


def _frozen_bytes(shape: Shape, job: Job) -> int:
    """Reference and reward models, these whole and in float32."""
    judges = sum(4 * judge.num_parameters for judge in job.judges)
    if not job.is_referenced:
        return judges
    each = 2 if job.bf16 and job.is_deepspeed else 4
    return judges + each * shape.num_parameters // (job.world_size if job.is_sharded else 1)


def _optimizer_bytes(shape: Shape, job: Job) -> int:
    """Moments, and under DeepSpeed the weights in float32, a copy also where they are that already."""
    trained = _trained(shape, job)
    if not job.is_deepspeed:
        return job.moment_bytes * trained // (job.world_size if job.is_sharded else 1)
    return (job.moment_bytes + 4) * trained // (job.world_size if job.zero_stage else 1)


def _bucket_bytes(shape: Shape, job: Job) -> int:
    """What whoever sums up gradients holds: DDP a copy of them all, ZeRO a bucket, and ZeRO-2 and 3 another one under way, FSDP those
    of a layer, or of all that is beside layers."""
    trained = _trained(shape, job)
    if job.fsdp is not None:
        return 4 * min(trained, max(shape.largest_layer, shape.num_parameters - shape.num_layers * shape.largest_layer))
    if not job.is_deepspeed:
        return 4 * trained if job.world_size > 1 else 0
    bucket = min(trained, job.bucket_numbers or shape.hidden_size**2)
    return job.e * bucket * (2 if job.zero_stage in (2, 3) else 1)


def _kept_bytes(shape: Shape, job: Job) -> int:
    """What the C library keeps under DeepSpeed on a CPU: copies of gathered weights by gloo, each of its two threads having memory of its
    own. A lone rank gathers nothing under ZeRO-3, where no other memory is kept."""
    if not job.is_deepspeed or (job.is_sharded and job.world_size == 1):
        return 0
    return GLOO_THREADS * job.e * (shape.num_parameters if job.is_sharded else _trained(shape, job))


def _step_bytes(shape: Shape, job: Job) -> int:
    """What is there for the time of an optimizer's step: under ZeRO a rank's gradients once more, flat and in float32."""
    if not job.is_deepspeed or job.offload_optimizer:
        return 0
    mine = _trained(shape, job) // job.world_size
    if job.is_sharded:
        return 4 * min(mine, NUMBERS_ALIVE) if job.bf16 else 0
    return (job.e + (4 if job.bf16 else 0)) * mine


def _publishing_bytes(shape: Shape, job: Job) -> int:
    """One file of weights, the layer at hand in float32, as of the rank that verifies, and the adapters that the first rank writes."""
    file = min(job.max_shard_bytes, 4 * shape.num_parameters)
    return file + 4 * max(shape.largest_layer, shape.head_parameters) + 4 * (job.num_trained or 0)


def _rows_sampled(shape: Shape, job: Job) -> int:
    each = 2 * shape.num_layers * shape.key_width * job.e
    fit = CACHE_BYTES // max(1, each * job.max_length)
    return max(1, min(ROWS_AT_ONCE, fit, math.ceil(job.global_batch_size / job.world_size) * job.num_generations))


def _cache_bytes(shape: Shape, job: Job) -> int:
    return 2 * shape.num_layers * shape.key_width * job.e * job.max_length * _rows_sampled(shape, job)


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Time:
    """How long a stage takes, and what bounds it."""

    tokens_per_s: float
    """Of samples, over all ranks; in RLHF those of prompts and completions."""
    step_s: float
    compute_s: float
    """Of a step: operations at the speed that is assumed."""
    launch_s: float
    communication_s: float
    update_s: float
    sample_s: float
    flops_per_token: float
    total_s: float | None
    """All steps; None where it is not known how many there are."""
    gpu_hours: float | None
    price: float | None


def forward_flops(shape: Shape, length: float, *, scored: float = 1.0) -> float:
    """Operations of a forward pass for each token of sequences of that length, of which such a share is scored."""
    layers = 2 * shape.active_parameters + 2 * shape.num_layers * shape.query_width * length
    return layers + 2 * shape.head_parameters * scored


def train_flops(shape: Shape, job: Job, length: float, *, recompute: bool, scored: float = 1.0) -> float:
    """Operations of forward and backward passes for each token, with what the kind of stage computes beside them."""
    forward = forward_flops(shape, length, scored=scored)
    attention = 2 * shape.num_layers * shape.query_width * length
    backward = 2 * forward
    if job.num_trained is not None:
        backward = forward + attention + 4 * job.num_trained  # no gradient of the frozen weights
        forward += 2 * job.num_trained
    again = forward - 2 * shape.head_parameters * scored if recompute else 0.0
    # The reference of pairs is computed once for all passes over the data, and counted as if there were one; KTO's z is one more.
    beside = {"dpo": 1, "kto": 2}.get(job.kind, 0) + job.is_referenced
    judged = sum(forward_flops(judge, length, scored=0) for judge in job.judges)
    return forward + backward + again + beside * forward_flops(shape, length, scored=scored) + judged


def time(shape: Shape, job: Job, hardware: Hardware, price_per_hour: float | None = None) -> Time:
    """How long a step and the stage take. `price_per_hour` is that of one device."""
    computed = settle(shape, job, hardware)
    n, longest = job.world_size, job.max_length * job.sequences
    per_sample = job.tokens_per_row if job.tokens_per_row is not None else float(longest)
    per_sample = min(per_sample + job.max_completion_length, float(longest)) * job.num_generations
    length = per_sample / job.sequences / job.num_generations
    tokens = job.global_batch_size * per_sample
    flops = train_flops(shape, job, length, recompute=computed.recompute)
    speed = hardware.peak_flops * hardware.efficiency * (SLOW_4BIT if job.in_4bit else 1)
    if not hardware.is_gpu:
        speed /= job.per_node  # its cores are shared out
    compute = tokens / n * flops / speed
    passes = 3 + computed.recompute
    launch = (LAUNCH_SHARDED_S if job.zero_stage == 3 else LAUNCH_S) if hardware.is_gpu else 0.0
    launches = passes * shape.num_layers * launch * computed.num_micro_batches
    communication, swapped = _communication_s(shape, job, hardware, computed), _swap_s(shape, job, hardware, tokens / n, computed)
    update = _update_s(shape, job, hardware)
    sampled = _sample_s(shape, job, hardware) if job.kind == "rlhf" else 0.0
    step = max(compute, launches, communication) + swapped + update + sampled
    total = None if job.num_steps is None else job.num_steps * step
    hours = None if total is None else total * n / 3600
    return Time(
        tokens_per_s=tokens / step,
        step_s=step,
        compute_s=compute,
        launch_s=launches,
        communication_s=communication + swapped,
        update_s=update,
        sample_s=sampled,
        flops_per_token=flops,
        total_s=total,
        gpu_hours=hours,
        price=None if hours is None or price_per_hour is None else hours * price_per_hour,
    )


def _communication_s(shape: Shape, job: Job, hardware: Hardware, computed: Computed) -> float:
    """Of a step: gradients summed up (2 T numbers sent by each rank), or under ZeRO-3 weights gathered forward and backward, and
    gradients scattered, for each micro-batch. Weights of offloading come over the link to the host besides."""
    n = job.world_size
    # Rings cross from node to node over all ports of a node together.
    across = min(hardware.link, hardware.network * hardware.per_node) * NETWORK_SHARE
    speed = hardware.link * BUS_SHARE if n <= job.per_node else across
    share = (n - 1) / n
    trained = _trained(shape, job)
    if not job.is_sharded:
        per_step = 2 * trained * (job.e if job.is_deepspeed else 4) * share
        return per_step * (computed.num_micro_batches if job.zero_stage == 2 else 1) / speed
    gathers = 2 + computed.recompute * (shape.num_parameters > NUMBERS_ALIVE)
    if job.fsdp is not None:
        gathers = 1 if job.fsdp == "shard_grad_op" else 2
    sent = (job.e * gathers * shape.num_parameters + (4 if job.fsdp else job.e) * trained) * share
    loaded = job.e * gathers * shape.num_parameters / n / hardware.host_link if job.offload_weights else 0.0
    return computed.num_micro_batches * (sent / speed + loaded)


def _swap_s(shape: Shape, job: Job, hardware: Hardware, tokens: float, computed: Computed) -> float:
    """Of a step, while nothing else is done: queries, keys, values and what attention gives of a rank's tokens go to the others of its
    team, in each layer, and so do their gradients (`posttrain/sequence.py`)."""
    link = hardware.link * BUS_SHARE if job.team_size <= job.per_node else hardware.network * NETWORK_SHARE
    sent = 2 * (shape.query_width + shape.key_width) * job.e * (job.team_size - 1) / job.team_size
    return tokens * shape.num_layers * sent * (2 + computed.recompute) / link


def _update_s(shape: Shape, job: Job, hardware: Hardware) -> float:
    """The optimizer's pass: of each number it reads weight, gradient and moments, and writes weight and moments."""
    mine = _trained(shape, job) / (job.world_size if job.is_deepspeed or job.is_sharded else 1)
    moved = (12 + 2 * job.moment_bytes) * mine
    if not job.offload_optimizer:
        return moved / hardware.bandwidth
    # AdamW of the host, whose memory all ranks of a node share: 200 GB/s of two sockets with eight channels each.
    return moved * job.per_node / 200e9 + (4 + job.e) * mine / hardware.host_link


def _sample_s(shape: Shape, job: Job, hardware: Hardware) -> float:
    """Of a step: completions are sampled row by row of the cache, and each token reads all weights and the cache once."""
    rows = _rows_sampled(shape, job)
    rounds = math.ceil(job.global_batch_size * job.num_generations / job.world_size / rows)
    read = job.e * shape.active_parameters + _cache_bytes(shape, job) / 2
    busy = 2 * shape.active_parameters * rows / (hardware.peak_flops * hardware.efficiency)
    each = max(read / hardware.bandwidth, busy, shape.num_layers * DECODE_LAYER_S if hardware.is_gpu else 0.0)
    return rounds * job.max_completion_length * each


# --- what fits -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recommendation:
    """The least that a stage fits on, with its global batch as it is."""

    zero_stage: int | None
    """None is training without DeepSpeed."""
    fsdp: str | None
    offload: bool
    num_nodes: int
    world_size: int
    recompute: bool
    micro_batch_tokens: int | None
    """None is as the stage has it."""
    memory_bytes: int

    @property
    def text(self) -> str:
        """What to set, in the words of the config."""
        if self.fsdp is not None:
            said = f"fsdp: {self.fsdp}"
        elif self.zero_stage is None:
            said = "no deepspeed"
        else:
            said = f"deepspeed: ds_configs/zero{self.zero_stage}{'_offload' if self.offload else ''}.json"
        said += ", gradient_checkpointing: true" if self.recompute else ""
        said += f", micro_batch_tokens: {self.micro_batch_tokens}" if self.micro_batch_tokens is not None else ""
        nodes = "one node" if self.num_nodes == 1 else f"{self.num_nodes} nodes"
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        return f"{said}, on {processes} of {nodes}"


@dataclass(frozen=True)
class Estimate:
    """What a stage needs, and what it could do with."""

    hardware: str | None
    capacity_bytes: int | None
    """What a device has that may be planned with."""
    world_size: int
    memory: Memory
    phases: list[Memory]
    computed: Computed
    time: Time | None
    fits: bool | None
    recommendation: Recommendation | None
    """None where nothing is known of the hardware, or nothing fits."""

    def as_json(self) -> dict[str, Any]:
        """All figures by name."""
        plain = asdict(self)
        plain["memory"]["total"] = self.memory.total
        plain["phases"] = {phase.phase: phase.total for phase in self.phases}
        if self.recommendation is not None:
            plain["recommendation"]["text"] = self.recommendation.text
        return plain


def estimate(
    shape: Shape, job: Job, hardware: Hardware | None, price_per_hour: float | None = None, *, may_add_nodes: bool = False
) -> Estimate:
    """What a stage needs, and the least that it fits on. `may_add_nodes`: whether the launcher can ask for more of them."""
    every, computed = phases(shape, job, hardware), settle(shape, job, hardware)
    needed = max(every, key=lambda phase: phase.total)
    if hardware is None:
        return Estimate(None, None, job.world_size, needed, every, computed, None, None, None)
    return Estimate(
        hardware=hardware.name,
        capacity_bytes=capacity_bytes(job, hardware),
        world_size=job.world_size,
        memory=needed,
        phases=every,
        computed=computed,
        time=time(shape, job, hardware, price_per_hour),
        fits=_fits(needed, job, hardware),
        recommendation=recommend(shape, job, hardware, may_add_nodes=may_add_nodes),
    )


def capacity_bytes(job: Job, hardware: Hardware) -> int:
    """What a rank may take."""
    return int(USABLE * hardware.memory_bytes / (1 if hardware.is_gpu else job.per_node))


def _fits(needed: Memory, job: Job, hardware: Hardware) -> bool:
    held_by_node = needed.host * min(job.world_size, job.per_node)
    return needed.total <= capacity_bytes(job, hardware) and held_by_node <= USABLE * hardware.host_bytes


def recommend(shape: Shape, job: Job, hardware: Hardware, *, may_add_nodes: bool) -> Recommendation | None:
    """The fewest nodes, and on them the lowest ZeRO stage, on which a stage fits, its global batch kept; None if none does.

    Offloading is slow, so where nodes can be added it comes last.
    """
    for changed, num_nodes in _candidates(job, hardware, may_add_nodes=may_add_nodes):
        found = memory(shape, changed, hardware)
        if _fits(found, changed, hardware):
            computed = settle(shape, changed, hardware)
            # Without ZeRO-3 a stage sees by itself where activations must be computed again.
            said = computed.recompute and (bool(job.recompute) or changed.is_sharded)
            tokens = changed.micro_batch_tokens if changed.micro_batch_tokens != job.micro_batch_tokens else None
            return Recommendation(
                changed.zero_stage, changed.fsdp, changed.offload_weights, num_nodes, changed.world_size, said, tokens, found.total
            )
    return None


def _candidates(job: Job, hardware: Hardware, *, may_add_nodes: bool) -> Iterator[tuple[Job, int]]:
    """Ways to run a job, the cheapest first, with their number of nodes."""
    here = min(job.world_size, job.per_node)
    per_node = max(here, hardware.per_node)
    one, several = sorted({here, per_node}), [per_node * 2**power for power in range(1, int(math.log2(MOST_NODES)) + 1)]
    rungs = [(one, False), (several, False), (one, True), (several, True)]
    if not may_add_nodes:
        rungs = [rungs[0], rungs[2], rungs[1], rungs[3]]
    least = math.ceil(job.max_length * job.sequences / job.team_size)
    ways = dict.fromkeys([(job.recompute, job.micro_batch_tokens), (True, job.micro_batch_tokens), (True, least)])
    for sizes, offload in rungs:
        # Weights in 4 bits cannot be sharded, and only ZeRO-3 offloads them. Who asked for FSDP has it as long as that fits.
        engines: list[tuple[int | None, str | None]] = [(stage, None) for stage in ([3] if offload else [None, 1, 2, 3])]
        if job.fsdp is not None and not offload:
            engines = [(None, fsdp) for fsdp in dict.fromkeys([job.fsdp, "full_shard"])]
        for size, (stage, fsdp) in itertools.product(sizes, engines):
            if size % job.team_size or job.global_batch_size % (size // job.team_size) or (job.in_4bit and stage == 3):
                continue
            for recompute, tokens in ways:
                changed = replace(job, world_size=size, per_node=min(size, per_node), zero_stage=stage, bucket_numbers=None)
                changed = replace(
                    changed,
                    fsdp=fsdp if size > 1 else None,
                    offload_optimizer=offload,
                    offload_weights=offload,
                    recompute=recompute,
                    micro_batch_tokens=tokens,
                )
                yield changed, math.ceil(size / per_node)


def explain_misfit(found: Estimate) -> str:
    """Why a stage does not fit, and what would."""
    assert found.capacity_bytes is not None
    parts = found.memory.parts()
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    told = ", ".join(f"{name} {parts[name] / 1e9:,.1f}" for name in largest)
    capacity = f"{found.capacity_bytes / 1e9:,.1f} can be used"
    said = f"needs {found.memory.total / 1e9:,.1f} GB on each {found.hardware}, of which {capacity} ({told})"
    if found.recommendation is None:
        return f"{said}; nothing up to {MOST_NODES} nodes would do: lower max_length, train adapters (lora: {{}}), or take a smaller model"
    return f"{said}; with {found.recommendation.text}, it would fit"
