"""Runs on disk as stages leave them, made without training: the plan, the records and the progress are written by the project itself."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import pipeline
from posttrain import artifact, ledger
from posttrain.config import read_pipeline
from posttrain.progress import Progress
from posttrain.results import write_results

POLICIES = ("base", "sft", "dpo")


@dataclass(frozen=True)
class Made:
    """A run that was made, and the pipeline file that it is of."""

    config: Path
    root: Path
    name: str

    @property
    def directory(self) -> Path:
        """That of the run."""
        return self.root / self.name


def nll_results(policy: str, totals: Sequence[float], num_tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Results of `eval`, whose rows have these negative log-likelihoods."""
    return [
        {"policy": policy, "row": row, "measure": "nll", "logp": -total, "num_tokens": count}
        for row, (total, count) in enumerate(zip(totals, num_tokens, strict=True))
    ]


def answer_results(policy: str, answers: Sequence[str], wanted: Sequence[str]) -> list[dict[str, Any]]:
    """Results of `eval`, whose rows were answered so and want an exact answer."""
    checks = [[json.dumps({"kind": "exact_answer", "answer": text})] for text in wanted]
    told = {"policy": policy, "measure": "answer", "turn": 1, "ended": True, "repetition": 0.0}
    verdicts = [[float(answer == text)] for answer, text in zip(answers, wanted, strict=True)]
    return [
        {**told, "row": row, "answer": answer, "num_tokens": len(answer), "checks": asked, "verdicts": found, "loose_verdicts": found}
        for row, (answer, asked, found) in enumerate(zip(answers, checks, verdicts, strict=True))
    ]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Made]:
    """`make_run(name, prompts=..., results=..., steps=..., until=...)`: a run of sft, dpo and eval, finished up to a stage."""

    def make(
        name: str = "shown",
        *,
        prompts: Sequence[str] = ("one?", "two?"),
        results: Sequence[dict[str, Any]] = (),
        table: dict[str, Any] | None = None,
        steps: Sequence[dict[str, Any]] = ({"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}),
        learning_rate: float = 1e-3,
        system_prompt: str = "be kind",
        until: str = "eval",
    ) -> Made:
        model = tmp_path / "base"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text("{}")
        heldout = tmp_path / f"{name}.heldout.jsonl"
        heldout.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        chat = tmp_path / "chat.jsonl"
        chat.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
        prefs = tmp_path / "prefs.jsonl"
        prefs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
        config = tmp_path / f"{name}.yaml"
        config.write_text(
            f"""
run: {name}
sources:
  base: {{model: {model}}}
  chat: {{data: {chat}}}
  prefs: {{data: {prefs}}}
  heldout: {{data: {heldout}, format: prompt}}
stages:
  sft: {{inputs: {{policy: base, data: chat}}, learning_rate: {learning_rate}, system_prompt: {json.dumps(system_prompt)}}}
  dpo: {{inputs: {{policy: sft, data: prefs}}}}
  eval: {{inputs: {{policies: [base, sft, dpo], data: [heldout]}}}}
"""
        )
        made = Made(config, tmp_path / "runs", name)
        nodes = pipeline.plan(read_pipeline(config), made.root)
        for node in nodes[: 1 + [node.name for node in nodes].index(until)]:
            attempt = pipeline._start(node)
            output = node.directory / artifact.OUTPUT
            output.mkdir()
            if node.name == "eval":
                found = table or {"columns": ["metric", "rows", *POLICIES], "rows": [], "notes": ["a note"]}
                (output / "table.json").write_text(json.dumps(found))
                write_results(output, results)
            else:
                (output / "model.safetensors").write_bytes(b"weights")
                progress = Progress(node.directory, is_main=True)
                for step in steps:
                    progress.metrics(step["step"], {key: value for key, value in step.items() if key != "step"})
            finish(node, attempt)
        return made

    return make


def finish(node: pipeline.Node, attempt: ledger.Attempt) -> None:
    """Declare a stage finished, a minute after it began."""
    artifact.write_artifact(
        node.directory,
        kind=node.stage.output,
        fingerprint=node.fingerprint,
        identity=node.identity,
        version=node.stage.version,
        inputs=attempt.input_builds,
        metrics={"loss": 1.0, "num_steps": 2.0} if node.name != "eval" else {},
        provenance={
            "started": attempt.started,
            "finished": (datetime.fromisoformat(attempt.started) + timedelta(minutes=1)).isoformat(),
            "posttrain": "0.1",
            "commit": "c0ffee",
            "dirty": True,
            "python": "3.11.7",
            "versions": {"torch": "2.15.0"},
            "host": "h",
            "platform": "p",
            "argv": ["pipeline.py", "run"],
        },
    )
