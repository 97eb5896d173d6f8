"""Reference log-probabilities: what the input policy gives each answer token of a stage's samples. Computed once, and an artifact.

Kept under the root, keyed by the reference's weights, the prepared data (which hold the mask rule), and the precision; so every
beta, loss, learning rate and run that starts from the same policy on the same samples reads the same file. Kept by token, since
some losses weigh tokens. Computed by all ranks, chunk by chunk, and a chunk that is there is not computed again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from posttrain import disk
from posttrain.artifact import fingerprint_source
from posttrain.batch import deal
from posttrain.data.prepared import DATA, Prepared, read_prepared
from posttrain.data.samples import IGNORED
from posttrain.error import Preempted, heed_signals
from posttrain.fit import bare_model
from posttrain.forward import Floats, score_batch
from posttrain.fsdp import shard
from posttrain.layout import Group, Layout, measure
from posttrain.progress import Progress
from posttrain.ranks import any_rank, of_main
from posttrain.sequence import team_of
from posttrain.settle import exact_for, most_tokens
from posttrain.stage import StageContext

FILE = "reference.json"
ROWS_AT_ONCE = 256
"""Rows of a chunk, which is what a resumed computation may have to do again."""
VERSION = 1
"""Raised when the same model and data give other numbers."""


class Reference:
    """Where the log-probabilities lie: for each sample those of its answers in turn, of a pair the chosen, then the rejected one."""

    def __init__(self, path: Path, lengths: npt.NDArray[np.int64]) -> None:
        """`lengths` `(N, A)` are the tokens of the A answers of each sample."""
        self.path = path
        self.lengths = lengths
        self.offsets = np.concatenate([[0], lengths.sum(axis=1).cumsum()])
        self._values: Floats | None = None

    @property
    def is_whole(self) -> bool:
        """Whether every sample is there; that they are what was written is seen to where the reference is declared."""
        return (self.path / disk.MANIFEST).is_file()

    @property
    def _file(self) -> Path:
        return self.path / "log_probs.npy"

    def __getitem__(self, row: int) -> list[Floats]:
        """Log-probabilities of the tokens of each answer of a sample."""
        if self._values is None:
            self._values = np.load(self._file, mmap_mode="r")
        return np.split(self._values[self.offsets[row] : self.offsets[row + 1]], self.lengths[row].cumsum()[:-1])

    def chunk_file(self, start: int) -> Path:
        """Where the chunk that begins with that row lies until all are there."""
        return self.path / f"rows-{start:09}.npy"

    def put_chunk(self, start: int, values: Floats) -> None:
        """Keep a chunk, and then its hash, without which it does not count."""
        file = self.chunk_file(start)
        disk.write_array(file, values)
        disk.write_sealed(file.with_suffix(".json"), {"files": disk.describe_files(self.path, [file])})

    def has_chunk(self, start: int) -> bool:
        """Whether a chunk is there, and is what was written."""
        return next(disk.entry_faults(self.path, disk.hash_file, self.chunk_file(start).with_suffix(".json").name), None) is None

    def finish(self, starts: Sequence[int]) -> None:
        """Put the chunks together."""
        disk.write_array(self._file, np.concatenate([np.load(self.chunk_file(start)) for start in starts]))
        disk.write_sealed(self.path / disk.MANIFEST, {"files": disk.describe_files(self.path, [self._file])})
        for start in starts:
            self.chunk_file(start).unlink(missing_ok=True)
            self.chunk_file(start).with_suffix(".json").unlink(missing_ok=True)


def declare_reference(context: StageContext[Any], role: str = "policy", of: str = DATA, **beside: Any) -> None:
    """Decide where the log-probabilities under the policy in `role` lie. Runs in `prepare`, once the data in `of` are prepared.

    Those of other rows than what is learned from come after these, and are told beside them. `beside` is what else decides of
    which answers they are, where those are not just the ones of each sample.
    """
    hashes = disk.HashCache(context.root / ".hashes.json")
    weights = fingerprint_source(context.input(role).source, f"{context.at}: {context.input(role).name}", hashes)
    lora = context.config.lora
    precision = [
        "bfloat16" if context.config.uses_bf16 else "float32",
        bool(context.config.uses_bf16 and lora),
        bool(lora and lora.load_in_4bit),
    ]
    data = read_prepared(context, of).path.name
    key = disk.hash_json({"version": VERSION, "weights": weights, "data": data, "precision": precision, **beside})
    path = context.root / ".reference" / key[:32]
    if (path / disk.MANIFEST).exists():  # else it has not come to its end, and each chunk is looked at by itself
        disk.discard_damaged(path, hashes)
    hashes.save()
    if of == DATA:
        disk.write_json(context.directory / FILE, {"path": str(path)})
    else:
        known = disk.read_json(context.directory / FILE)
        disk.write_json(context.directory / FILE, {**known, of: str(path), "paths": [known["path"], str(path)]})


def read_reference(
    context: StageContext[Any], prepared: Prepared, lengths: npt.NDArray[np.int64] | None = None, of: str = DATA
) -> Reference:
    """The reference that was declared for this stage, whole or not yet; `lengths` as in `Reference`, by default those of pairs."""
    if lengths is None:
        lengths = np.stack([prepared.num_listed("chosen_ids"), prepared.num_listed("rejected_ids")], axis=1)
    return Reference(Path(disk.read_json(context.directory / FILE)["path" if of == DATA else of]), lengths)


def add_reference(batch: dict[str, Any], references: Sequence[Sequence[Floats]], ld_alpha: float | None) -> dict[str, Any]:
    """A micro-batch of pairs as TRL's losses want it: `completion_mask` in place of labels, and the reference's sums, each `(B,)`.

    With `ld_alpha`, tokens beyond the length of the shorter answer count by so much (Liu et al., 2024, arXiv 2409.06411).
    """
    labels = batch.pop("labels")
    sums = []
    for chosen, rejected in references:
        shared = min(len(chosen), len(rejected))
        beyond = 1.0 if ld_alpha is None else ld_alpha
        sums.append([answer[:shared].sum() + beyond * answer[shared:].sum() for answer in (chosen, rejected)])
    chosen_logps, rejected_logps = torch.tensor(np.asarray(sums, dtype=np.float32)).unbind(1)
    completion_mask = (labels != IGNORED).long()
    return {**batch, "completion_mask": completion_mask, "ref_chosen_logps": chosen_logps, "ref_rejected_logps": rejected_logps}


def weigh_pairs(batch: dict[str, Any]) -> dict[str, float]:
    """By how much a micro-batch of pairs counts in each of TRL's metrics: by its answers' tokens, else by its pairs."""
    chosen, rejected = (int(half.sum()) for half in batch["completion_mask"].chunk(2))
    tokens = {"entropy": chosen + rejected, "logits/chosen": chosen, "mean_token_accuracy": chosen, "logits/rejected": rejected}
    return {"": len(batch["completion_mask"]) / 2, **tokens}


def join_pairs(parts: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Micro-batches of pairs and what a model answered, as one of each: all chosen answers first, then all rejected ones.

    Tensors `(2B, L)` are filled up to the longest on the right; those `(B,)` are of pairs; an auxiliary loss is a mean over pairs.
    """
    batches, outputs = zip(*parts, strict=True)
    sizes = torch.tensor([len(batch["ref_chosen_logps"]) for batch in batches], dtype=torch.float32)

    def join(values: list[Any]) -> Any:
        if values[0] is None:
            return None
        if values[0].ndim == 0:
            return (torch.stack([value.detach().float() for value in values]) * sizes.to(values[0].device)).sum() / sizes.sum()
        if values[0].ndim == 1:
            return torch.cat(values)
        width = max(value.shape[1] for value in values)
        filled = [torch.nn.functional.pad(value, (0, width - value.shape[1])) for value in values]
        return torch.cat([half for side in (0, 1) for half in (value.chunk(2)[side] for value in filled)])

    whole = {name: join([batch[name] for batch in batches]) for name in batches[0]}
    return whole, {name: join([output.get(name) for output in outputs]) for name in outputs[0]}


