"""Rollouts: what a policy answers while it learns, what that is rewarded with, and how far it has moved from where it began.

    sample -> rewards (reward models, checks) -> log-probabilities under the input policy -> advantages -> micro-batches

Each rank samples the answers to its share of a step's prompts; then every rank holds all of them, so what follows is the same on
each. What is drawn is a function of (seed, step, place of the prompt in the step, number of the answer) alone: a step is the same
on any number of ranks, and after a resume, but for rounding.

A reward model reads text. A prompt is rendered by its own template and tokenized by its own tokenizer; what the policy said
follows, without anything that would be a control token there, and closed as an answer is: one that was cut off too.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, PreTrainedModel

from posttrain import disk
from posttrain.batch import Indices, deal
from posttrain.chat import PROBE_ANSWER, encode_prompt, read_contract, render
from posttrain.data.rows import Conversation, Message, asked_messages
from posttrain.data.samples import LeftOut
from posttrain.data.source import open_source
from posttrain.engine import Engine
from posttrain.error import UserError
from posttrain.fit import Fitting, bare_model
from posttrain.forward import attach, attach_rewards, exact_layouts, score_all, to_batch
from posttrain.generate import Completion, decode, sample_all
from posttrain.heartbeat import tell
from posttrain.layout import Group, Layout, measure, number_sequences, pair_group
from posttrain.metrics.check import Check, read_checks, score
from posttrain.metrics.generated import is_looping, repetition
from posttrain.models import load_policy, loaded_dtype, quantization
from posttrain.policy_losses import divergence, group_advantages, importance_weights, leave_one_out, token_scales
from posttrain.progress import TRAIN
from posttrain.ranks import shares_of_all_ranks
from posttrain.reward import Reader, load_rewards, open_reader, reward_group, score_groups
from posttrain.settle import is_sharded
from posttrain.stage import Input, StageContext
from posttrain.weights import gathered

Floats = npt.NDArray[np.float64]

COMPLETIONS_FILE = "completions.jsonl"
"""What was sampled in each step, an answer a line, in the stage's directory."""
STOPPED_FILE = "stopped.json"
"""Says after which step the run ended early, if it did."""
PROBE_TOKENS = 64
"""Most tokens of the two completions that stand for those to come, where it is settled how to compute."""


