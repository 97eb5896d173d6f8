"""RLHF: let a policy answer, and make likelier what is rewarded more than its other answers to the same prompt.

  grpo   loss = mean over completions of  scale * sum over tokens of -A * ratio + beta * KL     A = (r - mean(r)) / std(r)
  rloo   loss = mean over completions of  -A * ratio        A = r' - mean of the other r' of the prompt, r' = r - beta * KL
                                                       (Shao et al., 2024, eq. 3; Ahmadian et al., 2024, sec. 3.2)

KL is that from the input policy; ratio is 1, and has the gradient of the log-probability, as each step is learned from once.

Reads: policy (the start, and the frozen reference), data (prompts), reward (reward models, none or several), heldout (prompts that
it is measured on).  Writes: policy.
Differences from TRL's trainers: 1. a step is `global_batch_size` prompts on any number of ranks, all that is drawn is a function of
(seed, step, prompt, number of the answer), and a run that was killed resumes to the same bytes; 2. the losses are our own
(`posttrain/policy_losses.py`), normalized over the whole step; 3. a prompt is computed once for all its completions; 4. rewards are
reward models of any tokenizer, the checks that rows carry, or both; 5. it ends early where the policy has moved too far.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.config import nearest
from posttrain.engine import EngineExecution
from posttrain.error import UserError
from posttrain.recipe import TrainingConfig
from posttrain.stage import Role, Stage, StageContext


class RolloutExecution(EngineExecution):
    """What samples, beside the model that is trained."""

    bears_identity: ClassVar[bool] = False

    vllm_gpu_memory_utilization: float = Field(0.3, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes beside training."""
    vllm_tensor_parallel_size: int = Field(1, ge=1)
    """Ranks over which vLLM spreads one copy of the policy; of the number of ranks it is a divisor."""
    vllm_enable_sleep_mode: bool = False
    """Give vLLM's memory back while the policy is trained, at the cost of loading it again for each step."""


class RLHFConfig(TrainingConfig, RolloutExecution):
    """What is rewarded, and how it is learned from."""

    bears_identity: ClassVar[bool] = True
    heldout_metrics: ClassVar[Any] = {"heldout/reward": "high"}

    algorithm: Literal["grpo", "rloo"] = "grpo"
    """How a completion is compared with the others to its prompt."""
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "dapo"
    """How tokens count under `grpo`: completions the same, tokens by the longest that may be, or tokens the same."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation that advantages are divided by under `grpo`: that of the prompt's completions, of all, or none."""
    beta: float = Field(0.04, ge=0)
    """Pull toward the input policy, for each nat of divergence from it: of a token under `grpo`, of a completion under `rloo`."""
    num_generations: int = Field(8, ge=2)
    """Completions to each prompt."""
    max_completion_length: int = Field(256, ge=1)
    """Longest completion, in tokens; one that comes to it is cut off. A prompt must leave room for it within `max_length`."""
    temperature: float = Field(1.0, gt=0)
    """What logits are divided by, where they are sampled from and where they are learned."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the fewest tokens that have this much of the probability together; what is learned is the whole distribution."""
    top_k: int = Field(0, ge=0)
    """Sample from so many of the likeliest tokens; 0 is all of them."""
    checkers: list[str] = []
    """Kinds of checks, such as `final_number`, that reward an answer by 1 where it passes those that its row carries, as in `eval`."""
    reward_weights: dict[str, float] = {}
    """Weight of each reward, by the name of the input or the checker; 1 by default."""
    missing_eos_penalty: float | None = Field(None, gt=0)
    """What is taken off the reward of a completion that is cut off."""
    kl_budget: float | None = Field(None, gt=0)
    """Divergence from the input policy, in nats of a completion on average, after which training ends and publishes what there is."""
    vllm_importance_sampling_clip_max: float = Field(3.0, gt=0)
    """A completion counts for nothing that the policy makes so many times likelier than vLLM did, which drew it."""
    eval_steps: int | None = Field(50, ge=1)
    """Optimizer steps between measurements on held-out prompts, which are also made at the start and at the end."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate, after warm-up."""
    global_batch_size: int = Field(64, ge=1)
    """Prompts for each optimizer step, over all ranks; each is answered `num_generations` times."""

    @field_validator("checkers")
    @classmethod
    def _are_checks(cls, checkers: list[str]) -> list[str]:
        from posttrain.metrics.check import KINDS

        for place, kind in enumerate(checkers):
            if kind not in KINDS:
                raise ValueError(f"no check is called {kind!r}; {nearest(kind, list(KINDS))}")
            if kind in checkers[:place]:
                raise ValueError(f"{kind!r} is named twice; name it once")
        return checkers

    @model_validator(mode="after")
    def _settings_fit(self) -> "RLHFConfig":
        for name in ("loss_type", "scale_rewards"):
            if self.algorithm != "grpo" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: is for algorithm grpo, not {self.algorithm}; leave it out")
        if self.max_completion_length >= self.max_length:
            raise ValueError(
                f"max_completion_length: {self.max_completion_length} leaves no room for a prompt in max_length: {self.max_length}"
            )
        if self.fsdp is not None:
            raise ValueError("fsdp: what samples wants weights that are whole; set deepspeed: ds_configs/zero3.json instead")
        if self.on_overflow == "truncate":
            raise ValueError("on_overflow: a prompt that is cut off asks something else; set it to error or drop")
        if self.sequence_parallel_size > 1:
            raise ValueError("sequence_parallel_size: an answer is sampled by one rank, which must hold it whole; leave it out")
        return self

    def check(self, num_processes: int, at: str) -> None:
        """Refuse ranks that cannot share engines equally, too."""
        super().check(num_processes, at)
        if num_processes % self.vllm_tensor_parallel_size:
            raise UserError(
                f"{at}.vllm_tensor_parallel_size: {num_processes} ranks cannot be divided into engines of {self.vllm_tensor_parallel_size}"
            )


