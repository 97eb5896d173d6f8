"""Evaluation: rows of held-out data scored under each policy, and policies compared on the rows they share.

Every result is kept by row: which row, which measure, the score, and for a generated answer its text. The means of the
report are those of the `evaluate` modules in `posttrain.metrics`; the intervals come from the same per-row scores.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain import disk
from posttrain.chat import ChatContract, encode, encode_prompt, read_contract
from posttrain.checkpoint import directory_of, mark_complete
from posttrain.data.prepared import describe_formats
from posttrain.data.rows import Conversation, Pair
from posttrain.data.samples import encode_pair
from posttrain.data.source import open_source
from posttrain.error import UserError
from posttrain.forward import Scorer
from posttrain.generate import answer_all
from posttrain.layout import Group, conversation_group, pair_group
from posttrain.metrics.check import Check, as_reference, read_checks
from posttrain.metrics.measured import Measured, difference_of, interval_of, measure_results
from posttrain.models import check_weights, load_policy, load_tokenizer
from posttrain.progress import Progress
from posttrain.stage import Input, StageContext

TOKENS_AT_ONCE = 2048
"""Tokens of one scoring batch; logits exist only for scored positions."""
PROMPTS_AT_ONCE = 64
"""Prompts whose answers are kept together once all are there."""


@dataclass(frozen=True)
class Scored:
    """What of a row is scored: a conversation, or the two answers of a pair; `parts` names its branches."""

    row: int
    parts: tuple[str, ...]
    group: Group


@dataclass(frozen=True)
class Encoded:
    """The rows under one policy's contract: sequences to score, prompts to answer, and rows too long for either."""

    scored: list[Scored] = field(default_factory=list)
    prompts: dict[int, list[int]] = field(default_factory=dict)
    checks: dict[int, list[Check]] = field(default_factory=dict)
    too_long: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Rows:
    """All rows of the evaluation's data sets, in order; a result names a row by its index here."""

    rows: list[Conversation | Pair]
    checks: list[list[Check]]
    summary: list[str]
    """Lines that say what will be measured on."""

    def encode(self, tokenizer: PreTrainedTokenizerBase, contract: ChatContract, max_length: int) -> Encoded:
        """The rows as tokens. A conversation is scored up to its end; one with checks is answered from its last question."""
        encoded = Encoded()
        stop = contract.stop_tokens[0]
        for index, row in enumerate(self.rows):
            before = len(encoded.scored), len(encoded.prompts)
            if isinstance(row, Pair):
                prompt, *answers = encode_pair(tokenizer, contract, row)
                encoded.scored.append(Scored(index, ("chosen", "rejected"), pair_group(prompt, answers)))
            else:
                if any(message["role"] == "assistant" for message in row.messages):
                    whole = encode(tokenizer, row.messages, row.tools, stop, row.origin)
                    encoded.scored.append(Scored(index, ("nll",), conversation_group(whole.ids, whole.trained)))
                if self.checks[index]:
                    messages = row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages
                    encoded.prompts[index] = encode_prompt(tokenizer, messages, row.tools, row.origin)
                    encoded.checks[index] = self.checks[index]
            longest = max([*(s.group.longest for s in encoded.scored[before[0] :]), len(encoded.prompts.get(index, []))])
            if longest > max_length:
                del encoded.scored[before[0] :]
                encoded.prompts.pop(index, None)
                encoded.too_long.append(index)
        if not encoded.scored and not encoded.prompts:
            raise UserError(f"eval: all {len(self.rows)} rows are over max_length: {max_length}; raise it")
        return encoded


@dataclass(frozen=True)
class Policy:
    """A policy's name in the pipeline file, and its result for each row and measure."""

    name: str
    results: list[dict[str, Any]]
    num_too_long: int
    """Rows over `max_length` in this policy's tokens, which are left out."""


def read_rows(context: StageContext[Any]) -> Rows:
    """The rows of all data inputs, with their checks validated. Raises `UserError`."""
    rows: list[Conversation | Pair] = []
    summary = []
    for given in context.inputs["data"]:
        source = open_source(given.data, f"{context.at}: {given.name}")
        before = len(rows)
        rows.extend(source.rows())
        summary += [f"{given.name}: {entry}" for entry in describe_formats(source)]
        summary.append(f"{given.name}: {len(rows) - before:,} rows" + (f", {len(source.invalid):,} do not fit" if source.invalid else ""))
    labelled = next((row for row in rows if isinstance(row, Conversation) and row.label is not None), None)
    if labelled:
        raise UserError(
            f"{labelled.origin}: is a labelled answer, and {context.at} measures on conversations and pairs; "
            "take undesirable answers out, and set format: of the source to one without label"
        )
    checks: list[list[Check]] = [read_checks(row.checks, row.origin) if isinstance(row, Conversation) else [] for row in rows]
    return Rows(rows, checks, summary)


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


