"""Reference log-probabilities are those of plain passes, made once for all that share them, and never twice where they are cut off."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from posttrain import disk, reference
from posttrain.config import DataSource, ModelSource
from posttrain.data.prepared import read_prepared
from posttrain.data.samples import IGNORED
from posttrain.error import Preempted
from posttrain.forward import attach
from posttrain.layout import grid, pair_group
from posttrain.models import load_policy, load_tokenizer
from posttrain.reference import Asked, Reference, add_reference, compute_reference, read_reference, weigh_pairs
from posttrain.stage import Input, StageContext
from stages.dpo import STAGE, DPOConfig
from tests.conftest import Ended, read_lines

Cli = Callable[..., Ended]


def dpo_context(root: Path, policy: Path, pairs: Path, name: str = "dpo", **fields: Any) -> StageContext[DPOConfig]:
    """The stage as a run would have it, for calls in this process."""
    directory = root / "run" / name
    directory.mkdir(parents=True, exist_ok=True)
    inputs = {
        "policy": (Input("base", "policy", "f", ModelSource(model=str(policy))),),
        "data": (Input("prefs", "dataset", "f", DataSource(data=str(pairs))),),
    }
    config = DPOConfig(**{"max_length": 128, "global_batch_size": 8, **fields})
    return StageContext(name, config, inputs, directory, root)


def policy_of(context: StageContext[Any]) -> tuple[Any, Any]:
    """The policy that goes into the stage, and its tokenizer."""
    given = context.input("policy")
    tokenizer, contract = load_tokenizer(given, context.at)
    return load_policy(given.model, tokenizer, contract, context.at, dtype=torch.float32), tokenizer


def compute(
    context: StageContext[Any], layouts: tuple[str, ...] = ("shared", "packed"), on_rows: Callable[[list[int]], None] = lambda rows: None
) -> Reference:
    """Compute the stage's reference with as much of a trainer as that reads; `on_rows` is told which rows are asked for."""
    model, tokenizer = policy_of(context)
    attach(model)
    prepared = read_prepared(context)
    rows = prepared.load()

    def groups(samples: Any) -> Any:
        on_rows(list(samples))
        return [pair_group(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in (rows[int(s)] for s in samples)]

    trainer = SimpleNamespace(
        model=model,
        is_deepspeed_enabled=False,
        accelerator=Accelerator(cpu=True),
        prepared=prepared,
        layouts=layouts,
        groups=groups,
        pad=tokenizer.pad_token_id,
    )
    found = read_reference(context, prepared)
    compute_reference(context, trainer, [Asked(found, prepared, groups)])
    return found


def plain_log_probs(model: Any, prompt: list[int], answer: list[int]) -> np.ndarray[Any, Any]:
    """log pi of each token of the answer, one row by itself."""
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(answer)[:, None])[:, 0].numpy()


def place(context: StageContext[Any]) -> str:
    STAGE.prepare(context)  # type: ignore[misc]
    return str(json.loads((context.directory / "reference.json").read_text())["path"])


@pytest.mark.parametrize("layouts", [("shared", "packed"), ("packed",), ("padded",)], ids=str)
@pytest.mark.parametrize("budget", [None, 100, 1])
def test_it_is_what_plain_passes_give_every_token(
    tmp_path: Path, tiny: Path, pairs_file: Path, layouts: tuple[str, ...], budget: int | None
) -> None:
    context = dpo_context(tmp_path, tiny, pairs_file, micro_batch_tokens=budget)
    place(context)
    found = compute(context, layouts)
    model, _ = policy_of(context)
    rows = list(read_prepared(context).load())
    assert len(rows) == 16
    for number, row in enumerate(rows):
        for values, side in zip(found[number], ("chosen_ids", "rejected_ids"), strict=True):
            np.testing.assert_allclose(values, plain_log_probs(model, row["prompt_ids"], row[side]), rtol=0, atol=1e-4)


def test_it_lies_under_the_root_for_every_loss_rate_and_run(tmp_path: Path, tiny: Path, pairs_file: Path) -> None:
    first = place(dpo_context(tmp_path, tiny, pairs_file))
    assert Path(first).parent == tmp_path / ".reference"
    changes: list[dict[str, Any]] = [
        {"beta": 0.7},
        {"learning_rate": 1e-3, "seed": 5},
        {"loss_type": ["ipo"]},
        {"global_batch_size": 4, "num_train_epochs": 3.0},
        {"lora": {}},
        {"micro_batch_tokens": 50, "layout": "padded", "gradient_checkpointing": True},
        {"name": "other"},
    ]
    assert {place(dpo_context(tmp_path, tiny, pairs_file, **changed)) for changed in changes} == {first}


