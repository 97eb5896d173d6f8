"""Merging: policies of one architecture made into one, tensor by tensor, by arithmetic on their weights alone.

  linear       sum_i w_i p_i                                           (model soups: Wortsman et al., 2022, arXiv 2203.05482)
  slerp        [sin((1-t) a) p_1 + sin(t a) p_2] / sin(a),   a: the angle between p_1 and p_2               (Shoemake, 1985)
  ties         base + scale * sum_i w_i m_i d_i / sum_i w_i m_i                    (Yadav et al., 2023, arXiv 2306.01708)
               d_i: p_i - base, all but its largest numbers set to 0;   m_i: whether d_i has the sign of sum_i w_i d_i
  dare_linear  base + scale * sum_i w_i d_i                                            (Yu et al., 2023, arXiv 2311.03099)
               d_i: p_i - base, each number kept with the probability `density` and divided by it, else set to 0
  dare_ties    `ties` with the d_i of `dare_linear`

p_i are the weights of policy i, w_i its share, 1 in sum. Differences from the papers: 1. policies may count unequally, in the
election of signs too; 2. the largest changes are kept of each tensor, not of all tensors together, as in peft and mergekit;
3. slerp takes vectors of unequal length as they are. Pruning and the election of signs are peft's.

Everything is computed in fp32, a tensor at a time, read from the policies' files; beside it one file of what comes out is held.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, prune
from safetensors import safe_open
from safetensors.torch import save_file
from torch.linalg import vector_norm
from transformers import AutoConfig, PreTrainedTokenizerBase

from posttrain.chat import ChatContract, read_contract
from posttrain.data.source import unit_bits
from posttrain.error import UserError
from posttrain.footprint import read_header
from posttrain.models import (
    PROBE_TOKENS,
    check_weights,
    compute_in_float32,
    load_policy,
    load_tokenizer,
    publish,
    start_tokens,
    stored_dtype,
    token_ids,
    token_tables,
    weight_files,
)
from posttrain.progress import Progress
from posttrain.recipe import MAX_SHARD_BYTES
from posttrain.shards import INDEX, split, write_index
from posttrain.stage import Input, StageContext

Method = Literal["linear", "slerp", "ties", "dare_linear", "dare_ties"]
PARALLEL = 1e-6
"""Sine of an angle between two vectors below which arc and chord are one in fp32."""
NO_ARCHITECTURE = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
"""Settings of a model that do not say what its weights mean; the vocabulary is compared token by token."""


# --- arithmetic ------------------------------------------------------------------------------------------------------


def merge(
    policies: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    *,
    method: Method,
    weights: Sequence[float],
    t: float,
    density: float,
    scale: float,
    seed: str,
) -> torch.Tensor:
    """One tensor of several policies, and of their base where the method has one, all in fp32 and of one shape, as one of that shape.

    `weights` sum to 1; what is random is a function of `seed`.
    """
    if method == "linear":
        return linear(policies, weights)
    if method == "slerp":
        return slerp(policies[0], policies[1], t)
    assert base is not None, "changes are changes of a base"
    changes = [policy - base for policy in policies]
    if density < 1:
        is_random = method != "ties"
        for number, change in enumerate(changes):
            torch.manual_seed(unit_bits(f"{seed} {number}"))  # peft draws from the global generator
            changes[number] = prune(change, density, "random" if is_random else "magnitude", rescale=is_random)
    shares = torch.tensor(weights).view(-1, *[1] * base.dim())
    stacked = torch.stack(changes)
    if method == "dare_linear":
        return base + scale * (shares * stacked).sum(0)
    counted = shares * calculate_majority_sign_mask(shares * stacked)
    total = counted.sum(0)
    return base + scale * (counted * stacked).sum(0) / total.masked_fill(total == 0, 1)


def linear(policies: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted mean; where all are the same, the very same."""
    merged = policies[0].clone()
    for policy, weight in zip(policies[1:], weights[1:], strict=True):
        merged += weight * (policy - policies[0])
    return merged


def slerp(first: torch.Tensor, second: torch.Tensor, t: float) -> torch.Tensor:
    """So far along the arc from the first to the second, taken as vectors; along the line where there is no one arc."""
    lengths = [float(vector_norm(each, dtype=torch.float64)) for each in (first, second)]
    if min(lengths) == 0:
        return torch.lerp(first, second, t)
    u, v = first / lengths[0], second / lengths[1]
    # Of Kahan: the arc cosine loses half of all digits where two vectors nearly agree, as those of kindred policies do.
    angle = 2 * math.atan2(float(vector_norm(u - v, dtype=torch.float64)), float(vector_norm(u + v, dtype=torch.float64)))
    if math.sin(angle) < PARALLEL:
        return torch.lerp(first, second, t)
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


