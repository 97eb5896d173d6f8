"""ORPO and its kin against the papers' formulas in a plain torch loop, in every layout, on several ranks and under adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.batch import epoch_order
from tests.conftest import Ended, read_lines, read_samples

Cli = Callable[..., Ended]
BATCH, RATE = 8, 1e-3


@pytest.fixture
def orpo_file(pipeline_file: Path) -> Path:
    """A pipeline of one step, from the tiny base model on pairs."""
    text = pipeline_file.read_text()
    head = text[: text.index("stages:")]
    pipeline_file.write_text(
        f"""{head}stages:
  orpo:
    inputs: {{policy: base, data: prefs}}
    learning_rate: {RATE}
    lr_scheduler_type: constant
    warmup_steps: 0
    global_batch_size: {BATCH}
    max_length: 128
    num_train_epochs: 2
"""
    )
    return pipeline_file


def run(posttrain: Cli, file: Path, root: Path, *overrides: str) -> Path:
    ended = posttrain("run", file, "--root", root, *overrides)
    assert ended.code == 0, ended.err
    return root / "test" / "orpo"


def losses(stage: Path) -> list[float]:
    return [line["loss"] for line in read_lines(stage / "metrics.jsonl")]


def logps(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probability of each token of an answer, one row by itself, `(T,)`."""
    found = model(torch.tensor([prompt + answer])).logits[0, :-1].log_softmax(-1)
    return found[len(prompt) - 1 :].gather(1, torch.tensor(answer)[:, None])[:, 0]


def by_orpo(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    odds = [each.mean().exp() / (1 - each.mean().exp()) for each in (chosen, rejected)]
    return -chosen.mean() - 0.25 * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))


def by_simpo(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return -torch.log(torch.sigmoid(2.0 * chosen.mean() - 2.0 * rejected.mean() - 0.5)) - chosen.mean()


def by_cpo(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return -torch.log(torch.sigmoid(0.1 * (chosen.sum() - rejected.sum()))) - chosen.mean()


def reference_losses(directory: Path, vocabulary: int, rows: list[dict[str, Any]], formula: Callable[..., torch.Tensor]) -> list[float]:
    """The losses of four steps, a pair at a time: AdamW, norm clipped to 1."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    # The contract brings tokens that the model does not know yet, each as the mean of the old ones.
    known = model.config.vocab_size
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight.data[known:] = table.weight.data[:known].mean(dim=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    stream = [int(i) for epoch in range(2) for i in epoch_order(len(rows), 0, epoch)]
    found = []
    for step in range(4):
        loss = torch.zeros(())
        for index in stream[step * BATCH : (step + 1) * BATCH]:
            row = rows[index]
            chosen, rejected = (logps(model, row["prompt_ids"], row[name]) for name in ("chosen_ids", "rejected_ids"))
            loss = loss + formula(chosen, rejected) / BATCH
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("overrides", "formula"),
    [
        (("stages.orpo.beta=0.25",), by_orpo),
        (("stages.orpo.loss_type=simpo", "stages.orpo.beta=2.0"), by_simpo),
        (("stages.orpo.loss_type=cpo",), by_cpo),
    ],
    ids=["orpo", "simpo", "cpo"],
)
def test_losses_equal_those_of_the_papers(
    posttrain: Cli, orpo_file: Path, tiny: Path, tmp_path: Path, overrides: tuple[str, ...], formula: Callable[..., torch.Tensor]
) -> None:
    stage = run(posttrain, orpo_file, tmp_path, *overrides)
    vocabulary = json.loads((stage / "output" / "config.json").read_text())["vocab_size"]
    assert losses(stage) == pytest.approx(reference_losses(tiny, vocabulary, read_samples(stage), formula), rel=1e-5)


def test_every_layout_and_number_of_ranks_learns_the_same(posttrain: Cli, orpo_file: Path, tmp_path: Path) -> None:
    whole = losses(run(posttrain, orpo_file, tmp_path / "whole"))
    ways = {
        "padded": ("stages.orpo.layout=padded", "stages.orpo.micro_batch_tokens=64"),
        "ranks": ("launcher.num_processes=2",),
        "zero3": ("launcher.num_processes=2", "stages.orpo.deepspeed=ds_configs/zero3.json"),
    }
    for name, overrides in ways.items():
        assert losses(run(posttrain, orpo_file, tmp_path / name, *overrides)) == pytest.approx(whole, rel=1e-5), name


def test_adapters_are_trained_merged_and_prefer_the_chosen(posttrain: Cli, orpo_file: Path, tmp_path: Path) -> None:
    stage = run(posttrain, orpo_file, tmp_path, "stages.orpo.lora={r: 8}", "stages.orpo.num_train_epochs=20")
    lines = read_lines(stage / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["rewards/accuracies"] > 0.9
    assert (stage / "output" / "adapter" / "adapter_model.safetensors").is_file()


def test_it_resumes_to_the_very_same_weights(posttrain: Cli, orpo_file: Path, tmp_path: Path) -> None:
    options = ("stages.orpo.num_train_epochs=4", "stages.orpo.save_steps=1")
    whole = run(posttrain, orpo_file, tmp_path / "whole", *options)
    # The limit leaves less time than saving is taken to need before it was measured, so it stops at once.
    stopped = posttrain("run", orpo_file, "--root", tmp_path / "cut", "--time-limit", "1s", *options)
    assert stopped.code == 75, stopped.err
    cut = run(posttrain, orpo_file, tmp_path / "cut", *options)
    assert (cut / "output" / "model.safetensors").read_bytes() == (whole / "output" / "model.safetensors").read_bytes()
    assert losses(cut) == losses(whole)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.orpo.simpo_gamma=1.0", "simpo_gamma: is for loss_type simpo, not orpo; leave it out"),
        ("stages.orpo.loss_type=dpo", "stages.orpo.loss_type"),
        ("stages.orpo.trainer={beta: 0.2}", "stages.orpo.trainer.beta: is a field of the stage"),
        ("stages.orpo.trainer={max_completion_length: 8}", "has no such field"),
    ],
)
def test_settings_that_do_not_fit_are_refused(posttrain: Cli, orpo_file: Path, tmp_path: Path, override: str, said: str) -> None:
    ended = posttrain("run", orpo_file, "--root", tmp_path, override)
    assert ended.code == 2
    assert said in ended.err and len(ended.err.splitlines()) == 1


def test_conversations_are_refused(posttrain: Cli, orpo_file: Path, tmp_path: Path) -> None:
    ended = posttrain("run", orpo_file, "--root", tmp_path, "stages.orpo.inputs.data=chat")
    assert ended.code == 2
    assert "is a conversation, and stages.orpo learns from preference pairs" in ended.err
