"""RL: a step against the formula in a plain torch loop, and runs that must raise what is rewarded, anywhere and after any kill."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from posttrain.batch import epoch_order
from posttrain.chat import establish, read_contract
from posttrain.config import DataSource, ModelSource
from posttrain.error import Preempted
from posttrain.generate import decode, sample_all
from posttrain.models import load_policy
from posttrain.stage import Input, StageContext
from stages.rlhf import STAGE, prepare
from tests.conftest import REPOSITORY, Ended, read_lines, read_samples

Cli = Callable[..., Ended]
BATCH, NUM_ANSWERS, LONGEST = 4, 4, 8
QUICKSTART = REPOSITORY / "posttrain" / "quickstart"


def write_prompts(path: Path, numbers: range) -> Path:
    """Prompts, each of whose answers is right if it has the letter e."""
    rows = [{"prompt": f"what is the colour of bird {n}?", "checks": [{"kind": "regex_match", "pattern": "e"}]} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rlhf_file(tmp_path: Path, tiny: Path, pairs_file: Path) -> Path:
    """A pipeline of one stage, from the tiny base model, rewarded by a check."""
    path = tmp_path / "pipeline.yaml"
    path.write_text(
        f"""
run: test
sources:
  base: {{model: {tiny}}}
  prefs: {{data: {pairs_file}}}
  prompts: {{data: {write_prompts(tmp_path / "prompts.jsonl", range(24))}}}
  heldout: {{data: {write_prompts(tmp_path / "heldout.jsonl", range(100, 110))}}}
stages:
  rlhf:
    inputs: {{policy: base, data: prompts, heldout: heldout}}
    checkers: [regex_match]
    learning_rate: 3e-3
    lr_scheduler_type: constant
    warmup_steps: 0
    global_batch_size: {BATCH}
    num_generations: {NUM_ANSWERS}
    max_completion_length: {LONGEST}
    max_length: 128
    max_steps: 3
