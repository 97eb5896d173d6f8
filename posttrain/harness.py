"""lm-evaluation-harness on our policies: its tasks, by name or from a file, and what they say of each row.

Prompts, what is scored and how are its own, and so are its batches: the figures are those of its command line with
`--apply_chat_template` on the same directory. What is ours:

  contract   The policy's template renders the prompt, no token is put before that, and an answer ends at any stop token of the
             contract. A base without a template is given text to go on with, unless the config says otherwise.
  ranks      Each computes its share of the batches, which are the same ones for any number of ranks; then all know all answers.
  kept       The answers to a batch at once, and all of a task under the root, for whatever run asks the same of the same weights. It is
             answers that are kept, not scores: those are computed from them each time.
  scores     By row, so that they have intervals, paired differences and gates as all that `eval` measures.

Needs the library lm_eval: imported only where a stage has tasks.
"""

import contextlib
import functools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from transformers import AutoConfig, PreTrainedTokenizerBase

from posttrain import disk
from posttrain.chat import ChatContract, render
from posttrain.error import Preempted, UserError
from posttrain.evaluate import Evaluation, Result, open_contracts
from posttrain.models import load_bare_policy, load_bare_tokenizer, load_policy
from posttrain.stage import Input, StageContext
from posttrain.task_names import is_file, read_fields

if TYPE_CHECKING:
    from stages.eval import EvalConfig

REQUESTS_AT_ONCE = 64
"""Requests whose answers are kept together once all are there."""
MAX_GEN_TOKENS = 256
"""Longest answer to a task that sets no length, in tokens, as in `HFLM`."""
ROUNDING = 1e-6
"""By such a share a mean over rows may differ from the library's own figure."""
KEPT_OF_RESULTS = ("results", "groups", "versions", "n-shot", "n-samples", "configs")
"""What of the library's results is written beside the table; the rest says which machine it was."""


@dataclass(frozen=True)
class Tasks:
    """Tasks and groups of tasks, with their data."""

    named: list[Any]
    """As the config names them; a tag is all of its tasks."""
    manager: TaskManager

    @property
    def single(self) -> list[Any]:
        """All tasks, those of groups too."""
        return [task for entry in self.named for task in _tasks_of(entry)]


@dataclass(frozen=True)
class Asked:
    """How a policy is asked: by a contract, or with plain text."""

    tokenizer: PreTrainedTokenizerBase
    contract: ChatContract | None


def open_tasks(context: StageContext["EvalConfig"]) -> Tasks:
    """The tasks that a stage names, and their data. Raises `UserError`."""
    named = context.config.tasks
    # The library does not take the file of a group, but the name of one that lies in a directory which it was told of.
    groups = {name: group for name in named if is_file(name) and (group := read_fields(name, context.at).get("group"))}
    directories = tuple(sorted({str(Path(name).resolve().parent) for name in groups}))
    manager = _task_manager(directories, include_defaults=bool(groups) or not all(map(is_file, named)))
    found: list[Any] = []
    for number, name in enumerate(named):
        with _explain(f"{context.at}.tasks.{number}: {name} cannot be loaded"):
            loaded = manager.load([groups.get(name, name)])
        found += list(loaded["groups"].values())[:1] or loaded["tasks"].values()  # groups within a group follow it
        for task in loaded["tasks"].values():
            _check_task(task, f"{context.at}.tasks.{number}: {task.task_name}")
    tasks = Tasks(found, manager)
    names = [task.task_name for task in tasks.single]
    if twice := next((name for number, name in enumerate(names) if name in names[:number]), None):
        raise UserError(f"{context.at}.tasks: {twice} is in two entries; name it once")
    return tasks


