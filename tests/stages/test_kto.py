"""KTO against the paper's formula in a plain torch loop and against TRL's own trainer, on every number of ranks and cut in every way."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.batch import epoch_order
from posttrain.config import DataSource, ModelSource
from posttrain.stage import Input, StageContext
from stages.kto import STAGE, KTOConfig
from tests.conftest import COLOURS, Ended, read_lines, read_samples
from tests.posttrain.test_reference import policy_of

Cli = Callable[..., Ended]
BATCH, RATE = 8, 1e-3
APO = "stages.kto.loss_type=apo_zero_unpaired"


@pytest.fixture
def kto_file(pipeline_file: Path) -> Path:
    """A pipeline of one stage, from the tiny base model on pairs."""
    text = pipeline_file.read_text()
    head = text[: text.index("stages:")]
    pipeline_file.write_text(
        f"""{head}stages:
  kto:
    inputs: {{policy: base, data: prefs}}
    learning_rate: {RATE}
    lr_scheduler_type: constant
    warmup_steps: 0
    global_batch_size: {BATCH}
    max_length: 128
"""
    )
    return pipeline_file


@pytest.fixture(scope="session")
def thumbs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 answers to 16 questions, of unequal length; 8 of them are undesirable."""
    rows = [
        {
            "prompt": f"what is the colour of bird {number % 16}?" + " and why?" * (number % 16 % 5),
            "completion": f"the answer is {COLOURS[number % 8]} {number}" + " and more" * (number % 4),
            "label": number % 3 > 0,
        }
        for number in range(24)
    ]
    return write(tmp_path_factory.mktemp("data") / "thumbs.jsonl", rows)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(posttrain: Cli, file: Path, root: Path, *overrides: str) -> Path:
    ended = posttrain("run", file, "--root", root, *overrides)
    assert ended.code == 0, ended.err
    return root / "test" / "kto"


def refused(posttrain: Cli, file: Path, root: Path, *overrides: str) -> str:
    ended = posttrain("run", file, "--root", root, *overrides)
    assert ended.code == 2, ended.err
    (line,) = ended.err.strip().splitlines()
    return line


def losses(stage: Path) -> list[float]:
    return [line["loss"] for line in read_lines(stage / "metrics.jsonl")]


def summary(stage: Path) -> str:
    said: list[str] = json.loads((stage / "preflight.json").read_text())["summary"]
    return said[-1]


