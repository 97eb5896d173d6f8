"""ORPO: SFT and preference alignment in one step, from a base model and preference pairs, without a reference.

  loss = -log p(c) / |c|  -  beta * log sigmoid(log odds(c) - log odds(r))               (Hong et al., 2024, eq. 6)

Reads: policy (the start), data (preference pairs), heldout (pairs that it is measured on).  Writes: policy.
Other losses of pairs alone are here too: `simpo` (Meng et al., 2024) and `cpo` (Xu et al., 2024).
Differences from TRL's experimental ORPO and CPO trainers: 1. the losses are our own (`posttrain/pair_losses.py`); 2. a pair's answers
alone are trained, not its prompt, and each pair counts the same; 3. the global batch is config.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.recipe import TrainingConfig
from posttrain.stage import Role, Stage, StageContext


class ORPOConfig(TrainingConfig):
    """What ORPO learns, and how."""

    heldout_metrics: ClassVar[Any] = {
        "heldout/loss": "low", "heldout/nll_loss": "low", "heldout/rewards/accuracies": "high", "heldout/rewards/margins": "high",
    }  # fmt: skip

    loss_type: Literal["orpo", "simpo", "cpo"] = "orpo"
    """Which loss."""
    beta: float = Field(0.1, gt=0)
    """Weight of the odds ratio; of the other losses the scale of the log-probabilities (2.0 to 2.5 is usual for `simpo`)."""
    simpo_gamma: float = Field(0.5, ge=0)
    """Margin between the two answers that `simpo` asks for."""
    cpo_alpha: float = Field(1.0, ge=0)
    """Weight of the chosen answer's own loss in `simpo` (whose paper has 0) and `cpo`."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs taken to be labelled the wrong way round, for `cpo`."""
    learning_rate: float = Field(8e-6, gt=0)
    """Peak learning rate, after warm-up."""
    global_batch_size: int = Field(64, ge=1)
    """Preference pairs for each optimizer step, over all ranks."""

    @model_validator(mode="after")
    def _settings_are_of_the_loss(self) -> "ORPOConfig":
        users = {"simpo_gamma": {"simpo"}, "cpo_alpha": {"simpo", "cpo"}, "label_smoothing": {"cpo"}}
        for name in users:
            is_changed = getattr(self, name) != type(self).model_fields[name].default
            if is_changed and self.loss_type not in users[name]:
                raise ValueError(f"{name}: is for loss_type {' and '.join(sorted(users[name]))}, not {self.loss_type}; leave it out")
        return self


def encoder(config: ORPOConfig, tokenizer: Any, contract: Any, at: str) -> Any:
    """Pairs -> token ids of prompt, chosen and rejected."""
    from posttrain.data.samples import pair_encoder

    return pair_encoder(tokenizer, contract, max_length=config.max_length, on_overflow=config.on_overflow, at=at)


def prepare(context: StageContext[ORPOConfig]) -> None:
    """Rows -> samples, checked; no model, no process group."""
    from transformers import TrainingArguments

    from posttrain.fit import prepare_training
    from posttrain.heldout import prepare_heldout

    prepare_training(context, TrainingArguments, encoder)
    prepare_heldout(context, encoder)


def run(context: StageContext[ORPOConfig]) -> dict[str, float]:
    """Train and publish; every rank."""
    from transformers import TrainingArguments

    from posttrain import pair_losses
    from posttrain.data.prepared import read_prepared
    from posttrain.fit import OwnLoss, bare_model, fit, open_fitting
    from posttrain.forward import attach
    from posttrain.heldout import open_heldout
    from posttrain.layout import pair_group
    from posttrain.models import probe_rows
    from posttrain.sequence import team_of

    config = context.config
    settings: dict[str, Any] = {
        "orpo": {"beta": config.beta},
        "simpo": {"beta": config.beta, "simpo_gamma": config.simpo_gamma, "cpo_alpha": config.cpo_alpha},
        "cpo": {"beta": config.beta, "label_smoothing": config.label_smoothing, "cpo_alpha": config.cpo_alpha},
    }[config.loss_type]
    loss_of = getattr(pair_losses, config.loss_type)

    class Trainer(OwnLoss):
        layouts = ("shared", "packed")

        def groups(self, samples: Any) -> list[Any]:
            rows = self.samples[list(samples)]
            answers = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
            return [pair_group(*pair) for pair in zip(rows["prompt_ids"], answers, strict=True)]

        def weights(self, batch: dict[str, Any]) -> dict[str, float]:
            return {"": len(batch["labels"]) / 2}

        def losses(self, output: Any, told: Any) -> tuple[Any, dict[str, Any]]:
            (chosen, rejected), (num_chosen, num_rejected) = output.log_probs.sum(1).chunk(2), output.label_mask.sum(1).chunk(2)
            loss, figures = loss_of(chosen, rejected, num_chosen, num_rejected, **settings)
            better, worse = figures["rewards/chosen"], figures["rewards/rejected"]
            figures |= {"rewards/accuracies": (better > worse).float(), "rewards/margins": better - worse}
            return loss, {**figures, "logps/chosen": chosen, "logps/rejected": rejected}

    fitting = open_fitting(context, TrainingArguments)
    prepared = read_prepared(context)
    trainer = Trainer(fitting)
    attach(bare_model(trainer.model), team=team_of(context))
    trainer.prepared, trainer.samples, trainer.pad = prepared, prepared.load(), fitting.tokenizer.pad_token_id
    trainer.heldout = open_heldout(context, trainer)
    return fit(trainer, context, fitting, probe_rows(trainer.samples, ("prompt_ids", "chosen_ids")))


STAGE = Stage(
    kind="orpo",
    config=ORPOConfig,
    inputs={"policy": Role("policy"), "data": Role("dataset"), "heldout": Role("dataset", optional=True)},
    output="policy",
    prepare=prepare,
    run=run,
    encoder=encoder,
)
