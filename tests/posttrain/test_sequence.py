"""Ranks that compute samples together find what one rank finds: scores and gradients of many architectures, and whole trainings.

`python -m tests.posttrain.test_sequence DIRECTORY` compares on teams of two and of four ranks, and writes what it found there.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from posttrain.disk import hash_file, read_json
from posttrain.forward import attach, exact_layouts, to_batch
from posttrain.hardware import HARDWARE
from posttrain.layout import Unsupported
from posttrain.planner import Job, memory, shape_of
from posttrain.planner import time as foretold_time
from posttrain.sequence import Piece, Team, team_of, why_never_exact
from tests.conftest import REPOSITORY, Ended, killing, read_lines
from tests.posttrain.test_forward import BOTH, GROUPS, assert_same, fresh, learned, ours, plain
from tests.posttrain.test_planner import LLAMA_7B, config, llama

Cli = Callable[..., Ended]
SIZES = (2, 4)
EXACT = {
    "llama, GQA": ["shared", "packed"],  # its keys are fewer than the ranks of the larger team
    "gpt2": ["shared", "packed"],
    "mixtral": ["shared", "packed"],
    "gemma3, a narrow window": ["padded"],
}
COMPARED = ("pairs", "one token", "unlike numbers", "nothing in common")
REFUSED = ("mamba2", "lfm2, convolutions beside attention", "gpt-oss, sinks", "bloom", "falcon, whose attention is its own")


# --- pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("length", [1, 7, 8, 40])
def test_every_place_is_in_one_piece_where_it_is_said_to_be(size: int, length: int) -> None:
    rows = torch.arange(1, 3 * length + 1).view(3, length)
    places = torch.arange(3 * length)[torch.randperm(3 * length, generator=torch.Generator().manual_seed(0))]
    seen = []
    for rank in range(size):
        piece = Piece(Team(rank, size, 0, 1), length)
        mine, where = piece.find(places)
        assert torch.equal(piece.cut(rows).reshape(-1)[where], rows.reshape(-1)[places[mine]])
        assert piece.cut(rows).shape == (3, -(-length // size))
        seen += mine.tolist()
    assert sorted(seen) == list(range(3 * length))


@pytest.mark.parametrize(
    ("fields", "longest", "reason"),
    [
        ({}, 10**6, ""),
        ({"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 64}}, 65, ""),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 64}}, 64, ""),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 64}}, 65, "rows of over 64 tokens"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}, "max_position_embeddings": 32}, 33, "rows of over 32 tokens"),
        ({"attn_temperature_tuning": True, "floor_scale": 8192}, 8192, ""),
        ({"attn_temperature_tuning": True, "floor_scale": 8192}, 8193, "counts positions from where it begins"),
    ],
)
def test_what_short_rows_do_not_show_is_read_off_the_config(fields: dict[str, Any], longest: int, reason: str) -> None:
    found = why_never_exact(SimpleNamespace(**fields), longest)
    assert (reason in found) and bool(found) == bool(reason)


# --- ranks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was found on teams of each size; the scores and gradients were compared there."""
    directory = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.posttrain.test_sequence", str(directory)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return directory


@pytest.mark.parametrize("size", SIZES)
def test_scores_and_gradients_of_a_team_are_those_of_each_sequence_alone(compared: Path, size: int) -> None:
    found = json.loads((compared / f"{size}.json").read_text())
    assert {name: layouts for name, (layouts, _) in found["exact"].items()} == EXACT
    for layouts, number in found["exact"].values():
        assert number == len(COMPARED) * len({*layouts, "padded"}), "as often as it was compared"


@pytest.mark.parametrize("size", SIZES)
def test_a_model_whose_tokens_meet_outside_of_attention_is_refused(compared: Path, size: int) -> None:
    found = json.loads((compared / f"{size}.json").read_text())["refused"]
    assert found.keys() == set(REFUSED)
    assert all(reason and "\n" not in reason for reason in found.values()), found


