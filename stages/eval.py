"""Eval: what each policy can do on held-out data, and whether it is better than the first one, row by row.

Measured, as far as the data have what it takes:
  nll          -1/N * sum over the assistant's tokens of log pi(token | all before it)           (conversations)
  preference   share of pairs with log pi(chosen) > log pi(rejected), and the mean margin         (preference pairs)
  <checker>    share of greedy answers that pass the checks their row carries                     (rows with `checks`)
and the difference of each from the first policy on the very same rows, with a bootstrap interval.

Reads: policies (one or more; the first is the baseline), data (held-out data sets).  Writes: report.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from posttrain.stage import Role, Stage, StageConfig, StageContext


class EvalConfig(StageConfig):
    """What is measured, and how sure it should be."""

    max_length: int = Field(2048, ge=2)
    """Longest prompt and answer that is scored, in tokens; a longer row is left out, and counted."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest generated answer, in tokens."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Confidence of the intervals."""
    seed: int = Field(0, ge=0)
    """Seed of the bootstrap."""


def prepare(context: StageContext[EvalConfig]) -> None:
    """Check that every policy renders every row, and that every check can be made; no model, no process group."""
    from posttrain import disk
    from posttrain.evaluate import open_contracts, read_rows
    from posttrain.ledger import PREFLIGHT_FILE

    rows = read_rows(context)
    disk.write_json(context.directory / PREFLIGHT_FILE, {"summary": rows.summary})
    for tokenizer, contract in open_contracts(context):
        rows.encode(tokenizer, contract, context.config.max_length)


def run(context: StageContext[EvalConfig]) -> dict[str, float]:
    """Measure every policy on this rank's share of the rows; the main rank compares and writes the report."""
    import torch

    from posttrain.evaluate import Kept, Policy, compare_policies, gather, measure, open_contracts, read_rows
    from posttrain.progress import Progress

    rows = read_rows(context)
    progress = Progress(context.directory, is_main=context.is_main)
    kept = Kept(context)
    policies: list[Policy] = []
    for given, (tokenizer, contract) in zip(context.inputs["policies"], open_contracts(context), strict=True):
        encoded = rows.encode(tokenizer, contract, context.config.max_length)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        mine = measure(context, kept, given, tokenizer, contract, encoded, device, progress)
        policies.append(Policy(given.name, gather(mine, context.world_size), len(encoded.too_long)))
    if not context.is_main:
        return {}
    table, metrics = compare_policies(policies, rows, confidence=context.config.confidence, seed=context.config.seed)
    _write(context.output, policies, table)
    return metrics


def _write(output: Path, policies: Sequence[Any], table: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.json").write_text(json.dumps(table, indent=1, ensure_ascii=False), encoding="utf-8")
    with open(output / "rows.jsonl", "w", encoding="utf-8") as file:
        for policy in policies:
            for result in policy.results:
                file.write(json.dumps({"policy": policy.name, **result}, ensure_ascii=False) + "\n")


STAGE = Stage(
    kind="eval",
    config=EvalConfig,
    inputs={"policies": Role("policy", many=True), "data": Role("dataset", many=True)},
    output="report",
    prepare=prepare,
    run=run,
)
