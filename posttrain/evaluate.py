"""Evaluation: rows of held-out data scored and answered under each policy, and policies compared on the rows they share.

Every result is kept by row: which row, which measure, what was found, and for a generated answer its text and its settings. All metrics
and their intervals are drawn from these (`posttrain.metrics.measured`).
All results of a policy are an artifact under the root, keyed by its weights and the rows in its tokens: whatever run measures
the same policy on the same rows reads them.

A further measure is a function of an `Evaluation`: it reads the answers of all policies there, spreads its work over the ranks, and adds
its results by row. One with a `score`, and a `weight` if that is not 1, is of the metric that its `measure` names: the weighted mean.
"""

import gc
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain import disk
from posttrain.artifact import fingerprint_source
from posttrain.chat import PROBE_ANSWER, ChatContract, encode, encode_prompt, read_contract
from posttrain.checkpoint import directory_of, mark_complete
from posttrain.data.prepared import describe_formats
from posttrain.data.rows import AnyRow, Conversation, Message, Pair, Text, asked_turns, pick_evenly
from posttrain.data.samples import encode_pair
from posttrain.data.source import open_source
from posttrain.engine import PolicyEngine, engine_name, lacks_room, unlike_transformers, wants_engine
from posttrain.error import UserError
from posttrain.forward import Predicted, Scorer
from posttrain.generate import Completion, answer_all, decode
from posttrain.layout import Group, conversation_group, pair_group
from posttrain.metrics.calibration import bin_tokens
from posttrain.metrics.check import Check, as_reference, read_turn_checks
from posttrain.metrics.generated import repetition, was_asked
from posttrain.metrics.language import has_drifted
from posttrain.metrics.measured import grade, measure_results
from posttrain.metrics.table import compare_measured, describe, make_table
from posttrain.models import check_weights, load_tokenizer
from posttrain.progress import Progress
from posttrain.ranks import any_rank, of_all_ranks, of_main
from posttrain.results import write_results
from posttrain.reward import check_readable, load_rewards, open_reader, rate_conversations
from posttrain.sandbox import OverLimit
from posttrain.stage import Input, StageContext
from posttrain.together import hold_policy, ranks_to_hold

T = TypeVar("T")
Result = dict[str, Any]
"""Of one row by one measure: `row`, `measure`, and the fields of `posttrain.results` that the measure fills."""

Answer = Callable[..., list[Completion]]
"""`answer_all` of a policy, by whatever engine: `(prompts, *, max_new_tokens, tick)`."""

TOKENS_AT_ONCE = 2048
"""Tokens of one scoring batch; logits exist only for scored positions."""
PROMPTS_AT_ONCE = 64
"""Prompts whose answers are kept together once all are there."""
VLLM_PROMPTS_AT_ONCE = 256
"""The same of vLLM, which has so many answers under way at a time by default."""
VERSION = 3
"""Raised when the same policy and rows give other results."""
FILE = "results.json"
"""In the directory of the stage, says where the results of its policies lie."""
RESULTS_FILE = "results.jsonl"


@dataclass(frozen=True)
class Scored:
    """What of a row is scored: a conversation, or the two answers of a pair; `parts` names its branches."""

    row: int
    parts: tuple[str, ...]
    group: Group


@dataclass(frozen=True)
class Asked:
    """What of a row a policy answers."""

    ids: list[int]
    """The prompt of its first answer."""
    turns: list[list[Message]]
    """What is said before each of its answers: by the first of these, all that the row begins with."""
    checks: list[list[Check]]
    """Of each of its answers."""


