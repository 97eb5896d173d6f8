"""Sampling: answers of a policy to prompts, rated by a reward model, become a data set to learn from.

    prompts -> answers, `num_generations` each -> those that can be learned from -> rewards -> pairs, the best, or all

    rows.jsonl      the data set, as later stages read it, with the rewards beside it
    answers.jsonl   every answer to every prompt: whether it came to an end, whether it can be learned from, its reward
    table.json      how many there are, for people

Nothing here depends on when, where or on how many ranks it was made: prompts are cut into chunks by their lengths alone, a chunk
is computed by one thread, and what is drawn for an answer depends on the seed, the prompt's number and its own.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from posttrain.chat import PROBE_ANSWER, ChatContract, encode, encode_prompt
from posttrain.curate.records import to_record
from posttrain.curate.threads import each_batch
from posttrain.data.files import Record
from posttrain.data.prepared import describe_formats
from posttrain.data.rows import Conversation, Message, Pair, asked_messages
from posttrain.data.source import open_source
from posttrain.engine import PolicyEngine, engine_name, unlike_transformers, wants_engine
from posttrain.error import UserError
from posttrain.evaluate import Kept
from posttrain.generate import ROWS_AT_ONCE, Completion, decode, sample_all
from posttrain.models import load_policy
from posttrain.parallel import chunks
from posttrain.progress import Progress
from posttrain.reward import check_readable, load_rewards, open_reader, rate_conversations
from posttrain.sandbox import OverLimit
from posttrain.stage import StageContext

HOTTEST = 2.0
"""Highest temperature that vLLM draws at."""
COUNTS = {"pairs": "num_pairs", "best": "num_rows", "all": "num_rows"}
"""What the metrics call the number of rows that are made."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that the policy is to answer, and its token ids `(T,)`."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    origin: str
    ids: list[int]

    def answered(self, text: str) -> list[Message]:
        """The conversation with that answer, which alone is to be learned."""
        before: list[Message] = [{**message, "train": False} if message["role"] == "assistant" else message for message in self.messages]
        return [*before, _says(text)]

    def conversation(self, text: str) -> Conversation:
        """The same as a row."""
        return Conversation(self.answered(text), self.tools, [], self.origin)


@dataclass(frozen=True)
class Prompts:
    """All prompts that are answered, in the order of the data, and what was read."""

    prompts: list[Prompt]
    num_too_long: int
    """Prompts that are left out for their length."""
    summary: list[str]
    """Lines that say what will be answered."""


@dataclass(frozen=True)
class Answered:
    """The answers to a prompt, and of each what is known."""

    prompt: Prompt
    answers: list[str]
    ended: list[bool]
    """Whether it came to a stop token."""
    num_tokens: list[int]
    usable: list[bool]
    """Whether a conversation with it can be read by those who learn from it: it is not empty and says nothing that is a control token."""
    rewards: list[float | None]
    """None where there is no reward model, or it cannot read the answer."""

    @property
    def learnable(self) -> list[int]:
        """Numbers of the answers to learn from: usable, and at an end. Of equal ones the first."""
        first = {text: number for number, text in reversed(list(enumerate(self.answers)))}
        return sorted(number for number in first.values() if self.usable[number] and self.ended[number])


# --- prompts ---------------------------------------------------------------------------------------------------------


