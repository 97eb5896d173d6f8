"""Answers of the batched loop against those of `model.generate`, one prompt at a time."""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerBase,
)

from posttrain import generate
from posttrain.chat import ChatContract
from posttrain.generate import Completion, answer_all, decode, sample_all, stop_ids

MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Policy:
    """A model with its tokenizer and contract, and a source of prompts."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    contract: ChatContract

    def draw(self, *lengths: int, seed: int = 0) -> list[list[int]]:
        """Prompts of random tokens."""
        drawn = random.Random(seed)
        return [[drawn.randrange(3, 256) for _ in range(length)] for length in lengths]

    def answer(self, prompts: list[list[int]], **options: Any) -> list[str]:
        found = answer_all(self.model, self.tokenizer, self.contract, prompts, **{"max_new_tokens": MAX_NEW_TOKENS, **options})
        return [decode(self.tokenizer, each.ids[:-1] if each.ended else each.ids) for each in found]

    def expect(self, prompts: list[list[int]], max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
        """What `model.generate` answers to each prompt alone."""
        stops = stop_ids(self.tokenizer, self.contract)
        answers = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            generated = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            tokens = generated[0, len(prompt) :].tolist()
            answers.append(decode(self.tokenizer, tokens[:-1] if tokens[-1] in stops else tokens))
        return answers


def with_stops(model: Any, directory: Path) -> Policy:
    """A policy that stops at one of many tokens, so that answers are of all lengths."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.eos_token
    stops = tuple(tokenizer.convert_ids_to_tokens(list(range(20, 256, 16))))
    return Policy(model.eval(), tokenizer, ChatContract("", tokenizer.bos_token, stops, tokenizer.pad_token, ()))


@pytest.fixture(scope="module")
def policy(tiny: Path) -> Policy:
    return with_stops(AutoModelForCausalLM.from_pretrained(tiny), tiny)


