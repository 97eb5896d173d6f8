"""FSDP2 learns what one process learns, in every stage that trains, and its checkpoints are those of any other way to train."""

import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from posttrain.checkpoint import last_complete
from posttrain.config import validate
from posttrain.disk import hash_file
from posttrain.error import UserError
from posttrain.fit import check_preparations
from posttrain.stage import StageContext
from stages.rlhf import RLHFConfig
from stages.sft import SFTConfig
from tests.conftest import Ended, killing, read_lines

Cli = Callable[..., Ended]
TWO = "launcher.num_processes=2"
FSDP = (TWO, "stages.only.fsdp=full_shard")
ZERO3 = (TWO, "stages.only.deepspeed=ds_configs/zero3.json")


def stage_file(pipeline_file: Path, kind: str) -> Path:
    """A pipeline of one stage that trains the base model."""
    head = pipeline_file.read_text().partition("stages:")[0]
    path = pipeline_file.with_name(f"{kind}.yaml")
    path.write_text(f"""{head}stages:
  only: {{kind: {kind}, inputs: {{policy: base, data: {"chat" if kind == "sft" else "prefs"}}}, learning_rate: 1e-3, global_batch_size: 8,
         max_length: 128, max_steps: 4, lr_scheduler_type: constant, warmup_steps: 0}}
""")
    return path


def train(posttrain: Cli, path: Path, root: Path, *overrides: str) -> Path:
    """Run the stage; its directory."""
    ended = posttrain("run", path, "--root", root, *overrides)
    assert ended.code == 0, ended.err
    return root / "test" / "only"


def logged(stage: Path, name: str) -> list[float]:
    """A metric, step by step."""
    return [line[name] for line in read_lines(stage / "metrics.jsonl")]


def assert_alike(stage: Path, expected: Path, *, by: float = 1e-5) -> None:
    """The losses and norms of all steps differ by rounding, and so do the weights that are published."""
    for name, most in (("loss", by), ("grad_norm", 10 * by)):
        assert logged(stage, name) == pytest.approx(logged(expected, name), rel=most), name
    found, wanted = (load_file(each / "output" / "model.safetensors") for each in (stage, expected))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # Adam turns the rounding of a gradient near zero into a step of up to the learning rate.
        assert float((found[name] - tensor).abs().mean()) < by, name


# --- what is learned ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "both", "sharded"),
    [
        ("sft", (), ("stages.only.micro_batch_tokens=150",)),
        ("sft", ("stages.only.lora={r: 4, use_dora: true}", "stages.only.weight_decay=0.1"), ("stages.only.gradient_checkpointing=true",)),
        ("dpo", ("stages.only.loss_type=[aot]",), ("stages.only.fsdp=shard_grad_op", "stages.only.micro_batch_tokens=150")),
        ("dpo", ("stages.only.lora={r: 4}",), ()),
        ("orpo", (), ("stages.only.layout=padded", "stages.only.gradient_checkpointing=true")),
        ("kto", (), ("stages.only.micro_batch_tokens=150",)),
        ("reward", ("stages.only.max_grad_norm=0",), ()),
    ],
    ids=["sft", "sft dora", "dpo coupled", "dpo lora", "orpo", "kto", "reward"],
)
def test_two_ranks_that_share_the_model_learn_what_one_learns(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, kind: str, both: tuple[str, ...], sharded: tuple[str, ...]
) -> None:
    path = stage_file(pipeline_file, kind)
    whole = train(posttrain, path, tmp_path / "whole", *both)
    stage = train(posttrain, path, tmp_path / "sharded", *both, *FSDP, *sharded)
    assert_alike(stage, whole)
    fingerprints = [json.loads((each / "artifact.json").read_text())["payload"]["fingerprint"] for each in (stage, whole)]
    assert fingerprints[0] == fingerprints[1]


