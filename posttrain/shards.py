"""Shards: which tensor of a model lies in which file of weights, named and indexed as transformers does. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from posttrain import disk

WEIGHTS = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"


def split(sizes: Mapping[str, int], max_shard_size: int | str) -> Any:
    """The files for tensors of so many bytes, as `huggingface_hub` splits them. Raises `ValueError` where the largest size is none."""
    return split_state_dict_into_shards_factory(
        dict(sizes), get_storage_size=lambda size: size, filename_pattern=WEIGHTS, max_shard_size=max_shard_size
    )


def write_index(directory: Path, files: Any, **told: int) -> None:
    """Write which file has which tensor, where there are several; `told` stands beside the size of all."""
    if files.is_sharded:
        disk.write_json(directory / INDEX, {"metadata": {**told, **files.metadata}, "weight_map": files.tensor_to_filename})
