"""Smoke: each stage that trains is tried for two steps before a chain is run in earnest, so that what cannot work is known at once.

    two steps, the state saved after each -> publish -> reload and compare -> take back all but the state after the first
    -> in fresh processes: resume from there -> the second step, save, publish, reload again

By the stage's own launcher, on its own ranks, with its own settings, in `<root>/<run>/.smoke/<stage>`. Both steps are on the longest
samples of its data, the second one with the optimizer's state there, so memory peaks as high as it will. A stage is tried on what
the trial of the stage above published. Once all have passed nothing is left of that but `smoke.json` in the stages' directories:
what was found, and the key of what it holds for. Imports no torch.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import artifact, checkpoint, disk, ledger
from posttrain.config import LauncherConfig, LocalLauncher
from posttrain.error import StageFailed, UserError
from posttrain.provenance import now
from posttrain.recipe import KeepPolicy, TrainingConfig
from posttrain.rehearsal import few_steps, outcome

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.launch import Launch

FILE = "smoke.json"
DIRECTORY = ".smoke"
NUM_STEPS = 2
WORTH_STEPS = 50
"""A stage of fewer steps tells as soon by itself, so by default it is not tried."""
LOOK_EVERY_S = 1.0
OUT_OF_MEMORY = re.compile(r"out.of.memory|OutOfMemory|MemoryError|can(?:'t|not) allocate memory", re.IGNORECASE)
WORDS = {
    "begin": "began",
    "prepare": "prepared its data",
    "prepare data": "prepared its data",
    "run": "began",
    "load model": "loaded its model",
    "reference": "computed its reference",
    "train": "trained",
    "save": "saved its state",
    "publish": "published what it had trained",
    "verify": "reloaded what it had published",
    "ended": "was to be resumed",
}
"""What a stage does in the phases that its ranks tell of."""


@dataclass(frozen=True)
class Trial:
    """A stage as it is tried."""

    name: str
    key: str
    config: TrainingConfig
    """As `shorten` gave it."""
    num_processes: int
    directory: Path
    begin: Callable[[], ledger.Attempt]
    """Writes down a new attempt at it."""


@dataclass(frozen=True)
class Found:
    """What `smoke.json` says."""

    key: str
    """What it holds for: see `key_of`."""
    passed: bool
    said: str
    when: str
    seconds: float

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'failed'}: {self.said}"


# --- what it holds for -----------------------------------------------------------------------------------------------


def shorten(config: TrainingConfig) -> TrainingConfig:
    """The settings by which a stage is tried: all that decides whether it trains is as it was; held-out rows are not measured on."""
    unmeasured: dict[str, Any] = {"eval_steps": None, "select": None, "report_to": []}
    return config.model_copy(update={**few_steps(NUM_STEPS), **unmeasured, "save_minutes": None, "keep": KeepPolicy()})


def key_of(fingerprint: str, config: TrainingConfig, launcher: LauncherConfig, num_processes: int) -> str:
    """The hash of all that a trial holds for: what is learned from what, and where and how it is computed."""
    zero = None if config.deepspeed is None else Path(config.deepspeed)
    return disk.hash_json(
        {
            "fingerprint": fingerprint,
            "config": shorten(config).model_dump(mode="json", exclude={"launcher", "preflight", "stall_timeout_s"}),
            "deepspeed": disk.hash_file(zero) if zero is not None and zero.is_file() else None,
            "launcher": launcher.model_dump(mode="json", include={"kind", "hardware", "gpus_per_node"}),
            "num_processes": num_processes,
            "each": None if isinstance(launcher, LocalLauncher) else launcher.tasks_per_node,
        }
    )


def read_found(directory: Path) -> Found | None:
    """How the stage in that directory fared when it was last tried; None where it never was, or the record is damaged."""
    try:
        record = disk.read_sealed(directory / FILE)
        return None if record is None else Found(**record)
    except (OSError, ValueError, TypeError):
        return None


def list_passed(root: Path) -> dict[str, Found]:
    """What passed, in any stage of any run under `root`, by what it holds for."""
    passed: dict[str, Found] = {}
    for path in sorted(root.glob(f"*/*/{FILE}")):
        found = read_found(path.parent)
        if found is not None and found.passed:
            passed.setdefault(found.key, found)
    return passed


def find(directory: Path, key: Callable[[], str], passed: Mapping[str, Found]) -> Found | None:
    """What was found for the key that `key` computes: by the stage in that directory, or among what `passed` elsewhere.

    Where nothing was ever tried the key is not computed.
    """
    own = read_found(directory)
    if own is None and not passed:
        return None
    wanted = key()
    return own if own is not None and own.key == wanted else passed.get(wanted)


# --- trying ----------------------------------------------------------------------------------------------------------


@contextmanager
def workplace(run: Path, console: "Console") -> Iterator[Path]:
    """The directory in which stages of a run are tried, for this process alone while the block runs; what failed leaves its logs there."""
    directory = run / DIRECTORY
    said = False
    while holder := ledger.lease_holder(directory):
        if not said:
            console.print(f"  waiting for the smoke of {holder}", markup=False, highlight=False, soft_wrap=True)
            said = True
        time.sleep(LOOK_EVERY_S)
    with disk.explain_disk_errors(f"the smoke of {run}"):
        directory.mkdir(parents=True, exist_ok=True)
        with ledger.lease(directory):
            _remove([path for path in directory.iterdir() if path.is_dir()])
            try:
                yield directory
            except BaseException:
                _remove([path for path in directory.glob("*/*") if path.name != "logs"])
                raise
            _remove([path for path in directory.iterdir() if path.is_dir()])
        with suppress(OSError):
            directory.rmdir()


def try_out(trial: Trial, launch: "Launch", stage: Path) -> Found:
    """Try a stage, and write down in its own directory `stage` how it fared.

    Raises as a launcher does, but `UserError` where memory did not suffice, since that is for the user to change.
    """
    started = time.monotonic()

    def note(passed: bool, said: str) -> Found:
        found = Found(trial.key, passed, said, now(), round(time.monotonic() - started, 1))
        stage.mkdir(parents=True, exist_ok=True)
        disk.write_sealed(stage / FILE, asdict(found))
        return found

    try:
        launch(trial.directory, trial.begin())
        whole, first = outcome(trial.directory), _first_step(trial.directory)
        _take_back(trial)
        launch(trial.directory, trial.begin())
        if _first_step(trial.directory) != first:
            logs = trial.directory / "logs"
            raise StageFailed(f"stages.{trial.name}: the state that it had saved after step 1 was not gone on from; {logs} tells why")
    except (UserError, StageFailed) as failure:
        explained = explain(trial, failure)
        note(False, str(explained))
        raise explained from failure
    prepared, settled = (disk.read_json(trial.directory / name) for name in ("prepared.json", "layout.json"))
    resumed = "the same bytes" if outcome(trial.directory) == whole else "other bytes, by rounding"
    return note(
        True,
        f"{trial.config.global_batch_size:,} samples a step, of up to {prepared['longest_tokens']:,} tokens, computed "
        f"{settled['micro_batch_tokens']:,} at once; resumed to {resumed}",
    )


def _first_step(directory: Path) -> str:
    """What was logged of the first step, its times among that: another one would not be the same to the letter."""
    return (directory / "metrics.jsonl").read_text(encoding="utf-8").partition("\n")[0]


def _take_back(trial: Trial) -> None:
    """Have the stage be as it was when it had saved its state after the first step."""
    saved = checkpoint.list_complete(trial.directory / "checkpoints")
    if not any(each.step == 1 for each in saved):
        raise StageFailed(f"stages.{trial.name}: the state after step 1 is not there, or not whole, so it could not be resumed")
    names = (artifact.FILE, artifact.OUTPUT, artifact.RECORD, *artifact.EVIDENCE)  # the first of which says that it is finished
    _remove([trial.directory / name for name in names])
    _remove([each.path for each in saved if each.step > 1])


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# --- what to say -----------------------------------------------------------------------------------------------------


def explain(trial: Trial, failure: UserError | StageFailed) -> UserError | StageFailed:
    """One line that says which stage failed, at what, and, where memory did not suffice, what to change."""
    from posttrain.heartbeat import read_beat

    at = f"stages.{trial.name}"
    attempt = ledger.read_attempt(trial.directory)
    beat = attempt and read_beat(attempt.logs(trial.directory), 0)
    phase = beat["phase"] if beat else "begin"
    where = WORDS.get(phase, f"was at {phase}")
    if attempt is not None and attempt.number > 1 and phase != "ended":
        where += ", resumed from the state after step 1"
    said = str(failure).removeprefix(f"{at}: ")
    if OUT_OF_MEMORY.search(said):
        return UserError(f"{at}: out of memory when its smoke {where}; {_advice(trial, phase)} ({said})")
    if isinstance(failure, UserError):
        return UserError(f"{failure} (found by the smoke of {at} when it {where})")
    return StageFailed(f"{at}: its smoke failed when it {where}: {said}")


def _advice(trial: Trial, phase: str) -> str:
    at, config = f"stages.{trial.name}", trial.config
    if phase in ("publish", "verify"):
        return f"beside its part of the model, a process holds a file of weights then; lower {at}.max_shard_size, or give it more memory"
    settled, prepared = (disk.read_json(trial.directory / name) or {} for name in ("layout.json", "prepared.json"))
    options = []
    if phase in ("train", "reference"):
        if settled.get("micro_batch_tokens", 0) > prepared.get("longest_tokens", 0):
            options.append(f"lower {at}.micro_batch_tokens ({settled['micro_batch_tokens']:,} now)")
        if not (config.gradient_checkpointing or settled.get("recompute")):
            options.append(f"set {at}.gradient_checkpointing: true")
    if config.deepspeed is None and config.fsdp is None:
        options.append(f"shard it with {at}.deepspeed: ds_configs/zero3{'' if trial.num_processes > 1 else '_offload'}.json")
    if config.lora is None:
        options.append(f"train adapters, {at}.lora: {{r: 16}}")
    options.append(f"lower {at}.max_length ({config.max_length:,} now)")
    return ", or ".join(options)
