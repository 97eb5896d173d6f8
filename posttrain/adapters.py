"""Adapters: merged into the weights that they were trained on, a tensor at a time, by peft's own arithmetic.

    frozen tensor, as it lies on disk -> float32 -> peft's merge of its module -> the type that is published

What was trained whole, such as a head or tables with new tokens, is taken from the trained model. So is all of a model in 4 bits: adapters
that made good for the rounding do not fit weights without it.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import ModulesToSaveWrapper
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops
from transformers.integrations import deepspeed as hf_deepspeed

from posttrain.fsdp import whole
from posttrain.weights import Stored, Weights, cast, convert, gather, gathered, tensors_of

INSIDE = "base_layer."
"""What the names of tensors in a module begin with that has an adapter around it."""


class Adapted(Weights):
    """The weights of a trained model with its adapters merged in, whose frozen ones are read from where they lie."""

    def __init__(self, model: Any, stored: Stored) -> None:
        """`model` is the trained one, with peft around it; `stored` is what it was loaded from."""
        self._trained = model.get_base_model()
        self._adapter: str = model.active_adapter
        self._is_quantized = hasattr(self._trained.config, "quantization_config")
        self._stored = stored
        empty = _empty(self._trained)
        super().__init__(empty, tensors_of(empty))
        self._aliases = _aliases(empty)
        settings = copy.deepcopy(model.peft_config[self._adapter])
        adapted: Any = get_peft_model(_empty(self._trained), settings, self._adapter, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        self._adapters = dict(_adapted_tensors(adapted.get_base_model()))
        self._learned_by = dict(_adapted_tensors(self._trained))

    def take(self, name: str, dtype: torch.dtype, *, mine: bool) -> torch.Tensor | None:
        path, _, last = name.rpartition(".")
        module = self._module(path)
        if name in self._adapters:
            learned = self._learned(name, mine=mine)
            weight = self._frozen(name, module, mine=mine)
            return None if weight is None else cast(self._merge(name, weight, learned), dtype).contiguous()
        tensor = getattr(module, last)
        if tensor.requires_grad:
            return gather(tensor, dtype, mine=mine)
        weight = self._frozen(name, module, mine=mine)
        return None if weight is None else cast(weight, dtype).contiguous()

    def _module(self, path: str) -> Any:
        """The module of that name in the trained model, without what peft has put around it and around those that it is in."""
        module: Any = self._trained
        for part in path.split(".") if path else ():
            module = getattr(module, part)
            if isinstance(module, ModulesToSaveWrapper):
                module = module.modules_to_save[self._adapter]
            elif isinstance(module, BaseTunerLayer):
                module = module.get_base_layer()
        return module

    def _frozen(self, name: str, module: Any, *, mine: bool) -> torch.Tensor | None:
        """A tensor as it was before training, in memory of its own; in float32, where it holds such numbers."""
        last = name.rpartition(".")[2]
        if self._is_quantized:
            tensor = dequantize_module_weight(module) if last == "weight" else getattr(module, last)
            return gather(tensor, torch.float32, mine=mine)
        wanted = self.shapes[name].shape
        # By the names that it may be stored under; else it is something that only loading makes.
        for known in (name, *self._aliases.get(name, ()), *convert(self.model, name, self.shapes[name])):
            if known in self._stored and (found := self._stored[known]()).shape == wanted:
                return found.to(torch.float32 if found.is_floating_point() else found.dtype, copy=True) if mine else None
        return gather(getattr(module, last), torch.float32, mine=mine)

    def _learned(self, name: str, *, mine: bool) -> dict[str, torch.Tensor]:
        """The tensors of an adapter, in float32 on the CPU; none where they are not `mine`."""
        tensors = {part: tensor for part, tensor in self._learned_by[name].named_parameters() if not part.startswith(INSIDE)}
        with gathered(list(tensors.values())):
            found = {part: whole(tensor).detach() for part, tensor in tensors.items()}
            return {part: tensor.to("cpu", torch.float32, copy=True) for part, tensor in found.items()} if mine else {}

    def _merge(self, name: str, weight: torch.Tensor, learned: dict[str, torch.Tensor]) -> torch.Tensor:
        layer, last = self._adapters[name], name.rpartition(".")[2]
        told = layer.load_state_dict(learned, strict=False, assign=True)
        assert not told.unexpected_keys and all(part.startswith(INSIDE) for part in told.missing_keys), told
        base = layer.get_base_layer()
        setattr(base, last, torch.nn.Parameter(weight, requires_grad=False))
        with torch.no_grad():
            layer.merge()
        merged: torch.Tensor = getattr(base, last).detach()
        layer.merged_adapters.clear()
        layer.to("meta")  # nothing of it stays in memory
        return merged


def _adapted_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Names of the tensors that get an adapter, as they are without it, and the module of each adapter; one module may be in another."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            path = ".".join(part for part in name.split(".") if part != INSIDE.rstrip("."))
            yield f"{path}.{getattr(module, 'parameter_name', 'weight')}", module


def _empty(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and config, without adapters and without memory for its weights, which are not in 4 bits."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain: Any = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    sharding = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()  # a class that builds what is inside of it by its config would shard that, and draw weights
    try:
        with torch.device("meta"), meta_device_safe_creation_ops():  # as transformers does
            empty = plain(config)
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = sharding
    if model.can_generate():
        empty.generation_config = model.generation_config
    if hasattr(model, "_weight_conversions"):
        empty._weight_conversions = model._weight_conversions
    return empty  # type: ignore[no-any-return]


def _aliases(model: PreTrainedModel) -> dict[str, list[str]]:
    """Of each tensor that is tied to others, the further names that it has."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return {name: names[1:] for name, names in found.items() if len(names) > 1}
