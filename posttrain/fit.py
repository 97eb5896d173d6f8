"""Fitting: what all training stages share between their prepared data and their published policy.

    arguments -> model -> trainer (TRL's, on our order of samples) -> resume -> train -> save -> publish

Differences from running a TRL trainer by itself: 1. the global batch is config, and the same samples on any number of
ranks, cut into micro-batches by tokens, its loss and its metrics those of all of it; 2. a run is one stretch of steps, so its
position is one number and a resume starts there, without skipping through batches; 3. checkpoints are our own (`state`,
`saver`), for any number of ranks and any sharding; 4. SIGTERM and SIGUSR2 end a step between its micro-batches, and the state
before it is saved; 5. TRL's loss gets its log-probabilities from `forward`.
"""

import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback
from transformers.optimization import get_scheduler
from transformers.training_args import OptimizerNames
from trl.trainer.utils import FusedCausalLMOutput, disable_dropout_in_model

from posttrain import disk
from posttrain.batch import GlobalBatches, count_steps, deal
from posttrain.chat import ChatContract
from posttrain.checkpoint import Checkpoint
from posttrain.config import nearest
from posttrain.data.prepared import Prepared, prepare
from posttrain.data.samples import Encoder
from posttrain.error import Preempted, UserError, heed_signals
from posttrain.forward import to_batch, to_device
from posttrain.fsdp import claim, shard
from posttrain.heartbeat import tell
from posttrain.layout import Group, Layout, restore_attention
from posttrain.machine import giving_memory_back
from posttrain.models import (
    LOADERS,
    check_weights,
    load_tokenizer,
    loaded_dtype,
    publish,
    quantization,
    release,
    stored_dtype,
    train_new_tokens,
)
from posttrain.preflight import fatal_faults, preflight
from posttrain.progress import TRAIN, Progress
from posttrain.ranks import any_rank, of_all_ranks
from posttrain.recipe import MOST_TOKENS, TrainingConfig
from posttrain.saver import Saver, find_whole
from posttrain.sequence import Team, check_heads, team_of
from posttrain.settle import is_sharded, num_elements, settle
from posttrain.share import mesh_to_read_on
from posttrain.stage import ArtifactKind, Input, StageContext
from posttrain.state import Fragment, Saved, fragments, random_state, restore, set_random_state

if TYPE_CHECKING:
    from posttrain.heldout import Heldout

OWNED = {
    "output_dir": "the stage directory is used",
    "per_device_train_batch_size": "set micro_batch_tokens on the stage itself",
    "gradient_accumulation_steps": "it is derived from global_batch_size",
    "resume_from_checkpoint": "`run` resumes by itself",
    "dataset_kwargs": "data are prepared before training",
    "train_sampling_strategy": "the order of samples follows from the seed",
    "precompute_ref_log_probs": "reference log-probs are always computed once, before training",
    "model_init_kwargs": "the model is loaded under its chat contract",
    "eval_strategy": "wire held-out rows to inputs.heldout, and set eval_steps on the stage itself",
    "eval_on_start": "an eval stage measures the policy that a stage begins with",
    "per_device_eval_batch_size": "held-out rows are computed as many at once as those that are trained",
    "fsdp_config": "set fsdp on the stage itself",
    "save_strategy": "set save_steps on the stage itself",
    "save_total_limit": "set keep on the stage itself",
    "save_only_model": "a run could not go on from what it saves",
    "load_best_model_at_end": "set select on the stage itself, such as `select: best by heldout/loss`",
    "metric_for_best_model": "set select on the stage itself, such as `select: best by heldout/loss`",
    "greater_is_better": "select knows of each metric whether the best is high or low",
    "logging_strategy": "set logging_steps on the stage itself",
    "fp16": "use bf16",
    "push_to_hub": "publish a finished stage instead",
    "run_name": "trackers know a stage as RUN/STAGE",
    "project": "set WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or TRACKIO_PROJECT in the environment",
}
"""Fields of TRL's and transformers' config classes that the pipeline sets, and what to do instead."""
PLAIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers that can be made of their settings alone; others want the model, or a library of their own."""
PROJECT = "posttrain"
"""What trackers put runs together under, where the environment says nothing else."""
SPEEDS = ("tokens_per_s", "trained_tokens_per_s", "step_time_s")
"""Metrics of speed; tokens are those of the samples, those of a pair's prompt counted for each of its answers."""


@dataclass(frozen=True)
class Fitting:
    """What a training stage needs to build its trainer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    contract: ChatContract
    arguments: Any
    peft_config: Any
    output: ArtifactKind
    """What is trained."""


def check_trainer_fields(config: TrainingConfig, arguments_class: type[Any], at: str) -> None:
    """Refuse a field under `trainer:` that TRL's config class lacks, that is of another type or out of range, or that is ours to set."""
    hints = get_type_hints(arguments_class)
    known = {field.name for field in fields(arguments_class) if field.init}
    ours = set(type(config).model_fields)
    for name, value in config.trainer.items():
        where = f"{at}.trainer.{name}"
        if name in OWNED:
            raise UserError(f"{where}: is set by the pipeline; {OWNED[name]}")
        if name in ours:
            raise UserError(f"{where}: is a field of the stage; set {at}.{name} instead")
        if name not in known:
            raise UserError(f"{where}: {arguments_class.__name__} has no such field; {nearest(name, sorted(known))}")
        if not _fits(value, hints[name]):
            kind = getattr(hints[name], "__name__", None) if not get_args(hints[name]) else None
            raise UserError(f"{where}: {value!r} is no {kind or str(hints[name]).replace('typing.', '')}; see {arguments_class.__name__}")
    if refused := _refusal(config, arguments_class, config.trainer):
        # One that is refused by itself is told by its name; some are refused only together.
        alone = ((name, _refusal(config, arguments_class, {name: value})) for name, value in config.trainer.items())
        name, why = next(((f".{name}: {config.trainer[name]!r}", why) for name, why in alone if why), (":", refused))
        raise UserError(f"{at}.trainer{name} is refused: {why}")