def try_tasks(context: StageContext["EvalConfig"]) -> list[str]:
    """Ask one row of each task, and score a pretended answer, without a model; a line of each task. Raises `UserError`."""
    tasks = open_tasks(context)
    for entry in tasks.named:
        with _explain(f"{context.at}.tasks: {_name_of(entry)} cannot be asked"):
            _evaluate(context, Tasks([entry], tasks.manager), _Pretender(), limit=1, applies=False)
    for given, (tokenizer, _) in zip(context.inputs["policies"], open_contracts(context), strict=True):
        source = given.model
        config = AutoConfig.from_pretrained(source.model, revision=source.revision, trust_remote_code=source.trust_remote_code)
        limit = resolve_max_length(config, tokenizer)
        for task in tasks.single:
            if task.OUTPUT_TYPE == "generate_until" and (longest := _longest_answer(task)) >= limit:
                raise UserError(
                    f"{context.at}.tasks: {task.task_name} asks for answers of up to {longest} tokens, and {given.name} reads and writes "
                    f"{limit} in all; set max_gen_toks under generation_kwargs in a task file"
                )
    return [f"{task.task_name}: {len(task.eval_docs):,} rows" for task in tasks.single]


def measure_tasks(evaluation: Evaluation) -> None:
    """Add what the tasks say of each row under each policy; their samples are written beside the table. All ranks call it."""
    context = evaluation.context
    tasks = open_tasks(context)
    for policy, given, (tokenizer, contract) in zip(evaluation.policies, context.inputs["policies"], evaluation.contracts, strict=True):
        bare = load_bare_tokenizer(given, context.at)
        applies = context.config.apply_chat_template
        if applies is None:
            applies = bare.chat_template is not None
        asked = Asked(tokenizer, contract) if applies else Asked(bare, None)
        found = _evaluate(context, tasks, _Asker(evaluation, given, asked), context.config.limit, applies)
        if not context.is_main:
            continue
        assert found is not None, "the main rank is the first process of its machine"
        _write(context.output / "tasks" / given.name, found)
        for entry in tasks.named:
            policy.results.extend(_results(entry, found, evaluation.notes))


def _write(directory: Path, found: Mapping[str, Any]) -> None:
    """Figures and samples, as the library has them."""
    directory.mkdir(parents=True, exist_ok=True)
    disk.write_text(directory / "results.json", _json({name: found[name] for name in KEPT_OF_RESULTS if name in found}, indent=1))
    for name, samples in found["samples"].items():
        lines = "".join(_json(sample) + "\n" for sample in samples)
        disk.write_text(directory / f"samples_{name.replace('/', '_')}.jsonl", lines)


def _evaluate(
    context: StageContext["EvalConfig"], tasks: Tasks, model: Any, limit: int | float | None, applies: bool
) -> dict[str, Any] | None:
    """What the library makes of tasks; None on all but the first process of each machine."""
    found: dict[str, Any] | None = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks.named,
        task_manager=tasks.manager,
        num_fewshot=context.config.num_fewshot,
        limit=limit,
        apply_chat_template=applies,
        bootstrap_iters=0,  # intervals are ours
    )
    return found


@functools.cache
def _task_manager(directories: tuple[str, ...], *, include_defaults: bool) -> TaskManager:
    """With the tasks in these directories, and the library's own; all of their files are read."""
    return TaskManager(include_path=list(directories), include_defaults=include_defaults)


def _tasks_of(entry: Any) -> list[Any]:
    return list(entry.get_all_tasks()) if isinstance(entry, Group) else [entry]


def _name_of(entry: Any) -> str:
    return str(entry.name if isinstance(entry, Group) else entry.task_name)


