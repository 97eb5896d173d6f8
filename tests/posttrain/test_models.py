"""Models in and out: what cannot be loaded is refused in one line, and what was published wrong is never handed on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.artifact import record_output
from tests.conftest import Ended

Cli = Callable[..., Ended]
SHORT = ("--only", "sft", "stages.sft.max_steps=1")


@pytest.fixture
def published(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> Path:
    """The directory of a finished stage."""
    ended = posttrain("run", pipeline_file, "--root", tmp_path / "runs", *SHORT)
    assert ended.code == 0, ended.err
    return tmp_path / "runs" / "test" / "sft"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_published_in_the_type_asked_for(posttrain: Cli, pipeline_file: Path, tmp_path: Path, dtype: str) -> None:
    ended = posttrain("run", pipeline_file, "--root", tmp_path, *SHORT, f"stages.sft.save_dtype={dtype}")
    assert ended.code == 0, ended.err
    output = tmp_path / "test" / "sft" / "output"
    assert {str(tensor.dtype) for tensor in load_file(output / "model.safetensors").values()} == {f"torch.{dtype}"}
    assert AutoConfig.from_pretrained(output).dtype == getattr(torch, dtype)


def test_by_default_weights_keep_the_type_of_the_input_policy(posttrain: Cli, pipeline_file: Path, tmp_path: Path, tiny: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "half")
    ended = posttrain("run", pipeline_file, "--root", tmp_path / "runs", *SHORT, f"sources.base.model={tmp_path / 'half'}")
    assert ended.code == 0, ended.err
    weights = load_file(tmp_path / "runs" / "test" / "sft" / "output" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "overrides",
    [(), ("launcher.num_processes=2",), ("launcher.num_processes=2", "stages.sft.deepspeed=ds_configs/zero3.json")],
    ids=["one rank", "two ranks", "zero3"],
)
def test_large_weights_are_published_in_several_files(
    posttrain: Cli, pipeline_file: Path, published: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    ended = posttrain("run", pipeline_file, "--root", tmp_path, *SHORT, "stages.sft.max_shard_size=30kB", *overrides)
    assert ended.code == 0, ended.err
    output = tmp_path / "test" / "sft" / "output"
    files = sorted(output.glob("model*.safetensors"))
    assert len(files) > 3
    assert [file.name for file in files] == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    index = json.loads((output / "model.safetensors.index.json").read_text())
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    whole = load_file(published / "output" / "model.safetensors")
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    reloaded = AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert all(torch.equal(reloaded[name], tensor) for name, tensor in found.items())


def test_a_tensor_that_changed_after_publishing_is_not_handed_on(posttrain: Cli, pipeline_file: Path, published: Path) -> None:
    (published / "artifact.json").unlink()
    weights = load_file(published / "output" / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1e-3
    save_file(weights, published / "output" / "model.safetensors", metadata={"format": "pt"})
    record_output(published, published / "output")  # as if it had been written so
    ended = posttrain("run", pipeline_file, "--root", published.parent.parent, *SHORT)
    assert ended.code == 1
    assert "tensor lm_head.weight" in ended.err
    assert not (published / "artifact.json").exists()


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("generation_config.json", lambda config: config.update(eos_token_id=1), "generation stops at token 1"),
        ("tokenizer_config.json", lambda config: config.update(pad_token="</s>"), "pad token"),
        ("chat_contract.json", lambda contract: contract.update(stop_tokens=["</s>"]), "was changed after it was written"),
    ],
    ids=["generation config", "tokenizer", "contract"],
)
def test_a_policy_that_would_not_stop_is_not_handed_on(
    posttrain: Cli, pipeline_file: Path, published: Path, file: str, change: Callable[[dict[str, object]], None], said: str
) -> None:
    (published / "artifact.json").unlink()
    path = published / "output" / file
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    record_output(published, published / "output")  # as if it had been written so
    ended = posttrain("run", pipeline_file, "--root", published.parent.parent, *SHORT)
    assert ended.code in (1, 2)
    assert said in ended.err
    assert not (published / "artifact.json").exists()


def broken(tiny: Path, path: Path, name: str) -> Path:
    """A copy of the model, broken in one way."""
    shutil.copytree(tiny, path)
    weights = path / "model.safetensors"
    if name == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif name == "garbage":
        weights.write_bytes(b"not weights at all")
    elif name == "no weights":
        weights.unlink()
    elif name == "list for a config":
        (path / "config.json").write_text("[]")
    elif name == "a layer short":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    return path


@pytest.mark.parametrize("name", ["truncated", "garbage", "no weights", "list for a config", "a layer short"])
def test_a_broken_model_is_refused_in_one_line(posttrain: Cli, pipeline_file: Path, tmp_path: Path, tiny: Path, name: str) -> None:
    model = broken(tiny, tmp_path / "model", name)
    ended = posttrain("run", pipeline_file, "--root", tmp_path / "runs", *SHORT, f"sources.base.model={model}")
    assert ended.code == 2, ended.err
    assert str(model) in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not (tmp_path / "runs" / "test" / "sft" / "output").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.sft.optim=adamw_torhc", "adamw_torhc"),
        ("stages.sft.lora={target_modules: [q_porj]}", "did you mean 'q_proj'?"),
        ("stages.sft.learning_rate=1e30", "lower stages.sft.learning_rate"),
    ],
)
def test_a_setting_that_shows_itself_wrong_only_in_training_is_still_one_line(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, override: str, said: str
) -> None:
    ended = posttrain("run", pipeline_file, "--root", tmp_path, "--only", "sft", "stages.sft.warmup_steps=0", override)
    assert ended.code == 2, ended.err
    assert said in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not (tmp_path / "test" / "sft" / "artifact.json").exists()