def _refusal(config: TrainingConfig, arguments_class: type[Any], trainer: dict[str, Any]) -> str | None:
    """What optimizer, schedule and loader, made with `trainer` for a model of one number, say against it; None where they take it."""
    defaults = {field.name: field.default for field in fields(arguments_class) if field.default is not MISSING}
    settings: Any = SimpleNamespace(**{**defaults, "learning_rate": config.learning_rate, **trainer})
    samples: Any = [0]
    try:
        DataLoader(samples, num_workers=settings.dataloader_num_workers, prefetch_factor=settings.dataloader_prefetch_factor)
        if config.optim in PLAIN_OPTIMIZERS:
            settings.optim = OptimizerNames(config.optim)
            optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(settings)
            optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **options)
            get_scheduler(config.lr_scheduler_type, optimizer, 1, 2, settings.lr_scheduler_kwargs)
    except (ValueError, TypeError, KeyError) as error:
        return " ".join(str(error).split())[:300]
    return None


def _fits(value: object, hint: Any) -> bool:
    if hint is Any:
        return True
    if get_args(hint) and get_origin(hint) not in (list, dict, tuple):
        return any(_fits(value, option) for option in get_args(hint))
    kind = get_origin(hint) or hint
    if not isinstance(kind, type):
        return bool(value == kind)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def prepare_training(
    context: StageContext[Any], arguments_class: type[Any], make_encoder: Callable[..., Encoder], role: str = "policy"
) -> None:
    """Check the stage's settings, encode its data for the policy in `role`, and refuse data that exceed the limits set for them."""
    config: TrainingConfig = context.config
    check_preparations(context, arguments_class)
    check_weights(context.input(role), context.at)
    if config.sequence_parallel_size > 1:
        check_heads(context.input(role), config.sequence_parallel_size, context.at)
    tokenizer, contract = load_tokenizer(
        context.input(role), context.at, chat_template=config.chat_template, system_prompt=config.system_prompt
    )
    encoder = make_encoder(config, tokenizer, contract, context.at)
    prepare(context, context.input("data"), encoder, fatal=fatal_faults(config.preflight))
    if not context.is_smoke:  # the longest samples are not like the others
        preflight(context, tokenizer)


def check_preparations(context: StageContext[Any], arguments_class: type[Any]) -> None:
    """All that can be refused before data are read or a model is loaded."""
    config: TrainingConfig = context.config
    check_trainer_fields(config, arguments_class, context.at)
    zero = {} if config.deepspeed is None else read_deepspeed(config.deepspeed, context.at).get("zero_optimization", {})
    if config.lora is not None and config.lora.load_in_4bit:
        where = f"{context.at}.lora.load_in_4bit"
        if find_spec("bitsandbytes") is None:
            raise UserError(f"{where}: needs the library bitsandbytes, which is not installed; pip install bitsandbytes, or leave it out")
        if zero.get("stage") == 3:
            raise UserError(f"{where}: weights of 4 bits cannot be sharded by ZeRO-3 ({config.deepspeed}); use ds_configs/zero2.json")
        if config.fsdp is not None:
            raise UserError(f"{where}: weights of 4 bits cannot be sharded by fsdp; use deepspeed: ds_configs/zero2.json instead")
    if config.fsdp is not None and config.optim not in PLAIN_OPTIMIZERS:
        known = ", ".join(PLAIN_OPTIMIZERS)
        raise UserError(f"{context.at}.optim: {config.optim} cannot step weights that fsdp shares out; {known} can, or use deepspeed")


def read_deepspeed(path: str, at: str) -> dict[str, Any]:
    """The DeepSpeed config at `path`. Raises `UserError` where it is none."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{at}.deepspeed: {path} cannot be read ({error.strerror}); ds_configs/ has some to use") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{at}.deepspeed: {path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{at}.deepspeed: {path} must hold a JSON object")
    if torch.cuda.is_available():
        return config
    if "optimizer" in config:
        raise UserError(
            f"{at}.deepspeed: {path} names an optimizer, which DeepSpeed would have to compile on a CPU; remove it and set {at}.optim"
        )
    # Pinned memory is a notion of accelerators.
    zero = config.get("zero_optimization", {})
    for offload in ("offload_optimizer", "offload_param"):
        if offload in zero:
            zero[offload]["pin_memory"] = False
    return config


def open_fitting(
    context: StageContext[Any], arguments_class: type[Any], role: str = "policy", output: ArtifactKind = "policy", **fields: Any
) -> Fitting:
    """Arguments, tokenizer and model of a training stage; `fields` go to TRL's config class."""
    config: TrainingConfig = context.config
    progress = Progress(context.directory, is_main=context.is_main)
    progress.phase("load model")
    if config.is_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first product
        torch.use_deterministic_algorithms(True)
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = False  # every element is written before it is read
    given = context.input(role)
    tokenizer, contract = load_tokenizer(given, context.at, chat_template=config.chat_template, system_prompt=config.system_prompt)
    try:
        arguments = _arguments(context, arguments_class, fields)  # before the model: ZeRO-3 shards it while it loads
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{context.at}: {arguments_class.__name__} refuses its settings: {' '.join(str(error).split())[:300]}") from error
    dtype = loaded_dtype(config)
    torch.manual_seed(config.seed)  # a new head is drawn at random
    options = {"attn_implementation": config.attn_implementation, **quantization(config.lora, dtype)}
    options["mesh"] = mesh_to_read_on(config, context.world_size)
    model = LOADERS[output](given.model, tokenizer, contract, context.at, dtype=dtype, **options)
    if config.lora is not None:
        _check_targets(model, config.lora.target_modules, context.at)
    claim(model, config, context.world_size)
    return Fitting(model, tokenizer, contract, arguments, _peft_config(config, output), output)


