"""What comes of sampled answers, held against the reward model's own scores, each answer by itself in plain transformers."""

import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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

from posttrain.config import DataSource
from posttrain.data.source import open_source
from posttrain.sampling import Answered, Prompt, choose
from tests.conftest import REPOSITORY, Ended, read_lines, read_samples
from tests.faults.harness import Chain, started

Cli = Callable[..., Ended]
FOREIGN_TEMPLATE = "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '\\n' }}{% endfor %}"
FILES = ("rows.jsonl", "answers.jsonl", "table.json")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that no stage made: another vocabulary, a template of its own, random weights, no pad token."""
    path = tmp_path_factory.mktemp("models") / "foreign"
    tokenizer: Any = AutoTokenizer.from_pretrained(REPOSITORY / "posttrain" / "quickstart" / "base")
    tokenizer.chat_template = FOREIGN_TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        initializer_range=0.2,
    )
    LlamaForSequenceClassification(config).save_pretrained(path)
    return path


PROMPTS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "what is the colour of bird 30?"}, {"role": "assistant", "content": "it is red"}]},
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "what is the colour of bird 31?"},
            {"role": "assistant", "content": "the colour is red"},
            {"role": "user", "content": "are there more?"},
            {"role": "assistant", "content": "there are 4"},
        ]
    },
]


@pytest.fixture(scope="module")
def head(tiny: Path, foreign: Path, chat_file: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The beginning of a pipeline file: a policy that has learned two dozen answers by heart, and a reward model."""
    here = tmp_path_factory.mktemp("sample")
    (here / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (here / "asked.jsonl").write_text("".join(json.dumps({"prompt": f"what is the colour of bird {n}?"}) + "\n" for n in range(16, 24)))
    training = "global_batch_size: 8, max_length: 128, lr_scheduler_type: constant, warmup_steps: 0"
    return f"""
run: r
sources:
  base: {{model: {tiny}}}
  foreign: {{model: {foreign}}}
  chat: {{data: {chat_file}}}
  turns: {{data: {here}/turns.jsonl}}
  asked: {{data: {here}/asked.jsonl, format: prompt}}
  prefs: {{data: {pairs_file}}}
stages:
  sft: {{inputs: {{policy: base, data: chat}}, {training}, learning_rate: 5e-3, num_train_epochs: 20}}
  reward: {{inputs: {{policy: sft, data: prefs}}, {training}, learning_rate: 1e-3, num_train_epochs: 4}}
"""


STAGES = """
  pairs: {kind: sample, inputs: {policy: sft, data: [prefs, turns, asked], reward: reward}, num_generations: 6, max_completion_length: 24}
  best: {kind: sample, inputs: {policy: sft, data: [turns, asked], reward: foreign}, output: best, num_generations: 6,
         max_completion_length: 24}
  all: {kind: sample, inputs: {policy: sft, data: [turns, asked]}, output: all, num_generations: 6, max_completion_length: 24}
  likeliest: {kind: sample, inputs: {policy: sft, data: asked}, output: all, num_generations: 1, max_completion_length: 24, top_k: 1}
  dpo: {inputs: {policy: sft, data: pairs}, max_steps: 1, max_length: 128}
  again: {kind: sft, inputs: {policy: sft, data: best}, max_steps: 1, max_length: 128}
  chosen: {kind: curate, inputs: {data: pairs}, steps: [exact_duplicates]}
"""


@pytest.fixture(scope="module")
def done() -> dict[str, Path]:
    """Filled by the first test that needs it."""
    return {}


@pytest.fixture
def chain(done: dict[str, Path], posttrain: Cli, head: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of all of `STAGES`."""
    if not done:
        here = tmp_path_factory.mktemp("chain")
        (here / "pipeline.yaml").write_text(head + STAGES)
        ended = posttrain("run", here / "pipeline.yaml", "--root", here / "runs")
        assert ended.code == 0, ended.err
        done["run"] = here / "runs" / "r"
    return done["run"]


def metrics(stage: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((stage / "artifact.json").read_text())["payload"]["metrics"]
    return found


def rewards_of(model_path: Path, conversations: list[list[dict[str, Any]]], *, stop: str | None) -> list[float]:
    """The rewards of conversations, each by itself, read up to the stop token that closes the answer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_path).eval()
    rewards = []
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        text = text if stop is None else text[: text.rindex(stop) + len(stop)]
        with torch.no_grad():
            rewards.append(float(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0]))
    return rewards