@dataclass(frozen=True)
class Prompt:
    """What is asked, and by which checks its answers are scored."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    checks: Mapping[str, list[Check]]
    """By their kind; only of kinds that count."""
    origin: str


def read_prompts(context: StageContext[Any], given: Input, *, has_models: bool) -> list[Prompt]:
    """The prompts of a data set, in the order of its rows. Raises `UserError` where a check is wrong, or nothing rewards an answer.

    `has_models`: whether there are reward models, which reward every answer.
    """
    kinds = context.config.checkers
    prompts = []
    for row in open_source(given.data, f"{context.at}: {given.name}").rows():
        carried = read_checks(row.checks, row.origin) if isinstance(row, Conversation) else []
        checks = {kind: found for kind in kinds if (found := [check for check in carried if check.kind == kind])}
        if not checks and not has_models:
            raise UserError(
                f"{row.origin}: carries no check of {context.at}.checkers ({', '.join(kinds)}), so nothing rewards its answers; add checks "
                "to it, name more kinds, or give inputs.reward a reward model"
            )
        prompts.append(Prompt(asked_messages(row), row.tools, checks, row.origin))
    return prompts


def check_sources(context: StageContext[Any]) -> None:
    """Raise `UserError` where there is nothing to be rewarded by, or where what there is cannot rate these prompts."""
    config, at = context.config, context.at
    models = context.inputs.get("reward", ())
    names = [*(given.name for given in models), *config.checkers]
    if not names:
        raise UserError(f"{at}: nothing rewards an answer; give inputs.reward a reward model, or name checkers such as [final_number]")
    for name in config.reward_weights:
        if name not in names:
            raise UserError(f"{at}.reward_weights: {name!r} is no reward of this stage; known: {', '.join(names)}")
    prompts = [
        prompt
        for role in ("data", "heldout")
        for given in context.inputs.get(role, ())
        for prompt in read_prompts(context, given, has_models=bool(models))
    ]
    for given in models:
        reader = open_reader(given, at)
        for prompt in prompts:
            encode_prompt(reader.tokenizer, prompt.messages, prompt.tools, f"{prompt.origin}: for {given.name}")


# --- rewards ---------------------------------------------------------------------------------------------------------


class Judge:
    """A reward model, and how it reads what a policy answers."""

    def __init__(self, given: Input, at: str) -> None:
        """Load it, whole, on this rank's device. Raises `UserError`."""
        self.name = given.name
        self.reader: Reader = open_reader(given, at)
        self.model = load_rewards(given, at)
        if not isinstance(getattr(self.model, "score", None), torch.nn.Module):
            raise UserError(f"{at}: {given.name}: {type(self.model).__name__} has no score head on a language model, so it cannot be used")
        attach_rewards(self.model)
        self.pad: int = self.reader.tokenizer.pad_token_id or 0
        self._closing = _closing(self.reader, f"{at}: {given.name}")
        special = (token.content for token in self.reader.tokenizer.added_tokens_decoder.values() if token.special)
        self._control = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self._longest = 0
        self._layout: Layout = "padded"

    def rate(
        self, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], *, micro_batch_tokens: int, rank: int, world_size: int
    ) -> Floats:
        """The rewards of G answers to each of B prompts, `(B, G)`, on every rank, computed by all of them."""
        groups = [self.group(prompt, answers) for prompt, answers in zip(prompts, texts, strict=True)]
        longest = max(group.longest for group in groups)
        if longest > self._longest:
            self._longest = longest
            self._layout = exact_layouts(self.model, self.model, ("shared", "packed"), longest)[0][0]
        return score_groups(
            self.model,
            self.model,
            groups,
            self._layout,
            pad=self.pad,
            micro_batch_tokens=micro_batch_tokens,
            rank=rank,
            world_size=world_size,
        )

    def group(self, prompt: Prompt, answers: Sequence[str]) -> Group:
        """A prompt and answers to it as the model reads them, to be scored at the end of each."""
        asked = render(self.reader.tokenizer, prompt.messages, prompt.tools, prompt.origin, add_generation_prompt=True)
        said = [self._plain(answer) + self._closing for answer in answers]
        before, *wholes = self._ids([asked, *(asked + text for text in said)])
        apart = self._ids(said)
        # Tokenized apart where a token would reach over where the answer begins, as in training (see `chat`).
        both = zip(wholes, apart, strict=True)
        branches = [whole[len(before) :] if whole[: len(before)] == before else alone for whole, alone in both]
        return reward_group(before, branches, self.pad)

    def _plain(self, text: str) -> str:
        while self._control.search(text):
            text = self._control.sub("", text)  # again, as what is left may be one
        return text

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.reader.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
        return ids


def _closing(reader: Reader, origin: str) -> str:
    """What follows an answer in what a reward model reads."""
    if reader.contract is not None:
        return reader.contract.stop_tokens[0]
    probe: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE_ANSWER}]
    return render(reader.tokenizer, probe, None, origin).rpartition(PROBE_ANSWER)[2]


def check_answers(prompt: Prompt, answers: Sequence[str]) -> dict[str, list[float]]:
    """By kind of check, of each answer whether it passes all checks of that kind that the prompt carries: 1 or 0."""
    return {kind: [min(score(check, answer) for check in checks) for answer in answers] for kind, checks in prompt.checks.items()}


# --- the policy ------------------------------------------------------------------------------------------------------


class _Signalled(Exception):
    """A signal asked this rank for an end."""


@contextmanager
def _whole(engine: Any, model: PreTrainedModel) -> Iterator[None]:
    """The parameters of a model that ZeRO-3 shards are whole on every rank, each of which may compute what it likes meanwhile."""
    if not is_sharded(model):
        yield
        return
    from trl.models.utils import add_hooks, remove_hooks

    with gathered(list(engine.parameters())):
        remove_hooks(engine)
        try:
            yield
        finally:
            add_hooks(engine)