def _check_targets(model: PreTrainedModel, targets: str | list[str], at: str) -> None:
    if targets == "all-linear":
        return
    known = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for target in [targets] if isinstance(targets, str) else targets:
        if target.rpartition(".")[2] not in known:
            raise UserError(f"{at}.lora.target_modules: {target!r} is no linear module of the model; {nearest(target, sorted(known))}")


def _arguments(context: StageContext[Any], arguments_class: type[Any], fields: dict[str, Any]) -> Any:
    config: TrainingConfig = context.config
    on_gpu = torch.cuda.is_available()
    deepspeed = None
    if config.deepspeed is not None:
        deepspeed = read_deepspeed(config.deepspeed, context.at)
        _ready_deepspeed()
    return arguments_class(
        output_dir=str(context.checkpoints),
        # A step is one batch to the trainer; how it is computed is ours.
        per_device_train_batch_size=max(1, config.global_batch_size // context.world_size),
        gradient_accumulation_steps=1,
        learning_rate=config.learning_rate,
        max_steps=1,  # set by `fit`, which knows the data
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        bf16=config.uses_bf16,
        seed=config.seed,
        gradient_checkpointing=bool(config.gradient_checkpointing),
        use_liger_kernel=on_gpu and find_spec("liger_kernel") is not None,
        dataloader_num_workers=int(on_gpu),  # laid out and pinned while the GPU computes the step before
        deepspeed=deepspeed,
        use_cpu=not on_gpu,
        ddp_backend="gloo" if context.world_size > 1 and not on_gpu else None,
        save_strategy="no",  # `Watch` says when
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        disable_tqdm=True,
        **{**_reporting(context), **fields, **config.trainer},
    )


def _reporting(context: StageContext[Any]) -> dict[str, Any]:
    """What has trackers know a stage as RUN/STAGE, all runs in one project."""
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT"):
        os.environ.setdefault(name, PROJECT)
    run_name = f"{context.directory.parent.name}/{context.name}"
    return {"report_to": sorted(set(context.config.report_to)), "run_name": run_name, "project": os.environ["TRACKIO_PROJECT"]}


def _ready_deepspeed() -> None:
    import deepspeed
    import deepspeed.ops

    if not torch.cuda.is_available():
        # Its shared-memory collectives would be compiled at the first launch, for minutes; gloo's need no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():  # DeepSpeed wants a process group even for one rank
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False)


def _peft_config(config: TrainingConfig, output: ArtifactKind) -> Any:
    if config.lora is None:
        return None
    from peft import LoraConfig

    settings = config.lora.model_dump(exclude={"load_in_4bit"})
    return LoraConfig(task_type="CAUSAL_LM" if output == "policy" else "SEQ_CLS", **settings)