@dataclass(frozen=True)
class Asked:
    """A reference that may not be whole, and what it is of."""

    reference: Reference
    prepared: Prepared
    groups: Callable[[Sequence[int]], list[Group]]
    """The samples with all their answers, none longer than the longest that is prepared."""


def compute_reference(context: StageContext[Any], trainer: Any, every: Sequence[Asked]) -> None:
    """Compute what is not there, under the trainer's model before it is trained. All ranks call it.

    Raises `Preempted` where a signal asked for an end; what is done is kept.
    """
    left = [asked for asked in every if not asked.reference.is_whole]
    if not left:
        return
    model = bare_model(trainer.model)
    call = trainer.model
    if trainer.is_deepspeed_enabled:
        # What ZeRO-3 shards is gathered by an engine only; this one knows no optimizer.
        from trl.models import prepare_deepspeed

        call = prepare_deepspeed(trainer.model, trainer.accelerator)
    shard(call, context.config, context.world_size)
    with trainer.accelerator.autocast():
        for asked in left:
            longest = int(asked.prepared.sizes("padded").longest.max())
            layout = exact_for(context, call, model, trainer.layouts, longest)[0][0]
            tokens = context.config.micro_batch_tokens or most_tokens(model)
            _compute(context, asked.reference, call, model, asked.groups, layout=layout, micro_batch_tokens=tokens, pad=trainer.pad)


