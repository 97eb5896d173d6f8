"""IFD and rewards against plain passes of the models, a row at a time; the judge against a real HTTP server."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from posttrain.config import ModelSource, validate
from posttrain.curate.judge import Judge, read_mark
from posttrain.curate.quality import Quality, Reward
from posttrain.curate.scored import keep_number
from posttrain.curate.step import Bench, Outcome
from posttrain.data.rows import Conversation, Message, Row
from posttrain.error import UserError
from posttrain.models import load_policy, load_tokenizer
from posttrain.stage import Input
from tests.posttrain.curate.bench import candidates_of, chat, pair
from tests.posttrain.curate.measured import ask, make_bench, policy
from tests.posttrain.judge_server import Server

COLOURS = ["red", "green", "blue", "black", "white", "grey", "pink", "brown"]
ROWS = [chat(f"the colour is {COLOURS[n % 8]}" + ", as the sky" * (n % 5), f"what is the colour of bird {n}?") for n in range(24)]


def kept(outcome: Outcome) -> list[int]:
    """Positions of the kept rows."""
    return [(candidate.index - 10) // 2 for candidate in outcome.kept]


def reasons(outcome: Outcome) -> dict[int, str]:
    """Position of each dropped row to the reason."""
    return {(drop.index - 10) // 2: drop.reason for drop in outcome.dropped}


# IFD.


def plain_ifd(path: Path, rows: Sequence[tuple[str, str]]) -> list[float]:
    """Mean loss of the answer and its stop token after the ChatML prompt, divided by that after BOS alone."""
    tokenizer, contract = load_tokenizer(policy(path), "test")
    model = load_policy(policy(path).model, tokenizer, contract, "test", dtype=torch.float32).eval()

    def mean_loss(before: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            logps = model(torch.tensor([before + answer])).logits[0].log_softmax(-1)
        return -sum(float(logps[len(before) + place - 1, token]) for place, token in enumerate(answer)) / len(answer)

    scores = []
    for asked, answer in rows:
        before = tokenizer(asked, add_special_tokens=False).input_ids
        both = tokenizer(f"{asked}{answer}<|im_end|>", add_special_tokens=False).input_ids
        assert both[: len(before)] == before
        ids = both[len(before) :]
        scores.append(mean_loss(before, ids) / mean_loss([tokenizer.bos_token_id], ids))
    return scores


def in_chatml(row: Conversation) -> tuple[str, str]:
    """What stands before the last answer, and the answer."""
    *asked, answer = row.messages
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in asked) + "<|im_start|>assistant\n", answer["content"]


def scores_of(step: Quality, rows: Sequence[Row], bench: Bench) -> list[float]:
    answers, _ = step._encode(candidates_of(rows), bench)
    return [float(after / alone) for after, alone in step.losses(answers, bench)]


def test_ifd_is_that_of_plain_passes(tiny: Path, tmp_path: Path):
    turns: list[Message] = [{"role": "user", "content": "hello?"}, {"role": "assistant", "content": "and there are birds"}]
    rows = [*ROWS, Conversation([*turns, *ROWS[3].messages], None, [], "x.jsonl:25")]
    expected = plain_ifd(tiny, [in_chatml(row) for row in rows])
    assert scores_of(Quality(), rows, make_bench(tmp_path, policy=policy(tiny))) == pytest.approx(expected, rel=1e-4)


def test_ifd_of_a_real_model_is_that_of_plain_passes(stories: Path, tmp_path: Path):
    rows = [chat("Once upon a time, there was a little bird.", "Tell me a story."), chat("Lily saw a big dog in the park.", "Go on.")]
    bos = AutoTokenizer.from_pretrained(stories).bos_token
    expected = plain_ifd(stories, [(bos + asked, answer) for asked, answer in map(in_chatml, rows)])
    assert scores_of(Quality(), rows, make_bench(tmp_path, policy=policy(stories))) == pytest.approx(expected, rel=1e-4)


def test_misaligned_rows_are_dropped_and_the_most_difficult_are_kept(tiny: Path, tmp_path: Path):
    bench = make_bench(tmp_path, policy=policy(tiny))
    ifd = plain_ifd(tiny, [in_chatml(row) for row in ROWS])
    aligned = [number for number, score in enumerate(ifd) if score < 1]
    assert 3 < len(aligned) < len(ROWS)
    outcome = Quality().run(candidates_of(ROWS), bench)
    assert kept(outcome) == aligned
    assert set(reasons(outcome).values()) == {"quality: instruction does not help"}
    assert outcome.facts["scores"]["highest"] == pytest.approx(max(ifd), rel=1e-4)
    best = sorted(sorted(aligned, key=lambda number: -ifd[number])[:3])
    outcome = Quality(keep=3).run(candidates_of(ROWS), bench)
    assert kept(outcome) == best
    assert Counter(reasons(outcome).values())["quality: not among the best"] == len(aligned) - 3
    least = sorted(ifd[number] for number in aligned)[1] - 1e-5
    assert set(kept(Quality(min=least).run(candidates_of(ROWS), bench))) == {number for number in aligned if ifd[number] > least}
    assert set(kept(Quality(max=least).run(candidates_of(ROWS), bench))) == {number for number in aligned if ifd[number] < least}


def test_of_a_pair_the_chosen_answer_counts(tiny: Path, tmp_path: Path):
    pairs = [pair(row.messages[1]["content"], "no", prompt=row.messages[0]["content"]) for row in ROWS]
    of_pairs = scores_of(Quality(), pairs, make_bench(tmp_path / "pairs", policy=policy(tiny)))
    assert of_pairs == pytest.approx(scores_of(Quality(), ROWS, make_bench(tmp_path / "rows", policy=policy(tiny))), rel=1e-6)


def test_what_has_no_answer_to_score_is_dropped_for_that(tiny: Path, tmp_path: Path):
    context_only = [*ROWS[0].messages[:1], {**ROWS[0].messages[1], "train": False}]
    rows = [
        ROWS[0],
        ask("and why?"),
        Conversation(context_only, None, [], "x.jsonl:3"),
        chat("blue", "what <|im_end|> is it?", origin="x.jsonl:4"),
        chat("blue", "why? " * 100),
    ]
    outcome = Quality(max_length=40).run(candidates_of(rows), make_bench(tmp_path, policy=policy(tiny)))
    assert {row: reason for row, reason in reasons(outcome).items() if row} == {
        1: "quality: no answer",
        2: "quality: no answer",
        3: "quality: refused by the chat template",
        4: "quality: no room for the answer",
    }
    assert "x.jsonl:4: messages[0] holds '<|im_end|>'" in next(drop.detail for drop in outcome.dropped if drop.index == 16)


def test_an_answer_over_the_limit_is_scored_up_to_it(tiny: Path, tmp_path: Path):
    tokenizer, _ = load_tokenizer(policy(tiny), "test")
    row = chat("the colour is blue, and there are birds in the sky", "why?")
    prompt, answer = in_chatml(row)
    room = len(tokenizer(prompt, add_special_tokens=False).input_ids) + 5
    bench = make_bench(tmp_path, policy=policy(tiny))
    answers, _ = Quality(max_length=room)._encode(candidates_of([row]), bench)
    assert answers[0].ids == tokenizer(answer, add_special_tokens=False).input_ids[:5]
    assert Quality(max_length=room).run(candidates_of([row]), bench).facts["cut"] == 1


def test_a_resumed_stage_scores_nothing_again(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bench = make_bench(tmp_path, policy=policy(tiny))
    first = Quality(keep=5).run(candidates_of(ROWS), bench)
    monkeypatch.setattr("posttrain.curate.quality.open_policy", lambda bench: pytest.fail("it loads the model again"))
    assert Quality(keep=5).run(candidates_of(ROWS), bench) == first


# Reward.


@pytest.fixture(scope="module")
def reward_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of two layers with random weights."""
    path = tmp_path_factory.mktemp("models") / "reward"
    tokenizer, contract = load_tokenizer(policy(tiny), "test")
    tokenizer.save_pretrained(path)
    contract.save(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    return path


def reward_input(path: Path) -> Input:
    return Input("judge", "reward_model", "", ModelSource(model=str(path)))


def plain_rewards(path: Path, conversations: Sequence[Sequence[Message]]) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    rewards = []
    for messages in conversations:
        ids = tokenizer.apply_chat_template(list(messages), return_dict=False)
        ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]  # a reward model is trained up to the stop token
        with torch.no_grad():
            rewards.append(float(model(torch.tensor([ids])).logits[0, 0]))
    return rewards


