"""Kinds of adapters, in each stage that trains: what is published is the input policy with what was learned, by the papers' formulas."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from posttrain.artifact import read_artifact
from posttrain.error import UserError
from posttrain.fit import check_preparations
from posttrain.stage import StageContext
from stages.sft import SFTConfig
from tests.conftest import Ended, read_lines

Cli = Callable[..., Ended]
DATA = {"sft": "chat", "dpo": "prefs", "orpo": "prefs", "reward": "prefs"}
ZERO3 = ("launcher.num_processes=2", "stages.only.deepspeed=ds_configs/zero3.json")


def train(posttrain: Cli, file: Path, root: Path, kind: str, *overrides: str, base: Path | None = None) -> Path:
    """Train one stage of that kind from the base model; its directory."""
    text = file.read_text()
    head = text[: text.index("stages:")]
    path = root.parent / f"{root.name}.yaml"
    path.write_text(f"""{head}stages:
  only: {{kind: {kind}, inputs: {{policy: base, data: {DATA[kind]}}}, learning_rate: 3e-3, global_batch_size: 8, max_length: 128,
         num_train_epochs: 3}}
""")
    wires = [f"sources.base.model={base}"] if base else []
    ended = posttrain("run", path, "--root", root, *wires, *overrides)
    assert ended.code == 0, ended.err
    return root / "test" / "only"


def learned(start: np.ndarray[Any, Any], adapter: dict[str, Any], name: str, settings: dict[str, Any]) -> np.ndarray[Any, Any]:
    """A weight with its adapter: W + s B A (Hu et al., 2021); by DoRA its rows get lengths of their own (Liu et al., 2024, eq. 5)."""
    prefix = f"base_model.model.{name}"
    scale = settings["lora_alpha"] / (np.sqrt(settings["r"]) if settings["use_rslora"] else settings["r"])
    weight = start + scale * adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"]
    if settings["use_dora"]:
        weight *= adapter[f"{prefix}.lora_magnitude_vector"][:, None] / np.linalg.norm(weight, axis=1, keepdims=True)
    return np.asarray(weight)


@pytest.mark.parametrize(
    ("kind", "lora", "overrides"),
    [
        ("sft", "{r: 4, use_dora: true}", ()),
        ("sft", "{r: 4, use_dora: true}", ZERO3),
        ("dpo", "{r: 4, use_rslora: true}", ()),
        ("orpo", "{r: 4, use_dora: true, use_rslora: true}", ()),
        ("reward", "{r: 4, use_dora: true}", ()),
    ],
    ids=["sft dora", "sft dora zero3", "dpo rslora", "orpo both", "reward dora"],
)
def test_published_weights_are_those_of_the_formula(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, tiny: Path, kind: str, lora: str, overrides: tuple[str, ...]
) -> None:
    stage = train(posttrain, pipeline_file, tmp_path / "runs", kind, f"stages.only.lora={lora}", *overrides)
    output = stage / "output"
    settings = json.loads((output / "adapter" / "adapter_config.json").read_text())
    adapter, merged, start = (load_file(path) for path in (*(output / "adapter").glob("*.safetensors"), output / "model.safetensors",
                                                           tiny / "model.safetensors"))  # fmt: skip
    names = [name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in adapter if name.endswith("lora_A.weight")]
    assert len(names) == 14, "each of the seven linear modules of two layers"
    for name in names:
        expected = learned(start[f"{name}.weight"], adapter, name, settings)
        assert not np.allclose(expected, start[f"{name}.weight"], atol=1e-4), "something was learned"
        np.testing.assert_allclose(merged[f"{name}.weight"], expected, rtol=1e-4, atol=1e-6)


def test_weights_of_4_bits_are_refused_where_they_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def context(**settings: Any) -> StageContext[Any]:
        return StageContext("only", SFTConfig.model_validate({"lora": {"load_in_4bit": True}, **settings}), {}, tmp_path, tmp_path)

    from trl import SFTConfig as TrainerConfig

    monkeypatch.setattr("posttrain.fit.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^stages.only.lora.load_in_4bit: needs the library bitsandbytes, .* pip install bitsandbytes"):
        check_preparations(context(), TrainerConfig)
    monkeypatch.setattr("posttrain.fit.find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"^stages.only.lora.load_in_4bit: .*ZeRO-3.*ds_configs/zero2.json"):
        check_preparations(context(deepspeed="ds_configs/zero3.json"), TrainerConfig)
    check_preparations(context(deepspeed="ds_configs/zero2.json"), TrainerConfig)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_what_was_trained_with_weights_of_4_bits_is_published_with_them(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, tiny: Path, kind: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    settings = json.loads((base / "config.json").read_text()) | {"hidden_size": 64, "head_dim": 16}  # blocks of 64 numbers are rounded
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(base)
    stage = train(posttrain, pipeline_file, tmp_path / "runs", kind, "stages.only.lora={r: 4, load_in_4bit: true}", base=base)
    lines = read_lines(stage / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    if kind == "dpo":
        assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6), "the reference is the policy as it is trained"
    metrics = read_artifact(stage).metrics  # type: ignore[union-attr]
    assert metrics["handoff_logit_drift"] < 0.03, "weights that were not rounded to 4 bits are 0.4 and more away"
    assert AutoConfig.from_pretrained(stage / "output").to_dict().get("quantization_config") is None


@pytest.mark.parametrize("kind", ["sft", "dpo", "orpo", "reward"])
def test_a_mixture_of_experts_keeps_its_router_loss(posttrain: Cli, pipeline_file: Path, tmp_path: Path, tiny: Path, kind: str) -> None:
    settings = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    first, aux = {}, {}
    for coefficient in (0.0, 0.5):
        directory = tmp_path / f"experts-{coefficient}"
        shutil.copytree(tiny, directory)
        vocabulary = AutoConfig.from_pretrained(tiny).vocab_size
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=vocabulary, num_local_experts=4, router_aux_loss_coef=coefficient, sliding_window=None, **settings
        )
        config.bos_token_id, config.eos_token_id = 0, 1
        MixtralForCausalLM(config).save_pretrained(directory)
        stage = train(
            posttrain, pipeline_file, tmp_path / f"runs-{coefficient}", kind, "stages.only.micro_batch_tokens=100000", base=directory
        )
        line = read_lines(stage / "metrics.jsonl")[0]
        first[coefficient], aux[coefficient] = line["loss"], line.get("aux_loss")
        assert AutoModelForCausalLM.from_pretrained(stage / "output").config.router_aux_loss_coef == coefficient or kind == "reward"
    assert aux[0.0] is None
    assert aux[0.5] == pytest.approx(2.0, abs=0.5), "two of four experts answer each token, and untrained ones are used about alike"
    assert first[0.5] - first[0.0] == pytest.approx(0.5 * aux[0.5], rel=1e-4)