@contextmanager
def _by_itself(model: PreTrainedModel) -> Iterator[None]:
    """The model answers by its own distribution: not as its generation config would bend it, and as in evaluation."""
    usual: Any = model.generation_config
    training = model.training
    model.generation_config = GenerationConfig(eos_token_id=usual.eos_token_id, pad_token_id=usual.pad_token_id)
    model.eval()
    try:
        yield
    finally:
        model.generation_config = usual
        model.train(training)


def open_reference(context: StageContext[Any], fitting: Fitting) -> PreTrainedModel | None:
    """The input policy, frozen, in the very precision in which it is trained; None where it is not asked for, or adapters can be
    switched off to get it."""
    config, given = context.config, context.input("policy")
    if not needs_reference(config):
        return None
    # A policy without a contract gets tokens whose vectors are trained beside the adapters.
    if config.lora is not None and read_contract(Path(given.model.model)) is not None:
        return None
    dtype = loaded_dtype(config)
    options = {"attn_implementation": config.attn_implementation, **quantization(config.lora, dtype)}
    model = load_policy(given.model, fitting.tokenizer, fitting.contract, context.at, dtype=dtype, **options)
    attach(model.eval().requires_grad_(False), temperature=config.temperature)
    return model


def needs_reference(config: Any) -> bool:
    """Whether anything is asked of the divergence from the input policy."""
    return bool(config.beta) or config.kl_budget is not None


# --- a step ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """The B prompts of a step, and G completions to each, with what the loss wants to know of them."""

    prompts: list[list[int]]
    completions: list[list[Completion]]
    advantages: Floats
    """`(B, G)`."""
    scales: Floats
    """What the sum over the tokens of each is multiplied by, `(B, G)`."""
    reference: list[list[npt.NDArray[np.float32]]] | None
    """Log-probability of each token under the input policy, `[prompt][completion]` -> `(n,)`; None where nothing is asked of it."""
    metrics: dict[str, float]

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Tokens of all completions, with the prompt of each, and those of the completions alone."""
        sampled = sum(len(completion.ids) for completions in self.completions for completion in completions)
        asked = sum(len(prompt) * len(completions) for prompt, completions in zip(self.prompts, self.completions, strict=True))
        return asked + sampled, sampled

    def micro_batches(self, layout: Layout, pad: int, micro_batch_tokens: int, rank: int, world_size: int) -> list[dict[str, Any]]:
        """This rank's share, cut up and dealt out by tokens as samples of other stages are."""
        pieces = cut(self.prompts, self.completions, micro_batch_tokens)
        sizes = measure([self.group(*piece) for piece in pieces], layout)
        dealt = deal(range(len(pieces)), sizes, micro_batch_tokens, world_size)[rank]
        return [self._batch([pieces[number] for number in numbers], layout, pad) for numbers in dealt]

    def group(self, place: int, branches: range) -> Group:
        """A prompt and some of its completions."""
        return pair_group(self.prompts[place], [self.completions[place][branch].ids for branch in branches])

    def _batch(self, pieces: Sequence[tuple[int, range]], layout: Layout, pad: int) -> dict[str, Any]:
        groups = [self.group(*piece) for piece in pieces]
        batch = to_batch(groups, layout, pad)
        num_rows, width = batch["labels"].shape
        advantages, scales, reference = torch.empty(num_rows), torch.empty(num_rows), torch.zeros(num_rows, width - 1)
        for (number, branch), row in number_sequences(groups).items():
            place, completion = pieces[number][0], pieces[number][1][branch]
            advantages[row], scales[row] = self.advantages[place, completion], self.scales[place, completion]
            if self.reference is not None:
                log_probs = torch.from_numpy(self.reference[place][completion])
                start = len(self.prompts[place]) - 1
                reference[row, start : start + len(log_probs)] = log_probs
        return {**batch, "advantages": advantages, "scales": scales, "reference": reference}


def cut(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Completion]], at_most: int) -> list[tuple[int, range]]:
    """Prompts with as many of their completions as have at most so many tokens together, a longer one alone: place and numbers."""
    pieces = []
    for place, (prompt, answers) in enumerate(zip(prompts, completions, strict=True)):
        start, total = 0, len(prompt)
        for number, answer in enumerate(answers):
            if number > start and total + len(answer.ids) > at_most:
                pieces.append((place, range(start, number)))
                start, total = number, len(prompt)
            total += len(answer.ids)
        pieces.append((place, range(start, len(answers))))
    return pieces


