"""The config fields that all training stages share, by the names that transformers, TRL and peft give them."""

import re
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import ByteSize, Field, model_validator

from posttrain.config import INPUT_FILE, Config
from posttrain.error import UserError
from posttrain.stage import StageConfig

Tracker: TypeAlias = Literal["tensorboard", "wandb", "mlflow", "trackio"]
TRACKER_LIBRARIES: Mapping[Tracker, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
"""Libraries, one of which a tracker needs."""


MAX_SHARD_BYTES = 10**9
MOST_TOKENS = {"cpu": 512, "cpu in 16 bits": 2048, "cuda": 16384}
"""Tokens at once beyond which a step gets no faster: its matrix multiplications are as fast as they get, and in 16 bits what is done
once for each micro-batch, such as to add up gradients in float32, is no more than a small part."""
SHARE_OF_MEMORY = 0.5
"""Share of the free memory that activations may take; the rest is for gradients, the optimizer's work and what else runs."""


class LoraRecipe(Config):
    """Low-rank adapters (Hu et al., 2021) instead of full fine-tuning; names as in `peft.LoraConfig`."""

    r: int = Field(16, ge=1)
    """Rank of the adapters."""
    lora_alpha: int = Field(32, ge=1)
    """Scale of the adapters, divided by `r`."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapters, as a share."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: names, or `all-linear`."""
    use_rslora: bool = False
    """Divide `lora_alpha` by the square root of `r` instead (Kalajdzievski, 2023)."""
    use_dora: bool = False
    """Learn how long the columns of a weight are apart from where they point (DoRA: Liu et al., 2024)."""
    load_in_4bit: bool = False
    """Keep the frozen weights in 4-bit NormalFloat (QLoRA: Dettmers et al., 2023); they are published as they were trained with."""


class PreflightLimits(Config):
    """What of the data may be wrong before a stage refuses to train, each as a share of the rows."""

    bears_identity: ClassVar[bool] = False

    refused: float = Field(default=0.0, ge=0, le=1)
    """Rows that the chat template cannot render exactly; they are left out."""
    untrained: float = Field(default=0.0, ge=0, le=1)
    """Rows of which no token is trained; they are left out."""
    identical: float = Field(default=0.0, ge=0, le=1)
    """Pairs whose answers are the same, or become so by the cut to `max_length`; they are left out."""
    over_max_length: float = Field(default=0.5, ge=0, le=1)
    """Rows over `max_length`, where `on_overflow` allows any: they are left out, or cut."""
    unstopped: float = Field(default=0.5, ge=0, le=1)
    """Rows with an answer that is cut before its stop token, where `on_overflow: truncate` does that: they teach to go on and on."""
    asked_otherwise: float = Field(default=0.0, ge=0, le=1)
    """Rows whose answers the template asks for in another way than it then renders them."""
    duplicates: float = Field(default=0.05, ge=0, le=1)
    """Rows that are the same, token for token, as an earlier one."""
    contradictory: float = Field(default=0.05, ge=0, le=1)
    """Answers that are labelled desirable in one row and undesirable in another, to the same prompt."""
    held_out: float = Field(default=0.0, ge=0, le=1)
    """Rows that ask what a row asks which an evaluation of this pipeline measures on; a data set that is wired to both is said."""
    padding: float = Field(default=0.5, ge=0, le=1)
    """Share of padding among the tokens that a step computes."""
    untrained_vocabulary: float = Field(default=1.0, ge=0, le=1)
    """Share of the vocabulary that is never trained."""


class KeepPolicy(Config):
    """Which checkpoints are kept while a stage trains; the newest whole one always is, and none once the stage has finished."""

    bears_identity: ClassVar[bool] = False

    save_total_limit: int = Field(default=2, ge=2)
    """How many of the newest are kept: two, so that a damaged one does not cost the run."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Bytes that all of them may take together."""
    metric_for_best_model: str | None = None
    """Keep the best by this logged metric too, such as `loss`, or `rewards/accuracies` of DPO."""
    greater_is_better: bool = False
    """Whether that metric is to be high."""


class TrainingExecution(Config):
    """Where and how fast a stage trains: nothing here changes what is learned, beyond rounding."""

    bears_identity: ClassVar[bool] = False

    micro_batch_tokens: int | None = Field(None, ge=1)
    """Tokens that one rank computes at once; a longer sample stands alone. By default as many as memory allows and speed gains by."""
    layout: Literal["auto", "shared", "packed", "padded"] = "auto"
    """How samples lie in what is computed at once: filled up, end to end, a pair's prompt once; `auto`: the fastest that is exact."""
    sequence_parallel_size: int = Field(1, ge=1)
    """Consecutive ranks that compute a micro-batch together, a piece of its sequences each: for samples too long for the memory of one."""
    deepspeed: str | None = None
    """DeepSpeed config file, such as `ds_configs/zero3.json`; its sizes and rates may be `auto`."""
    fsdp: Literal["full_shard", "shard_grad_op"] | None = None
    """Share weights, gradients and optimizer state out among ranks by FSDP2 instead of DeepSpeed; `shard_grad_op` gathers weights once."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, a third more time. By default where the longest sample needs it."""
    attn_implementation: str | None = None
    """Attention backend: `eager`, `sdpa`, `flash_attention_2`, `flex_attention`; by default the best that is there."""
    save_steps: int = Field(500, ge=1)
    """Optimizer steps between checkpoints. One is also saved at the end, and when a signal asks the stage to stop."""
    save_minutes: float | None = Field(30.0, gt=0)
    """Most minutes between checkpoints, however long steps take."""
    keep: KeepPolicy = KeepPolicy()
    """Which checkpoints are kept."""
    max_shard_size: ByteSize = Field(ByteSize(MAX_SHARD_BYTES), gt=0)
    """Largest file of published weights, such as `5GB`. Each rank writes every n-th file, and holds one at a time."""
    deterministic: bool | None = None
    """The same bytes from the same config, machine and number of processes; by default on a CPU. Speed then decides nothing."""
    logging_steps: int = Field(1, ge=1)
    """Optimizer steps between logged metrics."""
    report_to: list[Tracker] = []
    """Trackers that are told the logged metrics too; where they are, and as whom, is read from their own environment variables."""
    preflight: PreflightLimits = PreflightLimits()
    """What of the data may be wrong before the stage refuses to train."""

    @model_validator(mode="after")
    def _one_engine(self) -> "TrainingExecution":
        if self.fsdp is not None and self.deepspeed is not None:
            raise ValueError(f"fsdp: {self.fsdp} shares the model out, and so does deepspeed: {self.deepspeed}; leave one of them out")
        return self


class TrainingConfig(StageConfig, TrainingExecution):
    """What is learned, and how: shared by all stages that train a policy by gradient."""

    bears_identity: ClassVar[bool] = True
    heldout_metrics: ClassVar[Mapping[str, Literal["low", "high"]]] = {"heldout/loss": "low"}
    """What `select` may go by, and whether the best of it is the lowest or the highest."""
    splits_pairs: ClassVar[bool] = False
    """Whether a preference pair is learned from as two answers, each by itself."""

    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate, after warm-up."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the data; the last one may be a fraction."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps, instead of `num_train_epochs`."""
    global_batch_size: int = Field(64, ge=1)
    """Samples for each optimizer step, over all ranks and micro-batches."""
    max_length: int = Field(2048, ge=2)
    """Longest sample, in tokens, prompt and answer together."""
    on_overflow: Literal["error", "drop", "truncate"] = "error"
    """What happens to a sample over `max_length`: refuse to train, leave it out, or cut its end off."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Course of the learning rate after warm-up."""
    warmup_steps: float = Field(0.03, ge=0)
    """Steps of linear warm-up from 0; below 1, a share of all steps."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay, for each unit of learning rate."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Largest norm of the gradient over all parameters; 0 turns clipping off."""
    optim: str = "adamw_torch_fused"
    """Optimizer, by the name that transformers gives it."""
    bf16: bool | None = None
    """Mixed precision in bfloat16; by default wherever a GPU supports it, and fp32 on a CPU."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the order of samples, of dropout and of new weights."""
    lora: LoraRecipe | None = None
    """Train adapters instead of all weights: `{}` for the defaults. The merged model is published, the adapter beside it."""
    eval_steps: int | None = Field(None, ge=1)
    """Optimizer steps between measurements on the rows of the input `heldout`; one is made after the last step in any case."""
    select: str | None = None
    """Which step is published of those that `eval_steps` measures: `best by heldout/loss`, say; by default the last step."""
    chat_template: Annotated[str | None, INPUT_FILE] = None
    """Jinja file to use instead of the model's own template; a model that has none gets ChatML."""
    system_prompt: str | None = None
    """System prompt of conversations that bring none."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the published weights; `auto` keeps the type in which the input policy is stored."""
    trainer: dict[str, Any] = {}
    """Further fields of the TRL trainer's config class, checked against it by name and type."""

    @model_validator(mode="after")
    def _selects_by_what_is_measured(self) -> "TrainingConfig":
        if self.select is None:
            return self
        known = ", ".join(self.heldout_metrics)
        found = re.fullmatch(r"best by (\S+)", self.select)
        if found is None:
            raise ValueError(f"select: {self.select!r} is no rule; write `best by METRIC`, with one of {known}")
        if found[1] not in self.heldout_metrics:
            raise ValueError(f"select: {found[1]!r} is not measured on held-out rows; known: {known}")
        if self.eval_steps is None:
            raise ValueError("select: with one measurement, after the last step, there is nothing to choose from; set eval_steps")
        return self

    @property
    def selected_by(self) -> str | None:
        """The metric that decides which step is published; None where the last one is."""
        return None if self.select is None else self.select.removeprefix("best by ")

    @property
    def uses_bf16(self) -> bool:
        """Whether the forward pass runs in bfloat16 on this machine."""
        import torch

        return self.bf16 if self.bf16 is not None else torch.cuda.is_available() and torch.cuda.is_bf16_supported()

    @property
    def is_deterministic(self) -> bool:
        """Whether the same config is to give the same bytes on this machine."""
        import torch

        return self.deterministic if self.deterministic is not None else not torch.cuda.is_available()

    def check_inputs(self, roles: Collection[str], at: str) -> None:
        """Refuse what only held-out rows give a meaning."""
        for name in ("select", "eval_steps"):
            if name in self.model_fields_set and getattr(self, name) is not None and "heldout" not in roles:
                raise UserError(f"{at}.{name}: nothing is held out to measure on; wire a data set to {at}.inputs.heldout, or leave it out")

    def check(self, num_processes: int, at: str) -> None:
        """Refuse a tracker that is not installed, and what the ranks cannot share equally: themselves into teams, and a global batch."""
        for tracker in self.report_to:
            if not any(map(find_spec, TRACKER_LIBRARIES[tracker])):
                raise UserError(f"{at}.report_to: {tracker} is not installed; run: pip install {tracker}")
        size = self.sequence_parallel_size
        if num_processes % size:
            raise UserError(f"{at}.sequence_parallel_size: {num_processes} processes cannot be divided into teams of {size}")
        num_teams = num_processes // size
        if self.global_batch_size % num_teams:
            lower = self.global_batch_size // num_teams * num_teams
            can = f"{lower} or {lower + num_teams}" if lower else str(num_teams)
            among = f"{num_teams} processes" if size == 1 else f"{num_teams} teams of {size} processes"
            raise UserError(f"{at}.global_batch_size: {self.global_batch_size} samples cannot be divided among {among}; {can} can")
