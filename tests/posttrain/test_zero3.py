"""What ranks hold of a model under ZeRO-3, held against DeepSpeed's own gathering, and against what lies in the files.

`python -m tests.posttrain.test_zero3 DIRECTORY MODEL` has three ranks put parameters together, and load the model; each writes what it saw.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from posttrain.config import ModelSource
from posttrain.launch.local import free_port
from posttrain.models import load_bare_policy
from posttrain.weights import gather_state, gathered
from tests.conftest import REPOSITORY

NUM_RANKS = 3
SHAPES = {"a number": (1,), "less than a share each": (2,), "fills up": (2, 3), "does not": (7, 5), "in the lower type": (4, 2)}


def test_parameters_are_put_together_and_read_as_they_are(tmp_path: Path, tiny: Path) -> None:
    command = [sys.executable, "-m", "tests.posttrain.test_zero3", str(tmp_path), str(tiny)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-4000:]
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    for each in told:
        assert each == {
            "as DeepSpeed does": True,
            "held afterwards": [0] * len(SHAPES),
            "changed by the first": [1.0] * 35,
            "gathered to read": 0,
        }
    stored = load_file(tiny / "model.safetensors")
    for rank in range(NUM_RANKS):
        loaded = load_file(tmp_path / f"{rank}.safetensors")
        assert stored.keys() <= loaded.keys()
        for name, tensor in stored.items():
            assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), name


def _tell(directory: Path, model: str, rank: int, port: int) -> None:
    import deepspeed

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(NUM_RANKS))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=NUM_RANKS)
    deepspeed.init_distributed("gloo")
    settings = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": NUM_RANKS, "zero_optimization": {"stage": 3}}
    ours, theirs = _share_out(settings), _share_out(settings)
    told: dict[str, Any] = {}
    with _counting_gathers() as num_gathers, deepspeed.zero.GatheredParameters(ours):
        assert num_gathers() > 0, "they would be counted"
    with gathered(ours), deepspeed.zero.GatheredParameters(theirs):
        told["as DeepSpeed does"] = all(torch.equal(one, other) and one.any() for one, other in zip(ours, theirs, strict=True))
    told["held afterwards"] = [parameter.numel() for parameter in ours]
    with gathered(ours, modify=True), torch.no_grad():
        ours[3].fill_(1.0 if rank == 0 else 2.0)
    with deepspeed.zero.GatheredParameters(ours):
        told["changed by the first"] = ours[3].flatten().tolist()
    config = HfDeepSpeedConfig(settings)  # which transformers asks for as long as it lives
    with _counting_gathers() as num_gathers:
        loaded = load_bare_policy(ModelSource(model=model), "sources.base", dtype=torch.float32)
        told["gathered to read"] = num_gathers()
    del config
    save_file(gather_state(dict(loaded.named_parameters()), keep=True), directory / f"{rank}.safetensors")
    (directory / f"{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def _counting_gathers() -> Iterator[Callable[[], int]]:
    """How often DeepSpeed has had ranks put something together since."""
    import deepspeed

    library: Any = deepspeed.comm
    asked: list[str] = []

    def counted(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def gather(*given: Any, **named: Any) -> Any:
            asked.append(name)
            return own(*given, **named)

        return gather

    before = {name: getattr(library, name) for name in ("all_gather", "all_gather_into_tensor", "allgather_fn", "all_gather_coalesced")}
    for name, own in before.items():
        setattr(library, name, counted(name, own))
    yield lambda: len(asked)
    for name, own in before.items():
        setattr(library, name, own)


def _share_out(settings: dict[str, Any]) -> list[torch.nn.Parameter]:
    """Parameters of several shapes, the same on each call, shared out among ranks."""
    import deepspeed

    module = torch.nn.Module()
    numbers = torch.Generator().manual_seed(7)
    for name, shape in SHAPES.items():
        dtype = torch.bfloat16 if "lower" in name else torch.float32
        module.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=numbers).to(dtype)))
    deepspeed.zero.Init(module=module, config_dict_or_path=settings)
    return list(module.parameters())


if __name__ == "__main__":
    where, which, port = Path(sys.argv[1]), sys.argv[2], free_port()
    ranks = [get_context("fork").Process(target=_tell, args=(where, which, rank, port)) for rank in range(NUM_RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))