# --- policies on disk ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """The weights of a model where they lie; a tensor is read when it is asked for."""

    given: Input
    files: Mapping[str, Path]
    """Name of each tensor to the file that holds it."""
    shapes: Mapping[str, tuple[int, ...]]
    """Name of each tensor to its shape, as it is read."""
    tables: frozenset[str] = frozenset()
    """Names of the tensors that have to grow, since there are tokens that this model does not know."""
    new: Sequence[int] = ()
    """Ids of these tokens; their vectors are what they began as in the first policy that knew them."""

    def read(self, name: str) -> torch.Tensor:
        """A tensor in the type that it is stored in."""
        with safe_open(self.files[name], "pt") as file:
            stored: torch.Tensor = file.get_tensor(name)
        if name not in self.tables:
            return stored
        table = torch.empty(self.shapes[name])
        table[: len(stored)] = stored
        start_tokens(table, self.new)
        return table


@dataclass(frozen=True)
class Opened:
    """Policies that can be merged, under the one chat contract that they share, and their base."""

    tokenizer: PreTrainedTokenizerBase
    contract: ChatContract
    policies: Sequence[Stored]
    base: Stored | None


def open_policies(context: StageContext[Any]) -> Opened:
    """The stage's policies, and the base. Reads no weights. Raises `UserError` where they are not of one kind.

    One that has no chat contract yet, such as the model that the first was trained from, is taken under that of the first.
    """
    first, *others = context.inputs["policies"]
    bases = context.inputs.get("base", ())
    for each in (first, *others, *bases):
        check_weights(each, context.at)
    tokenizer, contract = load_tokenizer(first, context.at)
    found = [_open(first, context.at)]
    for role, other in [*(("policies", other) for other in others), *(("base", base) for base in bases)]:
        at = f"{context.at}.inputs.{role}: {other.name}"
        _check_architecture(first, other, at)
        other_tokenizer, other_contract = load_tokenizer(other, context.at, contract=contract)
        if role == "policies":
            _check_contract(first, contract, other_contract, at)
        _check_vocabulary(first, tokenizer, other_tokenizer, at, is_whole=role == "policies")
        found.append(_open_like(found[0], other, other_tokenizer, other_contract, context.at))
        _check_tensors(found[0], found[-1], at)
    return Opened(tokenizer, contract, found[: 1 + len(others)], found[-1] if bases else None)


def _open(given: Input, at: str) -> Stored:
    files, shapes = {}, {}
    for path in weight_files(given, at):
        for name, (_, shape) in read_header(path).items():
            files[name], shapes[name] = path, shape
    return Stored(given, files, shapes)


def _open_like(first: Stored, other: Input, tokenizer: PreTrainedTokenizerBase, contract: ChatContract, at: str) -> Stored:
    """The weights of another model, with room for the tokens that a stage gave the first one, where its own lack them."""
    stored = _open(other, at)
    if not contract.added_tokens or read_contract(Path(other.model.model)) or not read_contract(Path(first.given.model.model)):
        return stored
    tables = frozenset(token_tables(other.model) & stored.shapes.keys() & first.shapes.keys())
    shapes = {**stored.shapes, **{name: first.shapes[name] for name in tables}}
    return Stored(other, stored.files, shapes, tables, token_ids(tokenizer, contract.added_tokens))


def _check_architecture(first: Input, other: Input, at: str) -> None:
    ours, theirs = _architecture(first), _architecture(other)
    if "quantization_config" in ours | theirs:
        raise UserError(f"{at} and {first.name}: the weights of one are quantized; merge those that they were made of")
    if name := next((name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)), None):
        raise UserError(
            f"{at} is of another architecture than {first.name}: {name} is {theirs.get(name)}, not {ours.get(name)}; merge policies "
            "that were trained from one model"
        )


def _architecture(given: Input) -> dict[str, Any]:
    source = given.model
    config = AutoConfig.from_pretrained(source.model, revision=source.revision, trust_remote_code=source.trust_remote_code)
    return _telling(config.to_dict())


def _telling(settings: Mapping[str, Any]) -> dict[str, Any]:
    telling = {name: value for name, value in settings.items() if name not in NO_ARCHITECTURE}
    return {name: _telling(value) if isinstance(value, dict) else value for name, value in telling.items()}