def test_two_ranks_learn_the_same_whether_they_share_the_model_or_each_hold_it(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> None:
    path = stage_file(pipeline_file, "sft")
    assert_alike(train(posttrain, path, tmp_path / "sharded", *FSDP), train(posttrain, path, tmp_path / "plain", TWO))


def test_in_bfloat16_weights_are_learned_in_float32(posttrain: Cli, pipeline_file: Path, tmp_path: Path, tiny: Path) -> None:
    """Steps of 1e-5 are far below what bfloat16 can tell apart in weights of 0.2."""
    path = stage_file(pipeline_file, "sft")
    both = ("stages.only.bf16=true", "stages.only.learning_rate=1e-5")
    plain = train(posttrain, path, tmp_path / "plain", TWO, *both)
    stage = train(posttrain, path, tmp_path / "sharded", *FSDP, *both)
    assert logged(stage, "loss") == pytest.approx(logged(plain, "loss"), rel=0.01)
    start, found, wanted = (load_file(each / "model.safetensors") for each in (tiny, stage / "output", plain / "output"))
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        learned, expected = found[name] - start[name], wanted[name] - start[name]
        assert 1e-5 < float(learned.abs().mean()) < 5e-5, "four steps of up to 1e-5"
        # Signs of small gradients are lost to rounding.
        assert float(torch.nn.functional.cosine_similarity(learned.flatten(), expected.flatten(), dim=0)) > 0.8


def test_a_model_that_lies_on_disk_under_other_names_is_published_so(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, tiny: Path
) -> None:
    """A mixture of experts, which transformers keeps in one tensor in memory, and apart on disk."""
    base = tmp_path / "mixture"
    shutil.copytree(tiny, base)
    settings = json.loads((base / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    torch.manual_seed(0)
    config = MixtralConfig(**{name: settings[name] for name in names}, num_local_experts=4, num_experts_per_tok=2, bos_token_id=0)
    MixtralForCausalLM(config).save_pretrained(base)
    path = stage_file(pipeline_file, "sft")
    runs = [train(posttrain, path, tmp_path / name, f"sources.base.model={base}", *way) for name, way in (("one", ()), ("two", FSDP))]
    assert_alike(runs[1], runs[0])
    assert isinstance(AutoModelForCausalLM.from_pretrained(runs[1] / "output"), MixtralForCausalLM)


# --- checkpoints -------------------------------------------------------------------------------------------------------

LONG = ("stages.only.max_steps=16", "stages.only.save_steps=4", "stages.only.micro_batch_tokens=150")


def cut(posttrain: Cli, path: Path, root: Path, *overrides: str) -> Path:
    """The stage, one of whose two ranks was killed after a checkpoint; its root."""
    stage = root / "test" / "only"
    with killing("only:run:1", when=lambda: last_complete(stage / "checkpoints") is not None):
        ended = posttrain("run", path, "--root", root, *LONG, *overrides)
    assert ended.code == 1, ended.err
    return root


def test_a_run_goes_on_from_any_way_to_train_to_any_other(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> None:
    """Of a reward model, since of its head's one row a rank has nothing."""
    path = stage_file(pipeline_file, "reward")
    whole = train(posttrain, path, tmp_path / "whole", *LONG, *FSDP)
    roots = {name: cut(posttrain, path, tmp_path / name, *way) for name, way in (("fsdp", FSDP), ("plain", (TWO,)), ("zero3", ZERO3))}
    checkpoint = last_complete(roots["fsdp"] / "test" / "only" / "checkpoints")
    assert checkpoint is not None
    assert_shared_out(checkpoint.path)
    for number, (before, after) in enumerate(
        [("fsdp", FSDP), ("fsdp", ()), ("fsdp", ZERO3), ("plain", FSDP), ("zero3", (TWO, "stages.only.fsdp=shard_grad_op"))]
    ):
        root = tmp_path / str(number)
        shutil.copytree(roots[before], root)
        ended = posttrain("run", path, "--root", root, *LONG, *after)
        assert ended.code == 0, ended.err
        assert "resume: from the checkpoint of step" in ended.out
        resumed = root / "test" / "only"
        if (before, after) == ("fsdp", FSDP):
            assert logged(resumed, "loss") == logged(whole, "loss")
            assert hash_file(resumed / "output" / "model.safetensors") == hash_file(whole / "output" / "model.safetensors")
        assert logged(resumed, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5, abs=1e-6), (before, after)


def assert_shared_out(checkpoint: Path) -> None:
    """Each of two ranks wrote its half of the rows, with what the optimizer keeps for them, and no more."""
    records = [json.loads((checkpoint / f"rank_0000{rank}.json").read_text())["fragments"] for rank in (0, 1)]
    for name, said in records[0].items():
        row = prod(said["shape"][1:])
        half = -(-said["shape"][0] // 2) * row
        assert said["tensors"] == {"weight": half, "exp_avg": half, "exp_avg_sq": half}, name
        other = records[1].get(name)
        if other is None:
            assert half == prod(said["shape"]), name
        else:
            assert (other["start"], other["tensors"]["weight"]) == (half, prod(said["shape"]) - half), name
    assert "score.weight" in records[0].keys() - records[1].keys()


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (SFTConfig, {"fsdp": "full_shard", "deepspeed": "zero3.json"}, r"stages\.x\.fsdp: full_shard .* deepspeed: zero3\.json; leave one"),
        (SFTConfig, {"fsdp": "hybrid_shard"}, r"stages\.x\.fsdp: .*full_shard.*shard_grad_op"),
        (RLHFConfig, {"fsdp": "full_shard"}, r"stages\.x\.fsdp: .*; set deepspeed: ds_configs/zero3\.json instead"),
    ],
    ids=["deepspeed", "unknown", "rlhf"],
)
def test_a_setting_that_cannot_be_is_refused_in_one_line(kind: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        validate(kind, settings, "stages.x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora": {"load_in_4bit": True}}, r"^stages\.x\.lora\.load_in_4bit: .* fsdp; use deepspeed: ds_configs/zero2\.json"),
        ({"optim": "adafactor"}, r"^stages\.x\.optim: adafactor cannot .* adamw_torch.* can"),
    ],
    ids=["4 bits", "optimizer"],
)
def test_what_fsdp_cannot_share_out_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: str
) -> None:
    from trl import SFTConfig as TrainerConfig

    monkeypatch.setattr("posttrain.fit.find_spec", lambda name: object())
    for fsdp in ("full_shard", "shard_grad_op"):
        config = SFTConfig.model_validate({"fsdp": fsdp, **settings})
        with pytest.raises(UserError, match=said):
            check_preparations(StageContext("x", config, {}, tmp_path, tmp_path), TrainerConfig)
