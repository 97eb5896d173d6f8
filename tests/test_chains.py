"""The chains on the tiny base model that comes with the project, from end to end: each makes a better chat model of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.artifact import read_artifact
from posttrain.config import read_pipeline
from tests.conftest import REPOSITORY, Ended


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all chains: what they have in common is built once."""
    return tmp_path_factory.mktemp("chains")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("tiny_*.yaml")), ids=lambda path: path.stem)
def test_a_tiny_chain_runs_and_its_last_policy_answers_better(posttrain: Callable[..., Ended], root: Path, path: Path) -> None:
    ended = posttrain("run", path, "--root", root)
    assert ended.code == 0, ended.err
    config = read_pipeline(path)
    measured = read_artifact(root / config.run / "eval")
    assert measured is not None
    metrics = measured.metrics
    policies = config.stages["eval"]["inputs"]["policies"]
    answered = {name: metrics[f"{name}.answers passed"] for name in policies}
    others = [answered[name] for name in policies if name not in ("base", "sft")]
    assert min(others) > answered.get("sft", 0.4), answered
    again = posttrain("run", path, "--root", root)
    assert again.code == 0
    assert again.out.count("skip: finished") == len(config.stages)
