"""What is prepared ahead is what the stage itself would have prepared, or nothing at all."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import pipeline
from posttrain import ledger
from posttrain.ahead import prepare_ahead
from posttrain.config import read_pipeline
from posttrain.error import EXIT_PREEMPTED
from tests.conftest import REPOSITORY, Ended


def begin(pipeline_file: Path, root: Path, *overrides: str) -> tuple[Path, ledger.Attempt]:
    """The first stage as it stands when it begins to train, those after it foreseen."""
    first, *later = pipeline.plan(read_pipeline(pipeline_file, overrides), root)
    first.directory.mkdir(parents=True)
    return first.directory, pipeline._start(first, ahead=pipeline._foresee(later))


def entries(root: Path) -> dict[str, bytes]:
    """Every file of prepared data that is whole."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob(".prepared/[0-9a-f]*/*")}


def apart(posttrain: Callable[..., Ended], pipeline_file: Path, root: Path, *overrides: str) -> Ended:
    """Each stage by a command of its own, which foresees nothing."""
    assert posttrain("run", pipeline_file, "--root", root, "--only", "sft", *overrides).code == 0
    return posttrain("run", pipeline_file, "--root", root, "--only", "dpo", *overrides)


def weights(root: Path) -> bytes:
    return (root / "test" / "dpo" / "output" / "model.safetensors").read_bytes()


def test_a_stage_finds_what_was_prepared_ahead_of_it_and_trains_on_the_same(
    posttrain: Callable[..., Ended], pipeline_file: Path, tmp_path: Path
) -> None:
    ahead, alone = tmp_path / "ahead", tmp_path / "alone"
    prepare_ahead(*begin(pipeline_file, ahead))
    (entry,) = ahead.glob(".prepared/[0-9a-f]*")
    before, made = entries(ahead), (entry / "rows.arrow").stat().st_ctime_ns
    assert posttrain("run", pipeline_file, "--root", ahead, "--until", "dpo").code == 0
    assert json.loads((ahead / "test" / "dpo" / "prepared.json").read_text())["path"] == str(entry)
    assert (entry / "rows.arrow").stat().st_ctime_ns == made
    assert apart(posttrain, pipeline_file, alone).code == 0
    assert entries(alone) == entries(ahead)
    assert before.items() < entries(alone).items()
    assert weights(alone) == weights(ahead)


def test_a_run_prepares_ahead_by_itself(pipeline_file: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    logs = runs / "test" / "sft" / "logs" / "attempt_1"
    command = [sys.executable, "pipeline.py", "run", str(pipeline_file), "--root", str(runs), "--until", "dpo"]
    # Longer than any machine takes to prepare a few rows; it is asked to stop once they are there.
    run = subprocess.Popen([*command, "stages.sft.max_steps=100000"], cwd=REPOSITORY)
    deadline = time.monotonic() + 240
    try:
        while not (said := read_if_there(logs / "ahead.log")).endswith("dpo: prepared\n") and time.monotonic() < deadline:
            assert run.poll() is None
            time.sleep(0.1)
        found = entries(runs)
    finally:
        run.terminate()
        code = run.wait(60)
    assert said.splitlines()[-1] == "dpo: prepared"
    assert code == EXIT_PREEMPTED
    assert sum(name.endswith("manifest.json") for name in found) == 2, "those of sft, which trains on its own, and those of dpo"
    assert entries(runs) == found
    assert [path.name for path in logs.iterdir() if path.is_dir()] == [], "nothing it needed meanwhile is left"


def read_if_there(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def test_what_is_wrong_with_data_is_told_by_the_stage_that_reads_them(
    posttrain: Callable[..., Ended], pipeline_file: Path, pairs_file: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    rows[5]["rejected"] = rows[5]["chosen"]
    (tmp_path / "wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    override = f"sources.prefs.data={tmp_path}/wrong.jsonl"
    directory, attempt = begin(pipeline_file, tmp_path / "ahead", override)
    prepare_ahead(directory, attempt)
    assert entries(tmp_path / "ahead") == {}
    assert not list((tmp_path / "ahead").glob(".prepared/.*partial*"))
    ended = posttrain("run", pipeline_file, "--root", tmp_path / "ahead", "--until", "dpo", override)
    told = apart(posttrain, pipeline_file, tmp_path / "alone", override)
    assert (ended.code, ended.err) == (told.code, told.err)
    assert "have two answers that are the same" in told.err or "same answer" in told.err


@pytest.mark.parametrize("settings", [(), ("stages.sft.system_prompt=be brief",), ("stages.sft.chat_template=HERE/template.jinja",)])
def test_the_contract_that_a_stage_will_establish_is_known_ahead(
    posttrain: Callable[..., Ended], pipeline_file: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    (tmp_path / "template.jinja").write_text(
        template + "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    overrides = [setting.replace("HERE", str(tmp_path)) for setting in settings]
    root = tmp_path / "runs"
    prepare_ahead(*begin(pipeline_file, root, *overrides))
    (entry,) = root.glob(".prepared/[0-9a-f]*")
    ended = posttrain("run", pipeline_file, "--root", root, "--until", "dpo", *overrides)
    assert ended.code == 0, ended.err
    assert json.loads((root / "test" / "dpo" / "prepared.json").read_text())["path"] == str(entry)
