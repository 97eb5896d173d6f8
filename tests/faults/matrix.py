"""A stage that is cut off on some ranks goes on on others: `python -m tests.faults.matrix` shows by how much its losses differ.

For each way to train, the stage is run whole, and killed after a checkpoint. The killed one is resumed in each other way, and
the loss of every step held against the whole run's. Same ranks and same sharding: not a bit may differ. Other ones: fp32 sums
are added up in another order, so by rounding.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Literal

from tests.conftest import make_tiny, write_chat, write_pairs
from tests.faults.harness import Chain, started

Kind = Literal["sft", "dpo", "reward", "orpo", "kto", "select"]
Weights = Literal["full", "lora", "lora with dropout"]
ADAPTERS: dict[Weights, str | None] = {"full": None, "lora": "{r: 4}", "lora with dropout": "{r: 4, lora_dropout: 0.2}"}
NUM_STEPS = 12
SAVE_STEPS = 3
ROUNDING = 1e-5
"""Relative difference of losses that another order of sums may make, in fp32."""


@dataclass(frozen=True)
class Way:
    """How a stage is spread out: the stage of ZeRO, 0 for none, and the number of ranks."""

    zero: int
    ranks: int

    def __str__(self) -> str:
        return f"{f'ZeRO-{self.zero}' if self.zero else 'plain'} x{self.ranks}"


@dataclass(frozen=True)
class Cell:
    """What is trained how, cut off in one way, and resumed in another."""

    kind: Kind
    weights: Weights
    before: Way
    after: Way

    def __str__(self) -> str:
        return f"{self.kind}, {self.weights}, {self.before} -> {self.after}"


@dataclass(frozen=True)
class Compared:
    """How far the resumed stage is from the whole one."""

    resumed_from: int
    largest: float
    """Relative difference of the loss of a step, over all steps."""
    mean: float
    same_bytes: bool
    """Whether all that was published, and all that was logged, is the same."""


def is_right(cell: Cell, compared: Compared) -> bool:
    """Whether the difference is no more than it may be."""
    return compared.same_bytes and compared.largest == 0 if cell.before == cell.after else compared.largest < ROUNDING


RANKS = ((2, 2), (2, 1), (1, 2), (2, 4))
CELLS = [
    Cell(kind, weights, Way(zero, before), Way(zero, after))
    for zero, weights, kind, (before, after) in product((0, 1, 2, 3), ("full", "lora"), ("sft", "dpo"), RANKS)
]
"""All ways to train, each on as many ranks as before, on fewer, and on more."""
RESHARDED = [
    Cell(kind, "full", before, after)
    for kind, (before, after) in product(
        ("sft", "dpo"), ((Way(2, 2), Way(0, 2)), (Way(3, 2), Way(1, 2)), (Way(0, 1), Way(3, 2)), (Way(3, 2), Way(0, 1)))
    )
]
"""With another stage of ZeRO, or none."""
ALIGNED = [
    Cell(kind, weights, Way(zero, before), Way(zero, after))
    for kind, zero, weights, (before, after) in product(("reward", "orpo", "kto"), (0, 3), ("full", "lora"), ((2, 2), (2, 1)))
]
"""The other stages that train, which share all of this with those above."""
SELECTING = [
    Cell("select", weights, Way(zero, before), Way(zero, after))
    for zero, weights, (before, after) in product((0, 1, 2, 3), ("full", "lora"), ((2, 2), (2, 1)))
]
"""SFT that publishes the best of its steps."""
DRAWING = [Cell(kind, "lora with dropout", Way(zero, 2), Way(zero, 2)) for kind, zero in product(("sft", "dpo"), (0, 2, 3))]
"""With random numbers that each rank has to go on drawing where it was."""


@dataclass(frozen=True)
class Matrix:
    """The runs below `here`; each is made once, however many cells ask for it."""

    here: Path

    def compare(self, cell: Cell) -> Compared:
        """Cut off, resume, and compare."""
        whole = self._whole(cell.kind, cell.weights, cell.before)
        cut = self._cut(cell.kind, cell.weights, cell.before)
        resumed = self._chain(cell.kind, cell.weights, cell.after, f"resumed {cell}")
        shutil.copytree(cut.root, resumed.root)
        resumed.finish(self.here / "log")
        expected, got = whole.outcome(), resumed.outcome()
        steps = [line["step"] for line in got.logged[cell.kind]]
        assert steps == list(range(1, NUM_STEPS + 1)), f"{cell}: logged the steps {steps}"
        pairs = zip(expected.logged[cell.kind], got.logged[cell.kind], strict=True)
        apart = [abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in pairs]
        return Compared(max(cut.checkpoints(cell.kind)), max(apart), sum(apart) / len(apart), not got.differences(expected))

    def _whole(self, kind: Kind, weights: Weights, way: Way) -> Chain:
        chain = self._chain(kind, weights, way, f"whole {kind} {weights} {way}")
        if not chain.root.exists():
            chain.finish(self.here / "log")
        return chain

    def _cut(self, kind: Kind, weights: Weights, way: Way) -> Chain:
        """Killed after its first checkpoint, and before its end."""
        chain = self._chain(kind, weights, way, f"cut {kind} {weights} {way}")
        if not chain.root.exists():
            with started(chain.command, self.here / "log") as driver:
                driver.meet(lambda: bool(chain.checkpoints(kind)), "a checkpoint was to be there")
                driver.signal(signal.SIGKILL, whole_group=True)
                driver.ended()
            assert max(chain.checkpoints(kind)) < NUM_STEPS, "it was to be killed earlier"
        return chain

    def _chain(self, kind: Kind, weights: Weights, way: Way, name: str) -> Chain:
        overrides = [f"stages.{kind}.num_processes={way.ranks}"]
        if way.zero:
            overrides.append(f"stages.{kind}.deepspeed=ds_configs/zero{way.zero}.json")
        if adapter := ADAPTERS[weights]:
            overrides.append(f"stages.{kind}.lora={adapter}")
        root = self.here / name.replace(" ", "_").replace(",", "").replace(">", "")
        return Chain(self._files[kind], root, tuple(overrides))

    @cached_property
    def _files(self) -> dict[str, Path]:
        """A pipeline file for each kind."""
        make_tiny(self.here / "tiny")
        chat, pairs = write_chat(self.here / "chat.jsonl", 32), write_pairs(self.here / "pairs.jsonl", 24)
        data: dict[Kind, Path] = {"sft": chat, "dpo": pairs, "reward": pairs, "orpo": pairs, "kto": pairs, "select": chat}
        for kind, rows in data.items():
            inputs, rate = "policy: base, data: rows", "learning_rate: 1e-3"
            if kind == "select":
                # So fast that the last step is not the best.
                inputs, rate = f"{inputs}, heldout: rows", "kind: sft, learning_rate: 5e-2, eval_steps: 2, select: best by heldout/nll"
            (self.here / f"{kind}.yaml").write_text(f"""