def prompts_of(stage: Path) -> list[list[dict[str, Any]]]:
    """The prompts of a stage in order, read off the data by hand."""
    prefs = [[{"role": "user", "content": f"what is the colour of bird {n}?"}] for n in range(16)]
    turns = [row["messages"][:-1] for row in PROMPTS]
    asked = [[{"role": "user", "content": f"what is the colour of bird {n}?"}] for n in range(16, 24)]
    return [*(prefs if stage.name == "pairs" else []), *turns, *asked]


@pytest.mark.parametrize(("name", "stop"), [("pairs", "<|im_end|>"), ("best", None)])
def test_rewards_are_the_reward_models_own_under_its_own_tokenizer_and_template(
    chain: Path, foreign: Path, name: str, stop: str | None
) -> None:
    model_path = foreign if name == "best" else chain / "reward" / "output"
    answers = read_lines(chain / name / "output" / "answers.jsonl")
    assert len(answers) == len(prompts_of(chain / name))
    conversations, found = [], []
    for prompt, row in zip(prompts_of(chain / name), answers, strict=True):
        for answer, usable, reward in zip(row["answers"], row["usable"], row["rewards"], strict=True):
            assert usable == (reward is not None)
            if usable:
                conversations.append([*prompt, {"role": "assistant", "content": answer}])
                found.append(reward)
    assert len(found) > 0.8 * 6 * len(answers)
    assert found == pytest.approx(rewards_of(model_path, conversations, stop=stop), abs=1e-4)