def _check_task(task: Any, at: str) -> None:
    """Refuse what is not done here, or what the library finds out only after all has been computed."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"{at} runs code that the model writes, which is not done here; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{at} asks about images or sounds, and a policy reads text; leave it out")
    unknown = [name for name, compute in getattr(task, "_metric_fn_list", {}).items() if compute is None]
    if unknown and task.config.process_results is None:
        raise UserError(f"{at}: no metric is called {unknown[0]!r}; write another one into metric_list of its file")


def _longest_answer(task: Any) -> int:
    return int(normalize_gen_kwargs(task.config.generation_kwargs or {}, MAX_GEN_TOKENS)["max_gen_toks"])


# --- a policy is asked -----------------------------------------------------------------------------------------------


class _Asker(LM):  # type: ignore[misc,unused-ignore]
    """A policy as the library asks it. It is loaded when the first answer is wanted that is not there yet."""

    def __init__(self, evaluation: Evaluation, given: Input, asked: Asked) -> None:
        super().__init__()
        self._evaluation, self._given, self._asked = evaluation, given, asked
        self._context: StageContext[EvalConfig] = evaluation.context

    @property
    def tokenizer_name(self) -> str:
        """Of no use but to the library's own cache, which is not used."""
        return self._given.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. Without a generation prompt, its last message is how the answer begins."""
        asked, begun = (chat_history, "") if add_generation_prompt else (chat_history[:-1], chat_history[-1]["content"])
        try:
            return self._render(asked) + begun
        except UserError:
            if asked[0]["role"] != "system":
                raise
            # What the library itself does, and without it many tasks could not be asked at all.
            self._say_once(f"{self._given.name}: its template takes no system message, so the descriptions of tasks are left out")
            return self._render(asked[1:]) + begun

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Of each continuation its log-probability, and whether it is the greedy one."""
        return [tuple(answer) for answer in self._answers("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[Any]:
        """Of each text its log-probability."""
        return self._answers("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """The answer to each prompt."""
        return self._answers("generate_until", requests)

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        at = f"{self._context.at}.tasks: {self._given.name}"
        return render(self._asked.tokenizer, messages, None, at, add_generation_prompt=True)

    @functools.cached_property
    def _say_once(self) -> Callable[[str], None]:
        return functools.cache(functools.partial(print, flush=True))

    @functools.cached_property
    def _model(self) -> HFLM:
        self._evaluation.progress.phase(f"load {self._given.name}")
        at, device = f"{self._context.at}: {self._given.name}", self._evaluation.device
        dtype: Any = "auto" if device == "cuda" else torch.float32
        tokenizer, contract = self._asked.tokenizer, self._asked.contract
        if contract is None:
            model = load_bare_policy(self._given.model, at, dtype=dtype)
        else:
            model = load_policy(self._given.model, tokenizer, contract, at, dtype=dtype)
        return HFLM(
            pretrained=model.to(device).eval(),  # type: ignore[arg-type]
            tokenizer=tokenizer,
            backend="causal",
            # Of a conversation, the template alone says whether there is one.
            add_bos_token=None if contract is None else False,
            batch_size=self._context.config.batch_size,
        )

    def _answers(self, kind: str, requests: list[Any]) -> list[Any]:
        """The answers to all requests, on every rank."""
        places: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            places[request.task_name].append(place)
        answers: list[Any] = [None] * len(requests)
        for task, of_task in places.items():
            found = self._of_task(task, kind, [requests[place] for place in of_task])
            for place, answer in zip(of_task, found, strict=True):
                answers[place] = answer
        return answers

    def _of_task(self, task: str, kind: str, requests: list[Any]) -> list[Any]:
        contract = self._asked.contract
        key = {
            "library": lm_eval.__version__,
            "contract": None if contract is None else contract.digest,
            "requests": disk.hash_json([kind, [list(request.args) for request in requests]]),
            "batch_size": self._context.config.batch_size,
        }
        compute = functools.partial(self._compute, f"{self._given.name}: {task} {disk.hash_json(key)[:16]}", kind, requests)
        return [result["answer"] for result in self._evaluation.shared.results(self._given, key, compute)]

    def _compute(self, name: str, kind: str, requests: list[Any]) -> list[Result]:
        """This rank's share of the answers."""
        starts = range(0, len(requests), REQUESTS_AT_ONCE)[self._context.rank :: self._context.world_size]
        progress = self._evaluation.progress
        shown = name.rpartition(" ")[0]
        progress.phase(shown, len(requests))
        results: list[Result] = []
        for start in starts:
            some = requests[start : start + REQUESTS_AT_ONCE]

            def answer(start: int = start, some: list[Any] = some) -> list[Result]:
                model = self._model
                progress.phase(shown, len(requests), start)  # after that of loading
                torch.manual_seed(start)  # of answers that are drawn at random
                answers = getattr(model, kind)(some, disable_tqdm=True)
                return [{"row": start + number, "measure": kind, "answer": each} for number, each in enumerate(answers)]

            results += self._evaluation.kept.batch(f"{name}: {start}", answer)
            progress.step(min(start + REQUESTS_AT_ONCE, len(requests)))
        return results


class _Pretender(LM):  # type: ignore[misc,unused-ignore]
    """Answers whatever it is asked, without a model."""

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """As if all continuations were alike."""
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[Any]:
        """As if all texts were alike."""
        return [-1.0] * len(requests)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """The same to every prompt."""
        return ["none"] * len(requests)


# --- what was found --------------------------------------------------------------------------------------------------


def _results(entry: Any, found: Mapping[str, Any], notes: list[str]) -> Iterator[Result]:
    """Of each row of a task what each metric says; of a group with figures of its own those of all its rows, each counting as there.

    A figure that is no mean over rows is a note.
    """
    if isinstance(entry, Group) and not entry.has_aggregation:
        for task in _tasks_of(entry):
            yield from _results(task, found, notes)
        return
    name = _name_of(entry)
    scores = [_scores(found["samples"][task.task_name]) for task in _tasks_of(entry)]
    for metric, value in found["results"][name].items():
        # Beside its figures a task has, under such names, their errors and its own name.
        if "," not in metric or "_stderr," in metric:
            continue
        shown = f"tasks.{name}.{metric.removesuffix(',none')}"
        rows = _rows([each.get(metric, []) for each in scores], value)
        if rows is None:
            if (note := f"{shown} is no mean over rows, so it stands in tasks/*/results.json alone") not in notes:
                notes.append(note)
            continue
        for row, (score, weight) in enumerate(rows):
            yield {"row": row, "origin": f"{name}:{row + 1}", "measure": shown, "score": score, "weight": weight}


def _scores(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """By metric and filter, score and weight of each row, in the order of rows; a score is nan where it is no number."""
    scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            scores[f"{metric},{sample['filter']}"].append(_score(metric, sample[metric]))
    return scores


def _score(metric: str, value: Any) -> tuple[float, float]:
    if metric == "bits_per_byte":  # of a text its log-probability in nats, and its bytes
        return -value[0] / value[1] / math.log(2), float(value[1])
    return (float(value), 1.0) if isinstance(value, bool | int | float | np.number) else (math.nan, 1.0)


def _rows(by_task: Sequence[Sequence[tuple[float, float]]], value: Any) -> list[tuple[float, float]] | None:
    """The rows of one or more tasks, weighted such that their mean is the library's figure; None where it is no such mean."""
    evenly = [[(score, weight / sum(w for _, w in rows)) for score, weight in rows] for rows in by_task]  # each task counts the same
    for weighted in (by_task, evenly):
        rows = [row for rows in weighted for row in rows]
        mean = np.average([score for score, _ in rows], weights=[weight for _, weight in rows]) if rows else math.nan
        if isinstance(value, int | float | np.number) and math.isclose(mean, value, rel_tol=ROUNDING, abs_tol=ROUNDING):
            return rows
    return None


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, indent=indent)


@contextlib.contextmanager
def _explain(problem: str) -> Iterator[None]:
    """One line for the user where a task, which is a program of a stranger, fails in any way."""
    try:
        yield
    except (UserError, Preempted, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{problem}: {text if ' ' in text else f'{type(error).__name__} {text}'.strip()}") from error
