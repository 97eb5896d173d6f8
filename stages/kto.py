"""KTO: align a policy on single answers, each liked or not, without pairs and without a reward model.

  loss = w_D * (1 - sigmoid(beta * (r - z)))  of a desirable answer     r = log pi(y|x) - log ref(y|x)
         w_U * (1 - sigmoid(beta * (z - r)))  of an undesirable one     z = max(0, mean of log pi(y'|x) - log ref(y'|x))
                                                                                      (Ethayarajh et al., 2024, eq. 7)
y' is the answer to another prompt. The mean is over the global batch, and no gradient flows through it.

Reads: policy (the start, and the frozen reference), data (answers with labels, or preference pairs), heldout (the same, that it is
measured on).  Writes: policy.
Differences from trl.KTOTrainer: 1. the global batch is config, and z that of all of it; 2. which answer y' is follows from the
data set alone, so samples are shuffled; 3. the reference is always the input policy, also under LoRA, and its log-probs are
computed once, before training; 4. an answer over `max_length` is an error unless the config says otherwise.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from posttrain.recipe import TrainingConfig
from posttrain.stage import Role, Stage, StageContext


class KTOConfig(TrainingConfig):
    """What KTO learns, and how."""

    heldout_metrics: ClassVar[Any] = {"heldout/loss": "low", "heldout/rewards/margins": "high"}
    splits_pairs: ClassVar[bool] = True

    beta: float = Field(0.1, gt=0)
    """Pull toward the reference; larger stays closer. Dimensionless."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """Which loss, as TRL names it; `apo_zero_unpaired` (D'Oosterlinck et al., 2024) has no z, and is computed without it."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of the loss of desirable answers, w_D."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of the loss of undesirable answers, w_U."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate, after warm-up."""
    global_batch_size: int = Field(64, ge=2)
    """Answers for each optimizer step, over all ranks."""


def encoder(config: KTOConfig, tokenizer: Any, contract: Any, at: str) -> Any:
    """Answers with labels -> token ids of prompt and answer."""
    from posttrain.data.samples import unpaired_encoder

    return unpaired_encoder(tokenizer, contract, max_length=config.max_length, on_overflow=config.on_overflow, at=at)


def prepare(context: StageContext[KTOConfig]) -> None:
    """Rows -> samples, checked; no model, no process group."""
    from trl import KTOConfig as TrainerConfig

    from posttrain.data.prepared import read_prepared
    from posttrain.fit import prepare_training
    from posttrain.heldout import prepare_heldout
    from posttrain.reference import declare_reference
    from posttrain.unpaired import MISMATCH_VERSION, Mismatched

    prepare_training(context, TrainerConfig, encoder)
    prepare_heldout(context, encoder)
    for role in ("data", "heldout"):
        for given in context.inputs.get(role, ()):
            if context.config.loss_type == "apo_zero_unpaired":
                declare_reference(context, of=role)
            else:
                Mismatched(read_prepared(context, role), f"{context.at}: {given.name}")  # while nothing is lost if there is none
                declare_reference(context, of=role, mismatched=MISMATCH_VERSION)


def run(context: StageContext[KTOConfig]) -> dict[str, float]:
    """Compute the reference, train and publish; every rank."""
    import numpy as np
    from trl import KTOConfig as TrainerConfig
    from trl import KTOTrainer

    from posttrain.batch import deal
    from posttrain.data.prepared import read_prepared
    from posttrain.fit import OurOrder, bare_model, fit, open_fitting
    from posttrain.forward import attach, score_batch
    from posttrain.heldout import open_heldout
    from posttrain.layout import pair_group
    from posttrain.models import probe_rows
    from posttrain.reference import Asked, compute_reference, read_reference
    from posttrain.sequence import team_of
    from posttrain.unpaired import Mismatched, add_labels, weigh_answers

    class Trainer(OurOrder, KTOTrainer):
        layouts = ("shared", "packed")
        labels: Any
        mismatched: Mismatched | None
        reference: Any

        def groups(self, samples: Any) -> list[Any]:
            rows = self.samples[list(samples)]
            return [pair_group(prompt, [answer]) for prompt, answer in zip(rows["prompt_ids"], rows["completion_ids"], strict=True)]

        def groups_of_reference(self, samples: Any) -> list[Any]:
            """The samples with all that is asked of the reference: beside the answer the mismatched one, where there is a z."""
            if self.mismatched is None:
                return self.groups(samples)
            rows = self.samples[list(samples)]
            answers = zip(rows["completion_ids"], self.mismatched.answers(samples), strict=True)
            return [pair_group(*both) for both in zip(rows["prompt_ids"], answers, strict=True)]

        def complete(self, batch: dict[str, Any], samples: Any) -> dict[str, Any]:
            return add_labels(batch, self.labels[samples], [self.reference[sample][0] for sample in samples])

        def weights(self, batch: dict[str, Any]) -> dict[str, float]:
            return weigh_answers(batch)

        def begin_step(self, model: Any, samples: Any) -> None:
            """Estimate z, without its bound. Ranks share the mismatched answers by their own lengths, not by those that are trained."""
            if self.mismatched is None:
                return
            sizes = self.mismatched.sizes(self.layout)[samples]
            mine = deal(samples, sizes, self.batches.micro_batch_tokens, self.batches.world_size)[self.batches.rank]
            bare, total = bare_model(self.model), 0.0
            training = bare.training
            bare.eval()
            for part in mine:
                self.stop_if_asked()
                with self.accelerator.autocast():
                    scored = score_batch(model, bare, self.mismatched.groups(part), self.layout, pad=self.pad)
                total += sum(float((found - self.reference[sample][1]).sum()) for sample, (found,) in zip(part, scored, strict=True))
            bare.train(training)
            self.z = self._over_ranks({"z": [total, sum(map(len, mine))]})["z"]

        def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Any:
            return None if self.mismatched is None else batch["ref_KL_logps"] + self.z

        def _over_ranks(self, sums: dict[str, list[float]]) -> dict[str, float]:
            found = super()._over_ranks(sums)
            if {"rewards/chosen", "rewards/rejected"} <= found.keys():
                found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
            return found

    config = context.config
    fitting = open_fitting(
        context,
        TrainerConfig,
        beta=config.beta,
        loss_type=config.loss_type,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        max_length=None,
        precompute_ref_log_probs=True,
    )
    # TRL takes no z from a batch of one, and knows only of this rank's part.
    fitting.arguments.per_device_train_batch_size = max(2, fitting.arguments.per_device_train_batch_size)

    def told(role: str) -> dict[str, Any]:
        """What the trainer knows of rows, beside the samples."""
        prepared = read_prepared(context, role)
        mismatched = None if config.loss_type == "apo_zero_unpaired" else Mismatched(prepared, context.at)
        lengths = [prepared.num_listed("completion_ids"), *([] if mismatched is None else [mismatched.lengths])]
        reference = read_reference(context, prepared, np.stack(lengths, axis=1), of=role)
        return {"prepared": prepared, "labels": prepared.column("label"), "mismatched": mismatched, "reference": reference}

    samples = read_prepared(context).load()
    trainer: Any = Trainer(
        model=fitting.model,
        args=fitting.arguments,
        train_dataset=samples,
        processing_class=fitting.tokenizer,
        peft_config=fitting.peft_config,
    )
    attach(bare_model(trainer.model), outputs=("log_probs", "entropy", "mean_logits"), team=team_of(context))
    trainer.samples, trainer.pad = samples, fitting.tokenizer.pad_token_id
    vars(trainer).update(told("data"))
    asked = [Asked(trainer.reference, trainer.prepared, trainer.groups_of_reference)]
    if "heldout" in context.inputs:
        held = told("heldout")
        trainer.heldout = open_heldout(context, trainer, **held)
        asked.append(Asked(held["reference"], held["prepared"], trainer.heldout.of_rows(trainer.groups_of_reference)))
    compute_reference(context, trainer, asked)
    return fit(trainer, context, fitting, probe_rows(trainer.samples, ("prompt_ids", "completion_ids")))


STAGE = Stage(
    kind="kto",
    config=KTOConfig,
    inputs={"policy": Role("policy"), "data": Role("dataset"), "heldout": Role("dataset", optional=True)},
    output="policy",
    prepare=prepare,
    run=run,
    encoder=encoder,
    reference="policy",
)
