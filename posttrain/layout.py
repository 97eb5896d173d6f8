"""Layouts: how the sequences of a micro-batch lie in the tensors that a model computes.

  padded   one row for each sequence, filled up to the longest                    any model
  packed   all sequences end to end in one row: nothing is computed for padding
  shared   packed, and what the branches of a group begin with alike (the prompt of a pair, or of G completions) lies there once

In the last two only attention sees sequences: its queries, keys and values are gathered into one row for each branch, with
the prompt before it, and what each branch owns is put back. So attention is causal attention as ever, by whatever kernel is
there (SDPA on a CPU, variable-length FlashAttention on a GPU), with no mask whose size is the square of the row; and
positions begin anew in each branch. The first token of every branch is predicted from the last of the prompt.

Kindred: Wang & Hegde, 2024 (arXiv 2410.20305), who mask one row instead.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from posttrain.attention import attend
from posttrain.batch import Indices, Sizes
from posttrain.data.samples import IGNORED
from posttrain.sequence import Piece

Layout = Literal["shared", "packed", "padded"]
PREFIX = "posttrain_"
"""Put before the name of an attention backend, for the one that knows layouts and leaves all else to that backend."""
ALIKE = 0.8
"""Sequences are attended together if none is shorter than this share of the longest of them."""


@dataclass(frozen=True)
class Group:
    """Sequences that begin with the same tokens: one conversation, a pair, or a prompt and G completions.

    `prefix` `(P,)` is what they share, empty for a lone one; `branches` are what follows, each `(T,)`; of each branch's tokens
    `counted` says which are scored. The first token of a sequence is predicted from nothing, so it cannot be counted.
    """

    prefix: Sequence[int]
    branches: Sequence[Sequence[int]]
    counted: Sequence[Sequence[bool]]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prefix and branch."""
        return len(self.prefix) + max(map(len, self.branches))

    def num_tokens(self, layout: Layout) -> int:
        """Tokens that a model computes for it, padding not counted."""
        shared = len(self.prefix) * (1 if layout == "shared" else len(self.branches))
        return shared + sum(map(len, self.branches))


def pair_group(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Group:
    """A prompt and its answers, all tokens of which are scored."""
    return Group(prompt, answers, [[True] * len(answer) for answer in answers])


def measure(groups: Sequence[Group], layout: Layout) -> Sizes:
    """What groups cost in a layout."""
    return Sizes(
        np.array([group.longest for group in groups], dtype=np.int64),
        np.array([group.num_tokens(layout) for group in groups], dtype=np.int64),
        np.array([len(group.branches) for group in groups], dtype=np.int64),
        is_padded=layout == "padded",
    )


def conversation_group(ids: Sequence[int], counted: Sequence[bool]) -> Group:
    """One sequence by itself."""
    return Group([], [ids], [counted])


def grid(groups: Sequence[Group], pad: int) -> dict[str, torch.Tensor]:
    """The padded layout: `input_ids`, `attention_mask` and `labels`, each `(S, L)`, for S sequences of at most L tokens.

    Sequences are numbered branch by branch, as TRL has pairs: the first branches of all groups, then the second ones.
    """
    input_ids = np.full((sum(len(group.branches) for group in groups), max(group.longest for group in groups)), pad, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    labels = np.full_like(input_ids, IGNORED)
    for (number, branch), row in number_sequences(groups).items():
        group = groups[number]
        start, end = len(group.prefix), len(group.prefix) + len(group.branches[branch])
        input_ids[row, :start], input_ids[row, start:end] = group.prefix, group.branches[branch]
        mask[row, :end] = 1
        labels[row, start:end] = np.where(group.counted[branch], group.branches[branch], IGNORED)
    labels[:, 0] = IGNORED
    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask), "labels": torch.from_numpy(labels)}


def number_sequences(groups: Sequence[Group]) -> dict[tuple[int, int], int]:
    """The row of each sequence in a grid, given as group and branch; in the order of rows."""
    branches = max(len(group.branches) for group in groups)
    there = [(number, branch) for branch in range(branches) for number in range(len(groups)) if branch < len(groups[number].branches)]
    return {sequence: row for row, sequence in enumerate(there)}


