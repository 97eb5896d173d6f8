"""Credentials stay in the environment: none gets into what a run leaves on disk, whoever put it where."""

from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.provenance import provenance
from posttrain.secret import mask_argument
from tests.conftest import Ended

HUB = "hf_" + "PlantedSecret0123456789abcdefghij"
MODEL = "sk-proj-PlantedSecret0123456789abcdef"
UNFORMED = "correct horse battery staple"
PLANTED = {
    "HF_TOKEN": HUB,
    "HUGGING_FACE_HUB_TOKEN": HUB + "x",
    "OPENAI_API_KEY": MODEL,
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "PlantedAws/Key+0123456789abcdefghijklmno",
    "DATABASE_PASSWORD": UNFORMED,
}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment full of credentials."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


def holding(root: Path) -> list[str]:
    """The files below `root` that hold one of the planted credentials."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return [f"{path}: {name}" for path in files for name, value in PLANTED.items() if value.encode() in path.read_bytes()]


@pytest.mark.usefixtures("planted")
def test_a_run_writes_no_credential_of_its_environment(posttrain: Callable[..., Ended], pipeline_file: Path, tmp_path: Path) -> None:
    """Through all stages, and all that they write: records, logs, metrics, outputs."""
    root = tmp_path / "runs"
    ended = posttrain("run", pipeline_file, "--root", root, "stages.sft.max_steps=2", "stages.dpo.max_steps=2", "stages.dpo.save_steps=1")
    assert ended.code == 0, ended.err
    assert len([path for path in root.rglob("*") if path.is_file()]) > 30
    assert not holding(root)
    failed = posttrain("run", pipeline_file, "--root", root, "run=other", "stages.sft.max_length=8")
    assert failed.code == 2
    assert not holding(root)


OVERRIDES = [
    f"stages.sft.trainer.hub_token={HUB}",
    "stages.sft.trainer.hub_token=no-known-form",
    "stages.sft.trainer={hub_token: no-known-form}",
    f"stages.sft.system_prompt='The key is {MODEL}, keep it'",
    f"stages.sft.system_prompt='{UNFORMED}'",
    "sources.chat.data=https://user:PlantedSecret@example.org/x.jsonl",
    f"sources.chat.columns={{prompt: {HUB}}}",
    f"stages.sft.trainer.run_name={PLANTED['WANDB_API_KEY']}",
    "stages.sft.api_key=no-known-form",
    "stages.sft.trainer.password=no-known-form",
    "stages.sft.system_prompt=ghp_0123456789abcdefghijABCDEFGHIJ012345",
    "stages.sft.system_prompt=AKIAABCDEFGHIJKLMNOP",
    "stages.sft.system_prompt='-----BEGIN RSA PRIVATE KEY-----'",
    "stages.sft.system_prompt=eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijk",
]


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("override", OVERRIDES, ids=range(len(OVERRIDES)))
def test_a_credential_among_the_settings_is_refused_and_not_repeated(
    posttrain: Callable[..., Ended], pipeline_file: Path, tmp_path: Path, override: str
) -> None:
    for command in ("plan", "run"):
        ended = posttrain(command, pipeline_file, "--root", tmp_path / "runs", override)
        assert ended.code == 2
        (line,) = ended.err.splitlines()
        assert "reads like a credential" in line and override.partition("=")[0] in line
        assert not any(value in line for value in [*PLANTED.values(), "no-known-form", "PlantedSecret"])
        assert not holding(tmp_path / "runs")


@pytest.mark.parametrize(
    "override",
    [
        "stages.sft.trainer.eos_token=</s>",
        "stages.eval.max_new_tokens=4",
        "run=sk-experiments-2026",
        "stages.sft.system_prompt=the secret of hf_hub",
    ],
)
def test_what_only_sounds_like_one_is_taken(posttrain: Callable[..., Ended], pipeline_file: Path, tmp_path: Path, override: str) -> None:
    assert posttrain("plan", pipeline_file, "--root", tmp_path / "runs", override).code == 0


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize(
    ("argument", "recorded"),
    [
        ("run", "run"),
        ("configs/quickstart.yaml", "configs/quickstart.yaml"),
        ("--root", "--root"),
        ("stages.dpo.beta=0.05", "stages.dpo.beta=0.05"),
        ("stages.sft.trainer.eos_token=</s>", "stages.sft.trainer.eos_token=</s>"),
        ("stages.sft.trainer.hub_token=abc", "stages.sft.trainer.hub_token=***"),
        (f"stages.sft.system_prompt={HUB}", "stages.sft.system_prompt=***"),
        ("sources.x.data=https://u:p@example.org/x", "sources.x.data=***"),
        ("--api-key=abc", "--api-key=***"),
        (f"x={UNFORMED}", "x=***"),
        (MODEL, "***"),
        (f"{HUB}=1", "***"),
    ],
)
def test_of_the_command_line_no_credential_is_recorded(argument: str, recorded: str) -> None:
    assert mask_argument(argument) == recorded


@pytest.mark.usefixtures("planted")
def test_the_record_of_an_artifact_holds_the_masked_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["/somewhere/pipeline.py", "run", "x.yaml", "run=y", f"stages.sft.system_prompt={HUB}", "--root", UNFORMED]
    )
    assert provenance("")["argv"] == ["pipeline.py", "run", "x.yaml", "run=y", "stages.sft.system_prompt=***", "--root", "***"]
