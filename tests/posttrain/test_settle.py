"""How a stage computes is what its config says, else what is exact, fast and fits; written down, and kept when it resumes."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain import settle as module
from posttrain.error import Preempted, UserError
from posttrain.forward import attach
from posttrain.layout import Group, pair_group, restore_attention
from posttrain.recipe import MOST_TOKENS, SHARE_OF_MEMORY
from posttrain.settle import Settled, bytes_to_come, settle
from posttrain.stage import StageContext
from stages.dpo import STAGE, DPOConfig
from tests.conftest import read_lines
from tests.posttrain.test_forward import fresh
from tests.posttrain.test_reference import dpo_context

LONGEST = 20
LONG_RUN = 10**6


def groups(samples: Any) -> list[Group]:
    return [pair_group([3 + int(sample) % 9] * 8, [[20] * 12, [30] * 5]) for sample in samples]


def settled(
    directory: Path, architecture: str = "llama, GQA", *, num_tokens: int = 100, is_resuming: bool = False, **fields: Any
) -> Settled:
    """What is settled for a stage with those fields."""
    return settled_on(fresh(architecture), directory, num_tokens=num_tokens, is_resuming=is_resuming, **fields)


def settled_on(model: Any, directory: Path, *, num_tokens: int = 100, is_resuming: bool = False, **fields: Any) -> Settled:
    attach(model)
    context: StageContext[DPOConfig] = StageContext("dpo", DPOConfig(**fields), {}, directory, directory)
    return settle(
        context,
        model,
        model,
        groups,
        longest=LONGEST,
        num_tokens=num_tokens,
        layouts=["shared", "packed", "padded"],
        pad=0,
        is_resuming=is_resuming,
    )


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`memory(n)`: as if n bytes were free."""
    return lambda free: monkeypatch.setattr(module, "_free_bytes", lambda *_, **__: float(free))


@pytest.mark.parametrize(("stage", "of_each"), [(None, 12), (0, 12), (1, 4 + 8 / 4), (2, 12 / 4), (3, 12 / 4)])
def test_zero_shares_out_what_is_to_come(stage: int | None, of_each: float) -> None:
    model: Any = torch.nn.Linear(30, 10)
    model.device = torch.device("cpu")
    model.bias.requires_grad_(False)
    call: Any = object() if stage is None else SimpleNamespace(zero_optimization_stage=lambda: stage)
    if stage == 3:  # as DeepSpeed leaves a parameter whose parts are elsewhere
        model.weight.ds_numel, model.weight.data = 300, torch.empty(0)
    assert bytes_to_come(call, model, 4) == 300 * of_each


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes here")
def test_who_could_compute_in_bfloat16_on_this_cpu_and_does_not_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else pytest.skip("no flags of the CPU are to be read here")
    settled(tmp_path)
    assert ("`bf16: true`" in capsys.readouterr().out) == ("avx512_bf16" in flags or "amx_bf16" in flags)
    settled(tmp_path, bf16=False)
    assert "bf16" not in capsys.readouterr().out, "who has decided is not asked again"


# --- the layout --------------------------------------------------------------------------------------------------------


