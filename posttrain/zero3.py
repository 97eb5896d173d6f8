"""Parameters that DeepSpeed ZeRO-3 shards, whole for a while. Imports DeepSpeed, so what needs it imports this no earlier.

DeepSpeed puts a parameter together by an all-gather, of which gloo, which works on a CPU, copies what goes in and what comes out: for a
while twice the parameter, and a rank's share of it once more. Here each rank sends its share to where it belongs instead. And what is put
together to be overwritten, as transformers does with each tensor that it reads, is not put together at all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, PartitionedParamStatus, ZeroParamStatus
from transformers import modeling_utils


class Whole(GatheredParameters):  # type: ignore[misc]
    """The same as its base, to the last bit, without gloo's copies. All ranks enter it."""

    def __enter__(self) -> None:
        for parameter in self.params if self.enabled else ():
            if _is_plain(parameter) and dist.get_backend(parameter.ds_process_group) == "gloo":
                _put_together(parameter)
        super().__enter__()  # which takes those that are whole as they are


class Overwritten(GatheredParameters):  # type: ignore[misc]
    """Parameters of which rank `modifier_rank` sets every number; what they were is not put together. All ranks enter it."""

    def __enter__(self) -> None:
        for parameter in self.params if self.enabled else ():
            if _is_plain(parameter):
                _hold(parameter, _memory_for(parameter))
        super().__enter__()


@contextmanager
def reading() -> Iterator[None]:
    """Have `from_pretrained` put no parameter together before it sets it to what is stored."""
    library: Any = modeling_utils
    own = library._load_state_dict_into_zero3_model

    def load(*given: Any, **named: Any) -> Any:
        # It is looked up there whenever tensors of a module are about to be set.
        usual, deepspeed.zero.GatheredParameters = deepspeed.zero.GatheredParameters, Overwritten
        try:
            return own(*given, **named)
        finally:
            deepspeed.zero.GatheredParameters = usual

    library._load_state_dict_into_zero3_model = load
    try:
        yield
    finally:
        library._load_state_dict_into_zero3_model = own


def _is_plain(parameter: Any) -> bool:
    """Whether a parameter lies in the memory of the ranks, a share on each, in its own type, and nowhere else."""
    share = parameter.ds_tensor
    return (
        parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE
        and share.status is PartitionedParamStatus.AVAILABLE  # and not on an NVMe
        and share.dtype == parameter.dtype  # and not quantized
        and getattr(parameter, "ds_secondary_tensor", None) is None  # of ZeRO++, which a node has by itself
    )


def _put_together(parameter: Any) -> None:
    memory, share, group = _memory_for(parameter), parameter.ds_tensor, parameter.ds_process_group
    for rank, piece in enumerate(torch.split(memory, share.ds_numel)):  # what the last ranks have may be padding alone
        if rank == dist.get_rank(group):
            piece.copy_(share[: len(piece)])
        dist.broadcast(piece, dist.get_global_rank(group, rank), group=group)
    _hold(parameter, memory)


def _memory_for(parameter: Any) -> torch.Tensor:
    return torch.empty(parameter.ds_numel, dtype=parameter.dtype, device=parameter.device)


def _hold(parameter: Any, memory: torch.Tensor) -> None:
    parameter.data = memory.view(parameter.ds_shape)
    parameter.ds_status = ZeroParamStatus.AVAILABLE