def context_of(root: Path, policy: Path, data: Path, **fields: Any) -> StageContext[KTOConfig]:
    """The stage as a run would have it, prepared in this process."""
    directory = root / "run" / "kto"
    directory.mkdir(parents=True, exist_ok=True)
    inputs = {
        "policy": (Input("base", "policy", "f", ModelSource(model=str(policy))),),
        "data": (Input("feedback", "dataset", "f", DataSource(data=str(data))),),
    }
    settings = {"max_length": 128, "global_batch_size": BATCH, "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0}
    context = StageContext("kto", KTOConfig(**{**settings, **fields}), inputs, directory, root)
    assert STAGE.prepare is not None
    STAGE.prepare(context)
    return context


def trained(context: StageContext[KTOConfig]) -> list[dict[str, float]]:
    """Train in this process; what was logged of each step."""
    STAGE.run(context)
    return read_lines(context.directory / "metrics.jsonl")


def sum_logps(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """log pi(answer | prompt), one row by itself."""
    logps = model(torch.tensor([prompt + answer])).logits[0, :-1].log_softmax(-1)
    return logps[len(prompt) - 1 :].gather(1, torch.tensor(answer)[:, None]).sum()


def with_mismatched(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the order of their questions, each with the answer that stands as many places on as one question has answers at most."""
    longest = max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows)
    ordered = sorted(rows, key=lambda row: (row["question"], row["row"]))
    most = max(sum(row["question"] == other["question"] for other in rows) for row in rows)
    for place, row in enumerate(ordered):
        other = ordered[(place + most) % len(rows)]
        assert other["question"] != row["question"]
        row["mismatched"] = other["completion_ids"][: longest - len(row["prompt_ids"])]
    return rows


def reference_steps(context: StageContext[KTOConfig], num_steps: int) -> list[dict[str, float]]:
    """KTO by the paper (eq. 7), a row at a time: AdamW, norm clipped to 1."""
    config = context.config
    model, _ = policy_of(context)
    frozen, _ = policy_of(context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    rows = with_mismatched(read_samples(context.directory))
    stream = [int(i) for epoch in range(3) for i in epoch_order(len(rows), 0, epoch)]
    found = []
    for step in range(num_steps):
        batch = [rows[index] for index in stream[step * BATCH : (step + 1) * BATCH]]
        with torch.no_grad():
            apart = [
                float(sum_logps(model, row["prompt_ids"], row["mismatched"]) - sum_logps(frozen, row["prompt_ids"], row["mismatched"]))
                for row in batch
            ]
        z = 0.0 if config.loss_type == "apo_zero_unpaired" else max(0.0, float(np.mean(apart)))
        loss, rewards = torch.zeros(()), {True: [], False: []}
        for row in batch:
            with torch.no_grad():
                before = sum_logps(frozen, row["prompt_ids"], row["completion_ids"])
            ratio = sum_logps(model, row["prompt_ids"], row["completion_ids"]) - before
            sign, weight = (1, config.desirable_weight) if row["label"] else (-1, config.undesirable_weight)
            loss = loss + weight * (1 - 1 / (1 + torch.exp(-config.beta * sign * (ratio - z)))) / BATCH
            rewards[row["label"]].append(config.beta * ratio.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        sides = (("rewards/chosen", True), ("rewards/rejected", False))
        figures = {name: float(np.mean(rewards[label])) for name, label in sides if rewards[label]}
        if len(figures) == 2:
            figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
        found.append({"loss": loss.item(), "kl": z, **figures})
    return found


@pytest.mark.parametrize(
    "fields", [{"beta": 0.3, "undesirable_weight": 1.7}, {"loss_type": "apo_zero_unpaired", "desirable_weight": 0.6}], ids=["kto", "apo"]
)
def test_losses_and_rewards_equal_those_of_the_paper(tmp_path: Path, tiny: Path, thumbs_file: Path, fields: dict[str, Any]) -> None:
    context = context_of(tmp_path, tiny, thumbs_file, num_train_epochs=2, **fields)
    found = trained(context)
    expected = reference_steps(context, 6)
    assert len(found) == 6
    for ours, theirs in zip(found, expected, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    if "loss_type" not in fields:
        assert max(step["kl"] for step in found) > 0.05, "nothing was moved, so nothing was tested"


COMPARED = (
    *("loss", "grad_norm", "kl", "entropy", "rewards/margins"),
    *(f"{name}/{side}" for name in ("rewards", "logps", "logits") for side in ("chosen", "rejected")),
)


@pytest.mark.parametrize("fields", [{"beta": 0.3, "desirable_weight": 0.7}, {"loss_type": "apo_zero_unpaired"}], ids=["kto", "apo"])
def test_loss_gradient_and_metrics_are_those_of_trls_own_trainer(
    tmp_path: Path, tiny: Path, thumbs_file: Path, fields: dict[str, Any]
) -> None:
    """TRL's trainer on the same tokens in the same order: padded, its own fused head, its own reference and its own z."""
    import copy

    from datasets import Dataset
    from trl import KTOConfig as TrainerConfig
    from trl import KTOTrainer

    class Trainer(KTOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # tokens already

    context = context_of(tmp_path, tiny, thumbs_file, **fields)
    found = trained(context)
    model, tokenizer = policy_of(context)
    rows = with_mismatched(read_samples(context.directory))
    order = [rows[int(row)] for row in epoch_order(len(rows), 0, 0)]
    theirs = {"prompt_ids": "prompt_ids", "completion_ids": "completion_ids", "KL_completion_ids": "mismatched", "label": "label"}
    arguments = TrainerConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=BATCH,
        max_steps=3,
        gradient_checkpointing=False,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_length=None,
        bf16=False,
        use_cpu=True,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        **fields,
    )
    trainer: Any = Trainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=arguments,
        train_dataset=Dataset.from_list([{name: row[ours] for name, ours in theirs.items()} for row in order]),
        processing_class=tokenizer,
    )
    trainer.train()
    expected = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == len(expected) == 3
    for step, (ours, trls) in enumerate(zip(found, expected, strict=True)):
        # The gradient of a first step is that of the very same weights; those of later ones differ by what AdamW makes of rounding.
        tolerance = {"rel": 1e-5, "abs": 1e-5} if step == 0 else {"rel": 1e-3, "abs": 1e-4}
        for name in COMPARED:
            assert ours[name] == pytest.approx(trls[name], **tolerance), (step, name)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("stages.kto.lora={}",),
        ("launcher.num_processes=2", "stages.kto.deepspeed=ds_configs/zero3.json", "stages.kto.lora={}"),
        (APO, "stages.kto.beta=0.7"),
    ],
    ids=["full", "lora", "zero3 lora", "apo"],
)
def test_the_first_loss_is_a_half_since_the_reference_is_the_input_policy(
    posttrain: Cli, kto_file: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    found = losses(run(posttrain, kto_file, tmp_path, "stages.kto.max_steps=3", *overrides))
    assert found[0] == pytest.approx(0.5, abs=1e-5)
    assert found[-1] != pytest.approx(0.5, abs=1e-4), "it did not train"


def test_ranks_layouts_and_micro_batches_change_no_loss_and_no_metric(
    posttrain: Cli, kto_file: Path, thumbs_file: Path, tmp_path: Path
) -> None:
    data = f"sources.prefs.data={thumbs_file}"
    whole = read_lines(run(posttrain, kto_file, tmp_path / "whole", data) / "metrics.jsonl")
    ways = {
        "padded": ("stages.kto.layout=padded", "stages.kto.micro_batch_tokens=200"),
        "a row at a time": ("stages.kto.micro_batch_tokens=1",),
        "ranks": ("launcher.num_processes=2", "stages.kto.micro_batch_tokens=100"),
        "zero1": ("launcher.num_processes=2", "stages.kto.deepspeed=ds_configs/zero1.json", "stages.kto.micro_batch_tokens=100"),
        "zero3": ("launcher.num_processes=2", "stages.kto.deepspeed=ds_configs/zero3.json", "stages.kto.gradient_checkpointing=true"),
    }
    for way, overrides in ways.items():
        found = read_lines(run(posttrain, kto_file, tmp_path / way, data, *overrides) / "metrics.jsonl")
        assert len(found) == len(whole) == 3
        for ours, expected in zip(found, whole, strict=True):
            for name in COMPARED:
                assert ours[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (way, name)


def test_a_batch_of_one_kind_has_no_figures_of_the_other(posttrain: Cli, kto_file: Path, thumbs_file: Path, tmp_path: Path) -> None:
    options = (f"sources.prefs.data={thumbs_file}", "stages.kto.global_batch_size=2", "launcher.num_processes=2")
    found = read_lines(run(posttrain, kto_file, tmp_path, *options) / "metrics.jsonl")
    has = [(("rewards/chosen" in line), ("rewards/rejected" in line), ("rewards/margins" in line)) for line in found]
    assert set(has) == {(True, True, True), (True, False, False)}, "two of three answers are desirable"
    assert all(math.isfinite(line["loss"]) for line in found)


def test_adapters_are_trained_merged_and_tell_answers_apart(posttrain: Cli, kto_file: Path, tmp_path: Path) -> None:
    stage = run(posttrain, kto_file, tmp_path, "stages.kto.lora={r: 8}", "stages.kto.num_train_epochs=10")
    lines = read_lines(stage / "metrics.jsonl")
    assert lines[-1]["loss"] < 0.4
    assert lines[-1]["rewards/chosen"] > 0 > lines[-1]["rewards/rejected"]
    assert (stage / "output" / "adapter" / "adapter_model.safetensors").is_file()


def test_it_resumes_to_the_very_same_weights(posttrain: Cli, kto_file: Path, tmp_path: Path) -> None:
    options = ("stages.kto.num_train_epochs=2", "stages.kto.save_steps=1", "stages.kto.lora={lora_dropout: 0.2}")
    whole = run(posttrain, kto_file, tmp_path / "whole", *options)
    # The limit leaves less time than saving is taken to need before it was measured, so it stops at once.
    stopped = posttrain("run", kto_file, "--root", tmp_path / "cut", "--time-limit", "1s", *options)
    assert stopped.code == 75, stopped.err
    cut = run(posttrain, kto_file, tmp_path / "cut", *options)
    assert (cut / "output" / "model.safetensors").read_bytes() == (whole / "output" / "model.safetensors").read_bytes()
    assert losses(cut) == losses(whole)


# --- data ----------------------------------------------------------------------------------------------------------------


def test_pairs_are_taken_as_two_answers_each_and_it_is_said(tmp_path: Path, tiny: Path, pairs_file: Path) -> None:
    by_hand = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in read_lines(pairs_file)
        for side in ("chosen", "rejected")
    ]
    as_pairs = context_of(tmp_path / "pairs", tiny, pairs_file)
    as_rows = context_of(tmp_path / "rows", tiny, write(tmp_path / "rows.jsonl", by_hand))
    compared = ("row", "prompt_ids", "completion_ids", "label")
    samples = [[[row[name] for name in compared] for row in read_samples(context.directory)] for context in (as_pairs, as_rows)]
    assert samples[0] == samples[1] and len(samples[0]) == 32
    assert summary(as_pairs.directory) == (
        "feedback: 16 desirable answers (50%) and 16 undesirable ones, converted from 16 pairs to 32 rows; "
        "together the desirable ones weigh 1.00 times as much"
    )
    assert "converted" not in summary(as_rows.directory)


def test_a_lack_of_balance_is_said_with_the_weights_that_mend_it(tmp_path: Path, tiny: Path, thumbs_file: Path) -> None:
    """16 desirable and 8 undesirable answers: w_D * 16 / (w_U * 8) is to be from 1 to 4/3."""
    said = summary(context_of(tmp_path, tiny, thumbs_file).directory)
    assert said.startswith(
        "feedback: 16 desirable answers (67%) and 8 undesirable ones; together the desirable ones weigh 2.00 times as much"
    )
    assert said.endswith("outside of 1 to 1.33: set desirable_weight to 0.5 to 0.667, or undesirable_weight to 1.5 to 2")
    for mended in ({"desirable_weight": 0.5}, {"desirable_weight": 0.666}, {"undesirable_weight": 1.51}, {"undesirable_weight": 2.0}):
        assert "outside" not in summary(context_of(tmp_path, tiny, thumbs_file, **mended).directory), mended


def test_an_answer_that_bears_both_labels_is_counted_and_too_many_are_refused(
    posttrain: Cli, kto_file: Path, thumbs_file: Path, tmp_path: Path
) -> None:
    rows = read_lines(thumbs_file)
    data = write(tmp_path / "both.jsonl", [*rows, {**rows[0], "label": not rows[0]["label"]}])
    line = refused(posttrain, kto_file, tmp_path / "refused", f"sources.prefs.data={data}")
    assert "2 rows of prefs, 8.0% and over 5.0%, bear one label where the same answer bears the other" in line
    assert f"{data}:1 and {data}:25" in line
    stage = run(posttrain, kto_file, tmp_path, f"sources.prefs.data={data}", "stages.kto.preflight.contradictory=0.1")
    assert "; 2 bear both labels" in summary(stage)


def test_inspect_shows_each_answer_under_its_label(posttrain: Cli, kto_file: Path, tmp_path: Path, tiny: Path, pairs_file: Path) -> None:
    ended = posttrain("inspect", kto_file, "kto", "--root", tmp_path / "runs", "--json", "--num-rows", "32")
    assert ended.code == 0, ended.err
    shown = json.loads(ended.out)
    samples = read_samples(context_of(tmp_path, tiny, pairs_file).directory)
    for row, sample in zip(shown, samples, strict=True):
        name = "desirable" if sample["label"] else "undesirable"
        assert set(row) == {"row", name} and row["row"] == sample["row"]
        assert row[name]["ids"] == sample["prompt_ids"] + sample["completion_ids"]
        assert sum(row[name]["trained"]) == len(sample["completion_ids"]) and row[name]["trained"][-1]
    out = posttrain("inspect", kto_file, "kto", "--root", tmp_path / "runs", "--row", "3", "--html", tmp_path / "page.html").out
    assert "page.html" in out and "undesirable" in (tmp_path / "page.html").read_text()
    out = posttrain("inspect", kto_file, "kto", "--root", tmp_path / "runs", "--row", "3").out
    assert "trained, undesirable" in out and "⟪there are birds in the sky 1<|im_end|>⟫" in out


GOOD, BAD = ({"prompt": f"{label}?", "completion": "so", "label": label} for label in (True, False))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [GOOD, {**GOOD, "prompt": "b"}],
            "all 2 answers of prefs are desirable, and it learns from both kinds; add some",
        ),
        ([BAD, {**BAD, "prompt": "b"}], "all 2 answers of prefs are undesirable, and it learns from both kinds; add some"),
        ([{"prompt": "a", "completion": "b"}], ".jsonl:1: is a conversation without a label, and stages.kto learns from answers with one"),
        ([GOOD, {**BAD, "completion": ""}], ".jsonl:2: completion: is empty"),
        ([GOOD, {**BAD, "label": "sports"}], ".jsonl:2: label: must be true or false, got 'sports'"),
        ([GOOD, {**BAD, "label": None}], ".jsonl:2: label: is missing or null"),
        ([GOOD, {**BAD, "prompt": "True?", "completion": "no"}, {**BAD, "prompt": "true? "}, BAD], "3 of 4 rows ask the same"),
    ],
    ids=["all liked", "none liked", "no label", "no answer", "a topic", "null", "one question"],
)
def test_data_that_cannot_teach_are_refused(posttrain: Cli, kto_file: Path, tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    data = write(tmp_path / "data.jsonl", rows)
    assert said in refused(posttrain, kto_file, tmp_path / "runs", f"sources.prefs.data={data}", "stages.kto.global_batch_size=2")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.kto.global_batch_size=1", "stages.kto.global_batch_size"),
        ("stages.kto.loss_type=bco", "stages.kto.loss_type"),
        ("stages.kto.trainer={beta: 0.2}", "stages.kto.trainer.beta: is a field of the stage"),
        ("stages.kto.trainer={train_sampling_strategy: random}", "is set by the pipeline; the order of samples follows from the seed"),
    ],
)
def test_settings_that_do_not_fit_are_refused(posttrain: Cli, kto_file: Path, tmp_path: Path, override: str, said: str) -> None:
    assert said in refused(posttrain, kto_file, tmp_path, override)


def test_labelled_answers_are_not_taken_for_conversations(posttrain: Cli, pipeline_file: Path, thumbs_file: Path, tmp_path: Path) -> None:
    """Undesirable answers would be learned, and measured as if they were wanted."""
    data = f"sources.chat.data={thumbs_file}"
    for stage in ("sft", "eval"):
        ended = posttrain("run", pipeline_file, "--root", tmp_path, "--only", stage, data, "stages.eval.inputs.policies=[base]")
        assert ended.code == 2 and f"{thumbs_file}:1: is a labelled answer, and stages.{stage} " in ended.err


def test_the_reference_is_shared_by_all_that_ask_it_the_same(tmp_path: Path, tiny: Path, thumbs_file: Path) -> None:
    def place(**fields: Any) -> str:
        context = context_of(tmp_path, tiny, thumbs_file, **fields)
        return str(json.loads((context.directory / "reference.json").read_text())["path"])

    assert place() == place(beta=0.7, desirable_weight=0.5, global_batch_size=4, seed=3)
    assert place() != place(loss_type="apo_zero_unpaired"), "which asks for no mismatched answers"
