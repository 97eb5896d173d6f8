"""DPO: move a policy toward chosen and away from rejected answers, without a reward model.

  loss = -log sigmoid(beta * [(log pi_c - log ref_c) - (log pi_r - log ref_r)])          (Rafailov et al., 2023, eq. 7)

Reads: policy (the start, and the frozen reference), data (preference pairs), heldout (pairs that it is measured on).  Writes: policy.
Differences from trl.DPOTrainer: 1. the global batch is config; 2. the reference is always the input policy, also under
LoRA, and its log-probs are computed once, before training; 3. a pair over `max_length`, or one whose answers are the same,
is an error unless the config says otherwise.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.recipe import TrainingConfig
from posttrain.stage import Role, Stage, StageContext

LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
    "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


COUPLED = {"aot", "aot_unpaired", "sft"}
"""Losses that are no mean over pairs: two sort the pairs of a batch, one is a mean over all its tokens."""


class DPOConfig(TrainingConfig):
    """What DPO learns, and how."""

    heldout_metrics: ClassVar[Any] = {"heldout/loss": "low", "heldout/rewards/accuracies": "high", "heldout/rewards/margins": "high"}

    beta: float = Field(0.1, gt=0)
    """Pull toward the reference; larger stays closer. Dimensionless."""
    loss_type: list[LossType] = Field(["sigmoid"], min_length=1)
    """Losses as TRL names them; several are added up by `loss_weights`."""
    loss_weights: list[float] | None = None
    """Weight of each loss; 1 by default."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs taken to be labelled the wrong way round, for the losses `robust` and `exo_pair`."""
    learning_rate: float = Field(5e-7, gt=0)
    """Peak learning rate, after warm-up."""
    global_batch_size: int = Field(64, ge=1)
    """Preference pairs for each optimizer step, over all ranks."""

    @model_validator(mode="after")
    def _weights_match(self) -> "DPOConfig":
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"loss_weights: {len(self.loss_weights)} given for {len(self.loss_type)} losses; give one for each")
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise ValueError("label_smoothing: the loss exo_pair needs it above 0, such as 1e-3")
        return self


def encoder(config: DPOConfig, tokenizer: Any, contract: Any, at: str) -> Any:
    """Pairs -> token ids of prompt, chosen and rejected."""
    from posttrain.data.samples import pair_encoder

    return pair_encoder(tokenizer, contract, max_length=config.max_length, on_overflow=config.on_overflow, at=at)


def prepare(context: StageContext[DPOConfig]) -> None:
    """Rows -> samples, checked; no model, no process group."""
    from trl import DPOConfig as TrainerConfig

    from posttrain.fit import prepare_training
    from posttrain.heldout import prepare_heldout
    from posttrain.reference import declare_reference

    prepare_training(context, TrainerConfig, encoder)
    declare_reference(context)
    prepare_heldout(context, encoder)
    if "heldout" in context.inputs:
        declare_reference(context, of="heldout")


def run(context: StageContext[DPOConfig]) -> dict[str, float]:
    """Compute the reference, train and publish; every rank."""
    from trl import DPOConfig as TrainerConfig
    from trl import DPOTrainer

    from posttrain.data.prepared import read_prepared
    from posttrain.fit import OurOrder, bare_model, fit, open_fitting
    from posttrain.forward import attach
    from posttrain.heldout import open_heldout
    from posttrain.layout import pair_group
    from posttrain.models import probe_rows
    from posttrain.reference import Asked, add_reference, compute_reference, join_pairs, read_reference, weigh_pairs
    from posttrain.sequence import team_of

    class Trainer(OurOrder, DPOTrainer):
        layouts = ("shared", "packed")
        is_coupled = not COUPLED.isdisjoint(context.config.loss_type)
        reference: Any

        def groups(self, samples: Any) -> list[Any]:
            rows = self.samples[list(samples)]
            return [
                pair_group(*pair)
                for pair in zip(rows["prompt_ids"], zip(rows["chosen_ids"], rows["rejected_ids"], strict=True), strict=True)
            ]

        def complete(self, batch: dict[str, Any], samples: Any) -> dict[str, Any]:
            return add_reference(batch, [self.reference[sample] for sample in samples], self.ld_alpha)

        def join(self, parts: Any) -> Any:
            return join_pairs(parts)

        def weights(self, batch: dict[str, Any]) -> dict[str, float]:
            return weigh_pairs(batch)

    config = context.config
    fitting = open_fitting(
        context,
        TrainerConfig,
        beta=config.beta,
        loss_type=config.loss_type,
        loss_weights=config.loss_weights,
        label_smoothing=config.label_smoothing,
        max_length=None,
        precompute_ref_log_probs=True,
    )
    prepared = read_prepared(context)
    samples = prepared.load()
    trainer: Any = Trainer(
        model=fitting.model,
        args=fitting.arguments,
        train_dataset=samples,
        processing_class=fitting.tokenizer,
        peft_config=fitting.peft_config,
    )
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1", *(("log_sum_sq_probs",) if trainer.use_weighting else ()))
    attach(bare_model(trainer.model), outputs=outputs, team=team_of(context))
    trainer.prepared, trainer.samples, trainer.pad = prepared, samples, fitting.tokenizer.pad_token_id
    trainer.reference = read_reference(context, prepared)
    asked = [Asked(trainer.reference, prepared, trainer.groups)]
    if "heldout" in context.inputs:
        held = read_prepared(context, "heldout")
        reference = read_reference(context, held, of="heldout")
        trainer.heldout = open_heldout(context, trainer, reference=reference)
        asked.append(Asked(reference, held, trainer.heldout.of_rows(trainer.groups)))
    compute_reference(context, trainer, asked)
    return fit(trainer, context, fitting, probe_rows(trainer.samples, ("prompt_ids", "chosen_ids")))


STAGE = Stage(
    kind="dpo",
    config=DPOConfig,
    inputs={"policy": Role("policy"), "data": Role("dataset"), "heldout": Role("dataset", optional=True)},
    output="policy",
    prepare=prepare,
    run=run,
    encoder=encoder,
    reference="policy",
)