def _check_contract(first: Input, ours: ChatContract, theirs: ChatContract, at: str) -> None:
    for part in ("template", "bos_token", "stop_tokens", "pad_token"):
        if getattr(ours, part) != getattr(theirs, part):
            what = part.replace("_", " ")
            raise UserError(f"{at} has another chat contract than {first.name}: another {what}; merge policies that are asked alike")


def _check_vocabulary(
    first: Input, ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, at: str, *, is_whole: bool
) -> None:  # fmt: skip
    """Refuse other tokens, or the same under other ids; with `is_whole` also fewer."""
    known, other = ours.get_vocab(), theirs.get_vocab()
    differing = [token for token, number in other.items() if known.get(token) != number]
    if is_whole:
        differing += [token for token in known if token not in other]
    if differing:
        raise UserError(f"{at} has another vocabulary than {first.name}, such as {differing[0]!r}; merge policies of one model")


def _check_tensors(first: Stored, other: Stored, at: str) -> None:
    for name in sorted(first.shapes.keys() | other.shapes.keys()):
        ours, theirs = (list(stored.shapes[name]) if name in stored.shapes else None for stored in (first, other))
        if ours is None or theirs is None:
            holder = first.given.name if theirs is None else "it"
            raise UserError(f"{at} does not hold the tensors of {first.given.name}: only {holder} has {name}; merge policies of one model")
        if ours != theirs:
            raise UserError(f"{at} has {name} of the shape {theirs}, and {first.given.name} of {ours}; merge policies of one model")


# --- the merge -------------------------------------------------------------------------------------------------------


def merge_policies(context: StageContext[Any]) -> dict[str, float]:
    """Merge the stage's policies into its output, in the type that the first is stored in. Returns how far each is from it.

    That is the length of the difference, as a share of the length of the policy's own weights.
    """
    progress = Progress(context.directory, is_main=context.is_main)
    opened = open_policies(context)
    aside = context.checkpoints / "merged"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    distances = _write(context, opened, aside, progress)
    progress.phase("publish")
    first = opened.policies[0].given
    # It is loaded as any policy is, which checks that every weight is there, and published as one that was trained. What is stored in that
    # type is mapped into memory, and read a tensor at a time.
    dtype = stored_dtype(first.model)
    source = first.model.model_copy(update={"model": str(aside), "revision": None})
    model = load_policy(source, opened.tokenizer, opened.contract, context.at, dtype=dtype)
    compute_in_float32(model)
    probe_ids = np.random.default_rng(0).integers(0, len(opened.tokenizer), (2, PROBE_TOKENS)).tolist()
    publish(
        context,
        model,
        opened.tokenizer,
        opened.contract,
        probe_ids,
        given=first,
        dtype=dtype,
        forward=model,
    )
    shutil.rmtree(aside, ignore_errors=True)  # else it goes with what training stages leave there
    return distances


def _write(context: StageContext[Any], opened: Opened, into: Path, progress: Progress) -> dict[str, float]:
    """Write the merged weights, in the types of the first policy, and beside them what else says how to load it."""
    config = context.config
    first = opened.policies[0]
    names = [policy.given.name for policy in opened.policies]
    weights = config.weights or [1.0] * len(names)
    weights = [weight / sum(weights) for weight in weights]
    progress.phase("merge", len(first.files))
    lengths, differences, done = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), 0
    files = split({name: first.read(name).nbytes for name in first.files}, MAX_SHARD_BYTES)
    for file, held in files.filename_to_tensors.items():
        merged = {}
        for name in held:
            stored = [policy.read(name) for policy in opened.policies]
            merged[name] = stored[0]
            if stored[0].is_floating_point():
                tensors = [each.float() for each in stored]
                made = merge(
                    tensors,
                    None if opened.base is None else opened.base.read(name).float(),
                    method=config.method,
                    weights=weights,
                    t=config.t,
                    density=config.density,
                    scale=config.scale,
                    seed=f"{config.seed} {name}",
                )
                merged[name] = made.to(stored[0].dtype)
                for policy, tensor in zip(names, tensors, strict=True):
                    lengths[policy] += float(vector_norm(tensor, dtype=torch.float64)) ** 2
                    differences[policy] += float(vector_norm(made - tensor, dtype=torch.float64)) ** 2
            done += 1
            progress.step(done)
        save_file(merged, str(into / file), metadata={"format": "pt"})
    write_index(into, files)
    for path in next(iter(first.files.values())).parent.glob("*"):
        if path.suffix in (".json", ".py") and path.name != INDEX:
            shutil.copyfile(path, into / path.name)
    return {f"distance from {name}": math.sqrt(differences[name] / lengths[name]) if lengths[name] else 0.0 for name in names}
