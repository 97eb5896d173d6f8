"""`inspect` shows rows as the model sees them: every token, which are trained, which are cut, and what is left out."""

import html.parser
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.disk import read_json
from tests.conftest import Ended, read_samples

Cli = Callable[..., Ended]


@pytest.fixture
def inspect(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> Callable[..., Ended]:
    def call(stage: str, *arguments: object) -> Ended:
        return posttrain("inspect", pipeline_file, stage, "--root", tmp_path / "runs", *arguments)

    return call


def rows_of(ended: Ended) -> list[dict[str, Any]]:
    assert ended.code == 0, ended.err
    rows: list[dict[str, Any]] = json.loads(ended.out)
    return rows


def test_it_shows_what_is_then_trained(inspect, posttrain, pipeline_file, tmp_path):
    shown = rows_of(inspect("sft", "--json", "--num-rows", "24"))
    assert posttrain("run", pipeline_file, "--root", tmp_path / "runs", "--only", "sft", "stages.sft.max_steps=1").code == 0
    stage = tmp_path / "runs" / "test" / "sft"
    tokenizer = AutoTokenizer.from_pretrained(stage / "output")
    for row, sample in zip(shown, read_samples(stage), strict=True):
        assert set(row) == {"row", "tokens", "ids", "trained"} and row["row"] == sample["row"]
        assert row["ids"] == sample["input_ids"]
        assert row["trained"] == [label != -100 for label in sample["labels"]]
        assert "".join(row["tokens"]) == tokenizer.decode(row["ids"])
        assert len(row["tokens"]) == len(row["ids"])


def test_a_pair_has_one_such_object_for_each_answer(inspect, posttrain, pipeline_file, tmp_path):
    """Before sft has run, under the contract that sft will establish."""
    shown = rows_of(inspect("dpo", "--json", "--num-rows", "16"))
    assert posttrain("run", pipeline_file, "--root", tmp_path / "runs", "--until", "dpo").code == 0
    assert rows_of(inspect("dpo", "--json", "--num-rows", "16")) == shown, "and after it, under the one that it published"
    for row, sample in zip(shown, read_samples(tmp_path / "runs" / "test" / "dpo"), strict=True):
        assert set(row) == {"row", "chosen", "rejected"}
        for name in ("chosen", "rejected"):
            assert set(row[name]) == {"row", "tokens", "ids", "trained"} and row[name]["row"] == row["row"]
            assert row[name]["ids"] == sample["prompt_ids"] + sample[f"{name}_ids"]
            assert sum(row[name]["trained"]) == len(sample[f"{name}_ids"]) and row[name]["trained"][-1]


def test_rows_are_chosen_by_number_or_by_length(inspect):
    rows = rows_of(inspect("sft", "--json", "--num-rows", "24"))
    assert [row["row"] for row in rows_of(inspect("sft", "--json", "--row", "7", "--row", "2"))] == [7, 2]
    longest = sorted(rows, key=lambda row: (-len(row["ids"]), row["row"]))[:4]
    assert rows_of(inspect("sft", "--json", "--worst", "length", "--num-rows", "4")) == longest


def test_the_worst_by_loss_are_those_of_a_plain_forward(inspect, posttrain, pipeline_file, tmp_path):
    assert posttrain("run", pipeline_file, "--root", tmp_path / "runs", "--until", "sft").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "test" / "sft" / "output", dtype=torch.float32)
    losses = []
    rows = rows_of(inspect("dpo", "--json", "--num-rows", "16"))
    for row in rows:
        ids = torch.tensor([row["chosen"]["ids"]])
        labels = torch.where(torch.tensor([row["chosen"]["trained"]]), ids, -100)
        losses.append((model(ids, labels=labels).loss.item(), row["row"]))
    worst = rows_of(inspect("dpo", "--json", "--worst", "loss", "--num-rows", "3"))
    assert [row["row"] for row in worst] == [number for _, number in sorted(losses, reverse=True)[:3]]


