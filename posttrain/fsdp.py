"""FSDP2: weights, gradients and the optimizer's state shared out among ranks by torch itself (Zhao et al., 2023, arXiv 2304.11277).

Each decoder layer is a group whose weights are gathered at once, and the outermost module is one with all the rest. Beside the pass that
needs it, a rank has of each parameter its rows alone, as `torch.chunk` deals them out, as a DTensor in the type they are trained in.

The trainer is not told: `fully_shard` changes a model in place, so what is called, clipped and stepped stays what it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from posttrain.machine import giving_memory_back
from posttrain.recipe import TrainingConfig

PREFIX = "FSDP"
"""What `fully_shard` puts before the name of a module's class."""


def layers_of(model: Any) -> list[torch.nn.Module]:
    """The layers of a model that is not yet shared out, in its order: what its architecture calls modules that must not be split."""
    return [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]


@cache
def mesh(world_size: int) -> DeviceMesh:
    """All ranks, side by side, on the kind of device that there is. All of them call it."""
    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size,))


def claim(model: PreTrainedModel, config: TrainingConfig, world_size: int) -> None:
    """Have transformers' trainer leave a model that `shard` is to share out where it is, and as it is."""
    # Else it would place all of it on each device, and wrap it in DDP.
    model._is_distributed_loading_by_transformers = config.fsdp is not None and world_size > 1


def shard(model: Any, config: TrainingConfig, world_size: int) -> None:
    """Share a model out among ranks as `config.fsdp` says, with the adapters that are in it by now; no second time. All ranks call it.

    In bfloat16 weights are gathered as such, while a rank's rows, and the sums of gradients, are in the type that is trained in.
    """
    if config.fsdp is None or world_size == 1:
        return  # a lone rank holds all of it anyway
    if not isinstance(model, FSDPModule):
        options: dict[str, Any] = {
            "mesh": mesh(world_size),
            # None keeps the weights of the outermost module alone, which the backward pass begins with.
            "reshard_after_forward": None if config.fsdp == "full_shard" else False,
        }
        if config.uses_bf16:  # autocast sees to what goes in
            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        with giving_memory_back(), _rows_aside(model):
            for layer in reversed(layers_of(model)):  # what is inside of another first
                fully_shard(layer, **options)
            fully_shard(model, **options)
    reshard(model)


@contextmanager
def _rows_aside(model: torch.nn.Module) -> Iterator[None]:
    """Have parameters of which this rank read its rows alone (`share`) be without memory, as `fully_shard` wants whole ones, and give them
    their rows when it has shared them out."""
    held = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    empty: dict[int, torch.nn.Parameter] = {}  # one for all modules that share a parameter
    for module, name, parameter in held:
        blank = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        setattr(module, name, empty.setdefault(id(parameter), torch.nn.Parameter(blank, requires_grad=parameter.requires_grad)))
    yield
    filled: dict[int, torch.nn.Parameter] = {}
    while held:
        module, name, parameter = held.pop()
        placed: Any = getattr(module, name)
        if id(placed) not in filled:
            rows = parameter.to_local().detach().clone()  # which may be mapped from a file
            filled[id(placed)] = torch.nn.Parameter(alike(placed, rows), requires_grad=placed.requires_grad)
        setattr(module, name, filled[id(placed)])


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard` shared out the model, or what is around it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: torch.nn.Module) -> None:
    """Have each rank hold its rows alone: a pass without a gradient leaves behind the whole weights that a backward pass would need."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reset(call: Any) -> None:
    """Let a model that raised in its forward pass be called again."""
    if isinstance(call, FSDPModule):
        call.reset_iter_state()


@contextmanager
def gathered_beside_layers(model: Any) -> Iterator[None]:
    """What the outermost module holds as it is in a forward pass, so that hooks can be put on it. All ranks call it."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    yield
    model.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter with the rows of all ranks, who all call it."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def stretch(tensor: DTensor) -> tuple[int, torch.Tensor]:
    """This rank's rows, flattened, in the memory where they lie, and where they start in the flattened whole."""
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0] * prod(tensor.shape[1:]), tensor.to_local().detach().flatten()


def alike(tensor: DTensor, rows: torch.Tensor) -> DTensor:
    """This rank's flattened `rows` of a tensor that is shared out as another is."""
    local = rows.view(tensor.to_local().shape)
    placed: Any = DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return placed  # type: ignore[no-any-return]