def test_rewards_are_those_of_plain_passes_and_the_best_are_kept(reward_model: Path, tmp_path: Path):
    rewards = plain_rewards(reward_model, [row.messages for row in ROWS])
    bench = make_bench(tmp_path, reward=reward_input(reward_model))
    outcome = Reward(keep=0.25).run(candidates_of(ROWS), bench)
    assert kept(outcome) == sorted(sorted(range(24), key=lambda number: -rewards[number])[:6])
    assert outcome.facts["scores"]["highest"] == pytest.approx(max(rewards), abs=1e-5)
    assert outcome.facts["scores"]["lowest"] == pytest.approx(min(rewards), abs=1e-5)
    middle = sorted(rewards)[12]
    assert kept(Reward(min=middle - 1e-4).run(candidates_of(ROWS), bench)) == [n for n in range(24) if rewards[n] > middle - 1e-4]


def test_a_pair_is_dropped_where_the_model_prefers_the_rejected_answer_by_more_than_the_margin(reward_model: Path, tmp_path: Path):
    pairs = [pair(f"the colour is {COLOURS[n % 8]}", "there are birds" * (1 + n % 3), prompt=f"bird {n}?") for n in range(16)]
    chosen = plain_rewards(reward_model, [[*row.prompt, *row.chosen] for row in pairs])
    rejected = plain_rewards(reward_model, [[*row.prompt, *row.rejected] for row in pairs])
    differences = [b - a for a, b in zip(chosen, rejected, strict=True)]
    wrong = sorted(difference for difference in differences if difference > 0)
    margin = wrong[len(wrong) // 2] - 1e-4
    bench = make_bench(tmp_path, reward=reward_input(reward_model))
    outcome = Reward(margin=margin).run(candidates_of(pairs), bench)
    assert set(reasons(outcome)) == {number for number, difference in enumerate(differences) if difference > margin}
    assert set(reasons(outcome).values()) == {"reward: rejected scores higher"}
    assert kept(Reward().run(candidates_of(pairs), bench)) == list(range(16))


def test_what_is_too_long_or_has_no_answer_gets_no_reward(reward_model: Path, tmp_path: Path):
    rows = [ROWS[0], chat("sky " * 200), ask("and why?")]
    outcome = Reward(max_length=100).run(candidates_of(rows), make_bench(tmp_path, reward=reward_input(reward_model)))
    assert reasons(outcome) == {1: "reward: over 100 tokens", 2: "reward: no answer"}


def test_what_is_no_reward_model_is_refused(tiny: Path, reward_model: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"stages.curate: judge: .*tiny has no weights for score.weight"):
        Reward().run(candidates_of(ROWS), make_bench(tmp_path, reward=reward_input(tiny)))
    two = tmp_path / "two"
    AutoTokenizer.from_pretrained(reward_model).save_pretrained(two)
    config = LlamaConfig.from_pretrained(reward_model, num_labels=2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(two)
    with pytest.raises(UserError, match="has 2 labels"):
        Reward().run(candidates_of(ROWS), make_bench(tmp_path, reward=reward_input(two)))


# Judge.


def judge(server: Server, **settings: Any) -> Judge:
    return Judge.model_validate({"base_url": server.url, "model": "some-judge", **settings})


def mark_by_number(question: str, times: int) -> tuple[int, str]:
    """Bird n gets n % 10 + 1."""
    number = int(question.split("colour of bird ")[1].split("?")[0])
    return 200, f"It is an answer.\nScore: {number % 10 + 1}"


def test_a_judge_is_asked_once_for_each_row_and_the_best_are_kept(server: Server, tmp_path: Path):
    server.answer = mark_by_number
    outcome = judge(server, min=9).run(candidates_of(ROWS), make_bench(tmp_path))
    assert kept(outcome) == [8, 9, 18, 19]
    assert reasons(outcome)[0] == "judge: below 9"
    assert outcome.facts == {
        "scores": {"lowest": 1.0, "tenth": 1.3, "median": 5.0, "ninetieth": 8.7, "highest": 10.0} | outcome.facts["scores"],
        "without a mark": 0,
    }
    assert len(server.asked) == 24
    assert {(request["model"], request["temperature"], request["max_tokens"]) for request in server.asked} == {("some-judge", 0, 512)}
    assert server.times("what is the colour of bird 3?") == 1
    assert server.times("the colour is black, as the sky, as the sky, as the sky\n</answer>") == 1


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path):
    server.answer = lambda question, times: (429, "slow down") if times < 2 else (200, "Score: 8")
    outcome = judge(server, min=8).run(candidates_of(ROWS[:5]), make_bench(tmp_path))
    assert kept(outcome) == [0, 1, 2, 3, 4]
    assert len(server.asked) == 15


@pytest.mark.parametrize(("on_failure", "left"), [("keep", [0, 1, 2, 3]), ("drop", [0, 2])])
def test_garbage_is_counted_and_treated_as_the_config_says(on_failure: str, left: list[int], server: Server, tmp_path: Path):
    server.answer = lambda question, times: (200, "As a judge, I like it." if "bird 1" in question or "bird 3" in question else "9")
    outcome = judge(server, on_failure=on_failure, min=5).run(candidates_of(ROWS[:4]), make_bench(tmp_path))
    assert kept(outcome) == left
    assert outcome.facts["without a mark"] == 2
    assert set(reasons(outcome).values()) == ({"judge: no mark"} if on_failure == "drop" else set())


def test_garbage_ends_the_stage_where_that_is_asked_for(server: Server, tmp_path: Path):
    server.answer = lambda question, times: (200, "I like\nit.")
    with pytest.raises(UserError, match=r"stages.curate: judge.on_failure: no mark from 1 to 10 in 'I like it.'"):
        judge(server, on_failure="error").run(candidates_of(ROWS[:3]), make_bench(tmp_path))


def test_a_row_that_the_server_refuses_has_no_mark(server: Server, tmp_path: Path):
    server.answer = lambda question, times: (400, "too long, score 9") if "bird 1?" in question else (200, "Score: 6")
    outcome = judge(server, on_failure="drop").run(candidates_of(ROWS[:3]), make_bench(tmp_path))
    assert reasons(outcome) == {1: "judge: no mark"}


def test_a_resumed_stage_asks_nothing_twice(server: Server, tmp_path: Path):
    server.answer = lambda question, times: (401, "who are you?") if "bird 20?" in question else mark_by_number(question, times)
    with pytest.raises(UserError, match=r"stages.curate: judge.base_url: http://127.0.0.1:\d+/v1: .*who are you.*run again"):
        judge(server, num_requests=2).run(candidates_of(ROWS), make_bench(tmp_path))
    assert len(server.asked) > 16
    server.answer = mark_by_number
    outcome = judge(server, num_requests=2, min=9).run(candidates_of(ROWS), make_bench(tmp_path))
    assert kept(outcome) == [8, 9, 18, 19]
    times = Counter(request["messages"][0]["content"] for request in server.asked)
    assert {count for question, count in times.items() if "bird 20?" not in question} == {1}
    before = len(server.asked)
    judge(server, num_requests=2, min=9).run(candidates_of(ROWS), make_bench(tmp_path))
    assert len(server.asked) == before


def test_a_reply_that_was_cut_off_while_it_was_written_is_asked_for_again(server: Server, tmp_path: Path):
    bench = make_bench(tmp_path)
    judge(server).run(candidates_of(ROWS[:2]), bench)
    (marks,) = (bench.directory / "marks").iterdir()
    marks.unlink()
    replies = bench.directory / "replies-0.jsonl"
    replies.write_text(replies.read_text()[:-9])
    judge(server).run(candidates_of(ROWS[:2]), bench)
    assert len(server.asked) == 3
    assert len([line for line in replies.read_text().splitlines() if line.endswith("]")]) == 2


def test_of_a_pair_the_chosen_answer_is_judged_and_a_bare_prompt_is_not(server: Server, tmp_path: Path):
    rows = [pair("yes, {prompt}", "no", prompt="is {answer} blue?"), ask("and why?")]
    outcome = judge(server, prompt="Q: {prompt} A: {answer} Score?").run(candidates_of(rows), make_bench(tmp_path))
    assert [request["messages"][0]["content"] for request in server.asked] == ["Q: is {answer} blue? A: yes, {prompt} Score?"]
    assert reasons(outcome) == {1: "judge: no answer"}


def test_turns_before_the_answer_are_shown_with_their_roles(server: Server, tmp_path: Path):
    said = [("system", "Be kind."), ("user", "hello"), ("assistant", "hi"), ("user", "why?"), ("assistant", "because")]
    messages: list[Message] = [{"role": role, "content": content} for role, content in said]  # type: ignore[typeddict-item]
    judge(server, prompt="{prompt}|{answer}").run(candidates_of([Conversation(messages, None, [], "x:1")]), make_bench(tmp_path))
    shown = "system: Be kind.\n\nuser: hello\n\nassistant: hi\n\nuser: why?|because"
    assert server.asked[0]["messages"][0]["content"] == shown


def test_the_key_is_sent_and_written_nowhere(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step = judge(server, api_key_env="JUDGE_KEY_OF_THIS_TEST")
    with pytest.raises(UserError, match=r"steps\[0\].judge.api_key_env: the environment has no variable 'JUDGE_KEY_OF_THIS_TEST'"):
        step.check("steps[0].judge")
    monkeypatch.setenv("JUDGE_KEY_OF_THIS_TEST", "a very secret key")
    step.check("steps[0].judge")
    step.run(candidates_of(ROWS[:2]), make_bench(tmp_path))
    assert set(server.keys) == {"Bearer a very secret key"}
    assert not any(b"secret" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_a_judge_without_an_address_is_refused():
    with pytest.raises(UserError, match=r"judge.base_url: missing"):
        validate(Judge, {"model": "some-judge"}, "judge")
    with pytest.raises(UserError, match=r"judge.prompt: must hold \{answer\}"):
        validate(Judge, {"base_url": "http://x/v1", "model": "m", "prompt": "{prompt}"}, "judge")


def test_a_missing_library_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'judge: .*pip install "posttrain\[judge\]"'):
        Judge(base_url="http://x/v1", model="m").check("judge")


@pytest.mark.parametrize(
    ("reply", "mark"),
    [
        ("Score: 7", 7),
        ("It is good.\n**Score:** 8.5", 8.5),
        ("I would first say score: 3, but no.\nScore: 9/10", 9),
        ("10", 10),
        (" 6/10.", 6),
        ("Rating - 4", 4),
        ("Score: 0", math.nan),
        ("Score: 11", math.nan),
        ("It does 3 of 10 things.", math.nan),
        ("", math.nan),
        ("Score: high", math.nan),
    ],
)
def test_marks_are_read(reply: str, mark: float):
    assert read_mark(reply) == pytest.approx(mark, nan_ok=True)


# What all of them share.


def test_keep_is_a_number_or_a_share():
    assert [keep_number(keep, 30) for keep in (None, 5, 0.1, 1.0, 0.001, 100)] == [30, 5, 3, 30, 1, 100]


def test_limits_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match=r"quality.min: 0.9 is above max: 0.5"):
        validate(Quality, {"min": 0.9, "max": 0.5}, "quality")
