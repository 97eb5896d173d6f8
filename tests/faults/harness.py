"""The fault harness: real drivers on small chains, ended in every way, and what they leave held against an uninterrupted run.

A driver is either `python pipeline.py`, which takes 10 to 20 s to import its libraries, or (`warm`) a process forked from one
that has imported them, which forks its own warm parent in turn. Either has a session of its own, with a warm parent, ranks and
all that these start: real processes, which real signals end. What a warm driver is spared is the import, and nothing else.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from multiprocessing import forkserver, get_context, resource_tracker, util
from pathlib import Path
from typing import Any

from posttrain.artifact import read_artifact
from posttrain.config import read_pipeline
from posttrain.disk import hash_file, list_files, read_json
from posttrain.error import STOP_SIGNALS
from tests.conftest import REPOSITORY, make_tiny, write_chat, write_pairs

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # drivers side by side would wait for their threads on each other's cores

START_WITHIN_S = 120.0
"""As long as a driver may take to come to where it is waited for."""
END_WITHIN_S = 10.0
"""As long as ending may take; a machine that does other work besides is not what is tested."""
FINISH_WITHIN_S = 400.0
POLL_S = 0.005


# --- drivers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Driver:
    """A command of the pipeline in a session of its own, named by its process id; `log` holds its `out` and `err`."""

    pid: int
    poll: Callable[[], int | None]
    """Its exit code, or minus the signal that ended it; None while it runs."""
    log: Path

    def signal(self, number: int, *, whole_group: bool = False) -> None:
        """Send a signal to the driver alone, or to all its processes as a terminal does."""
        (os.killpg if whole_group else os.kill)(self.pid, number)

    def processes(self) -> dict[int, str]:
        """Every process of its session that has not ended, by id."""
        return {pid: f"parent {parent}, logs to {_output_of(pid)}" for pid, parent, session in _all_processes() if session == self.pid}

    def ranks(self) -> dict[int, int]:
        """The processes that are ranks of a phase now: rank to process id."""
        found = {pid: re.search(r"/rank_(\d+)\.log$", _output_of(pid)) for pid in self.processes()}
        return {int(match[1]): pid for pid, match in found.items() if match}

    def wait(self, condition: Callable[[], bool], within_s: float, what: str) -> None:
        """Wait until it is so, looking often enough to act within a phase of milliseconds."""
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} within {within_s} s; err: {self.err()}"
            time.sleep(POLL_S)

    def meet(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until it is so, while the driver still runs."""
        self.wait(lambda: self.poll() is not None or condition(), START_WITHIN_S, what)
        assert self.poll() is None, f"{what}, and it ended before: {self.err()}"

    def ended(self, within_s: float = END_WITHIN_S) -> tuple[int, str]:
        """Exit code and stderr, once nothing of it is left."""
        self.wait(lambda: self.poll() is not None, within_s, "the driver was to end")
        self.wait(lambda: not self.processes(), END_WITHIN_S, f"its last process was to end: {self.processes()}")
        code = self.poll()
        assert code is not None
        return code, self.err()

    def err(self) -> str:
        """What it said on stderr."""
        return (self.log / "err").read_text()

    def end(self) -> None:
        """Kill whatever is left of it."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # ended just now


def start(arguments: Sequence[object], log: Path, *, warm: bool = True) -> Driver:
    """Start `pipeline.py` with these arguments; its output goes to `log`."""
    log.mkdir(parents=True, exist_ok=True)
    command = [str(argument) for argument in arguments]
    if warm:
        warm_up()
        process = get_context("forkserver").Process(target=_drive, args=(command, log))
        process.start()
        assert process.pid is not None
        driver = Driver(process.pid, lambda: process.exitcode, log)
        driver.wait(lambda: process.exitcode is not None or _session_of(driver.pid) == driver.pid, START_WITHIN_S, "a driver was to start")
        return driver
    with (log / "out").open("w") as out, (log / "err").open("w") as err:
        child = subprocess.Popen([sys.executable, "pipeline.py", *command], cwd=REPOSITORY, stdout=out, stderr=err, start_new_session=True)
    return Driver(child.pid, child.poll, log)


@contextmanager
def started(arguments: Sequence[object], log: Path, *, warm: bool = True) -> Iterator[Driver]:
    """`start`, and nothing of it is left after the block."""
    driver = start(arguments, log, warm=warm)
    try:
        yield driver
    finally:
        driver.end()


@cache
def warm_up() -> None:
    """Start the warm parent of this very process, which warm drivers are forked from. The main thread calls it first."""
    from rich.console import Console

    from posttrain.config import LocalLauncher
    from posttrain.launch import open_launcher

    with open_launcher(LocalLauncher(), Console(), deadline=math.inf):
        pass


def _drive(arguments: list[str], log: Path) -> None:
    """A driver, in a process forked from a warm parent."""
    for stream, name in ((1, "out"), (2, "err")):
        with (log / name).open("w") as file:
            os.dup2(file.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a warm parent is deaf to it and to others, and so are those forked from it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    os.chdir(REPOSITORY)
    _have_a_warm_parent_of_its_own()
    import pipeline

    os.setsid()  # from here on it is waited for, and may be ended
    sys.argv = ["pipeline.py", *arguments]
    sys.exit(pipeline.main())


def _have_a_warm_parent_of_its_own() -> None:
    """Make `multiprocessing` forget the fork server that it came from, and start another by a fork, without the exec."""
    server, tracker = forkserver._forkserver, resource_tracker._resource_tracker
    for handle in (server._forkserver_alive_fd, tracker._fd):
        os.close(handle)
    server.__init__()
    tracker.__init__()
    kept = _open_files()

    def fork(_: str, command: Sequence[str], passed: Sequence[int]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            return pid
        try:
            for handle in _open_files() - kept - set(passed):
                os.close(handle)
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            exec(command[-1], {})
        except SystemExit:
            pass
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)

    util.spawnv_passfds = fork


def _open_files() -> set[int]:
    return {handle for handle in (int(path.name) for path in Path("/proc/self/fd").iterdir()) if _is_open(handle)}


def _is_open(handle: int) -> bool:
    try:
        os.fstat(handle)
    except OSError:
        return False  # that of the listing itself
    return True


def _all_processes() -> Iterator[tuple[int, int, int]]:
    """Process id, parent and session of every process that has not ended."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, _, session, *_ = (path / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue  # ended just now
        if state not in "ZX":
            yield int(path.name), int(parent), int(session)