def test_it_is_another_for_other_weights_other_pairs_and_other_numbers(tmp_path: Path, tiny: Path, pairs_file: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other_weights, same_weights = tmp_path / "other", tmp_path / "same"
    for copied in (other_weights, same_weights):
        shutil.copytree(tiny, copied)
    weights = load_file(other_weights / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other_weights / "model.safetensors", metadata={"format": "pt"})
    other_pairs = tmp_path / "pairs.jsonl"
    other_pairs.write_text(pairs_file.read_text().replace("the answer is red", "the answer is blue", 1))
    assert other_pairs.read_text() != pairs_file.read_text()
    places = [
        place(dpo_context(tmp_path, tiny, pairs_file)),
        place(dpo_context(tmp_path, other_weights, pairs_file)),
        place(dpo_context(tmp_path, tiny, other_pairs)),
        place(dpo_context(tmp_path, tiny, pairs_file, max_length=127)),
        place(dpo_context(tmp_path, tiny, pairs_file, system_prompt="be short")),
        place(dpo_context(tmp_path, tiny, pairs_file, bf16=True)),
        place(dpo_context(tmp_path, tiny, pairs_file, bf16=True, lora={})),
    ]
    assert len(set(places)) == len(places)
    assert place(dpo_context(tmp_path, same_weights, pairs_file)) == places[0], "a copy of the weights is the same reference"


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("size", [0, 100])
def test_a_chunk_that_is_not_what_was_written_is_computed_again(tmp_path: Path, suffix: str, size: int) -> None:
    found = Reference(tmp_path / "reference", np.full((4, 2), 3, dtype=np.int64))
    assert not found.has_chunk(0)
    found.put_chunk(0, np.zeros(24, dtype=np.float32))
    assert found.has_chunk(0)
    file = found.chunk_file(0).with_suffix(suffix)
    content = bytearray(file.read_bytes())
    content[size] ^= 1
    file.write_bytes(content[: size or None])
    assert not found.has_chunk(0)


def test_what_is_cut_off_by_a_signal_goes_on_with_the_rows_that_are_missing(
    tmp_path: Path, tiny: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dpo_context(tmp_path / "whole", tiny, pairs_file)
    place(whole)
    expected = compute(whole)
    monkeypatch.setattr(reference, "ROWS_AT_ONCE", 5)
    context = dpo_context(tmp_path / "cut", tiny, pairs_file)
    path = Path(place(context))
    asked: list[int] = []

    def interrupt(rows: list[int]) -> None:
        asked.extend(rows)
        if max(rows) >= 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="keeps the reference of the rows up to 5"):
        compute(context, on_rows=interrupt)
    assert max(asked) == 9
    assert not read_reference(context, read_prepared(context)).is_whole
    chunks = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert sorted(chunks) == ["rows-000000000.json", "rows-000000000.npy"], "the chunk at hand is given up between micro-batches"

    again: list[int] = []
    finished: dict[str, int] = {}

    def follow(rows: list[int]) -> None:
        again.extend(rows)
        finished.update({file.name: file.stat().st_mtime_ns for file in path.iterdir()})

    found = compute(context, on_rows=follow)
    assert set(again) == set(range(5, 16))
    assert {name: finished[name] for name in chunks} == chunks
    assert sorted(file.name for file in path.iterdir()) == ["log_probs.npy", "manifest.json"] and found.is_whole
    for row in range(16):
        for ours, theirs in zip(found[row], expected[row], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_chunk_smaller_than_the_last_and_a_lone_pair_are_whole(
    tmp_path: Path, tiny: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at_once, number in ((3, 16), (1, 4), (16, 16), (256, 1)):
        monkeypatch.setattr(reference, "ROWS_AT_ONCE", at_once)
        few = tmp_path / f"{number}.jsonl"
        few.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:number]))
        context = dpo_context(tmp_path / f"{at_once}", tiny, few)
        place(context)
        found = compute(context)
        assert len(np.load(found.path / "log_probs.npy")) == found.offsets[-1] == found.lengths.sum()
        assert len(found.lengths) == number


