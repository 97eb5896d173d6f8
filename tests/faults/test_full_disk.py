"""A disk that fills up: one line for the user, no whole state lost, and with space again the same command goes on."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from posttrain.error import EXIT_DONE, EXIT_USER
from tests.conftest import write_pairs
from tests.faults.harness import FINISH_WITHIN_S, VARIANTS, Chain, small_chain, started

DISK_BYTES = 32 << 20
CHUNK_BYTES = 1 << 20
KEPT_FOR_LOGS = 64 << 10
"""Room for progress and metrics, and for nothing large."""
NUM_STEPS, SAVE_STEPS = 40, 15


@dataclass(frozen=True)
class Place:
    """A moment at which the disk is made full, but for `left_bytes`."""

    name: str
    is_there: Callable[[Chain], bool]
    left_bytes: int = 0


PLACES = [
    Place("curate", lambda chain: chain.active() == "curate"),
    Place("prepare", lambda chain: chain.active() == "sft"),
    Place("metrics", lambda chain: chain.is_in("sft", "train", past=0)),
    Place("first checkpoint", lambda chain: chain.is_in("sft", "train"), KEPT_FOR_LOGS),
    Place("later checkpoint", lambda chain: SAVE_STEPS in chain.checkpoints("sft"), KEPT_FOR_LOGS),
    Place("publish", lambda chain: NUM_STEPS in chain.checkpoints("sft") or chain.is_in("sft", "publish"), KEPT_FOR_LOGS),
    Place("verify", lambda chain: (chain.directory / "sft" / "output").exists()),
    Place("between", lambda chain: (chain.directory / "sft" / "artifact.json").exists()),
    # Room for a few words, and not for the log-probabilities of so many pairs.
    Place("reference", lambda chain: chain.is_in("dpo", "load model") or chain.is_in("dpo", "reference"), 12 << 10),
    Place("eval", lambda chain: chain.active() == "eval" and chain.progress("eval")["phase"] != ""),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def chain_with_room(here: Path, overrides: tuple[str, ...]) -> Chain:
    """The chain with more steps, run to its end on a disk with space."""
    steps = (f"stages.sft.max_steps={NUM_STEPS}", f"stages.sft.save_steps={SAVE_STEPS}")
    chain = small_chain(here, (*overrides, *steps))
    write_pairs(here / "prefs.jsonl", 600)
    chain.finish(here / "log")
    return chain


def fill(disk: Path, left_bytes: int) -> Path:
    """Leave no more than `left_bytes` on the disk, while others write to it too; the file that takes the rest."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while (surplus := shutil.disk_usage(disk).free - left_bytes) > 0:
            with suppress(OSError):  # another was faster
                file.write(bytes(min(surplus, CHUNK_BYTES)))
    return ballast


def end_on_full_disk(chain: Chain, disk: Path, place: Place, log: Path) -> list[str]:
    """Run until the disk is full at that place, and see how that ends; what is wrong with it."""
    with started(chain.command, log) as driver:
        driver.meet(lambda: place.is_there(chain), f"{place.name} was to be met")
        ballast = fill(disk, place.left_bytes)
        before = chain.checkpoints("sft")
        code, err = driver.ended(FINISH_WITHIN_S)
    problems = []
    if code == EXIT_USER:
        if len(err.splitlines()) != 1 or not err.startswith("error: ") or "free some and run again" not in err:
            problems.append(f"{place.name}: says {err!r}")
    elif code != EXIT_DONE:
        problems.append(f"{place.name}: exit code {code}: {err!r}")
    if chain.active() == "sft" and not (chain.directory / "sft" / "output").exists():
        left = chain.checkpoints("sft")
        if max(left, default=0) < max(before, default=0):
            problems.append(f"{place.name}: of the checkpoints {before}, {left} are left")
    ballast.unlink()
    return problems


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_disk_that_fills_up_anywhere_costs_one_line_and_no_state(variant: str, disk: Path, tmp_path: Path) -> None:
    whole = chain_with_room(tmp_path / "whole", VARIANTS[variant])
    chain = whole.elsewhere(disk / "runs")
    problems = []
    for place in PLACES:
        problems += end_on_full_disk(chain, disk, place, tmp_path / "log")
    chain.finish(tmp_path / "log")
    assert not problems
    assert not chain.outcome().differences(whole.outcome())