def read_prompts(context: StageContext[Any], tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """The prompts of all data inputs: of conversations all before the answer that they end with, of pairs the prompt."""
    prompts: list[Prompt] = []
    summary: list[str] = []
    num_too_long, longest = 0, _longest_prompt(context)
    for given in context.inputs["data"]:
        source = open_source(given.data, f"{context.at}: {given.name}")
        before = len(prompts) + num_too_long
        for row in source.rows():
            messages = asked_messages(row)
            if not any(message["role"] in ("user", "tool") for message in messages):
                raise UserError(f"{row.origin}: asks nothing that could be answered; drop the row")
            ids = encode_prompt(tokenizer, messages, row.tools, row.origin)
            if len(ids) > longest:
                num_too_long += 1
            else:
                prompts.append(Prompt(messages, row.tools, row.origin, ids))
        summary += [f"{given.name}: {entry}" for entry in describe_formats(source)]
        summary.append(f"{given.name}: {len(prompts) + num_too_long - before:,} prompts")
    if not prompts:
        raise UserError(f"{context.at}: all {num_too_long:,} prompts are over {longest:,} tokens; raise max_prompt_length where it says so")
    if num_too_long:
        summary.append(f"{num_too_long:,} prompts are over {longest:,} tokens, and are left out")
    return Prompts(prompts, num_too_long, summary)


def _longest_prompt(context: StageContext[Any]) -> float:
    """Tokens that a prompt may have: as the config says, and so that the policy can read an answer behind it."""
    given, config = context.input("policy"), context.config
    source = given.model
    loaded = AutoConfig.from_pretrained(source.model, revision=source.revision, trust_remote_code=source.trust_remote_code)
    readable = getattr(loaded.get_text_config(), "max_position_embeddings", None)
    if readable is not None and readable <= config.max_completion_length:
        raise UserError(
            f"{context.at}.max_completion_length: {config.max_completion_length} leaves no room for a prompt, since {given.name} reads "
            f"{readable} tokens; lower it"
        )
    limits = [config.max_prompt_length, None if readable is None else readable - config.max_completion_length]
    return min([limit for limit in limits if limit is not None], default=math.inf)


def check_reader(context: StageContext[Any], prompts: Sequence[Prompt]) -> None:
    """Raise `UserError` where the stage's reward model is none, or cannot read an answer to one of the prompts. Loads no weights."""
    given = context.input("reward")
    check_readable(open_reader(given, context.at), (prompt.conversation(PROBE_ANSWER) for prompt in prompts), f"{context.at}: {given.name}")


def answers_by_vllm(context: StageContext[Any], prompts: Sequence[Prompt], contract: ChatContract) -> bool:
    """Whether vLLM draws the answers. All ranks call it. Raises `UserError` where it was asked for and cannot."""

    def obstacles() -> Iterator[str]:
        yield from unlike_transformers(context.input("policy"), contract, longest=_longest(context, prompts))
        if context.config.temperature > HOTTEST:
            yield f"its temperature may be {HOTTEST:g} at most, not {context.config.temperature:g}; lower that, or"

    return wants_engine(context, obstacles())


def _longest(context: StageContext[Any], prompts: Sequence[Prompt]) -> int:
    """Tokens that a prompt may come to with its answer."""
    return int(max(len(prompt.ids) for prompt in prompts) + context.config.max_completion_length)


# --- answers and rewards ---------------------------------------------------------------------------------------------


def answer_and_rate(
    context: StageContext[Any],
    kept: Kept,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    contract: ChatContract,
    *,
    is_vllm: bool,
) -> list[dict[str, Any]]:
    """This rank's share of the answers, and of their rewards; each chunk is kept once it is there."""
    size = max(1, ROWS_AT_ONCE // context.config.num_generations)
    # Of like length together, which share the most work.
    order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number].ids), number))
    mine = list(chunks(order, size))[context.rank :: context.world_size]
    progress = Progress(context.directory, is_main=context.is_main)
    answers = _answer(context, kept, prompts, mine, tokenizer, contract, progress, is_vllm=is_vllm)
    return answers + _rate(context, kept, prompts, mine, answers, tokenizer, contract, progress, is_vllm=is_vllm)


def _answer(
    context: StageContext[Any],
    kept: Kept,
    prompts: Sequence[Prompt],
    mine: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    contract: ChatContract,
    progress: Progress,
    *,
    is_vllm: bool,
) -> list[dict[str, Any]]:
    config, given = context.config, context.input("policy")
    progress.phase(f"answers of {given.name}", sum(map(len, mine)) * config.num_generations)
    loaded: list[Any] = []
    done = Counter[int]()
    lock = Lock()

    def policy() -> Any:
        with lock:  # the first chunk that is missing loads it for all
            if not loaded:
                device = "cuda" if torch.cuda.is_available() else "cpu"
                dtype = "auto" if device == "cuda" else torch.float32
                model: Any = load_policy(given.model, tokenizer, contract, f"{context.at}: {given.name}", dtype=dtype)
                loaded.append(model.to(device).eval())
        return loaded[0]

    engine = PolicyEngine(context, given, tokenizer, contract, longest=_longest(context, prompts)) if is_vllm else None
    sample: Callable[..., list[list[Completion]]] = (
        engine.sample_all if engine else lambda ids, **settings: sample_all(policy(), tokenizer, contract, ids, **settings)
    )

    def answer(chunk: list[int]) -> list[dict[str, Any]]:
        def tell(num_answers: int) -> None:
            with lock:
                done[chunk[0]] = num_answers
                progress.step(done.total())

        def compute() -> list[dict[str, Any]]:
            sampled = sample(
                [prompts[number].ids for number in chunk],
                num_return_sequences=config.num_generations,
                temperature=config.temperature,
                max_new_tokens=config.max_completion_length,
                seeds=[[config.seed, number] for number in chunk],
                top_p=config.top_p,
                top_k=config.top_k,
                tick=tell,
            )
            return [
                {
                    "row": number,
                    "measure": "answers",
                    "answers": [decode(tokenizer, each.ids[:-1] if each.ended else each.ids) for each in completions],
                    "ended": [each.ended for each in completions],
                    "num_tokens": [len(each.ids) for each in completions],
                }
                for number, completions in zip(chunk, sampled, strict=True)
            ]

        results = kept.batch(f"answers of {engine_name(is_vllm=is_vllm)} {chunk[0]}", compute)
        tell(len(chunk) * config.num_generations)
        return results

    with engine or nullcontext():
        # An engine is asked for one chunk at a time: it has threads of its own.
        batches = [answer(chunk) for chunk in mine] if engine else each_batch(answer, mine)
    return [result for results in batches for result in results]