def _compute(
    context: StageContext[Any],
    reference: Reference,
    call: Callable[..., Any],
    model: PreTrainedModel,
    groups: Callable[[Sequence[int]], list[Group]],
    *,
    layout: Layout,
    micro_batch_tokens: int,
    pad: int,
) -> None:
    team = team_of(context)
    num_rows = len(reference.lengths)
    starts = list(range(0, num_rows, ROWS_AT_ONCE))
    missing = of_main([start for start in starts if not reference.has_chunk(start)])
    progress = Progress(context.directory, is_main=context.is_main)
    progress.phase("reference", num_rows, num_rows - sum(min(ROWS_AT_ONCE, num_rows - start) for start in missing))
    signals: list[int] = []
    training = model.training
    model.eval()
    with heed_signals(signals.append):
        for start in missing:
            rows = list(range(start, min(start + ROWS_AT_ONCE, num_rows)))
            mine: dict[int, Floats] = {}
            # No rank may be without work: under ZeRO-3 each forward pass is a collective.
            filled = rows * math.ceil(team.count / len(rows))
            sizes = measure(groups(filled), layout)
            for micro_batch in deal(filled, sizes, micro_batch_tokens * team.size, team.count)[team.number]:
                if any_rank(bool(signals)):
                    raise Preempted(f"{context.name} keeps the reference of the rows up to {start}")
                scored = score_batch(call, model, groups(micro_batch), layout, pad=pad)
                mine |= {row: np.concatenate(answers) for row, answers in zip(micro_batch, scored, strict=True)}
            every = _to_main(mine, context)
            if context.is_main:
                reference.put_chunk(start, np.concatenate([every[row] for row in rows]))
            progress.step(rows[-1] + 1)
    model.train(training)
    if context.is_main:
        reference.finish(starts)
    if dist.is_initialized():
        dist.barrier()


def _to_main(mine: dict[int, Floats], context: StageContext[Any]) -> dict[int, Floats]:
    if context.world_size == 1:
        return mine
    every: list[Any] = [None] * context.world_size
    dist.gather_object(mine, every if context.is_main else None)
    return {row: values for part in every if part for row, values in part.items()}
