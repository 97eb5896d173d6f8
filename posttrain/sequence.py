"""Sequence parallelism: ranks that compute each micro-batch together, a piece of its rows each.

  embedding, norms, MLP, head   of this rank's piece of every row
  attention                     of whole rows, with this rank's share of the heads      (Ulysses: Jacobs et al., 2023, arXiv 2309.14509)

Around attention pieces are swapped for heads: a rank sends to each other of its team, of its own piece, the heads that are the
other's. So attention sees what it always sees, and every layout, mask and kernel stays as it is. What is found of scored tokens is
summed up over the team, so all of its ranks know it whole, and compute the same loss.

N ranks go back from one loss, so gradients of sums are summed up too, and each rank's are N times its part of those of the loss: the
mean over ranks, which DDP and ZeRO take, is right as it is, as if the team were one rank.

Differences from DeepSpeed's `ulysses_sp`: 1. rows need not be filled up to a multiple of N, nor be of one length; 2. one message for
queries, keys and values; 3. losses know nothing of it; 4. the mask is the model's own, made for whole rows.
"""

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import pad
from transformers import AutoConfig

from posttrain.error import UserError
from posttrain.stage import Input, StageContext


@dataclass(frozen=True)
class Team:
    """Consecutive ranks that compute each of their micro-batches together."""

    rank: int
    """Of this process in its team."""
    size: int
    number: int
    """Which of all teams it is."""
    count: int
    process_group: Any = None
    """None where the team is one rank."""

    @property
    def is_alone(self) -> bool:
        """Whether this rank computes its micro-batches by itself."""
        return self.size == 1

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the team, on all its ranks, who all go back from it."""
        total: torch.Tensor = _Sum.apply(values.float(), self.process_group)
        return total.to(values.dtype)


ALONE = Team(rank=0, size=1, number=0, count=1)


def team_of(context: StageContext[Any]) -> Team:
    """This rank's team. All ranks call it."""
    size = context.config.sequence_parallel_size
    number, rank = divmod(context.rank, size)
    return Team(rank, size, number, context.world_size // size, None if size == 1 else _process_group(size))


@functools.cache
def _process_group(size: int) -> Any:
    return dist.new_subgroups(group_size=size)[0]


def check_heads(given: Input, size: int, at: str) -> None:
    """Raise `UserError` where a model has no attention heads that `size` ranks can share equally. Loads no weights."""
    source = given.model
    config: Any = AutoConfig.from_pretrained(source.model, revision=source.revision, trust_remote_code=source.trust_remote_code)
    num_heads = getattr(config.get_text_config(), "num_attention_heads", 0)
    if not num_heads or num_heads % size:
        has = f"has {num_heads} attention heads" if num_heads else "has no attention heads"
        raise UserError(f"{at}.sequence_parallel_size: {given.name} {has}, which {size} ranks cannot share equally; choose another number")


def why_never_exact(config: Any, longest: int) -> str:
    """Why a model cannot compute pieces of rows of that length, where short rows do not show it; empty where they do."""
    rope = getattr(config, "rope_parameters", None) or {}
    for settings in (rope, *(each for each in rope.values() if isinstance(each, dict))):
        if settings.get("rope_type") in ("dynamic", "longrope"):
            limit = settings.get("original_max_position_embeddings") or config.max_position_embeddings
            if longest > limit:
                return f"its positions are turned otherwise in rows of over {limit} tokens, and the longest sequence has {longest}"
    if getattr(config, "attn_temperature_tuning", None) and longest > config.floor_scale:
        return f"its attention counts positions from where it begins to compute, and the longest sequence has {longest} tokens"
    return ""


@dataclass(frozen=True)
class Piece:
    """A rank's piece of rows `(R, L)`: W of their columns, as many on every rank, so that the last ones may go on beyond the end."""

    team: Team
    length: int
    """L."""

    @property
    def width(self) -> int:
        """W."""
        return -(-self.length // self.team.size)

    @property
    def start(self) -> int:
        """The first column of the piece."""
        return self.team.rank * self.width

    def cut(self, rows: torch.Tensor) -> torch.Tensor:
        """This rank's columns of `(R, L)`, `(R, W)`, with 0 beyond the end."""
        return pad(rows, (0, self.width * self.team.size - self.length))[:, self.start : self.start + self.width].contiguous()

    def find(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of places `(n,)` in the rows laid flat, which are in this piece, and where in the piece laid flat, each `(m,)`."""
        columns = places % self.length - self.start
        mine = ((columns >= 0) & (columns < self.width)).nonzero()[:, 0]
        return mine, (places // self.length * self.width + columns)[mine]

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """The rows `(R, L, E)` of which every rank has its columns `(R, W, E)`."""
        after = self.width * self.team.size - self.start - self.width
        return self.team.sum(pad(part, (0, 0, self.start, after)))[:, : self.length]

    def to_heads(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
        """From all heads of the piece to this rank's heads of the rows: `(R, H, W, D)` -> `(R, H / N, L, D)`.

        Keys and values `(R, K, W, D)` are repeated as often as it takes to share them out equally; `module` is then one that
        knows by how many queries each of them is read.
        """
        size, num_keys = self.team.size, key.shape[1]
        times = math.lcm(num_keys, size) // num_keys
        if times > 1:
            key, value = (each[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for each in (key, value))
            told: Any = copy.copy(module)
            told.num_key_value_groups = query.shape[1] // key.shape[1]
            module = told
        tensors = [query, key, value]
        if torch.is_autocast_enabled(query.device.type):
            # Rotation by positions leaves queries and keys in float32, and attention computes in this type anyway.
            tensors = [each.to(torch.get_autocast_dtype(each.device.type)) for each in tensors]
        swapped = self._swap([each.reshape(len(each), size, -1, *each.shape[2:]).movedim(1, 0) for each in tensors])
        query, key, value = (each.movedim(0, 2).flatten(2, 3)[:, :, : self.length] for each in swapped)
        return module, query, key, value

    def to_columns(self, attended: torch.Tensor) -> torch.Tensor:
        """And back: `(R, L, H / N, D)` -> `(R, W, H, D)`."""
        filled = pad(attended, (0, 0, 0, 0, 0, self.width * self.team.size - self.length))
        (swapped,) = self._swap([filled.reshape(len(filled), self.team.size, self.width, *filled.shape[2:]).movedim(1, 0)])
        return swapped.movedim(0, 2).flatten(2, 3)

    def _swap(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of tensors `(N, ...)` part j goes to rank j, whose part for this rank takes its place; all in one message."""
        flat = [each.reshape(len(each), -1) for each in tensors]
        received: torch.Tensor = _Swap.apply(torch.cat(flat, dim=1) if len(flat) > 1 else flat[0], self.team.process_group)
        parts = torch.split(received, [each.shape[1] for each in flat], dim=1)
        return [part.reshape(each.shape) for part, each in zip(parts, tensors, strict=True)]


class _Swap(torch.autograd.Function):
    """Row j of `(N, n)` to rank j, for the row that it has for this one; gradients go the same way back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, process_group: Any) -> torch.Tensor:
        ctx.process_group = process_group
        rows = rows.contiguous()
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows, group=process_group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _Swap.apply(gradients[0], ctx.process_group), None


class _Sum(torch.autograd.Function):
    """The sum over ranks, of whose every one goes back from it."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, process_group: Any) -> torch.Tensor:
        ctx.process_group = process_group
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _Sum.apply(gradients[0], ctx.process_group), None
