"""Two ranks that each read their rows of a model hold what one process loads, bit for bit, and no more than their share of it."""

import json
import shutil
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    HrmTextConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

from posttrain import fsdp
from posttrain.share import mesh_to_read_on, reading_rows
from tests.conftest import REPOSITORY
from tests.posttrain.test_fsdp import FSDP, Cli, stage_file, train

NUM_RANKS = 2
# Of an odd number of rows the ranks have unlike shares.
SMALL: dict[str, Any] = {"vocab_size": 65, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=False),
    "tied": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    "experts": MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3),
    "one expert": MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=1, num_experts_per_tok=1),
    "gpt2": GPT2Config(vocab_size=65, n_positions=32, n_embd=32, n_layer=2, n_head=4),
    "fused": HrmTextConfig(**SMALL, head_dim=8),
}
STORED = torch.bfloat16
WHOLE = {  # what a rank reads all of, and why
    "one expert": ({"gate_up_proj", "down_proj"}, "its rows are put together from those of others"),
    "fused": ({"gate_proj.weight", "up_proj.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight"}, "its rows are put together"),
    "pickled": (None, "its weights are no safetensors"),
    "tables": ({"embed_tokens.weight", "lm_head.weight"}, ""),
    "reward": ({"score.weight"}, ""),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each rank found, by case."""
    directory = tmp_path_factory.mktemp("ranks")
    for kind, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) / 4)  # biases and norms too
        model.to(STORED).save_pretrained(directory / kind, max_shard_size=20_000)
        assert len(list((directory / kind).glob("*.safetensors"))) > 1
    _as_pickle(directory / "llama", directory / "pickled")
    command = [sys.executable, "-m", "tests.posttrain.test_share", str(directory)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-4000:]
    said = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    return {case: [each[case] for each in said] for case in said[0]} | {"log": ended.stdout}


def _as_pickle(safe: Path, path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_bytes((safe / "config.json").read_bytes())
    torch.save(
        {name: tensor for file in safe.glob("*.safetensors") for name, tensor in load_file(file).items()}, path / "pytorch_model.bin"
    )


CASES = [f"{kind} {dtype}" for kind in CONFIGS for dtype in ("float32", "bfloat16")] + [
    "pickled float32",
    "tables float32",
    "reward float32",
]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_load_what_one_process_loads(found: dict[str, Any], case: str) -> None:
    for rank in found[case]:
        assert rank["names"] == "same"
        assert rank["unlike"] == [], "parameters, tied ones by both names, and buffers, those that no file holds too"
        assert rank["answers"] == "same"


@pytest.mark.parametrize("case", CASES)
def test_a_rank_reads_its_rows_alone_of_all_that_can_be_so_read(found: dict[str, Any], case: str) -> None:
    kind = case.rpartition(" ")[0]
    for rank in found[case]:
        if kind not in WHOLE:
            assert rank["whole"] == [] and rank["read"] == rank["shared out"]
            continue
        names, _ = WHOLE[kind]
        assert {name for name in rank["whole"] if names and name.endswith(tuple(names))} == set(rank["whole"]) or names is None
        assert (rank["read"] == 0) == (names is None)
    told = {kind for kind, (_, why) in WHOLE.items() if why and f"{kind}: each rank reads all of" in found["log"] and why in found["log"]}
    assert told == {kind for kind, (_, why) in WHOLE.items() if why}


@pytest.mark.parametrize("case", CASES)
def test_no_rank_holds_more_than_its_share_once_the_model_is_shared_out(found: dict[str, Any], case: str) -> None:
    for rank in found[case]:
        assert rank["bytes"] <= rank["share"]


@pytest.mark.parametrize(
    ("name", "stored", "said"),
    [
        # Of 63 rows the first rank has 32, and of 64 too.
        (
            "up_proj.weight",
            (63, 32),
            "has weights of the shape [63, 32] for model.layers.1.mlp.up_proj.weight, and config.json says [64, 32]",
        ),
        ("k_proj.weight", None, "has no weights for model.layers.1.self_attn.k_proj.weight, one of 1"),
    ],
    ids=["of another shape", "missing"],
)
def test_weights_that_do_not_fit_are_said_in_one_line(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, tiny: Path, name: str, stored: tuple[int, ...] | None, said: str
) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    (full,) = (each for each in tensors if each.endswith(name) and ".1." in each)
    del tensors[full]
    save_file(tensors | ({full: torch.zeros(stored)} if stored else {}), base / "model.safetensors", metadata={"format": "pt"})
    ended = posttrain("run", stage_file(pipeline_file, "sft"), "--root", tmp_path, f"sources.base.model={base}", *FSDP)
    assert ended.code == 2, ended.err
    assert said in ended.err.splitlines()[-1]


def test_the_log_says_where_each_rank_reads_everything(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> None:
    for name, adapters in (("lora", "{r: 4}"), ("dora", "{r: 4, use_dora: true}")):
        stage = train(posttrain, stage_file(pipeline_file, "sft"), tmp_path / name, f"stages.only.lora={adapters}", *FSDP)
        log = (stage / "logs" / "attempt_1" / "rank_1.log").read_text()
        assert ("each rank reads all of the model, and not its rows alone: DoRA" in log) == (name == "dora")


# --- in each of the ranks ----------------------------------------------------------------------------------------------


def _compare(directory: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=NUM_RANKS)
    said = {}
    for case in CASES:
        kind, _, dtype = case.rpartition(" ")
        auto: Any = AutoModelForCausalLM
        path, options = directory / kind, dict[str, Any]()
        if kind == "tables":
            path, options = directory / "llama", {"whole_tables": True}
        elif kind == "reward":
            auto, path, options = AutoModelForSequenceClassification, directory / "llama", {"new": ("score.weight",)}
        print(f"{kind}: ", end="", flush=True)
        said[case] = _case(auto, path, getattr(torch, dtype), options)
        print(flush=True)
    (directory / f"{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


def _case(auto: Any, path: Path, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    further: dict[str, Any] = {"num_labels": 1} if "new" in options else {}
    config: Any = SimpleNamespace(fsdp="full_shard", lora=None, uses_bf16=False)
    torch.manual_seed(0)
    expected = auto.from_pretrained(path, dtype=dtype, **further)
    torch.manual_seed(0)
    with reading_rows(mesh_to_read_on(config, NUM_RANKS), **options):
        model = auto.from_pretrained(path, dtype=dtype, **further)
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    read = sum(parameter.to_local().numel() for parameter in model.parameters() if isinstance(parameter, DTensor))
    fsdp.shard(model, config, NUM_RANKS)
    mine, wanted = (dict(each.named_parameters(remove_duplicate=False)) for each in (model, expected))
    buffers, known = (dict(each.named_buffers()) for each in (model, expected))
    tensors = {name: fsdp.whole(tensor) for name, tensor in mine.items()} | buffers
    unlike = [
        name
        for name, tensor in {**wanted, **known}.items()
        if not (torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype)
    ]
    local = [parameter.to_local() for parameter in model.parameters()]
    ids = torch.arange(12)[None]
    # Tied weights have one name more than there are of them.
    same_names = mine.keys() == wanted.keys() and len(list(model.parameters())) == len(list(expected.parameters()))
    expected.config.pad_token_id = model.config.pad_token_id = 0
    with torch.no_grad():
        same = torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    return {
        "names": "same" if same_names else "other",
        "unlike": unlike,
        "answers": "same" if same else "other",
        "whole": whole,
        "read": read,
        "shared out": sum(tensor.numel() for tensor in local),
        "bytes": sum(tensor.untyped_storage().nbytes() for tensor in local),
        "share": sum(-(-len(tensor) // NUM_RANKS) * tensor[0].numel() * tensor.element_size() for tensor in expected.parameters()),
    }


if __name__ == "__main__":
    ranks = [get_context("fork").Process(target=_compare, args=(Path(sys.argv[1]), rank)) for rank in range(NUM_RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        sys.exit(f"the ranks ended with {[process.exitcode for process in ranks]}")
