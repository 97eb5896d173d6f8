"""Proof: that an exported directory holds the tensors of an artifact, and answers under plain transformers as the pipeline does.

On one side stands what the pipeline makes of the artifact: its chat contract, its way to render, its stop tokens. On the other stands
what anybody makes of the directory, with `from_pretrained`, `apply_chat_template` and `generate` alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from posttrain import disk
from posttrain.artifact import Artifact
from posttrain.card import Check
from posttrain.chat import encode, encode_prompt, read_contract
from posttrain.config import ModelSource
from posttrain.conversation import Message, Sampling, open_speakers
from posttrain.ledger import output_source
from posttrain.models import AUTO_CLASSES, load_reward_model, load_tokenizer, token_ids
from posttrain.stage import Input

QUESTIONS = (
    "Hello!",
    "What is 17 + 25?",
    "Name three colours, as JSON.",
    "Wer bist du? Und wo ist das Café?",
    "Write one line of Python that prints the numbers from 1 to 3.",
    "Answer in one word: is the sky blue?",
)
MAX_NEW_TOKENS = 48
"""Longest answer to them."""


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's safetensors, by name, in the order of the files; they are read as they are used."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    return tensors


def compare_tensors(tensors: Mapping[str, torch.Tensor], directory: Path) -> Check:
    """Whether the directory holds these tensors and no others, each with the same bytes, shape and type."""
    exported = read_tensors(directory)
    other = sorted(tensors.keys() ^ exported.keys())
    other += [name for name in tensors.keys() & exported.keys() if not _is_same(tensors[name], exported[name])]
    size = disk.show_bytes(sum(tensor.nbytes for tensor in tensors.values()))
    num_files = len(list(directory.glob("*.safetensors")))
    found = f"{len(exported)} tensors, {size} in {num_files} file{'s' if num_files > 1 else ''}, bit for bit"
    return Check("tensors", f"{other[0]} and {len(other) - 1} others" if other else found, not other)


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def compare_answers(finished: Artifact, directory: Path) -> Iterator[Check]:
    """Whether a few conversations are rendered, ended and answered, or rewarded, the same on both sides."""
    disable_progress_bar()
    name, source = finished.directory.name, output_source(finished)
    assert isinstance(source, ModelSource), "a policy or a reward model"
    given = Input(name, finished.kind, finished.fingerprint, source)
    tokenizer, contract = load_tokenizer(given, f"stages.{name}")
    plain = AutoTokenizer.from_pretrained(directory)
    is_policy = finished.kind == "policy"
    probes = _conversations(is_answered=not is_policy)
    stop = contract.stop_tokens[0]
    ids = [encode_prompt(tokenizer, probe, None, name) if is_policy else encode(tokenizer, probe, None, stop, name).ids for probe in probes]
    rendered = [_render(plain, probe, is_answered=not is_policy)["input_ids"][0].tolist() for probe in probes]
    is_same = rendered == ids and read_contract(directory) == contract
    yield Check("tokenizer and chat template", f"{len(probes)} conversations, {sum(map(len, rendered))} tokens", is_same)
    if not is_policy:
        model: Any = load_reward_model(source, tokenizer, contract, f"stages.{name}", dtype="auto").eval()
        rewards = _rewards(model, ids)
        del model
        again = _rewards(AUTO_CLASSES["reward_model"].from_pretrained(directory, dtype="auto").eval(), rendered)
        yield Check("rewards of transformers", f"{len(again)} conversations, from {min(again):.4g} to {max(again):.4g}", rewards == again)
        return
    generation: Any = GenerationConfig.from_pretrained(directory)
    stops = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    is_same = sorted(stops) == token_ids(plain, contract.stop_tokens) and generation.pad_token_id == plain.pad_token_id
    yield Check("generation config", f"stops at {' and '.join(contract.stop_tokens)}", is_same)
    (speaker,) = open_speakers([given])
    answers = [speaker.answer(probe, Sampling(max_new_tokens=MAX_NEW_TOKENS)) for probe in probes]
    del speaker
    again_told = _answers(directory, plain, probes)
    yield Check("answers of transformers", _count_same(answers, again_told), answers == again_told)
    yield _ask_vllm(directory, probes, answers)


def _conversations(*, is_answered: bool) -> list[list[Message]]:
    """The questions, and one conversation of two of them, with answers at the end or without."""
    first, second, *_ = asked = [{"role": "user", "content": text} for text in QUESTIONS]
    answer = {"role": "assistant", "content": "Yes."}
    end = [answer] if is_answered else []
    return [*([question, *end] for question in asked), [first, answer, second, *end]]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, is_answered: bool) -> Any:
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=not is_answered, return_tensors="pt", return_dict=True)


@torch.no_grad()
def _rewards(model: Any, ids: Sequence[list[int]]) -> list[float]:
    return [float(model(input_ids=torch.tensor([row])).logits[0, 0]) for row in ids]


def _answers(directory: Path, tokenizer: Any, probes: Sequence[Sequence[Message]]) -> list[str]:
    """The answers of plain transformers, which is told nothing but how long they may be."""
    model: Any = AUTO_CLASSES["policy"].from_pretrained(directory, dtype="auto").eval()
    if torch.cuda.is_available():
        model.to("cuda")
    answers = []
    for probe in probes:
        inputs = _render(tokenizer, probe, is_answered=False).to(model.device)
        generated = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers.append(tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def _ask_vllm(directory: Path, probes: Sequence[Sequence[Message]], answers: Sequence[str]) -> Check:
    """What vLLM answers, where it is installed. Its kernels round otherwise, so where two tokens are about as likely it may turn off."""
    what = "answers of vLLM"
    if find_spec("vllm") is None:
        return Check(what, "vllm is not installed here", None)
    from vllm import LLM, SamplingParams

    torch.cuda.empty_cache()
    try:
        engine = LLM(model=str(directory), max_model_len=1024, enforce_eager=True)
        found = engine.chat([list(probe) for probe in probes], SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS), use_tqdm=False)
    except Exception as error:  # what it cannot load, or has no memory for, is no fault of the directory
        return Check(what, f"it did not: {' '.join(str(error).split())[:200]}", None)
    told = [each.outputs[0].text for each in found]
    return Check(what, _count_same(answers, told), True if list(answers) == told else None)


def _count_same(answers: Sequence[str], others: Sequence[str]) -> str:
    num_same = sum(one == other for one, other in zip(answers, others, strict=True))
    return f"{num_same} of {len(answers)} greedy answers of up to {MAX_NEW_TOKENS} tokens"
