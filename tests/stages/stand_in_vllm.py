"""Stands in for vLLM where there is no GPU: what we and TRL call of it, on transformers' own sampling, as a model that is apart from ours.

Where `STAND_IN_LOG` names a file, it says there what was loaded and asked, a line of JSON each.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

DEFAULTS = {"n": 1, "seed": None, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "ignore_eos": False, "stop_token_ids": []}


class SamplingParams:
    """What a completion is drawn by."""

    def __init__(self, **settings: Any) -> None:
        self.__dict__.update(DEFAULTS | settings)


class RequestOutput:
    """What came of one prompt."""


class LLM:
    """A model; one that TRL launches among its ranks knows only the weights that it was given."""

    def __init__(self, model: str, **settings: Any) -> None:
        _tell(event="load", model=model, settings=settings, beside=[pid for pid in _loaded() if Path(f"/proc/{pid}").exists()])
        if model == os.environ.get("STAND_IN_REFUSES"):
            raise ValueError("no room\nfor it")
        self.longest = settings["max_model_len"]
        self.model: Any = AutoModelForCausalLM.from_pretrained(model).eval()
        if settings.get("distributed_executor_backend") == "external_launcher":
            for parameter in self.model.parameters():
                parameter.data.zero_()  # nothing comes from the directory
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take weights by the names that the directory has."""
        known = dict(self.model.named_parameters())
        for name, values in weights:
            known[name].data.copy_(values)

    def reset_prefix_cache(self) -> None:
        """There is none."""

    @torch.no_grad()
    def generate(
        self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool | Callable[..., Any] = False
    ) -> list[RequestOutput]:
        """The completions to each prompt."""
        each = sampling_params if isinstance(sampling_params, Sequence) else [sampling_params] * len(prompts)
        _tell(event="generate", num_prompts=len(prompts), settings=vars(each[0]))
        bar = use_tqdm(total=len(prompts), desc="Processed prompts", dynamic_ncols=True) if callable(use_tqdm) else None
        found = []
        for prompt, wanted in zip(prompts, each, strict=True):
            found.append(self._complete(prompt["prompt_token_ids"], wanted))
            if bar is not None:
                bar.update(wanted.n)
        return found

    def _complete(self, prompt: list[int], wanted: Any) -> RequestOutput:
        assert len(prompt) + wanted.max_tokens <= self.longest, "vLLM would cut it off"
        output = RequestOutput()
        output.__dict__.update(prompt_token_ids=prompt, outputs=[self._draw(prompt, wanted, number) for number in range(wanted.n)])
        return output

    def _draw(self, prompt: list[int], wanted: Any, number: int) -> SimpleNamespace:
        generator = None if wanted.seed is None else torch.Generator().manual_seed(wanted.seed + number)
        stops = set(wanted.stop_token_ids)
        if not wanted.ignore_eos:
            ends = self.model.generation_config.eos_token_id
            stops |= set(ends if isinstance(ends, list) else [ends])
        ids: list[int] = []
        rated = []
        while len(ids) < wanted.max_tokens and not (ids and ids[-1] in stops):
            logits = self.model(torch.tensor([prompt + ids])).logits[0, -1]
            said = torch.tensor(sorted({*prompt, *ids}))
            logits[said] = torch.where(logits[said] > 0, logits[said] / wanted.repetition_penalty, logits[said] * wanted.repetition_penalty)
            log_probs = (logits / (wanted.temperature or 1.0)).log_softmax(-1)
            kept = log_probs.exp()
            if wanted.top_k:
                kept[kept < kept.topk(min(wanted.top_k, len(kept))).values[-1]] = 0
            ranked, order = kept.sort(descending=True)
            kept[order[ranked.cumsum(0) - ranked >= wanted.top_p * kept.sum()]] = 0
            token = int(torch.multinomial(kept, 1, generator=generator)) if wanted.temperature else int(log_probs.argmax())
            ids.append(token)
            rated.append({token: SimpleNamespace(logprob=float(log_probs[token]), rank=1)})
        return SimpleNamespace(token_ids=ids, logprobs=rated)


def _loaded() -> list[int]:
    """Processes that loaded an engine before."""
    log = os.environ.get("STAND_IN_LOG")
    lines = Path(log).read_text().splitlines() if log and Path(log).exists() else []
    return [said["pid"] for line in lines if (said := json.loads(line))["event"] == "load"]


def _tell(**said: Any) -> None:
    if log := os.environ.get("STAND_IN_LOG"):
        with Path(log).open("a") as file:
            file.write(json.dumps({**said, "pid": os.getpid(), "of": os.getppid()}) + "\n")
