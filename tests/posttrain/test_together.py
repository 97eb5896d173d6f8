"""A policy that two processes hold together measures what each would measure alone, to the last bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from posttrain.results import read_results
from tests.conftest import Ended

Cli = Callable[..., Ended]


def write_run(path: Path, policy: Path, rows: list[dict[str, Any]]) -> Path:
    data = path.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.write_text(f"""
run: test
sources:
  base: {{model: {policy}}}
  rows: {{data: {data}}}
stages:
  eval: {{inputs: {{policies: [base], data: [rows]}}, max_new_tokens: 6, num_processes: 2}}
""")
    return path


def talk(number: int, *, is_answered: bool = True) -> dict[str, Any]:
    asked = [{"role": "user", "content": f"what is the colour of bird {number}?" + " and why?" * number}]
    if not is_answered:
        return {"messages": asked, "checks": [{"kind": "length_limits", "max_words": 1000}]}
    return {"messages": [*asked, {"role": "assistant", "content": f"the colour is blue, {number}"}]}


def measured(posttrain: Cli, file: Path, root: Path, *overrides: str) -> tuple[list[dict[str, Any]], str]:
    ended = posttrain("run", file, "--root", root, *overrides)
    assert ended.code == 0, ended.err
    log = next((root / "test" / "eval").rglob("rank_0.log")).read_text()
    return list(read_results(root / "test" / "eval" / "output")), log


def test_scores_and_answers_are_those_of_a_policy_that_each_rank_holds_whole(posttrain: Cli, tiny: Path, tmp_path: Path) -> None:
    """Seven rows are no even number, and the contract brings tokens that the policy does not know."""
    file = write_run(tmp_path / "run.yaml", tiny, [talk(number) for number in range(7)])
    alone, said = measured(posttrain, file, tmp_path / "alone")
    assert "hold it together" not in said, "a small policy is held whole"
    together, said = measured(posttrain, file, tmp_path / "together", "stages.eval.ranks_per_policy=2")
    assert "base: 2 ranks hold it together" in said
    assert together == alone
    assert len({row["answer"] for row in alone if row["measure"] == "answer"}) > 1


def test_a_pass_that_breaks_off_on_one_rank_leaves_no_other_behind(posttrain: Cli, tiny: Path, tmp_path: Path) -> None:
    """Attention with a soft bound cannot share a prompt, which is found out in its first layer; the other rank answers meanwhile."""
    config = AutoConfig.from_pretrained(tiny)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads")}
    torch.manual_seed(0)
    bounded = Gemma2Config(**sizes, num_hidden_layers=4, num_attention_heads=4, head_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    Gemma2ForCausalLM(bounded).save_pretrained(tmp_path / "bounded")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "bounded")
    file = write_run(tmp_path / "run.yaml", tmp_path / "bounded", [talk(0), talk(1, is_answered=False)])
    alone, _ = measured(posttrain, file, tmp_path / "alone")
    together, _ = measured(posttrain, file, tmp_path / "together", "stages.eval.ranks_per_policy=2")
    assert together == alone


@pytest.mark.parametrize("ranks", [3, 4])
def test_ranks_that_cannot_be_divided_are_refused(posttrain: Cli, tiny: Path, tmp_path: Path, ranks: int) -> None:
    file = write_run(tmp_path / "run.yaml", tiny, [talk(0)])
    ended = posttrain("run", file, "--root", tmp_path / "runs", f"stages.eval.ranks_per_policy={ranks}")
    assert ended.code == 2
    said = f"stages.eval.ranks_per_policy: 2 processes cannot be divided into groups of {ranks}; give a divisor of 2"
    assert said in ended.err