class Rollouts:
    """Makes the rollouts of one run, and keeps what was sampled. All ranks call what it does."""

    def __init__(
        self,
        context: StageContext[Any],
        fitting: Fitting,
        trainer: Any,
        judges: Sequence[Judge],
        frozen: PreTrainedModel | None,
        engine: Engine | None,
        encoder: Any,
    ) -> None:
        """`trainer` knows its samples by now; `frozen` is what `open_reference` gave, `engine` samples instead of transformers where
        there is one, and `encoder` made the samples."""
        self.context = context
        self.config = context.config
        self.fitting = fitting
        self.trainer = trainer
        self.judges = judges
        has_models = bool(judges)
        rows = read_prompts(context, context.input("data"), has_models=has_models)
        self.prompts = [rows[row] for row in trainer.prepared.column("row")]
        self.heldout: list[tuple[Prompt, list[int]]] = []
        for given in context.inputs.get("heldout", ()):
            self.heldout = _encode_heldout(context, given, encoder, read_prompts(context, given, has_models=has_models))
            if not self.heldout:
                raise UserError(f"{context.at}: no prompt of {given.name} leaves room for an answer in {context.at}.max_length; raise it")
        self._is_new = True
        self._engine = engine
        self._frozen = frozen
        self._frozen_call: Any = frozen
        if frozen is not None and is_sharded(frozen):
            from trl.models import prepare_deepspeed

            self._frozen_call = prepare_deepspeed(frozen, trainer.accelerator)
        elif frozen is not None:
            frozen.to(trainer.args.device)

    def roll(self, step: int) -> Rollout:
        """The rollout of a step, under the policy as it is now."""
        config, trainer = self.config, self.trainer
        if self._is_new and self.context.is_main:
            # What an attempt before this one wrote of this step and later ones.
            cut_from(self.context.directory / COMPLETIONS_FILE, step + 1)
            (self.context.directory / STOPPED_FILE).unlink(missing_ok=True)
        samples = trainer.batches.samples(step)
        asked = [self.prompts[sample] for sample in samples]
        prompts: list[list[int]] = trainer.samples[samples.tolist()]["input_ids"]
        completions, texts, checked = self._answer(
            asked,
            prompts,
            [(config.seed, step, place) for place in range(len(prompts))],
            step=step,
            num_return_sequences=config.num_generations,
            temperature=config.temperature,
        )
        weights: Floats | float = 1.0
        corrected: dict[str, float] = {}
        if self._engine is not None:
            completions, weights, corrected = self._correct(prompts, completions)
        rewards = self._reward(asked, texts, checked)
        num_tokens = np.array([[len(completion.ids) for completion in group] for group in completions])
        ended = np.array([[completion.ended for completion in group] for group in completions])
        total = self._total(rewards) - (config.missing_eos_penalty or 0.0) * ~ended
        metrics = {**_describe(rewards, total), **_describe_completions(completions, num_tokens, ended), **corrected}
        reference = self._reference(prompts, completions) if needs_reference(config) else None
        kl = None
        penalized = total
        if reference is not None:
            log_ratios, kl = _diverge(completions, reference)
            metrics |= {"kl": float(kl.sum() / num_tokens.sum()), "kl/completion": float(kl.mean())}
            if config.algorithm == "rloo":
                penalized = total - config.beta * log_ratios
        is_grpo = config.algorithm == "grpo"
        advantages = group_advantages(total, config.scale_rewards) if is_grpo else leave_one_out(penalized)
        if kl is not None and config.kl_budget is not None and kl.mean() > config.kl_budget:
            self._stop(step + 1, float(kl.mean()))
        if self.context.is_main:
            self._keep(step + 1, asked, completions, texts, rewards, total, advantages, kl)
        self._is_new = False
        scales = token_scales(num_tokens, config.loss_type, config.max_completion_length)
        return Rollout(prompts, completions, advantages * weights, scales, reference, metrics)

    def measure(self) -> dict[str, float]:
        """What the greedy answers to the held-out prompts are rewarded with, by the policy as it is now."""
        step = self.trainer.state.global_step
        asked, prompts = [prompt for prompt, _ in self.heldout], [ids for _, ids in self.heldout]
        completions, texts, checked = self._answer(
            asked, prompts, [(place,) for place in range(len(prompts))], step=step, num_return_sequences=1, temperature=0.0
        )
        rewards = self._reward(asked, texts, checked)
        num_tokens = np.array([len(completion.ids) for (completion,) in completions])
        return {
            "reward": float(self._total(rewards).mean()),
            **{f"rewards/{name}/mean": float(np.nanmean(values)) for name, values in rewards.items()},
            "mean_length": float(num_tokens.mean()),
            "clipped_ratio": float(np.mean([not completion.ended for (completion,) in completions])),
            "num_prompts": float(len(prompts)),
        }

    def probe(self, samples: Sequence[int]) -> list[Group]:
        """Samples as they may look with answers, before there are any."""
        width = min(self.config.max_completion_length, PROBE_TOKENS)
        prompts = self.trainer.samples[list(samples)]["input_ids"]
        return [pair_group(prompt, [[self.trainer.pad] * width] * 2) for prompt in prompts]

    def _answer(
        self,
        asked: Sequence[Prompt],
        prompts: Sequence[list[int]],
        seeds: Sequence[tuple[int, ...]],
        *,
        step: int,
        num_return_sequences: int,
        temperature: float,
    ) -> tuple[list[list[Completion]], list[list[str]], list[dict[str, list[float]]]]:
        """Completions to all prompts, as text too, and how they fare by their checks; each rank samples and checks its share."""
        context, trainer, fitting = self.context, self.trainer, self.fitting
        by_length = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        mine = by_length[context.rank :: context.world_size]
        trainer.stop_if_asked()
        questions = [prompts[place] for place in mine]
        if self._engine is not None:
            most = -(-len(prompts) // context.world_size)
            found = self._engine.sample(questions, num_return_sequences=num_return_sequences, temperature=temperature, step=step, most=most)
        else:
            found = self._sample(questions, [seeds[place] for place in mine], num_return_sequences, temperature)
        trainer.stop_if_asked()
        share = {}
        for place, completions in zip(mine, found, strict=True):
            texts = [decode(fitting.tokenizer, each.ids[:-1] if each.ended else each.ids) for each in completions]
            share[place] = (completions, texts, check_answers(asked[place], texts))
        every = shares_of_all_ranks(share)
        return [each[0] for each in every], [each[1] for each in every], [each[2] for each in every]

    def _sample(
        self, prompts: list[list[int]], seeds: list[tuple[int, ...]], num_return_sequences: int, temperature: float
    ) -> list[list[Completion]]:
        """Completions to this rank's prompts by the model that is trained; none where a signal asks for an end."""
        trainer, config = self.trainer, self.config
        model = bare_model(trainer.model)

        def tick(_: int) -> None:
            tell(TRAIN, trainer.state.global_step)  # an answer may take as long as a step does elsewhere
            if trainer.signalled:
                raise _Signalled

        found: list[list[Completion]] = []
        with _whole(trainer.model_wrapped, model), _by_itself(model), trainer.accelerator.autocast(), suppress(_Signalled):
            found = sample_all(
                model,
                self.fitting.tokenizer,
                self.fitting.contract,
                prompts,
                num_return_sequences=num_return_sequences,
                temperature=temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                max_new_tokens=config.max_completion_length,
                seeds=seeds,
                tick=tick,
            )
        return found

    def _reward(
        self, asked: Sequence[Prompt], texts: Sequence[Sequence[str]], checked: Sequence[Mapping[str, list[float]]]
    ) -> dict[str, Floats]:
        """By the name of each reward, what it gives to each answer, `(B, G)`; not a number where it says nothing."""
        rewards: dict[str, Floats] = {}
        for judge in self.judges:
            self.trainer.stop_if_asked()
            rewards[judge.name] = judge.rate(
                asked,
                texts,
                micro_batch_tokens=self.trainer.batches.micro_batch_tokens,
                rank=self.context.rank,
                world_size=self.context.world_size,
            )
        nothing = [np.nan] * len(texts[0])
        for kind in self.config.checkers:
            if any(kind in found for found in checked):
                rewards[kind] = np.array([found.get(kind, nothing) for found in checked])
        return rewards

    def _total(self, rewards: Mapping[str, Floats]) -> Floats:
        """The weighted sum of what says something, `(B, G)`."""
        weighted = [self.config.reward_weights.get(name, 1.0) * values for name, values in rewards.items()]
        total: Floats = np.nansum(weighted, axis=0)
        return total

    def _correct(
        self, prompts: Sequence[list[int]], completions: Sequence[Sequence[Completion]]
    ) -> tuple[list[list[Completion]], Floats, dict[str, float]]:
        """Completions with the policy's own log-probabilities, how much each counts `(B, G)`, and how far the engine was off."""
        own = self._score(prompts, completions, bare_model(self.trainer.model), self._call)
        # A token that the engine did not rate counts as rated alike.
        off = [
            [np.nan_to_num(scored.astype(np.float64) - completion.log_probs) for scored, completion in zip(scores, answers, strict=True)]
            for scores, answers in zip(own, completions, strict=True)
        ]
        weights = importance_weights(
            np.array([[each.sum() for each in group] for group in off]), self.config.vllm_importance_sampling_clip_max
        )
        every = np.abs(np.concatenate([each for group in off for each in group]))
        metrics = {
            "sampling/sampling_logp_difference/mean": float(every.mean()),
            "sampling/sampling_logp_difference/max": float(every.max()),
            "sampling/importance_sampling_ratio/min": float(weights.min()),
            "sampling/importance_sampling_ratio/mean": float(weights.mean()),
            "sampling/importance_sampling_ratio/max": float(weights.max()),
        }
        corrected = [
            [replace(completion, log_probs=scored.tolist()) for completion, scored in zip(answers, scores, strict=True)]
            for answers, scores in zip(completions, own, strict=True)
        ]
        return corrected, weights, metrics

    @property
    def _call(self) -> Any:
        """What computes the policy: the model, or what wraps it."""
        return self.trainer.model_wrapped if self.trainer.is_deepspeed_enabled else self.trainer.model

    def _reference(self, prompts: Sequence[list[int]], completions: Sequence[Sequence[Completion]]) -> list[list[npt.NDArray[np.float32]]]:
        """Log-probabilities of the completions' tokens under the input policy."""
        trainer = self.trainer
        if self._frozen is not None:
            return self._score(prompts, completions, self._frozen, self._frozen_call)
        with trainer.accelerator.unwrap_model(trainer.model).disable_adapter():
            return self._score(prompts, completions, bare_model(trainer.model), self._call)

    def _score(
        self, prompts: Sequence[list[int]], completions: Sequence[Sequence[Completion]], model: PreTrainedModel, call: Any
    ) -> list[list[npt.NDArray[np.float32]]]:
        """Log-probabilities of the completions' tokens, `[prompt][completion]` -> `(n,)`, on every rank."""
        trainer, context = self.trainer, self.context
        tokens = trainer.batches.micro_batch_tokens
        pieces = cut(prompts, completions, tokens)
        groups = [pair_group(prompts[place], [completions[place][branch].ids for branch in branches]) for place, branches in pieces]
        trainer.stop_if_asked()
        with trainer.accelerator.autocast():
            if self._is_new:
                exact_layouts(call, model, [trainer.layout], trainer.longest)
            scored = score_all(
                call,
                model,
                groups,
                trainer.layout,
                pad=trainer.pad,
                micro_batch_tokens=tokens,
                rank=context.rank,
                world_size=context.world_size,
            )
        found: list[list[npt.NDArray[np.float32]]] = [[] for _ in prompts]
        for (place, _), branches in zip(pieces, scored, strict=True):
            found[place] += branches
        return found

    def _stop(self, step: int, kl: float) -> None:
        """Let the run end with this step."""
        self.trainer.is_over = True
        if self.context.is_main:
            budget = self.config.kl_budget
            disk.write_json(self.context.directory / STOPPED_FILE, {"step": step, "kl": kl, "kl_budget": budget})
            print(f"stops after step {step}: {kl:.3g} nats from the input policy, over kl_budget: {budget:g}", flush=True)

    def _keep(
        self,
        step: int,
        asked: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        texts: Sequence[Sequence[str]],
        rewards: Mapping[str, Floats],
        total: Floats,
        advantages: Floats,
        kl: Floats | None,
    ) -> None:
        """Write down what was sampled."""
        _append(
            self.context.directory / COMPLETIONS_FILE,
            [
                {
                    "step": step,
                    "origin": prompt.origin,
                    "prompt": prompt.messages,
                    "completion": texts[place][number],
                    "reward": float(total[place, number]),
                    "rewards": {
                        name: float(values[place, number]) for name, values in rewards.items() if not np.isnan(values[place, number])
                    },
                    "advantage": float(advantages[place, number]),
                    **({} if kl is None else {"kl": float(kl[place, number])}),
                    "num_tokens": len(completion.ids),
                    "ended": completion.ended,
                }
                for place, prompt in enumerate(asked)
                for number, completion in enumerate(completions[place])
            ],
        )


def was_stopped(directory: Path, step: int) -> bool:
    """Whether the run ended early, with that step or one before it."""
    stopped = disk.read_json(directory / STOPPED_FILE)
    return stopped is not None and stopped["step"] <= step


def cut_from(path: Path, step: int) -> None:
    """Drop the lines of a file of JSON lines from the first one on that is of that step or a later one, or was cut off."""
    if not path.is_file():
        return
    kept = 0
    with path.open("r+b") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] >= step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept += len(line)
        file.truncate(kept)