def test_the_best_exact_layout_is_taken_and_written_down(tmp_path: Path) -> None:
    found = settled(tmp_path)
    assert (found.layout, found.micro_batch_tokens, found.recompute) == ("shared", MOST_TOKENS["cpu"], False)
    record = json.loads((tmp_path / "layout.json").read_text())
    assert record == {
        "layout": "shared",
        "micro_batch_tokens": MOST_TOKENS["cpu"],
        "recompute": False,
        "why": found.why,
        "sequence_parallel_size": 1,
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes here")
def test_in_16_bits_more_tokens_are_computed_at_once(tmp_path: Path) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert settled(tmp_path).micro_batch_tokens == MOST_TOKENS["cpu in 16 bits"] > MOST_TOKENS["cpu"]


def test_a_model_that_only_padded_rows_are_exact_for_is_computed_padded_and_the_record_says_why(tmp_path: Path) -> None:
    found = settled(tmp_path, "mistral, a narrow window")
    assert found.layout == "padded"
    assert "reaches 16 tokens back, and the longest sequence has 20" in json.loads((tmp_path / "layout.json").read_text())["why"][0]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_what_the_config_says_is_done_in_a_run_of_any_length(tmp_path: Path, layout: str) -> None:
    for num_tokens in (100, LONG_RUN):
        found = settled(tmp_path, num_tokens=num_tokens, layout=layout, micro_batch_tokens=33)
        assert (found.layout, found.micro_batch_tokens, found.why) == (layout, 33, [])


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("architecture", ["bloom", "mamba2", "mistral, a narrow window", "gemma2"])
def test_a_layout_that_the_model_cannot_take_is_refused_by_the_name_of_the_field(tmp_path: Path, layout: str, architecture: str) -> None:
    with pytest.raises(UserError, match=rf"^stages\.dpo\.layout: the model cannot be computed {layout} \(.+\); set it to auto$") as caught:
        settled(tmp_path, architecture, layout=layout)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "layout.json").exists()
    assert settled(tmp_path, architecture).layout == settled(tmp_path, architecture, layout="padded").layout == "padded"


def test_a_long_run_takes_the_faster_of_the_best_layout_and_padded_rows_and_says_what_each_took(tmp_path: Path) -> None:
    found = settled(tmp_path, num_tokens=LONG_RUN, deterministic=False)
    (timed,) = [line for line in found.why if line.startswith("a probe took")]
    milliseconds = {part.split()[-1]: float(part.split()[-3]) for part in timed.split(", ")}
    assert set(milliseconds) == {"shared", "padded"}
    assert milliseconds[found.layout] == min(milliseconds.values())
    assert not any("probe" in line for line in settled(tmp_path, "bloom", num_tokens=LONG_RUN, deterministic=False).why), (
        "there is nothing to choose from"
    )


def test_time_decides_nothing_where_the_same_bytes_are_wanted_as_on_a_cpu_by_default(tmp_path: Path) -> None:
    first, second = (settled(tmp_path, num_tokens=LONG_RUN) for _ in range(2))
    assert first == second
    assert first.layout == "shared" and not any("probe" in line for line in first.why)


