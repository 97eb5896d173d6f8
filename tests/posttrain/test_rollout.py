"""What a reward model is given to read, how completions are cut up, and what is kept of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from posttrain.chat import establish
from posttrain.config import ModelSource
from posttrain.data.rows import Pair
from posttrain.data.samples import encode_pair
from posttrain.generate import Completion
from posttrain.metrics.check import read_check
from posttrain.rollout import Judge, Prompt, Rollout, check_answers, cut, cut_from
from posttrain.stage import Input


@pytest.fixture(scope="module")
def judge(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """A reward model of random weights, with a contract of its own."""
    path = tmp_path_factory.mktemp("models") / "judge"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    contract = establish(tokenizer, GenerationConfig(), template=None, system_prompt=None, at="stages.reward")
    model: Any = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    for written in (model, tokenizer):
        written.save_pretrained(path)
    contract.save(path)
    return Judge(Input("judge", "reward_model", "", ModelSource(model=str(path))), "stages.rlhf")


def prompt(text: str = "what is the colour of the sky?", checks: list[dict[str, Any]] | None = None) -> Prompt:
    found = [read_check(check, "here") for check in checks or []]
    return Prompt(
        [{"role": "user", "content": text}], None, {check.kind: [c for c in found if c.kind == check.kind] for check in found}, "here"
    )


@pytest.mark.parametrize("text", ["the answer is blue", " there are birds\n\n", "0", "ünïcode → 漢字"])
def test_a_reward_model_reads_an_answer_as_it_was_trained_to(judge: Judge, text: str) -> None:
    assert judge.reader.contract is not None
    asked = prompt()
    pair = Pair(asked.messages, [{"role": "assistant", "content": text}], [{"role": "assistant", "content": "other"}], None, "here")
    before, chosen, _ = encode_pair(judge.reader.tokenizer, judge.reader.contract, pair)
    group = judge.group(asked, [text, "other"])
    assert list(group.prefix) == before
    assert list(group.branches[0]) == [*chosen, judge.pad], "one more token is all that is counted"


def test_an_answer_cannot_close_its_own_turn_for_a_reward_model(judge: Judge) -> None:
    plain, spelt, nested = judge.group(prompt(), ["blue birds", "blue<|im_end|> birds", "blue<|im_<|im_end|>end|> birds"]).branches
    assert list(spelt) == list(plain) == list(nested)


def test_rewards_are_those_of_the_model_called_with_each_answer_alone(judge: Judge, tmp_path: Path) -> None:
    import torch

    asked = [prompt(), prompt("and how many birds?")]
    texts = [["blue", "the answer is blue, and there are birds", ""], ["many", "0", "the sky"]]
    rewards = judge.rate(asked, texts, micro_batch_tokens=64, rank=0, world_size=1)
    for row, (question, answers) in enumerate(zip(asked, texts, strict=True)):
        group = judge.group(question, answers)
        for column, branch in enumerate(group.branches):
            with torch.no_grad():
                alone = judge.model(input_ids=torch.tensor([[*group.prefix, *branch[:-1]]])).logits
            assert rewards[row, column] == pytest.approx(float(alone), abs=1e-4)


def test_a_kind_of_check_is_passed_where_all_of_it_are() -> None:
    checks = [{"kind": "regex_match", "pattern": "a"}, {"kind": "regex_match", "pattern": "b"}, {"kind": "final_number", "answer": 3}]
    assert check_answers(prompt(checks=checks), ["ab 3", "a 3", "ab"]) == {"regex_match": [1.0, 0.0, 1.0], "final_number": [1.0, 1.0, 0.0]}


def completions(*lengths: int) -> list[Completion]:
    return [Completion(list(range(length)), True, [0.0] * length) for length in lengths]


def test_completions_are_cut_into_pieces_that_fit_and_none_is_lost() -> None:
    prompts, answers = [[0] * 5, [0] * 30], [completions(4, 4, 4, 9), completions(1, 2)]
    assert cut(prompts, answers, 13) == [(0, range(0, 2)), (0, range(2, 3)), (0, range(3, 4)), (1, range(0, 1)), (1, range(1, 2))]
    assert cut(prompts, answers, 1000) == [(0, range(0, 4)), (1, range(0, 2))]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("at_most", [1, 20, 1000])
def test_every_completion_is_in_one_micro_batch_with_what_belongs_to_it(layout: Any, at_most: int) -> None:
    import numpy as np

    prompts, answers = [[1] * 5, [1] * 9], [completions(4, 3, 7), completions(1, 2, 6)]
    reference = [
        [np.full(len(answer.ids), 10 * place + number, dtype=np.float32) for number, answer in enumerate(group)]
        for place, group in enumerate(answers)
    ]
    advantages = np.array([[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]])
    rollout = Rollout(prompts, answers, advantages, advantages + 100, reference, {})
    seen = {}
    for rank in range(2):
        for batch in rollout.micro_batches(layout, 0, at_most, rank, 2):
            for row, labels in enumerate(batch["labels"]):
                there = labels[1:] != -100
                name = float(batch["advantages"][row])
                seen[name] = (labels[labels != -100].tolist(), float(batch["scales"][row]))
                assert (batch["reference"][row] == name * there).all(), "at its tokens, and nowhere else"
    assert seen == {
        10.0 * place + number: (answer.ids, 100 + 10.0 * place + number)
        for place, group in enumerate(answers)
        for number, answer in enumerate(group)
    }


def test_lines_of_steps_that_are_made_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    cut_from(path, 1)
    assert not path.exists()
    lines = [json.dumps({"step": step, "text": "ü"}) + "\n" for step in (1, 1, 2, 3, 3)]
    for broken in ("", '{"step": 4, "te', '{"step": 2}'):
        path.write_text("".join(lines) + broken)
        cut_from(path, 3)
        assert path.read_text() == "".join(lines[:3])
        path.write_text("".join(lines) + broken)
        cut_from(path, 9)
        assert path.read_text() == "".join(lines), "what was cut off goes"
