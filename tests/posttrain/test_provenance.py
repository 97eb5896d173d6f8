"""An artifact says where it came from."""

import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from posttrain import provenance


def test_the_record_names_code_versions_machine_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/pipeline.py", "run", "x.yaml"])
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    started = provenance.now()
    record = provenance.provenance(started)
    assert record["argv"] == ["pipeline.py", "run", "x.yaml"]
    assert record["started"] == started
    assert datetime.fromisoformat(str(record["finished"])).tzinfo is not None
    versions = record["versions"]
    assert isinstance(versions, dict)
    assert {"torch", "transformers", "trl"} <= {name for name, version in versions.items() if version}
    assert "hf_secret" not in str(record)


def repository(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout with one commit; the code runs from its folder `code`."""
    (path / "code" / "posttrain").mkdir(parents=True)
    commit = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false", "commit", "-q", "--allow-empty", "-m", "t"]
    for arguments in (["init", "-q"], commit):
        subprocess.run(["git", "-C", str(path), *arguments], check=True)
    monkeypatch.setattr(provenance, "__file__", str(path / "posttrain" / "provenance.py"))


def test_a_checkout_is_named_by_its_commit_and_whether_it_was_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(tmp_path, monkeypatch)
    commit, dirty = provenance.code_version()
    assert commit is not None
    assert (len(commit), dirty) == (40, False)
    (tmp_path / "new.py").touch()
    assert provenance.code_version() == (commit, True)


def test_code_installed_below_a_foreign_checkout_does_not_bear_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(tmp_path, monkeypatch)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "code" / "posttrain" / "provenance.py"))
    assert provenance.code_version() == (None, None)


def test_code_outside_a_checkout_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "posttrain" / "provenance.py"))
    assert provenance.code_version() == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.code_version() == (None, None)


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package",))
    assert provenance.provenance("")["versions"] == {"no-such-package": None}