def test_settling_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = fresh().train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    settled_on(model, tmp_path, num_tokens=LONG_RUN)
    assert all(parameter.grad is None and torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(each.training for each in model.modules())
    restore_attention(model)
    assert model.config._attn_implementation == "sdpa"


# --- the tokens --------------------------------------------------------------------------------------------------------


def bytes_for_each(directory: Path, memory: Any, architecture: str = "llama, GQA", model: Any = None, **fields: Any) -> float:
    """Bytes that a token takes, by what fits into a given memory, to a thousandth."""
    memory(2**40)
    module.MOST_TOKENS["cpu"], most = 10**12, module.MOST_TOKENS["cpu"]
    try:
        found = settled_on(model or fresh(architecture), directory, **fields)
    finally:
        module.MOST_TOKENS["cpu"] = most
    return SHARE_OF_MEMORY * 2**40 / found.micro_batch_tokens


def kept_by_autograd(model: Any) -> float:
    """Bytes for each token that a plain forward pass keeps, head left out: the reference."""
    storages: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = model.base_model(torch.arange(3, 28)[None])
    assert kept is not None
    return sum(storages.values()) / 25


def test_a_token_is_taken_to_cost_about_what_a_plain_pass_keeps_for_it(tmp_path: Path, memory: Any) -> None:
    each = bytes_for_each(tmp_path, memory)
    assert 0.7 * kept_by_autograd(fresh()) < each < 2 * kept_by_autograd(fresh())


def test_half_the_memory_takes_half_the_tokens_and_plenty_no_more_than_helps(tmp_path: Path, memory: Any) -> None:
    each = bytes_for_each(tmp_path, memory)
    counts = []
    for tokens in (200, 100, 50):
        memory(tokens * each / SHARE_OF_MEMORY * 1.001)
        counts.append(settled(tmp_path).micro_batch_tokens)
    assert counts == [200, 100, 50]
    memory(2**50)
    assert settled(tmp_path).micro_batch_tokens == MOST_TOKENS["cpu"]
    memory(0)
    assert settled(tmp_path).micro_batch_tokens == 1, "a sample is computed all the same"


def test_activations_are_computed_again_only_where_the_longest_sample_would_not_fit(tmp_path: Path, memory: Any) -> None:
    each = bytes_for_each(tmp_path, memory)
    for tokens, recompute in ((LONGEST * 1.05, False), (LONGEST * 0.95, True)):
        memory(tokens * each / SHARE_OF_MEMORY)
        model = fresh()
        found = settled_on(model, tmp_path)
        assert (found.recompute, model.is_gradient_checkpointing) == (recompute, recompute)
        assert any("computed again" in line for line in found.why) == recompute
    for asked in (False, True):
        assert not settled(tmp_path, gradient_checkpointing=asked).recompute, "the config decides"


def test_with_activations_computed_again_more_tokens_fit(tmp_path: Path, memory: Any) -> None:
    model = fresh()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert bytes_for_each(tmp_path, memory, model=model) < 0.8 * bytes_for_each(tmp_path, memory)


# --- resuming ----------------------------------------------------------------------------------------------------------

KEPT = {"layout": "packed", "micro_batch_tokens": 77, "recompute": False, "why": ["so it was"]}


def test_a_stage_that_resumes_keeps_what_was_settled(tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_text(json.dumps(KEPT))
    for fields in ({}, {"layout": "packed"}, {"micro_batch_tokens": 77}):
        found = settled(tmp_path, is_resuming=True, num_tokens=LONG_RUN, **fields)
        assert (found.layout, found.micro_batch_tokens) == ("packed", 77)
        assert json.loads((tmp_path / "layout.json").read_text()) == KEPT
    assert settled(tmp_path).layout == "shared", "one that starts anew does not"


def test_a_resumed_stage_that_is_told_otherwise_settles_anew(tmp_path: Path) -> None:
    for fields, expected in (({"layout": "padded"}, "padded"), ({"micro_batch_tokens": 5}, "shared")):
        (tmp_path / "layout.json").write_text(json.dumps(KEPT))
        found = settled(tmp_path, is_resuming=True, **fields)
        assert found.layout == json.loads((tmp_path / "layout.json").read_text())["layout"] == expected
        assert found.micro_batch_tokens == fields.get("micro_batch_tokens", MOST_TOKENS["cpu"])


def test_a_resumed_stage_computes_activations_again_where_it_did(tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_text(json.dumps({**KEPT, "recompute": True}))
    model = fresh()
    assert settled_on(model, tmp_path, is_resuming=True).recompute and model.is_gradient_checkpointing


def test_a_resumed_stage_that_is_told_to_keep_activations_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_text(json.dumps({**KEPT, "recompute": True}))
    model = fresh()
    settled_on(model, tmp_path, is_resuming=True, gradient_checkpointing=False)
    assert not model.is_gradient_checkpointing


def test_a_stage_cut_off_in_training_goes_on_in_its_layout(
    tmp_path: Path, tiny: Path, pairs_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    context = dpo_context(tmp_path, tiny, pairs_file, max_steps=40)
    assert STAGE.prepare is not None
    STAGE.prepare(context)
    metrics = context.directory / "metrics.jsonl"

    def end() -> None:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    ending = threading.Thread(target=end)
    ending.start()
    with pytest.raises(Preempted):
        STAGE.run(context)
    ending.join()
    assert "computes shared, 512 tokens at once" in capfd.readouterr().out
    (context.directory / "layout.json").write_text(json.dumps(KEPT))
    STAGE.run(context)
    said = capfd.readouterr().out
    assert "resuming from" in said and "computes" not in said
    assert json.loads((context.directory / "layout.json").read_text()) == KEPT
    assert [line["step"] for line in read_lines(metrics)] == list(range(1, 41))