def lay_out(groups: Sequence[Group], layout: Literal["shared", "packed"]) -> dict[str, Any]:
    """The tensors of a packed or shared layout, for `attach`ed models; sequences are numbered as in `grid`.

    `input_ids`, `position_ids` `(1, N)`; for each bunch of sequences of like length `rows` `(S, L)`, the packed place of every
    token of a sequence (0 where it ended); `owned` `(N,)`, where among all rows laid flat the output for a packed token stands;
    `copies`, further such places of tokens that several branches read, with the tokens they are of; `predictors` and `targets`
    `(n,)`, the packed place before each scored token, and its id; `places` `(n,)`, its place in the flattened `(S, L - 1)` grid
    of next-token scores; `lengths_q`, `lengths_k` `(S,)`, tokens that a sequence owns, and that it reads, and `keys`, the latter.
    """
    ids: list[int] = []
    positions: list[Indices] = []
    sequences: list[Indices] = []  # of each, the packed place of all its tokens
    num_owned: list[int] = []
    predictors: list[Indices] = []
    targets: list[Indices] = []
    places: list[Indices] = []
    width = max(group.longest for group in groups)
    rows = number_sequences(groups)
    for number, group in enumerate(groups):
        prefix: Indices = np.empty(0, dtype=np.int64)
        before = len(group.prefix)
        for branch, (tokens, counted) in enumerate(zip(group.branches, group.counted, strict=True)):
            is_first = branch == 0 or layout == "packed"
            own = [*group.prefix, *tokens] if is_first else list(tokens)
            here = np.arange(len(ids), len(ids) + len(own))
            ids += own
            whole = here if is_first else np.concatenate([prefix, here])
            positions.append(np.arange(len(whole) - len(own), len(whole)))
            prefix = whole[:before]
            scored = before + np.flatnonzero(np.asarray(counted, dtype=bool))
            scored = scored[scored > 0]
            predictors.append(whole[scored - 1])
            targets.append(np.asarray(tokens, dtype=np.int64)[scored - before])
            places.append(rows[number, branch] * (width - 1) + scored - 1)
            sequences.append(whole)
            num_owned.append(len(own))
    laid: dict[str, Any] = {
        "input_ids": _tensor(np.asarray(ids, dtype=np.int64))[None],
        "position_ids": _tensor(np.concatenate(positions))[None],
        "predictors": _tensor(np.concatenate(predictors)),
        "targets": _tensor(np.concatenate(targets)),
        "places": _tensor(np.concatenate(places)),
        "lengths_q": _tensor(np.asarray(num_owned)),
        "lengths_k": _tensor(np.asarray([len(sequence) for sequence in sequences])),
        "keys": _tensor(np.concatenate(sequences)),
    }
    return laid | _bunches(sequences, num_owned, len(ids))


def _bunches(sequences: Sequence[Indices], num_owned: Sequence[int], num_tokens: int) -> dict[str, Any]:
    """Sequences as rows of one or more rectangles, and where the packed tokens stand in them."""
    order = sorted(range(len(sequences)), key=lambda sequence: -len(sequences[sequence]))
    bunches: list[list[int]] = []
    for sequence in order:
        if not bunches or len(sequences[sequence]) < ALIKE * len(sequences[bunches[-1][0]]):
            bunches.append([])
        bunches[-1].append(sequence)
    owned = np.zeros(num_tokens, dtype=np.int64)
    copies: list[tuple[Indices, Indices]] = []
    rows, before = [], 0
    for bunch in bunches:
        width = len(sequences[bunch[0]])
        table = np.zeros((len(bunch), width), dtype=np.int64)
        for row, sequence in enumerate(bunch):
            whole = sequences[sequence]
            table[row, : len(whole)] = whole
            place = np.arange(before + row * width, before + row * width + len(whole))
            num_read = len(whole) - num_owned[sequence]
            owned[whole[num_read:]] = place[num_read:]
            if num_read:
                copies.append((whole[:num_read], place[:num_read]))
        rows.append(_tensor(table))
        before += table.size
    return {
        "rows": rows,
        "owned": _tensor(owned),
        "copies": _rounds(copies),
    }


