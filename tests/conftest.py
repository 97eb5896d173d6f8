"""What the tests share: where the real models and data are, and the command line called in this process.

Called in-process, `run` starts the warm parent once for the whole test session, so that each test that trains pays a
second for it instead of twenty.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data."""
    if not SHARED.is_dir():
        pytest.skip("the real models and data are not here")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A real base model of 260,032 parameters, without pad token and chat template."""
    return shared / "models" / "stories260K"


@pytest.fixture
def posttrain(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """`posttrain("run", "x.yaml", ...)`: one command, as `python pipeline.py` would run it from the top of the repository."""
    import pipeline

    monkeypatch.chdir(REPOSITORY)

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["pipeline.py", *map(str, arguments)])
        capfd.readouterr()
        code = pipeline.main()
        out, err = capfd.readouterr()
        return Ended(code, out, err)

    return call