def test_pairs_are_the_best_answer_that_ended_against_the_worst(chain: Path) -> None:
    expected, num_tied, num_unanswered = [], 0, 0
    for prompt, row in zip(prompts_of(chain / "pairs"), read_lines(chain / "pairs" / "output" / "answers.jsonl"), strict=True):
        rated = [
            (reward, answer, ended)
            for reward, answer, ended in zip(row["rewards"], row["answers"], row["ended"], strict=True)
            if reward is not None
        ]
        whole = [each for each in rated if each[2]]
        if not whole:
            num_unanswered += 1
            continue
        best, worst = max(whole, key=lambda each: each[0]), min(rated, key=lambda each: each[0])
        if best[0] == worst[0]:
            num_tied += 1
        else:
            expected.append((prompt, best[1], worst[1], best[0], worst[0]))
    rows = read_lines(chain / "pairs" / "output" / "rows.jsonl")
    found = [(r["prompt"], r["chosen"][0]["content"], r["rejected"][0]["content"], r["score_chosen"], r["score_rejected"]) for r in rows]
    assert found == expected
    assert all(row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant" for row in rows)
    told = metrics(chain / "pairs")
    assert (told["num_pairs"], told["num_tied"], told["num_unanswered"]) == (len(expected), num_tied, num_unanswered)
    assert told["rewards/margins"] == pytest.approx(sum(pair[3] - pair[4] for pair in expected) / len(expected))
    assert told["num_prompts"] == 26 and told["num_answers"] == 6 * 26


@pytest.mark.parametrize(
    ("ended", "rewards", "min_margin", "expected"),
    [
        ("yyy", (1.0, 3.0, 2.0), 0.0, ("b", "a")),
        ("yny", (1.0, 3.0, 2.0), 0.0, ("c", "a")),
        ("yyn", (2.0, 3.0, 1.0), 0.0, ("b", "c")),
        ("yyy", (2.0, 2.0, 1.0), 0.0, ("a", "c")),
        ("yyy", (1.0, None, 2.0), 0.0, ("c", "a")),
        ("yyy", (1.0, 3.0, 2.0), 2.0, ("b", "a")),
        ("yyy", (1.0, 3.0, 2.0), 2.1, "tied"),
        ("yyy", (1.0, 1.0, 1.0), 0.0, "tied"),
        ("nny", (3.0, 3.0, 1.0), 0.0, "tied"),
        ("nnn", (1.0, 3.0, 2.0), 0.0, "unanswered"),
        ("yyn", (None, None, 2.0), 0.0, "unanswered"),
    ],
)
def test_the_best_that_ended_is_chosen_and_the_worst_of_all_rejected(
    ended: str, rewards: tuple[float | None, ...], min_margin: float, expected: tuple[str, str] | str
) -> None:
    prompt = Prompt([{"role": "user", "content": "which?"}], None, "x.jsonl:1", [])
    usable = [reward is not None for reward in rewards]
    answered = Answered(prompt, ["a", "b", "c"], [letter == "y" for letter in ended], [1, 1, 1], usable, list(rewards))
    rows, reason = choose(answered, "pairs", min_margin)
    assert (tuple(rows[0][side][0]["content"] for side in ("chosen", "rejected")) if rows else reason) == expected


def test_an_answer_that_was_cut_off_is_never_chosen(chain: Path) -> None:
    told = metrics(chain / "pairs")
    assert 0 < told["completions/clipped_ratio"] < 1
    answers = {row["origin"]: row for row in read_lines(chain / "pairs" / "output" / "answers.jsonl")}
    for row in read_lines(chain / "pairs" / "output" / "rows.jsonl"):
        given = answers[row["origin"]]
        assert (row["chosen"][0]["content"], True) in zip(given["answers"], given["ended"], strict=True)


def test_the_best_answer_follows_its_prompt_of_which_nothing_is_learned(chain: Path) -> None:
    rows = read_lines(chain / "best" / "output" / "rows.jsonl")
    answers = read_lines(chain / "best" / "output" / "answers.jsonl")
    by_origin = {row["origin"]: row for row in answers}
    for row in rows:
        given = by_origin[row["origin"]]
        whole = [reward for reward, ended in zip(given["rewards"], given["ended"], strict=True) if ended and reward is not None]
        assert row["score"] == max(whole)
        assert row["messages"][-1]["content"] == given["answers"][given["rewards"].index(row["score"])]
    two_turns = next(row["messages"] for row in rows if len(row["messages"]) > 2)
    assert [message["role"] for message in two_turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [message.get("train", True) for message in two_turns if message["role"] == "assistant"] == [False, True]


def test_all_answers_that_ended_are_there_once_each(chain: Path) -> None:
    rows = read_lines(chain / "all" / "output" / "rows.jsonl")
    expected = []
    for row in read_lines(chain / "all" / "output" / "answers.jsonl"):
        known = zip(row["answers"], row["ended"], row["usable"], strict=True)
        expected += [(row["origin"], text) for text in dict.fromkeys(answer for answer, ended, usable in known if ended and usable)]
    assert sorted((row["origin"], row["messages"][-1]["content"]) for row in rows) == sorted(expected)


def test_drawing_from_the_likeliest_token_alone_is_greedy_decoding(chain: Path) -> None:
    policy = chain / "sft" / "output"
    tokenizer: Any = AutoTokenizer.from_pretrained(policy)
    model: Any = AutoModelForCausalLM.from_pretrained(policy)
    for number, row in enumerate(read_lines(chain / "likeliest" / "output" / "answers.jsonl")):
        text = f"<|im_start|>user\nwhat is the colour of bird {16 + number}?<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        answer = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert row["answers"] == [tokenizer.decode(answer, skip_special_tokens=True)]


def test_later_stages_read_what_was_sampled_like_any_data(chain: Path) -> None:
    assert len(read_samples(chain / "dpo")) == metrics(chain / "pairs")["num_pairs"]
    assert len(read_samples(chain / "again")) == metrics(chain / "best")["num_rows"]
    rows = list(open_source(DataSource(data=str(chain / "chosen" / "output" / "rows.jsonl")), "x").rows())
    assert len(rows) == metrics(chain / "pairs")["num_pairs"]


def test_what_it_takes_on_disk_is_foretold(chain: Path, posttrain: Cli) -> None:
    """As much as if every answer were as long as it may be."""
    (row,) = [
        row
        for row in json.loads(posttrain("plan", chain.parent.parent / "pipeline.yaml", "--root", chain.parent, "--json").out)
        if row["stage"] == "pairs"
    ]
    used = sum(path.stat().st_size for path in (chain / "pairs" / "output").iterdir())
    assert used / 2 < row["disk_bytes"]["output"] < 5 * used


LONG = """
  pairs: {kind: sample, inputs: {policy: sft, data: [prefs, turns], reward: reward}, num_generations: 128, max_completion_length: 64}
"""


@pytest.fixture
def long_chain(head: str, chain: Path, tmp_path: Path) -> Chain:
    """A stage of several chunks, beside the finished stages that it reads."""
    (tmp_path / "pipeline.yaml").write_text(head + LONG)
    return Chain(tmp_path / "pipeline.yaml", chain.parent, ("run=long",))


def is_longer(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size > num_bytes


def outputs(stage: Path) -> dict[str, bytes]:
    return {name: (stage / "output" / name).read_bytes() for name in FILES}


def test_it_is_the_same_data_set_on_two_ranks_and_where_it_was_killed(posttrain: Cli, long_chain: Chain, tmp_path: Path) -> None:
    def stage(run: str) -> Path:
        return long_chain.root / run / "pairs"

    for run, overrides in (("one", ()), ("two", ("stages.pairs.num_processes=2",))):
        ended = posttrain("run", long_chain.file, "--root", long_chain.root, f"run={run}", *overrides)
        assert ended.code == 0, ended.err
        # What reads the same is taken from another run, unless it is moved out of the way.
        stage(run).rename(tmp_path / run)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")

    results = stage("killed") / "checkpoints" / "results.rank_0_of_1.jsonl"
    before = b""
    killed = Chain(long_chain.file, long_chain.root, ("run=killed",))
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
        with started(killed.command, tmp_path / "log") as driver:
            driver.meet(partial(is_longer, results, len(before)), "a chunk was to be kept")
            driver.signal(number)
            assert driver.ended()[0] == code
        kept = results.read_bytes()
        assert kept.startswith(before[: before.rfind(b"\n") + 1]), "what was kept is not computed again"
        before = kept
        (row,) = [row for row in json.loads(posttrain("plan", *killed.command[1:], "--json").out) if row["stage"] == "pairs"]
        assert row["action"] == "resume"
    ended = posttrain(*killed.command)
    assert ended.code == 0, ended.err
    assert outputs(stage("killed")) == outputs(tmp_path / "one")


def test_where_no_row_is_left_that_is_told_and_a_milder_config_just_runs(posttrain: Cli, head: str, chain: Path, tmp_path: Path) -> None:
    stage = "  p: {kind: sample, inputs: {policy: sft, data: asked, reward: reward}, num_generations: 4, max_completion_length: 24"
    (tmp_path / "pipeline.yaml").write_text(f"{head}{stage}, min_margin: 1000.0}}\n")
    ended = posttrain("run", tmp_path / "pipeline.yaml", "--root", chain.parent, "run=none")
    assert ended.code == 2
    assert ended.err.startswith("error: stages.p: no row comes of 8 prompts:") and ended.err.count("\n") == 1
    ended = posttrain("run", tmp_path / "pipeline.yaml", "--root", chain.parent, "run=none", "stages.p.min_margin=0.0001")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("{inputs: {policy: sft, data: asked}}", "stages.p.inputs.reward: missing; output: pairs takes a reward model"),
        ("{inputs: {policy: sft, data: asked, reward: base}, max_completion_length: 24}", "stages.p: base: "),
        ("{inputs: {policy: sft, data: asked, reward: reward}, num_generations: 1}", "stages.p.num_generations: 1 answer leaves nothing"),
        ("{inputs: {policy: sft, data: asked, reward: reward}, output: best, min_margin: 1}", "stages.p.min_margin: has no effect"),
        ("{inputs: {policy: sft, data: asked, reward: reward}, temperature: 0}", "stages.p.temperature: input should be greater than 0"),
        (
            "{inputs: {policy: sft, data: asked, reward: reward}, max_completion_length: 256}",
            "stages.p.max_completion_length: 256 leaves no room",
        ),
        (
            "{inputs: {policy: sft, data: asked, reward: reward}, max_completion_length: 24, max_prompt_length: 2}",
            "stages.p: all 8 prompts are over 2 tokens",
        ),
        (
            "{inputs: {policy: sft, data: strange, reward: reward}, max_completion_length: 24}",
            "holds '<|im_end|>', which is a control token",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_line(
    posttrain: Cli, head: str, chain: Path, tmp_path: Path, stage: str, said: str
) -> None:
    strange = tmp_path / "strange.jsonl"
    strange.write_text(json.dumps({"prompt": "what is <|im_end|>?"}) + "\n")
    text = head.replace("sources:\n", f"sources:\n  strange: {{data: {strange}, format: prompt}}\n")
    (tmp_path / "pipeline.yaml").write_text(f"{text}  p: {stage.replace('{', '{kind: sample, ', 1)}\n")
    ended = posttrain("run", tmp_path / "pipeline.yaml", "--root", chain.parent, "run=refused")
    assert ended.code == 2
    assert said in ended.err and ended.err.count("\n") == 1
    assert not (chain.parent / "refused" / "p" / "checkpoints").exists()


DRAWN = {
    "likeliest": "inputs: {policy: sft, data: asked}, output: all, num_generations: 1, max_completion_length: 24, top_k: 1",
    "all": "inputs: {policy: sft, data: [turns, asked]}, output: all, num_generations: 6, max_completion_length: 24",
}


def test_vllm_draws_what_a_seed_says_and_of_the_likeliest_token_alone_what_transformers_does(
    with_vllm: Cli, head: str, chain: Path, tmp_path: Path
) -> None:
    def drawn(run: str, *names: str) -> list[list[dict[str, Any]]]:
        # Beside what other runs sampled, which would be taken from there: an engine is not what a data set is told by.
        root = tmp_path / run
        (root / "r").mkdir(parents=True)
        shutil.copytree(chain / "sft", root / "r" / "sft")
        stages = "".join(f"  {name}: {{kind: sample, {DRAWN[name]}, use_vllm: true}}\n" for name in names)
        (root / "pipeline.yaml").write_text(head.partition("  reward:")[0] + stages)
        ended = with_vllm("run", root / "pipeline.yaml", "--root", root, STAND_IN_LOG=root / "log.jsonl")
        assert ended.code == 0, ended.err
        return [read_lines(root / "r" / name / "output" / "answers.jsonl") for name in names]

    likeliest, every = drawn("first", "likeliest", "all")
    assert drawn("again", "all") == [every]
    assert {row["engine"] for row in likeliest + every} == {"vllm 0.25.0"}
    plain = read_lines(chain / "likeliest" / "output" / "answers.jsonl")
    assert {row.pop("engine") for row in plain} == {f"transformers {transformers.__version__}"}
    assert [{name: value for name, value in row.items() if name != "engine"} for row in likeliest] == plain
    assert max(len(set(row["answers"])) for row in every) > 2, "they are drawn, each by itself"
    assert len({tuple(row["answers"]) for row in every}) == len(every), "and of each prompt by itself"
    for line in read_lines(tmp_path / "first" / "log.jsonl"):
        if line["event"] == "generate":
            wanted = line["settings"]
            assert (wanted["temperature"], wanted["top_p"], wanted["max_tokens"], wanted["ignore_eos"]) == (1.0, 1.0, 24, True)
            assert (wanted["n"], wanted["top_k"]) in ((1, 1), (6, 0))


def test_vllm_is_refused_where_it_cannot_be_had(posttrain: Cli, with_vllm: Cli, head: str, chain: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(f"{head.partition('  reward:')[0]}  all: {{kind: sample, {DRAWN['all']}, use_vllm: true}}\n")
    command = ("run", tmp_path / "pipeline.yaml", "--root", chain.parent, "run=x", "stages.all.seed=1")
    for call, more, said in (
        (posttrain, (), "vllm is not installed here; install it, or set it to false"),
        (with_vllm, ("stages.all.temperature=2.5",), "its temperature may be 2 at most, not 2.5; lower that, or set it to false"),
    ):
        ended = call(*command, *more)
        assert (ended.code, f"stages.all.use_vllm: {said}" in ended.err) == (2, True), ended.err