def _compare(directory: Path, size: int, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/{size}.store", rank=rank, world_size=size)
    context: Any = SimpleNamespace(config=SimpleNamespace(sequence_parallel_size=size), rank=rank, world_size=size)
    team = team_of(context)
    found: dict[str, Any] = {"exact": {}, "refused": {}}
    for architecture in EXACT:
        model, alone = fresh(architecture), fresh(architecture)
        attach(model, team=team)
        layouts, _ = exact_layouts(model, model, BOTH, 48, team=team)
        number = 0
        for groups in (GROUPS[name] for name in COMPARED):
            expected = learned(partial(plain, alone, groups), alone)
            for layout in dict.fromkeys([*layouts, "padded"]):
                assert_same(_of_team(partial(ours, model, groups, layout), model), expected)
                number += 1
        found["exact"][architecture] = (layouts, number)
    _compare_balance(team)
    for architecture in REFUSED:
        model = fresh(architecture)
        attach(model, team=team)
        try:
            exact_layouts(model, model, BOTH, 48, team=team)
        except Unsupported as error:
            found["refused"][architecture] = str(error)
    if rank == 0:
        (directory / f"{size}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _of_team(score: Callable[[], list[torch.Tensor]], model: Any) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """`learned`, with gradients averaged over ranks as DDP does."""
    log_probs, mine = learned(score, model)
    gradients = {name: mine.get(name, torch.zeros_like(parameter)) for name, parameter in model.named_parameters()}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return log_probs, gradients


def _compare_balance(team: Team) -> None:
    """Of experts: the loss that balances them, and its gradient, by the model's own loss and by the team."""
    alone, model = fresh("mixtral"), fresh("mixtral")
    attach(model, team=team)
    exact_layouts(model, model, BOTH, 48, team=team)
    attach(alone)
    exact_layouts(alone, alone, BOTH, 48)
    for layout in ("padded", "shared"):
        batch = to_batch(GROUPS["pairs"], layout, 0)  # type: ignore[arg-type]
        assert_same(_of_team(partial(_balance, model, batch), model), learned(partial(_balance, alone, batch), alone))


def _balance(model: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    return [model(**batch, output_router_logits=True, fused_lm_head=True).aux_loss[None]]


# --- whole trainings -------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path: Path, tiny: Path, chat_file: Path, pairs_file: Path) -> Path:
    """A stage of every kind that takes teams, each from the base, by plain gradient descent: what differs by rounding stays so."""
    path = tmp_path / "pipeline.yaml"
    common = "learning_rate: 0.05, optim: sgd, global_batch_size: 8, max_length: 128, max_steps: 4, micro_batch_tokens: 100"
    stages = "\n".join(
        f"  {kind}: {{inputs: {{policy: base, data: {'chat' if kind == 'sft' else 'prefs'}}}, {common}}}"
        for kind in ("sft", "dpo", "orpo", "kto", "reward")
    )
    sources = f"  base: {{model: {tiny}}}\n  chat: {{data: {chat_file}}}\n  prefs: {{data: {pairs_file}}}"
    path.write_text(f"run: test\nsources:\n{sources}\nstages:\n{stages}\n")
    return path


@pytest.fixture(scope="module")
def alone() -> dict[str, Path]:
    """Filled by whoever needs it first: the stages as one rank trains them."""
    return {}


def train(posttrain: Cli, chain: Path, root: Path, kind: str, *overrides: str) -> Path:
    """Run a stage; its directory."""
    ended = posttrain("run", chain, "--root", root, "--only", kind, *(f"stages.{kind}.{each}" for each in overrides))
    assert ended.code == 0, ended.err
    return root / "test" / kind


def losses(stage: Path) -> list[float]:
    return [line["loss"] for line in read_lines(stage / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("sft", ("num_processes=2",)),
        ("sft", ("num_processes=4", "deepspeed=ds_configs/zero3.json")),
        ("dpo", ("num_processes=2", "layout=shared", "gradient_checkpointing=true")),
        ("dpo", ("num_processes=2", "layout=padded", "deepspeed=ds_configs/zero2.json")),
        ("dpo", ("num_processes=4", "loss_type=[aot]")),
        ("orpo", ("num_processes=2",)),
        ("kto", ("num_processes=2",)),
        ("reward", ("num_processes=2",)),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(each.rpartition("/")[2] for each in value),
)
def test_a_team_learns_what_one_rank_does(
    posttrain: Cli, chain: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, alone: dict[str, Path], kind: str, overrides: Any
) -> None:
    of_loss = tuple(each for each in overrides if each.startswith("loss_type"))
    name = " ".join((kind, *of_loss))
    if name not in alone:
        alone[name] = train(posttrain, chain, tmp_path_factory.mktemp("alone"), kind, *of_loss)
    stage, expected = train(posttrain, chain, tmp_path / "team", kind, *overrides, "sequence_parallel_size=2"), alone[name]
    assert losses(stage) == pytest.approx(losses(expected), rel=1e-5)
    for line, other in zip(read_lines(stage / "metrics.jsonl"), read_lines(expected / "metrics.jsonl"), strict=True):
        speeds = {"tokens_per_s", "trained_tokens_per_s", "step_time_s"}
        assert {n: v for n, v in line.items() if n not in speeds} == pytest.approx(
            {n: v for n, v in other.items() if n not in speeds}, rel=1e-4, abs=1e-5
        )
    found, wanted = (load_file(each / "output" / "model.safetensors") for each in (stage, expected))
    for weight, tensor in wanted.items():
        torch.testing.assert_close(found[weight], tensor, rtol=1e-5, atol=1e-5, msg=weight)
    assert read_json(stage / "artifact.json")["payload"]["fingerprint"] == read_json(expected / "artifact.json")["payload"]["fingerprint"]


def test_a_team_that_is_killed_goes_on_to_the_same_bytes_and_another_number_of_ranks_to_the_same_losses(
    posttrain: Cli, chain: Path, tmp_path: Path
) -> None:
    options = ("optim=adamw_torch", "max_steps=24", "save_steps=4")
    team = ("num_processes=2", "sequence_parallel_size=2")
    whole, root = train(posttrain, chain, tmp_path / "whole", "sft", *options, *team), tmp_path / "cut"
    metrics = root / "test" / "sft" / "metrics.jsonl"
    with killing("sft:run:1", when=lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 10):
        ended = posttrain("run", chain, "--root", root, "--only", "sft", *(f"stages.sft.{each}" for each in (*options, *team)))
    assert ended.code == 1 and "rank 1 ended (killed by SIGKILL)" in ended.err
    shutil.copytree(root, tmp_path / "other")
    same = train(posttrain, chain, root, "sft", *options, *team)
    assert losses(same) == losses(whole)
    assert hash_file(same / "output" / "model.safetensors") == hash_file(whole / "output" / "model.safetensors")
    other = train(posttrain, chain, tmp_path / "other", "sft", *options)
    assert losses(other) == pytest.approx(losses(whole), rel=1e-5)


# --- what is refused, and foretold -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("sft", ("num_processes=4", "sequence_parallel_size=3"), "sequence_parallel_size: 4 processes cannot be divided into teams of 3"),
        (
            "sft",
            ("num_processes=6", "sequence_parallel_size=2"),
            "global_batch_size: 8 samples cannot be divided among 3 teams of 2 processes; 6 or 9 can",
        ),
        ("sft", ("sequence_parallel_size=0",), "sequence_parallel_size: input should be greater than or equal to 1, got 0"),
    ],
)
def test_what_ranks_cannot_share_is_refused_when_it_is_planned(
    posttrain: Cli, chain: Path, tmp_path: Path, kind: str, overrides: tuple[str, ...], message: str
) -> None:
    ended = posttrain("plan", chain, "--root", tmp_path, *(f"stages.{kind}.{each}" for each in overrides))
    assert (ended.code, ended.err.strip()) == (2, f"error: stages.{kind}.{message}")


def test_heads_that_ranks_cannot_share_are_refused_before_a_model_is_loaded(posttrain: Cli, chain: Path, tmp_path: Path) -> None:
    options = ("stages.dpo.num_processes=3", "stages.dpo.sequence_parallel_size=3")
    ended = posttrain("run", chain, "--root", tmp_path, "--only", "dpo", *options)
    assert ended.code == 2
    assert "stages.dpo.sequence_parallel_size: base has 4 attention heads, which 3 ranks cannot share equally" in ended.err


def test_a_stage_that_samples_with_whole_models_takes_no_teams(posttrain: Cli, chain: Path, tmp_path: Path) -> None:
    rlhf = "{inputs: {policy: base, data: chat}, checkers: [final_number], num_processes: 2, sequence_parallel_size: 2}"
    ended = posttrain("plan", chain, "--root", tmp_path, f"stages.rlhf={rlhf}")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "stages.rlhf.sequence_parallel_size: an answer is sampled by one rank" in ended.err


def test_a_rank_of_a_team_keeps_its_piece_of_the_activations_and_sends_the_rest() -> None:
    shape, h100 = shape_of(config(*LLAMA_7B), llama(*LLAMA_7B)), HARDWARE["h100-80gb"]
    job = Job("sft", 8, 8, zero_stage=3, max_length=32768, global_batch_size=8, recompute=True, micro_batch_tokens=1)
    team = replace(job, team_size=4)
    whole, piece = (memory(shape, each, h100) for each in (job, team))
    assert (piece.weights, piece.optimizer) == (whole.weights, whole.optimizer)
    assert piece.activations * 4 == pytest.approx(whole.activations, rel=1e-6)
    # Queries, keys, values and what attention gives, 4096 numbers each of two bytes, of which three quarters go to others; forward,
    # backward, and once more where they are computed again.
    sent = 32768 * 32 * 4 * 4096 * 2 * 0.75 * 3
    times = [foretold_time(shape, each, h100) for each in (job, team)]
    swapped = times[1].step_s - max(times[1].compute_s, times[1].launch_s) - times[1].update_s
    assert swapped == pytest.approx(sent / (450e9 * 0.7), rel=1e-6)
    assert times[1].compute_s == pytest.approx(times[0].compute_s)


if __name__ == "__main__":
    for size in SIZES:
        ranks = [get_context("fork").Process(target=_compare, args=(Path(sys.argv[1]), size, rank)) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(f"a team of {size} ended with {[process.exitcode for process in ranks]}")
