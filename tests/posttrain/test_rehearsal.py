"""A rehearsal kills a stage in the middle, runs it on, and says of every published byte and every loss whether it is the same."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.error import UserError
from posttrain.rehearsal import Rehearsal
from tests.conftest import Ended

STAND_IN = """
import json, sys, time
from pathlib import Path
from posttrain import artifact, disk
from posttrain.checkpoint import last_complete, mark_complete
from posttrain.provenance import now

arguments = sys.argv[1:]
kind = arguments[1]
stage = Path(arguments[arguments.index("--root") + 1], "r", "sft")
if kind == "fails":
    print("error: sources.base: is not there", file=sys.stderr)
    sys.exit(2)
if "--rebuild" in arguments:
    disk.move_aside([stage / "output", stage / "artifact.json", stage / "checkpoints", stage / "metrics.jsonl"], stage / "old")
checkpoints = stage / "checkpoints"
last = last_complete(checkpoints)
losses = [1 / step for step in range(1, 5)]
made = stage / "made" if kind == "too fast" else checkpoints
for step in range(1 + (last.step if last else 0), 5):
    (made / f"checkpoint-{step}").mkdir(parents=True)
    mark_complete(made / f"checkpoint-{step}", step, 1)
    time.sleep(0 if kind == "too fast" else 0.1)
made.rename(checkpoints)
if last is not None and kind == "inexact":
    losses[3] = 9.0
(stage / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "loss": loss}) + chr(10) for step, loss in enumerate(losses, 1)))
(stage / "output").mkdir()
(stage / "output" / "model.safetensors").write_text(str(sum(losses)))
given = {"kind": "policy", "fingerprint": "f", "identity": {}, "version": 1, "inputs": {}, "metrics": {}}
artifact.write_artifact(stage, **given, provenance={"finished": now()})
if kind != "too fast":
    disk.move_aside([checkpoints], stage / "old")
"""


def rehearse(tmp_path: Path, kind: str) -> list[str]:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    command = [sys.executable, str(tmp_path / "stand_in.py")]
    said: list[str] = []
    rehearsal = Rehearsal(command, [kind], tmp_path / "root" / "r" / "sft", tmp_path / "root", num_steps=4)
    differences = rehearsal.differences(said.append)
    assert any("killed after the checkpoint of step" in line for line in said)
    return differences


def test_a_stage_that_resumes_exactly_has_no_differences(tmp_path: Path) -> None:
    assert rehearse(tmp_path, "exact") == []


def test_what_differs_is_named(tmp_path: Path) -> None:
    loss, weights = rehearse(tmp_path, "inexact")
    assert loss == "loss of step 4: 0.25 without interruption, 9.0 resumed"
    assert weights.startswith("model.safetensors: ")


def test_a_stage_that_cannot_be_hit_is_said_to_be_too_short(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--steps 4: are over before the stage can be killed among them; give more"):
        rehearse(tmp_path, "too fast")


def test_a_pipeline_that_does_not_run_at_all_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ended with exit code 2: error: sources\.base: is not there"):
        rehearse(tmp_path, "fails")


def test_a_real_stage_resumes_exactly(pipeline_file: Path, tmp_path: Path, posttrain: Callable[..., Ended]) -> None:
    ended = posttrain("doctor", "--resume", pipeline_file, "--root", tmp_path / "runs", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == {"stage": "sft", "exact": True, "differences": []}
    left = [path.name for path in (tmp_path / "runs").iterdir()]
    assert left == [".hashes.json"], "of the user's own runs nothing is touched, and nothing of it is left"
