"""Eval against plain transformers, a row at a time."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from posttrain.disk import read_json
from posttrain.results import read_results
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


TURNS: list[list[dict[str, str]]] = [
    [{"role": "system", "content": "be brief"}, *({"role": "user", "content": text} for text in ("a bird?", "and two?", "why?"))],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "a sky?"},
        {"role": "user", "content": "blue?"},
    ],
]
CHECKS: list[list[dict[str, Any]]] = [
    [{"kind": "length_limits", "max_words": 1000, "turn": "each"}, {"kind": "exact_answer", "answer": "no model says this", "turn": 2}],
    [{"kind": "length_limits", "max_words": 1000}],
]
TEXTS = ["The sky is blue.", "Ein Vogel. " * 60]
WIDE_LENGTH = 160
"""`max_length`, which the second text is over."""
TEMPLATE = "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '\\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def rewarder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with random weights and a template of its own."""
    path = tmp_path_factory.mktemp("models") / "rewarder"
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.2, **sizes)).save_pretrained(
        path
    )
    return path


@pytest.fixture
def wide_file(pipeline_file: Path, rewarder: Path, tmp_path: Path) -> Path:
    """The pipeline, and an evaluation of rows with several turns, of plain text, of refusals and of pairs, with a reward model."""
    rows = {
        "turns": [{"messages": messages, "checks": checks} for messages, checks in zip(TURNS, CHECKS, strict=True)],
        "texts": [{"text": text} for text in TEXTS],
        "refusals": [{"prompt": f"bird {n}?", "checks": [{"kind": "refusal", "expected": n < 1}]} for n in range(3)],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = "".join(f"  {name}: {{data: {tmp_path}/{name}.jsonl}}\n" for name in rows)
    inputs = "{policies: [base, sft], data: [turns, texts, refusals, prefs], reward: rm}"
    wide = f"  wide: {{kind: eval, inputs: {inputs}, max_new_tokens: 8, max_length: {WIDE_LENGTH}, num_shown: 2}}\n"
    text = pipeline_file.read_text().replace("stages:\n", f"{sources}  rm: {{model: {rewarder}}}\nstages:\n", 1)
    pipeline_file.write_text(text + wide)
    return pipeline_file


@pytest.fixture
def chain(done: dict[str, Path], posttrain: Cli, wide_file: Path, checked_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "run" not in done:
        root = tmp_path_factory.mktemp("chain")
        ended = posttrain("run", wide_file, "--root", root, f"sources.chat.data={checked_file}")
        assert ended.code == 0, ended.err
        done["run"], done["shown"] = root / "test", root / "shown.txt"
        done["shown"].write_text(ended.out)
    return done["run"]


def results(run: Path, policy: str, measure: str, stage: str = "eval") -> list[dict[str, Any]]:
    rows = read_results(run / stage / "output")
    return [row for row in rows if row["policy"] == policy and row["measure"] == measure]


def metrics(run: Path, stage: str = "eval") -> dict[str, float]:
    return dict(read_json(run / stage / "artifact.json")["payload"]["metrics"])


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


def test_calibration_of_tokens_is_that_of_plain_transformers_over_all_of_them(chain: Path) -> None:
    for policy in ("sft", "dpo"):
        path = chain / policy / "output"
        tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
        confidence: list[float] = []
        right: list[bool] = []
        for n in range(4):
            prompt, answer = encode_answer(tokenizer, f"how many birds? {n}", f"there are {n}")
            with torch.no_grad():
                probs = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].softmax(-1)
            confidence += probs.max(-1).values.tolist()
            right += (probs.argmax(-1) == torch.tensor(answer)).tolist()
        bins = np.minimum((np.array(confidence) * 15).astype(int), 14)
        gaps = [abs(sum(confidence[i] - right[i] for i in np.flatnonzero(bins == number))) for number in range(15)]
        assert metrics(chain)[f"{policy}.token ECE"] == pytest.approx(sum(gaps) / len(bins), rel=1e-4)
    table = read_json(chain / "eval" / "output" / "table.json")
    told = {result["policy"]: result for result in table["results"] if result["metric"] == "token ECE"}
    assert told["base"]["low"] <= told["base"]["value"] <= told["base"]["high"]
    assert told["sft"]["difference"]["value"] == pytest.approx(told["sft"]["value"] - told["base"]["value"])


def test_preference_is_measured_on_whole_answers(chain: Path, pairs_file: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(chain / "dpo/output"), AutoModelForCausalLM.from_pretrained(chain / "dpo/output")
    margins = []
    for row in read_lines(pairs_file):
        chosen, rejected = (logp(model, *encode_answer(tokenizer, row["prompt"], row[side])) for side in ("chosen", "rejected"))
        margins.append(chosen - rejected)
    assert metrics(chain)["dpo.preference margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    assert metrics(chain)["dpo.preference accuracy"] == sum(margin > 0 for margin in margins) / len(margins)


def test_answers_are_those_of_greedy_decoding_one_by_one(chain: Path, pairs_file: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(chain / "sft/output"), AutoModelForCausalLM.from_pretrained(chain / "sft/output")
    prompts = [*(f"how many birds? {n}" for n in range(4)), *(row["prompt"] for row in read_lines(pairs_file))]
    answers = results(chain, "sft", "answer")
    assert [row["row"] for row in answers] == [*range(4), *range(4, 20, 2)], "all with checks, and eight of the others"
    for row in answers:
        ids, _ = encode_answer(tokenizer, prompts[row["row"]], "")
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


def test_two_ranks_measure_what_one_does(posttrain: Cli, wide_file: Path, tmp_path: Path) -> None:
    base = ("--only", "eval", "stages.eval.inputs={policies: [base], data: [chat, prefs, turns], reward: rm}")
    found = []
    for number in (1, 2):
        root = tmp_path / str(number)
        ended = posttrain("run", wide_file, "--root", root, *base, f"stages.eval.num_processes={number}")
        assert ended.code == 0, ended.err
        found.append(root / "test")
    assert metrics(found[1]) == pytest.approx(metrics(found[0]), rel=1e-5, abs=1e-6)
    assert [row["row"] for row in results(found[1], "base", "nll")] == [*range(24), 41]
    told = [[(row["row"], row["turn"], row["answer"]) for row in results(run, "base", "answer")] for run in found]
    assert told[0] == told[1] and told[0][-2:] == [(41, 1, told[0][-2][2]), (41, 2, told[0][-1][2])]
    assert [(row["row"], row["turn"]) for row in results(found[1], "base", "reward")] == [row[:2] for row in told[0]]


def test_some_rows_without_checks_are_answered_and_count_for_nothing(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> None:
    for number, found in ((3, [0, 13, 26]), (0, [])):  # of 24 conversations and 16 pairs
        run = tmp_path / str(number) / "test"
        options = ("--only", "eval", "stages.eval.inputs.policies=[base]", f"stages.eval.num_shown={number}")
        ended = posttrain("run", pipeline_file, "--root", run.parent, *options)
        assert ended.code == 0, ended.err
        answers = results(run, "base", "answer")
        assert [answer["row"] for answer in answers] == found
        assert all(answer["checks"] == [] for answer in answers)
        ends = {"answer tokens", "unstopped", "repetition", "looping"} if found else set()
        scored = {"nll", "token ECE", "preference accuracy", "preference margin", "preference ECE"}
        assert set(metrics(run)) == {f"base.{name}" for name in scored | ends}


def test_what_another_run_measured_is_not_measured_again(posttrain: Cli, wide_file: Path, checked_file: Path, chain: Path) -> None:
    root = chain.parent
    data = f"sources.chat.data={checked_file}"

    def measured_before(run: str, *overrides: str) -> set[str]:
        ended = posttrain("run", wide_file, "--until", "eval", "--root", root, f"run={run}", *overrides)
        assert ended.code == 0, ended.err
        logs = "".join(path.read_text() for path in (root / run / "eval" / "logs").rglob("rank_0.log"))
        return {name for name in ("base", "sft", "dpo") if f"{name}: measured before on the same rows" in logs}

    def found(run: Path, policy: str, measure: str) -> list[dict[str, Any]]:
        """Without what names files, which lie elsewhere."""
        return [{k: v for k, v in row.items() if k not in ("origin", "settings")} for row in results(run, policy, measure)]

    assert measured_before("other", data, "stages.dpo.beta=0.4") == {"base", "sft"}
    for policy in ("base", "sft"):
        for measure in ("nll", "chosen", "rejected", "answer"):
            assert found(root / "other", policy, measure) == found(chain, policy, measure) != []
    assert found(root / "other", "dpo", "chosen") != found(chain, "dpo", "chosen")
    assert measured_before("shorter", data, "stages.eval.max_new_tokens=3") == set()
    for pointer in json.loads((root / "other" / "eval" / "results.json").read_text())["paths"]:
        (Path(pointer) / "results.jsonl").write_text("{}\n")
    assert measured_before("again", data, "stages.dpo.beta=0.4", "stages.eval.seed=1") == set()
    assert found(root / "again", "base", "nll") == found(chain, "base", "nll")
    spared = posttrain("clean", "other", "--root", root, "--dry-run", "--json")
    assert ".results" not in spared.out.replace(".results/.old", ""), "runs point to them"


def test_a_policy_answers_turn_by_turn_with_its_own_answers_before_it(chain: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(chain / "sft/output"), AutoModelForCausalLM.from_pretrained(chain / "sft/output")
    answers = {(row["row"], row["turn"]): row["answer"] for row in results(chain, "sft", "answer", "wide") if row["row"] < len(TURNS)}
    assert list(answers) == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]
    for row, messages in enumerate(TURNS):
        text, turn = "", 0
        for message, following in zip(messages, [*messages[1:], {"role": "user"}], strict=True):
            text += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
            if message["role"] == following["role"] == "user":
                turn += 1
                ids = tokenizer(f"{text}<|im_start|>assistant\n", add_special_tokens=False, return_tensors="pt").input_ids
                whole = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
                assert answers[row, turn] == tokenizer.decode(whole, skip_special_tokens=True)
                text += f"<|im_start|>assistant\n{answers[row, turn]}<|im_end|>\n"


def test_checks_are_of_the_turns_that_they_name(chain: Path) -> None:
    verdicts = [(row["row"], row["turn"], row["verdicts"]) for row in results(chain, "base", "answer", "wide")]
    assert verdicts[:5] == [(0, 1, [1.0]), (0, 2, [1.0, 0.0]), (0, 3, [1.0]), (1, 1, []), (1, 2, [1.0])]


def test_what_is_forgotten_is_the_loss_on_plain_text_in_windows(chain: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(chain / "sft/output"), AutoModelForCausalLM.from_pretrained(chain / "sft/output")
    expected = []
    for text in TEXTS:
        ids, total = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids], 0.0
        for end in range(1, len(ids)):  # each token, after what its window has before it
            start = (end - 1) // (WIDE_LENGTH - 1) * (WIDE_LENGTH - 1)
            with torch.no_grad():
                total += float(model(torch.tensor([ids[start:end]])).logits[0, -1].log_softmax(-1)[ids[end]])
        expected.append((total, len(ids) - 1, len(text.encode())))
    assert expected[1][1] > WIDE_LENGTH
    found = [(row["logp"], row["num_tokens"], row["num_bytes"]) for row in results(chain, "sft", "text", "wide")]
    assert found == [pytest.approx(each, rel=1e-5) for each in expected]
    told = metrics(chain, "wide")
    logp, num_tokens, num_bytes = (sum(each) for each in zip(*expected, strict=True))
    assert told["sft.text nll"] == pytest.approx(-logp / num_tokens, rel=1e-5)
    assert told["sft.text bits per byte"] == pytest.approx(-logp / math.log(2) / num_bytes, rel=1e-5)


def test_rewards_are_the_reward_models_own_answer_by_answer(chain: Path, rewarder: Path, pairs_file: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(rewarder), AutoModelForSequenceClassification.from_pretrained(rewarder)

    def reward(messages: list[dict[str, str]]) -> float:
        text = "".join(f"[{message['role']}] {message['content']}\n" for message in messages)
        with torch.no_grad():
            return float(model(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids).logits[0, 0])

    answers = {(row["row"], row["turn"]): row["answer"] for row in results(chain, "sft", "answer", "wide")}
    rewards = {(row["row"], row["turn"]): row["score"] for row in results(chain, "sft", "reward", "wide")}
    assert set(rewards) == set(answers)
    *asked, last = TURNS[1]
    said = [{"role": "assistant", "content": answers[1, turn]} for turn in (1, 2)]
    assert rewards[1, 1] == pytest.approx(reward([*asked, said[0]]), abs=1e-4)
    assert rewards[1, 2] == pytest.approx(reward([*asked, said[0], last, said[1]]), abs=1e-4)
    assert metrics(chain, "wide")["sft.reward"] == pytest.approx(np.mean(list(rewards.values())))
    margins = []
    for row in read_lines(pairs_file):
        sides = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")
        ]
        margins.append(reward(sides[0]) - reward(sides[1]))
    found = metrics(chain, "wide")
    assert found["rm.preference accuracy"] == np.mean([margin > 0 for margin in margins])
    assert found["rm.reward margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    table = read_json(chain / "wide" / "output" / "table.json")
    assert table["columns"] == ["metric", "rows", "base", "sft"]
    assert any(note.startswith(f"rm: preference accuracy {found['rm.preference accuracy']:.3f} (") for note in table["notes"])


def test_a_reward_model_judges_by_the_mean_of_a_rows_rewards(posttrain: Cli, wide_file: Path, checked_file: Path, chain: Path) -> None:
    judge = ("run=judged", f"sources.chat.data={checked_file}", "stages.wide.judge={kind: reward}")
    ended = posttrain("run", wide_file, "--root", chain.parent, *judge)
    assert ended.code == 0, ended.err
    run = chain.parent / "judged"
    rewards: dict[str, dict[int, list[float]]] = {"base": {}, "sft": {}}
    for policy, by_row in rewards.items():
        for result in results(run, policy, "reward", "wide"):
            by_row.setdefault(result["row"], []).append(result["score"])
    assert any(len(scores) == 2 for scores in rewards["sft"].values()), "a row with two answers"
    gained = [round(np.mean(scores) - np.mean(rewards["base"][row]), 5) for row, scores in rewards["sft"].items()]
    outcomes = [0.5 + 0.5 * float(np.sign(gain)) for gain in gained]
    duels = results(run, "sft", "duel", "wide")
    assert [duel["outcome"] for duel in duels] == outcomes and len(duels) > len(results(chain, "sft", "reward", "wide"))
    found = metrics(run, "wide")
    assert found["sft.win_rate"] == pytest.approx(np.mean(outcomes)) and "sft.inconsistent_verdicts" not in found


def test_refusals_are_reported_where_they_should_be_and_where_they_should_not(chain: Path) -> None:
    found = metrics(chain, "wide")
    assert (found["sft.refusal"], found["sft.over_refusal"]) == (0.0, 0.0), "it never refuses"
    passed = [row["verdicts"] for row in results(chain, "sft", "answer", "wide") if row["origin"].rpartition("/")[2].startswith("refusals")]
    assert passed == [[0.0], [1.0], [1.0]]


def test_every_generation_has_its_settings_and_how_it_ended(chain: Path) -> None:
    answers = results(chain, "sft", "answer", "wide")
    for row in answers:
        settings = row["settings"]
        assert (settings["max_new_tokens"], settings["is_greedy"], settings["stop_tokens"]) == (8, True, ["<|im_end|>", "</s>"])
        assert len(settings["weights"]) == len(settings["contract"]) == 64
        assert row["num_tokens"] == 8 if not row["ended"] else row["num_tokens"] < 8
    other = results(chain, "base", "answer", "wide")[0]["settings"]
    assert other["weights"] != answers[0]["settings"]["weights"]
    found = metrics(chain, "wide")
    assert found["sft.answer tokens"] == np.mean([row["num_tokens"] for row in answers])
    assert found["sft.unstopped"] == np.mean([not row["ended"] for row in answers])


def test_a_conversation_that_grows_too_long_breaks_off_and_fails(posttrain: Cli, wide_file: Path, tmp_path: Path) -> None:
    inputs = "stages.wide.inputs={policies: base, data: turns}"
    ended = posttrain(
        "run", wide_file, "--root", tmp_path, "--only", "wide", inputs, "stages.wide.max_new_tokens=60", "stages.wide.max_length=125"
    )
    assert ended.code == 0, ended.err
    answers = [row for row in results(tmp_path / "test", "base", "answer", "wide") if row["row"] == 0]
    asked = [row["num_tokens"] > 0 or row["ended"] for row in answers]
    assert asked[0] and not asked[-1], "so many tokens hold the first answer and not the others"
    assert answers[-1]["verdicts"] == [0.0] and answers[-1]["answer"] == ""
    assert metrics(tmp_path / "test", "wide")["base.answers passed"] < 1


def test_rows_over_the_limit_are_left_out_and_counted(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> None:
    base = ("--only", "eval", "stages.eval.inputs={policies: base, data: chat}", "stages.eval.max_length=70")
    ended = posttrain("run", pipeline_file, "--root", tmp_path, *base)
    assert ended.code == 0, ended.err
    told = re.search(
        r"of 24 rows are over stages.eval.max_length: 70 and were left out, the first: \S+:\d+; raise it, to (\d+) ", ended.out
    )
    assert told, ended.out
    ended = posttrain("run", pipeline_file, "--root", tmp_path, "run=roomy", *base[:-1], f"stages.eval.max_length={told[1]}")
    assert ended.code == 0 and "left out" not in ended.out, "so it is as many as are needed"
    ended = posttrain("run", pipeline_file, "--root", tmp_path, "run=none", *base[:-1], "stages.eval.max_length=4")
    assert ended.code == 2 and f"all 24 rows are over stages.eval.max_length: 4; raise it, to {told[1]} for all" in ended.err, ended.err


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


def test_what_is_no_reward_model_and_what_only_eval_reads_are_refused_in_a_line(posttrain: Cli, wide_file: Path, tmp_path: Path) -> None:
    for options, said in (
        (("--only", "wide", "stages.wide.inputs={policies: base, data: prefs, reward: base}"), "base: "),
        (("--only", "sft", "stages.sft.inputs.data=texts"), "texts.jsonl:1: is plain text, and only eval reads that"),
    ):
        ended = posttrain("run", wide_file, "--root", tmp_path, *options)
        assert ended.code == 2 and said in ended.err and len(ended.err.strip().splitlines()) == 1, ended.err


def scaled(policy: Path, path: Path) -> Path:
    """A copy of a policy with other weights."""
    shutil.copytree(policy, path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(0.5, 1.5, len(model.model.norm.weight)))
    model.save_pretrained(path)
    return path


@pytest.fixture
def two_file(chain: Path, wide_file: Path, tmp_path: Path) -> Path:
    """An evaluation of two published policies, of which the second says other things, on the rows of `wide`."""
    text = wide_file.read_text().partition("stages:\n")[0]
    one, two = chain / "sft" / "output", scaled(chain / "sft" / "output", tmp_path / "two")
    sources = f"  one: {{model: {one}}}\n  two: {{model: {two}}}\nstages:\n"
    inputs = "{policies: [one, two], data: [turns, refusals, prefs]}"
    stage = f"  asked: {{kind: eval, inputs: {inputs}, max_new_tokens: 8, max_length: {WIDE_LENGTH}}}\n"
    path = tmp_path / "two.yaml"
    path.write_text(text + sources + stage)
    return path


ANSWER = ("row", "turn", "answer", "num_tokens", "ended", "verdicts")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_vllm_is_asked_for_the_answers_of_transformers(
    posttrain: Cli, with_vllm: Cli, two_file: Path, tmp_path: Path, num_processes: int
) -> None:
    log, ours, theirs = tmp_path / "log.jsonl", tmp_path / "ours", tmp_path / "theirs"
    ended = posttrain("run", two_file, "--root", ours)
    assert ended.code == 0, ended.err
    ended = with_vllm(
        *("run", two_file, "--root", theirs, "stages.asked.use_vllm=true", f"launcher.num_processes={num_processes}"), STAND_IN_LOG=log
    )
    assert ended.code == 0, ended.err
    for policy in ("one", "two"):
        plain, engine = (results(root / "test", policy, "answer", "asked") for root in (ours, theirs))
        assert len(plain) > 8
        assert [[row[name] for name in ANSWER] for row in engine] == [[row[name] for name in ANSWER] for row in plain]
        assert {row["settings"].pop("engine") for row in plain} == {f"transformers {transformers.__version__}"}
        assert {row["settings"].pop("engine") for row in engine} == {"vllm 0.25.0"}
        assert [row["settings"] for row in engine] == [row["settings"] for row in plain]
    assert metrics(theirs / "test", "asked") == pytest.approx(metrics(ours / "test", "asked"))
    said = {policy: [row["answer"] for row in results(theirs / "test", policy, "answer", "asked")] for policy in ("one", "two")}
    assert said["one"] != said["two"], "each has its own"

    told = read_lines(log)
    loads = [line for line in told if line["event"] == "load"]
    assert sorted(line["model"].rpartition("/")[2] for line in loads) == sorted(["output", "two"] * num_processes)
    for line in loads:
        mine = {other["pid"] for other in loads if other["of"] == line["of"]}
        assert not mine.intersection(line["beside"]), "the engine of the policy before is gone"
    assert sum(line["num_prompts"] for line in told if line["event"] == "generate") == sum(map(len, said.values()))


def test_what_vllm_answered_is_not_asked_again(with_vllm: Cli, two_file: Path, tmp_path: Path) -> None:
    first, log = tmp_path / "first.jsonl", tmp_path / "log.jsonl"
    command = ("run", two_file, "--root", tmp_path, "stages.asked.use_vllm=true")
    ended = with_vllm(*command, STAND_IN_LOG=first, STAND_IN_REFUSES=tmp_path / "two")
    assert ended.code == 2
    said = "stages.asked.use_vllm: vLLM does not load two (ValueError: no room for it); mend that, or set it to false"
    assert [said in line for line in ended.err.splitlines()] == [True]
    assert [line["event"] for line in read_lines(first)] == ["load", "generate", "generate", "generate", "load"], "three turns of the first"
    ended = with_vllm(*command, STAND_IN_LOG=log)
    assert ended.code == 0, ended.err
    assert {line["model"] for line in read_lines(log) if line["event"] == "load"} == {str(tmp_path / "two")}


REFUSED_OF_VLLM = {
    "it is not installed": ((), "vllm is not installed here; install it, or set it to false"),
    "ranks that hold a policy together": (
        ("stages.asked.ranks_per_policy=2", "launcher.num_processes=2"),
        "vLLM holds a policy on one rank, and ranks_per_policy: 2 spreads it over several; leave one of the two out",
    ),
    "tasks alone": (
        ("stages.asked.inputs={policies: one}", "stages.asked.tasks=[hellaswag]"),
        "has no effect without inputs.data, as transformers answers tasks; leave it out",
    ),
}


@pytest.mark.parametrize("name", REFUSED_OF_VLLM)
def test_vllm_is_refused_where_it_cannot_be_had(posttrain: Cli, two_file: Path, tmp_path: Path, name: str) -> None:
    overrides, said = REFUSED_OF_VLLM[name]
    ended = posttrain("run", two_file, "--root", tmp_path, "stages.asked.use_vllm=true", *overrides)
    assert (ended.code, f"stages.asked.use_vllm: {said}" in ended.err) == (2, True), ended.err


UNLIKE = {
    "a base without its tokens": (
        "stages.asked.inputs.policies=[one, base]",
        "base gets tokens from its chat contract that vLLM would not know",
    ),
    "more tokens than it reads": (
        "stages.asked.max_new_tokens=200",
        "one reads 256 tokens, and prompt and answer come to 360; shorten them",
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_vllm_is_not_asked_where_its_answers_would_be_others(with_vllm: Cli, two_file: Path, tmp_path: Path, name: str) -> None:
    override, said = UNLIKE[name]
    ended = with_vllm("run", two_file, "--root", tmp_path, "stages.asked.use_vllm=true", override)
    assert (ended.code, f"stages.asked.use_vllm: {said}" in ended.err) == (2, True), ended.err


def test_vllm_heeds_the_penalty_of_a_generation_config_and_its_stop_tokens_are_the_contracts(
    posttrain: Cli, with_vllm: Cli, two_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "two" / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "repetition_penalty": 1.5, "temperature": 0.3, "do_sample": True}))
    command = ("run", two_file, "stages.asked.inputs.policies=two", "stages.asked.max_new_tokens=16")
    for call, root, more in ((posttrain, "ours", ()), (with_vllm, "theirs", ("stages.asked.use_vllm=true",))):
        ended = call(*command, "--root", tmp_path / root, *more)
        assert ended.code == 0, ended.err
    plain, engine = (results(tmp_path / root / "test", "two", "answer", "asked") for root in ("ours", "theirs"))
    assert [[row[name] for name in ANSWER] for row in engine] == [[row[name] for name in ANSWER] for row in plain]