def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _encode_heldout(context: StageContext[Any], given: Input, encoder: Any, prompts: Sequence[Prompt]) -> list[tuple[Prompt, list[int]]]:
    """Held-out prompts with their tokens, without those that cannot be rendered or leave no room for an answer: `num_prompts` tells."""
    found = []
    rows = open_source(given.data, f"{context.at}: {given.name}").rows()
    for prompt, row in zip(prompts, rows, strict=True):
        with suppress(LeftOut):
            found.append((prompt, encoder.encode(row).columns["input_ids"]))
    return found


def _diverge(completions: Sequence[Sequence[Completion]], reference: Sequence[Sequence[npt.NDArray[np.float32]]]) -> tuple[Floats, Floats]:
    """Of each completion log pi - log ref, and its divergence (see `policy_losses.divergence`), summed over its tokens, `(B, G)`."""
    log_ratios, divergences = [], []
    for answers, references in zip(completions, reference, strict=True):
        both = [(torch.tensor(answer.log_probs), torch.from_numpy(known)) for answer, known in zip(answers, references, strict=True)]
        log_ratios.append([float((sampled - known).double().sum()) for sampled, known in both])
        divergences.append([float(divergence(sampled, known).double().sum()) for sampled, known in both])
    return np.array(log_ratios), np.array(divergences)


