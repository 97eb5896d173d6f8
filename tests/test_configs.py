"""Every file that people are told to copy is one that the pipeline accepts."""

from pathlib import Path

import pytest

from posttrain.config import read_pipeline, validate
from posttrain.fit import read_deepspeed
from posttrain.stage import load_stage
from tests.conftest import REPOSITORY


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