class OurOrder(Trainer):
    """Mixed into a trainer, TRL's or `OwnLoss`: steps come from `GlobalBatches`, and each is computed as a number of micro-batches.

    A stage's trainer says of its samples what groups they are, and what TRL's loss wants to know of them.
    """

    is_coupled = False
    """Whether the loss compares samples with one another, so that it is no mean over micro-batches."""
    layouts: tuple[Layout, ...]
    """Layouts that the samples can be computed in, beside padded rows, the best first."""
    prepared: Prepared
    team: Team
    """Ranks that compute each micro-batch together with this one; `batches` take a team for one rank."""
    batches: GlobalBatches
    layout: Layout
    pad: int
    logged: dict[str, float]
    """What was logged last."""
    before_step: dict[str, Any]
    """The random numbers at the start of the step at hand."""
    is_over = False
    """Whether the run ends with the step at hand, though more were planned."""
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    samples: Any
    """The data set itself, rows by number."""
    saver: Saver
    model: Any
    heldout: "Heldout | None" = None
    """What is measured on held-out rows while it trains."""
    signalled = False
    """Whether a signal asked this rank for an end."""
    at_hand: list[list[int]]
    """This rank's samples of the step at hand, by micro-batch; all in one where its micro-batches are made of something else."""
    _metrics: Any

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """As the trainer itself, but that no model is hashed: TRL would know reference log-probs by it, which are an artifact of their own.

        It takes as long as to read the model, and cannot be where a rank has rows of it alone.
        """
        modules: list[Any] = [sys.modules[kind.__module__] for kind in type(self).__mro__]
        hashing = {module: module.hash_module for module in modules if hasattr(module, "hash_module")}
        for module in hashing:
            module.hash_module = lambda model: None
        try:
            super().__init__(*arguments, **named)
        finally:
            for module, own in hashing.items():
                module.hash_module = own

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # prepared before any process group existed

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset  # an artifact of its own

    def groups(self, samples: Sequence[int]) -> list[Group]:
        """The samples of those numbers."""
        raise NotImplementedError

    def complete(self, batch: dict[str, Any], samples: Sequence[int]) -> dict[str, Any]:
        """What TRL's loss wants, of the batch that a model is called with."""
        return batch

    def micro_batch(self, samples: Sequence[int]) -> Any:
        """What the loader gives for the samples of a micro-batch."""
        return self.complete(to_batch(self.groups(samples), self.layout, self.pad), samples)

    @cached_property
    def num_trained(self) -> npt.NDArray[np.int64]:
        """Trained tokens of each sample, `(N,)`."""
        return self.prepared.column("num_trained").astype(np.int64)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sample, `(N,)`."""
        return self.prepared.column("length").astype(np.int64)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence to come."""
        return int(self.batches.sizes.longest.max())

    def count_tokens(self, step: int) -> tuple[int, int]:
        """Tokens of a step's samples, and how many of them are trained."""
        samples = self.batches.samples(step)
        return int(self.lengths[samples].sum()), int(self.num_trained[samples].sum())

    def num_items(self, step: int) -> int | None:
        """What the loss of a step is divided by, where that is not its number of samples."""
        return None

    def weights(self, batch: dict[str, Any]) -> dict[str, float]:
        """By how much a micro-batch counts in each metric; `` is for those that are not named.

        A metric that some micro-batches have nothing for must be named, since all ranks must know of it.
        """
        raise NotImplementedError

    def begin_step(self, model: Any, samples: npt.NDArray[np.int64]) -> None:
        """Compute what the loss wants to know of all `samples` of a step, with no gradient and no random number."""

    def join(self, parts: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Micro-batches, each as what TRL's loss is given and what its model answers, as one; needed where the loss is coupled."""
        raise NotImplementedError

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The steps of this rank, each a list of micro-batches; accelerate must not shard them again."""
        steps: Any = _MicroBatches(self)
        return DataLoader(
            steps,
            batch_sampler=self.batches,
            collate_fn=list,
            # Of its own: an iterator draws a seed when it starts, and a resumed run starts one more than a whole one.
            generator=torch.Generator(),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one step; returns this rank's part of its loss."""
        model.train()
        self.before_step = random_state()
        micro_batches: list[dict[str, Any]] = inputs
        step = self.state.global_step
        dealt = self.batches.deal(step)[self.batches.rank]
        self.at_hand = dealt if type(self).micro_batch is OurOrder.micro_batch else [[sample for samples in dealt for sample in samples]]
        num_items = self.num_items(step)
        if num_items is not None:
            # TRL multiplies by the number of all ranks, and those of a team have one loss.
            num_items_in_batch = torch.tensor(num_items * self.team.size, device=self.args.device)
        self.begin_step(model, self.batches.samples(step))
        self.current_gradient_accumulation_steps = len(micro_batches)
        if self.is_coupled:
            return self._coupled_step(model, micro_batches)
        total = torch.zeros((), device=self.args.device)
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        with self._casting_once():
            for number, batch in enumerate(micro_batches):
                self._come_to(number)
                weights = self.weights(batch)
                with self._accumulating(model, is_last=number == len(micro_batches) - 1):
                    with self._alone(weights, sums), self.compute_loss_context_manager():
                        loss: Any = self.compute_loss(model, to_device(batch, self.args.device), num_items_in_batch=num_items_in_batch)
                    if num_items is None:
                        # A mean over the samples of this micro-batch; ranks' gradients are averaged.
                        loss = loss * (weights[""] * self.batches.world_size / self.batches.global_batch_size)
                    self._backward(loss)
                total += loss.detach()
        self._metrics["train"] = {name: [value] for name, value in self._over_ranks(sums).items()}
        return total

    def _coupled_step(self, model: Any, micro_batches: list[dict[str, Any]]) -> torch.Tensor:
        """A step whose loss is one of the whole global batch: forward without gradient, the loss, and forward and backward again.

        The loss is computed by every rank on the log-probabilities of all; its gradient by them is what the second forward pass
        goes back with (gradient caching: Gao et al., 2021, arXiv 2101.06983). A third more work than a loss that is a mean.
        """
        weights = [self.weights(batch) for batch in micro_batches]
        calls, mine = self._answered(model, micro_batches, weights)
        parts = self._from_ranks(mine)
        log_probs = [found["log_probs"].detach().requires_grad_() for _, found in parts]
        parts = [(batch, {**found, "log_probs": leaf}) for (batch, found), leaf in zip(parts, log_probs, strict=True)]
        loss, figures = self._joint_loss(parts)
        self._metrics["train"] = {name: [value] for name, value in figures.items()}
        world_size, rank = self.batches.world_size, self.batches.rank
        gradients = torch.autograd.grad(loss, log_probs)[rank * len(mine) : (rank + 1) * len(mine)]
        with self._casting_once():
            for number, (call, gradient, weight) in enumerate(zip(calls, gradients, weights, strict=True)):
                self._come_to(len(calls) + number)
                with self._accumulating(model, is_last=number == len(calls) - 1):
                    with self.compute_loss_context_manager():
                        again = model(**call)
                    part = (again.log_probs * gradient).sum()
                    if self.aux_loss_enabled:
                        part = part + self.router_aux_loss_coef * again.aux_loss * (weight[""] / self.batches.global_batch_size)
                    self._backward(part * world_size)
        return loss.detach()  # type: ignore[no-any-return]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The loss of training, and what is logged with it, over all samples that are in place. All ranks call it."""
        model = self.model_wrapped
        batches, sizes = self.batches, self.prepared.sizes(self.layout)
        # No rank may be without work: under ZeRO-3 each forward pass is a collective.
        samples = np.tile(np.arange(len(sizes)), -(-batches.world_size // len(sizes)))
        self.at_hand = deal(samples, sizes[samples], batches.micro_batch_tokens, batches.world_size)[batches.rank]
        training = self.model.training
        self.model.eval()
        self.begin_step(model, samples)
        micro_batches = map(self.micro_batch, self.at_hand)
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        if self.is_coupled:
            held = list(micro_batches)
            loss, found = self._joint_loss(self._from_ranks(self._answered(model, held, list(map(self.weights, held)))[1]))
            found["loss"] = float(loss)
        else:
            for number, batch in enumerate(micro_batches):
                self._come_to(number)
                weights = self.weights(batch)
                with self._alone(weights, sums), self.compute_loss_context_manager():
                    mean: Any = self.compute_loss(model, to_device(batch, self.args.device))
                sums["loss"][0] += weights[""] * float(mean)
                sums["loss"][1] += weights[""]
            found = self._over_ranks(sums)
        self.model.train(training)
        return found

    def _answered(
        self, model: Any, micro_batches: Sequence[dict[str, Any]], weights: Sequence[dict[str, float]]
    ) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], dict[str, Any]]]]:
        """What the model is called with for each micro-batch, and each of them with what it answers, without gradient."""
        calls: list[dict[str, Any]] = []
        outputs: list[FusedCausalLMOutput] = []

        def record(**call: Any) -> Any:
            calls.append(call)
            outputs.append(model(**call))
            return outputs[-1]

        compute_loss: Any = self.compute_loss
        held = [to_device(batch, self.args.device) for batch in micro_batches]
        with torch.no_grad():
            for number, (batch, weight) in enumerate(zip(held, weights, strict=True)):
                self._come_to(number)
                with self._alone(weight, defaultdict(lambda: [0.0, 0.0])), self.compute_loss_context_manager():
                    compute_loss(record, batch)
        return calls, [
            ({name: value for name, value in batch.items() if name != "laid"}, dict(output))
            for batch, output in zip(held, outputs, strict=True)
        ]

    def _joint_loss(self, parts: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[Any, dict[str, float]]:
        """The loss of the micro-batches of all ranks as one, and what is logged with it."""
        whole, found = self.join(parts)
        output = FusedCausalLMOutput(**found)
        compute_loss: Any = self.compute_loss
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        with self._alone({"": 1.0}, sums):
            loss = compute_loss(lambda **_: output, whole)
        return loss, {name: value for name, (value, _) in sums.items()}

    def _come_to(self, number: int) -> None:
        """Tell that the micro-batch of that number comes next, and end the step before it where that is asked for."""
        # Held-out samples have numbers of their own.
        samples = self.at_hand[number % len(self.at_hand)] if self.model.training else ()
        tell(TRAIN, self.state.global_step, micro_batch=number, samples=samples)
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Raise `Stopped` on all ranks where any was signalled. All ranks call it before each micro-batch."""
        self.saver.check()
        if any_rank(self.signalled):
            raise Stopped

    @property
    def is_last_step(self) -> bool:
        """Whether no step follows the one that was taken last."""
        return self.is_over or self.state.global_step == self.batches.num_steps

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Where another step was better, its weights take the place of these.
        self.save_state(random_state(), is_final=self.is_last_step and self.heldout is None)

    def save_state(self, random: dict[str, Any], *, is_final: bool) -> None:
        """Save the state after the last whole step, with the random numbers as they were then. All ranks call it."""
        tell("save", self.state.global_step)
        scheduler: Any = self.lr_scheduler
        said = {
            "random": random,
            "scheduler": scheduler.state_dict(),
            "loss": {"sum": float(self._tr_loss), "since": self._globalstep_last_logged},
            "heldout": [] if self.heldout is None else self.heldout.measured,
        }
        self.saver.save(self.state.global_step, self._fragments(), said, self.logged, is_final=is_final)

    def save_weights(self) -> None:
        """Keep the weights as they are now, in place of any that were kept before. All ranks call it."""
        tell("save", self.state.global_step)
        self.saver.save_weights(self.state.global_step, self._fragments())

    def _fragments(self) -> list[Fragment]:
        rank, world_size = self.saver.context.rank, self.saver.context.world_size
        bare = self.accelerator.unwrap_model(self.model)
        try:
            return list(fragments(bare, self.model_wrapped, self.optimizer, rank=rank, world_size=world_size))
        except ValueError as error:
            raise UserError(f"{self.saver.context.at}.optim: {self.args.optim}: {error}; choose another, such as adamw_torch") from None

    def load_weights(self, kept: Checkpoint) -> None:
        """Put weights that were kept in place, to be published: nothing can be trained from there. All ranks call it."""
        restore(Saved(kept.path, kept.world_size), self.accelerator.unwrap_model(self.model), self.model_wrapped, self.optimizer)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure on held-out rows. What is drawn in training afterwards is what would be without it. All ranks call it."""
        assert self.heldout is not None, "it is asked for where there are any"
        random = self.before_step = random_state()
        found = self.heldout.measure()
        set_random_state(random)
        Trainer.log(self, dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def load_state(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Go on from a checkpoint; returns the random numbers that were next. All ranks call it, once all is wrapped.

        Raises `ValueError` where it does not fit the model that is trained.
        """
        saved = Saved(checkpoint.path, checkpoint.world_size)
        restore(saved, self.accelerator.unwrap_model(self.model), self.model_wrapped, self.optimizer)
        rank = self.saver.context.rank
        record = saved.records[min(rank, len(saved.records) - 1)]
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(record["scheduler"])
        optimizer: Any = self.optimizer
        while optimizer is not None:
            for group, rate in zip(getattr(optimizer, "param_groups", []), record["scheduler"]["_last_lr"], strict=False):
                group["lr"] = rate
            optimizer = getattr(optimizer, "optimizer", None)
        self.state.global_step = self._initial_global_step = checkpoint.step
        if rank < len(saved.records):
            self._tr_loss += record["loss"]["sum"]
        self._globalstep_last_logged = record["loss"]["since"]
        if self.is_deepspeed_enabled:
            engine: Any = self.model_wrapped
            engine.global_steps = checkpoint.step
        self.logged = dict(checkpoint.metrics)
        self.saver.kept_weights = checkpoint.weights
        if self.heldout is not None:
            self.heldout.recall(saved.records[0]["heldout"])
        return dict(record["random"])

    @contextmanager
    def _accumulating(self, model: Any, *, is_last: bool) -> Iterator[None]:
        """Let a micro-batch's gradients be added up here, and be summed over ranks with those of the last one."""
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        with nullcontext() if is_last or self.is_deepspeed_enabled else self.accelerator.no_sync(model):
            yield

    @contextmanager
    def _casting_once(self) -> Iterator[None]:
        """Have autocast keep the weights that it casts for all micro-batches of a step, which only a step changes.

        It forgets them at the end of its outermost context. Not where ranks share weights out: what is cast there is whole.
        """
        if self.is_deepspeed_enabled or is_sharded(self.model):
            yield
            return
        with self.accelerator.autocast():
            yield

    def _backward(self, loss: Any) -> None:
        with torch.autocast(self.args.device.type, enabled=False):  # it is for forward passes
            self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))

    def _from_ranks(self, mine: list[Any]) -> list[Any]:
        """The entries of all ranks, or of one of each team, in their order, on this one's device; every rank has equally many."""
        if self.batches.world_size == 1:
            return mine
        every = of_all_ranks(to_device(mine, torch.device("cpu")))
        flat: list[Any] = to_device([each for part in every[:: self.team.size] for each in part], self.args.device)
        return flat

    @contextmanager
    def _alone(self, weights: dict[str, float], sums: dict[str, list[float]]) -> Iterator[None]:
        """Let TRL compute a micro-batch's metrics on this rank alone, and add them to `sums` by their weights.

        TRL gathers each of them from all ranks for every micro-batch, which costs a collective each, and cannot be where ranks
        hold unlike numbers of samples.
        """
        metrics: dict[str, list[float]] = defaultdict(list)
        self._metrics["train" if self.model.training else "eval"] = metrics
        self.accelerator.gather = self.accelerator.gather_for_metrics = lambda value: value
        try:
            yield
        finally:
            del self.accelerator.gather, self.accelerator.gather_for_metrics
        for name in {*metrics, *weights} - {"", "num_tokens"}:
            weight = weights.get(name, weights[""]) if metrics[name] else 0.0
            sums[name][0] += weight * float(metrics[name][-1]) if weight else 0.0
            sums[name][1] += weight

    def _over_ranks(self, sums: dict[str, list[float]]) -> dict[str, float]:
        names = sorted(sums)
        table = torch.tensor([sums[name] for name in names], dtype=torch.float64)
        if dist.is_initialized() and dist.get_world_size() > 1:
            table = table.to(self.args.device)
            dist.all_reduce(table)
        return {name: float(total / weight) for name, (total, weight) in zip(names, table.tolist(), strict=True) if weight}

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the trainer's estimate is for one padded batch."""
        return 0

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """What weight decay applies to: never an embedding of which only new rows are trained."""
        names: list[str] = super().get_decay_parameter_names(model)
        table = model.get_input_embeddings().weight
        whole = {name for name, parameter in model.named_parameters() if parameter is not table} if hasattr(model, "peft_config") else names
        return [name for name in names if name in whole]


class OwnLoss(OurOrder):
    """A trainer whose loss is ours and no trainer of TRL: a mean over samples of what `losses` says of each."""

    told: ClassVar[tuple[str, ...]] = ()
    """What of a micro-batch is for `losses` alone, and not for the model."""

    def __init__(self, fitting: Fitting) -> None:
        """With adapters, where the config asks for them, and without dropout, which a preference would be blurred by."""
        model: Any = fitting.model
        disable_dropout_in_model(model)
        arguments = fitting.arguments
        if fitting.peft_config is not None:
            from peft import get_peft_model

            zero = arguments.deepspeed_plugin
            # ZeRO-3 gathers parameters of one type only.
            model = get_peft_model(model, fitting.peft_config, autocast_adapter_dtype=zero is None or zero.zero_stage != 3)
            if arguments.gradient_checkpointing:
                model.enable_input_require_grads()
        super().__init__(model=model, args=arguments, processing_class=fitting.tokenizer)
        config = bare_model(model).config.get_text_config()
        self.router_aux_loss_coef = getattr(config, "router_aux_loss_coef", 0.0)
        self.aux_loss_enabled = hasattr(config, "output_router_logits") and self.router_aux_loss_coef != 0.0
        self._metrics = defaultdict(lambda: defaultdict(list))

    def losses(self, output: FusedCausalLMOutput, told: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of what the model answers to a micro-batch: the loss of each sample, `(B,)`, and figures of each for the log."""
        raise NotImplementedError

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The mean loss of a micro-batch; its figures go to the log."""
        told = {name: inputs[name] for name in self.told}
        called = {name: value for name, value in inputs.items() if name not in told}
        output = model(**called, **({"output_router_logits": True} if self.aux_loss_enabled else {}), fused_lm_head=True)
        each, figures = self.losses(output, told)
        loss = each.mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * output.aux_loss
            figures = {**figures, "aux_loss": output.aux_loss}
        for name, values in figures.items():
            self._metrics["train" if self.model.training else "eval"][name].append(float(values.detach().mean()))
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the figures of the step."""
        super().log({**logs, **{name: sum(values) / len(values) for name, values in self._metrics["train"].items()}}, start_time)
        self._metrics["train"] = {}


class _MicroBatches(Dataset[Any]):
    """A trainer's micro-batches, each asked for by the numbers of its samples."""

    def __init__(self, trainer: OurOrder) -> None:
        self.trainer = trainer

    def __len__(self) -> int:
        return self.trainer.prepared.num_rows

    def __getitem__(self, samples: Any) -> Any:
        tell(TRAIN, self.trainer.state.global_step, samples=samples)
        return self.trainer.micro_batch(samples)


class Stopped(Exception):
    """A signal asked for an end in the middle of a step, which is as if it had not begun."""


def bare_model(model: Any) -> PreTrainedModel:
    """The model itself, without the adapters around it."""
    bare: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
    return bare


def fit(trainer: Any, context: StageContext[Any], fitting: Fitting, probe_ids: list[list[int]], role: str = "policy") -> dict[str, float]:
    """Resume -> train -> save -> publish. Returns the final metrics. All ranks call it."""
    config: TrainingConfig = context.config
    num_samples = trainer.prepared.num_rows
    num_steps = config.max_steps or count_steps(num_samples, config.num_train_epochs, config.global_batch_size)
    trainer.args.max_steps = num_steps
    trainer.team = team_of(context)
    trainer.batches = GlobalBatches(
        trainer.prepared.sizes("padded"),  # until it is settled
        num_steps=num_steps,
        global_batch_size=config.global_batch_size,
        micro_batch_tokens=min(MOST_TOKENS.values()),
        seed=None if context.is_smoke else config.seed,
        rank=trainer.team.number,
        world_size=trainer.team.count,
    )
    progress = Progress(context.directory, is_main=context.is_main)
    given: Input = context.input(role)
    belongs_to = {
        "input policy": given.fingerprint,
        "prepared data": disk.read_sealed(trainer.prepared.path / disk.MANIFEST)["files"]["rows.arrow"]["sha256"],
        "num_samples": num_samples,
        "global_batch_size": config.global_batch_size,
        "num_steps": num_steps,
        "seed": config.seed,
        "optim": config.optim,
    }
    last = find_whole(context, belongs_to)
    # As with Adam, which keeps most.
    first_bytes = 12 * sum(num_elements(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad)
    trainer.saver = Saver(context, config.keep, belongs_to, first_bytes=first_bytes)
    trainer.logged = {}
    if trainer.heldout is not None:
        trainer.heldout.recall([])
    if last is not None:
        trainer.batches.start_step = trainer.saver.saved_step = last.step
        print(f"resuming from {last.path}", flush=True)
    progress.rewind(last.step if last else 0)
    progress.phase(TRAIN, num_steps, last.step if last else 0)
    _open_event_files(trainer, context, last)
    setting_up = ExitStack()
    # Until the first step: what an engine and its optimizer are made of is copied about, and would leave holes of that size.
    setting_up.enter_context(giving_memory_back())
    watch = Watch(context, trainer, progress, last, setting_up)
    trainer.add_callback(watch)
    shard(trainer.model, config, context.world_size)
    if config.lora is not None:
        train_new_tokens(trainer.model, fitting.tokenizer, fitting.contract)
    try:
        # A cluster asks for an end more than once: what is being saved is not cut off by the next time.
        with heed_signals(watch.note_signal):
            try:
                # From the checkpoint of the last step this only loads it: what was cut off then was the publishing.
                trainer.train()
                trainer.stop_if_asked()
            except Stopped:
                if trainer.state.global_step:
                    trainer.save_state(trainer.before_step, is_final=True)
                    trainer.saver.wait()
                any_rank(False)  # no rank ends while another still writes
                raise Preempted(f"{context.name} saved its state after step {trainer.state.global_step}") from None
    finally:
        _finish_reporting(trainer, context)
    try:
        published = {} if trainer.heldout is None else trainer.heldout.choose()
        _publish(trainer, context, fitting, probe_ids, given, progress)
    finally:
        with heed_signals(watch.note_signal):
            trainer.saver.wait()  # the state after the last step: what is cut off from here on is only the publishing
    any_rank(False)
    return {**_final_metrics(context, num_steps, trainer.saver), **published} if context.is_main else {}


def _open_event_files(trainer: Any, context: StageContext[Any], last: Checkpoint | None) -> None:
    """Have TensorBoard's event files lie beside the stage's metrics, or below TENSORBOARD_LOGGING_DIR, and forget steps after `last`."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            below: Any = callback.logging_dir
            run = context.directory.parent.name
            callback.logging_dir = str(Path(below, run, context.name) if below else context.directory / "tensorboard")
            if last is not None and context.is_main:
                callback.tb_writer = callback._SummaryWriter(callback.logging_dir, purge_step=last.step + 1)


def _finish_reporting(trainer: Any, context: StageContext[Any]) -> None:
    """Wait until trackers have what they were told: a worker ends without the hooks by which they would see to that."""
    trackers = context.config.report_to if context.is_main else []
    if "wandb" in trackers:
        import wandb

        wandb.finish()
    if "mlflow" in trackers:
        import mlflow

        mlflow.flush_async_logging()
        mlflow.end_run()
    for callback in trainer.callback_handler.callbacks if "trackio" in trackers else []:
        if isinstance(callback, TrackioCallback) and callback._initialized:  # training was stopped, or it would have finished by itself
            callback._trackio.finish()


def _publish(
    trainer: Any, context: StageContext[Any], fitting: Fitting, probe_ids: list[list[int]], given: Input, progress: Progress
) -> None:
    config: TrainingConfig = context.config
    release(trainer.model_wrapped)
    progress.phase("publish")
    restore_attention(bare_model(trainer.accelerator.unwrap_model(trainer.model)))
    publish(
        context,
        trainer.accelerator.unwrap_model(trainer.model),
        fitting.tokenizer,
        fitting.contract,
        probe_ids,
        given=given,
        dtype=stored_dtype(given.model) if config.save_dtype == "auto" else getattr(torch, config.save_dtype),
        forward=trainer.model_wrapped,
        max_shard_size=config.max_shard_size,
    )


class Watch(TrainerCallback):
    """Follows the training loop: how it is computed, where it goes on, progress, metrics, and when to save."""

    def __init__(
        self, context: StageContext[Any], trainer: Any, progress: Progress, last: Checkpoint | None, setting_up: ExitStack
    ) -> None:
        self.context = context
        self.setting_up = setting_up
        self.trainer = trainer
        self.batches: GlobalBatches = trainer.batches
        self.progress = progress
        self.last = last
        self.saved_at = time.monotonic()
        self.loss = math.nan
        self.tokens = self.trained_tokens = self.steps = 0
        self.since = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Load the state to go on from, now that the model is where it will be trained, and settle how to compute."""
        trainer, batches = self.trainer, self.batches
        if not is_sharded(trainer.model):
            self.setting_up.close()
        # Else large tensors come and go all along, with others between them: kept, they left as much again in holes.
        random = None
        if self.last is not None:
            try:
                random = trainer.load_state(self.last)
            except ValueError as error:
                raise UserError(
                    f"{self.context.at}: the checkpoint of step {self.last.step} does not fit: {error}; --rebuild {self.context.name}"
                ) from error
            control.should_training_stop = self.last.step >= batches.num_steps
        with trainer.accelerator.autocast():
            settled = settle(
                self.context,
                trainer.model_wrapped,
                bare_model(trainer.model),
                trainer.groups,
                longest=trainer.longest,
                num_tokens=int(trainer.lengths.mean() * batches.num_steps * batches.global_batch_size),
                layouts=[*trainer.layouts, "padded"],
                pad=trainer.pad,
                is_resuming=self.last is not None,
            )
        trainer.layout = settled.layout
        batches.sizes = trainer.prepared.sizes(settled.layout)
        batches.micro_batch_tokens = settled.micro_batch_tokens * trainer.team.size
        if random is not None:
            set_random_state(random)
        if trainer.heldout is not None and trainer.heldout.is_due():
            trainer.evaluate()  # before the first step, or where a signal cut it off after that of the checkpoint
        self.since = self.saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count, and say whether it is time to save."""
        tokens, trained = self.trainer.count_tokens(state.global_step - 1)
        self.tokens += tokens
        self.trained_tokens += trained
        self.steps += 1
        state.epoch = state.global_step * self.batches.global_batch_size / len(self.trainer.lengths)
        self.progress.step(state.global_step, save_s=self.trainer.saver.takes_s)
        if self.trainer.is_over:
            control.should_training_stop = control.should_log = True
        control.should_evaluate = self.trainer.heldout is not None and self.trainer.heldout.is_due()
        config: TrainingConfig = self.context.config
        is_due = config.save_minutes is not None and time.monotonic() - self.saved_at > config.save_minutes * 60
        control.should_save = (
            state.global_step % config.save_steps == 0 or self.trainer.is_last_step or any_rank(self.context.is_main and is_due)
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write the logged values, with the speed since the last time, as they are logged."""
        if logs is None or "loss" not in logs:
            return  # the summary at the end, which says nothing new
        values = {name: float(value) for name, value in logs.items() if isinstance(value, (int, float))}
        now = time.monotonic()
        seconds = now - self.since
        values |= {
            "tokens_per_s": self.tokens / seconds,
            "trained_tokens_per_s": self.trained_tokens / seconds,
            "step_time_s": seconds / self.steps,
        }
        self.tokens = self.trained_tokens = self.steps = 0
        self.since, self.loss = now, values["loss"]
        for what in ("loss", "grad_norm"):
            if not math.isfinite(values.get(what, 0.0)):
                at = self.context.at
                raise UserError(
                    f"{at}: {what} of step {state.global_step} is {values[what]}; lower {at}.learning_rate, or look at the data"
                )
        self.trainer.logged = {name: value for name, value in values.items() if name not in SPEEDS}
        self.progress.metrics(state.global_step, {**values, "epoch": state.epoch})
        speeds = {name: values[name] for name in ("tokens_per_s", "step_time_s")}
        self.progress.step(state.global_step, loss=self.loss, **speeds)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Write what was measured on held-out rows; its time is none of the steps'."""
        if state.global_step:
            self.progress.metrics(state.global_step, metrics)
        self.since += self.trainer.heldout.last_s

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Time counts from here until the next save is due."""
        self.saved_at = time.monotonic()

    def note_signal(self, signum: int) -> None:
        """Remember that a signal asked for an end."""
        self.trainer.signalled = True


def _final_metrics(context: StageContext[Any], num_steps: int, saver: Saver) -> dict[str, float]:
    """The last logged values, and the mean loss over the whole run, attempts before a resume included."""
    lines = (context.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [entry for line in lines if "loss" in (entry := json.loads(line))]  # a step that was only measured has none
    kept = {name: value for name, value in logged[-1].items() if name not in ("step", "epoch", "learning_rate", *SPEEDS)}
    middle = {name: float(np.median([entry[name] for entry in logged])) for name in SPEEDS}
    saving = {"checkpoint_bytes": saver.num_bytes, "checkpoint_held_s": saver.held_s / max(1, saver.num_saves)}
    return {**kept, "mean_loss": sum(entry["loss"] for entry in logged) / len(logged), "num_steps": num_steps, **middle, **saving}
