"""Reward: a model that gives an answer one number, learned from which of two answers was preferred.

  loss = -log sigmoid(r(c) - r(r) - margin)  +  center_rewards_coefficient * (r(c) + r(r))^2
                                              (Bradley and Terry, 1952; Ouyang et al., 2022, eq. 1; Eisenstein et al., 2023, eq. 2)

Reads: policy (the start), data (preference pairs), heldout (pairs that the reward model is rated on).  Writes: reward_model.
Differences from trl.RewardTrainer: 1. a prompt is computed once for both answers; 2. the score head is proven to survive, as the
published model must give the same scores; 3. accuracy with its interval, calibration and what of the reward is length are measured.
"""

from typing import Any

from pydantic import Field

from posttrain.recipe import TrainingConfig
from posttrain.stage import Role, Stage, StageContext


class RewardConfig(TrainingConfig):
    """What a reward model learns, and how."""

    margin: float = Field(0.0, ge=0)
    """By how much the chosen answer's reward should be higher."""
    center_rewards_coefficient: float | None = Field(None, gt=0)
    """Pull of the rewards of a pair toward a sum of 0; 0.01 is usual."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate, after warm-up."""
    global_batch_size: int = Field(64, ge=1)
    """Preference pairs for each optimizer step, over all ranks."""


def encoder(config: RewardConfig, tokenizer: Any, contract: Any, at: str) -> Any:
    """Pairs -> token ids of prompt, chosen and rejected."""
    from posttrain.data.samples import pair_encoder

    return pair_encoder(tokenizer, contract, max_length=config.max_length, on_overflow=config.on_overflow, at=at)


def prepare(context: StageContext[RewardConfig]) -> None:
    """Rows -> samples, checked; no model, no process group."""
    from transformers import TrainingArguments

    from posttrain.data.rows import Pair
    from posttrain.data.source import open_source
    from posttrain.error import UserError
    from posttrain.fit import prepare_training

    prepare_training(context, TrainingArguments, encoder)
    for given in context.inputs.get("heldout", ()):
        source = open_source(given.data, f"{context.at}: {given.name}")
        for row in source.rows():
            if not isinstance(row, Pair):
                raise UserError(f"{row.origin}: is a conversation, and {context.at} is rated on preference pairs")


def run(context: StageContext[RewardConfig]) -> dict[str, float]:
    """Train, publish, and rate on held-out pairs; every rank."""
    from torch.nn.functional import logsigmoid
    from transformers import TrainingArguments

    from posttrain.data.prepared import read_prepared
    from posttrain.fit import OwnLoss, bare_model, fit, open_fitting
    from posttrain.forward import attach_rewards
    from posttrain.models import probe_rows
    from posttrain.reward import reward_group

    config = context.config

    class Trainer(OwnLoss):
        layouts = ("shared", "packed")

        def groups(self, samples: Any) -> list[Any]:
            rows = self.samples[list(samples)]
            answers = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
            return [reward_group(*pair, pad=self.pad) for pair in zip(rows["prompt_ids"], answers, strict=True)]

        def weights(self, batch: dict[str, Any]) -> dict[str, float]:
            return {"": len(batch["labels"]) / 2}

        def losses(self, output: Any) -> tuple[Any, dict[str, Any]]:
            chosen, rejected = output.log_probs.sum(1).chunk(2)
            loss = -logsigmoid(chosen - rejected - config.margin)
            if config.center_rewards_coefficient is not None:
                loss = loss + config.center_rewards_coefficient * (chosen + rejected) ** 2
            figures = {"rewards/chosen": chosen, "rewards/rejected": rejected, "margin": chosen - rejected}
            return loss, {**figures, "accuracy": (chosen > rejected).float()}

    fitting = open_fitting(context, TrainingArguments, output="reward_model")
    prepared = read_prepared(context)
    trainer = Trainer(fitting)
    attach_rewards(bare_model(trainer.model))
    trainer.prepared, trainer.samples, trainer.pad = prepared, prepared.load(), fitting.tokenizer.pad_token_id
    metrics = fit(trainer, context, fitting, probe_rows(trainer.samples, ("prompt_ids", "chosen_ids"), count=8))
    return metrics | _rate(context, fitting, trainer)


def _rate(context: StageContext[RewardConfig], fitting: Any, trainer: Any) -> dict[str, float]:
    """How well the trained model tells held-out answers apart; nothing where there are none."""
    if "heldout" not in context.inputs:
        return {}
    import numpy as np

    from posttrain.data.samples import LeftOut
    from posttrain.data.source import open_source
    from posttrain.fit import bare_model
    from posttrain.forward import exact_layouts
    from posttrain.progress import Progress
    from posttrain.reward import rate, reward_group, score_groups

    progress = Progress(context.directory, is_main=context.is_main)
    progress.phase("rate on held-out pairs")
    encode = encoder(context.config, fitting.tokenizer, fitting.contract, context.at).encode
    given = context.input("heldout")
    samples, sources = [], []
    for row in open_source(given.data, f"{context.at}: {given.name}").rows():
        try:
            samples.append(encode(row).columns)
        except LeftOut:
            continue  # it is told by `num_pairs`
        sources.append(row.origin.rpartition(":")[0].rpartition("/")[2])
    if not samples:
        return {}
    groups = [reward_group(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"]), trainer.pad) for row in samples]
    model, call = bare_model(trainer.model), trainer.model_wrapped
    with trainer.accelerator.autocast():
        layout = exact_layouts(call, model, trainer.layouts, max(group.longest for group in groups))[0][0]
        rewards = score_groups(
            call,
            model,
            groups,
            layout,
            pad=trainer.pad,
            micro_batch_tokens=trainer.batches.micro_batch_tokens,
            rank=context.rank,
            world_size=context.world_size,
        )
    lengths = np.array([[len(row["chosen_ids"]), len(row["rejected_ids"])] for row in samples])
    return {f"heldout/{name}": value for name, value in rate(rewards, lengths, sources).items()}


STAGE = Stage(
    kind="reward",
    config=RewardConfig,
    inputs={"policy": Role("policy"), "data": Role("dataset"), "heldout": Role("dataset", optional=True)},
    output="reward_model",
    prepare=prepare,
    run=run,
    encoder=encoder,
)
