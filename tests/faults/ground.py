"""Ground to build crashes and damage on: the small chain finished, and the same chain killed in mid-training, from one curation.

States are made of these two by removing and adding files, so that trying one takes no longer than what is left to run.
"""

import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

from posttrain.checkpoint import last_complete
from tests.faults.harness import START_WITHIN_S, Chain, started

EVIDENCE = ("output.json", "probe.safetensors", "published.json", "final_metrics.json")


@dataclass(frozen=True)
class Ground:
    """Roots of the chain up to `stage`: finished, and cut off in that stage with two whole checkpoints."""

    stage: str
    whole: Chain
    cut: Chain

    def copy(self, of: Chain, root: Path) -> Chain:
        """A copy of a root to do anything to."""
        shutil.copytree(of.root, root, symlinks=True)
        return of.elsewhere(root)


def make_ground(chain: Chain, stage: str, here: Path) -> Ground:
    """Run `chain`, whose stages before `stage` need not be finished, to both states below `here`."""
    whole, cut = (chain.elsewhere(here / name) for name in ("whole", "cut"))
    if chain.root.exists():
        shutil.copytree(chain.root, whole.root)
    before = {"sft": "curate", "dpo": "sft"}[stage]
    _run(whole, before, here / "log")
    shutil.copytree(whole.root, cut.root)
    _run(whole, stage, here / "log")
    with started([*cut.command, "--until", stage], here / "log") as driver:
        driver.wait(lambda: driver.poll() is not None or len(cut.checkpoints(stage)) > 1, START_WITHIN_S, "two checkpoints were to come")
        assert driver.poll() is None, driver.err()
        driver.signal(signal.SIGKILL, whole_group=True)
        driver.ended()
    directory = cut.directory / stage
    assert last_complete(directory / "checkpoints") is not None and not (directory / "output").exists()
    return Ground(stage, whole, cut)


def _run(chain: Chain, until: str, log: Path) -> None:
    with started([*chain.command, "--until", until], log) as driver:
        code, err = driver.ended(2 * START_WITHIN_S)
    assert code == 0, err


def publish(ground: Ground, chain: Chain) -> None:
    """Put what the whole run published into a copy of the one that was cut off, as if it had come to be published just now."""
    source, target = ground.whole.directory / ground.stage, chain.directory / ground.stage
    shutil.copytree(source / "output", target / "output")
    for name in EVIDENCE:
        shutil.copy2(source / name, target / name)


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, whose size and time stay as they were."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(path: Path) -> None:
    """Cut a file off in the middle, as a disk that filled up does."""
    os.truncate(path, path.stat().st_size // 2)
