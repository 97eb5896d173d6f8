"""DPO against the paper's formula in a plain torch loop, and its reference against the policy that went in."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.batch import epoch_order
from posttrain.stage import StageContext
from stages.dpo import STAGE, DPOConfig, LossType
from tests.conftest import Ended, read_lines, read_samples
from tests.posttrain.test_reference import dpo_context, policy_of

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


@pytest.mark.parametrize(
    "overrides",
    [
        ("launcher.num_processes=2",),
        ("stages.dpo.micro_batch_tokens=1",),
        ("stages.dpo.layout=padded", "stages.dpo.micro_batch_tokens=300"),
        ("stages.dpo.layout=packed", "stages.dpo.micro_batch_tokens=300"),
        ("stages.dpo.layout=shared", "stages.dpo.micro_batch_tokens=300"),
        ("stages.dpo.layout=shared", "launcher.num_processes=2", "stages.dpo.micro_batch_tokens=100"),
        ("stages.dpo.gradient_checkpointing=true",),
        ("launcher.num_processes=2", "stages.dpo.deepspeed=ds_configs/zero2.json"),
        ZERO3,
    ],
    ids=lambda overrides: " ".join(Path(o.rpartition(".")[2] if not o.endswith("json") else o).stem for o in overrides),
)
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


# --- against TRL -------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "beta": 0.3,
    "label_smoothing": 0.1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_steps": 2,
    "weight_decay": 0.01,
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": [name]} for name in get_args(LossType)},
    "sum": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "weighted": {"loss_type": ["sigmoid"], "trainer": {"use_weighting": True}},
    "length-desensitized": {"loss_type": ["sigmoid"], "trainer": {"ld_alpha": 0.4}},
    "js": {"loss_type": ["sigmoid"], "trainer": {"f_divergence_type": "js_divergence"}},
}
COMPARED = (
    "loss",
    "grad_norm",
    "entropy",
    "mean_token_accuracy",
    *(f"{name}/{side}" for name in ("rewards", "logps", "logits") for side in ("chosen", "rejected")),
)
"""What both log; the last steps' differ by the rounding that AdamW makes of a gradient near zero."""


def trained_by_us(root: Path, policy: Path, pairs: Path, **fields: Any) -> tuple[StageContext[DPOConfig], list[dict[str, float]]]:
    """Run the stage in this process; what it logged of each step."""
    context = dpo_context(root, policy, pairs, **{**SETTINGS, **fields})
    assert STAGE.prepare is not None
    STAGE.prepare(context)
    STAGE.run(context)
    return context, read_lines(context.directory / "metrics.jsonl")


def trained_by_trl(context: StageContext[DPOConfig], directory: Path, **fields: Any) -> list[dict[str, float]]:
    """TRL's own trainer on the same tokens in the same order: padded, its own fused head, its own reference."""
    import copy

    from datasets import Dataset
    from trl import DPOConfig as TrainerConfig
    from trl import DPOTrainer

    class Trainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # tokens already

    model, tokenizer = policy_of(context)
    rows = [{key: row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in read_samples(context.directory)]
    arguments = TrainerConfig(
        output_dir=str(directory),
        per_device_train_batch_size=8,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        max_length=None,
        bf16=False,
        use_cpu=True,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        **{**SETTINGS, **{name: value for name, value in fields.items() if name != "trainer"}, **fields.get("trainer", {})},
    )
    trainer: Any = Trainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=arguments,
        train_dataset=Dataset.from_list([rows[int(row)] for row in epoch_order(len(rows), 0, 0)]),
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_logged_alike(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        for name in COMPARED:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_gradient_and_metrics_are_those_of_trls_own_trainer(tmp_path: Path, tiny: Path, pairs_file: Path, variant: str) -> None:
    context, found = trained_by_us(tmp_path, tiny, pairs_file, micro_batch_tokens=100_000, **VARIANTS[variant])
    assert_logged_alike(found, trained_by_trl(context, tmp_path / "trl", **VARIANTS[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_cut_into_micro_batches_learns_what_a_whole_one_does(tmp_path: Path, tiny: Path, pairs_file: Path, variant: str) -> None:
    _, whole = trained_by_us(tmp_path / "whole", tiny, pairs_file, micro_batch_tokens=100_000, **VARIANTS[variant])
    _, cut = trained_by_us(tmp_path / "cut", tiny, pairs_file, micro_batch_tokens=200, **VARIANTS[variant])
    assert_logged_alike(cut, whole)


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
