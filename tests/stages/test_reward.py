"""The reward model against Bradley and Terry's formula in a plain torch loop, and against itself: published, padded, among others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from posttrain.batch import epoch_order
from tests.conftest import Ended, read_lines, read_samples

Cli = Callable[..., Ended]
BATCH, RATE = 8, 1e-3


@pytest.fixture
def reward_file(pipeline_file: Path) -> Path:
    """A pipeline of one stage, from the tiny base model, rated on the pairs that it learns from."""
    text = pipeline_file.read_text()
    head = text[: text.index("stages:")]
    pipeline_file.write_text(
        f"""{head}stages:
  reward:
    inputs: {{policy: base, data: prefs, heldout: prefs}}
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
    return root / "test" / "reward"


def losses(stage: Path) -> list[float]:
    return [line["loss"] for line in read_lines(stage / "metrics.jsonl")]


def metrics(stage: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((stage / "artifact.json").read_text())["payload"]["metrics"]
    return found


def rewards(model: Any, row: dict[str, Any]) -> list[torch.Tensor]:
    """The rewards of the two answers of a row, each sequence by itself."""
    return [model(input_ids=torch.tensor([row["prompt_ids"] + row[name]])).logits[0, 0] for name in ("chosen_ids", "rejected_ids")]


@pytest.mark.parametrize(
    ("overrides", "margin", "center"),
    [
        ((), 0.0, 0.0),
        (("stages.reward.margin=0.5", "stages.reward.center_rewards_coefficient=0.01"), 0.5, 0.01),
        (("stages.reward.margin=0.25", "sources.prefs.data={rated}"), 0.25, 0.0),
    ],
    ids=["plain", "margin and centering", "margins of pairs"],
)
def test_losses_equal_the_formula(
    posttrain: Cli,
    reward_file: Path,
    tiny: Path,
    pairs_file: Path,
    tmp_path: Path,
    overrides: tuple[str, ...],
    margin: float,
    center: float,
) -> None:
    rated = [{**row, "margin": number / 10} if number % 2 else row for number, row in enumerate(read_lines(pairs_file))]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    stage = run(posttrain, reward_file, tmp_path, *(override.format(rated=tmp_path / "rated.jsonl") for override in overrides))
    own = [row.get("margin", 0.0) if "{rated}" in "".join(overrides) else 0.0 for row in rated]
    config = json.loads((stage / "output" / "config.json").read_text())
    torch.manual_seed(0)  # the head is the first that is drawn by the stage's seed
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, dtype=torch.float32)
    known = model.config.vocab_size
    model.resize_token_embeddings(config["vocab_size"], mean_resizing=False)
    table = model.get_input_embeddings()
    table.weight.data[known:] = table.weight.data[:known].mean(dim=0)
    model.config.pad_token_id = config["pad_token_id"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    rows = read_samples(stage)
    stream = [int(i) for epoch in range(2) for i in epoch_order(len(rows), 0, epoch)]
    found = []
    for step in range(4):
        loss = torch.zeros(())
        for index in stream[step * BATCH : (step + 1) * BATCH]:
            chosen, rejected = rewards(model, rows[index])
            asked = margin + own[rows[index]["row"]]
            loss = loss + (-torch.log(torch.sigmoid(chosen - rejected - asked)) + center * (chosen + rejected) ** 2) / BATCH
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    assert losses(stage) == pytest.approx(found, rel=1e-5)


def test_what_is_published_rates_as_the_trained_model_did_alone_padded_and_among_others(
    posttrain: Cli, reward_file: Path, tmp_path: Path
) -> None:
    stage = run(posttrain, reward_file, tmp_path, "stages.reward.num_train_epochs=20")
    model = AutoModelForSequenceClassification.from_pretrained(stage / "output", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(stage / "output")
    rows = read_samples(stage)
    with torch.no_grad():
        alone = np.array([[float(reward) for reward in rewards(model, row)] for row in rows])
        sequences = [row["prompt_ids"] + row["chosen_ids"] for row in rows]
        for side in ("left", "right"):
            padded = tokenizer.pad({"input_ids": sequences}, padding_side=side, return_tensors="pt")
            np.testing.assert_allclose(model(**padded).logits[:, 0].numpy(), alone[:, 0], atol=1e-4)
    found = metrics(stage)
    difference = alone[:, 0] - alone[:, 1]
    assert found["heldout/accuracy"] == pytest.approx(np.mean(difference > 0))
    assert found["heldout/mean_margin"] == pytest.approx(difference.mean(), rel=1e-3)
    assert found["heldout/accuracy"] > 0.9, "sixteen pairs are learned by heart"
    assert found["heldout/accuracy_low"] < found["heldout/accuracy"] <= found["heldout/accuracy_high"]
    assert found["handoff_logit_drift"] < 1e-4


def test_every_layout_and_number_of_ranks_learns_the_same(posttrain: Cli, reward_file: Path, tmp_path: Path) -> None:
    whole = run(posttrain, reward_file, tmp_path / "whole")
    ways = {
        "padded": ("stages.reward.layout=padded", "stages.reward.micro_batch_tokens=64"),
        "ranks": ("launcher.num_processes=2",),
        "zero3": ("launcher.num_processes=2", "stages.reward.deepspeed=ds_configs/zero3.json"),
    }
    for name, overrides in ways.items():
        stage = run(posttrain, reward_file, tmp_path / name, *overrides)
        assert losses(stage) == pytest.approx(losses(whole), rel=1e-5), name
        assert metrics(stage)["heldout/mean_margin"] == pytest.approx(metrics(whole)["heldout/mean_margin"], rel=1e-3), name


def test_the_head_survives_adapters_and_rewards_are_not_rounded(posttrain: Cli, reward_file: Path, tmp_path: Path, tiny: Path) -> None:
    base = tmp_path / "rounded"
    shutil.copytree(tiny, base)
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(base)
    overrides = (f"sources.base.model={base}", "stages.reward.lora={r: 8}", "stages.reward.num_train_epochs=20")
    stage = run(posttrain, reward_file, tmp_path, *overrides)
    assert metrics(stage)["heldout/accuracy"] > 0.9
    assert metrics(stage)["handoff_logit_drift"] < 1e-4
    model = AutoModelForSequenceClassification.from_pretrained(stage / "output", dtype="auto").eval()
    assert model.dtype == torch.float32, "though the policy is stored in bfloat16"
    with torch.no_grad():
        difference = [float(torch.stack(rewards(model, row)).diff()) for row in read_samples(stage)]
    assert np.mean(np.array(difference) < 0) > 0.9


def test_it_resumes_to_the_very_same_weights(posttrain: Cli, reward_file: Path, tmp_path: Path) -> None:
    options = ("stages.reward.num_train_epochs=4", "stages.reward.save_steps=1")
    whole = run(posttrain, reward_file, tmp_path / "whole", *options)
    assert posttrain("run", reward_file, "--root", tmp_path / "cut", "--time-limit", "1s", *options).code == 75
    cut = run(posttrain, reward_file, tmp_path / "cut", *options)
    assert (cut / "output" / "model.safetensors").read_bytes() == (whole / "output" / "model.safetensors").read_bytes()


def test_a_later_stage_that_wants_a_policy_refuses_it_when_planning(posttrain: Cli, reward_file: Path, tmp_path: Path) -> None:
    reward_file.write_text(reward_file.read_text() + "  dpo: {inputs: {policy: reward, data: prefs}}\n")
    ended = posttrain("plan", reward_file, "--root", tmp_path)
    assert ended.code == 2
    assert "stages.dpo.inputs.policy: 'reward' is a reward_model, not a policy" in ended.err


def test_held_out_conversations_are_refused_before_anything_is_trained(posttrain: Cli, reward_file: Path, tmp_path: Path) -> None:
    ended = posttrain("run", reward_file, "--root", tmp_path, "stages.reward.inputs.heldout=chat")
    assert ended.code == 2
    assert "is a conversation, and stages.reward learns from preference pairs" in ended.err
    assert not (tmp_path / "test" / "reward" / "checkpoints").exists()
