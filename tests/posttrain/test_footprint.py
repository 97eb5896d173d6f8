"""What a stage will take on disk is foretold from headers and sizes: exactly for weights, about for data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain import footprint
from posttrain.config import DataSource, ModelSource
from posttrain.footprint import Rows, Weights, adapter_parameters, foretell, read_content
from posttrain.recipe import LoraRecipe
from stages.dpo import DPOConfig
from stages.eval import EvalConfig
from stages.merge import MergeConfig
from stages.sft import SFTConfig
from tests.conftest import Ended, write_pairs


def weights_of(path: Path) -> Weights:
    found = read_content(ModelSource(model=str(path)))
    assert isinstance(found, Weights)
    return found


def write_model(directory: Path, tensors: dict[str, tuple[str, list[int]]], **config: Any) -> Path:
    """A model directory of which only what tells sizes is there: the header of its weights is followed by nothing."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"vocab_size": 100, **config}))
    header = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, (dtype, shape) in tensors.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return directory


def test_the_parameters_of_a_model_are_those_that_it_has(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    found = weights_of(tiny)
    assert found.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.vocabulary_size == model.config.vocab_size
    assert abs(found.num_bytes("float32") - (tiny / "model.safetensors").stat().st_size) < 5000


def test_weights_in_several_files_are_counted_over_all(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", {"a.weight": ("BF16", [10, 10])}, dtype="bfloat16")
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    other = write_model(tmp_path / "other", {"b.weight": ("BF16", [5])})
    (other / "model.safetensors").rename(path / "model-00002-of-00002.safetensors")
    weight_map = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = weights_of(path)
    assert (found.num_parameters, found.dtype, found.num_bytes("bfloat16"), found.num_bytes("float32")) == (105, "bfloat16", 210, 420)


@pytest.mark.parametrize("content", [b"", b"1234567", (2**60).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]", b"\0" * 99])
def test_what_is_no_weights_file_is_unknown(tmp_path: Path, content: bytes) -> None:
    path = write_model(tmp_path, {})
    (path / "model.safetensors").write_bytes(content)
    assert read_content(ModelSource(model=str(path))) is None


def test_what_is_yet_to_be_fetched_is_unknown_and_so_is_all_that_is_made_of_it(tmp_path: Path) -> None:
    hub = read_content(ModelSource(model="org/model", revision="a" * 40))
    rows = read_content(DataSource(data=f"org/data@{'a' * 40}"))
    assert (hub, rows) == (None, None)
    model = weights_of(write_model(tmp_path, {"a.weight": ("F32", [10])}))
    found, content = foretell(SFTConfig(), "policy", {"policy": [hub], "data": [Rows(100, 10)]}, prepares=True)
    assert (found.output, found.checkpoints, found.total, found.peak, content) == (None, None, None, None, None)
    found, _ = foretell(SFTConfig(), "policy", {"policy": [model], "data": [rows]}, prepares=True)
    assert (found.prepared, found.total) == (None, None)
    assert found.output == 40 + len((tmp_path / "config.json").read_bytes())


def test_a_checkpoint_holds_a_weight_and_two_moments_of_each_trained_weight_and_one_more_than_are_kept(tmp_path: Path) -> None:
    model = weights_of(write_model(tmp_path, {"a.weight": ("BF16", [1000]), "mask": ("BOOL", [7])}, dtype="bfloat16"))
    inputs = {"policy": [model], "data": [Rows(0, 0)]}
    for fields, number in [
        ({}, 3),
        ({"keep": {"save_total_limit": 5}}, 6),
        ({"max_steps": 10, "save_steps": 10, "save_minutes": None}, 1),
        ({"max_steps": 11, "save_steps": 10, "save_minutes": None}, 2),
        ({"max_steps": 10, "save_steps": 10}, 3),
    ]:
        found, _ = foretell(SFTConfig.model_validate(fields), "policy", inputs, prepares=True)
        assert found.checkpoints == number * 12 * 1000, fields
        assert found.peak == found.prepared + found.checkpoints + found.output  # type: ignore[operator]


def test_the_weights_of_steps_that_may_be_published_count_beside_checkpoints(tmp_path: Path) -> None:
    model = weights_of(write_model(tmp_path, {"a.weight": ("BF16", [1000])}, dtype="bfloat16"))
    chosen = {"select": "best by heldout/nll", "eval_steps": 10}
    for fields, number in [
        (chosen, 4),
        ({"eval_steps": 10}, 0),
        ({**chosen, "keep": {"save_total_limit": 5}}, 7),
        ({**chosen, "max_steps": 30}, 2),
        ({**chosen, "max_steps": 9}, 0),
    ]:
        with_them, _ = foretell(SFTConfig.model_validate(fields), "policy", {"policy": [model], "data": [Rows(0, 0)]}, prepares=True)
        without = {name: value for name, value in fields.items() if name != "select"}
        found, _ = foretell(SFTConfig.model_validate(without), "policy", {"policy": [model], "data": [Rows(0, 0)]}, prepares=True)
        assert with_them.checkpoints is not None and found.checkpoints is not None
        assert with_them.checkpoints - found.checkpoints == number * 4 * 1000, fields


@pytest.mark.parametrize(("save_dtype", "size"), [("auto", 2), ("float32", 4), ("bfloat16", 2)])
def test_the_type_that_is_published_counts_for_this_stage_and_those_after_it(tmp_path: Path, save_dtype: str, size: int) -> None:
    model = weights_of(write_model(tmp_path, {"a.weight": ("BF16", [1000])}, dtype="bfloat16"))
    first, content = foretell(
        SFTConfig.model_validate({"save_dtype": save_dtype}), "policy", {"policy": [model], "data": [Rows(0, 0)]}, prepares=True
    )
    second, _ = foretell(DPOConfig(), "policy", {"policy": [content], "data": [Rows(0, 0)]}, prepares=True)
    assert first.output == second.output == 1000 * size + model.other_bytes


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["self_attn.o_proj", "lm_head"], r".*layers\.1\..*proj", ["nothing"]])
def test_adapters_are_as_large_as_peft_makes_them(tiny: Path, targets: str | list[str]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    found = adapter_parameters(weights_of(tiny), LoraRecipe(r=4, target_modules=targets))
    if targets == ["nothing"]:
        assert found is None
        return
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert found == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_only_adapters_are_trained_and_the_merged_model_is_published_beside_them(tiny: Path) -> None:
    model = weights_of(tiny)
    config = SFTConfig.model_validate({"lora": {"r": 4}})
    found, _ = foretell(config, "policy", {"policy": [model], "data": [Rows(0, 0)]}, prepares=True)
    adapter = adapter_parameters(model, LoraRecipe(r=4))
    assert adapter is not None
    assert (found.checkpoints, found.output) == (3 * 12 * adapter, model.num_bytes("float32") + model.other_bytes + 4 * adapter)


def test_a_merge_writes_its_weights_before_they_are_published(tiny: Path) -> None:
    model = weights_of(tiny)
    found, _ = foretell(MergeConfig(), "policy", {"policies": [model, model]}, prepares=False)
    assert (found.checkpoints, found.output) == (model.num_bytes("float32"), model.num_bytes("float32") + model.other_bytes)


def test_fewer_rows_are_less(chat_file: Path) -> None:
    whole = read_content(DataSource(data=str(chat_file)))
    assert isinstance(whole, Rows)
    assert (whole.num_bytes, round(whole.num_rows)) == (chat_file.stat().st_size, 24)
    for fields, share in [
        ({"max_samples": 6}, 0.25),
        ({"held_out": 0.25, "part": "train"}, 0.75),
        ({"held_out": 0.25, "part": "held_out"}, 0.25),
    ]:
        part = read_content(DataSource.model_validate({"data": str(chat_file), **fields}))
        assert isinstance(part, Rows)
        assert part.num_bytes == pytest.approx(share * whole.num_bytes, rel=0.01)


def test_a_report_grows_with_rows_and_policies_and_keeps_no_model(tiny: Path) -> None:
    model = weights_of(tiny)
    found, content = foretell(EvalConfig(), "report", {"policies": [model, model], "data": [Rows(1000, 10)]}, prepares=False)
    assert (found.prepared, found.checkpoints, found.output, content) == (0, 0, 20 * footprint.REPORTED_ROW_BYTES, None)


def test_what_a_run_leaves_is_about_what_was_foretold(pipeline_file: Path, tmp_path: Path, posttrain: Callable[..., Ended]) -> None:
    rows = json.loads(posttrain("plan", pipeline_file, "--root", tmp_path / "runs", "--json").out)
    assert posttrain("run", pipeline_file, "--root", tmp_path / "runs").code == 0
    for row in rows:
        stage = tmp_path / "runs" / "test" / row["stage"]
        output = sum(path.stat().st_size for path in (stage / "output").rglob("*") if path.is_file())
        assert 0.4 < row["disk_bytes"]["output"] / output < 2.5, row["stage"]
        if row["kind"] == "eval":
            continue
        assert row["disk_bytes"]["output"] == pytest.approx(output, rel=0.1), "weights are counted"
        entries = [
            Path(json.loads((stage / name).read_text())["path"]) for name in ("prepared.json", "reference.json") if (stage / name).exists()
        ]
        prepared = sum(path.stat().st_size for entry in entries for path in entry.iterdir() if path.suffix in (".arrow", ".npy"))
        assert 0.4 < row["disk_bytes"]["prepared"] / prepared < 2.5, row["stage"]


def test_pairs_that_are_split_and_answers_that_are_kept_are_foretold(tiny: Path, tmp_path: Path, posttrain: Callable[..., Ended]) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 500)
    asked = [{"prompt": f"what is the colour of bird {n}?", "checks": [{"kind": "regex_match", "pattern": "e"}]} for n in range(16)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        f"""
run: test
sources: {{base: {{model: {tiny}}}, prefs: {{data: {pairs}}}, prompts: {{data: {tmp_path}/prompts.jsonl}}}}
stages:
  kto: {{inputs: {{policy: base, data: prefs}}, max_steps: 1, global_batch_size: 8, max_length: 128}}
  rlhf: {{inputs: {{policy: base, data: prompts}}, checkers: [regex_match], max_steps: 3, global_batch_size: 4, num_generations: 4,
         max_completion_length: 16, max_length: 128}}
"""
    )
    rows = {row["stage"]: row["disk_bytes"] for row in json.loads(posttrain("plan", file, "--root", tmp_path, "--json").out)}
    ended = posttrain("run", file, "--root", tmp_path)
    assert ended.code == 0, ended.err
    stage = tmp_path / "test" / "kto"
    entries = [Path(json.loads((stage / pointer).read_text())["path"]) for pointer in ("prepared.json", "reference.json")]
    size = sum(path.stat().st_size for entry in entries for path in entry.iterdir() if path.suffix in (".arrow", ".npy"))
    assert 0.7 < rows["kto"]["prepared"] / size < 1.4
    assert rows["kto"]["completions"] == 0
    kept = (tmp_path / "test" / "rlhf" / "completions.jsonl").stat().st_size
    assert 0.8 < rows["rlhf"]["completions"] / kept < 1.9
    assert rows["rlhf"]["total"] == sum(rows["rlhf"][name] for name in ("prepared", "output", "completions"))