@dataclass(frozen=True)
class Encoded:
    """The rows under one policy's contract: sequences to score, what is answered, and rows too long for either."""

    scored: list[Scored] = field(default_factory=list)
    asked: dict[int, Asked] = field(default_factory=dict)
    too_long: dict[int, int] = field(default_factory=dict)
    """Row to its length in tokens."""

    @property
    def digest(self) -> str:
        """What it is measured on."""
        scored = [[each.row, each.parts, [each.group.prefix, each.group.branches, each.group.counted]] for each in self.scored]
        asked = {row: [each.ids, each.turns[1:], _references(each.checks)] for row, each in self.asked.items()}
        return disk.hash_json({"scored": scored, "asked": asked})


@dataclass(frozen=True)
class Rows:
    """All rows of the evaluation's data sets, in order; a result names a row by its index here."""

    rows: list[AnyRow]
    turns: list[list[list[Message]]]
    """What is said before each answer to a row; nothing for plain text."""
    checks: list[list[list[Check]]]
    """Of each row, for each answer."""
    shown: frozenset[int]
    """Rows that are answered even without checks, for people to read, or a judge."""
    summary: list[str]
    """Lines that say what will be measured on."""

    def is_answered(self, index: int) -> bool:
        """Whether the policies answer a row."""
        return any(self.checks[index]) or index in self.shown

    def encode(self, tokenizer: PreTrainedTokenizerBase, contract: ChatContract, max_length: int, at: str) -> Encoded:
        """The rows as tokens. A conversation is scored up to its end; a row with checks is answered from its last question."""
        encoded = Encoded()
        for index, row in enumerate(self.rows):
            if isinstance(row, Text):
                encoded.scored.extend(Scored(index, ("text",), group) for group in text_groups(tokenizer, row.text, max_length))
                continue
            scored = self._scored(index, row, tokenizer, contract)
            lengths = [each.group.longest for each in scored]
            asked = None
            if self.is_answered(index):
                asked = Asked(encode_prompt(tokenizer, self.turns[index][0], row.tools, row.origin), self.turns[index], self.checks[index])
                whole = _interleaved(asked.turns, [PROBE_ANSWER] * (len(asked.turns) - 1))
                lengths.append(len(encode_prompt(tokenizer, whole, row.tools, row.origin)))
            if (longest := max(lengths, default=0)) > max_length:
                encoded.too_long[index] = longest
                continue
            encoded.scored.extend(scored)
            if asked:
                encoded.asked[index] = asked
        if self.rows and not encoded.scored and not encoded.asked:
            longest = max(encoded.too_long.values(), default=0)
            raise UserError(
                f"{at}: all {len(self.rows):,} rows are over {at}.max_length: {max_length}; raise it, to {longest:,} for all of them"
            )
        return encoded

    def _scored(self, index: int, row: Conversation | Pair, tokenizer: PreTrainedTokenizerBase, contract: ChatContract) -> list[Scored]:
        if isinstance(row, Pair):
            prompt, *answers = encode_pair(tokenizer, contract, row)
            return [Scored(index, ("chosen", "rejected"), pair_group(prompt, answers))]
        if not any(message["role"] == "assistant" for message in row.messages):
            return []
        whole = encode(tokenizer, row.messages, row.tools, contract.stop_tokens[0], row.origin)
        return [Scored(index, ("nll",), conversation_group(whole.ids, whole.trained))]


