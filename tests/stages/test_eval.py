"""Eval against plain transformers, a row at a time."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.disk import read_json
from tests.conftest import Ended, read_lines

Cli = Callable[..., Ended]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Filled by the first test that needs it: the directory of a run of the whole chain."""
    return {}


@pytest.fixture
def checked_file(tmp_path: Path) -> Path:
    """Rows with checks that every answer passes, that none passes, and one of each."""
    path = tmp_path / "checked.jsonl"
    always = {"kind": "length_limits", "max_words": 1000}
    never = {"kind": "exact_answer", "answer": "no model ever says this"}
    rows = [
        {
            "messages": [{"role": "user", "content": f"how many birds? {n}"}, {"role": "assistant", "content": f"there are {n}"}],
            "checks": checks,
        }
        for n, checks in enumerate([[always], [always], [never], [always, never]])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def chain(done: dict[str, Path], posttrain: Cli, pipeline_file: Path, checked_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "run" not in done:
        root = tmp_path_factory.mktemp("chain")
        ended = posttrain("run", pipeline_file, "--root", root, f"sources.chat.data={checked_file}")
        assert ended.code == 0, ended.err
        done["run"], done["shown"] = root / "test", root / "shown.txt"
        done["shown"].write_text(ended.out)
    return done["run"]


def results(run: Path, policy: str, measure: str) -> list[dict[str, Any]]:
    rows = read_lines(run / "eval" / "output" / "rows.jsonl")
    return [row for row in rows if row["policy"] == policy and row["measure"] == measure]


def metrics(run: Path) -> dict[str, float]:
    return dict(read_json(run / "eval" / "artifact.json")["payload"]["metrics"])


def encode_answer(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Prompt and answer in ChatML, written out by hand."""
    before = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    return [tokenizer(text, add_special_tokens=False).input_ids for text in (before, f"{answer}<|im_end|>")]  # type: ignore[return-value]


def logp(model: Any, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logps = model(torch.tensor([prompt + answer])).logits[0, :-1].log_softmax(-1)
    return float(logps[len(prompt) - 1 :].gather(1, torch.tensor(answer)[:, None]).sum())


def test_nll_is_that_of_the_answers_tokens_and_their_stop(chain: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(chain / "sft/output"), AutoModelForCausalLM.from_pretrained(chain / "sft/output")
    pairs = [encode_answer(tokenizer, f"how many birds? {n}", f"there are {n}") for n in range(4)]
    logps = [logp(model, *pair) for pair in pairs]
    assert [row["logp"] for row in results(chain, "sft", "nll")] == pytest.approx(logps, rel=1e-5)
    assert [row["num_tokens"] for row in results(chain, "sft", "nll")] == [len(answer) for _, answer in pairs]
    assert metrics(chain)["sft.nll"] == pytest.approx(-sum(logps) / sum(len(answer) for _, answer in pairs), rel=1e-5)


def test_preference_is_measured_on_whole_answers(chain: Path, pairs_file: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(chain / "dpo/output"), AutoModelForCausalLM.from_pretrained(chain / "dpo/output")
    margins = []
    for row in read_lines(pairs_file):
        chosen, rejected = (logp(model, *encode_answer(tokenizer, row["prompt"], row[side])) for side in ("chosen", "rejected"))
        margins.append(chosen - rejected)
    assert metrics(chain)["dpo.preference margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    assert metrics(chain)["dpo.preference accuracy"] == sum(margin > 0 for margin in margins) / len(margins)


def test_answers_are_those_of_greedy_decoding_one_by_one(chain: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(chain / "sft/output"), AutoModelForCausalLM.from_pretrained(chain / "sft/output")
    for n, row in enumerate(results(chain, "sft", "answer")):
        ids, _ = encode_answer(tokenizer, f"how many birds? {n}", "")
        whole = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
        assert row["answer"] == tokenizer.decode(whole, skip_special_tokens=True)


def test_a_row_passes_when_all_its_checks_do(chain: Path) -> None:
    found = metrics(chain)
    assert found["base.answers passed"] == found["dpo.answers passed"] == 0.5
    assert found["base.length_limits"] == 1.0
    assert found["base.exact_answer"] == 0.0


def test_the_run_ends_with_a_table_of_all_policies_and_says_what_to_do_next(chain: Path, done: dict[str, Path]) -> None:
    shown = done["shown"].read_text()
    assert all(column in shown for column in ("metric", "base", "sft", "dpo", "answers passed", "preference accuracy"))
    assert "pipeline.py chat" in shown


def test_a_base_without_template_is_asked_in_the_way_of_the_others(chain: Path, tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chain / "sft/output")
    assert [row["num_tokens"] for row in results(chain, "base", "nll")] == [row["num_tokens"] for row in results(chain, "sft", "nll")]
    assert AutoTokenizer.from_pretrained(tiny).chat_template is None
    assert "<|im_start|>" in tokenizer.chat_template


def test_two_ranks_measure_what_one_does(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> None:
    base = ("--only", "eval", "stages.eval.inputs.policies=[base]")
    found = []
    for number in (1, 2):
        root = tmp_path / str(number)
        ended = posttrain("run", pipeline_file, "--root", root, *base, f"stages.eval.num_processes={number}")
        assert ended.code == 0, ended.err
        found.append(root / "test")
    assert metrics(found[1]) == pytest.approx(metrics(found[0]), rel=1e-6)
    assert [row["row"] for row in results(found[1], "base", "nll")] == list(range(24))


def test_rows_over_the_limit_are_left_out_and_counted(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> None:
    base = ("--only", "eval", "stages.eval.inputs={policies: base, data: chat}", "stages.eval.max_length=70")
    ended = posttrain("run", pipeline_file, "--root", tmp_path, *base)
    assert ended.code == 0, ended.err
    assert "of 24 rows are over max_length and were left out" in ended.out


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a?", "completion": "b", "checks": [{"kind": "exakt_answer", "answer": "b"}]}, "did you mean 'exact_answer'"),
        ({"prompt": "a?", "completion": "b", "checks": [{"kind": "regex_match", "pattern": "("}]}, "not a regular expression"),
    ],
)
def test_a_check_that_cannot_be_made_is_refused_before_a_model_is_loaded(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    data = tmp_path / "checked.jsonl"
    data.write_text(json.dumps(row) + "\n")
    inputs = "stages.eval.inputs={policies: base, data: chat}"
    ended = posttrain("run", pipeline_file, "--root", tmp_path / "runs", "--only", "eval", inputs, f"sources.chat.data={data}")
    assert ended.code == 2
    assert "checked.jsonl:1: checks[0]" in ended.err
    assert said in ended.err
