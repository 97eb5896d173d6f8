"""The preflight says what will be trained on, in true figures, and stops a stage whose data exceed a limit."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.disk import read_json
from tests.conftest import Ended, read_samples

Cli = Callable[..., Ended]

PIPELINE = """
run: r
sources:
  base: {{model: {tiny}}}
  chat: {{data: {data}}}
  heldout: {{data: {heldout}}}
stages:
  sft: {{inputs: {{policy: base, data: chat}}, global_batch_size: 2, max_length: 120, max_steps: 1}}
  eval: {{inputs: {{policies: [base, sft], data: heldout}}}}
"""
PAIRS = """
run: r
sources:
  base: {{model: {tiny}}}
  prefs: {{data: {data}}}
stages:
  dpo: {{inputs: {{policy: base, data: prefs}}, global_batch_size: 2, max_length: 120, max_steps: 1}}
"""
CLEAN = [(f"what is {number}?", f"it is {'very ' * number}{number}") for number in range(10)]


@pytest.fixture
def run(tmp_path: Path, tiny: Path, posttrain: Cli) -> Callable[..., Ended]:
    """`run(rows, overrides..., heldout=rows)`: the stage `sft` (or `dpo`, where a row has two answers), up to its preflight or on."""

    def call(rows: list[tuple[str, ...]], *overrides: str, heldout: list[tuple[str, ...]] | None = None) -> Ended:
        is_pair = len(rows[0]) == 3
        names = ("prompt", "chosen", "rejected") if is_pair else ("prompt", "completion")
        paths = {}
        for name, content in (("data", rows), ("heldout", heldout or [("another?", "thing")])):
            paths[name] = tmp_path / f"{name}.jsonl"
            columns = names if name == "data" else ("prompt", "completion")
            paths[name].write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in content))
        (tmp_path / "p.yaml").write_text((PAIRS if is_pair else PIPELINE).format(tiny=tiny, **paths))
        stage = "dpo" if is_pair else "sft"
        return posttrain("run", tmp_path / "p.yaml", "--root", tmp_path / "runs", "--only", stage, *overrides)

    return call


def report(tmp_path: Path, stage: str = "sft") -> dict[str, Any]:
    """What the preflight wrote."""
    found: dict[str, Any] = read_json(tmp_path / "runs" / "r" / stage / "preflight.json")
    return found


def refused(ended: Ended) -> str:
    assert ended.code == 2 and "Traceback" not in ended.err
    (line,) = ended.err.strip().splitlines()
    return line


def test_its_figures_are_those_of_the_samples_and_five_lines_say_them(run, tmp_path):
    ended = run(CLEAN)
    assert ended.code == 0, ended.err
    found, samples = report(tmp_path), read_samples(tmp_path / "runs" / "r" / "sft")
    lengths = sorted(len(sample["input_ids"]) for sample in samples)
    labels = Counter(label for sample in samples for label in sample["labels"] if label != -100)
    assert (found["num_rows_read"], found["num_rows"]) == (10, 10)
    assert found["num_tokens"] == sum(lengths) and found["num_trained_tokens"] == labels.total()
    assert (found["length_quantiles"]["0"], found["length_quantiles"]["1"]) == (lengths[0], lengths[-1])
    assert found["length_quantiles"]["0.5"] in lengths[4:6]
    vocabulary = len(read_json(tmp_path / "runs" / "r" / "sft" / "output" / "tokenizer.json")["model"]["vocab"]) + 3
    assert found["shares"]["untrained_vocabulary"] == pytest.approx(1 - len(labels) / vocabulary)
    assert found["exceeded"] == [] and set(found["counts"].values()) == {0}
    assert len(found["summary"]) == 5
    for line in found["summary"]:
        assert f"  {line}\n" in ended.out
    assert f"{sum(lengths):,} tokens, {labels.total():,} of them trained" in found["summary"][1]


def test_padding_is_what_batches_of_like_lengths_need(run, tmp_path):
    padded = "stages.sft.layout=padded"
    lone = run(CLEAN, padded, "stages.sft.micro_batch_tokens=1")
    assert lone.code == 0 and report(tmp_path)["shares"]["padding"] == 0
    unlike = [("a?", "b"), ("c?", "d " * 50)]
    ended = run(unlike, "run=r2", padded, "stages.sft.preflight.padding=0.2")
    lengths = [len(sample["input_ids"]) for sample in read_samples(tmp_path / "runs" / "r2" / "sft")]
    share = 1 - sum(lengths) / (2 * max(lengths))
    assert refused(ended).startswith(f"error: stages.sft: {share:.0%} of what a step computes is padding, over 20%; set stages.sft.layout")
    assert run(unlike, "run=r3", "stages.sft.preflight.padding=0").code == 0, "no row is filled up unless the config asks for it"


def test_duplicates_are_refused_with_the_row_that_they_repeat(run, tmp_path):
    line = refused(run([*CLEAN, CLEAN[3]]))
    assert line.startswith("error: stages.sft: 1 rows of chat, 9.1% and over 5.0%, are the same as an earlier one")
    assert f"{tmp_path}/data.jsonl:11: is the same as {tmp_path}/data.jsonl:4" in line
    assert "stages.sft.preflight.duplicates" in line
    assert not (tmp_path / "runs" / "r" / "sft" / "output").exists()
    assert run([*CLEAN, CLEAN[3]], "stages.sft.preflight.duplicates=0.1").code == 0
    assert report(tmp_path)["counts"]["duplicates"] == 1


def test_a_row_that_asks_what_an_evaluation_asks_is_refused_whatever_its_case_and_spaces(run, tmp_path):
    line = refused(run(CLEAN, heldout=[("new?", "x"), ("What  is 7?", "some other answer")]))
    assert "1 rows of chat, 10.0% and over 0.0%, ask what evaluation data ask (heldout)" in line
    assert f"{tmp_path}/data.jsonl:8: asks what {tmp_path}/heldout.jsonl:2 of heldout asks" in line
    assert report(tmp_path)["held_out"] == {"heldout": 1}
    assert run(CLEAN, "stages.sft.preflight.held_out=0.1", heldout=[("What  is 7?", "x")]).code == 0


def test_a_row_that_an_evaluation_would_refuse_is_told_before_anything_is_trained(run, tmp_path):
    rows = [("new?", ""), ("newer?", "x")]
    line = refused(run(CLEAN, heldout=rows))
    assert f"{tmp_path}/heldout.jsonl:1: completion: is empty" in line
    assert line.endswith("(in heldout, which is measured on later; `invalid_rows: drop` there leaves such rows out)")
    assert run(CLEAN, "sources.heldout.invalid_rows=drop", heldout=rows).code == 0


def test_a_source_is_kept_apart_from_its_own_held_out_side(run, tmp_path):
    overrides = ["sources.chat.held_out=0.3", "sources.chat.part=train"]
    heldout = [f"sources.heldout.{key}" for key in (f"data={tmp_path}/data.jsonl", "held_out=0.3", "part=held_out")]
    assert run(CLEAN, *overrides, *heldout).code == 0
    assert "0 asked in evaluation data (heldout)" in report(tmp_path)["summary"][3]


def test_a_data_set_that_is_wired_to_training_and_evaluation_is_said_and_not_refused(run, tmp_path):
    assert run(CLEAN, "stages.eval.inputs.data=[chat, heldout]").code == 0
    assert "0 asked in evaluation data (heldout); chat itself is measured on too" in report(tmp_path)["summary"][3]
    again = [*CLEAN, ("another?", "thing")]
    assert "ask what evaluation data ask (heldout)" in refused(run(again, "run=other", "stages.eval.inputs.data=[chat, heldout]"))


def test_rows_over_max_length_are_refused_dropped_or_cut(run, tmp_path):
    long = [*CLEAN, ("long?", "word " * 200)]
    assert "data.jsonl:11: " in (line := refused(run(long))) and "over stages.sft.max_length: 120; raise it, or set" in line
    longer = [*long, ("longer?", "word " * 300)]
    line = refused(run(longer))
    needed = re.search(
        r"max_length: 120, as are 1 more of 12 rows; raise it, to (\S+) for all of them, or set stages.sft.on_overflow", line
    )
    assert "data.jsonl:11: " in line and needed, line
    assert run(longer, f"stages.sft.max_length={needed[1].replace(',', '')}", "run=roomy").code == 0, "so it is as many as are needed"
    assert "1 rows of chat, 9.1% and over 5.0%, are over stages.sft.max_length" in refused(
        run(long, "stages.sft.on_overflow=drop", "stages.sft.preflight.over_max_length=0.05")
    )
    assert run(long, "stages.sft.on_overflow=drop").code == 0
    assert report(tmp_path)["counts"] == {**dict.fromkeys(report(tmp_path)["counts"], 0), "over_max_length": 1}


def test_answers_cut_before_their_stop_token_are_refused(run, tmp_path):
    long = [*CLEAN, ("long?", "word " * 200)]
    line = refused(run(long, "stages.sft.on_overflow=truncate", "stages.sft.preflight.unstopped=0.05"))
    assert "1 rows of chat, 9.1% and over 5.0%, have an answer that is cut before its stop token" in line
    assert run(long, "stages.sft.on_overflow=truncate").code == 0
    assert report(tmp_path)["counts"]["unstopped"] == 1
    assert "but for 1 cut off" in report(tmp_path)["summary"][4]


def test_pairs_that_a_cut_makes_the_same_are_refused(run, tmp_path):
    pairs = [(*row, "no") for row in CLEAN]
    cut = [*pairs, ("long?", "word " * 200 + "a", "word " * 200 + "b")]
    truncate = ("stages.dpo.on_overflow=truncate",)
    assert "data.jsonl:11: cut to stages.dpo.max_length: 120, nothing tells chosen and rejected apart" in refused(run(cut, *truncate))
    assert run(cut, *truncate, "stages.dpo.preflight.identical=0.1").code == 0
    found = report(tmp_path, "dpo")
    assert (found["num_rows_read"], found["num_rows"], found["counts"]["identical"]) == (11, 10, 1)
    assert run([*pairs, ("q?", "same", "same")]).code == 2


def test_rows_that_the_template_refuses_can_be_left_out(run, tmp_path):
    rows = [*CLEAN, ("what?", "<|im_end|> in the middle")]
    assert "data.jsonl:11: messages[1] holds '<|im_end|>'" in refused(run(rows))
    assert run(rows, "stages.sft.preflight.refused=0.1").code == 0
    assert report(tmp_path)["counts"]["refused"] == 1
    assert report(tmp_path)["examples"]["refused"].startswith(f"{tmp_path}/data.jsonl:11: messages[1] holds")


def test_a_limit_that_is_tightened_holds_for_data_prepared_under_a_looser_one(run, tmp_path):
    rows = [*CLEAN, ("what?", "<|im_end|> in the middle")]
    assert run(rows, "stages.sft.preflight.refused=0.1").code == 0
    line = refused(run(rows, "run=strict", "stages.sft.seed=1"))
    assert "1 rows of chat, 9.1% and over 0.0%, cannot be rendered by the chat template" in line and "data.jsonl:11" in line


def test_limits_do_not_change_what_a_stage_is(run, tmp_path, posttrain):
    assert run(CLEAN).code == 0
    ended = posttrain("plan", tmp_path / "p.yaml", "--root", tmp_path / "runs", "--json", "stages.sft.preflight.padding=0.9")
    assert [row["action"] for row in json.loads(ended.out)] == ["skip", "run"]


@pytest.mark.parametrize("value", ["1.5", "-0.1", "yes"])
def test_a_limit_is_a_share(run, value):
    assert refused(run(CLEAN, f"stages.sft.preflight.padding={value}")).startswith("error: stages.sft.preflight.padding: ")
