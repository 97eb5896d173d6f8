"""Stands in for vLLM where there is no GPU: what TRL calls of it, on transformers' own sampling, as a model that is apart from ours."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class SamplingParams:
    """What a completion is drawn by."""

    def __init__(self, **settings: Any) -> None:
        self.__dict__.update(settings)


class RequestOutput:
    """What came of one prompt."""


class LLM:
    """A model that knows only the weights that it was given."""

    def __init__(self, model: str, **_: Any) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(model).eval()
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
    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool) -> list[RequestOutput]:
        """One completion to each prompt."""
        return [self._complete(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def _complete(self, prompt: list[int], wanted: Any) -> RequestOutput:
        ids: list[int] = []
        rated = []
        while len(ids) < wanted.max_tokens and not (ids and ids[-1] in wanted.stop_token_ids):
            logits = self.model(torch.tensor([prompt + ids])).logits[0, -1]
            log_probs = (logits / (wanted.temperature or 1.0)).log_softmax(-1)
            token = int(torch.multinomial(log_probs.exp(), 1)) if wanted.temperature else int(log_probs.argmax())
            ids.append(token)
            rated.append({token: SimpleNamespace(logprob=float(log_probs[token]), rank=1)})
        output = RequestOutput()
        output.__dict__.update(prompt_token_ids=prompt, outputs=[SimpleNamespace(token_ids=ids, logprobs=rated)])
        return output
