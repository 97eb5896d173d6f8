"""Ranks: what the processes of a stage tell one another, beside gradients and weights. All ranks call each function, in the same order.

A process that is alone is the only rank, and tells itself.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@cache
def _control_group() -> Any:
    """Ranks agree on the CPU, so that no GPU has to wait until its queue is empty."""
    return dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None


def _is_alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def any_rank(is_so: bool, group: Any = None) -> bool:
    """Whether it is so on any rank, or on any of a group that agrees on the CPU."""
    if not dist.is_initialized():
        return is_so
    flag = torch.tensor([int(is_so)])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=_control_group() if group is None else group)
    return bool(flag.item())


def sum_over_ranks(value: int) -> int:
    """The sum of a number over all ranks."""
    if not dist.is_initialized():
        return value
    total = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(total, group=_control_group())
    return int(total.item())


def of_main(value: T) -> T:
    """What the main rank has, on every rank."""
    if _is_alone():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def of_all_ranks(mine: T) -> list[T]:
    """What each rank has, in the order of ranks, on every rank."""
    if _is_alone():
        return [mine]
    every = [mine] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def shares_of_all_ranks(mine: Mapping[int, T]) -> list[T]:
    """What ranks have by place, each some of it, in the order of places, on every rank; all places from 0 are there."""
    merged = {place: value for part in of_all_ranks(mine) for place, value in part.items()}
    return [merged[place] for place in range(len(merged))]
