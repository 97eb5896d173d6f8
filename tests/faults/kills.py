"""Kills at random moments: a run of the small chain is ended some times, begun again each time, and held against a whole one.

The moment is drawn uniformly over the time that a whole run takes, so a phase is met as often as it is long.
"""

import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.error import EXIT_CRASH, EXIT_DONE, EXIT_PREEMPTED
from tests.faults.harness import END_WITHIN_S, FINISH_WITHIN_S, Chain, Driver, Outcome, started

Kind = Literal["driver", "group", "rank", "SIGTERM"]
KINDS: dict[Kind, float] = {"driver": 0.3, "group": 0.25, "rank": 0.25, "SIGTERM": 0.2}
"""Who is ended, and how often: the driver alone, all processes, or one rank by SIGKILL; or the driver is asked to stop."""
NUM_KILLS = (1, 1, 1, 2, 3)
"""How often a run is ended, one of these."""
CODES: dict[Kind, tuple[int, ...]] = {
    "driver": (-signal.SIGKILL,),
    "group": (-signal.SIGKILL,),
    # A rank may have done its last work when it is killed, and a run may have come to its end when it is asked to stop.
    "rank": (EXIT_CRASH, EXIT_DONE),
    "SIGTERM": (EXIT_PREEMPTED, EXIT_DONE),
}
"""How the driver then ends."""
SHORTEST_S = 1.0


@dataclass(frozen=True)
class Kill:
    """Who is ended, and how long after the driver's start."""

    kind: Kind
    after_s: float


@dataclass(frozen=True)
class Whole:
    """A run that nobody disturbed."""

    chain: Chain
    outcome: Outcome
    seconds: float


@dataclass(frozen=True)
class Report:
    """What became of one point."""

    number: int
    variant: str
    kinds: list[Kind]
    phases: list[str]
    """Where each kill met the run."""
    steps_redone: int
    problems: list[str]
    """How it is not what it should be; empty where the outcome is identical."""
    seconds: float


def run_whole(chain: Chain, *, warm: bool = True) -> Whole:
    """Run the chain to its end."""
    seconds = chain.finish(chain.root.parent / "log", warm=warm)
    return Whole(chain, chain.outcome(), seconds)


def draw(seed: int, number: int, whole_s: float) -> list[Kill]:
    """The kills of the point of that number, of a run that takes so long as a whole."""
    chance = random.Random(f"{seed}/{number}")
    kills: list[Kill] = []
    for _ in range(chance.choice(NUM_KILLS)):
        left_s = max(SHORTEST_S, whole_s - sum(kill.after_s for kill in kills))
        (kind,) = chance.choices(list(KINDS), list(KINDS.values()))
        kills.append(Kill(kind, chance.uniform(0.0, left_s)))
    return kills


def run_point(here: Path, number: int, variant: str, kills: Sequence[Kill], whole: Whole, *, warm: bool = True) -> Report:
    """Run the chain with these kills under a root of its own, which is left only where something is wrong with it."""
    chain = whole.chain.elsewhere(here / "runs")
    began = time.monotonic()
    phases: list[str] = []
    problems: list[str] = []
    steps_redone = 0
    for count, kill in enumerate(kills):
        with started(chain.command, here / f"log-{count}", warm=warm) as driver:
            phases.append(_kill(driver, chain, kill, problems))
        steps_redone += chain.steps_lost()
    if not problems:
        try:
            chain.finish(here / f"log-{len(kills)}", warm=warm)
            problems += chain.outcome().differences(whole.outcome)
        except AssertionError as error:
            problems.append(str(error))
    if not problems:
        shutil.rmtree(here)
    return Report(number, variant, [kill.kind for kill in kills], phases, steps_redone, problems, time.monotonic() - began)


def _kill(driver: Driver, chain: Chain, kill: Kill, problems: list[str]) -> str:
    """End the driver as `kill` says, once it is time; where that met it. What goes wrong is added to `problems`."""
    deadline = time.monotonic() + kill.after_s
    while driver.poll() is None and (time.monotonic() < deadline or (kill.kind == "rank" and not driver.ranks())):
        time.sleep(0.002)
    where = chain.whereabouts()
    if driver.poll() is None:
        _send(driver, kill.kind)
        expected = CODES[kill.kind]
        if kill.kind == "SIGTERM" and not (driver.log / "out").stat().st_size:
            expected = (*expected, -signal.SIGTERM)  # Python had not begun to hear signals, nor anything else
    else:
        where, expected = "over by then", (EXIT_DONE,)
    try:
        code, err = driver.ended(FINISH_WITHIN_S if kill.kind == "rank" else 2 * END_WITHIN_S)
        if code not in expected:
            problems.append(f"{kill.kind} in {where}: exit code {code}, not {expected[0]}: {err[-500:]}")
        elif "Traceback" in err:
            problems.append(f"{kill.kind} in {where}: {err[-500:]}")
    except AssertionError as error:
        problems.append(f"{kill.kind} in {where}: {error}")
    return where


def _send(driver: Driver, kind: Kind) -> None:
    try:
        if kind == "rank":
            ranks = driver.ranks()
            if ranks:  # else the phase just ended, and the driver goes on to its end
                Driver(ranks[max(ranks)], driver.poll, driver.log).signal(signal.SIGKILL)
        else:
            driver.signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL, whole_group=kind == "group")
    except ProcessLookupError:
        pass  # it ended just now
