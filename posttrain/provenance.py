"""Where an artifact came from: code, versions, machine and command, recorded beside every output.

Of the environment nothing is recorded, and of the command line no value that reads like a credential, so no token gets in.
"""

import importlib.metadata
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import posttrain
from posttrain.secret import mask_argument

PACKAGES = ("torch", "transformers", "trl", "datasets", "peft", "deepspeed", "accelerate", "evaluate", "tokenizers")


def now() -> str:
    """The time now, as an ISO string in UTC to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def provenance(started: str) -> dict[str, object]:
    """The record that goes into `artifact.json`; `started` is when the attempt began."""
    commit, dirty = code_version()
    return {
        "started": started,
        "finished": now(),
        "posttrain": posttrain.__version__,
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "argv": [Path(sys.argv[0]).name, *map(mask_argument, sys.argv[1:])],
    }


def code_version() -> tuple[str | None, bool | None]:
    """Commit of the checkout this code runs from and whether it has uncommitted changes; None outside a checkout."""
    here = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]  # the git that the user's own PATH says
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here.resolve():
            return None, None  # installed below somebody else's checkout
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