def _rate(
    context: StageContext[Any],
    kept: Kept,
    prompts: Sequence[Prompt],
    mine: Sequence[list[int]],
    answers: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    contract: ChatContract,
    progress: Progress,
    *,
    is_vllm: bool,
) -> list[dict[str, Any]]:
    """Which answers can be learned from, and with a reward model the reward of each of them."""
    given = context.input("reward") if "reward" in context.inputs else None
    progress.phase(f"rewards by {given.name}" if given else "check answers", len(answers))
    reader = open_reader(given, context.at) if given else None
    texts = {result["row"]: result["answers"] for result in answers}
    loaded: list[Any] = []
    results: list[dict[str, Any]] = []
    for chunk in mine:

        def compute(chunk: list[int] = chunk) -> list[dict[str, Any]]:
            usable = {(n, text): _is_usable(tokenizer, contract, prompts[n], text) for n in chunk for text in texts[n]}
            rewards: dict[tuple[int, str], float] = {}
            if given and reader:
                if not loaded:
                    loaded.append(load_rewards(given, context.at))
                places = [place for place, is_usable in usable.items() if is_usable]
                scored = rate_conversations(loaded[0], reader, [prompts[n].conversation(text) for n, text in places])
                rewards = {place: reward for place, reward in zip(places, scored, strict=True) if reward is not None}
            return [
                {
                    "row": n,
                    "measure": "rewards",
                    "usable": [usable[n, text] and (given is None or (n, text) in rewards) for text in texts[n]],
                    "rewards": [rewards.get((n, text)) for text in texts[n]],
                }
                for n in chunk
            ]

        results += kept.batch(f"rewards for {engine_name(is_vllm=is_vllm)} {chunk[0]}", compute)
        progress.step(len(results))
    return results


def _is_usable(tokenizer: PreTrainedTokenizerBase, contract: ChatContract, prompt: Prompt, text: str) -> bool:
    """Whether the policy's own template renders the answer so that it can be trained."""
    if not text.strip():
        return False
    try:
        encode(tokenizer, prompt.answered(text), prompt.tools, contract.stop_tokens[0], prompt.origin, train_on="last")
    except OverLimit:
        raise
    except UserError:
        return False
    return True


def _says(text: str) -> Message:
    return {"role": "assistant", "content": text}


# --- the data set ----------------------------------------------------------------------------------------------------


def write_rows(context: StageContext[Any], found: Prompts, results: Iterable[dict[str, Any]], *, engine: str) -> dict[str, float]:
    """Write what is learned from the results of all ranks. Returns the metrics. Raises `UserError` where nothing is left."""
    by_measure: dict[str, dict[int, dict[str, Any]]] = {"answers": {}, "rewards": {}}
    for result in results:
        by_measure[result["measure"]][result["row"]] = result
    every = [
        Answered(prompt, said["answers"], said["ended"], said["num_tokens"], rated["usable"], rated["rewards"])
        for prompt, said, rated in (
            (prompt, by_measure["answers"][number], by_measure["rewards"][number]) for number, prompt in enumerate(found.prompts)
        )
    ]
    rows, reasons = [], Counter[str]()
    for answered in every:
        made, reason = choose(answered, context.config.output, context.config.min_margin)
        rows += made
        reasons[reason] += 1
    if not rows:
        shutil.rmtree(context.checkpoints, ignore_errors=True)  # it would only bar the config that mends this
        raise UserError(
            f"{context.at}: no row comes of {len(every):,} prompts: {reasons['unanswered']:,} got no answer that ends and can be learned "
            f"from, {reasons['tied']:,} got none that is better than another; raise max_completion_length, num_generations or temperature"
        )
    metrics = {**_measure(every), **_margins(rows), COUNTS[context.config.output]: float(len(rows))}
    metrics |= {"num_too_long": float(found.num_too_long), **{f"num_{reason}": float(reasons[reason]) for reason in ("unanswered", "tied")}}
    output = context.output
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    _write_lines(output / "rows.jsonl", rows)
    _write_lines(output / "answers.jsonl", ({**_account(answered), "engine": engine} for answered in every))
    (output / "table.json").write_text(_dump(_table(metrics, context.config.output, engine)), encoding="utf-8")
    return metrics