def encoder(config: RLHFConfig, tokenizer: Any, contract: Any, at: str) -> Any:
    """Rows -> token ids of what they ask."""
    from posttrain.data.samples import prompt_encoder

    return prompt_encoder(
        tokenizer,
        contract,
        max_length=config.max_length,
        max_completion_length=config.max_completion_length,
        on_overflow=config.on_overflow,
        at=at,
    )


def prepare(context: StageContext[RLHFConfig]) -> None:
    """Rows -> prompts, and whether they can be rewarded; no model, no process group."""
    from transformers import TrainingArguments

    from posttrain.fit import prepare_training
    from posttrain.rollout import check_sources

    check_sources(context)
    prepare_training(context, TrainingArguments, encoder)


def run(context: StageContext[RLHFConfig]) -> dict[str, float]:
    """Sample, reward, train and publish; every rank."""
    from transformers import TrainingArguments

    from posttrain.data.prepared import read_prepared
    from posttrain.data.samples import IGNORED
    from posttrain.engine import Engine, lacks_contract, wants_engine
    from posttrain.fit import OwnLoss, bare_model, fit, open_fitting
    from posttrain.forward import attach
    from posttrain.heldout import Heldout
    from posttrain.models import probe_rows
    from posttrain.policy_losses import grpo, rloo
    from posttrain.rollout import Judge, Rollouts, open_reference, was_stopped
    from posttrain.state import random_state

    config = context.config

    class Trainer(OwnLoss):
        layouts = ("shared", "packed")
        told = ("advantages", "scales", "reference")

        def groups(self, samples: Any) -> list[Any]:
            return rollouts.probe(samples)

        def micro_batch(self, samples: Any) -> Any:
            return samples  # their answers are yet to be sampled

        @property
        def longest(self) -> int:
            return super().longest + config.max_completion_length

        def count_tokens(self, step: int) -> tuple[int, int]:
            return self.rollout.num_tokens

        def weights(self, batch: dict[str, Any]) -> dict[str, float]:
            return {"": len(batch["labels"]) / config.num_generations, "entropy": float((batch["labels"] != IGNORED).sum())}

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            self.before_step = random_state()
            self.rollout = rollouts.roll(self.state.global_step)
            batches = self.rollout.micro_batches(
                self.layout, self.pad, self.batches.micro_batch_tokens, self.batches.rank, self.batches.world_size
            )
            loss = super().training_step(model, batches, num_items_in_batch)
            self._metrics["train"] |= {name: [value] for name, value in self.rollout.metrics.items()}
            return loss

        def losses(self, output: Any, told: Any) -> tuple[Any, dict[str, Any]]:
            log_probs, mask = output.log_probs, output.label_mask
            if config.algorithm == "rloo":
                loss = rloo(log_probs, mask, told["advantages"])
            else:
                loss = grpo(log_probs, mask, told["advantages"], told["scales"], beta=config.beta, reference=told["reference"])
            return loss, {"entropy": output.entropy.sum() / mask.sum()}

        def load_state(self, checkpoint: Any) -> dict[str, Any]:
            random = super().load_state(checkpoint)
            if was_stopped(context.directory, checkpoint.step):
                self.is_over, self.batches.start_step = True, self.batches.num_steps
            return random

    by_engine = wants_engine(context, lacks_contract(context.input("policy")))
    judges = [Judge(given, context.at) for given in context.inputs.get("reward", ())]  # before ZeRO-3, which would share them out too
    fitting = open_fitting(context, TrainingArguments)
    prepared = read_prepared(context)
    frozen = open_reference(context, fitting)
    trainer = Trainer(fitting)
    attach(bare_model(trainer.model), outputs=("log_probs", "entropy"), temperature=config.temperature)
    trainer.prepared, trainer.samples, trainer.pad = prepared, prepared.load(), fitting.tokenizer.pad_token_id
    lenient = encoder(config.model_copy(update={"on_overflow": "drop"}), fitting.tokenizer, fitting.contract, context.at)
    engine = Engine(context, fitting, trainer) if by_engine else None
    rollouts = Rollouts(context, fitting, trainer, judges, frozen, engine, lenient)
    if rollouts.heldout:
        trainer.heldout = Heldout(context, trainer, rollouts.measure, {}, at_start=True)
    metrics = fit(trainer, context, fitting, probe_rows(trainer.samples, ("input_ids",)))
    if trainer.heldout is not None:
        metrics["heldout/reward_at_start"] = trainer.heldout.measured[0]["reward"]
    return metrics | {"num_steps": trainer.state.global_step, "stopped_early": float(trainer.is_over)}


STAGE = Stage(
    kind="rlhf",
    config=RLHFConfig,
    inputs={
        "policy": Role("policy"),
        "data": Role("dataset"),
        "reward": Role("reward_model", many=True, optional=True),
        "heldout": Role("dataset", optional=True),
    },
    output="policy",
    prepare=prepare,
    run=run,
    encoder=encoder,
    reference="policy",
)