def test_what_is_cut_is_marked_and_not_in_what_the_model_sees(inspect):
    overrides = ("stages.sft.max_length=70", "stages.sft.on_overflow=truncate")
    (whole,) = rows_of(inspect("sft", "--json", "--row", "3"))
    (cut,) = rows_of(inspect("sft", "--json", "--row", "3", *overrides))
    assert cut["ids"] == whole["ids"][:70] and len(whole["ids"]) > 70
    out = inspect("sft", "--row", "3", *overrides).out
    assert f"{len(whole['ids'])} tokens, {sum(cut['trained'])} trained, {len(whole['ids']) - 70} cut off" in out
    assert out.count("✂") == 2 and out.rstrip().endswith("✂"), "one piece, up to the end"


def test_rows_that_will_be_left_out_or_refused_say_why(inspect):
    dropped = inspect("sft", "--row", "3", "stages.sft.max_length=40", "stages.sft.on_overflow=drop")
    assert "left out: " in dropped.out and "over stages.sft.max_length: 40" in dropped.out
    refused = inspect("sft", "--row", "3", "stages.sft.max_length=40")
    assert refused.code == 0 and "refused: " in refused.out and "set stages.sft.on_overflow" in refused.out


def test_without_colours_trained_text_stands_in_brackets(inspect):
    out = inspect("sft", "--row", "1").out
    assert "⟪the colour is green, as the sky<|im_end|>⟫" in out and "<|im_start|>user\nwhat is the colour of bird 1?" in out


class Text(html.parser.HTMLParser):
    """The text of spans, by class."""

    def __init__(self) -> None:
        super().__init__()
        self.classes: list[str] = []
        self.text: dict[str, str] = {}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "span":
            self.classes.append(dict(attributes).get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self.classes.pop()

    def handle_data(self, data: str) -> None:
        for name in self.classes[-1].split() if self.classes else []:
            self.text[name] = self.text.get(name, "") + data


def test_the_page_holds_the_same_and_escapes_what_data_say(inspect, tmp_path, chat_file, tiny):
    data = tmp_path / "evil.jsonl"
    data.write_text(json.dumps({"prompt": "<script>alert(1)</script>", "completion": "a <b> & c\n"}) + "\n")
    page = tmp_path / "page.html"
    ended = inspect("sft", f"sources.chat.data={data}", "--html", page)
    assert ended.code == 0 and str(page) in ended.out
    text = page.read_text()
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")
    parser = Text()
    parser.feed(text)
    assert parser.text["t"].endswith("a <b> & c\n<|im_end|>")


@pytest.mark.parametrize(
    ("stage", "arguments", "words"),
    [
        ("sfd", (), "sfd: no such stage; did you mean 'sft'?"),
        ("eval", (), "eval: stages of the kind eval train on no rows"),
        ("sft", ("--row", "99"), "--row 99: stages.sft: chat has no row of that number"),
        ("sft", ("--row", "1", "--worst", "length"), "--row 1: leaves nothing for --worst to choose"),
    ],
)
def test_a_wrong_question_is_one_line(inspect, stage, arguments, words):
    ended = inspect(stage, *arguments)
    assert ended.code == 2 and words in ended.err and len(ended.err.splitlines()) == 1


@pytest.mark.real
def test_it_needs_no_weights(posttrain, shared, tmp_path):
    (tmp_path / "p.yaml").write_text(
        f"""
run: r
sources:
  base: {{model: {shared}/models/smollm2}}
  chat: {{data: {shared}/data/llamafactory_demo/glaive_toolcall_en_demo.json}}
stages:
  sft: {{inputs: {{policy: base, data: chat}}}}
"""
    )
    assert not list((shared / "models" / "smollm2").glob("*.safetensors"))
    ended = posttrain("inspect", tmp_path / "p.yaml", "sft", "--root", tmp_path / "runs", "--json", "--num-rows", "5")
    rows = rows_of(ended)
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 4]
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "smollm2")
    assert any(any(row["trained"]) for row in rows)
    for row in rows:
        assert "".join(row["tokens"]) == tokenizer.decode(row["ids"])
    ended = posttrain("inspect", tmp_path / "p.yaml", "sft", "--root", tmp_path / "runs", "--worst", "loss")
    assert ended.code == 2 and "no model directory with safetensors weights" in ended.err
    assert read_json(tmp_path / "runs" / "r" / "sft" / "stage.json") is None
