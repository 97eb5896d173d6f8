"""Each way to merge against its formula in numpy, on policies that are stored in pieces, in halves or with tied tables."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from posttrain.config import ModelSource
from posttrain.models import load_policy, load_tokenizer
from posttrain.stage import Input
from tests.conftest import Ended, read_samples

Cli = Callable[..., Ended]
Arrays = dict[str, npt.NDArray[Any]]
DENSITY, SCALE, WEIGHTS = 0.4, 0.8, (0.7, 0.3)


def write_policy(base: Path, path: Path, seed: int, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A policy as a stage publishes it: `base` under its chat contract, each weight changed a little; `options` are of saving."""
    given = Input("base", "policy", "", ModelSource(model=str(base)))
    tokenizer, contract = load_tokenizer(given, "test", system_prompt=options.pop("system_prompt", None))
    model = load_policy(given.model, tokenizer, contract, "test", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.to(dtype).save_pretrained(path, **options)  # type: ignore[arg-type]
    tokenizer.save_pretrained(path)
    contract.save(path)
    return path


def read(path: Path) -> Arrays:
    """All tensors of a model directory, in fp32."""
    return {name: tensor.float().numpy() for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Policies of one base, by their names in the pipeline file; `same` is the very same as `a`."""
    here = tmp_path_factory.mktemp("models")
    tied = here / "tied_base"
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny, tie_word_embeddings=True)).save_pretrained(tied)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tied)
    made = {
        "base": tiny,
        "a": write_policy(tiny, here / "a", 1, max_shard_size="40KB"),
        "b": write_policy(tiny, here / "b", 2),
        "c": write_policy(tiny, here / "c", 3),
        "half_a": write_policy(tiny, here / "half_a", 4, dtype=torch.bfloat16),
        "tied_a": write_policy(tied, here / "tied_a", 5),
        "tied_b": write_policy(tied, here / "tied_b", 6),
    }
    assert len(list((here / "a").glob("*.safetensors"))) > 1
    made["same"] = shutil.copytree(made["a"], here / "same")
    return made


CHANGES = f"inputs: {{policies: [a, b], base: base}}, weights: [7, 3], density: {DENSITY}, scale: {SCALE}"
STAGES = f"""
  mean: {{inputs: {{policies: [a, b, c]}}}}
  weighted: {{inputs: {{policies: [a, b]}}, weights: [7, 3]}}
  back: {{inputs: {{policies: [a, base]}}}}
  itself: {{inputs: {{policies: [a, same]}}, weights: [1, 2]}}
  halves: {{inputs: {{policies: [half_a, b]}}}}
  tied: {{inputs: {{policies: [tied_a, tied_b]}}}}
  arc: {{inputs: {{policies: [a, b]}}, method: slerp, t: 0.3}}
  ties: {{{CHANGES}, method: ties}}
  ties3: {{inputs: {{policies: [a, b, c], base: base}}, method: ties, density: {DENSITY}}}
  dare: {{{CHANGES}, method: dare_linear}}
  dare_ties: {{{CHANGES}, method: dare_ties}}
  other_seed: {{{CHANGES}, method: dare_linear, seed: 1}}
"""


def write_pipeline(path: Path, models: dict[str, Path], pairs_file: Path, stages: str) -> Path:
    kinds = "".join(
        line.replace(": {", ": {kind: merge, ", 1) if "policies:" in line else line for line in stages.splitlines(keepends=True)
    )
    sources = "".join(f"  {name}: {{model: {model}}}\n" for name, model in models.items())
    path.write_text(f"run: r\nsources:\n{sources}  prefs: {{data: {pairs_file}}}\nstages:{kinds}")
    return path


@pytest.fixture(scope="module")
def done() -> dict[str, Path]:
    """Filled by the first test that needs it."""
    return {}


@pytest.fixture
def merged(
    done: dict[str, Path], posttrain: Cli, models: dict[str, Path], pairs_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The directory of a run of all of `STAGES`, and of one that trains what one of them made."""
    if not done:
        here = tmp_path_factory.mktemp("merged")
        after = "  dpo: {inputs: {policy: mean, data: prefs}, max_steps: 1, max_length: 128}\n"
        ended = posttrain("run", write_pipeline(here / "pipeline.yaml", models, pairs_file, STAGES + after), "--root", here / "runs")
        assert ended.code == 0, ended.err
        done["run"] = here / "runs" / "r"
    return done["run"]


def metrics(stage: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((stage / "artifact.json").read_text())["payload"]["metrics"]
    return found


def changes(models: dict[str, Path], merged: Arrays, *names: str) -> Iterator[tuple[npt.NDArray[Any], list[npt.NDArray[Any]]]]:
    """For each tensor what the base became, and what each policy made of the base; the base has the mean vector for new tokens."""
    base, policies = read(models["base"]), [read(models[name]) for name in names]
    assert merged.keys() == base.keys()
    for name, tensor in base.items():
        new = policies[0][name].shape[0] - tensor.shape[0]
        grown = np.concatenate([tensor, np.repeat(tensor.mean(0, keepdims=True), new, axis=0)]) if new else tensor
        yield merged[name] - grown, [policy[name] - grown for policy in policies]


def test_linear_is_the_weighted_mean(models: dict[str, Path], merged: Path) -> None:
    a, b, c = (read(models[name]) for name in "abc")
    mean, weighted = read(merged / "mean" / "output"), read(merged / "weighted" / "output")
    assert mean.keys() == weighted.keys() == a.keys()
    for name in a:
        np.testing.assert_allclose(mean[name], (a[name] + b[name] + c[name]) / 3, atol=1e-6)
        np.testing.assert_allclose(weighted[name], 0.7 * a[name] + 0.3 * b[name], atol=1e-6)


def test_a_base_without_the_new_tokens_counts_as_what_it_was_when_training_began(models: dict[str, Path], merged: Path) -> None:
    for found, (change,) in changes(models, read(merged / "back" / "output"), "a"):
        np.testing.assert_allclose(found, change / 2, atol=1e-6)


def test_a_policy_merged_with_itself_is_itself_bit_for_bit(models: dict[str, Path], merged: Path) -> None:
    before, after = read(models["a"]), read(merged / "itself" / "output")
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)
    assert metrics(merged / "itself")["distance from same"] == 0


def test_it_is_computed_in_fp32_and_stored_as_the_first_policy_is(models: dict[str, Path], merged: Path) -> None:
    a, b = read(models["half_a"]), read(models["b"])
    stored = load_file(merged / "halves" / "output" / "model.safetensors")
    for name, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16
        expected = torch.from_numpy((a[name].astype(np.float64) + b[name]) / 2).float().to(torch.bfloat16)
        assert (tensor == expected).float().mean() > 0.999, "but for what lies in the middle of two values"


def test_tied_tables_stay_tied(models: dict[str, Path], merged: Path) -> None:
    a, b, both = read(models["tied_a"]), read(models["tied_b"]), read(merged / "tied" / "output")
    assert "lm_head.weight" not in both
    np.testing.assert_allclose(
        both["model.embed_tokens.weight"], (a["model.embed_tokens.weight"] + b["model.embed_tokens.weight"]) / 2, atol=1e-6
    )
    model: Any = AutoModelForCausalLM.from_pretrained(merged / "tied" / "output")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_slerp_goes_along_the_arc(models: dict[str, Path], merged: Path) -> None:
    first, second, found = read(models["a"]), read(models["b"]), read(merged / "arc" / "output")
    for name in first:
        u, v = first[name].astype(np.float64), second[name].astype(np.float64)
        angle = np.arccos(np.sum(u * v) / np.linalg.norm(u) / np.linalg.norm(v))
        np.testing.assert_allclose(found[name], (np.sin(0.7 * angle) * u + np.sin(0.3 * angle) * v) / np.sin(angle), atol=1e-6)


def trimmed(change: npt.NDArray[Any]) -> npt.NDArray[Any]:
    kept = np.argsort(-np.abs(change).ravel(), kind="stable")[: int(DENSITY * change.size)]
    mask = np.zeros(change.size, dtype=bool)
    mask[kept] = True
    return np.where(mask.reshape(change.shape), change, 0)


@pytest.mark.parametrize(("stage", "weights", "scale"), [("ties", WEIGHTS, SCALE), ("ties3", (1 / 3, 1 / 3, 1 / 3), 1.0)])
def test_ties_trims_elects_a_sign_and_averages_those_that_have_it(
    models: dict[str, Path], merged: Path, stage: str, weights: tuple[float, ...], scale: float
) -> None:
    names = ("a", "b", "c")[: len(weights)]
    share = np.array(weights)
    for found, given in changes(models, read(merged / stage / "output"), *names):
        kept = np.stack([trimmed(change) for change in given])
        columns = share.reshape(-1, *[1] * found.ndim)
        elected = np.where((columns * kept).sum(0) >= 0, 1, -1)
        counted = columns * (np.sign(kept) == elected)
        expected = scale * (counted * kept).sum(0) / np.maximum(counted.sum(0), 1e-30)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def choices(given: list[npt.NDArray[Any]], stage: str) -> list[npt.NDArray[Any]]:
    """What the change of a number may be: that of no policy, of the first or the second alone, or of both."""
    first, second = (change / DENSITY for change in given)
    if stage == "dare_ties":
        agree = np.sign(first) == np.sign(second)
        both = np.where(agree, 0.7 * first + 0.3 * second, np.where(np.abs(0.7 * first) >= np.abs(0.3 * second), first, second))
        return [np.zeros_like(first), SCALE * first, SCALE * second, SCALE * both]
    return [np.zeros_like(first), SCALE * 0.7 * first, SCALE * 0.3 * second, SCALE * (0.7 * first + 0.3 * second)]


@pytest.mark.parametrize("stage", ["dare", "dare_ties"])
def test_dare_keeps_a_random_share_of_the_changes_and_makes_up_for_the_others(models: dict[str, Path], merged: Path, stage: str) -> None:
    counts = np.zeros(4)
    for found, given in changes(models, read(merged / stage / "output"), "a", "b"):
        distances = np.abs(np.stack(choices(given, stage)) - found)
        assert distances.min(0).max() < 1e-6
        if stage == "dare":  # where two are the same in `dare_ties`, the first of them is counted
            counts += np.bincount(distances.argmin(0).ravel(), minlength=4)
    if stage == "dare":
        kept = DENSITY
        expected = np.array([(1 - kept) ** 2, kept * (1 - kept), kept * (1 - kept), kept**2])
        np.testing.assert_allclose(counts / counts.sum(), expected, atol=0.01)


def test_another_seed_drops_other_changes(merged: Path) -> None:
    dare, other = read(merged / "dare" / "output"), read(merged / "other_seed" / "output")
    assert any((dare[name] != other[name]).any() for name in dare)


def test_what_is_published_is_a_policy_like_any_other(models: dict[str, Path], merged: Path) -> None:
    for stage in ("mean", "halves", "tied", "ties", "dare"):
        assert metrics(merged / stage)["handoff_logit_drift"] == 0, stage
    contracts = [json.loads((path / "chat_contract.json").read_text()) for path in (models["a"], merged / "mean" / "output")]
    assert contracts[0] == contracts[1]
    assert len(read_samples(merged / "dpo")) == 16
    assert not (merged / "mean" / "checkpoints").exists()


def test_how_far_it_is_from_each_policy_is_told(models: dict[str, Path], merged: Path) -> None:
    a, both = read(models["a"]), read(merged / "weighted" / "output")
    difference = np.sqrt(sum(float(np.sum((both[name] - a[name]) ** 2.0)) for name in a))
    length = np.sqrt(sum(float(np.sum(a[name].astype(np.float64) ** 2)) for name in a))
    assert metrics(merged / "weighted")["distance from a"] == pytest.approx(difference / length, rel=1e-4)


def test_cut_off_and_run_again_it_publishes_the_same_bytes(
    posttrain: Cli, models: dict[str, Path], pairs_file: Path, merged: Path, tmp_path: Path
) -> None:
    line = next(line for line in STAGES.splitlines(keepends=True) if line.startswith("  dare:"))
    file = write_pipeline(tmp_path / "pipeline.yaml", models, pairs_file, "\n" + line)
    assert posttrain("run", file, "--root", tmp_path / "runs", "--time-limit", "1s").code == 75
    stage = tmp_path / "runs" / "r" / "dare"
    assert posttrain("run", file, "--root", tmp_path / "runs").code == 0
    weights = (merged / "dare" / "output" / "model.safetensors").read_bytes()
    assert (stage / "output" / "model.safetensors").read_bytes() == weights
    (stage / "artifact.json").unlink()  # as if it had been killed before it was verified
    ended = posttrain("run", file, "--root", tmp_path / "runs")
    assert ended.code == 0 and "resume: from its published output" in ended.out
    assert (stage / "output" / "model.safetensors").read_bytes() == weights


@pytest.fixture(scope="module")
def others(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Policies that do not go with those of `models`."""
    here = tmp_path_factory.mktemp("others")
    deeper, wider = here / "deeper_base", here / "wider_base"
    for path, change in ((deeper, {"num_hidden_layers": 3}), (wider, {})):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig.from_pretrained(tiny, **change)).save_pretrained(path)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["birds and"])
    tokenizer.save_pretrained(wider)
    return {
        "deeper": write_policy(deeper, here / "deeper", 1),
        "asked": write_policy(tiny, here / "asked", 1, system_prompt="be brief"),
        "wider": write_policy(wider, here / "wider", 1),
        "wider_base": wider,
    }


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("{inputs: {policies: [a]}}", "stages.m.inputs.policies: a alone leaves nothing to merge"),
        ("{inputs: {policies: [a, b]}, weights: [1, 2, 3]}", "stages.m.weights: 3 given for 2 policies"),
        ("{inputs: {policies: [a, b]}, weights: [1, 0]}", "stages.m.weights: [1.0, 0.0] must all be above 0"),
        (
            "{inputs: {policies: [a, b, c]}, method: slerp}",
            "stages.m.inputs.policies: slerp goes from one policy to another, and 3 are named",
        ),
        ("{inputs: {policies: [a, b]}, method: ties}", "stages.m.inputs.base: missing; ties adds up changes"),
        ("{inputs: {policies: [a, b], base: base}}", "stages.m.inputs.base: has no effect with method: linear"),
        ("{inputs: {policies: [a, b]}, density: 0.2}", "stages.m.density: has no effect with method: linear"),
        ("{inputs: {policies: [a, b]}, num_processes: 2}", "stages.m.num_processes: input should be 1, got 2"),
        (
            "{inputs: {policies: [a, deeper]}}",
            "stages.m.inputs.policies: deeper is of another architecture than a: num_hidden_layers is 3, not 2",
        ),
        ("{inputs: {policies: [a, wider]}}", "stages.m.inputs.policies: wider has another vocabulary than a"),
        ("{inputs: {policies: [a, asked]}}", "stages.m.inputs.policies: asked has another chat contract than a: another template"),
        ("{inputs: {policies: [base, a]}}", "stages.m.inputs.policies: a has lm_head.weight of the shape"),
        (
            "{inputs: {policies: [a, tied_a]}}",
            "stages.m.inputs.policies: tied_a is of another architecture than a: tie_word_embeddings is True",
        ),
        ("{inputs: {policies: [a, b], base: wider_base}, method: ties}", "stages.m.inputs.base: wider_base has another vocabulary than a"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_line_before_a_weight_is_read(
    posttrain: Cli, models: dict[str, Path], others: dict[str, Path], pairs_file: Path, tmp_path: Path, stage: str, said: str
) -> None:
    file = write_pipeline(tmp_path / "pipeline.yaml", models | others, pairs_file, f"\n  m: {stage}\n")
    ended = posttrain("run", file, "--root", tmp_path / "runs")
    assert ended.code == 2
    assert ended.err.startswith(f"error: {said}") and ended.err.count("\n") == 1
    assert not (tmp_path / "runs" / "r" / "m" / "checkpoints").exists()


def test_rows_for_a_policy_that_is_yet_to_be_merged_cannot_be_inspected(
    posttrain: Cli, models: dict[str, Path], pairs_file: Path, tmp_path: Path
) -> None:
    stages = "\n  m: {inputs: {policies: [a, b]}}\n  dpo: {inputs: {policy: m, data: prefs}}\n"
    file = write_pipeline(tmp_path / "pipeline.yaml", models, pairs_file, stages)
    ended = posttrain("inspect", file, "dpo", "--root", tmp_path / "runs")
    assert (ended.code, ended.err) == (2, "error: stages.m: is not finished, so what it makes cannot be read; run it first (--until m)\n")
