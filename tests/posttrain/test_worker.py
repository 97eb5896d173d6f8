"""The worker under another launcher: rank variables from the environment, nothing else but the stage directory.

`python -m tests.posttrain.test_worker DIRECTORY` has the first of two ranks fail, while the other waits for it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch.distributed as dist

from pipeline import _record, plan
from posttrain import ledger, worker
from posttrain.artifact import read_artifact
from posttrain.config import Config, read_pipeline
from posttrain.error import UserError
from posttrain.launch.local import free_port
from posttrain.launch.words import raise_words
from posttrain.stage import Stage, StageContext
from tests.conftest import REPOSITORY, Ended, read_lines
from tests.posttrain.launch.test_hosts import attempted


def test_torchrun_prepares_trains_under_zero_3_and_verifies_within_one_launch(
    posttrain: Callable[..., Ended], pipeline_file: Path, tmp_path: Path
) -> None:
    ended = posttrain("run", pipeline_file, "--root", tmp_path / "local", "--only", "sft")
    assert ended.code == 0, ended.err
    root = tmp_path / "torchrun"
    node = plan(read_pipeline(pipeline_file, ["stages.sft.deepspeed=ds_configs/zero3.json"]), root)[0]
    node.directory.mkdir(parents=True)
    ledger.start_attempt(
        node.directory,
        stage=node.stage,
        name=node.name,
        run=node.run,
        root=root,
        fingerprint=node.fingerprint,
        identity={},
        config=node.config,
        inputs={role: [_record(entry) for entry in entries] for role, entries in node.inputs.items()},
        num_processes=2,
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "posttrain.worker"]
    done = subprocess.run([*command, str(node.directory)], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_artifact(node.directory) is not None
    losses = [[line["loss"] for line in read_lines(path / "test" / "sft" / "metrics.jsonl")] for path in (tmp_path / "local", root)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_what_was_published_before_needs_but_to_be_verified(posttrain: Callable[..., Ended], pipeline_file: Path, tmp_path: Path) -> None:
    ended = posttrain("run", pipeline_file, "--root", tmp_path, "--only", "sft")
    assert ended.code == 0, ended.err
    stage = tmp_path / "test" / "sft"
    weights = (stage / "output" / "model.safetensors").stat()
    (stage / "artifact.json").unlink()
    command = [sys.executable, "-m", "posttrain.worker", str(stage)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (stage / "logs" / "attempt_1" / "rank_0.log").read_text()[-2000:]
    assert read_artifact(stage) is not None
    assert (stage / "output" / "model.safetensors").stat() == weights


@pytest.mark.parametrize(
    ("said", "node", "here"), [("2(x3),1", "2", 2), ("2(x3),1", "3", 1), ("4", "0", 4), ("1,12(x2),8", "2", 12), (None, None, 5)]
)
def test_ranks_on_a_node_are_counted_as_slurm_tells_them(
    monkeypatch: pytest.MonkeyPatch, said: str | None, node: str | None, here: int
) -> None:
    for name, value in {"SLURM_STEP_TASKS_PER_NODE": said, "SLURM_NODEID": node, "SLURM_NTASKS": "5"}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert worker._num_tasks_here() == here


def test_a_directory_without_a_stage_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    environment = {**os.environ, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.worker", str(tmp_path)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_why_a_rank_failed_is_told_and_not_that_another_lost_it(tmp_path: Path) -> None:
    stage = attempted(tmp_path)
    command = [sys.executable, "-m", "tests.posttrain.test_worker", str(stage)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert "Connection closed by peer" in ended.stderr, "the other rank was to wait for it"
    attempt = ledger.read_attempt(stage)
    assert attempt is not None
    with pytest.raises(UserError, match="the disk is full"):
        raise_words(stage, attempt)


class Slow(UserError):
    """What takes its time to be written down."""

    def __str__(self) -> str:
        time.sleep(1)
        return super().__str__()


def _fail(context: StageContext[Config]) -> NoReturn:
    if context.is_main:
        raise Slow("the disk is full")
    dist.barrier()
    raise AssertionError("the first rank never comes")


def _run_rank(directory: Path, rank: int, rendezvous: dict[str, str]) -> None:
    os.environ.update(rendezvous, RANK=str(rank), LOCAL_RANK=str(rank))
    attempt = ledger.read_attempt(directory)
    assert attempt is not None
    context: StageContext[Any] = StageContext(attempt.name, Config(), {}, directory, directory.parent, rank=rank, world_size=2)
    worker._end(worker._run(attempt, Stage("fail", Config, {}, "policy", _fail), context, ["run"]))


if __name__ == "__main__":
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for rank in range(2):
        get_context("fork").Process(target=_run_rank, args=(Path(sys.argv[1]), rank, rendezvous)).start()