def _session_of(pid: int) -> int | None:
    return next((session for each, _, session in _all_processes() if each == pid), None)


def _output_of(pid: int) -> str:
    """Where the stdout of a process goes."""
    try:
        return str(Path(f"/proc/{pid}/fd/1").readlink())
    except OSError:
        return ""


# --- chains ----------------------------------------------------------------------------------------------------------


VARIANTS: Mapping[str, tuple[str, ...]] = {
    "plain": ("stages.sft.max_steps=60", "stages.dpo.max_steps=40"),
    "zero2": (
        "launcher.num_processes=2",
        "stages.sft.deepspeed=ds_configs/zero2.json",
        "stages.dpo.deepspeed=ds_configs/zero2.json",
    ),
}
"""Ways to run the small chain, each as overrides; plain steps are ten times as fast, so it takes more of them."""


@dataclass(frozen=True)
class Chain:
    """A pipeline file and the root that it runs under; `overrides` go with every command."""

    file: Path
    root: Path
    overrides: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        """Where its stages lie."""
        return self.root / "r"

    @property
    def command(self) -> list[str]:
        """The one command that is given again and again."""
        return ["run", str(self.file), "--root", str(self.root), *self.overrides]

    def elsewhere(self, root: Path) -> "Chain":
        """The same chain under another root."""
        return Chain(self.file, root, self.overrides)

    def finish(self, log: Path, *, warm: bool = True) -> float:
        """Run it to its end; the seconds that took."""
        with started(self.command, log, warm=warm) as driver:
            began = time.monotonic()
            code, err = driver.ended(FINISH_WITHIN_S)
        assert code == 0, err
        return time.monotonic() - began

    @cached_property
    def stages(self) -> list[str]:
        """The names of its stages, in order."""
        return list(read_pipeline(self.file).stages)

    # What its files tell of it, while it runs or after.

    def active(self) -> str | None:
        """The stage that was begun and is not finished."""
        begun = [name for name in self.stages if (self.directory / name / "stage.json").exists()]
        return next((name for name in begun if not (self.directory / name / "artifact.json").exists()), None)

    def progress(self, stage: str) -> Mapping[str, Any]:
        """Phase, step and number of steps now."""
        return {"phase": "", "step": 0, "num_steps": 0} | (read_json(self.directory / stage / "progress.json") or {})

    def is_in(self, stage: str, phase: str, *, past: int = -1) -> bool:
        """Whether a stage that is not finished is in a phase whose name begins so, beyond a step of it."""
        state = self.progress(stage)
        return self.active() == stage and state["phase"].startswith(phase) and state["step"] > past

    def whereabouts(self) -> str:
        """Stage and phase that it is in, such as `sft/train`."""
        name = self.active()
        if name is None:
            done = [(self.directory / stage / "artifact.json").exists() for stage in self.stages]
            return "end" if all(done) else "between stages" if any(done) else "start"
        if (self.directory / name / "output").exists():
            return f"{name}/verify"
        phase = self.progress(name)["phase"].partition(" (")[0]
        return f"{name}/{phase or 'begin'}"

    def checkpoints(self, stage: str) -> list[int]:
        """Steps of the checkpoints that have a marker."""
        markers = (self.directory / stage).glob("checkpoints/checkpoint-*/COMPLETE")
        return sorted(int(path.parent.name.partition("-")[2]) for path in markers)

    def logged(self, stage: str) -> list[dict[str, Any]]:
        """The whole lines of `metrics.jsonl`."""
        try:
            text = (self.directory / stage / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def steps_lost(self) -> int:
        """Logged steps of the stage at hand that no checkpoint holds, and that are done again."""
        name = self.active()
        if name is None or (self.directory / name / "output").exists():
            return 0
        logged = [line["step"] for line in self.logged(name)]
        return max(0, max(logged, default=0) - max(self.checkpoints(name), default=0))

    def outcome(self) -> "Outcome":
        """What a finished run left."""
        files, metrics, logged = {}, {}, {}
        for name in sorted(path.name for path in self.directory.iterdir()):
            finished = read_artifact(self.directory / name)
            if finished is None:
                continue
            for path in list_files(finished.output):
                files[f"{name}/{path.relative_to(finished.output)}"] = self._hash(path)
            metrics[name] = _without_costs(finished.metrics)
            logged[name] = [_without_costs(line) for line in self.logged(name)]
        return Outcome(files, metrics, logged)

    def _hash(self, path: Path) -> str:
        if path.suffix != ".json":
            return hash_file(path)
        return path.read_text().replace(str(self.root.resolve()), "ROOT")  # configs of models and adapters name where they came from


@dataclass(frozen=True)
class Outcome:
    """What must not depend on how often a run was cut off."""

    files: Mapping[str, str]
    """Every published file to its hash, or its text where that is JSON."""
    metrics: Mapping[str, Mapping[str, float]]
    logged: Mapping[str, Sequence[Mapping[str, float]]]
    """Every logged line of every stage."""

    def differences(self, other: "Outcome") -> list[str]:
        """What differs, in words; empty where nothing does."""
        files = sorted(self.files.keys() | other.files.keys())
        found = [f"{name} differs" for name in files if self.files.get(name) != other.files.get(name)]
        for name in sorted(self.metrics.keys() | other.metrics.keys()):
            mine, theirs = self.logged.get(name, []), other.logged.get(name, [])
            steps, expected = [line["step"] for line in mine], [line["step"] for line in theirs]
            if steps != expected:
                found.append(f"{name} logged the steps {steps}, not {expected}")
            elif mine != theirs:
                first = next(number for number, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
                found.append(f"{name} logged {mine[first]}, not {theirs[first]}")
            if self.metrics.get(name) != other.metrics.get(name):
                found.append(f"{name} has the metrics {self.metrics.get(name)}, not {other.metrics.get(name)}")
        return found


def _without_costs(values: Mapping[str, Any]) -> dict[str, Any]:
    """What does not tell of the machine or of saving: no seconds, nothing for each second, nothing of checkpoints."""
    return {name: value for name, value in values.items() if not name.endswith("_s") and not name.startswith("checkpoint_")}


def small_chain(here: Path, overrides: Sequence[str] = ()) -> Chain:
    """Curate, sft, dpo and eval on the tiny model, of a few seconds beyond its start; its root is `here / "runs"`."""
    here.mkdir(parents=True, exist_ok=True)
    make_tiny(here / "tiny")
    write_chat(here / "chat.jsonl", 32)
    write_pairs(here / "prefs.jsonl", 24)
    write_asked(here / "asked.jsonl", 8)
    file = here / "pipeline.yaml"
    file.write_text(f"""
run: r
sources:
  base: {{model: {here}/tiny}}
  chat: {{data: {here}/chat.jsonl}}
  prefs: {{data: {here}/prefs.jsonl}}
  asked: {{data: {here}/asked.jsonl}}
stages:
  curate:
    inputs: {{data: chat, policy: base}}
    steps: [normalize, exact_duplicates, {{diversity: {{keep: 24}}}}]
  sft:
    inputs: {{policy: base, data: curate}}
    learning_rate: 1e-3
    global_batch_size: 8
    micro_batch_tokens: 128
    max_length: 128
    max_steps: 12
    save_steps: 5
    preflight: {{held_out: 1.0}}
  dpo:
    inputs: {{policy: sft, data: prefs}}
    learning_rate: 1e-3
    global_batch_size: 8
    micro_batch_tokens: 128
    max_length: 128
    max_steps: 8
    save_steps: 3
    preflight: {{held_out: 1.0}}
  eval: {{inputs: {{policies: [base, sft, dpo], data: [chat, prefs, asked]}}, max_new_tokens: 16}}
""")
    return Chain(file, here / "runs", tuple(overrides))


def alignment_chain(here: Path) -> Chain:
    """Each other way to align, on the tiny model, of a few seconds beyond its start; its root is `here / "runs"`."""
    chain = small_chain(here)
    text = chain.file.read_text()
    step = "learning_rate: 1e-3, global_batch_size: 8, micro_batch_tokens: 128, max_length: 128, max_steps: 12, save_steps: 5"
    chain.file.write_text(f"""{text[: text.index("stages:")]}stages:
  orpo: {{inputs: {{policy: base, data: prefs}}, {step}}}
  kto: {{inputs: {{policy: orpo, data: prefs}}, {step}}}
  reward: {{inputs: {{policy: base, data: prefs, heldout: prefs}}, {step}}}
  rlhf: {{inputs: {{policy: kto, data: asked, reward: reward}}, num_generations: 4, max_completion_length: 16, {step}}}
""")
    return chain


CHAINS: Mapping[str, Callable[[Path], Chain]] = {
    **{name: partial(small_chain, overrides=overrides) for name, overrides in VARIANTS.items()},
    "alignment": alignment_chain,
}
"""The chains that are killed at random moments."""


def write_asked(path: Path, num_rows: int) -> Path:
    """Write questions into `path` that eval has answered, and checks."""
    rows = [{"prompt": f"what is bird {number}?", "checks": [{"kind": "regex_match", "pattern": "the"}]} for number in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
