"""A name of a run, a stage or a source is one name below the root, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Ended

NAMES = [
    "..", ".", "", "../x", "x/../../y", "/x", "x/y", "x/", "//", "~", "~/x", ".hidden", ".prepared", ".old", "-x", "--help", "_x",
    "x" * 101, "x" * 5000, "x y", " x", "x ", "x\ty", "x\ny", "x\\y", "x\x00y", "x\x1b[31m", "x:y", "x*", "x?", "$HOME", "`id`",
    "$(id)", "x;y", "x|y", "x&y", "x<y", "'x'", '"x"', "{x}", "[x]", "x,y", "x=y", "x%00", "%2e%2e", "..%2fx", "é", "ｘ", "x\u202ey",
    "x\u200by", "日本", "\ufeffx", "\u2025", "\uff0e\uff0e",
]  # fmt: skip


def quoted(name: str) -> str:
    import json

    return json.dumps(name)


@pytest.mark.parametrize("place", ["run", "stages", "sources"])
@pytest.mark.parametrize("name", NAMES, ids=map(ascii, NAMES))
def test_a_name_cannot_leave_the_root(posttrain: Callable[..., Ended], pipeline_file: Path, tmp_path: Path, place: str, name: str) -> None:
    """Neither from the file nor by an override."""
    text = pipeline_file.read_text()
    root = tmp_path / "deep" / "runs"
    if place == "run":
        changed, override = text.replace("run: test", f"run: {quoted(name)}"), f"run={quoted(name)}"
    elif place == "stages":
        changed, override = text.replace("\n  sft:", f"\n  {quoted(name)}:\n    kind: sft"), f"stages={{{quoted(name)}: {{kind: sft}}}}"
    else:
        changed, override = text.replace("\n  chat:", f"\n  {quoted(name)}:"), f"sources={{{quoted(name)}: {{data: x.jsonl}}}}"
    assert changed != text
    path = tmp_path / "other.yaml"
    path.write_text(changed)
    before = sorted(tmp_path.rglob("*"))
    for config, overrides in ((path, ()), (pipeline_file, (override,))):
        ended = posttrain("run", config, "--root", root, *overrides)
        assert ended.code == 2, (ended, overrides)
        (line,) = ended.err.splitlines()
        assert line.startswith("error: ") and line.isprintable()
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("key", ["stages.../x.kind", "stages./x.kind", "../x.y", "stages.x/../../y.kind", "sources.a/b.data"])
def test_a_dotted_key_cannot_leave_the_root_either(posttrain: Callable[..., Ended], pipeline_file: Path, tmp_path: Path, key: str) -> None:
    ended = posttrain("run", pipeline_file, "--root", tmp_path / "runs", f"{key}=sft")
    assert ended.code == 2 and len(ended.err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["a", "A.b_c-d", "2026-10-01", "x" * 100, "con", "sft.v2"])
def test_a_usable_name_is_used(posttrain: Callable[..., Ended], pipeline_file: Path, tmp_path: Path, name: str) -> None:
    assert posttrain("plan", pipeline_file, "--root", tmp_path / "runs", f"run='{name}'").code == 0