def _describe(rewards: Mapping[str, Floats], total: Floats) -> dict[str, float]:
    """Rewards, by TRL's names."""
    found = {
        "reward": float(total.mean()),
        "reward_std": float(total.std(ddof=1)),
        "frac_reward_zero_std": float(np.isclose(total.std(1), 0).mean()),
    }
    for name, values in rewards.items():
        found |= {f"rewards/{name}/mean": float(np.nanmean(values)), f"rewards/{name}/std": float(np.nanstd(values, ddof=1))}
    return found


def _describe_completions(
    completions: Sequence[Sequence[Completion]], num_tokens: Indices, ended: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """Lengths, and shares of what should be rare, by TRL's names where it has one.

    clipped_ratio    cut off before a stop token            repeated_ratio   going round, see `metrics.generated`
    duplicate_ratio  the same as an earlier one of its group
    """
    every = [completion for group in completions for completion in group]
    num_distinct = sum(len({tuple(completion.ids) for completion in group}) for group in completions)
    return {
        "completions/mean_length": float(num_tokens.mean()),
        "completions/min_length": float(num_tokens.min()),
        "completions/max_length": float(num_tokens.max()),
        "completions/mean_terminated_length": float(num_tokens[ended].mean()) if ended.any() else 0.0,
        "completions/clipped_ratio": float(1 - ended.mean()),
        "completions/repeated_ratio": float(np.mean([is_looping(repetition(completion.ids)) for completion in every])),
        "completions/duplicate_ratio": 1 - num_distinct / len(every),
    }
