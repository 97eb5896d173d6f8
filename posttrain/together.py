"""A policy that ranks hold together: each has a share of every layer, and they put a layer together to compute with it (FSDP2).

What a rank computes is what it would compute alone, to the last bit, as it computes with whole layers. Each pass is one of all ranks that
hold the policy, but what goes through it is each rank's own: one that has nothing left to compute takes part in the passes of the others
(`Held.leave`), and one whose pass breaks off takes part in the rest of it.
"""

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.chat import ChatContract
from posttrain.fsdp import layers_of
from posttrain.models import load_policy, stored_dtype, weight_files
from posttrain.ranks import any_rank
from posttrain.stage import Input, StageContext

SHARE_FOR_WEIGHTS = 0.7
"""Share of a rank's memory that weights may take; the rest is for what computing takes, and a layer that is whole."""


@dataclass(frozen=True)
class Held:
    """A policy that is ready to compute."""

    model: PreTrainedModel
    group: Any = None
    """The ranks that hold it together; None where this one does alone."""

    def leave(self) -> None:
        """Compute no more, but take part in what others compute. All ranks call it before they do anything else together."""
        if self.group is None:
            return
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        while any_rank(False, self.group):
            with torch.no_grad():
                self.model(input_ids=token, use_cache=False, is_announced=True)


def hold_policy(context: StageContext[Any], given: Input, tokenizer: PreTrainedTokenizerBase, contract: ChatContract, device: str) -> Held:
    """A policy on this rank, or on as few as have room for it together, or as many as `ranks_per_policy` says. All ranks call it."""
    at = f"{context.at}: {given.name}"
    dtype = None if device == "cuda" else torch.float32
    num_ranks = ranks_to_hold(context, given, device)
    if num_ranks == 1:
        model = load_policy(given.model, tokenizer, contract, at, dtype=dtype or "auto")
        model.to(device)  # type: ignore[arg-type]
        return Held(model.eval())
    # As it is stored, so that it is mapped into memory, of which a rank reads what it keeps.
    model = load_policy(given.model, tokenizer, contract, at, dtype="auto")
    mesh, group = _holders(num_ranks, device)
    _share_out(model, mesh, group, dtype)
    print(f"{given.name}: {num_ranks} ranks hold it together", flush=True)
    return Held(model.eval(), group)


def ranks_to_hold(context: StageContext[Any], given: Input, device: str) -> int:
    """How many ranks hold a policy together. All ranks call it."""
    return context.config.ranks_per_policy or _least_ranks(context, given, None if device == "cuda" else torch.float32)


def _least_ranks(context: StageContext[Any], given: Input, dtype: torch.dtype | None) -> int:
    if context.world_size == 1:
        return 1
    files = weight_files(given, context.at, or_pickles=given.model.allow_pickle)
    needed = sum(path.stat().st_size for path in files) / stored_dtype(given.model).itemsize
    needed *= (dtype or stored_dtype(given.model)).itemsize
    if torch.cuda.is_available():
        room = torch.cuda.get_device_properties(context.local_rank).total_memory
    else:
        room = psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", context.world_size))
    for num_ranks in range(1, context.world_size):
        if context.world_size % num_ranks == 0 and not any_rank(needed / num_ranks > SHARE_FOR_WEIGHTS * room):
            return num_ranks
    return context.world_size


@cache
def _holders(num_ranks: int, device: str) -> tuple[DeviceMesh, Any]:
    """Neighbouring ranks, so many in a group: how they lie for FSDP, and a group in which they agree on the CPU."""
    world_size = dist.get_world_size()
    mesh = init_device_mesh(device, (world_size // num_ranks, num_ranks), mesh_dim_names=("copy", "share"))
    groups = [list(range(start, start + num_ranks)) for start in range(0, world_size, num_ranks)]
    return mesh["share"], dist.new_subgroups_by_enumeration(groups, backend="gloo")[0]


def _share_out(model: Any, mesh: DeviceMesh, group: Any, dtype: torch.dtype | None) -> None:
    """Leave each rank its share of every layer, cast to `dtype` where one is given, and have passes be those of all."""
    layers: list[Any] = layers_of(model)
    for module in [*reversed(layers), model]:  # what is inside of another first
        _cast(module, dtype)
        fully_shard(module, mesh=mesh)
    num_passed = 0

    def announce(_: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        nonlocal num_passed
        num_passed = 0
        if not named.pop("is_announced", False):
            any_rank(True, group)
        return arguments, named

    def count(*_: Any) -> None:
        nonlocal num_passed
        num_passed += 1

    def complete(*_: Any) -> None:
        for layer in layers[num_passed:]:
            layer.unshard()
            layer.reshard()

    # Before the hook of FSDP, by which ranks put together what is outside of layers.
    model.register_forward_pre_hook(announce, prepend=True, with_kwargs=True)
    model.register_forward_hook(complete, always_call=True)
    for layer in layers:
        layer.register_forward_pre_hook(count)


def _cast(module: torch.nn.Module, dtype: torch.dtype | None) -> None:
    for tensor in [*module.parameters(), *module.buffers()]:
        if dtype is not None and tensor.is_floating_point() and not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(dtype)