def choose(answered: Answered, output: str, min_margin: float) -> tuple[list[Record], str]:
    """The rows that come of a prompt's answers, and where there are none why: `unanswered`, or `tied`.

    Chosen are answers that came to an end; the worst may well be one that did not. Of equal rewards the first answer counts.
    """
    prompt, rewards = answered.prompt, answered.rewards
    learnable = answered.learnable
    if not learnable:
        return [], "unanswered"
    if output == "all":
        return [_conversation(answered, number) for number in learnable], ""
    rated = {number: reward for number, reward in enumerate(rewards) if reward is not None}
    best = max(learnable, key=lambda number: (rated[number], -number))
    if output == "best":
        return [_conversation(answered, best)], ""
    worst = min(rated, key=lambda number: (rated[number], number))
    margin = rated[best] - rated[worst]
    if margin <= 0 or margin < min_margin:
        return [], "tied"
    pair = Pair(prompt.messages, [_says(answered.answers[best])], [_says(answered.answers[worst])], prompt.tools, prompt.origin)
    return [{**to_record(pair), "score_chosen": rated[best], "score_rejected": rated[worst]}], ""


def _conversation(answered: Answered, number: int) -> Record:
    prompt = answered.prompt
    record = to_record(prompt.conversation(answered.answers[number]))
    return record if answered.rewards[number] is None else {**record, "score": answered.rewards[number]}


def _measure(every: Sequence[Answered]) -> dict[str, float]:
    num_answers = sum(len(answered.answers) for answered in every)
    rated = [rewards for answered in every if (rewards := [reward for reward in answered.rewards if reward is not None])]
    metrics = {
        "num_prompts": float(len(every)),
        "num_answers": float(num_answers),
        "completions/mean_length": sum(sum(answered.num_tokens) for answered in every) / num_answers,
        "completions/clipped_ratio": sum(answered.ended.count(False) for answered in every) / num_answers,
        "completions/duplicate_ratio": sum(len(answered.answers) - len(set(answered.answers)) for answered in every) / num_answers,
        "completions/unusable_ratio": sum(answered.usable.count(False) for answered in every) / num_answers,
    }
    if rated:
        metrics["reward"] = sum(map(sum, rated)) / sum(map(len, rated))
        metrics["reward_best"] = sum(map(max, rated)) / len(rated)
        metrics["reward_worst"] = sum(map(min, rated)) / len(rated)
    return metrics


def _margins(rows: Sequence[Record]) -> dict[str, float]:
    """Of pairs the mean rewards of the chosen and the rejected answers, and how far they are apart."""
    if "score_chosen" not in rows[0]:
        return {}
    chosen, rejected = (sum(row[f"score_{side}"] for row in rows) / len(rows) for side in ("chosen", "rejected"))
    return {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}


def _account(answered: Answered) -> Record:
    return {
        "origin": answered.prompt.origin,
        "answers": answered.answers,
        "ended": answered.ended,
        "usable": answered.usable,
        "rewards": answered.rewards,
    }


def _table(metrics: dict[str, float], output: str, engine: str) -> dict[str, Any]:
    counts = {
        "prompts": "num_prompts",
        "answers": "num_answers",
        "unanswered": "num_unanswered",
        "ties": "num_tied",
        output: COUNTS[output],
    }
    shares = {"cut off": "completions/clipped_ratio", "identical": "completions/duplicate_ratio", "unusable": "completions/unusable_ratio"}
    means = {"best reward": "reward_best", "worst reward": "reward_worst"}
    cells = {
        **{column: f"{int(metrics[name]):,}" for column, name in counts.items()},
        **{column: f"{metrics[name]:.1%}" for column, name in shares.items()},
        **{column: f"{metrics[name]:.3f}" for column, name in means.items() if name in metrics},
    }
    notes = [f"answers by {engine}; answers.jsonl beside the rows holds every one, with its reward"]
    return {"columns": list(cells), "rows": [list(cells.values())], "notes": notes}


def _write_lines(path: Path, records: Iterable[Record]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(_dump(record) + "\n")


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