def measure(
    context: StageContext[Any],
    kept: Kept,
    given: Input,
    tokenizer: PreTrainedTokenizerBase,
    contract: ChatContract,
    encoded: Encoded,
    device: str,
    progress: Progress,
) -> list[dict[str, Any]]:
    """This rank's share of a policy's results."""
    rank, world_size = context.rank, context.world_size
    progress.phase(f"load {given.name}")
    model = load_policy(
        given.model, tokenizer, contract, f"{context.at}: {given.name}", dtype="auto" if device == "cuda" else torch.float32
    )
    model.to(device).eval()  # type: ignore[arg-type]
    scored = [s for s in encoded.scored if s.row % world_size == rank]
    prompts = {row: ids for row, ids in encoded.prompts.items() if row % world_size == rank}
    progress.phase(f"score {given.name}", len(scored))
    results = _score(model, scored, tokenizer.pad_token_id, progress, kept, given.name)
    progress.phase(f"generate {given.name}", len(prompts))
    # Of like length together, which share the most work.
    ordered = sorted(prompts, key=lambda row: (-len(prompts[row]), row))
    for start in range(0, len(ordered), PROMPTS_AT_ONCE):
        some = ordered[start : start + PROMPTS_AT_ONCE]

        def answer(start: int = start, some: list[int] = some) -> list[dict[str, Any]]:
            answers = answer_all(
                model,
                tokenizer,
                contract,
                [prompts[row] for row in some],
                max_new_tokens=context.config.max_new_tokens,
                tick=lambda done: progress.step(start + done),
            )
            checks = [[as_reference(check) for check in encoded.checks[row]] for row in some]
            return [
                {"row": row, "measure": "answer", "answer": answer, "checks": asked}
                for row, answer, asked in zip(some, answers, checks, strict=True)
            ]

        results += kept.batch(f"{given.name}: answers {start}", answer)
        progress.step(start + len(some))
    return results


def gather(mine: list[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """The results of all ranks, on every rank, in the order of rows."""
    parts: list[Any] = [mine] * world_size
    if world_size > 1:
        dist.all_gather_object(parts, mine)
    return sorted((result for part in parts for result in part), key=lambda result: (result["row"], result["measure"]))


def _score(model: PreTrainedModel, scored: Sequence[Scored], pad: int, progress: Progress, kept: Kept, name: str) -> list[dict[str, Any]]:
    """Summed log-probability and number of the counted tokens of each sequence, in batches of like length."""
    if not scored:
        return []
    results: list[dict[str, Any]] = []
    groups = [each.group for each in scored]
    scorer = Scorer(model, longest=max(group.longest for group in groups), pad=pad)
    done = 0
    for number, positions in enumerate(scorer.batches(groups, TOKENS_AT_ONCE)):

        def score(positions: list[int] = positions) -> list[dict[str, Any]]:
            found = zip(positions, scorer.score([groups[position] for position in positions]), strict=True)
            return [
                {"row": scored[position].row, "measure": part, "logp": float(log_probs.sum(dtype=np.float64)), "num_tokens": len(log_probs)}
                for position, branches in found
                for part, log_probs in zip(scored[position].parts, branches, strict=True)
            ]

        results += kept.batch(f"{name}: scores {number}", score)
        done += len(positions)
        progress.step(done)
    scorer.detach()
    return results


# --- comparison ------------------------------------------------------------------------------------------------------


def compare_policies(policies: Sequence[Policy], rows: Rows, *, confidence: float, seed: int) -> tuple[dict[str, Any], dict[str, float]]:
    """The table for people, and the flat metrics `<policy>.<metric>`; every policy is compared with the first."""
    measured = {policy.name: measure_results(policy.results) for policy in policies}
    baseline = policies[0].name
    names = list(dict.fromkeys(name for metrics in measured.values() for name in metrics))
    table_rows, metrics = [], {}
    for name in names:
        cells = [name, str(len(measured[baseline][name].scores) if name in measured[baseline] else 0)]
        for policy in policies:
            got = measured[policy.name].get(name)
            if got is None:
                cells.append("-")
                continue
            metrics[f"{policy.name}.{name}"] = got.value
            cells.append(_cell(got, measured[baseline].get(name) if policy.name != baseline else None, confidence, seed))
        table_rows.append(cells)
    notes = [
        f"in brackets: of {baseline} its interval, of the others the paired difference from {baseline} and its interval ({confidence:.0%})"
    ]
    if too_long := max(policy.num_too_long for policy in policies):
        notes.append(f"{too_long} of {len(rows.rows)} rows are over max_length and were left out")
    columns = ["metric", "rows", *(policy.name for policy in policies)]
    return {"columns": columns, "rows": table_rows, "notes": notes}, metrics


def _cell(got: Measured, base: Measured | None, confidence: float, seed: int) -> str:
    if base is None:
        own = interval_of(got, confidence=confidence, seed=seed)
        spread = f" ({own.low:.3f} to {own.high:.3f})" if own.low is not None and own.high is not None else ""
        return f"{got.value:.3f}{spread}"
    difference = difference_of(base, got, confidence=confidence, seed=seed)
    if difference is None:
        return f"{got.value:.3f} (other tokens than the baseline's: not comparable)"
    if difference.low is None or difference.high is None:
        return f"{got.value:.3f} ({difference.difference:+.3f})"
    return f"{got.value:.3f} ({difference.difference:+.3f}, {difference.low:+.3f} to {difference.high:+.3f})"