@pytest.fixture
def room_for_few(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three or four rows at a time, prompts read a few columns at a time, and prefixes shared however short."""
    monkeypatch.setattr(generate, "CACHE_BYTES", generate._bytes_per_token(policy.model) * 300)
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 20)
    monkeypatch.setattr(generate, "WORTH_SHARING_TOKENS", 8)


def alike(draw: Callable[..., list[list[int]]]) -> dict[str, list[list[int]]]:
    """Sets of prompts that share everything, nothing, and something."""
    long, other, short = draw(40, 30, 12, seed=1)
    tails = draw(*range(1, 13, 2), seed=2)
    return {
        "unlike": draw(*range(1, 60, 7)),
        "one token": draw(*[1] * 8),
        "identical": [long] * 7,
        "one prefix": [long + tail for tail in tails],
        "two prefixes, one within": [long + tail for tail in tails[:3]] + [long[:20] + other + tail for tail in tails[3:]] + [short],
        "each begins the next": [long[:length] for length in range(1, 41, 6)],
        "one far longer": [*draw(150), *tails],
        "one": [short],
        "none": [],
    }


CASES = list(alike(lambda *lengths, seed=0: [[0] * length for length in lengths]))


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_each_prompt_alone(policy: Policy, case: str) -> None:
    prompts = alike(policy.draw)[case]
    assert policy.answer(prompts) == policy.expect(prompts)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("room_for_few")
def test_answers_are_the_same_when_rows_leave_and_join(policy: Policy, case: str) -> None:
    prompts = alike(policy.draw)[case]
    assert policy.answer(prompts) == policy.expect(prompts)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 100])
def test_an_answer_ends_at_its_stop_or_its_limit(policy: Policy, max_new_tokens: int) -> None:
    prompts = policy.draw(*range(5, 30, 4))
    assert policy.answer(prompts, max_new_tokens=max_new_tokens) == policy.expect(prompts, max_new_tokens)


@pytest.mark.real
@pytest.mark.parametrize("case", ["unlike", "one prefix"])
def test_answers_of_a_trained_model_are_those_of_each_prompt_alone(stories: Path, case: str) -> None:
    trained = with_stops(AutoModelForCausalLM.from_pretrained(stories), stories)
    prompts = alike(trained.draw)[case]
    assert trained.answer(prompts) == trained.expect(prompts)


def test_ended_rows_leave_and_shared_tokens_are_read_once(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    forward = policy.model.forward
    monkeypatch.setattr(policy.model, "forward", _recorded(forward, shapes))
    (head,) = policy.draw(90)
    prompts = [head + tail for tail in policy.draw(*[3] * 20, seed=3)]
    stops = set(stop_ids(policy.tokenizer, policy.contract))
    answers = dict(generate._decode(policy.model, prompts, stops=stops, pad_id=0, max_new_tokens=MAX_NEW_TOKENS))
    assert max(rows * width for rows, width in shapes if width > 1) == 90, "the prefix is read by itself"
    steps = [rows for rows, width in shapes if width == 1][1:]  # the first one asks for the size of a token in the cache
    assert steps[0] > steps[-1]
    assert sum(steps) == sum(len(answer) - 1 for answer in answers.values()), "no step for an answer that ended"


def _recorded(forward: Callable[..., Any], shapes: list[tuple[int, int]]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def record(**inputs: Any) -> Any:
        shapes.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    return record


@pytest.mark.usefixtures("room_for_few")
def test_the_cache_keeps_to_its_size(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    step = generate._step

    def measured(model: Any, rows: Any) -> None:
        step(model, rows)
        sizes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in rows.cache.layers))

    monkeypatch.setattr(generate, "_step", measured)
    policy.answer(policy.draw(*range(2, 100, 6)))
    assert max(sizes) <= generate.CACHE_BYTES


def test_progress_counts_answers_one_by_one(policy: Policy) -> None:
    done: list[int] = []
    policy.answer(policy.draw(*range(1, 20)), tick=done.append)
    assert done == list(range(1, 20))


def test_a_signal_is_heard_between_answers(policy: Policy) -> None:
    def stop(done: int) -> None:
        raise SystemExit(75)

    with pytest.raises(SystemExit):
        policy.answer(policy.draw(5, 6, 7), tick=stop)


SIZE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def gemma(sliding_window: int) -> Any:
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZE,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=sliding_window,
            layer_types=["sliding_attention", "full_attention"],
        )
    )


def phi(original: int) -> Any:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    return Phi3ForCausalLM(
        Phi3Config(
            **SIZE,
            num_key_value_heads=2,
            max_position_embeddings=256,
            original_max_position_embeddings=original,
            rope_parameters={**rope, "original_max_position_embeddings": original},
        )
    )


def penalized(directory: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.generation_config.repetition_penalty = 1.3
    return model


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "learned positions": (
        lambda _: GPT2LMHeadModel(
            GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=0, eos_token_id=1)
        ),
        "",
    ),
    "a window that holds all": (lambda _: gemma(256), ""),
    "a window that slides": (lambda _: gemma(16), "generate: 65 tokens are more than the attention window of 16"),
    "short positions": (lambda _: phi(128), ""),
    "positions scaled by length": (lambda _: phi(32), "generate: 65 tokens are over 32, where positions are scaled by the longest row"),
    "a recurrent state": (lambda _: MambaForCausalLM(MambaConfig(**SIZE)), "generate: MambaForCausalLM takes no past_key_values"),
    "a repetition penalty": (penalized, "generate: the generation config sets repetition_penalty: 1.3"),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_models_answer_as_they_do_alone(name: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    build, line = MODELS[name]
    policy = with_stops(build(tiny), tiny)
    (head,) = policy.draw(20)
    prompts = [head + tail for tail in policy.draw(*range(1, 30, 7), seed=4)] * 2
    assert policy.answer(prompts) == policy.expect(prompts)
    said = [entry for entry in capsys.readouterr().out.splitlines() if entry.startswith("generate:")]
    assert said == ([f"{line}: answers come from plain model.generate, which is slower"] if line else [])


# --- sampling --------------------------------------------------------------------------------------------------------


def sample(policy: Policy, prompts: list[list[int]], seeds: list[tuple[int, ...]] | None = None, **options: Any) -> list[list[Completion]]:
    settings = {"num_return_sequences": 3, "temperature": 1.0, "max_new_tokens": MAX_NEW_TOKENS, **options}
    seeds = seeds or [(7, number) for number in range(len(prompts))]
    return sample_all(policy.model, policy.tokenizer, policy.contract, prompts, seeds=seeds, **settings)


def ids_of(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.ids for completion in group] for group in completions]


@torch.no_grad()
def log_probs_of(policy: Policy, prompt: list[int], ids: list[int], temperature: float) -> torch.Tensor:
    """Log-probabilities of all tokens after the prompt and after each of `ids`, `(len(ids) + 1, V)`."""
    logits = policy.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 :]
    return (logits / temperature).log_softmax(-1)


DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "cool": {"temperature": 0.6},
    "top_k": {"temperature": 1.2, "top_k": 12},
    "top_p": {"temperature": 1.2, "top_p": 0.6},
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_tokens_come_as_often_as_the_model_says(policy: Policy, name: str) -> None:
    options = DISTRIBUTIONS[name]
    (prompt,) = policy.draw(9)
    (found,) = sample(policy, [prompt], num_return_sequences=4000, max_new_tokens=1, **options)
    probs = log_probs_of(policy, prompt, [], options["temperature"])[0].double().exp().numpy()
    order = np.argsort(-probs)
    kept = order[: options.get("top_k", len(order))]
    before = np.cumsum(probs[kept]) - probs[kept]
    kept = kept[before < options.get("top_p", 1.0) * probs[kept].sum()]
    expected = probs[kept] / probs[kept].sum() * 4000
    counts = np.bincount([completion.ids[0] for completion in found], minlength=len(probs))
    assert counts[kept].sum() == 4000, "nothing is drawn that was ruled out"
    often = expected >= 5
    seen, due = [np.append(values[often], values[~often].sum()) for values in (counts[kept], expected)]
    there = due > 0
    assert chisquare(seen[there], due[there] * seen.sum() / due.sum()).pvalue > 1e-4


@pytest.mark.parametrize("name", ["plain", "a window that slides", "a recurrent state"])
def test_log_probs_are_those_of_the_whole_sequence(policy: Policy, name: str, tiny: Path) -> None:
    torch.manual_seed(0)
    drawer = policy if name == "plain" else with_stops(MODELS[name][0](tiny), tiny)
    prompts = drawer.draw(4, 19, 30)
    for prompt, group in zip(prompts, sample(drawer, prompts, temperature=0.8), strict=True):
        for completion in group:
            known = log_probs_of(drawer, prompt, completion.ids[:-1], 0.8)
            expected = known.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.log_probs), expected, atol=1e-4, rtol=1e-4)
            assert completion.ended == (completion.ids[-1] in stop_ids(drawer.tokenizer, drawer.contract))
            assert completion.ended or len(completion.ids) == MAX_NEW_TOKENS


@pytest.mark.parametrize("name", ["plain", "a window that slides", "a recurrent state"])
def test_answers_do_not_depend_on_what_else_is_sampled(policy: Policy, name: str, tiny: Path) -> None:
    torch.manual_seed(0)
    drawer = policy if name == "plain" else with_stops(MODELS[name][0](tiny), tiny)
    prompts = drawer.draw(5, 40, 5, 17, 28)
    together = ids_of(sample(drawer, prompts))
    seeds = [(7, number) for number in range(5)]
    assert ids_of(sample(drawer, prompts[::-1], seeds[::-1]))[::-1] == together
    assert [ids_of(sample(drawer, [prompt], [seed]))[0] for prompt, seed in zip(prompts, seeds, strict=True)] == together
    assert [group[:2] for group in together] == ids_of(sample(drawer, prompts, num_return_sequences=2))
    assert len({tuple(ids) for group in together for ids in group}) > 10, "each is a draw of its own"
    assert ids_of(sample(drawer, prompts, [(8, number) for number in range(5)])) != together


@pytest.mark.usefixtures("room_for_few")
@pytest.mark.parametrize("case", CASES)
def test_sampled_rows_leave_and_join_as_others_do(policy: Policy, case: str) -> None:
    prompts = alike(policy.draw)[case]
    seeds = [(1, number) for number in range(len(prompts))]
    alone = [ids_of(sample(policy, [prompt], [seed]))[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert ids_of(sample(policy, prompts, seeds)) == alone


def test_at_temperature_0_every_answer_is_the_greedy_one(policy: Policy) -> None:
    prompts = policy.draw(5, 40, 17)
    stops = stop_ids(policy.tokenizer, policy.contract)
    for expected, group in zip(policy.expect(prompts), sample(policy, prompts, temperature=0.0), strict=True):
        said = [decode(policy.tokenizer, [token for token in completion.ids if token not in stops]) for completion in group]
        assert said == [expected] * 3


def test_a_prompt_is_read_once_for_all_its_answers(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    monkeypatch.setattr(policy.model, "forward", _recorded(policy.model.forward, shapes))
    sample(policy, policy.draw(30, 31, 32), num_return_sequences=6)
    assert sum(rows * width for rows, width in shapes if width > 1) == 3 * 32
