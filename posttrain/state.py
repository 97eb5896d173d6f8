"""The state of training, taken apart into fragments that depend neither on the number of ranks nor on how they share it out.

Every rank saves the part of each trained weight, and of what the optimizer keeps for it, that it holds: under DDP a share of
the weights whole, under DeepSpeed ZeRO and FSDP a stretch of the flattened weight. Whoever resumes reads the stretches that its
own ranks hold, from whichever files they lie in. So a run goes on with another number of ranks, and sharded in another way.

  file key   KEY:NAME    `weight`, or a key of the optimizer's state such as `exp_avg`, of the parameter NAME
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch.optim import Optimizer

from posttrain import disk
from posttrain.fsdp import alike, is_sharded, reshard, stretch

WEIGHT = "weight"
FLAT_GROUPS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
"""Where DeepSpeed's optimizers keep this rank's weights in fp32: ZeRO-1 and 2, bf16 without ZeRO, ZeRO-3."""


@dataclass(frozen=True)
class Fragment:
    """A stretch of a flattened parameter that this rank holds, and what its optimizer keeps for it."""

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, torch.Tensor]
    """`weight` and state by its key: `(n,)` elements from `start` on, or, where it is of another size, whole."""
    scalars: dict[str, Any] = field(default_factory=dict)
    """State that is one number, such as `step`."""


# --- what this rank holds --------------------------------------------------------------------------------------------


def base_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer of torch below the wrappers of accelerate and DeepSpeed."""
    while not isinstance(optimizer, Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def zero_optimizer(engine: Any) -> Any:
    """DeepSpeed's optimizer if it shards weights or keeps copies of them, else None."""
    optimizer = getattr(engine, "optimizer", None)
    return optimizer if any(hasattr(optimizer, groups) for groups in FLAT_GROUPS) else None


def fragments(model: torch.nn.Module, engine: Any, optimizer: Any, *, rank: int, world_size: int) -> Iterator[Fragment]:
    """What this rank is to save of `model`, the bare one; `engine` is what trains it. No rank needs another for it.

    Raises `ValueError` where the optimizer keeps what cannot be saved.
    """
    reshard(model)
    zero = zero_optimizer(engine)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if zero is None and not is_sharded(model):
        yield from _whole_fragments(_share([*trained, *_buffers(model)], rank, world_size), base_optimizer(optimizer))
        return
    for name, parameter in trained:
        fragment = _rows_fragment(name, parameter, optimizer) if zero is None else _sharded_fragment(name, parameter, zero)
        if fragment is not None:
            yield fragment
    yield from _whole_fragments(_share(_buffers(model), rank, world_size), None)


def _buffers(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    persistent = model.state_dict(keep_vars=True).keys() - {name for name, _ in model.named_parameters()}
    return [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]


def _share(tensors: list[tuple[str, Any]], rank: int, world_size: int) -> list[tuple[str, Any]]:
    """The tensors that this rank saves of those that every rank holds: all ranks about as many bytes."""
    load = [0] * world_size
    mine = []
    for name, tensor in sorted(tensors, key=lambda pair: -pair[1].numel()):
        least = load.index(min(load))
        load[least] += tensor.numel()
        if least == rank:
            mine.append((name, tensor))
    return mine


def _whole_fragments(tensors: list[tuple[str, Any]], optimizer: Optimizer | None) -> Iterator[Fragment]:
    for name, tensor in tensors:
        state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
        found, scalars = _split_state(state)
        flat = {key: value.flatten() if value.numel() == tensor.numel() else value for key, value in found.items()}
        yield Fragment(name, tuple(tensor.shape), 0, {WEIGHT: tensor.detach().flatten(), **flat}, scalars)


def _split_state(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for key, value in state.items():
        if torch.is_tensor(value) and value.ndim:
            tensors[key] = value.detach()
        elif torch.is_tensor(value) or isinstance(value, (int, float, bool)):
            scalars[key] = {"value": value.item() if torch.is_tensor(value) else value, "is_tensor": torch.is_tensor(value)}
        elif value is not None:
            raise ValueError(f"its {key} is a {type(value).__name__}, which a checkpoint cannot hold")
    return tensors, scalars


def _rows_fragment(name: str, parameter: Any, optimizer: Any) -> Fragment | None:
    start, rows = stretch(parameter)
    if not rows.numel():
        return None
    found, scalars = _split_state(base_optimizer(optimizer).state.get(parameter, {}))
    tensors = {WEIGHT: rows}
    for key, value in found.items():
        if value.shape != parameter.shape:
            raise ValueError(f"its {key} cannot be split among ranks as FSDP does")
        tensors[key] = stretch(value)[1]  # type: ignore[arg-type]
    return Fragment(name, tuple(parameter.shape), start, tensors, scalars)


def _sharded_fragment(name: str, parameter: Any, zero: Any) -> Fragment | None:
    flat = _flat_of(parameter, zero)
    if flat is None:
        return None
    group, offset, start, numel, shape = flat
    state = zero.optimizer.state.get(group, {})
    tensors = {WEIGHT: group.detach().narrow(0, offset, numel)}
    found, scalars = _split_state(state)
    for key, value in found.items():
        if value.shape != group.shape:
            raise ValueError(f"its {key} cannot be split among ranks as DeepSpeed does")
        tensors[key] = value.narrow(0, offset, numel)
    return Fragment(name, shape, start, tensors, scalars)


def _flat_of(parameter: Any, zero: Any) -> tuple[torch.Tensor, int, int, int, tuple[int, ...]] | None:
    """Where this rank's stretch of a parameter lies: the flat fp32 tensor, the offset in it, start and length in the parameter,
    and the parameter's shape; None where it holds nothing of it."""
    if hasattr(parameter, "ds_id"):
        group_index, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
        start = padded * zero._get_param_partition_rank(parameter)
        numel = min(padded, parameter.ds_numel - start)  # the last rank's stretch is filled up
        if numel <= 0:
            return None
        return zero.fp32_partitioned_groups_flat[group_index], offset, start, numel, tuple(parameter.ds_shape)
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    groups = next(getattr(zero, name) for name in FLAT_GROUPS if hasattr(zero, name))
    group = groups[mapping.param_group_index]
    lies, stretch = mapping.hp_fragment_address, mapping.lp_fragment_address
    return group, lies.start, stretch.start, stretch.numel, tuple(parameter.shape)


# --- files -----------------------------------------------------------------------------------------------------------


def weights_file(rank: int) -> str:
    """Name of the file that holds a rank's fragments."""
    return f"rank_{rank:05d}.safetensors"


def record_file(rank: int) -> str:
    """Name of the file that says what they are."""
    return f"rank_{rank:05d}.json"


@dataclass(frozen=True)
class _Piece:
    file: str
    start: int
    numel: int


class Saved:
    """Reads the fragments of a checkpoint, whichever ranks wrote them."""

    def __init__(self, path: Path, world_size: int) -> None:
        self._path = path
        self.records: list[dict[str, Any]] = [disk.read_json(path / record_file(rank)) for rank in range(world_size)]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.scalars: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, list[str]] = {}
        """Keys of the tensors of each parameter."""
        self._pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        for rank, record in enumerate(self.records):
            for name, said in record["fragments"].items():
                self.shapes[name] = tuple(said["shape"])
                self.scalars[name] = said["scalars"]
                self.keys[name] = list(said["tensors"])
                for key, numel in said["tensors"].items():
                    self._pieces[key, name].append(_Piece(weights_file(rank), said["start"], numel))

    @cached_property
    def _files(self) -> dict[str, Any]:
        files = {weights_file(rank) for rank in range(len(self.records))}
        return {file: safe_open(self._path / file, framework="pt") for file in files if (self._path / file).is_file()}

    def read(self, key: str, name: str, start: int, numel: int) -> torch.Tensor:
        """`(numel,)` elements of a flattened tensor from `start` on. Raises `ValueError` where the files do not hold them all."""
        found = None
        missing = numel
        for piece in self._pieces[key, name]:
            first, last = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if first < last:
                part = self._files[piece.file].get_slice(f"{key}:{name}")[first - piece.start : last - piece.start]
                if last - first == numel:
                    return part  # type: ignore[no-any-return]
                found = torch.empty(numel, dtype=part.dtype) if found is None else found
                found[first - start : last - start] = part
                missing -= last - first
        if found is None or missing:
            raise ValueError(f"{key} of {name} is not all there")
        return found

    def read_whole(self, key: str, name: str) -> torch.Tensor:
        """A tensor of another size than its parameter, as it was saved."""
        (piece,) = self._pieces[key, name]
        tensor: torch.Tensor = self._files[piece.file].get_tensor(f"{key}:{name}")
        return tensor


def restore(saved: Saved, model: torch.nn.Module, engine: Any, optimizer: Any) -> None:
    """Fill the model and its optimizer with what was saved. All ranks call it.

    Raises `ValueError` where the checkpoint has other weights than the model trains.
    """
    reshard(model)
    wanted = {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    wanted |= {name: tuple(buffer.shape) for name, buffer in _buffers(model)}
    for name in sorted(wanted.keys() | saved.shapes.keys()):
        if wanted.get(name) != saved.shapes.get(name):
            raise ValueError(
                f"{name} is {saved.shapes.get(name, 'not there')} in the checkpoint and {wanted.get(name, 'not there')} in training"
            )
    for name, buffer in _buffers(model):
        buffer.copy_(saved.read(WEIGHT, name, 0, buffer.numel()).view(buffer.shape))
    zero = zero_optimizer(engine)
    base = base_optimizer(optimizer)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if zero is not None:
        _restore_sharded(saved, trained, zero, base)
    elif is_sharded(model):
        _restore_rows(saved, trained, base)
    else:
        _restore_whole(saved, trained, base)


def _restore_whole(saved: Saved, trained: list[tuple[str, Any]], optimizer: Optimizer) -> None:
    names = {id(parameter): name for name, parameter in trained}
    states: dict[int, dict[str, Any]] = {}
    for index, parameter in enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]):
        name = names[id(parameter)]
        with torch.no_grad():
            parameter.copy_(saved.read(WEIGHT, name, 0, parameter.numel()).view(parameter.shape))
        state: dict[str, Any] = {key: _scalar(said) for key, said in saved.scalars[name].items()}
        for key in saved.keys[name]:
            if key != WEIGHT:
                state[key] = (
                    saved.read_whole(key, name)
                    if _is_odd(saved, key, name)
                    else saved.read(key, name, 0, parameter.numel()).view(parameter.shape)
                )
        if state:
            states[index] = state
    # It knows on which device each of these belongs.
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _is_odd(saved: Saved, key: str, name: str) -> bool:
    return sum(piece.numel for piece in saved._pieces[key, name]) != int(np.prod(saved.shapes[name]))


def _scalar(said: dict[str, Any]) -> Any:
    return torch.tensor(said["value"], dtype=torch.float32) if said["is_tensor"] else said["value"]


def _restore_rows(saved: Saved, trained: list[tuple[str, Any]], optimizer: Optimizer) -> None:
    is_fused = bool(optimizer.defaults.get("fused"))
    for name, parameter in trained:
        start, rows = stretch(parameter)
        state: dict[str, Any] = {}
        for key in saved.keys[name]:
            if _is_odd(saved, key, name):
                raise ValueError(f"{key} of {name} cannot be split among ranks")
            # Where there are more ranks than rows, some have none.
            read = saved.read(key, name, start, rows.numel()).to(rows.device) if rows.numel() else torch.empty_like(rows)
            if key == WEIGHT:
                rows.copy_(read)
            else:
                state[key] = alike(parameter, read)
        for key, said in saved.scalars[name].items():
            value = _scalar(said)
            state[key] = value.to(rows.device) if torch.is_tensor(value) and is_fused else value
        optimizer.state[parameter] = state


def _restore_sharded(saved: Saved, trained: list[tuple[str, Any]], zero: Any, optimizer: Optimizer) -> None:
    is_fused = bool(optimizer.defaults.get("fused"))
    flats: dict[int, torch.Tensor] = {}
    for name, parameter in trained:
        found = _flat_of(parameter, zero)
        if found is None:
            continue
        flat, offset, start, numel, _ = found
        if id(flat) not in flats:
            flats[id(flat)] = flat
            optimizer.state[flat] = {}
        state = optimizer.state[flat]
        flat.data.narrow(0, offset, numel).copy_(saved.read(WEIGHT, name, start, numel))
        for key in saved.keys[name]:
            if key != WEIGHT:
                if _is_odd(saved, key, name):
                    raise ValueError(f"{key} of {name} cannot be split among ranks")
                state.setdefault(key, torch.zeros_like(flat)).narrow(0, offset, numel).copy_(saved.read(key, name, start, numel))
        for key, said in saved.scalars[name].items():
            value = _scalar(said)
            state[key] = value.to(flat.device) if torch.is_tensor(value) and is_fused else value
    if hasattr(zero, "update_lp_params"):
        zero._hp_optimizer_states_linked = False
        zero.update_lp_params()
    else:
        for index in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(index)


# --- random numbers --------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The state of all random numbers of this rank, as plain JSON."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go on with the random numbers where they were when `state` was taken."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).clone()
