"""The command line in this process, with stages that are prepared and then refused: what `prepare` says, in milliseconds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from posttrain.error import StageFailed
from posttrain.ledger import open_context
from tests.conftest import Ended

Refuse = Callable[..., str]
PIPELINE = """\
run: r
sources:
  base: {{model: {base}}}
  chat: {{data: {data}}}
stages:
  sft: {{inputs: {{policy: base, data: chat}}, global_batch_size: 1, max_length: 256, preflight: {{duplicates: 1.0}}}}
"""
LEFT_BEHIND = {"output", "output.partial", "artifact.json", "checkpoints", "prepared.json", "lease.json"}


@contextmanager
def _prepare_only(*_: Any, **__: Any) -> Iterator[Callable[[Path, Any], None]]:
    def launch(directory: Path, _: Any) -> None:
        _, stage, context = open_context(directory, rank=0, local_rank=0, world_size=1)
        assert stage.prepare is not None
        stage.prepare(context)
        raise StageFailed("prepared")

    yield launch


def write_pipeline(path: Path, base: Path, data: Path) -> Path:
    path.write_text(PIPELINE.format(base=base, data=data))
    return path


def run_prepare(posttrain: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Ended:
    """`run` up to the end of the first stage's preparation, which is told as a crash."""
    monkeypatch.setattr("posttrain.launch.open_launcher", _prepare_only)
    return posttrain("run", *arguments)


def refused(ended: Ended, root: Path) -> str:
    """The one line of a refusal that left nothing behind below `root`: no output, no checkpoint, no half of anything."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err + ended.out
    (line,) = ended.err.splitlines()
    assert line.startswith("error: "), line
    assert line.isprintable()
    left = {path.name for path in root.rglob("*")}
    assert not left & LEFT_BEHIND, left
    shared = {path.name for path in (root / ".prepared").glob("*")}
    assert all(name.endswith(".lock") for name in shared), shared
    return line.removeprefix("error: ")


@pytest.fixture
def refuse(posttrain: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Refuse:
    """`refuse(base, data, *overrides)`: the line with which the preparation of sft refuses a model or data."""

    def call(base: Path, data: Path, *overrides: str) -> str:
        pipeline = write_pipeline(tmp_path / "pipeline.yaml", base, data)
        return refused(run_prepare(posttrain, monkeypatch, pipeline, "--root", tmp_path / "runs", *overrides), tmp_path / "runs")

    return call