def _rounds(copies: Sequence[tuple[Indices, Indices]]) -> list[torch.Tensor]:
    """Copies as pairs `(2, n)` of packed places and where they stand, such that no packed place comes twice in one of them."""
    rounds: list[list[tuple[Indices, Indices]]] = []
    seen: dict[int, int] = {}
    for packed, place in copies:
        number = seen.get(int(packed[0]), 0)
        seen[int(packed[0])] = number + 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append((packed, place))
    return [_tensor(np.stack([np.concatenate(side) for side in zip(*each, strict=True)])) for each in rounds]


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


# --- attention -------------------------------------------------------------------------------------------------------


class Unsupported(Exception):
    """The attention of a model does something that the packed layouts do not do."""


class _Spread(torch.autograd.Function):
    """Packed `(N, ...)` to places `(M, ...)`: each place reads one packed token, and unused places any.

    The gradient of a packed token is that of the place it owns, and of its copies. `index_select` would add up all places one
    by one, the unused ones too.
    """

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, places: torch.Tensor, owned: torch.Tensor, copies: list[torch.Tensor]) -> torch.Tensor:
        ctx.owned, ctx.copies = owned, copies
        return packed.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        packed = gradient.index_select(0, ctx.owned)
        for tokens, places in ctx.copies:
            packed.index_copy_(0, tokens, packed.index_select(0, tokens) + gradient.index_select(0, places))
        return packed, None, None, None


class _Collect(torch.autograd.Function):
    """Places `(M, ...)` to packed `(N, ...)`: each packed token reads the place it owns."""

    @staticmethod
    def forward(ctx: Any, places: torch.Tensor, owned: torch.Tensor) -> torch.Tensor:
        ctx.owned, ctx.num_places = owned, len(places)
        return places.index_select(0, owned)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        spread = gradient.new_zeros((ctx.num_places, *gradient.shape[1:]))
        return spread.index_copy_(0, ctx.owned, gradient), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, laid: dict[str, Any], scaling: float | None, dropout: float
) -> torch.Tensor:
    """Causal attention of every sequence to itself. `query` `(N, H, D)`, `key`, `value` `(N, K, D)`; returns `(N, H, D)`."""
    rows, owned, copies = laid["rows"], laid["owned"], laid["copies"]
    flat = torch.cat([table.reshape(-1) for table in rows]) if len(rows) > 1 else rows[0].reshape(-1)
    # Of a query only the owned place is used, so only that one has a gradient.
    query = _Spread.apply(query, flat, owned, [])
    key = _Spread.apply(key, flat, owned, copies)
    value = _Spread.apply(value, flat, owned, copies)
    outputs, before = [], 0
    for table in rows:
        num_rows, width = table.shape
        q, k, v = (
            whole[before : before + num_rows * width].view(num_rows, width, *whole.shape[1:]).transpose(1, 2)
            for whole in (query, key, value)
        )
        output = attend(q, k, v, scale=scaling, dropout=dropout)
        outputs.append(output.transpose(1, 2).reshape(num_rows * width, *output.shape[1::2]))
        before += num_rows * width
    collected: torch.Tensor = _Collect.apply(torch.cat(outputs) if len(outputs) > 1 else outputs[0], owned)
    return collected


