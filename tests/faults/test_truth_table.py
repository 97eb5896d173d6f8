"""What is decided about a stage, and that the next `run` ends right, for every point at which it can have been cut off.

Rows are where it was cut off, columns what else is the case; the states are built on disk from real runs of the small chain.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from posttrain import disk, ledger
from posttrain.checkpoint import MARKER, last_complete
from tests.conftest import Ended
from tests.faults.ground import Ground, make_ground, publish
from tests.faults.harness import Chain, small_chain

Cli = Callable[..., Ended]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    here = tmp_path_factory.mktemp("table")
    return make_ground(small_chain(here), "sft", here)


# --- where it was cut off --------------------------------------------------------------------------------------------


def before_stage_json(ground: Ground, root: Path) -> Chain:
    chain = ground.copy(ground.whole, root)
    shutil.rmtree(chain.directory / "sft")
    (chain.directory / "sft").mkdir()
    return chain


def in_prepare(ground: Ground, root: Path) -> Chain:
    """Some rows are prepared, in a directory that is not yet called by its name."""
    chain = before_stage_json(ground, root)
    shutil.copytree(ground.whole.directory / "sft" / "logs", chain.directory / "sft" / "logs")
    shutil.copy2(ground.whole.directory / "sft" / "stage.json", chain.directory / "sft")
    for entry in (root / ".prepared").glob("[!.]*"):
        (entry / "manifest.json").unlink()
        disk.write_text(entry / "rows.arrow", "half")
        entry.rename(entry.with_name(f".{entry.name}.partial-0"))
    return chain


def _new_checkpoint(ground: Ground, root: Path) -> tuple[Chain, Path]:
    """A later checkpoint without its marker, beside the whole ones."""
    chain = ground.copy(ground.cut, root)
    last = last_complete(chain.directory / "sft" / "checkpoints")
    assert last is not None
    path = last.path.with_name(f"checkpoint-{last.step + 1}")
    shutil.copytree(last.path, path)
    (path / MARKER).unlink()
    return chain, path


def mid_checkpoint(ground: Ground, root: Path) -> Chain:
    chain, path = _new_checkpoint(ground, root)
    first, *others = sorted(path.iterdir())
    disk.write_text(first, "half")
    for file in others:
        file.unlink()
    return chain


def between_write_and_marker(ground: Ground, root: Path) -> Chain:
    return _new_checkpoint(ground, root)[0]


def in_publish(ground: Ground, root: Path) -> Chain:
    chain = ground.copy(ground.cut, root)
    publish(ground, chain)
    (chain.directory / "sft" / "output").rename(chain.directory / "sft" / "output.partial")
    (chain.directory / "sft" / "output.partial" / "model.safetensors").write_bytes(b"half")
    for name in ("output.json", "final_metrics.json"):
        (chain.directory / "sft" / name).unlink()
    return chain


def before_verify(ground: Ground, root: Path) -> Chain:
    """The output has its name, and the checkpoints are there still."""
    chain = ground.copy(ground.cut, root)
    publish(ground, chain)
    return chain


def before_artifact_json(ground: Ground, root: Path) -> Chain:
    """The output is verified, and the checkpoints are gone."""
    chain = ground.copy(ground.whole, root)
    (chain.directory / "sft" / "artifact.json").unlink()
    return chain


def finished(ground: Ground, root: Path) -> Chain:
    return ground.copy(ground.whole, root)


# --- what else is the case -------------------------------------------------------------------------------------------


def _input_built_again(chain: Chain, _: Ground) -> None:
    path = chain.directory / "curate" / "artifact.json"
    disk.write_sealed(path, {**disk.read_sealed(path), "id": "0" * 32})


def _finished_elsewhere(chain: Chain, ground: Ground) -> None:
    shutil.copytree(ground.whole.directory, chain.root / "other")


def _nothing(*_: object) -> None:
    pass


POINTS = (
    before_stage_json, in_prepare, mid_checkpoint, between_write_and_marker, in_publish, before_verify, before_artifact_json, finished,
)  # fmt: skip
RESUMED = (mid_checkpoint, between_write_and_marker, in_publish, before_verify, before_artifact_json)
TABLE: Mapping[str, tuple[Callable[[Chain, Ground], None], list[str], str]] = {
    #                                                       before     in      mid-     before   in       before   before     finished
    #                                                       stage.json prepare save     marker   publish  verify   artifact
    "nothing else": (_nothing, [], "run run resume resume resume resume resume skip"),
    "a rebuild is asked for": (_nothing, ["--rebuild", "sft"], "run rebuild rebuild rebuild rebuild rebuild rebuild rebuild"),
    "its config changed": (_nothing, ["stages.sft.learning_rate=2e-3"], "run run drift drift drift drift drift drift"),
    "its input was built again": (_input_built_again, [], "run run rebuild rebuild rebuild rebuild rebuild rebuild"),
    "another run finished it": (_finished_elsewhere, [], "reuse reuse reuse reuse reuse reuse reuse skip"),
    "another process is at it": (_nothing, [], "running running running running running running running running"),
}
CASES = [
    pytest.param(point, case, action, id=f"{point.__name__}-{case.replace(' ', '_')}")
    for case, (_, _, actions) in TABLE.items()
    for point, action in zip(POINTS, actions.split(), strict=True)
]


@contextmanager
def _busy(chain: Chain) -> Iterator[None]:
    with ledger.lease(chain.directory / "sft"):
        yield


def _files(chain: Chain) -> dict[str, Any]:
    found = (path for path in chain.root.rglob("*") if path.is_file() and path.name not in (".hashes.json", "lease.json"))
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


@pytest.mark.parametrize(("point", "case", "action"), CASES)
def test_what_is_decided_and_that_the_next_run_ends_right(
    ground: Ground, tmp_path: Path, posttrain: Cli, point: Callable[[Ground, Path], Chain], case: str, action: str
) -> None:
    arrange, arguments, _ = TABLE[case]
    chain = point(ground, tmp_path / "runs")
    arrange(chain, ground)
    chosen = [chain.file, *arguments, "--root", chain.root, "--until", "sft"]
    with _busy(chain) if action == "running" else nullcontext():
        planned = {row["stage"]: row for row in json.loads(posttrain("plan", *chosen, "--json").out)}
        assert (planned["curate"]["action"], planned["sft"]["action"]) == ("skip", action), planned["sft"]["why"]
        before = _files(chain)
        ended = posttrain("run", *chosen)
    if action in ("drift", "running"):
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert _files(chain) == before, "nothing was touched"
        return
    assert ended.code == 0, ended.err
    assert f"sft  {action}: " in ended.out
    assert posttrain("verify", chain.directory, "--root", chain.root).code == 0
    assert json.loads(posttrain("plan", *chosen[:1], *chosen[-4:], "--json").out)[1]["action"] in ("skip", "drift")
    if case != "its config changed":
        found, expected = chain.outcome(), ground.whole.outcome()
        assert found.files == expected.files
        assert found.metrics["sft"]["loss"] == expected.metrics["sft"]["loss"]
