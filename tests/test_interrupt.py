"""However a run is ended, it ends whole: quickly, with no process left behind, and the same command goes on from there."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real

REPOSITORY = Path(__file__).parent.parent
MARK = "POSTTRAIN_TEST_MARK"
NUM_STEPS = 100
END_WITHIN_S = 10.0
"""As long as ending may take; a machine that does other work besides is not what is tested."""
START_WITHIN_S = 120.0


@pytest.fixture(autouse=True)
def _hears_ctrl_c() -> Iterator[None]:
    """A shell that puts a command in the background has it ignore SIGINT, and whoever is started by it inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@dataclass
class Project:
    """A pipeline of one slow stage on two ranks, and the drivers started on it; `mark` is in the environment of all processes."""

    here: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def stage(self) -> Path:
        return self.here / "runs" / "r" / "sft"

    def start(self) -> subprocess.Popen[str]:
        """`run`, in a session of its own."""
        return subprocess.Popen(
            [sys.executable, "pipeline.py", "run", str(self.here / "pipeline.yaml"), "--root", str(self.here / "runs")],
            cwd=REPOSITORY,
            env={**os.environ, MARK: self.mark},
            stdout=(self.here / "out").open("w"),
            stderr=(self.here / "err").open("w"),
            text=True,
            start_new_session=True,
        )

    def is_past(self, step: int, *, attempt: int) -> bool:
        """Whether that attempt has trained beyond the step."""
        try:
            number = json.loads((self.stage / "stage.json").read_text())["number"]
            state = json.loads((self.stage / "progress.json").read_text())
        except FileNotFoundError:
            return False
        return bool(number == attempt and state["phase"] == "train" and state["step"] > step)

    def last_checkpoint(self) -> int:
        return max((int(path.parent.name.split("-")[1]) for path in self.stage.glob("checkpoints/*/COMPLETE")), default=0)

    def processes(self) -> dict[int, str]:
        """Every process that is of these drivers, or descends from one, by its id."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (path / "environ").read_bytes():
                    found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
            except OSError:
                continue  # ended just now
        return found

    def wait(self, condition: Callable[[], bool], within_s: float, what: str) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} within {within_s} s; err: {(self.here / 'err').read_text()}"
            time.sleep(0.1)

    def ended(self, driver: subprocess.Popen[str]) -> tuple[int, str]:
        """Exit code and stderr of a driver that was told to end, when nothing of it is left."""
        code = driver.wait(END_WITHIN_S)
        self.wait(lambda: not self.processes(), 5.0, "the last process was to end")
        return code, (self.here / "err").read_text()


@pytest.fixture
def project(tmp_path: Path, stories: Path) -> Iterator[Project]:
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}, and after it comes {i + 1}."} for i in range(8)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pipeline.yaml").write_text(f"""
run: r
sources: {{base: {{model: {stories}}}, chat: {{data: {tmp_path}/chat.jsonl}}}}
stages:
  sft: {{inputs: {{policy: base, data: chat}}, max_steps: {NUM_STEPS}, global_batch_size: 8, micro_batch_tokens: 1,
         save_steps: 10, max_length: 128, num_processes: 2}}
