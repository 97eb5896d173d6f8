"""vLLM as what samples a policy's answers while it learns, through TRL's wrapper, which hands it the weights of each step.

An engine computes with other kernels and another rounding than training does, so what it samples from is not quite the policy.
What is learned is therefore weighed by how much likelier the policy makes a completion than the engine did (see
`policy_losses.importance_weights`). What it draws is no function of a seed: a run that samples so does not repeat to the byte.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from posttrain.chat import read_contract
from posttrain.error import UserError
from posttrain.fit import Fitting
from posttrain.generate import Completion, stop_ids
from posttrain.stage import StageContext


class Engine:
    """A copy of the policy in vLLM, on the GPU that trains. All ranks call what it does."""

    def __init__(self, context: StageContext[Any], fitting: Fitting, trainer: Any) -> None:
        """Load it. `trainer` has its model by now."""
        from trl.generation.vllm_generation import VLLMGeneration

        config = context.config
        self._stops = stop_ids(fitting.tokenizer, fitting.contract)
        self._step = -1
        self._vllm: Any = VLLMGeneration(
            trainer.model,
            trainer.accelerator,
            fitting.tokenizer,
            tensor_parallel_size=config.vllm_tensor_parallel_size,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            max_model_length=config.max_length,
            enable_sleep_mode=config.vllm_enable_sleep_mode,
            top_p=config.top_p,
            top_k=config.top_k,
            max_completion_length=config.max_completion_length,
            # The directory's generation config would bend what is sampled; of it only the stop tokens are wanted.
            generation_kwargs={"stop_token_ids": self._stops, "detokenize": False},
        )

    def sample(
        self, prompts: Sequence[list[int]], *, num_return_sequences: int, temperature: float, step: int, most: int
    ) -> list[list[Completion]]:
        """So many answers to each of this rank's prompts, under the policy as it is at a step; `most` prompts are a rank's at most.

        Log-probabilities are those by which the engine drew.
        """
        if step != self._step:
            self._vllm.sync_weights()
            self._step = step
        # Ranks that share an engine are taken to have equally many.
        asked = [*prompts, *[prompts[0] if prompts else self._stops[:1]] * (most - len(prompts))]
        self._vllm.temperature = temperature
        each = [list(prompt) for prompt in asked for _ in range(num_return_sequences)]
        _, ids, log_probs, _ = self._vllm.generate(each, None, num_return_sequences)
        found = [
            Completion(list(tokens), tokens[-1] in self._stops, [float("nan") if first is None else first for first, *_ in drawn])
            for tokens, drawn in zip(ids, log_probs, strict=True)
        ]
        starts = range(0, len(prompts) * num_return_sequences, num_return_sequences)
        return [found[start : start + num_return_sequences] for start in starts]


def wants_engine(context: StageContext[Any]) -> bool:
    """Whether vLLM is to sample. Raises `UserError` where it was asked for and cannot."""
    wanted = context.config.use_vllm
    if wanted is False or (wanted is None and not torch.cuda.is_available()):
        return False
    policy = context.input("policy").model.model
    obstacle = ""
    if find_spec("vllm") is None:
        obstacle = "vllm is not installed here; install it, or"
    elif read_contract(Path(policy)) is None:
        obstacle = f"{policy} has no chat contract, so it gets tokens that vLLM would not know; train it by `sft` first, or"
    if obstacle and wanted:
        raise UserError(f"{context.at}.use_vllm: {obstacle} set it to false")
    if obstacle:
        print(f"samples by transformers: {obstacle.rpartition('; ')[0]}", flush=True)
    return not obstacle
