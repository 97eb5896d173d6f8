"""DPO against the paper's formula in a plain torch loop, and its reference against the policy that went in."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.batch import epoch_order
from stages.dpo import LossType
from tests.conftest import Ended, read_lines, read_samples

Cli = Callable[..., Ended]
FROM_BASE = ("stages.dpo.inputs.policy=base",)
CONSTANT = ("stages.dpo.lr_scheduler_type=constant", "stages.dpo.warmup_steps=0")
ZERO3 = ("launcher.num_processes=2", "stages.sft.deepspeed=ds_configs/zero3.json", "stages.dpo.deepspeed=ds_configs/zero3.json")


def losses(stage: Path) -> list[float]:
    """The loss of each step."""
    return [line["loss"] for line in read_lines(stage / "metrics.jsonl")]


def run(posttrain: Cli, pipeline_file: Path, root: Path, *overrides: str) -> Path:
    """Run the chain up to the stage under `root`; the stage's directory."""
    ended = posttrain("run", pipeline_file, "--root", root, "--until", "dpo", *overrides)
    assert ended.code == 0, ended.err
    return root / "test" / "dpo"


def sum_logps(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """log pi(answer | prompt), one row by itself."""
    logps = model(torch.tensor([prompt + answer])).logits[0, :-1].log_softmax(-1)
    return logps[len(prompt) - 1 :].gather(1, torch.tensor(answer)[:, None]).sum()


def reference_losses(directory: Path, rows: list[dict[str, Any]], *, num_steps: int, batch: int, lr: float, beta: float) -> list[float]:
    """DPO by the paper (eq. 7), a pair at a time: AdamW, norm clipped to 1."""
    model, frozen = (AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    stream = [int(i) for epoch in range(2) for i in epoch_order(len(rows), 0, epoch)]
    found = []
    for step in range(num_steps):
        loss = torch.zeros(())
        for index in stream[step * batch : (step + 1) * batch]:
            row = rows[index]
            with torch.no_grad():
                reference = [sum_logps(frozen, row["prompt_ids"], row[key]) for key in ("chosen_ids", "rejected_ids")]
            policy = [sum_logps(model, row["prompt_ids"], row[key]) for key in ("chosen_ids", "rejected_ids")]
            margin = (policy[0] - reference[0]) - (policy[1] - reference[1])
            loss = loss - torch.nn.functional.logsigmoid(beta * margin) / batch
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


def test_losses_equal_those_of_the_paper(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> None:
    stage = run(posttrain, pipeline_file, tmp_path, *CONSTANT, "stages.dpo.beta=0.3")
    rows = read_samples(stage)
    expected = reference_losses(tmp_path / "test" / "sft" / "output", rows, num_steps=4, batch=8, lr=1e-3, beta=0.3)
    assert losses(stage) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("stages.dpo.lora={}",),
        ("stages.sft.lora={}",),
        ("stages.sft.lora={}", "stages.dpo.lora={}"),
        ZERO3,
        (*ZERO3, "stages.sft.lora={}", "stages.dpo.lora={}"),
        FROM_BASE,
    ],
    ids=["full-full", "full-lora", "lora-full", "lora-lora", "zero3 full-full", "zero3 lora-lora", "base"],
)
def test_the_first_loss_is_ln_2_since_the_reference_is_the_input_policy(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    stage = run(posttrain, pipeline_file, tmp_path, "stages.dpo.max_steps=3", "stages.dpo.warmup_steps=0", *overrides)
    assert losses(stage)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses(stage)[-1] != pytest.approx(math.log(2), abs=1e-5), "it did not train"


@pytest.mark.parametrize("overrides", [("launcher.num_processes=2",), ("stages.dpo.per_device_train_batch_size=1",), ZERO3])
def test_ranks_and_micro_batches_change_no_loss(posttrain: Cli, pipeline_file: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    plain = run(posttrain, pipeline_file, tmp_path / "plain", *CONSTANT, *FROM_BASE)
    other = run(posttrain, pipeline_file, tmp_path / "other", *CONSTANT, *FROM_BASE, *overrides)
    assert losses(other) == pytest.approx(losses(plain), rel=1e-4)


def test_every_loss_type_of_trl_trains(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> None:
    every = ", ".join(get_args(LossType))
    stage = run(
        posttrain,
        pipeline_file,
        tmp_path,
        *FROM_BASE,
        f"stages.dpo.loss_type=[{every}]",
        "stages.dpo.label_smoothing=0.1",
        "stages.dpo.max_steps=2",
    )
    assert all(math.isfinite(loss) for loss in losses(stage))


def test_the_list_of_loss_types_is_that_of_trl() -> None:
    import inspect

    from trl.trainer.dpo_trainer import DPOTrainer

    source = inspect.getsource(DPOTrainer._compute_loss)
    assert {f'"{name}"' for name in get_args(LossType)} <= set(source.replace("(", " ").replace(":", " ").split())


def test_a_pair_that_cannot_teach_is_refused(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> None:
    same = tmp_path / "same.jsonl"
    same.write_text('{"prompt": "a?", "chosen": "b", "rejected": "b"}\n')
    ended = posttrain("run", pipeline_file, "--root", tmp_path / "runs", "--until", "dpo", *FROM_BASE, f"sources.prefs.data={same}")
    assert ended.code == 2
    assert "same.jsonl:1" in ended.err
    assert len(ended.err.strip().splitlines()) == 1
