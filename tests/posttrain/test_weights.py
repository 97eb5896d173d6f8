"""Weights on their way to disk, a tensor at a time: what lies there in the end is what transformers, or peft, would have made at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
)

from posttrain.adapters import Adapted
from posttrain.models import compute_in_float32
from posttrain.stage import StageContext
from posttrain.weights import Trained, Weights, describe, open_stored, tensors_of, write_weights

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=False),
    "tied": LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True),
    "experts": MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4),
    "gpt2": GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4),
}


def stored(path: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """A model of that kind with random weights, on disk."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)  # biases and norms too
    model.to(dtype).save_pretrained(path)
    return path


def context(path: Path) -> StageContext[Any]:
    made: StageContext[Any] = StageContext("test", None, {}, path, path)
    made.output.mkdir()
    return made


def on_disk(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_files_hold_what_transformers_would_store(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(stored(tmp_path / "model", kind))
    described = write_weights(context(tmp_path), Trained(model), dtype, 20_000)
    model.to(dtype).save_pretrained(tmp_path / "expected")
    output = tmp_path / "output.partial"
    assert len(list(output.glob("*.safetensors"))) > 1
    assert same(on_disk(output), on_disk(tmp_path / "expected"))
    assert described == {name: describe(tensor) for name, tensor in tensors_of(model).items()}
    CONFIGS[kind].save_pretrained(output)
    assert same(dict(AutoModelForCausalLM.from_pretrained(output, dtype=dtype).state_dict()), dict(model.state_dict()))


class Counted(Weights):
    """Weights that remember what was asked for, and when."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights.model, weights.shapes)
        self.weights, self.asked = weights, list[tuple[int, str]]()

    def take(self, name: str, dtype: torch.dtype, *, mine: bool) -> torch.Tensor | None:
        done = len(list(self.output.glob("*.safetensors")))
        self.asked.append((done, name))
        return self.weights.take(name, dtype, mine=mine)

    output: Path


@pytest.mark.parametrize("kind", ["llama", "experts"])
def test_what_is_written_is_no_longer_held_when_the_next_file_begins(tmp_path: Path, kind: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(stored(tmp_path / "model", kind))
    counted = Counted(Trained(model))
    made = context(tmp_path)
    counted.output = made.output
    write_weights(made, counted, torch.float32, 20_000)
    files = [set(load_file(file)) for file in sorted(made.output.glob("*.safetensors"))]
    for number, names in enumerate(files):
        asked = [name for done, name in counted.asked if done == number]
        assert len(asked) == len(set(asked)) <= len(names), "nothing is asked for that does not go into this file"
    assert {number for number, _ in counted.asked} == set(range(len(files)))


# --- adapters --------------------------------------------------------------------------------------------------------


def trained(path: Path, lora: dict[str, Any], dtype: torch.dtype, auto_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The model of `path` with adapters as if they had learned something."""
    torch.manual_seed(1)
    base = auto_class.from_pretrained(path, dtype=dtype, **options)
    task = "CAUSAL_LM" if auto_class is AutoModelForCausalLM else "SEQ_CLS"
    model: Any = get_peft_model(base, LoraConfig(task_type=task, r=4, **lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / (50 if "magnitude" in name else 5))
    return model


def merged_by_peft(model: Any, path: Path, auto_class: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """The adapters of a model in the weights of `path`, which are read anew in float32 and merged at once."""
    from peft import PeftModel

    model.save_pretrained(path.parent / "adapter", save_embedding_layers=False)
    base = auto_class.from_pretrained(path, dtype=torch.float32, **options)
    merged: Any = PeftModel.from_pretrained(base, str(path.parent / "adapter")).merge_and_unload()
    return merged  # type: ignore[no-any-return]


LORA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "rslora, some modules": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_alpha": 3},
}


@pytest.mark.parametrize(
    ("kind", "lora", "kept", "held"),
    [
        ("llama", "plain", torch.float32, torch.float32),
        ("llama", "dora", torch.float32, torch.float32),
        ("llama", "dora", torch.bfloat16, torch.bfloat16),
        ("llama", "rslora, some modules", torch.bfloat16, torch.float32),
        ("tied", "plain", torch.float32, torch.bfloat16),
        ("experts", "plain", torch.bfloat16, torch.bfloat16),
        ("gpt2", "plain", torch.float32, torch.float32),
    ],
)
def test_adapters_are_merged_as_peft_merges_them(tmp_path: Path, kind: str, lora: str, kept: torch.dtype, held: torch.dtype) -> None:
    """Stored in `kept` and trained in `held`; where that is coarser, what is frozen is published as it is stored all the same."""
    path = stored(tmp_path / "model", kind, kept)
    model = trained(path, LORA[lora], held)
    expected = tensors_of(merged_by_peft(model, path))
    before = tensors_of(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    weights = Adapted(model, open_stored(sorted(path.glob("*.safetensors"))))
    assert weights.shapes.keys() == expected.keys()
    changed = 0
    for name, tensor in expected.items():
        found = weights.take(name, torch.float32, mine=True)
        assert found is not None
        assert torch.equal(found, tensor), name
        assert weights.take(name, torch.float32, mine=False) is None
        changed += not torch.equal(tensor, before[name])
    assert changed >= 4, "adapters change something"
    assert all(parameter.is_meta for layer in weights._adapters.values() for parameter in layer.parameters()), "nothing stays in memory"


def test_a_head_that_was_trained_is_taken_and_not_the_one_that_it_began_as(tmp_path: Path) -> None:
    path = stored(tmp_path / "model", "llama")
    options = {"num_labels": 1}
    model = trained(path, LORA["plain"], torch.float32, AutoModelForSequenceClassification, **options)
    expected = tensors_of(merged_by_peft(model, path, AutoModelForSequenceClassification, **options))
    weights = Adapted(model, open_stored(sorted(path.glob("*.safetensors"))))
    assert same({name: weights.take(name, torch.float32, mine=True) for name in weights.shapes}, expected)  # type: ignore[misc]


def test_weights_under_another_name_on_disk_are_taken_from_where_they_were_loaded(tmp_path: Path) -> None:
    """The backbone alone has no prefix, and a loader adds it: nothing is found by its name, and all is what was loaded."""
    path = stored(tmp_path / "model", "llama")
    backbone = AutoModelForCausalLM.from_pretrained(path)
    backbone.model.save_pretrained(tmp_path / "backbone")
    assert "embed_tokens.weight" in load_file(tmp_path / "backbone" / "model.safetensors")
    options = {"num_labels": 1}
    model = trained(tmp_path / "backbone", LORA["plain"], torch.float32, AutoModelForSequenceClassification, **options)
    expected = tensors_of(merged_by_peft(model, tmp_path / "backbone", AutoModelForSequenceClassification, **options))
    weights = Adapted(model, open_stored(sorted((tmp_path / "backbone").glob("*.safetensors"))))
    assert same({name: weights.take(name, torch.float32, mine=True) for name in weights.shapes}, expected)  # type: ignore[misc]


def test_pickles_are_read_a_tensor_at_a_time_too(tmp_path: Path) -> None:
    path = stored(tmp_path / "model", "llama", torch.bfloat16)
    tensors = load_file(path / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    opened = open_stored([tmp_path / "pytorch_model.bin"])
    assert same({name: opened[name]() for name in opened}, tensors)


# --- verification ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_computes_in_float32_while_its_weights_stay_what_they_are(tmp_path: Path, kind: str) -> None:
    path = stored(tmp_path / "model", kind, torch.bfloat16)
    ids = torch.arange(24).view(2, 12)
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).float().eval()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    coarse = model(input_ids=ids).logits
    compute_in_float32(model)
    with torch.no_grad():
        found, again, expected = model(input_ids=ids).logits, model(input_ids=ids).logits, whole(input_ids=ids).logits
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    assert not torch.equal(coarse.float(), expected), "in bfloat16 it rounds"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