run: r
sources: {{base: {{model: {self.here}/tiny}}, rows: {{data: {rows}}}}}
stages:
  {kind}: {{inputs: {{{inputs}}}, {rate}, global_batch_size: 8, micro_batch_tokens: 1,
         max_length: 128, max_steps: {NUM_STEPS}, save_steps: {SAVE_STEPS}}}
""")
        return {kind: self.here / f"{kind}.yaml" for kind in data}


def show(found: Sequence[tuple[Cell, Compared]]) -> list[str]:
    """A line for each cell."""
    lines = [f"{'cell':<56} {'from step':>9} {'largest':>9} {'mean':>9}   "]
    for cell, compared in found:
        said = "same bytes" if compared.same_bytes else "rounding" if is_right(cell, compared) else ""
        said += "" if is_right(cell, compared) else " WRONG"
        lines.append(f"{cell!s:<56} {compared.resumed_from:>9} {compared.largest:>9.2g} {compared.mean:>9.2g}   {said.strip()}")
    return lines


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.matrix", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="only cells whose name holds all of these, such as ZeRO-3")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    given = parser.parse_args()
    here = Path(tempfile.mkdtemp(prefix="matrix-"))
    matrix = Matrix(here)
    found = []
    for cell in [cell for cell in [*CELLS, *RESHARDED, *ALIGNED, *SELECTING, *DRAWING] if all(word in str(cell) for word in given.words)]:
        found.append((cell, matrix.compare(cell)))
        print(show(found)[-1], file=sys.stderr, flush=True)
    right = sum(is_right(cell, compared) for cell, compared in found)
    if given.json:
        print(json.dumps([{**asdict(cell), **asdict(compared), "right": is_right(cell, compared)} for cell, compared in found], indent=1))
    else:
        print("\n".join([*show(found), f"right: {right} of {len(found)}"]))
    if right < len(found):
        print(f"the runs are in {here}", file=sys.stderr)
        return 1
    shutil.rmtree(here)
    return 0


if __name__ == "__main__":
    sys.exit(main())
