"""What a step of curation is: a config class with one method, from candidates to those kept and those dropped, and why.

A step is a pure function of its candidates, its settings and the seed: run again, or on another machine, it decides the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from posttrain.config import Config
from posttrain.data.rows import Row

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from posttrain.progress import Progress
    from posttrain.stage import StageContext

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row under consideration."""

    index: int
    """Its number among all rows read, over all data sets in order; the same in every step."""
    source: str
    """Name of the data set in the pipeline file."""
    row: Row


@dataclass(frozen=True, slots=True)
class Drop:
    """A candidate that a step leaves out."""

    index: int
    reason: str
    """Short, and the same for all that are dropped for it, such as `near duplicate`: reasons are counted."""
    detail: str = ""
    """What in this very row: the words found, the score, the length."""
    match: str | None = None
    """Origin of the row that it repeats."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step decided. Every candidate is kept, changed or not, or dropped; the kept ones stay in order."""

    kept: list[Candidate]
    dropped: list[Drop] = field(default_factory=list)
    changes: Mapping[str, int] = field(default_factory=dict)
    """What was mended or masked, and in how many rows."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further figures for the report: plain JSON."""


class Step(Config):
    """One step, with its settings; `run` is its work. The first line of its docstring is its help."""

    name: ClassVar[str]
    """What the config calls it."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Optional inputs of the stage that it cannot do without, such as `policy`; checked before anything runs."""

    def check(self, at: str) -> None:
        """Raise `UserError`, beginning with `at`, where a library or a setting is missing. Loads no model."""

    def run(self, candidates: Sequence[Candidate], bench: "Bench") -> Outcome:
        """Decide about every candidate."""
        raise NotImplementedError


@dataclass(frozen=True)
class Bench:
    """What steps work with: the stage, a seed, and measurements that survive a restart."""

    context: "StageContext[Any]"
    seed: int
    progress: "Progress"
    directory: Path
    """Where the measurements of the running step are kept, under the stage's checkpoints."""

    def measure(
        self, name: str, items: Sequence[T], compute: Callable[[Sequence[T]], "npt.NDArray[np.float32]"], *, chunk_size: int
    ) -> "npt.NDArray[np.float32]":
        """`compute` of all items, of which there must be one, chunk by chunk, `(len(items), ...)`: slow passes of a model over rows.

        Each chunk is on disk as soon as it is done, so a stage that is started again computes only what is missing. Ranks
        share the chunks; every rank gets all. `name` tells the measurements of one step apart.
        """
        import numpy as np

        from posttrain import disk
        from posttrain.parallel import chunks

        assert items, "the stage ends where no candidate is left"
        files = []
        for number, chunk in enumerate(chunks(items, chunk_size)):
            file = self.directory / name / f"{number:06d}.npy"
            files.append(file)
            if number % self.context.world_size != self.context.rank or file.is_file():
                continue
            disk.write_array(file, compute(chunk))
            self.progress.step(min(len(items), (number + 1) * chunk_size))
        self._wait()
        return np.concatenate([np.load(file) for file in files])

    def _wait(self) -> None:
        """Until all ranks have written their chunks."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.barrier()