def _attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, laid: dict[str, Any], scaling: float | None
) -> torch.Tensor:
    """The same by a kernel for sequences of unlike lengths: of a later branch only its own queries are computed.

    Its causal mask is aligned to the ends of queries and keys, so a branch's first query sees the whole prompt.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.varlen import varlen_attn

    starts_q, starts_k = (torch.nn.functional.pad(laid[name].cumsum(0), (1, 0)).to(torch.int32) for name in ("lengths_q", "lengths_k"))
    longest = max(table.shape[1] for table in laid["rows"])
    if laid["copies"]:
        key, value = key.index_select(0, laid["keys"]), value.index_select(0, laid["keys"])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output: Any = varlen_attn(
            query,
            key,
            value,
            starts_q,
            starts_k,
            longest,
            longest,
            scale=scaling,
            window_size=(-1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output  # type: ignore[no-any-return]


def _attention_for(original: str) -> Any:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        laid: dict[str, Any] | None = None,
        piece: Piece | None = None,
        **more: Any,
    ) -> tuple[torch.Tensor, Any]:
        if piece is not None:
            _check_piece(piece, query, key, attention_mask, more)
            more.pop("position_ids", None)  # those of the piece; what a mask says of whole rows is said by the mask
            module, query, key, value = piece.to_heads(module, query, key, value)
            attended, _ = attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, laid=laid, **more)
            return piece.to_columns(attended), None
        if laid is None:
            output: tuple[torch.Tensor, Any] = ALL_ATTENTION_FUNCTIONS[original](
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **more
            )
            return output
        longest = max(table.shape[1] for table in laid["rows"])
        window = more.get("sliding_window")
        if attention_mask is not None or query.shape[2] != key.shape[2] or (window is not None and window < longest):
            raise Unsupported("an attention mask of its own")
        for name in ("softcap", "s_aux", "position_bias"):
            if more.get(name) is not None:
                raise Unsupported(f"attention with {name}")
        if more.get("is_causal") is False or not getattr(module, "is_causal", True):
            raise Unsupported("attention that is not causal")
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        device = q.device.type
        if torch.is_autocast_enabled(device):
            # Rotation by positions leaves queries and keys in float32. Plain attention is one of autocast's own, the others are not.
            q, k, v = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (q, k, v))
        fits_varlen = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and not dropout and q.shape[-1] == v.shape[-1]
        attended = _attend_varlen(q, k, v, laid, scaling) if fits_varlen else _attend(q, k, v, laid, scaling, dropout)
        return attended[None], None

    return attention


def _check_piece(piece: Piece, query: torch.Tensor, key: torch.Tensor, mask: Any, more: dict[str, Any]) -> None:
    """Raise `Unsupported` where attention of this rank's heads to whole rows is not what the model wants."""
    if query.shape[1] % piece.team.size:
        raise Unsupported(f"attention with {query.shape[1]} heads, which {piece.team.size} ranks cannot share equally")
    if not query.shape[2] == key.shape[2] == piece.width:
        raise Unsupported("attention to something else than the tokens before")
    if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[1] > 1:
        raise Unsupported("an attention mask for each head")
    for name, value in more.items():
        if isinstance(value, torch.Tensor) and name != "position_ids":
            raise Unsupported(f"attention with {name}")


def teach_attention(model: PreTrainedModel) -> None:
    """Let the model's attention know layouts, by a backend that leaves every other call to the one it has. Raises `Unsupported`."""
    original = model.config._attn_implementation
    if original.startswith(PREFIX):
        return
    if original not in ALL_ATTENTION_FUNCTIONS or original not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise Unsupported(f"the attention backend {original}")
    name = PREFIX + original
    AttentionInterface.register(name, _attention_for(original))
    AttentionMaskInterface.register(name, _mask_for(original))
    model.set_attn_implementation(name)


def restore_attention(model: PreTrainedModel) -> None:
    """Take `teach_attention` back."""
    model.set_attn_implementation(model.config._attn_implementation.removeprefix(PREFIX))


Masks = Literal["own", "none", "whole"]
_masks: ContextVar[Masks] = ContextVar("_masks", default="own")


def _mask_for(original: str) -> Any:
    make = ALL_MASK_ATTENTION_FUNCTIONS[original]

    def mask(**values: Any) -> Any:
        masks = _masks.get()
        if masks == "none":
            return None
        # There are as many keys as the rows' own mask has columns, and queries are told by the piece.
        return make(**(values | {"q_length": values["kv_length"]} if masks == "whole" else values))

    return mask


@contextmanager
def making_masks(masks: Masks) -> Iterator[None]:
    """Which masks a model makes while it computes: none in a packed layout, where `(N, N)` would be the largest tensor of all, and
    those of whole rows where it computes a piece of them."""
    token = _masks.set(masks)
    try:
        yield
    finally:
        _masks.reset(token)
