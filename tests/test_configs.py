"""Every file that people are told to copy is one that the pipeline accepts."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.config import DataSource, Nodes, read_pipeline, validate
from posttrain.fit import read_deepspeed
from posttrain.stage import load_stage
from tests.conftest import REPOSITORY, Ended
from tests.posttrain.test_planner import config as model_config
from tests.posttrain.test_planner import llama


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_pipeline_is_accepted(path: Path) -> None:
    config = read_pipeline(path)
    for name, raw in config.stages.items():
        stage = load_stage(raw.pop("kind", name), name)
        required = {role for role, wanted in stage.inputs.items() if not wanted.optional}
        assert required <= set(raw.pop("inputs")) <= set(stage.inputs)
        settings = validate(stage.config, raw, f"stages.{name}")
        settings.check(config.launcher.num_processes or 1, f"stages.{name}")
        if deepspeed := raw.get("deepspeed"):
            assert (REPOSITORY / deepspeed).is_file()


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_deepspeed_config_leaves_sizes_and_rates_to_the_stage(path: Path) -> None:
    config = read_deepspeed(str(path), "stages.sft")
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {config[name] for name in sizes} == {"auto"}
    assert str(config["zero_optimization"]["stage"]) in path.stem


# --- what runs on several nodes, or needs all of one -----------------------------------------------------------------

MODELS = {
    "llama_8b": (4096, 32, 14336, 32, 8, 128256),
    "llama_70b": (8192, 80, 28672, 64, 8, 128256),
    "llama_405b_lora": (16384, 126, 53248, 128, 8, 128256),
    "slurm_sft_dpo": (4096, 32, 14336, 32, 8, 128256),
}
"""Pipelines, and a model that each is for: hidden size, layers, width, heads, keys and vocabulary."""


@pytest.fixture(params=list(MODELS))
def large(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[str]]:
    """A pipeline, and the overrides that name its sources: of the model, only the header of its weights is there."""
    path, dimensions = REPOSITORY / "configs" / f"{request.param}.yaml", MODELS[request.param]
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**model_config(*dimensions), "dtype": "bfloat16"}))
    header = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in llama(*dimensions).items()}
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    (tmp_path / "chat.jsonl").write_text('{"prompt": "why?", "completion": "because"}\n' * 512)
    (tmp_path / "prefs.jsonl").write_text('{"prompt": "why?", "chosen": "because", "rejected": "no"}\n' * 512)
    sources = read_pipeline(path).sources
    data = {name: Path(source.paths[0]).name for name, source in sources.items() if isinstance(source, DataSource)}
    return path, [f"sources.base.model={model}", *(f"sources.{name}.data={tmp_path}/{file}" for name, file in data.items())]


def test_a_large_pipeline_fits_on_what_it_asks_for(large: tuple[Path, list[str]], tmp_path: Path, posttrain: Callable[..., Ended]) -> None:
    path, sources = large
    ended = posttrain("plan", path, *sources, "launcher.hardware=h100-80gb", "--json", "--root", tmp_path / "runs")
    assert ended.code == 0, ended.err
    needs = [row["needs"] for row in json.loads(ended.out) if row["kind"] != "eval"]
    launcher = read_pipeline(path).launcher
    assert [(found["fits"], found["world_size"]) for found in needs] == [(True, launcher.num_processes)] * 2


@pytest.mark.parametrize("kind", ["slurm", "kubernetes"])
def test_a_large_pipeline_is_submitted_to_either_kind_of_cluster(
    large: tuple[Path, list[str]], kind: str, tmp_path: Path, posttrain: Callable[..., Ended]
) -> None:
    path, overrides = large
    config = read_pipeline(path)
    assert isinstance(config.launcher, Nodes)
    if kind == "kubernetes":  # by the line that the file itself gives for it
        (line,) = re.findall(r'^#  .* "(launcher=\{kind: kubernetes,.*?\})"((?: "[^"]+")*)$', path.read_text(), flags=re.MULTILINE)
        overrides = [*overrides, line[0], *re.findall(r'"([^"]+)"', line[1]), f"launcher.volumes={{{tmp_path}: training}}"]
    ended = posttrain("submit", path, *overrides, "--dry-run", "--root", tmp_path / "runs")
    assert ended.code == 0, ended.err
    asked = {name: {**config.launcher.model_dump(), **raw.get("launcher", {})} for name, raw in config.stages.items()}
    expected = {name: (launcher["num_nodes"], launcher["gpus_per_node"]) for name, launcher in asked.items()}
    assert (slurm_nodes if kind == "slurm" else kubernetes_nodes)(ended.out, config.run) == expected


def slurm_nodes(text: str, run: str) -> dict[str, tuple[int, int]]:
    """Nodes, and GPUs on each, that scripts ask for, by stage."""
    found = {}
    for script in text.split("#!/bin/bash")[1:]:
        options = dict(re.findall(r"^#SBATCH (--[a-z-]+)=(.*)$", script, flags=re.MULTILINE))
        found[options["--job-name"].removeprefix(f"{run}.")] = (int(options["--nodes"]), int(options["--gpus-per-node"]))
    return found


def kubernetes_nodes(text: str, run: str) -> dict[str, tuple[int, int]]:
    """Pods, and GPUs of each, that JobSets ask for, by stage."""
    found = {}
    for jobset in yaml.safe_load_all(text):
        spec: dict[str, Any] = jobset["spec"]["replicatedJobs"][-1]["template"]["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        stage = jobset["metadata"]["annotations"]["posttrain/stage"]
        found[stage] = (spec["completions"], int(container["resources"]["limits"]["nvidia.com/gpu"]))
    return found
