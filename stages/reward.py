"""Reward: a model that gives an answer one number, learned from which of two answers was preferred.

  loss = -log sigmoid(r(c) - r(r) - m)  +  center_rewards_coefficient * (r(c) + r(r))^2
                                              (Bradley and Terry, 1952; Ouyang et al., 2022, eq. 1; Eisenstein et al., 2023, eq. 2)

Reads: policy (the start), data (preference pairs), heldout (pairs that it is measured on).  Writes: reward_model.
Differences from trl.RewardTrainer: 1. a prompt is computed once for both answers; 2. the score head is proven to survive, as the
published model must give the same scores; 3. accuracy with its interval, calibration and what of the reward is length are measured.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from posttrain.recipe import TrainingConfig
from posttrain.stage import Role, Stage, StageContext


class RewardConfig(TrainingConfig):
    """What a reward model learns, and how."""

    heldout_metrics: ClassVar[Any] = {
        "heldout/loss": "low", "heldout/accuracy": "high", "heldout/mean_margin": "high", "heldout/ece": "low",
    }  # fmt: skip

    margin: float = Field(0.0, ge=0)
    """By how much the chosen answer's reward should be higher, beyond what the `margin` of the pair itself says."""
    center_rewards_coefficient: float | None = Field(None, gt=0)
    """Pull of the rewards of a pair toward a sum of 0; 0.01 is usual."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate, after warm-up."""
    global_batch_size: int = Field(64, ge=1)
    """Preference pairs for each optimizer step, over all ranks."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the published weights; `auto` keeps that of the input policy, whose rounding shows in rewards."""


def encoder(config: RewardConfig, tokenizer: Any, contract: Any, at: str) -> Any:
    """Pairs -> token ids of prompt, chosen and rejected."""
    from posttrain.data.samples import pair_encoder

    return pair_encoder(tokenizer, contract, max_length=config.max_length, on_overflow=config.on_overflow, at=at)


def prepare(context: StageContext[RewardConfig]) -> None:
    """Rows -> samples, checked; no model, no process group."""
    from transformers import TrainingArguments

    from posttrain.fit import prepare_training
    from posttrain.heldout import prepare_heldout

    prepare_training(context, TrainingArguments, encoder)
    prepare_heldout(context, encoder)


def run(context: StageContext[RewardConfig]) -> dict[str, float]:
    """Train and publish; every rank."""
    import numpy as np
    import torch
    from torch.nn.functional import logsigmoid
    from transformers import TrainingArguments

    from posttrain.data.prepared import read_prepared
    from posttrain.fit import OwnLoss, bare_model, fit, open_fitting
    from posttrain.forward import attach_rewards
    from posttrain.heldout import open_heldout
    from posttrain.models import probe_rows
    from posttrain.reward import rate, reward_group
    from posttrain.sequence import team_of

    config = context.config

    class Trainer(OwnLoss):
        layouts = ("shared", "packed")
        told = ("margins",)
        margins: Any

        def groups(self, samples: Any) -> list[Any]:
            rows = self.samples[list(samples)]
            answers = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
            return [reward_group(*pair, pad=self.pad) for pair in zip(rows["prompt_ids"], answers, strict=True)]

        def complete(self, batch: dict[str, Any], samples: Any) -> dict[str, Any]:
            return {**batch, "margins": torch.from_numpy(self.margins[samples])}

        def weights(self, batch: dict[str, Any]) -> dict[str, float]:
            return {"": len(batch["labels"]) / 2}

        def losses(self, output: Any, told: Any) -> tuple[Any, dict[str, Any]]:
            chosen, rejected = output.log_probs.sum(1).chunk(2)
            if not self.model.training:
                self.rated.append(torch.stack([chosen, rejected], 1))
            loss = -logsigmoid(chosen - rejected - told["margins"])
            if config.center_rewards_coefficient is not None:
                loss = loss + config.center_rewards_coefficient * (chosen + rejected) ** 2
            figures = {"rewards/chosen": chosen, "rewards/rejected": rejected, "margin": chosen - rejected}
            return loss, {**figures, "accuracy": (chosen > rejected).float()}

        def measure(self) -> dict[str, float]:
            self.rated: list[torch.Tensor] = []
            found = super().measure()
            rewards = np.empty((self.prepared.num_rows, 2))
            for samples, rated in self._from_ranks(list(zip(self.at_hand, self.rated, strict=True))):
                rewards[samples] = rated.cpu()
            lengths = np.stack([self.prepared.num_listed(name) for name in ("chosen_ids", "rejected_ids")], axis=1)
            files = [origin.rpartition(":")[0].rpartition("/")[2] for origin in self.prepared.samples["origin"]]
            return {"loss": found["loss"], **rate(rewards, lengths, files)}

    def margins(prepared: Any) -> Any:
        """By how much the chosen answers are to be better."""
        return (config.margin + np.nan_to_num(prepared.column("margin").astype(np.float64))).astype(np.float32)

    fitting = open_fitting(context, TrainingArguments, output="reward_model")
    prepared = read_prepared(context)
    trainer: Any = Trainer(fitting)
    attach_rewards(bare_model(trainer.model), team=team_of(context))
    trainer.prepared, trainer.samples, trainer.pad = prepared, prepared.load(), fitting.tokenizer.pad_token_id
    trainer.margins = margins(prepared)
    if "heldout" in context.inputs:
        trainer.heldout = open_heldout(context, trainer, margins=margins(read_prepared(context, "heldout")))
    return fit(trainer, context, fitting, probe_rows(trainer.samples, ("prompt_ids", "chosen_ids"), count=8))


STAGE = Stage(
    kind="reward",
    config=RewardConfig,
    inputs={"policy": Role("policy"), "data": Role("dataset"), "heldout": Role("dataset", optional=True)},
    output="reward_model",
    prepare=prepare,
    run=run,
    encoder=encoder,
)
