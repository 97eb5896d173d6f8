"""What a stage is: a kind of work with a config class, declared inputs and output, and two functions.

`prepare` runs in one process before any process group exists (tokenize, mask, check); `run` runs on every rank of a
fresh process group. A stage reads its inputs and its config, and writes its output directory; it knows nothing of runs,
launchers or other stages.
"""

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import Field

from posttrain.config import Config, DataSource, ModelSource, nearest
from posttrain.error import UserError

ArtifactKind = Literal["policy", "reward_model", "dataset", "report", "verdict"]


class StageConfig(Config):
    """Fields that every stage has: where and how fast it runs."""

    bears_identity: ClassVar[bool] = False

    num_processes: int | None = Field(None, ge=1)
    """Processes of this stage; by default what the launcher says."""
    launcher: dict[str, Any] = {}
    """Fields of the pipeline's `launcher` that are others for this stage, such as `{num_nodes: 1}`."""
    stall_timeout_s: float | None = Field(1800.0, gt=0)
    """Seconds in which no process comes a step further after which the stage counts as hung; four times as many to load, save or verify."""

    def check(self, num_processes: int, at: str) -> None:
        """What can be checked only with the number of processes known. Raises `UserError` naming the path under `at`."""

    def check_inputs(self, roles: Collection[str], at: str) -> None:
        """What can be checked only with the roles known that something is wired to. Raises `UserError` naming the path under `at`."""


C = TypeVar("C", bound=StageConfig)


@dataclass(frozen=True)
class Role:
    """An input that a stage declares: which kind of artifact, whether several may be given, and whether none may."""

    kind: ArtifactKind
    many: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Input:
    """One artifact or source handed to a stage, by the name it has in the pipeline file."""

    name: str
    kind: ArtifactKind
    fingerprint: str
    source: ModelSource | DataSource

    @property
    def model(self) -> ModelSource:
        """The model directory or Hub id, for policies and reward models."""
        assert isinstance(self.source, ModelSource), f"{self.name} is no model"
        return self.source

    @property
    def data(self) -> DataSource:
        """The data files or Hub data sets, for data sets."""
        assert isinstance(self.source, DataSource), f"{self.name} is no data set"
        return self.source

    @property
    def report(self) -> Path:
        """The directory of what an evaluation wrote."""
        assert self.kind == "report", f"{self.name} is no report"
        return Path(self.model.model)


@dataclass(frozen=True)
class StageContext(Generic[C]):
    """All that a stage's functions are given.

    `directory` is the stage's own, on a disk that all ranks share; `root` holds all runs and what they share.
    """

    name: str
    config: C
    inputs: Mapping[str, tuple[Input, ...]]
    directory: Path
    root: Path
    held_out: tuple[Input, ...] = ()
    """Data sets that evaluations of the pipeline measure on, so that nothing else may be trained on their rows."""
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    is_smoke: bool = False
    """Whether the stage is only tried, on its longest samples (`posttrain/smoke.py`)."""

    def input(self, role: str) -> Input:
        """The single input of `role`."""
        (only,) = self.inputs[role]
        return only

    @property
    def at(self) -> str:
        """The dotted path of this stage's config, for messages."""
        return f"stages.{self.name}"

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    @property
    def output(self) -> Path:
        """Where the output is built; it is renamed to `output/` when it is whole."""
        return self.directory / "output.partial"

    @property
    def checkpoints(self) -> Path:
        """Resumable training state, private to this stage."""
        return self.directory / "checkpoints"


@dataclass(frozen=True)
class Stage(Generic[C]):
    """One kind of work. `version` is raised when the same config gives different bytes than before."""

    kind: str
    config: type[C]
    inputs: Mapping[str, Role]
    output: ArtifactKind
    run: Callable[[StageContext[C]], dict[str, float]]
    prepare: Callable[[StageContext[C]], None] | None = None
    encoder: Callable[[C, Any, Any, str], Any] | None = None
    """What turns rows into samples, `(config, tokenizer, chat contract, config path) -> Encoder`; None if it trains on no rows."""
    parts: Callable[[], Mapping[str, type[Config]]] | None = None
    """Config classes that its config lists by name, such as the steps of a curation: what `stages` shows beside its fields."""
    reference: str | None = None
    """Role of the policy that training stays near, as it was: frozen, and held beside what is trained."""
    judges: Callable[[C, Mapping[str, Sequence[str]], str], Sequence[str]] | None = None
    """Of one that writes a verdict, `(config, name of each report to the policies in it, config path) -> policies` that nothing builds
    on once it failed. Raises `UserError` where the config names another policy."""
    version: int = 1

    @cached_property
    def summary(self) -> str:
        """The first line of the stage file's docstring."""
        return (importlib.import_module(self.run.__module__).__doc__ or "").strip().splitlines()[0]


def load_stage(kind: object, at: str) -> Stage[Any]:
    """The stage of that kind; `at` is the config path that asked for it. Raises `UserError`."""
    from stages import STAGES

    if not isinstance(kind, str) or kind not in STAGES:
        raise UserError(f"{at}: {kind!r} is no kind of stage; {nearest(str(kind), list(STAGES))}")
    stage: Stage[Any] = importlib.import_module(STAGES[kind]).STAGE
    return stage