def test_adapters_change_nothing_of_the_reference(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> None:
    files = []
    for name, overrides in (("full", ()), ("lora", ("stages.dpo.lora={lora_dropout: 0.3}",))):
        root = tmp_path / name
        ended = posttrain("run", pipeline_file, "--root", root, "--only", "dpo", "stages.dpo.inputs.policy=base", ONE_STEP, *overrides)
        assert ended.code == 0, ended.err
        (file,) = root.glob(".reference/*/log_probs.npy")
        files.append(file)
    assert files[0].parent.name == files[1].parent.name
    np.testing.assert_allclose(*map(np.load, files), rtol=0, atol=1e-5)


# --- what TRL is given -------------------------------------------------------------------------------------------------


def floats(*values: float) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.float32)


def test_a_batch_gets_the_sums_of_each_answer_and_a_mask_in_place_of_labels() -> None:
    batch: dict[str, Any] = dict(grid([pair_group([1, 2], [[3, 4], [5]]), pair_group([6], [[7], [8, 9, 10]])], 0))
    labels = batch["labels"]
    pairs = [(floats(-1, -2), floats(-4)), (floats(-8), floats(-16, -32, -64))]
    made = add_reference(batch, pairs, None)
    assert sorted(made) == ["attention_mask", "completion_mask", "input_ids", "ref_chosen_logps", "ref_rejected_logps"]
    assert made["completion_mask"].tolist() == (labels != IGNORED).long().tolist()
    assert made["ref_chosen_logps"].tolist() == [-3, -8]
    assert made["ref_rejected_logps"].tolist() == [-4, -112]
    assert weigh_pairs(made) == {"": 2, "entropy": 7, "logits/chosen": 3, "mean_token_accuracy": 3, "logits/rejected": 4}


@pytest.mark.parametrize(
    ("alpha", "chosen", "rejected"), [(0.5, [-2, -8], [-4, -64]), (0.0, [-1, -8], [-4, -16]), (1.0, [-3, -8], [-4, -112])]
)
def test_tokens_beyond_the_shorter_answer_count_by_ld_alpha(alpha: float, chosen: list[float], rejected: list[float]) -> None:
    batch: dict[str, Any] = dict(grid([pair_group([1, 2], [[3, 4], [5]]), pair_group([6], [[7], [8, 9, 10]])], 0))
    made = add_reference(batch, [(floats(-1, -2), floats(-4)), (floats(-8), floats(-16, -32, -64))], alpha)
    assert made["ref_chosen_logps"].tolist() == chosen
    assert made["ref_rejected_logps"].tolist() == rejected


# --- in a pipeline -----------------------------------------------------------------------------------------------------

ONE_STEP = "stages.dpo.max_steps=1"


@pytest.mark.parametrize("overrides", [(), ("stages.dpo.deepspeed=ds_configs/zero3.json",)], ids=["ddp", "zero3"])
def test_two_ranks_compute_what_one_does(posttrain: Cli, pipeline_file: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    values = []
    for name, more in (("one", ()), ("two", ("launcher.num_processes=2", "stages.dpo.micro_batch_tokens=150", *overrides))):
        root = tmp_path / name
        ended = posttrain("run", pipeline_file, "--root", root, "--only", "dpo", "stages.dpo.inputs.policy=base", ONE_STEP, *more)
        assert ended.code == 0, ended.err
        (file,) = root.glob(".reference/*/log_probs.npy")
        values.append((file.parent.name, np.load(file)))
    assert values[0][0] == values[1][0]
    np.testing.assert_allclose(values[0][1], values[1][1], rtol=0, atol=1e-5)


def test_a_second_run_with_another_beta_reads_what_the_first_computed(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> None:
    def run(*overrides: str) -> None:
        ended = posttrain("run", pipeline_file, "--root", tmp_path, "--only", "dpo", "stages.dpo.inputs.policy=base", ONE_STEP, *overrides)
        assert ended.code == 0, ended.err

    run()
    (file,) = tmp_path.glob(".reference/*/log_probs.npy")
    # Marked, so that whoever reads it shows it: of every chosen token, a nat more.
    np.save(file, np.load(file) + 1)
    disk.write_sealed(file.parent / disk.MANIFEST, {"files": disk.describe_files(file.parent, [file])})
    before = file.stat().st_mtime_ns
    run("run=again", "stages.dpo.beta=0.5", "stages.dpo.loss_type=[hinge]")
    assert (file.stat().st_mtime_ns, list(tmp_path.glob(".reference/*/log_probs.npy"))) == (before, [file])
    first, second = (read_lines(tmp_path / name / "dpo" / "metrics.jsonl")[0] for name in ("test", "again"))
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert second["rewards/chosen"] < -1