def text_groups(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> list[Group]:
    """Plain text in windows of at most so many tokens, in which each token is counted once.

    A window begins with the last token of the one before it, and the first with the token that begins a text, if the tokenizer has one;
    without it the first token is predicted from nothing, and not counted.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    bos: Any = tokenizer.bos_token_id
    whole = ids if bos is None else [bos, *ids]
    windows = (whole[start : start + max_length] for start in range(0, len(whole) - 1, max_length - 1))
    return [conversation_group(window, [False] + [True] * (len(window) - 1)) for window in windows]


def _references(checks: Sequence[Sequence[Check]]) -> list[list[str]]:
    return [[as_reference(check) for check in each] for each in checks]


def _interleaved(turns: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[Message]:
    """The first turn and what follows each of the answers, with these between."""
    messages = list(turns[0])
    for turn, answer in zip(turns[1:], answers, strict=False):
        messages += [_says(answer), *turn]
    return messages


def _says(answer: str) -> Message:
    return {"role": "assistant", "content": answer}


@dataclass(frozen=True)
class Policy:
    """What is measured under one name: that of a policy in the pipeline file, or of a model that judges."""

    name: str
    results: list[Result] = field(default_factory=list)
    too_long: dict[int, int] = field(default_factory=dict)
    """Rows over `max_length` in this policy's tokens, which are left out, to their lengths."""


def read_rows(context: StageContext[Any]) -> Rows:
    """The rows of all data inputs, with their checks validated. Raises `UserError`."""
    rows: list[AnyRow] = []
    summary = []
    for given in context.inputs.get("data", ()):
        source = open_source(given.data, f"{context.at}: {given.name}")
        before = len(rows)
        rows.extend(source.all_rows())
        summary += [f"{given.name}: {entry}" for entry in describe_formats(source)]
        summary.append(f"{given.name}: {len(rows) - before:,} rows" + (f", {len(source.invalid):,} do not fit" if source.invalid else ""))
    labelled = next((row for row in rows if isinstance(row, Conversation) and row.label is not None), None)
    if labelled:
        raise UserError(
            f"{labelled.origin}: is a labelled answer, and {context.at} measures on conversations and pairs; "
            "take undesirable answers out, and set format: of the source to one without label"
        )
    turns = [[] if isinstance(row, Text) else asked_turns(row) for row in rows]
    checks: list[list[list[Check]]] = [
        read_turn_checks(row.checks if isinstance(row, Conversation) else [], row.origin, len(asked))
        for row, asked in zip(rows, turns, strict=True)
    ]
    unchecked = [index for index, found in enumerate(checks) if not any(found) and any(turns[index])]
    shown = pick_evenly(unchecked, context.config.num_shown)
    if context.config.judge is not None:
        shown |= context.config.judge.choose([index for index, asked in enumerate(turns) if any(asked)])
    return Rows(rows, turns, checks, frozenset(shown), summary)


def open_contracts(context: StageContext[Any]) -> list[tuple[PreTrainedTokenizerBase, ChatContract]]:
    """Tokenizer and contract of each policy. One without a template is asked in the way of the first that has a contract."""
    given = context.inputs["policies"]
    for policy in given:
        check_weights(policy, context.at)
    shared = next((c for c in (read_contract(Path(policy.model.model)) for policy in given) if c is not None), None)
    return [load_tokenizer(policy, context.at, contract=shared) for policy in given]


class Kept:
    """This rank's results, on disk batch by batch: what a stage that is started again need not compute again.

    Batches are the same ones whether all are computed or some, so the results are too.
    """

    def __init__(self, context: StageContext[Any]) -> None:
        start = directory_of(context.checkpoints, 0)
        if context.is_main:
            start.mkdir(parents=True, exist_ok=True)
            mark_complete(start, 0, context.world_size)  # what stands beside it is worth going on from
        self._path = context.checkpoints / f"results.rank_{context.rank}_of_{context.world_size}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, list[dict[str, Any]]] = {}
        self._writing = Lock()  # batches may be computed side by side
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines() if self._path.is_file() else []
        whole = [line for line in lines if self._take(line)]
        if len(whole) < len(lines):
            print(f"{self._path}: {len(lines) - len(whole)} batches were cut off or damaged, and are computed again", flush=True)
            disk.write_text(self._path, "".join(line + "\n" for line in whole))

    def _take(self, line: str) -> bool:
        try:
            record = json.loads(line)
            if record.pop("sha256") != disk.hash_json(record):
                return False
            self._known[record["batch"]] = record["results"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        return True

    def batch(self, name: str, compute: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The results of a batch of that name, as they are kept, or computed now and kept."""
        if name not in self._known:
            record = {"batch": name, "results": compute()}
            line = json.dumps({**record, "sha256": disk.hash_json(record)}) + "\n"
            with self._writing, self._path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._known[name] = json.loads(line)["results"]
        return self._known[name]


class Shared:
    """The results of policies that any run under the root has measured. All ranks call what it does."""

    def __init__(self, context: StageContext[Any], device: str) -> None:
        self._context = context
        self._device = device
        self._paths: list[str] = []

    def results(self, given: Input, key: Mapping[str, Any], compute: Callable[[], list[Result]]) -> list[Result]:
        """All results of a policy: those that lie there, or computed now, each rank its share, and left there.

        `key` is all that decides them beside the policy's weights.
        """
        context = self._context
        path = Path(of_main(str(self._declare(given, key)) if context.is_main else ""))
        if any_rank(context.is_main and path.exists()):
            print(f"{given.name}: measured before on the same rows, {path}", flush=True)
            return [json.loads(line) for line in (path / RESULTS_FILE).read_text(encoding="utf-8").splitlines()]
        results = gather(compute())
        if context.is_main:
            with disk.new_entry(path) as (aside, _):
                (aside / RESULTS_FILE).write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")
        return results

    def _declare(self, given: Input, key: Mapping[str, Any]) -> Path:
        context = self._context
        hashes = disk.HashCache(context.root / ".hashes.json")
        whole = {
            "version": VERSION,
            "weights": fingerprint_source(given.source, f"{context.at}: {given.name}", hashes),
            # They round differently.
            "computed by": [self._device, context.world_size],
            **key,
        }
        path = context.root / ".results" / disk.hash_json(whole)[:32]
        disk.discard_damaged(path, hashes)
        hashes.save()
        self._paths.append(str(path))
        disk.write_json(context.directory / FILE, {"paths": self._paths})
        return path


def gather(mine: list[Result]) -> list[Result]:
    """The results of all ranks, on every rank, in the order of rows."""
    return sorted((result for part in of_all_ranks(mine) for result in part), key=lambda r: (r["row"], r["measure"], r.get("turn", 0)))


# --- a policy ----------------------------------------------------------------------------------------------------------


def answers_by_vllm(context: StageContext[Any], contracts: Sequence[tuple[PreTrainedTokenizerBase, ChatContract]]) -> bool:
    """Whether vLLM generates, for all policies or for none, so that they are compared alike. All ranks call it.

    Raises `UserError` where it was asked for and cannot.
    """

    def obstacles() -> Iterator[str]:
        for given, (_, contract) in zip(context.inputs["policies"], contracts, strict=True):
            yield from unlike_transformers(given, contract, longest=_longest(context))
            yield from lacks_room(given, ranks_to_hold(context, given, "cuda" if torch.cuda.is_available() else "cpu"))

    return wants_engine(context, obstacles())


def _longest(context: StageContext[Any]) -> int:
    """Tokens that a prompt may come to with its answer."""
    return int(context.config.max_length + context.config.max_new_tokens)


def measure(
    context: StageContext[Any],
    kept: Kept,
    given: Input,
    tokenizer: PreTrainedTokenizerBase,
    contract: ChatContract,
    rows: Rows,
    encoded: Encoded,
    device: str,
    progress: Progress,
    *,
    is_vllm: bool,
) -> list[Result]:
    """This rank's share of a policy's results."""
    rank, world_size = context.rank, context.world_size
    scored = [s for s in encoded.scored if s.row % world_size == rank]
    asked = {row: each for row, each in encoded.asked.items() if row % world_size == rank}
    results: list[Result] = []
    if encoded.scored or not is_vllm:
        progress.phase(f"load {given.name}")
        held = hold_policy(context, given, tokenizer, contract, device)
        progress.phase(f"score {given.name}", len(scored))
        results += _merged(_score(held.model, scored, tokenizer.pad_token_id, progress, kept, given.name))
        if not is_vllm:
            answer = partial(answer_all, held.model, tokenizer, contract)
            results += _answers(context, kept, given, tokenizer, rows, asked, progress, answer, is_vllm=False)
        held.leave()
        del held
    if is_vllm and asked:
        gc.collect()  # what the scores took, vLLM is to have
        with PolicyEngine(context, given, tokenizer, contract, longest=_longest(context)) as engine:
            results += _answers(context, kept, given, tokenizer, rows, asked, progress, engine.answer_all, is_vllm=True)
    return results


def _answers(
    context: StageContext[Any],
    kept: Kept,
    given: Input,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    asked: Mapping[int, Asked],
    progress: Progress,
    answer: Answer,
    *,
    is_vllm: bool,
) -> list[Result]:
    """The answers to this rank's rows, each batch kept once it is there."""
    progress.phase(f"generate {given.name}", sum(len(each.turns) for each in asked.values()))
    results: list[Result] = []
    # Of like length together, which share the most work.
    ordered = sorted(asked, key=lambda row: (-len(asked[row].ids), row))
    num_done, size = 0, VLLM_PROMPTS_AT_ONCE if is_vllm else PROMPTS_AT_ONCE
    for start in range(0, len(ordered), size):
        some = {row: asked[row] for row in ordered[start : start + size]}

        def compute(some: dict[int, Asked] = some, num_done: int = num_done) -> list[Result]:
            return _answer(context, tokenizer, rows, some, answer, lambda done: progress.step(num_done + done))

        results += kept.batch(f"{given.name}: answers by {engine_name(is_vllm=is_vllm)} {start}", compute)
        num_done += sum(len(each.turns) for each in some.values())
        progress.step(num_done)
    return results


def _answer(
    context: StageContext[Any],
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    asked: Mapping[int, Asked],
    answer: Answer,
    tick: Callable[[int], None],
) -> list[Result]:
    """The greedy answers to some rows, turn by turn, each with the policy's own answers before it in its context.

    Where the template cannot say an answer again, or all is over `max_length` by then, the conversation breaks off: what is left of it
    counts as not answered.
    """
    config = context.config
    answers: dict[int, list[str]] = {row: [] for row in asked}
    prompts = {row: each.ids for row, each in asked.items()}
    results: list[Result] = []
    while prompts:
        num_done = len(results)
        completions = answer(list(prompts.values()), max_new_tokens=config.max_new_tokens, tick=partial(_go_on, tick, num_done))
        following: dict[int, list[int]] = {}
        for row, completion in zip(prompts, completions, strict=True):
            ids = completion.ids[:-1] if completion.ended else completion.ids
            answers[row].append(decode(tokenizer, ids))
            results.append(_answered(row, asked[row], answers[row], ids, ended=completion.ended))
            if len(answers[row]) == len(asked[row].turns):
                continue
            ids_next = _next_prompt(tokenizer, rows, row, asked[row], answers[row])
            if ids_next is not None and len(ids_next) <= config.max_length:
                following[row] = ids_next
            while row not in following and len(answers[row]) < len(asked[row].turns):
                answers[row].append("")
                results.append(_answered(row, asked[row], answers[row], [], ended=False))
        prompts = following
    return results


def _go_on(tick: Callable[[int], None], before: int, done: int) -> None:
    tick(before + done)


def _answered(row: int, asked: Asked, answers: Sequence[str], ids: Sequence[int], *, ended: bool) -> Result:
    """The result of the last of the answers so far, which has these tokens."""
    return {
        "row": row,
        "measure": "answer",
        "turn": len(answers),
        "answer": answers[-1],
        "num_tokens": len(ids),
        "ended": ended,
        "repetition": repetition(ids),
        "checks": [as_reference(check) for check in asked.checks[len(answers) - 1]],
    }


def _next_prompt(tokenizer: PreTrainedTokenizerBase, rows: Rows, row: int, asked: Asked, answers: Sequence[str]) -> list[int] | None:
    given = rows.rows[row]
    assert not isinstance(given, Text), "plain text is not answered"
    try:
        return encode_prompt(tokenizer, _interleaved(asked.turns, answers), given.tools, given.origin)
    except OverLimit:
        raise
    except UserError:
        return None


def _score(model: PreTrainedModel, scored: Sequence[Scored], pad: int, progress: Progress, kept: Kept, name: str) -> list[Result]:
    """What `_predicted` says of each sequence, in batches of like length."""
    if not scored:
        return []
    results: list[Result] = []
    groups = [each.group for each in scored]
    scorer = Scorer(model, longest=max(group.longest for group in groups), pad=pad)
    done = 0
    for number, positions in enumerate(scorer.batches(groups, TOKENS_AT_ONCE)):

        def score(positions: list[int] = positions) -> list[Result]:
            found = zip(positions, scorer.predict([groups[position] for position in positions]), strict=True)
            return [
                _predicted(scored[position].row, part, tokens)
                for position, branches in found
                for part, tokens in zip(scored[position].parts, branches, strict=True)
            ]

        results += kept.batch(f"{name}: scores {number}", score)
        done += len(positions)
        progress.step(done)
    scorer.detach()
    return results


def _predicted(row: int, part: str, tokens: Predicted) -> Result:
    """Summed log-probability and number of the counted tokens of a sequence, and of a conversation how sure they were predicted."""
    log_probs = tokens.log_probs
    found = {"row": row, "measure": part, "logp": float(log_probs.sum(dtype=np.float64)), "num_tokens": len(log_probs)}
    return {**found, **bin_tokens(tokens.top_probs, tokens.is_top1)} if part == "nll" else found


def _merged(results: Sequence[Result]) -> list[Result]:
    """One result for each row and measure: those of the windows of a text added up."""
    merged: dict[tuple[int, str], Result] = {}
    for result in results:
        one = merged.setdefault((result["row"], result["measure"]), {**result, "logp": 0.0, "num_tokens": 0})
        one["logp"] += result["logp"]
        one["num_tokens"] += result["num_tokens"]
    return list(merged.values())


# --- the evaluation ----------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """What is measured so far, the same on every rank."""

    context: StageContext[Any]
    rows: Rows
    contracts: list[tuple[PreTrainedTokenizerBase, ChatContract]]
    """Of each policy."""
    kept: Kept
    shared: Shared
    progress: Progress
    device: str
    policies: list[Policy] = field(default_factory=list)
    """In the order of the pipeline file; the first is what the others are compared with."""
    judges: list[Policy] = field(default_factory=list)
    """Models that judge, and are measured too: their figures are notes of the table."""
    notes: list[str] = field(default_factory=list)
    """Lines under the table that measures add."""
    is_vllm: bool = False
    """Whether vLLM generates, or transformers."""

    def answered(self, policy: Policy) -> dict[tuple[int, int], Conversation]:
        """All that a policy answered, by row and turn: each a conversation that ends with the answer."""
        said: dict[int, list[str]] = {}
        found: dict[tuple[int, int], Conversation] = {}
        for result in policy.results:
            if result["measure"] != "answer" or not was_asked(result):
                continue
            row, given = result["row"], self.rows.rows[result["row"]]
            assert not isinstance(given, Text), "plain text is not answered"
            answers = said.setdefault(row, [])
            answers.append(result["answer"])
            messages = _interleaved(self.rows.turns[row][: len(answers)], answers)
            found[row, result["turn"]] = Conversation([*messages, _says(answers[-1])], given.tools, [], given.origin)
        return found

    def spread(self, name: str, places: Sequence[T], size: int, compute: Callable[[Sequence[T]], list[Result]]) -> list[Result]:
        """The results for all places, on every rank: each computes its share, so many at once, and keeps them as they come."""
        mine = places[self.context.rank :: self.context.world_size]
        self.progress.phase(name, len(mine))
        results: list[Result] = []
        for start in range(0, len(mine), size):
            some = mine[start : start + size]
            results += self.kept.batch(f"{name}: {start}", lambda some=some: compute(some))  # type: ignore[misc]
            self.progress.step(start + len(some))
        return gather(results)

    def write(self) -> dict[str, float]:
        """Compare, and write the report, on the main rank; the metrics, named `<policy>.<metric>`."""
        config, output = self.context.config, self.context.output
        for policy in self.policies:
            self._complete(policy)
        measured = {each.name: measure_results(each.results) for each in (*self.policies, *self.judges)}
        names = [policy.name for policy in self.policies]
        results = compare_measured({name: measured[name] for name in names}, confidence=config.confidence, seed=config.seed)
        table = make_table(results, names, confidence=config.confidence)
        for judge in self.judges:
            own = compare_measured({judge.name: measured[judge.name]}, confidence=config.confidence, seed=config.seed)
            table["results"] += own
            table["notes"].append(describe(own))
        if too_long := max((policy.too_long for policy in self.policies), key=len):
            over = f"{len(too_long):,} of {len(self.rows.rows):,} rows are over {self.context.at}.max_length: {config.max_length}"
            first = f"the first: {self.rows.rows[min(too_long)].origin}"
            table["notes"].append(f"{over} and were left out, {first}; raise it, to {max(too_long.values()):,} for all of them")
        table["notes"] += self.notes
        output.mkdir(parents=True, exist_ok=True)
        (output / "table.json").write_text(json.dumps(table, indent=1, ensure_ascii=False), encoding="utf-8")
        write_results(output, self._by_row())
        return {f"{result['policy']}.{result['metric']}": result["value"] for result in table["results"]}

    def _complete(self, policy: Policy) -> None:
        """Add what needs no model: verdicts of the checks, languages, and the size of texts."""
        for result in policy.results:
            row = result["row"]
            if result["measure"] == "text":
                result["num_bytes"] = len(self.rows.rows[row].text.encode())  # type: ignore[union-attr]
            if result["measure"] == "answer" and was_asked(result):
                asked = self.rows.turns[row][result["turn"] - 1][-1]["content"]
                if (drifted := has_drifted(asked, result["answer"], result["checks"])) is not None:
                    result["has_drifted"] = drifted
        grade([result for result in policy.results if result["measure"] == "answer"])

    def _by_row(self) -> Iterator[Result]:
        """All results as they are written, each generation with its settings."""
        for policy, settings in zip(self.policies, self._settings(), strict=True):
            for result in policy.results:
                yield {"policy": policy.name, **self._placed(result), **({"settings": settings} if result["measure"] == "answer" else {})}
        for judge in self.judges:
            yield from ({"policy": judge.name, **self._placed(result)} for result in judge.results)

    def _placed(self, result: Result) -> Result:
        """The result, and where its row stands: it says so itself where that is in no data set of the evaluation."""
        return result if "origin" in result else {"origin": self.rows.rows[result["row"]].origin, **result}

    def _settings(self) -> Iterator[dict[str, Any]]:
        """How the answers of each policy were generated."""
        hashes = disk.HashCache(self.context.root / ".hashes.json")
        for given, (_, contract) in zip(self.context.inputs["policies"], self.contracts, strict=True):
            yield {
                "engine": engine_name(is_vllm=self.is_vllm),
                "weights": fingerprint_source(given.source, f"{self.context.at}: {given.name}", hashes),
                "contract": contract.digest,
                "stop_tokens": list(contract.stop_tokens),
                "max_new_tokens": self.context.config.max_new_tokens,
                "is_greedy": True,
            }


def measure_policies(context: StageContext[Any]) -> Evaluation:
    """Score and ask every policy; every rank calls it and takes its share of the rows."""
    rows, contracts = read_rows(context), open_contracts(context)
    progress = Progress(context.directory, is_main=context.is_main)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_vllm = bool(rows.rows) and answers_by_vllm(context, contracts)
    evaluation = Evaluation(context, rows, contracts, Kept(context), Shared(context, device), progress, device, is_vllm=is_vllm)
    for given, (tokenizer, contract) in zip(context.inputs["policies"], contracts, strict=True):
        encoded = rows.encode(tokenizer, contract, context.config.max_length, context.at)
        settings = {"engine": engine_name(is_vllm=is_vllm), "contract": contract.digest, "max_new_tokens": context.config.max_new_tokens}
        key = {**settings, "rows": encoded.digest, "max_length": context.config.max_length}
        compute = partial(measure, context, evaluation.kept, given, tokenizer, contract, rows, encoded, device, progress, is_vllm=is_vllm)
        results = evaluation.shared.results(given, key, compute) if rows.rows else []
        evaluation.policies.append(Policy(given.name, results, encoded.too_long))
    return evaluation


# --- rewards -----------------------------------------------------------------------------------------------------------


def check_rewards(context: StageContext[Any], rows: Rows) -> None:
    """Raise `UserError` where the reward model is none, or cannot read what it would have to. Loads no weights."""
    for given in context.inputs.get("reward", ()):
        check_readable(open_reader(given, context.at), _probes(rows), f"{context.at}: {given.name}")


def _probes(rows: Rows) -> Iterator[Conversation]:
    """All that is answered, or has two answers, with an answer that only stands for one."""
    for index, row in enumerate(rows.rows):
        if isinstance(row, Pair) or (isinstance(row, Conversation) and rows.is_answered(index)):
            asked = _interleaved(rows.turns[index], [PROBE_ANSWER] * len(rows.turns[index]))
            yield Conversation([*asked, _says(PROBE_ANSWER)], row.tools, [], row.origin)


def reward_answers(evaluation: Evaluation) -> None:
    """Add what the reward model gives for the answers of each policy, and how well it tells the answers of pairs apart."""
    context, rows = evaluation.context, evaluation.rows.rows
    if "reward" not in context.inputs:
        return
    given = context.input("reward")
    reader = open_reader(given, context.at)
    evaluation.progress.phase(f"load {given.name}")
    model = load_rewards(given, context.at)
    unread: Counter[str] = Counter()

    def rate(name: str, answered: Mapping[tuple[int, Any], Conversation], result: Callable[[tuple[int, Any]], Result]) -> list[Result]:
        def compute(places: Sequence[tuple[int, Any]]) -> list[Result]:
            rewards = rate_conversations(model, reader, [answered[place] for place in places])
            return [{**result(place), "score": reward} for place, reward in zip(places, rewards, strict=True)]

        found = evaluation.spread(f"{given.name}: {name}", list(answered), PROMPTS_AT_ONCE, compute)
        unread[name] = sum(result["score"] is None for result in found)
        return [result for result in found if result["score"] is not None]

    for policy in evaluation.policies:
        answered = evaluation.answered(policy)
        policy.results.extend(
            rate(f"answers of {policy.name}", answered, lambda place: {"row": place[0], "measure": "reward", "turn": place[1]})
        )
    answers = {
        (row, side): Conversation([*pair.prompt, *getattr(pair, side)], pair.tools, [], pair.origin)
        for row, pair in enumerate(rows)
        if isinstance(pair, Pair)
        for side in ("chosen", "rejected")
    }
    judged = rate("pairs", answers, lambda place: {"row": place[0], "measure": f"reward of {place[1]}"})
    sides = Counter(result["row"] for result in judged)
    if whole := [result for result in judged if sides[result["row"]] == 2]:
        evaluation.judges.append(Policy(given.name, whole))
    evaluation.notes += [f"{given.name} cannot read {count} of its {name}" for name, count in unread.items() if count]
