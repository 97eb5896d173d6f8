"""However a run is ended, it ends whole: quickly, with no process left behind, and the same command goes on from there."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from posttrain.disk import read_json
from posttrain.error import STOP_SIGNALS
from posttrain.worker import hear_signals
from tests.faults.harness import Chain, Driver, started, warm_up

NUM_STEPS = 100


@pytest.fixture(autouse=True)
def _hears_ctrl_c() -> Iterator[None]:
    """A shell that puts a command in the background has it ignore SIGINT, and whoever is started by it inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def chain(tmp_path: Path, tiny: Path) -> Chain:
    """A pipeline of one slow stage on two ranks."""
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}, and after it comes {i + 1}."} for i in range(8)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pipeline.yaml").write_text(f"""
run: r
sources: {{base: {{model: {tiny}}}, chat: {{data: {tmp_path}/chat.jsonl}}}}
stages:
  sft: {{inputs: {{policy: base, data: chat}}, max_steps: {NUM_STEPS}, global_batch_size: 8, micro_batch_tokens: 1,
         save_steps: 10, max_length: 128, num_processes: 2}}
""")
    return Chain(tmp_path / "pipeline.yaml", tmp_path / "runs")


@pytest.fixture
def start(chain: Chain, tmp_path: Path) -> Iterator[Callable[[], Driver]]:
    """Starts the command as a user would; nothing of it is left after the test."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(started(chain.command, tmp_path / "log", warm=False))


def is_past(chain: Chain, step: int, *, attempt: int) -> bool:
    """Whether that attempt has trained beyond the step."""
    record = read_json(chain.directory / "sft" / "stage.json")
    return bool(record and record["number"] == attempt and chain.is_in("sft", "train", past=step))


def last_checkpoint(chain: Chain) -> int:
    return max(chain.checkpoints("sft"), default=0)


def prepares_ahead(chain: Chain) -> bool:
    """Whether rows of the second stage are being encoded while the first trains."""
    return is_past(chain, 0, attempt=1) and any(chain.root.glob(".prepared/.*.partial-*/rows.arrow"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["Ctrl-C", "SIGTERM", "kill -9"])
def test_a_run_that_is_ended_while_it_prepares_ahead_leaves_no_process_behind(
    chain: Chain, start: Callable[[], Driver], number: signal.Signals
) -> None:
    here = chain.file.parent
    answers = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"{i} it may be."} for i in range(30_000)]
    (here / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    text = chain.file.read_text().replace("sources: {", f"sources: {{prefs: {{data: {here}/prefs.jsonl}}, ")
    chain.file.write_text(text + "  dpo: {inputs: {policy: sft, data: prefs}, max_steps: 1, max_length: 128}\n")
    driver = start()
    driver.meet(lambda: prepares_ahead(chain), "preparing ahead was to begin")
    driver.signal(number)
    code, err = driver.ended()
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
        return
    assert code == 75
    assert "Traceback" not in err
    assert not prepares_ahead(chain), "what was half made is taken away"


def actions(posttrain: Callable[..., Any], chain: Chain) -> dict[str, Any]:
    (row,) = json.loads(posttrain("plan", *chain.command[1:], "--json").out)
    return dict(row)


def test_a_run_that_is_ended_in_every_way_leaves_nothing_behind_and_goes_on_where_it_was(
    chain: Chain, start: Callable[[], Driver], posttrain: Callable[..., Any]
) -> None:
    # Killed while it trains: there is nobody to save anything, so it goes on from the last checkpoint.
    driver = start()
    driver.meet(lambda: is_past(chain, 15, attempt=1), "training was to begin")
    assert len(driver.processes()) >= 4, "a driver, a warm parent and two ranks"
    assert actions(posttrain, chain)["action"] == "running"
    driver.signal(signal.SIGKILL)
    driver.ended()
    row = actions(posttrain, chain)
    assert (row["action"], row["why"]) == ("resume", f"from the checkpoint of step {last_checkpoint(chain)}")

    # Ctrl-C while it trains reaches the whole process group, as SIGTERM of `timeout` does: the step at hand is saved.
    for attempt, number in ((2, signal.SIGINT), (3, signal.SIGTERM)):
        killed_at = last_checkpoint(chain)
        driver = start()
        driver.meet(lambda at=killed_at, attempt=attempt: is_past(chain, at + 2, attempt=attempt), "training was to go on")
        driver.signal(number, whole_group=True)
        code, err = driver.ended()
        assert code == 75
        assert err.splitlines()[-1].startswith("stopped: ")
        assert "Traceback" not in err
        assert last_checkpoint(chain) > killed_at + 2
        assert actions(posttrain, chain)["action"] == "resume"

    # Left alone, it finishes, with every step logged once.
    stopped_at = last_checkpoint(chain)
    ended = posttrain(*chain.command)
    assert ended.code == 0, ended.err
    assert f"sft  resume: from the checkpoint of step {stopped_at}\n" in ended.out
    assert [line["step"] for line in chain.logged("sft")] == list(range(1, NUM_STEPS + 1))
    assert actions(posttrain, chain)["action"] == "skip"


@pytest.mark.parametrize(
    ("number", "whole_group", "code"),
    [(signal.SIGINT, True, 75), (signal.SIGINT, False, 75), (signal.SIGTERM, False, 75), (signal.SIGKILL, False, -9)],
    ids=["Ctrl-C", "SIGINT", "SIGTERM", "kill -9"],
)
def test_a_run_that_is_ended_while_libraries_are_still_being_imported_leaves_nothing_behind(
    chain: Chain, start: Callable[[], Driver], number: signal.Signals, whole_group: bool, code: int
) -> None:
    stage = chain.directory / "sft"
    driver = start()
    driver.meet(lambda: (stage / "lease.json").exists(), "the stage was to be taken up")
    driver.signal(number, whole_group=whole_group)
    ended, err = driver.ended()
    assert ended == code
    assert "Traceback" not in err
    if code == 75:
        assert err.splitlines()[-1].startswith("stopped: ")
        assert not (stage / "lease.json").exists()


def _listens_late() -> None:
    time.sleep(1.0)
    hear_signals()
    time.sleep(60.0)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_that_comes_before_a_rank_listens_is_not_lost(number: signal.Signals) -> None:
    warm_up()
    rank = get_context("forkserver").Process(target=_listens_late)
    rank.start()
    assert rank.pid
    os.kill(rank.pid, number)
    rank.join(30.0)
    try:
        assert rank.exitcode == -number
    finally:
        rank.kill()