"""
    )
    return path


def run(posttrain: Cli, file: Path, root: Path, *overrides: str) -> Path:
    ended = posttrain("run", file, "--root", root, *overrides)
    assert ended.code == 0, ended.err
    return root / "test" / "rlhf"


def metrics(stage: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((stage / "artifact.json").read_text())["payload"]["metrics"]
    return found


ALGORITHMS: dict[str, tuple[str, ...]] = {
    "dapo": (),
    "grpo": ("stages.rlhf.loss_type=grpo", "stages.rlhf.temperature=0.7"),
    "dr_grpo": ("stages.rlhf.loss_type=dr_grpo", "stages.rlhf.scale_rewards=none"),
    "rloo": ("stages.rlhf.algorithm=rloo",),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_step_is_that_of_the_formula(posttrain: Cli, rlhf_file: Path, tiny: Path, tmp_path: Path, name: str) -> None:
    stage = run(posttrain, rlhf_file, tmp_path, "stages.rlhf.max_steps=1", *ALGORITHMS[name])
    temperature = 0.7 if name == "grpo" else 1.0
    tokenizer, contract = AutoTokenizer.from_pretrained(stage / "output"), read_contract(stage / "output")
    assert contract is not None
    model = load_policy(ModelSource(model=str(tiny)), tokenizer, contract, "", dtype=torch.float32).eval()
    rows = read_samples(stage)
    prompts = [rows[sample]["input_ids"] for sample in epoch_order(len(rows), 0, 0)[:BATCH]]
    sampled = sample_all(
        model,
        tokenizer,
        contract,
        prompts,
        num_return_sequences=NUM_ANSWERS,
        temperature=temperature,
        max_new_tokens=LONGEST,
        seeds=[(0, 0, place) for place in range(BATCH)],
    )
    num_tokens = sum(len(completion.ids) for group in sampled for completion in group)
    loss: Any = 0.0
    kept = iter(read_lines(stage / "completions.jsonl"))
    for prompt, group in zip(prompts, sampled, strict=True):
        texts = [decode(tokenizer, completion.ids) for completion in group]
        rewards = [float("e" in text) for text in texts]
        mean, spread = np.mean(rewards), np.std(rewards, ddof=1) + 1e-4
        for number, completion in enumerate(group):
            logits = model(input_ids=torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1] / temperature
            log_probs = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])
            ratio = torch.exp(log_probs - log_probs.detach())
            others = np.mean(np.delete(rewards, number))
            loss = (
                loss
                + {
                    "dapo": lambda: -ratio.sum() * (rewards[number] - mean) / spread / num_tokens,  # noqa: B023
                    "grpo": lambda: -ratio.mean() * (rewards[number] - mean) / spread / BATCH / NUM_ANSWERS,  # noqa: B023
                    "dr_grpo": lambda: -ratio.sum() * (rewards[number] - mean) / LONGEST / BATCH / NUM_ANSWERS,  # noqa: B023
                    "rloo": lambda: -ratio.prod() * (rewards[number] - others) / BATCH / NUM_ANSWERS,  # noqa: B023
                }[name]()
            )
            line = next(kept)
            assert (line["completion"], line["reward"]) == (texts[number], rewards[number])
            assert line["num_tokens"] == len(completion.ids)
            assert line["kl"] == pytest.approx(0, abs=1e-5), "it has not moved yet"
    assert any(group[0].ids != group[1].ids for group in sampled)
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]).norm()
    (logged,) = read_lines(stage / "metrics.jsonl")
    assert logged["loss"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
    assert logged["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    assert logged["grad_norm"] > 1e-3, "some prompt has a better and a worse answer"


def test_the_loss_counts_how_far_each_token_has_moved(posttrain: Cli, rlhf_file: Path, tmp_path: Path) -> None:
    stage = run(posttrain, rlhf_file, tmp_path, "stages.rlhf.max_steps=6", "stages.rlhf.beta=0.5", "stages.rlhf.learning_rate=1e-2")
    lines = read_lines(stage / "completions.jsonl")
    for step, logged in enumerate(read_lines(stage / "metrics.jsonl"), 1):
        ours = [line for line in lines if line["step"] == step]
        assert len(ours) == BATCH * NUM_ANSWERS
        total = sum(line["num_tokens"] for line in ours)
        expected = sum(0.5 * line["kl"] - line["advantage"] * line["num_tokens"] for line in ours) / total
        assert logged["loss"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert logged["kl"] == pytest.approx(sum(line["kl"] for line in ours) / total)
        assert logged["reward"] == pytest.approx(np.mean([line["reward"] for line in ours]))
        assert logged["completions/clipped_ratio"] == pytest.approx(np.mean([not line["ended"] for line in ours]))
    assert logged["kl"] > 1e-3


@pytest.mark.parametrize("overrides", [(), ("stages.rlhf.algorithm=rloo",), ("stages.rlhf.lora={r: 8}", "stages.rlhf.learning_rate=3e-2")])
def test_the_reward_on_held_out_prompts_rises(posttrain: Cli, rlhf_file: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    options = ("stages.rlhf.learning_rate=1e-2", "stages.rlhf.max_steps=25", "stages.rlhf.eval_steps=10")
    stage = run(posttrain, rlhf_file, tmp_path, *options, *overrides)
    measured = read_lines(stage / "heldout.jsonl")
    assert [line["step"] for line in measured] == [0, 10, 20, 25]
    found = metrics(stage)
    assert found["heldout/reward_at_start"] == measured[0]["reward"] <= 0.5
    assert found["heldout/reward"] == measured[-1]["reward"] >= 0.9
    assert found["stopped_early"] == 0


def test_rewards_are_added_up_by_their_weights(posttrain: Cli, rlhf_file: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        row["checks"].append({"kind": "length_limits", "max_characters": 8})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights = "stages.rlhf.reward_weights={regex_match: 0.5, length_limits: 2.0}"
    stage = run(
        posttrain, rlhf_file, tmp_path, "stages.rlhf.checkers=[regex_match, length_limits]", weights, "stages.rlhf.missing_eos_penalty=0.25"
    )
    lines = read_lines(stage / "completions.jsonl")
    for line in lines:
        by = line["rewards"]
        expected = 0.5 * by["regex_match"] + 2 * by.get("length_limits", 0.0) - 0.25 * (not line["ended"])
        assert line["reward"] == pytest.approx(expected)
    assert 0 < sum("length_limits" in line["rewards"] for line in lines) < len(lines)


def test_every_number_of_ranks_and_sharding_samples_and_learns_the_same(posttrain: Cli, rlhf_file: Path, tmp_path: Path) -> None:
    whole = run(posttrain, rlhf_file, tmp_path / "whole")
    ways = {
        "padded": ("stages.rlhf.layout=padded", "stages.rlhf.micro_batch_tokens=64"),
        "ranks": ("launcher.num_processes=2",),
        "zero3": ("launcher.num_processes=2", "stages.rlhf.deepspeed=ds_configs/zero3.json"),
    }
    said = [line["completion"] for line in read_lines(whole / "completions.jsonl")]
    for name, overrides in ways.items():
        stage = run(posttrain, rlhf_file, tmp_path / name, *overrides)
        assert [line["completion"] for line in read_lines(stage / "completions.jsonl")] == said, name
        for ours, theirs in zip(*(read_lines(each / "metrics.jsonl") for each in (whole, stage)), strict=True):
            for figure in ("loss", "reward", "kl", "entropy", "grad_norm", "completions/mean_length"):
                assert theirs[figure] == pytest.approx(ours[figure], rel=2e-3, abs=1e-5), (name, figure)
        assert metrics(stage)["heldout/reward"] == metrics(whole)["heldout/reward"], name


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_engine_samples_from_the_policy_as_it_is_now(rlhf_file: Path, chat_file: Path, with_vllm: Cli, num_processes: int) -> None:
    text = rlhf_file.read_text().replace("  prefs:", f"  chat: {{data: {chat_file}}}\n  prefs:")
    sft = "stages:\n  sft: {inputs: {policy: base, data: chat}, max_steps: 1, global_batch_size: 8}\n"
    rlhf_file.write_text(text.replace("stages:\n", sft).replace("policy: base, data: prompts", "policy: sft, data: prompts"))
    root = rlhf_file.parent
    settings = ["use_vllm=true", "learning_rate=1e-2", "max_steps=6", "num_generations=8"]
    command = ["run", rlhf_file, "--root", root, f"launcher.num_processes={num_processes}", *(f"stages.rlhf.{each}" for each in settings)]
    ended = with_vllm(*command)
    assert ended.code == 0, ended.err
    logged = read_lines(root / "test" / "rlhf" / "metrics.jsonl")
    assert logged[-1]["kl"] > 1e-2, "the policy has moved"
    for line in logged:
        assert line["sampling/sampling_logp_difference/max"] < 1e-3, "and the engine with it"
        assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-2)
    kept = read_lines(root / "test" / "rlhf" / "completions.jsonl")
    assert len(kept) == 6 * BATCH * 8
    assert len({line["completion"] for line in kept}) > len(kept) / 4, "they are drawn"
    assert [line["step"] for line in read_lines(root / "test" / "rlhf" / "heldout.jsonl")] == [0, 6]


def test_an_engine_that_is_not_there_is_told(posttrain: Cli, rlhf_file: Path, tmp_path: Path) -> None:
    ended = posttrain("run", rlhf_file, "--root", tmp_path, "stages.rlhf.use_vllm=true")
    assert ended.code == 2
    assert "stages.rlhf.use_vllm: vllm is not installed here; install it, or set it to false" in ended.err


def test_it_ends_where_it_has_moved_beyond_its_budget(posttrain: Cli, rlhf_file: Path, tmp_path: Path) -> None:
    options = ("stages.rlhf.max_steps=40", "stages.rlhf.learning_rate=1e-2", "stages.rlhf.beta=0.0", "stages.rlhf.kl_budget=0.5")
    stage = run(posttrain, rlhf_file, tmp_path, *options)
    found, logged = metrics(stage), read_lines(stage / "metrics.jsonl")
    assert found["stopped_early"] == 1
    assert found["num_steps"] == len(logged) < 40
    assert all(line["kl/completion"] <= 0.5 for line in logged[:-1])
    assert logged[-1]["kl/completion"] > 0.5
    assert (stage / "output" / "model.safetensors").is_file()


def open_context(tiny: Path, root: Path, **settings: Any) -> StageContext[Any]:
    """A stage that is prepared, to be run right here, where it can be stopped at a step of our choice."""
    root.mkdir()
    inputs = {"policy": (Input("base", "policy", "", ModelSource(model=str(tiny))),)}
    for name, numbers in (("data", range(24)), ("heldout", range(100, 110))):
        data: Any = {"data": str(write_prompts(root / f"{name}.jsonl", numbers))}
        inputs[name] = (Input(name, "dataset", "", DataSource(**data)),)
    sizes = {"global_batch_size": BATCH, "num_generations": NUM_ANSWERS, "max_completion_length": LONGEST, "max_length": 128}
    chosen: Any = {"checkers": ["regex_match"], "learning_rate": 1e-2, **sizes, **settings}
    context: StageContext[Any] = StageContext("rlhf", STAGE.config(**chosen), inputs, root / "rlhf", root)
    context.directory.mkdir()
    prepare(context)
    return context


@pytest.fixture
def nondeterministic_afterwards() -> Iterator[None]:
    """A stage that is run in this process leaves a switch of torch behind."""
    yield
    torch.use_deterministic_algorithms(False)


def published(context: StageContext[Any]) -> list[bytes]:
    files = (context.output / "model.safetensors", context.directory / "completions.jsonl", context.directory / "heldout.jsonl")
    return [file.read_bytes() for file in files]


@pytest.mark.usefixtures("nondeterministic_afterwards")
def test_a_run_that_is_stopped_resumes_to_the_very_same_weights_and_completions(tiny: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 12, "save_steps": 4, "eval_steps": 4}
    whole, cut = (open_context(tiny, tmp_path / name, **settings) for name in ("whole", "cut"))
    STAGE.run(whole)

    def stop() -> None:
        logged = cut.directory / "metrics.jsonl"
        while not logged.is_file() or len(logged.read_text().splitlines()) < 6:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop, daemon=True)
    watcher.start()
    with pytest.raises(Preempted):
        STAGE.run(cut)
    watcher.join()
    reached = len(read_lines(cut.directory / "metrics.jsonl"))
    assert 6 <= reached < 12
    STAGE.run(cut)
    for ours, theirs in zip(published(cut), published(whole), strict=True):
        assert ours.replace(b"/cut/", b"/whole/") == theirs


@pytest.mark.usefixtures("nondeterministic_afterwards")
def test_a_run_that_ended_early_and_was_cut_off_while_it_published_is_published_as_it_was(tiny: Path, tmp_path: Path) -> None:
    context = open_context(tiny, tmp_path / "root", kl_budget=0.5, max_steps=40)
    first = STAGE.run(context)
    before = published(context)
    again = STAGE.run(context)  # its checkpoints are there until the output is verified
    assert first["stopped_early"] == again["stopped_early"] == 1
    assert first["num_steps"] == again["num_steps"] < 40
    assert published(context) == before


@pytest.mark.usefixtures("nondeterministic_afterwards")
def test_a_reward_model_of_another_tokenizer_is_followed(tiny: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    contract = establish(tokenizer, GenerationConfig(), template=None, system_prompt=None, at="")
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_pretrained(QUICKSTART / "base", num_labels=1)
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.score.weight.data.mul_(30)  # a new head is small
    for written in (model, tokenizer):
        written.save_pretrained(tmp_path / "judge")
    contract.save(tmp_path / "judge")
    judge = Input("judge", "reward_model", "", ModelSource(model=str(tmp_path / "judge")))
    sizes = {"global_batch_size": 8, "num_generations": 8, "max_steps": 40, "eval_steps": 20}
    context = open_context(tiny, tmp_path / "root", beta=0.0, learning_rate=5e-3, **sizes)
    config = context.config.model_copy(update={"checkers": []})
    context = replace(context, inputs={**context.inputs, "reward": (judge,)}, config=config)
    prepare(context)
    found = STAGE.run(context)
    logged = read_lines(context.directory / "metrics.jsonl")
    before, after = (np.mean([line["reward"] for line in lines]) for lines in (logged[:5], logged[-5:]))
    assert after > before + logged[0]["reward_std"] / 2
    assert found["rewards/judge/mean"] == found["reward"]


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no reward": (
        ("stages.rlhf.checkers=[]",),
        "stages.rlhf: nothing rewards an answer; give inputs.reward a reward model, or name checkers",
    ),
    "unknown check": (("stages.rlhf.checkers=[regexmatch]",), "no check is called 'regexmatch'; did you mean 'regex_match'"),
    "a check that no row has": (
        ("stages.rlhf.checkers=[final_number]",),
        "prompts.jsonl:1: carries no check of stages.rlhf.checkers (final_number)",
    ),
    "unknown weight": (("stages.rlhf.reward_weights={judge: 1.0}",), "stages.rlhf.reward_weights: 'judge' is no reward of this stage"),
    "a policy that rewards": (("stages.rlhf.inputs.reward=sft",), "stages.rlhf.inputs.reward: 'sft' is a policy, not a reward_model"),
    "a base model that rewards": (
        ("stages.rlhf.inputs.reward=base",),
        "stages.rlhf: base: {tiny} has 2 labels, and a reward model has one",
    ),
    "no room": (("stages.rlhf.max_completion_length=120",), "prompts.jsonl:1: the prompt has "),
    "no room at all": (("stages.rlhf.max_completion_length=128",), "leaves no room for a prompt in max_length: 128"),
    "a cut prompt": (("stages.rlhf.on_overflow=truncate",), "a prompt that is cut off asks something else"),
    "engines that ranks cannot share": (("stages.rlhf.vllm_tensor_parallel_size=2",), "vllm_tensor_parallel_size: 1 ranks cannot be"),
    "another algorithm's": (("stages.rlhf.algorithm=rloo", "stages.rlhf.loss_type=grpo"), "loss_type: is for algorithm grpo, not rloo"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input_is_told_in_one_line(posttrain: Cli, rlhf_file: Path, tiny: Path, chat_file: Path, tmp_path: Path, name: str) -> None:
    overrides, expected = REFUSED[name]
    text = rlhf_file.read_text().replace("  prefs:", f"  chat: {{data: {chat_file}}}\n  prefs:")
    rlhf_file.write_text(text.replace("stages:\n", "stages:\n  sft: {inputs: {policy: base, data: chat}}\n"))
    ended = posttrain("run", rlhf_file, "--root", tmp_path, "--only", "rlhf", *overrides)
    assert ended.code == 2
    assert expected.format(tiny=tiny) in ended.err
    assert not (tmp_path / "test" / "rlhf" / "checkpoints").exists()
