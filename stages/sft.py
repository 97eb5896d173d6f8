"""SFT: teach a policy to answer, by the likelihood of the answers it is shown.

  loss = -1/N * sum over trained tokens of log pi(token | all before it)          N: trained tokens of the global batch

Trained are the assistant's tokens and the stop token of each of its turns; nothing else.

Reads: policy (the start), data (conversations), heldout (conversations that it is measured on).  Writes: policy.
Differences from trl.SFTTrainer: 1. the global batch is config, and N is counted over all of it; 2. only answers are
trained, for every chat template; 3. a sample over `max_length` is an error unless the config says otherwise.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from posttrain.recipe import TrainingConfig
from posttrain.stage import Role, Stage, StageContext


class SFTConfig(TrainingConfig):
    """What SFT learns, and how."""

    heldout_metrics: ClassVar[Any] = {"heldout/nll": "low", "heldout/loss": "low", "heldout/mean_token_accuracy": "high"}

    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate, after warm-up."""
    global_batch_size: int = Field(64, ge=1)
    """Conversations for each optimizer step, over all ranks."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant turns of a conversation are trained: every one, or the last."""


def encoder(config: SFTConfig, tokenizer: Any, contract: Any, at: str) -> Any:
    """Conversations -> token ids and labels."""
    from posttrain.data.samples import conversation_encoder

    return conversation_encoder(
        tokenizer, contract, max_length=config.max_length, on_overflow=config.on_overflow, at=at, train_on=config.train_on
    )


def prepare(context: StageContext[SFTConfig]) -> None:
    """Rows -> samples, checked; no model, no process group."""
    from trl import SFTConfig as TrainerConfig

    from posttrain.fit import prepare_training
    from posttrain.heldout import prepare_heldout

    prepare_training(context, TrainerConfig, encoder)
    prepare_heldout(context, encoder)


def run(context: StageContext[SFTConfig]) -> dict[str, float]:
    """Train and publish; every rank."""
    from trl import SFTConfig as TrainerConfig
    from trl import SFTTrainer

    from posttrain.data.prepared import read_prepared
    from posttrain.data.samples import IGNORED
    from posttrain.fit import OurOrder, bare_model, fit, open_fitting
    from posttrain.forward import attach
    from posttrain.heldout import open_heldout
    from posttrain.layout import conversation_group
    from posttrain.models import probe_rows
    from posttrain.sequence import team_of

    class Trainer(OurOrder, SFTTrainer):
        layouts = ("packed",)

        def groups(self, samples: Any) -> list[Any]:
            rows = self.samples[list(samples)]
            both = zip(rows["input_ids"], rows["labels"], strict=True)
            return [conversation_group(ids, [label != IGNORED for label in labels]) for ids, labels in both]

        def num_items(self, step: int) -> int:
            return int(self.num_trained[self.batches.samples(step)].sum())

        def weights(self, batch: dict[str, Any]) -> dict[str, float]:
            return {"": float((batch["labels"] != IGNORED).sum())}

        def measure(self) -> dict[str, float]:
            found = super().measure()
            # A mixture of experts has its routers' part in the loss.
            return {"nll": found["loss"] - self.router_aux_loss_coef * found.get("aux_loss", 0.0), **found}

    fitting = open_fitting(context, TrainerConfig, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    prepared = read_prepared(context)
    samples = prepared.load()
    trainer: Any = Trainer(
        model=fitting.model,
        args=fitting.arguments,
        train_dataset=samples,
        processing_class=fitting.tokenizer,
        peft_config=fitting.peft_config,
    )
    attach(bare_model(trainer.model), outputs=("log_probs", "entropy", "is_top1"), team=team_of(context))
    trainer.prepared, trainer.samples, trainer.pad = prepared, samples, fitting.tokenizer.pad_token_id
    trainer.heldout = open_heldout(context, trainer)
    return fit(trainer, context, fitting, probe_rows(trainer.samples, ("input_ids",)))


STAGE = Stage(
    kind="sft",
    config=SFTConfig,
    inputs={"policy": Role("policy"), "data": Role("dataset"), "heldout": Role("dataset", optional=True)},
    output="policy",
    prepare=prepare,
    run=run,
    encoder=encoder,
)
