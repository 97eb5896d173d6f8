"""SFT against a plain torch loop written here, and against itself on other numbers of ranks and micro-batches."""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.batch import epoch_order
from posttrain.disk import hash_file, read_json
from tests.conftest import Ended, killing, read_lines, read_samples

Cli = Callable[..., Ended]
CONSTANT = ("stages.sft.lr_scheduler_type=constant", "stages.sft.warmup_steps=0")


def run_sft(posttrain: Cli, pipeline_file: Path, root: Path, *overrides: str) -> Path:
    """Run the stage alone under `root`; its directory."""
    ended = posttrain("run", pipeline_file, "--root", root, "--only", "sft", *overrides)
    assert ended.code == 0, ended.err
    return root / "test" / "sft"


def losses(stage: Path) -> list[float]:
    """The loss of each step."""
    return [line["loss"] for line in read_lines(stage / "metrics.jsonl")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Filled by the first test that needs it: the stage trained by one process."""
    return {}


@pytest.fixture
def one_process(plain: dict[str, Path], posttrain: Cli, pipeline_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "stage" not in plain:
        plain["stage"] = run_sft(posttrain, pipeline_file, tmp_path_factory.mktemp("plain"), *CONSTANT)
    return plain["stage"]


def start_model(tiny: Path, published: Path) -> Any:
    """The tiny model as SFT must have started from it: new tokens at the mean of the old ones."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(published)
    old = model.config.vocab_size
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[old:] = table.weight[:old].mean(dim=0)
    return model


def reference_losses(model: Any, rows: list[dict[str, Any]], *, num_steps: int, batch: int, lr: float, bf16: bool = False) -> list[float]:
    """SFT by the book, a row at a time: the summed loss of a batch over its number of labels, AdamW, norm clipped to 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    stream = [int(i) for epoch in range(2) for i in epoch_order(len(rows), 0, epoch)]
    found = []
    for step in range(num_steps):
        samples = [rows[i] for i in stream[step * batch : (step + 1) * batch]]
        total = sum(label != -100 for row in samples for label in row["labels"])
        loss = torch.zeros(())
        for row in samples:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].float()
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"])[1:], ignore_index=-100, reduction="sum")
        loss = loss / total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(float(loss))
    return found


def test_losses_equal_those_of_a_plain_loop(one_process: Path, tiny: Path) -> None:
    expected = reference_losses(start_model(tiny, one_process / "output"), read_samples(one_process), num_steps=6, batch=8, lr=1e-3)
    assert losses(one_process) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [(), ("stages.sft.micro_batch_tokens=150",), ("stages.sft.micro_batch_tokens=150", "launcher.num_processes=2")],
    ids=" ".join,
)
def test_losses_in_bfloat16_equal_those_of_a_plain_loop_under_autocast(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, tiny: Path, overrides: tuple[str, ...]
) -> None:
    stage = run_sft(posttrain, pipeline_file, tmp_path / "runs", *CONSTANT, "stages.sft.bf16=true", *overrides)
    model = start_model(tiny, stage / "output")
    expected = reference_losses(model, read_samples(stage), num_steps=6, batch=8, lr=1e-3, bf16=True)
    assert losses(stage) == pytest.approx(expected, rel=3e-3)
    assert min(abs(a / b - 1) for a, b in itertools.pairwise(expected)) > 0.01, "a step with the weights of the one before would be seen"


@pytest.mark.parametrize(
    "overrides",
    [
        ("stages.sft.micro_batch_tokens=1",),
        ("stages.sft.micro_batch_tokens=200", "stages.sft.layout=packed"),
        ("stages.sft.layout=padded",),
        ("stages.sft.layout=padded", "stages.sft.micro_batch_tokens=150"),
        ("stages.sft.attn_implementation=eager",),
        ("stages.sft.gradient_checkpointing=true",),
        ("launcher.num_processes=2",),
        ("launcher.num_processes=2", "stages.sft.micro_batch_tokens=150"),
        ("launcher.num_processes=2", "stages.sft.layout=padded"),
        ("launcher.num_processes=2", "stages.sft.deepspeed=ds_configs/zero1.json"),
        ("launcher.num_processes=2", "stages.sft.deepspeed=ds_configs/zero2.json", "stages.sft.micro_batch_tokens=150"),
        ("launcher.num_processes=2", "stages.sft.deepspeed=ds_configs/zero3.json"),
        ("launcher.num_processes=2", "stages.sft.deepspeed=ds_configs/zero3_offload.json"),
    ],
    ids=lambda overrides: " ".join(o.rpartition(".")[2] if o.endswith("json") is False else Path(o).stem for o in overrides),
)
def test_where_and_how_fast_it_trains_changes_no_loss(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, one_process: Path, overrides: tuple[str, ...]
) -> None:
    stage = run_sft(posttrain, pipeline_file, tmp_path / "runs", *CONSTANT, *overrides)
    assert losses(stage) == pytest.approx(losses(one_process), rel=1e-4)
    assert (
        read_json(stage / "artifact.json")["payload"]["fingerprint"] == read_json(one_process / "artifact.json")["payload"]["fingerprint"]
    )
    reloaded = AutoModelForCausalLM.from_pretrained(stage / "output").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(one_process / "output").state_dict()
    for name, tensor in expected.items():
        # Adam turns the rounding of a gradient near zero into a step of up to the learning rate.
        assert float((reloaded[name] - tensor).abs().mean()) < 1e-5, name


def test_a_position_whose_target_is_masked_gets_exactly_no_gradient(one_process: Path, tiny: Path) -> None:
    from posttrain.forward import attach

    row = read_samples(one_process)[0]
    model = start_model(tiny, one_process / "output")
    attach(model)
    seen: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)

    model.model.register_forward_hook(keep)
    labels = torch.tensor([row["labels"]])
    model(input_ids=torch.tensor([row["input_ids"]]), labels=labels, fused_lm_head=True).log_probs.sum().backward()
    gradient = seen[0].grad[0].abs().sum(dim=-1)
    trained = labels[0, 1:] != -100
    assert bool((gradient[:-1][~trained] == 0).all())
    assert bool((gradient[:-1][trained] > 0).all())
    assert float(gradient[-1]) == 0


def test_only_answers_and_their_stop_tokens_are_labels(one_process: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(one_process / "output")
    row = read_samples(one_process)[0]
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "the colour is red<|im_end|>there are 0<|im_end|>"


def test_a_published_policy_is_a_whole_hugging_face_directory_that_stops(one_process: Path) -> None:
    output = one_process / "output"
    assert sorted(path.name for path in output.iterdir()) == [
        "chat_contract.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    tokenizer, model = AutoTokenizer.from_pretrained(output), AutoModelForCausalLM.from_pretrained(output)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id[0] == stop == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != stop
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_metrics_and_provenance_are_recorded(one_process: Path) -> None:
    payload = read_json(one_process / "artifact.json")["payload"]
    assert payload["metrics"]["loss"] == losses(one_process)[-1]
    assert payload["metrics"]["mean_loss"] == pytest.approx(sum(losses(one_process)) / 6)
    assert payload["metrics"]["num_steps"] == 6
    assert payload["metrics"]["handoff_logit_drift"] == 0
    assert payload["files"]["model.safetensors"]["sha256"] == hash_file(one_process / "output" / "model.safetensors")
    assert payload["provenance"]["versions"]["trl"]
    assert payload["provenance"]["config"]["learning_rate"] == 1e-3


@pytest.mark.parametrize("deepspeed", [None, "ds_configs/zero3.json"])
def test_lora_publishes_merged_weights_with_the_adapter_beside_them(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, tiny: Path, deepspeed: str | None
) -> None:
    from peft import PeftModel

    overrides = ["stages.sft.lora={r: 4}", "stages.sft.learning_rate=1e-2", "stages.sft.weight_decay=0.1"]
    if deepspeed:
        overrides += ["launcher.num_processes=2", f"stages.sft.deepspeed={deepspeed}"]
    stage = run_sft(posttrain, pipeline_file, tmp_path / "runs", *overrides)
    assert losses(stage)[-1] < losses(stage)[0]
    base = start_model(tiny, stage / "output")
    before = base.get_input_embeddings().weight.detach().clone()
    adapted = PeftModel.from_pretrained(base, str(stage / "output" / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(stage / "output")
    ids = torch.tensor([read_samples(stage)[0]["input_ids"]])
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    after = merged.get_input_embeddings().weight
    old = AutoModelForCausalLM.from_pretrained(tiny).config.vocab_size
    assert torch.equal(after[:old], before[:old]), "the embeddings of known tokens are frozen"
    assert float((after[old] - after[old + 1]).norm()) > 0, "new tokens that all stay at the mean cannot be told apart"


def test_a_rank_killed_in_training_resumes_to_the_very_same_weights(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        "stages.sft.num_train_epochs=12",
        "stages.sft.save_steps=4",
        "stages.sft.lora={lora_dropout: 0.2}",
        "launcher.num_processes=2",
    )
    whole = run_sft(posttrain, pipeline_file, tmp_path / "whole", *options)
    root = tmp_path / "cut"
    metrics = root / "test" / "sft" / "metrics.jsonl"
    with killing("sft:run:1", when=lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 10):
        ended = posttrain("run", pipeline_file, "--root", root, "--only", "sft", *options)
    assert ended.code == 1
    assert "rank 1 ended (killed by SIGKILL)" in ended.err
    assert not (root / "test" / "sft" / "artifact.json").exists()
    ended = posttrain("run", pipeline_file, "--root", root, "--only", "sft", *options)
    assert ended.code == 0, ended.err
    assert "resume: from the checkpoint of step" in ended.out
    cut = root / "test" / "sft"
    assert losses(cut) == losses(whole)
    assert hash_file(cut / "output" / "model.safetensors") == hash_file(whole / "output" / "model.safetensors")


def test_what_was_cut_off_while_publishing_is_published_without_training_again(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, one_process: Path
) -> None:
    import threading
    import time

    stage = tmp_path / "test" / "sft"

    def obstruct() -> None:
        while not (stage / "metrics.jsonl").exists():
            time.sleep(0.01)
        (stage / "output.partial").touch()  # where a directory is to be made

    obstructor = threading.Thread(target=obstruct)
    obstructor.start()
    ended = posttrain("run", pipeline_file, "--root", tmp_path, "--only", "sft", *CONSTANT)
    obstructor.join()
    assert ended.code == 1
    (stage / "output.partial").unlink()
    ended = posttrain("run", pipeline_file, "--root", tmp_path, "--only", "sft", *CONSTANT)
    assert ended.code == 0, ended.err
    assert "resume: from the checkpoint of step 6" in ended.out
    assert hash_file(stage / "output" / "model.safetensors") == hash_file(one_process / "output" / "model.safetensors")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.sft.trainer={gradient_acumulation_steps: 2}", "did you mean"),
        ("stages.sft.trainer={gradient_accumulation_steps: 2}", "derived from global_batch_size"),
        ("stages.sft.trainer={learning_rate: 1.0}", "set stages.sft.learning_rate instead"),
        ("stages.sft.trainer={adam_beta2: high}", "stages.sft.trainer.adam_beta2"),
        ("stages.sft.deepspeed=nowhere.json", "stages.sft.deepspeed"),
        ("stages.sft.chat_template=nowhere.jinja", "stages.sft.chat_template"),
        ("stages.sft.max_length=8", "stages.sft.max_length: 8"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_before_a_model_is_loaded(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, override: str, said: str
) -> None:
    ended = posttrain("run", pipeline_file, "--root", tmp_path / "runs", "--only", "sft", override)
    assert ended.code == 2
    assert said in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not (tmp_path / "runs" / "test" / "sft" / "output").exists()


def test_a_field_of_trl_is_passed_through(posttrain: Cli, pipeline_file: Path, tmp_path: Path, one_process: Path) -> None:
    stage = run_sft(posttrain, pipeline_file, tmp_path / "runs", *CONSTANT, "stages.sft.trainer={adam_beta1: 0.5, loss_type: dft}")
    assert not math.isclose(losses(stage)[0], losses(one_process)[0], rel_tol=1e-2)


def test_sft_can_start_from_a_model_that_has_a_template(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> None:
    first = run_sft(posttrain, pipeline_file, tmp_path / "runs")
    second = run_sft(posttrain, pipeline_file, tmp_path / "again", f"sources.base.model={first / 'output'}")
    assert read_json(second / "output" / "chat_contract.json") == read_json(first / "output" / "chat_contract.json")
