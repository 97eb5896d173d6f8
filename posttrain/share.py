"""A rank's share of a model: the rows that FSDP leaves it, read from files of weights without the rest.

    model without memory -> names and shapes of the files held against it -> each parameter as a DTensor, still empty
        -> transformers reads of each tensor the rows that such a parameter has here, converts, renames and ties it -> `fsdp.shard`

So what is loaded is what `from_pretrained` loads, bit for bit. Parameters stay whole that something is yet to be done to which wants all
of their rows: new heads, and tables that get new tokens. Where a rank cannot read its rows alone it reads everything, and says why.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)

from posttrain.footprint import read_header
from posttrain.fsdp import mesh
from posttrain.recipe import TrainingConfig

WHOLE = "each rank reads all of {}, and not its rows alone: {}"
"""What the log says where a rank holds more of a model than it will in training."""


def mesh_to_read_on(config: TrainingConfig, world_size: int) -> DeviceMesh | None:
    """The ranks that are each to read their rows of a stage's model; None where each is to read all of it. All ranks call it."""
    if config.fsdp is None or world_size == 1:
        return None
    if config.lora is not None and config.lora.use_dora:
        print(WHOLE.format("the model", "DoRA begins with the lengths of whole weights"), flush=True)
        return None
    return mesh(world_size)


@contextmanager
def reading_rows(ranks: DeviceMesh | None, *, new: Collection[str] = (), whole_tables: bool = False) -> Iterator[None]:
    """Have `from_pretrained` give a model whose parameters are DTensors, of which each rank has its rows. All ranks enter it.

    Whole stay parameters that may be `new`, by name, and with `whole_tables` those that have a vector for each token. Nothing is changed
    where no ranks are given.
    """
    if ranks is None:
        yield
        return
    # Between the model without memory and the reading of weights there is no place of transformers' own for it.
    library: Any = PreTrainedModel
    own: Callable[..., Any] = library._load_pretrained_model

    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *further: Any) -> Any:
        files = list(map(Path, checkpoint_files or ()))
        why = _obstacle(model, files, load_config, new)
        if why is None:
            mixed = _mixed(model, files, load_config, ranks.size())
            if mixed:
                print(WHOLE.format(f"{mixed[0]}, one of {len(mixed)}", "its rows are put together from those of others"), flush=True)
            _hold_rows(model, ranks, {*new, *mixed}, whole_tables=whole_tables)
        else:
            print(WHOLE.format("the model", why), flush=True)
        return own(model, state_dict, checkpoint_files, load_config, *further)

    library._load_pretrained_model = staticmethod(load)
    try:
        yield
    finally:
        library._load_pretrained_model = staticmethod(own)


def _obstacle(model: Any, files: Sequence[Path], load_config: Any, new: Collection[str]) -> str | None:
    """Why a model cannot be read by rows, None where it can. Reads headers alone, and leaves the model without memory."""
    if model.is_remote_code():
        return "it brings code of its own"
    if load_config.hf_quantizer is not None:
        return "its weights are quantized"
    if not files or any(file.suffix != ".safetensors" for file in files):
        return "its weights are no safetensors"
    without_memory = replace(load_config, device_map={"": "meta"}, weight_mapping=copy.deepcopy(load_config.weight_mapping))
    told, _ = convert_and_load_state_dict_in_model(model, _stored(files), without_memory)
    if wrong := sorted({name for name, *_ in told.mismatched_keys} | told.conversion_errors.keys()):
        return f"{wrong[0]} is of another shape in its files"
    if missing := sorted(told.missing_keys - set(model.all_tied_weights_keys) - set(new)):
        return f"{missing[0]} is not in its files"
    return None


def _stored(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for file in files for name, (_, shape) in read_header(file).items()}


def _mixed(model: Any, files: Sequence[Path], load_config: Any, num_ranks: int) -> list[str]:
    """Names of parameters that are converted while they are read, whose rows on a rank are not made of such rows of what is stored."""
    mapping = copy.deepcopy(load_config.weight_mapping or [])
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = model.state_dict()
    found: set[str] = set()
    for stored in sorted(_stored(files), key=dot_natural_key):  # some rules remember what came before, so in transformers' order
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
        if pattern is None or name not in known:
            continue
        converter = by_pattern[pattern]
        first, *others = converter.target_patterns
        made = {name, *(name.replace(first, target) for target in others)}
        if len(made) <= len(others) or not made <= known.keys():
            return sorted(known)  # which ones it makes cannot be told
        if not all(map(_keeps_rows, converter.operations)) or any(_leaves_none(known[each].shape[0], num_ranks) for each in made):
            found |= made
    return sorted(found)


def _keeps_rows(operation: Any) -> bool:
    """Whether what it makes of some rows of each tensor, or of tensors that are a row each, are those rows of what it makes of all."""
    match operation:
        case MergeModulelist():
            return operation.dim == 0
        case Concatenate() | Chunk() | Interleave():
            return operation.dim > 0
        case Transpose():
            return min(operation.dim0, operation.dim1) > 0 and not operation.check_dims  # by which it would hold rows against the whole
    return False


def _leaves_none(num_rows: int, num_ranks: int) -> bool:
    """Whether the last rank has none of so many rows."""
    return num_rows <= -(-num_rows // num_ranks) * (num_ranks - 1)


def _hold_rows(model: Any, ranks: DeviceMesh, whole_names: Collection[str], *, whole_tables: bool) -> None:
    """Put an empty DTensor in the place of each parameter but those that stay whole."""
    head = model.get_output_embeddings()
    tables = [model.get_input_embeddings(), head] if whole_tables else []
    whole = {id(parameter) for name, parameter in model.named_parameters() if name in whole_names}
    whole |= {id(table.weight) for table in tables if table is not None}
    whole.add(id(getattr(head, "bias", None)))  # which is filled up to the table that the head is tied to
    held: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim and id(parameter) not in whole:
                setattr(module, name, held.setdefault(id(parameter), _empty_rows(parameter, ranks)))


def _empty_rows(parameter: torch.nn.Parameter, ranks: DeviceMesh) -> torch.nn.Parameter:
    shape, _ = compute_local_shape_and_global_offset(parameter.shape, ranks, [Shard(0)])
    local = torch.empty(shape, dtype=parameter.dtype, device="meta")
    placed: Any = DTensor.from_local(local, ranks, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride())
    return torch.nn.Parameter(placed, requires_grad=parameter.requires_grad)