""")
    project = Project(tmp_path)
    yield project
    for pid in project.processes():
        os.kill(pid, signal.SIGKILL)


def prepares_ahead(project: Project) -> bool:
    """Whether rows of the second stage are being encoded while the first trains."""
    return project.is_past(0, attempt=1) and any(project.here.glob("runs/.prepared/.*.partial-*/rows.arrow"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["Ctrl-C", "SIGTERM", "kill -9"])
def test_a_run_that_is_ended_while_it_prepares_ahead_leaves_no_process_behind(project: Project, number: signal.Signals) -> None:
    answers = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"{i} it may be."} for i in range(30_000)]
    (project.here / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    text = (project.here / "pipeline.yaml").read_text()
    text = text.replace("sources: {", f"sources: {{prefs: {{data: {project.here}/prefs.jsonl}}, ")
    (project.here / "pipeline.yaml").write_text(text + "  dpo: {inputs: {policy: sft, data: prefs}, max_steps: 1, max_length: 128}\n")
    driver = project.start()
    project.wait(lambda: prepares_ahead(project), START_WITHIN_S, "preparing ahead was to begin")
    if number == signal.SIGKILL:
        driver.kill()
        driver.wait()
        project.wait(lambda: not project.processes(), END_WITHIN_S, "the orphans were to end")
        return
    driver.send_signal(number)
    code, err = project.ended(driver)
    assert code == 75
    assert "Traceback" not in err
    assert not prepares_ahead(project), "what was half made is taken away"


def actions(posttrain: Callable[..., Any], project: Project) -> dict[str, Any]:
    (row,) = json.loads(posttrain("plan", project.here / "pipeline.yaml", "--root", project.here / "runs", "--json").out)
    return dict(row)


def test_a_run_that_is_ended_in_every_way_leaves_nothing_behind_and_goes_on_where_it_was(
    project: Project, posttrain: Callable[..., Any]
) -> None:
    # Killed while it trains: there is nobody to save anything, so it goes on from the last checkpoint.
    driver = project.start()
    project.wait(lambda: project.is_past(15, attempt=1), START_WITHIN_S, "training was to begin")
    assert len(project.processes()) >= 4, "a driver, a warm parent and two ranks"
    assert actions(posttrain, project)["action"] == "running"
    driver.kill()
    driver.wait()
    project.wait(lambda: not project.processes(), END_WITHIN_S, "the orphans were to end")
    row = actions(posttrain, project)
    assert (row["action"], row["why"]) == ("resume", f"from the checkpoint of step {project.last_checkpoint()}")

    # Ctrl-C while it trains reaches the whole process group: the step at hand is saved.
    killed_at = project.last_checkpoint()
    driver = project.start()
    project.wait(lambda: project.is_past(killed_at + 2, attempt=2), START_WITHIN_S, "training was to go on")
    os.killpg(driver.pid, signal.SIGINT)
    code, err = project.ended(driver)
    assert code == 75
    assert err.splitlines()[-1].startswith("stopped: ")
    assert "Traceback" not in err
    assert project.last_checkpoint() > killed_at + 2
    assert actions(posttrain, project)["action"] == "resume"

    # Left alone, it finishes, with every step logged once.
    stopped_at = project.last_checkpoint()
    ended = posttrain("run", project.here / "pipeline.yaml", "--root", project.here / "runs")
    assert ended.code == 0, ended.err
    assert f"sft  resume: from the checkpoint of step {stopped_at}\n" in ended.out
    steps = [json.loads(line)["step"] for line in (project.stage / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, NUM_STEPS + 1))
    assert actions(posttrain, project)["action"] == "skip"


@pytest.mark.parametrize(
    ("number", "whole_group", "code"),
    [(signal.SIGINT, True, 75), (signal.SIGINT, False, 75), (signal.SIGTERM, False, 75), (signal.SIGKILL, False, -9)],
    ids=["Ctrl-C", "SIGINT", "SIGTERM", "kill -9"],
)
def test_a_run_that_is_ended_while_libraries_are_still_being_imported_leaves_nothing_behind(
    project: Project, number: signal.Signals, whole_group: bool, code: int
) -> None:
    driver = project.start()
    project.wait(lambda: (project.stage / "lease.json").exists(), START_WITHIN_S, "the stage was to be taken up")
    if whole_group:
        os.killpg(driver.pid, number)
    else:
        driver.send_signal(number)
    ended, err = project.ended(driver)
    assert ended == code
    assert "Traceback" not in err
    if code == 75:
        assert err.splitlines()[-1].startswith("stopped: ")
        assert not (project.stage / "lease.json").exists()
