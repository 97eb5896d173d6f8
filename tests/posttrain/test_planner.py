"""What a stage needs is told before it runs: bytes as the ZeRO paper counts them, activations as PyTorch keeps them, operations as
Kaplan counts them, and the least that it would fit on. The formulas are written out again here, by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain import planner
from posttrain.hardware import HARDWARE, detect
from posttrain.planner import Job, Shape, capacity_bytes, estimate, memory, recommend, shape_of, train_flops
from tests.conftest import Ended

H100, A100 = HARDWARE["h100-80gb"], HARDWARE["a100-80gb"]
GB = 10**9


def llama(
    hidden: int, layers: int, intermediate: int, heads: int, keys: int, vocabulary: int, *, tied: bool = False
) -> dict[str, list[int]]:
    """Shapes of the tensors of a Llama."""
    width = hidden // heads * keys
    tensors = {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    if not tied:
        tensors["lm_head.weight"] = [vocabulary, hidden]
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors |= {f"{at}.self_attn.{name}_proj.weight": [hidden, hidden] for name in "qo"}
        tensors |= {f"{at}.self_attn.{name}_proj.weight": [width, hidden] for name in "kv"}
        tensors |= {f"{at}.mlp.{name}_proj.weight": [intermediate, hidden] for name in ("gate", "up")}
        tensors |= {f"{at}.mlp.down_proj.weight": [hidden, intermediate]}
        tensors |= {f"{at}.{name}.weight": [hidden] for name in ("input_layernorm", "post_attention_layernorm")}
    return tensors


def config(hidden: int, layers: int, intermediate: int, heads: int, keys: int, vocabulary: int) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return dict(zip(names, (hidden, layers, intermediate, heads, keys, vocabulary), strict=True))


LLAMA_7B, LLAMA_70B = (4096, 32, 11008, 32, 32, 32000), (8192, 80, 28672, 64, 8, 32000)


@pytest.fixture
def seven() -> Shape:
    """Llama-2-7B."""
    return shape_of(config(*LLAMA_7B), llama(*LLAMA_7B))


@pytest.fixture
def seventy() -> Shape:
    """Llama-2-70B, whose keys are shared by eight queries."""
    return shape_of(config(*LLAMA_70B), llama(*LLAMA_70B))


def job(**fields: Any) -> Job:
    """SFT of samples of eight tokens, so that next to nothing is needed beside the weights and what belongs to them."""
    return Job(
        **{"kind": "sft", "world_size": 8, "per_node": 8, "max_length": 8, "global_batch_size": 4096, "micro_batch_tokens": 8, **fields}
    )


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_the_shapes_of_llamas_are_those_that_their_makers_tell(seven: Shape, seventy: Shape) -> None:
    assert (seven.num_parameters, seventy.num_parameters) == (6_738_415_616, 68_976_648_192)
    assert seven.active_parameters == seven.linear_parameters == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert (seventy.query_width, seventy.key_width, seventy.hidden_width, seventy.is_gated) == (8192, 1024, 28672, True)
    assert seventy.largest_layer == 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192


def test_tied_tables_are_counted_once_and_give_logits_all_the_same() -> None:
    tied = shape_of(config(*LLAMA_7B), llama(*LLAMA_7B, tied=True))
    assert tied.num_parameters == 6_738_415_616 - 32000 * 4096
    assert tied.head_parameters == 32000 * 4096


def test_of_experts_a_token_meets_some() -> None:
    """Mixtral-8x7B: 46.7 billion parameters, of which a token uses 12.9, tables counted."""
    plain = (4096, 32, 14336, 32, 8, 32000)
    tensors = {name: shape for name, shape in llama(*plain).items() if ".mlp." not in name}
    for layer in range(32):
        at = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{at}.gate.weight"] = [8, 4096]
        for expert in range(8):
            tensors |= {f"{at}.experts.{expert}.w{number}.weight": [14336, 4096] for number in (1, 3)}
            tensors[f"{at}.experts.{expert}.w2.weight"] = [4096, 14336]
    found = shape_of({**config(*plain), "num_local_experts": 8, "num_experts_per_tok": 2}, tensors)
    assert found.num_parameters == pytest.approx(46.7 * GB, rel=0.001)
    assert found.active_parameters + 2 * found.head_parameters == pytest.approx(12.9 * GB, rel=0.005)
    assert found.hidden_width == 2 * 14336


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_a_model_of_the_zero_paper_takes_what_the_paper_says(seven: Shape, stage: int, gigabytes: float) -> None:
    """Rajbhandari et al., 2020, figure 1: 7.5 billion parameters on 64 ranks in mixed precision."""
    shape = replace(seven, num_parameters=7_500_000_000)
    found = memory(shape, job(zero_stage=stage, world_size=64), None)
    assert (found.weights + found.gradients + found.optimizer) / GB == pytest.approx(gigabytes, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "weights", "gradients", "optimizer"),
    [
        ({"bf16": False}, 4, 4, 8),
        ({}, 4, 4, 8),
        ({"zero_stage": 1}, 2, 2, 12 / 8),
        ({"zero_stage": 2}, 2, 2 / 8, 12 / 8),
        ({"zero_stage": 3}, 2 / 8, 2 / 8, 12 / 8),
        ({"zero_stage": 1, "bf16": False}, 4, 4, 12 / 8),
        ({"zero_stage": 3, "bf16": False}, 4 / 8, 4 / 8, 12 / 8),
        ({"zero_stage": 1, "moment_bytes": 2}, 2, 2, 6 / 8),
        ({"fsdp": "full_shard"}, 4 / 8, 4 / 8, 8 / 8),
        ({"fsdp": "shard_grad_op", "bf16": False}, 4 / 8, 4 / 8, 8 / 8),
    ],
)
def test_each_parameter_takes_so_many_bytes_of_a_rank(
    seven: Shape, fields: dict[str, Any], weights: float, gradients: float, optimizer: float
) -> None:
    found = memory(seven, job(**fields), None)
    each = [value / 6_738_415_616 for value in (found.weights, found.gradients, found.optimizer)]
    assert each == pytest.approx([weights, gradients, optimizer], abs=1e-6)


def test_what_is_offloaded_is_in_the_memory_of_the_machine(seven: Shape) -> None:
    on, off = (memory(seven, job(zero_stage=3, offload_optimizer=off, offload_weights=off), H100) for off in (False, True))
    assert (off.weights, off.gradients, off.optimizer) == (0, 0, 0)
    assert off.host == (2 + 2 + 12) * 6_738_415_616 // 8 and on.host == 0


def test_adapters_alone_have_gradients_and_frozen_weights_may_have_four_bits(seven: Shape) -> None:
    plain = memory(seven, job(num_trained=40_000_000), None)
    assert plain.weights == 2 * 6_738_415_616 + 4 * 40_000_000
    assert (plain.gradients, plain.optimizer) == (4 * 40_000_000, 8 * 40_000_000)
    four = memory(seven, job(num_trained=40_000_000, in_4bit=True), None)
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert four.weights == pytest.approx(4.127 / 8 * linear + 2 * (6_738_415_616 - linear) + 4 * 40_000_000, abs=2)


def test_ddp_holds_gradients_twice(seven: Shape) -> None:
    one, two = (memory(seven, job(world_size=n, bf16=False), None) for n in (1, 2))
    assert two.buffers - one.buffers == 4 * 6_738_415_616


def test_the_activations_of_a_layer_are_those_that_are_written_down(seven: Shape) -> None:
    h, i = 4096, 11008
    plain = job(bf16=False)
    assert planner.token_bytes(seven, plain, recompute=False) == 32 * 4 * (6 * h + 5 * h + 4 * i) + 3 * 4 * h
    assert planner.token_bytes(seven, plain, recompute=True) == 32 * 4 * h + 3 * 4 * h
    sharded = job(zero_stage=3)
    assert planner.token_bytes(seven, sharded, recompute=False) == 32 * (16 * h + 2 * (4 * h + 4 * i)) + 3 * 2 * h


@pytest.mark.parametrize(("keys", "lora"), [(4, False), (2, False), (4, True)])
def test_a_token_keeps_what_pytorch_is_counted_to_keep(keys: int, lora: bool) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from posttrain import settle
    from posttrain.forward import attach, exact_layouts
    from posttrain.layout import Group, conversation_group

    small = (128, 3, 352, 4, keys, 256)
    model: Any = LlamaForCausalLM(LlamaConfig(**config(*small)))
    attach(model)
    assert exact_layouts(model, model, ["packed"], 64)[0] == ["packed"]
    if lora:
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    torch.manual_seed(0)

    def groups(_: Any) -> list[Group]:
        return [conversation_group(torch.randint(0, 256, (128,)).tolist(), [True] * 128)]

    counted = settle._bytes_per_token(model, groups, "packed", 0, team_size=1)
    shape = shape_of(config(*small), {name: list(tensor.shape) for name, tensor in LlamaForCausalLM(model.config).named_parameters()})
    asked = job(bf16=False, num_trained=1 if lora else None)
    told = planner.token_bytes(shape, asked, recompute=False) + planner._logit_bytes(shape, asked, 128) / 128
    assert told == pytest.approx(counted, rel=0.1)


def test_rlhf_holds_its_reference_its_judges_and_a_cache(seven: Shape) -> None:
    fields = {"kind": "rlhf", "zero_stage": 2, "num_generations": 8, "max_completion_length": 256, "max_length": 512}
    alone = memory(seven, job(**fields), None)
    both = memory(seven, job(**fields, is_referenced=True, judges=(seven,)), None)
    assert both.frozen == (2 + 4) * 6_738_415_616 and alone.frozen == 0
    # Under ZeRO-3 whole weights are gathered to sample; as many rows as 2 GiB of keys and values hold are answered at once.
    sampling = memory(seven, job(**{**fields, "zero_stage": 3, "world_size": 64}), None)
    row = 2 * 32 * 4096 * 2 * 512
    assert (sampling.phase, sampling.cache) == ("sample", 2 * 2**30 // row * row)
    assert sampling.weights + sampling.buffers > 2 * 6_738_415_616


@pytest.mark.parametrize("adapters", [0, 100_000_000])
def test_what_is_published_is_in_memory_a_file_and_a_layer_at_a_time(seventy: Shape, adapters: int) -> None:
    found = memory(seventy, job(zero_stage=3, num_trained=adapters or None, max_shard_bytes=2 * GB), None)
    layer = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    assert found.publishing == 2 * GB + 4 * layer + 4 * adapters
    assert memory(replace(seventy, vocabulary_size=256_000), job(), None).publishing == GB + 4 * 256_000 * 8192


# --- time ------------------------------------------------------------------------------------------------------------


def test_gpt_3_took_the_operations_that_its_makers_say() -> None:
    """Brown et al., 2020, table D.1: 3.14e23 for 300 billion tokens, attention not counted."""
    gpt = (12288, 96, 49152, 96, 96, 50257)
    tensors = {name: shape for name, shape in llama(*gpt, tied=True).items() if "gate" not in name}
    shape = shape_of(config(*gpt), tensors)
    assert 300e9 * train_flops(shape, job(), 0, recompute=False) == pytest.approx(3.14e23, rel=0.01)
    # With a causal mask attention to 2,048 tokens is half of PaLM's 12 L a s.
    attention = train_flops(shape, job(), 2048, recompute=False) - train_flops(shape, job(), 0, recompute=False)
    assert attention == 6 * 96 * 12288 * 2048


def test_a_stage_computes_what_it_must_beside_forward_and_backward(seven: Shape) -> None:
    m, head = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096
    flops = {
        name: train_flops(seven, asked, 0, recompute=recompute)
        for name, asked, recompute in [
            ("sft", job(), False),
            ("again", job(), True),
            ("dpo", job(kind="dpo"), False),
            ("frozen", job(num_trained=1000), False),
        ]
    }
    assert flops["sft"] == 6 * (m + head)
    assert flops["again"] == 8 * m + 6 * head
    assert flops["dpo"] == 8 * (m + head)
    assert flops["frozen"] == 4 * (m + head) + 6 * 1000


def test_time_is_tokens_by_operations_by_the_speed_that_is_assumed(seven: Shape) -> None:
    asked = job(world_size=8, zero_stage=1, max_length=2048, tokens_per_row=2048.0, num_steps=100, global_batch_size=512, recompute=False,
                micro_batch_tokens=16384)  # fmt: skip
    found = planner.time(seven, asked, A100, price_per_hour=2.0)
    flops = 6 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096) + 6 * 32 * 4096 * 2048
    assert found.compute_s == pytest.approx(512 * 2048 * flops / 8 / (312e12 * A100.efficiency))
    assert found.step_s == pytest.approx(max(found.compute_s, found.communication_s, found.launch_s) + found.update_s)
    assert found.total_s == pytest.approx(100 * found.step_s)
    assert found.gpu_hours == pytest.approx(800 * found.step_s / 3600)
    assert found.price == pytest.approx(2 * 800 * found.step_s / 3600)
    assert found.tokens_per_s == pytest.approx(512 * 2048 / found.step_s)


def test_time_is_unknown_where_the_number_of_steps_is(seven: Shape) -> None:
    found = planner.time(seven, job(num_steps=None), H100, price_per_hour=2.0)
    assert (found.total_s, found.gpu_hours, found.price) == (None, None, None)
    assert found.tokens_per_s > 0


# --- what fits -------------------------------------------------------------------------------------------------------


def test_the_least_that_fits_is_recommended(seven: Shape) -> None:
    """On 8 H100: 16 bytes of a parameter do not fit whole, and 4 + 12 / 8 do."""
    asked = job(max_length=2048, micro_batch_tokens=None, global_batch_size=128)
    found = estimate(seven, replace(asked, zero_stage=None), H100)
    assert found.fits is False
    assert found.recommendation is not None
    assert (found.recommendation.zero_stage, found.recommendation.num_nodes, found.recommendation.offload) == (1, 1, False)
    assert "deepspeed: ds_configs/zero1.json" in planner.explain_misfit(found)
    again = replace(asked, zero_stage=1, world_size=found.recommendation.world_size)
    assert estimate(seven, again, H100).fits is True


def test_nodes_are_added_before_anything_is_offloaded_and_only_where_they_can_be(seventy: Shape) -> None:
    asked = job(max_length=2048, micro_batch_tokens=None, global_batch_size=128)
    found = recommend(seventy, asked, H100, may_add_nodes=True)
    assert found is not None
    assert (found.zero_stage, found.offload) == (3, False)
    assert 16 * seventy.num_parameters / found.world_size < capacity_bytes(asked, H100)
    fewer = replace(asked, zero_stage=3, world_size=found.world_size // 2, recompute=True, micro_batch_tokens=1)
    assert memory(seventy, fewer, H100).total > capacity_bytes(asked, H100)
    here = recommend(seventy, asked, H100, may_add_nodes=False)
    assert here is not None
    assert (here.zero_stage, here.offload, here.num_nodes) == (3, True, 1)


@pytest.mark.parametrize("batch", [8, 24, 48, 96, 128])
def test_the_global_batch_is_shared_equally_by_what_is_recommended(seventy: Shape, batch: int) -> None:
    asked = job(max_length=2048, micro_batch_tokens=None, global_batch_size=batch)
    found = recommend(seventy, asked, H100, may_add_nodes=True)
    assert found is not None
    assert batch % found.world_size == 0


def test_weights_of_four_bits_are_never_to_be_sharded(seventy: Shape) -> None:
    asked = job(max_length=2048, global_batch_size=64, num_trained=200_000_000, in_4bit=True, micro_batch_tokens=None)
    found = recommend(seventy, asked, HARDWARE["a100-40gb"], may_add_nodes=True)
    assert found is None or found.zero_stage != 3


def test_who_asked_for_fsdp_is_told_what_it_takes_by_fsdp(seventy: Shape) -> None:
    asked = job(max_length=2048, micro_batch_tokens=None, global_batch_size=128)
    fsdp, once, zero = (replace(asked, **way) for way in ({"fsdp": "full_shard"}, {"fsdp": "shard_grad_op"}, {"zero_stage": 3}))
    for each in (fsdp, once):
        found = recommend(seventy, each, H100, may_add_nodes=True)
        assert found is not None
        assert (found.fsdp, found.zero_stage, found.offload) == ("full_shard", None, False)
        assert found.text.startswith("fsdp: full_shard, ")
    totals = [memory(seventy, each, H100).total for each in (fsdp, once, zero)]
    assert totals[0] == pytest.approx(totals[2], rel=0.05)
    assert totals[1] - totals[0] > 2 * 0.9 * seventy.num_parameters, "all weights in bfloat16"


def test_what_nothing_holds_is_told(seventy: Shape) -> None:
    huge = replace(seventy, num_parameters=10**15, linear_parameters=10**15, active_parameters=10**15)
    found = estimate(huge, job(), H100, may_add_nodes=True)
    assert found.recommendation is None
    assert "nothing up to 64 nodes would do" in planner.explain_misfit(found)


@pytest.mark.parametrize(
    ("models", "name"),
    [
        ([], "cpu"),
        (["NVIDIA H100 80GB HBM3"] * 8, "h100-80gb"),
        (["NVIDIA A100-SXM4-40GB"], "a100-40gb"),
        (["NVIDIA A100-SXM4-80GB"], "a100-80gb"),
        (["NVIDIA L40S"], "l40s-48gb"),
        (["Tesla V100-SXM2-32GB"], None),
    ],
)
def test_the_hardware_of_a_machine_is_read_off_its_driver(tmp_path: Path, models: list[str], name: str | None) -> None:
    for number, model in enumerate(models):
        (tmp_path / f"0000:{number}").mkdir()
        (tmp_path / f"0000:{number}" / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 130\n")
    assert detect(tmp_path) == name


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """SFT of a model of which only the header of its weights is there, as large as Llama-2-7B."""
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**config(*LLAMA_7B), "dtype": "bfloat16"}))
    header = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in llama(*LLAMA_7B).items()}
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    row = {"messages": [{"role": "user", "content": "why? " * 50}, {"role": "assistant", "content": "because " * 200}]}
    (tmp_path / "chat.jsonl").write_text((json.dumps(row) + "\n") * 512)
    path = tmp_path / "pipeline.yaml"
    path.write_text(
        json.dumps(
            {
                "run": "planned",
                "sources": {"base": {"model": str(directory)}, "chat": {"data": str(tmp_path / "chat.jsonl")}},
                "stages": {"sft": {"inputs": {"policy": "base", "data": "chat"}, "global_batch_size": 128}},
                "launcher": {"kind": "local", "num_processes": 8},
            }
        )
    )
    return path


def plan(posttrain: Callable[..., Ended], pipeline: Path, *overrides: str) -> dict[str, Any]:
    ended = posttrain("plan", pipeline, "--root", pipeline.parent / "runs", "--json", *overrides)
    assert ended.code == 0, ended.err
    row: dict[str, Any] = json.loads(ended.out)[0]
    return row


def test_plan_tells_memory_time_and_price_on_the_named_hardware(posttrain: Callable[..., Ended], pipeline: Path) -> None:
    named = ["launcher.hardware=h100-80gb", "launcher.price_per_hour=2.5", "stages.sft.deepspeed=ds_configs/zero3.json"]
    needs = plan(posttrain, pipeline, *named)["needs"]
    assert (needs["hardware"], needs["world_size"], needs["fits"]) == ("h100-80gb", 8, True)
    assert needs["memory"]["optimizer"] == 12 * 6_738_415_616 // 8
    assert needs["memory"]["total"] <= needs["capacity_bytes"]
    time = needs["time"]
    assert time["total_s"] == pytest.approx(4 * time["step_s"])  # 512 rows, 128 a step
    assert time["price"] == pytest.approx(2.5 * 8 * time["total_s"] / 3600)
    ended = posttrain("plan", pipeline, "--root", pipeline.parent / "runs", "--memory", *named)
    assert "8 x h100-80gb" in ended.out and "GPU-hours" in ended.out


def test_hardware_and_price_change_nothing_that_is_made(posttrain: Callable[..., Ended], pipeline: Path) -> None:
    prints = {
        plan(posttrain, pipeline, *more)["fingerprint"] for more in ([], ["launcher.hardware=l40s-48gb", "launcher.price_per_hour=1"])
    }
    assert len(prints) == 1


def test_what_cannot_fit_on_the_named_hardware_is_not_started(posttrain: Callable[..., Ended], pipeline: Path) -> None:
    ended = posttrain("run", pipeline, "--root", pipeline.parent / "runs", "launcher.hardware=h100-80gb")
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("error: stages.sft: needs ")
    assert "on each h100-80gb" in line and "deepspeed: ds_configs/zero1.json" in line
    assert not (pipeline.parent / "runs" / "planned" / "sft").exists()


def test_hardware_that_is_not_known_is_refused_with_the_nearest_name(posttrain: Callable[..., Ended], pipeline: Path) -> None:
    for command in ("plan", "run"):
        ended = posttrain(command, pipeline, "--root", pipeline.parent / "runs", "launcher.hardware=H100")
        assert ended.code == 2
        assert ended.err == "error: launcher.hardware: 'H100' is not known here; did you mean 'h100-80gb'?\n"


def test_nothing_is_told_of_a_model_that_is_yet_to_be_fetched(posttrain: Callable[..., Ended], pipeline: Path) -> None:
    row = plan(posttrain, pipeline, "launcher.hardware=h100-80gb", f"sources.base={{model: org/model, revision: {'a' * 40}}}")
    assert row["needs"] is None
