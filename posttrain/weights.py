"""Weights on their way to disk: a tensor is put together for the rank that writes it, and for no longer than that.

    tensors in memory -> tensors on disk -> files (`shards`) -> each rank takes what its files hold, a tensor at a time, and writes it

Some architectures have other tensors in memory than on disk, such as all experts of a layer as one. Each tensor is then converted by
itself, by transformers' own rules.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import load_state_dict

from posttrain.footprint import read_header
from posttrain.fsdp import whole
from posttrain.ranks import of_all_ranks
from posttrain.shards import split, write_index
from posttrain.stage import StageContext

Stored = Mapping[str, Callable[[], torch.Tensor]]
"""Tensors where they lie, by name; one is mapped into memory when it is called for, and read as it is used."""


# --- tensors that are shared out among ranks -------------------------------------------------------------------------


@contextlib.contextmanager
def gathered(parameters: Sequence[torch.Tensor], *, modify: bool = False) -> Iterator[None]:
    """The whole of parameters that DeepSpeed ZeRO-3 shards, on every rank; with `modify`, rank 0's changes are kept."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    from posttrain.zero3 import Whole

    with Whole(list(parameters), modifier_rank=0 if modify else None):
        yield


def gather(tensor: torch.Tensor, dtype: torch.dtype | None = None, *, mine: bool) -> torch.Tensor | None:
    """A copy of all of a tensor, on the CPU and cast as by `cast`; None where it is not `mine`. All ranks call it."""
    with gathered([tensor]):
        found = whole(tensor).detach()
        return cast(found, dtype).to("cpu", copy=True).contiguous() if mine else None


def gather_state(tensors: Mapping[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
    """The tensors whole, on the CPU, where `keep`; all ranks must call it."""
    found = {name: gather(tensor, mine=keep) for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor of floating-point numbers in that type, where one is given; any other as it is."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer as it is here; one that is tied to another has one name."""
    persistent = model.state_dict().keys()
    return {**dict(model.named_parameters()), **{name: buffer for name, buffer in model.named_buffers() if name in persistent}}


def convert(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor of a model in memory as the ones that it is on disk, by name; none where others would have to be there too."""
    try:
        return dict(revert_weight_conversion(model, {name: tensor}))
    except (LookupError, ValueError, TypeError, RuntimeError):
        return {}


def describe(tensor: torch.Tensor) -> list[Any]:
    """Shape, type and hash of a tensor's bytes, as plain JSON."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch."), hashlib.sha256(data).hexdigest()]


def open_stored(paths: Sequence[Path]) -> dict[str, Callable[[], torch.Tensor]]:
    """What files of weights hold, safetensors or pickles."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            found |= {name: partial(_read, path, name) for name in read_header(path)}
        else:
            mapped = load_state_dict(path)
            found |= {name: partial(mapped.__getitem__, name) for name in mapped}
    return found


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


# --- writing ---------------------------------------------------------------------------------------------------------


class Weights:
    """The tensors of a model that is to be written, wherever they come from."""

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, torch.Tensor]) -> None:
        """`model` says what class and config they belong to; `shapes` are all tensors by their name in memory, on `meta`."""
        self.model = model
        self.shapes = shapes

    def take(self, name: str, dtype: torch.dtype, *, mine: bool) -> torch.Tensor | None:
        """A tensor, whole, on the CPU, in that type; None where it is not `mine`. All ranks call it, in one order."""
        raise NotImplementedError


class Trained(Weights):
    """The weights of a model as they are in memory, where ranks may each have a part of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._tensors = tensors_of(model)
        whole_shapes = {name: getattr(tensor, "ds_shape", tensor.shape) for name, tensor in self._tensors.items()}
        super().__init__(
            model, {name: torch.empty(shape, dtype=self._tensors[name].dtype, device="meta") for name, shape in whole_shapes.items()}
        )

    def take(self, name: str, dtype: torch.dtype, *, mine: bool) -> torch.Tensor | None:
        return gather(self._tensors[name], dtype, mine=mine)


def write_weights(context: StageContext[Any], weights: Weights, dtype: torch.dtype, max_shard_size: int) -> dict[str, list[Any]]:
    """Write the weights to the stage's output, each rank every n-th file of them. All ranks call it.

    Returns what each tensor in memory is, see `describe`, on every rank.
    """
    converted = _convert_each(weights)
    if converted is None:
        return _write_at_once(context, weights, dtype, max_shard_size)
    names = {stored: name for name, parts in converted.items() for stored in parts}
    on_disk = {stored: cast(part, dtype) for parts in converted.values() for stored, part in parts.items()}
    shared_out = split({stored: part.nbytes for stored, part in on_disk.items()}, max_shard_size)
    files = list(shared_out.filename_to_tensors.items())
    described: dict[str, list[Any]] = {}
    for start in range(0, len(files), context.world_size):  # ranks write at the same time
        held: dict[str, torch.Tensor] = {}
        for number, (_, wanted) in enumerate(files[start : start + context.world_size]):
            for name in dict.fromkeys(names[stored] for stored in wanted):
                tensor = weights.take(name, dtype, mine=number == context.rank)
                if tensor is None:
                    continue
                described[name] = describe(tensor)
                parts = convert(weights.model, name, tensor)
                for stored in parts.keys() & set(wanted):
                    # Parts of one tensor share its memory, which files of weights must not.
                    held[stored] = parts[stored].contiguous() if len(parts) == 1 else parts[stored].clone()
        if held:
            save_file(held, str(context.output / files[start + context.rank][0]), metadata={"format": "pt"})
    if context.is_main:
        write_index(context.output, shared_out, total_parameters=sum(map(torch.Tensor.numel, on_disk.values())))
    return {name: of for part in of_all_ranks(described) for name, of in part.items()}


def _convert_each(weights: Weights) -> dict[str, dict[str, torch.Tensor]] | None:
    """Of each tensor in memory those that it is on disk, by name and on `meta`; None where one on disk is made of several in memory."""
    model = weights.model
    if model.is_remote_code():
        return None  # its code is stored, too
    left_out = set(model._keys_to_ignore_on_save or ())
    shapes = {name: tensor for name, tensor in weights.shapes.items() if name not in left_out}
    each = {name: convert(model, name, tensor) for name, tensor in shapes.items()}
    alone = {stored: part.shape for parts in each.values() for stored, part in parts.items()}
    together = {stored: part.shape for stored, part in revert_weight_conversion(model, dict(shapes)).items()}
    return each if alone == together else None


def _write_at_once(context: StageContext[Any], weights: Weights, dtype: torch.dtype, max_shard_size: int) -> dict[str, list[Any]]:
    """The same by the main rank alone, which holds all of them, for models that only transformers can store."""
    found = {name: weights.take(name, dtype, mine=context.is_main) for name in weights.shapes}
    state = {name: tensor for name, tensor in found.items() if tensor is not None}
    described = {name: describe(tensor) for name, tensor in state.items()}
    if context.is_main:
        weights.model.save_pretrained(context.output, state_dict=state, max_shard_size=max_shard_size)
    return described
