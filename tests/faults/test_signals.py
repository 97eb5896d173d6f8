"""Asked to stop in any phase, a run stops at once and in order, and the same command goes on from there to the same bytes."""

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from posttrain.error import EXIT_DONE, EXIT_PREEMPTED
from tests.conftest import Ended, make_tiny, write_chat, write_pairs
from tests.faults.harness import END_WITHIN_S, FINISH_WITHIN_S, VARIANTS, Chain, Driver, started, write_asked

PLACES = [
    ("curate", "diversity: vectors", -1),
    ("sft", "prepare data", 0),
    ("sft", "load model", -1),
    ("sft", "train", -1),
    ("sft", "train", 0),
    ("sft", "publish", -1),
    ("dpo", "reference", 0),
    ("dpo", "train", 1),
    ("eval", "score", -1),
    ("eval", "generate", -1),
]
"""Stage, phase, and the step of the phase that is done when the signal comes; a phase of short steps may be some steps further."""
MID_STEP_S = 0.4
"""Into a step, which takes several times as long."""
TIME_LIMIT_S = 12
AT_ONCE_S = 4.0
"""Less than ranks are given to save their state."""


def long_chain(here: Path, overrides: tuple[str, ...]) -> Chain:
    """A chain whose phases last long enough to be met: steps of many micro-batches, many rows."""
    make_tiny(here / "tiny")
    write_chat(here / "chat.jsonl", 6000)
    write_pairs(here / "prefs.jsonl", 1200)
    write_asked(here / "asked.jsonl", 200)
    (here / "pipeline.yaml").write_text(f"""
run: r
sources:
  base: {{model: {here}/tiny}}
  chat: {{data: {here}/chat.jsonl}}
  prefs: {{data: {here}/prefs.jsonl}}
  asked: {{data: {here}/asked.jsonl}}
stages:
  curate: {{inputs: {{data: chat, policy: base}}, steps: [normalize, {{diversity: {{keep: 5000}}}}]}}
  sft: {{inputs: {{policy: base, data: curate}}, learning_rate: 1e-3, global_batch_size: 480, micro_batch_tokens: 1, max_length: 128,
        preflight: {{held_out: 1.0}}}}
  dpo: {{inputs: {{policy: sft, data: prefs}}, learning_rate: 1e-3, global_batch_size: 240, micro_batch_tokens: 1, max_length: 128,
        preflight: {{held_out: 1.0}}}}
  eval: {{inputs: {{policies: [base, sft, dpo], data: [prefs, asked]}}, max_new_tokens: 100}}
""")
    return Chain(here / "pipeline.yaml", here / "runs", (*overrides, "stages.sft.max_steps=3", "stages.dpo.max_steps=4"))


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Chain]:
    """The chain of a variant, run to its end by nobody disturbed."""
    made: dict[str, Chain] = {}

    def chain(variant: str) -> Chain:
        if variant not in made:
            made[variant] = long_chain(tmp_path_factory.mktemp(variant), VARIANTS[variant])
            made[variant].finish(made[variant].root.parent / "log")
        return made[variant]

    return chain


def stop(driver: Driver, code: int = EXIT_PREEMPTED, within_s: float = END_WITHIN_S) -> None:
    """Hold how the driver ends against how it should."""
    ended, err = driver.ended(within_s)
    assert ended == code, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("stopped: ")


def actions(posttrain: Callable[..., Ended], chain: Chain) -> dict[str, dict[str, Any]]:
    """What the same command would do about each stage."""
    ended = posttrain("plan", *chain.command[1:], "--json")
    assert ended.code == EXIT_DONE, ended.err
    return {row["stage"]: row for row in json.loads(ended.out)}


@pytest.mark.parametrize(("number", "variant"), [(signal.SIGTERM, "plain"), (signal.SIGUSR2, "zero2")], ids=["SIGTERM", "SIGUSR2"])
def test_a_run_that_is_asked_to_stop_in_every_phase_stops_and_goes_on(
    number: signal.Signals, variant: str, chains: Callable[[str], Chain], posttrain: Callable[..., Ended], tmp_path: Path
) -> None:
    chain = chains(variant).elsewhere(tmp_path / "runs")
    for stage, phase, past in PLACES:
        with started(chain.command, tmp_path / "log") as driver:
            driver.meet(partial(chain.is_in, stage, phase, past=past), f"{stage} was to {phase}")
            if phase == "train":
                time.sleep(MID_STEP_S)
            before = [line["step"] for line in chain.logged(stage)] if phase == "train" else []
            driver.signal(number)
            stop(driver)
        row = actions(posttrain, chain)[stage]
        assert row["action"] in ("run", "resume"), row
        if phase == "train":
            logged = [line["step"] for line in chain.logged(stage)]
            assert logged == before, "the step at hand is given up, not finished"
            if logged:
                assert row["why"] == f"from the checkpoint of step {logged[-1]}"
        assert not list(chain.root.glob(".prepared/.*.partial-*/rows.arrow")), "what was half made is taken away"
    chain.finish(tmp_path / "log")
    assert not chain.outcome().differences(chains(variant).outcome())


def test_ranks_that_are_asked_again_and_again_save_all_the_same(
    chains: Callable[[str], Chain], posttrain: Callable[..., Ended], tmp_path: Path
) -> None:
    chain = chains("zero2").elsewhere(tmp_path / "runs")
    with started(chain.command, tmp_path / "log") as driver:
        driver.meet(lambda: chain.is_in("sft", "train", past=1), "training was to be under way")
        ranks = driver.ranks().values()
        while driver.poll() is None:  # as `scancel`, srun and the driver of a job do, one after the other
            for rank in ranks:
                with suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGTERM)
            time.sleep(0.005)
        stop(driver)
    last = chain.logged("sft")[-1]["step"]
    assert actions(posttrain, chain)["sft"]["why"] == f"from the checkpoint of step {last}"
    chain.finish(tmp_path / "log")
    assert not chain.outcome().differences(chains("zero2").outcome())


def test_ctrl_c_twice_ends_a_run_at_once(chains: Callable[[str], Chain], tmp_path: Path) -> None:
    chain = chains("zero2").elsewhere(tmp_path / "runs")
    with started(chain.command, tmp_path / "log") as driver:
        driver.meet(lambda: chain.is_in("sft", "train", past=0), "training was to begin")
        ranks = driver.ranks()
        Driver(ranks[1], driver.poll, driver.log).signal(signal.SIGSTOP)  # so that it cannot save its state
        driver.signal(signal.SIGINT, whole_group=True)
        time.sleep(1.0)
        assert driver.poll() is None, "it waits for the state to be saved"
        driver.signal(signal.SIGINT, whole_group=True)
        stop(driver, within_s=AT_ONCE_S)
    chain.finish(tmp_path / "log")
    assert not chain.outcome().differences(chains("zero2").outcome())


def test_a_run_stops_by_itself_at_its_time_limit(chains: Callable[[str], Chain], tmp_path: Path) -> None:
    chain = chains("plain").elsewhere(tmp_path / "runs")
    began = time.monotonic()
    with started([*chain.command, "--time-limit", f"{TIME_LIMIT_S}s"], tmp_path / "log") as driver:
        stop(driver, within_s=FINISH_WITHIN_S)
        assert "time limit" in driver.err()
    assert time.monotonic() - began < TIME_LIMIT_S, "it stops early enough to have ended by then"
    with started([*chain.command, "--time-limit", "1h"], tmp_path / "log") as driver:
        code, err = driver.ended(FINISH_WITHIN_S)
    assert code == EXIT_DONE, err
    assert not chain.outcome().differences(chains("plain").outcome())
