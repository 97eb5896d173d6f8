"""Held-out rows: what a stage is measured on while it trains, and by what it chooses which of its steps it publishes.

    heldout.jsonl    a line for each measurement: the loss of training, and what is logged with it, over all held-out rows
    selected.json    with `select`, the step that is published, and what all of them measured

Training is to the bit what it is without: nothing is learned from these rows, nothing is drawn at random, and they are computed in
the layout of those that are trained. The weights of the step that is best so far are kept beside the checkpoints, each of which says
which they are, and holds all that was measured until then: a run that was cut off chooses as one that was left alone.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from posttrain import disk
from posttrain.data.prepared import prepare, read_prepared
from posttrain.data.samples import Encoder
from posttrain.error import UserError
from posttrain.fit import bare_model
from posttrain.layout import Layout
from posttrain.ledger import PREFLIGHT_FILE
from posttrain.models import load_tokenizer
from posttrain.ranks import any_rank
from posttrain.saver import find_weights
from posttrain.selection import PREFIX, Selection, choose, write_selection
from posttrain.settle import exact_for
from posttrain.stage import StageContext

T = TypeVar("T")

ROLE = "heldout"
FILE = "heldout.jsonl"


def prepare_heldout(context: StageContext[Any], make_encoder: Callable[..., Encoder]) -> None:
    """Encode held-out rows as those that are trained, once these are; what is too long is left out. Runs in `prepare`.

    Adds a line to what the preflight said.
    """
    config = context.config
    for given in context.inputs.get(ROLE, ()):
        contract = {"chat_template": config.chat_template, "system_prompt": config.system_prompt}
        reader = load_tokenizer(context.input("policy"), context.at, **contract)
        held = prepare(context, given, make_encoder(config.model_copy(update={"on_overflow": "drop"}), *reader, context.at), role=ROLE)
        shared = int(np.isin(held.column("question"), read_prepared(context).column("question")).sum())
        left_out = "".join(f"; {count:,} left out: {fault}" for fault, count in held.left_out.items())
        learned = f"; warning: {shared:,} ask what rows that are trained ask, so they tell what was learned by heart" if shared else ""
        found = disk.read_json(context.directory / PREFLIGHT_FILE)
        found["summary"].append(f"{given.name}: {held.num_rows:,} rows to measure on while it trains{left_out}{learned}")
        disk.write_json(context.directory / PREFLIGHT_FILE, found)


def open_heldout(
    context: StageContext[Any], trainer: Any, measure: Callable[[], dict[str, float]] | None = None, **rows: Any
) -> "Heldout | None":
    """What measures on the held-out rows that were prepared; None where there are none.

    `rows` are those of the trainer's attributes, beside its samples, that say something of each sample; `measure` is called while
    these and the samples are the held-out ones, by default `OurOrder.measure`.
    """
    if ROLE not in context.inputs:
        return None
    prepared = read_prepared(context, ROLE)
    return Heldout(context, trainer, measure or trainer.measure, {"prepared": prepared, "samples": prepared.load(), **rows})


class Heldout:
    """Measures after the steps that are due, and keeps the weights that were best. All ranks call what it does."""

    def __init__(
        self,
        context: StageContext[Any],
        trainer: Any,
        measure: Callable[[], dict[str, float]],
        rows: Mapping[str, Any],
        at_start: bool = False,
    ) -> None:
        """`rows` are attributes that the trainer has while it measures; `at_start` is whether that is done before the first step, too."""
        self.context = context
        self.trainer = trainer
        self.measured: list[dict[str, Any]] = []
        """All measurements, by step, each with its `step`."""
        self.last_s = 0.0
        """Seconds that the last one took."""
        self._measure = measure
        self._rows = rows
        self._first_step = 0 if at_start else 1

    def is_due(self) -> bool:
        """Whether to measure now, after the last step or every so many."""
        every, step = self.context.config.eval_steps, self.trainer.state.global_step
        is_done = any(each["step"] == step for each in self.measured)
        return step >= self._first_step and not is_done and (not step or self._is_last or (every is not None and step % every == 0))

    @property
    def _is_last(self) -> bool:
        return bool(self.trainer.is_over or self.trainer.state.global_step == self.trainer.batches.num_steps)

    def measure(self) -> dict[str, float]:
        """What the policy as it is now measures, by the names under which it is logged; its weights are kept where it is the best."""
        started = time.monotonic()
        step = self.trainer.state.global_step
        with self._in_place({"layout": self._layout} if self._rows else {}):
            self.measured.append({"step": step, **self._measure()})
        self._write()
        selected = self._choose()
        if selected is not None and selected.step == step and self._is_last:
            self.trainer.saver.kept_weights = None  # they are its own
        elif selected is not None and selected.step == step:
            self.trainer.save_weights()
        self.last_s = time.monotonic() - started
        return _named(self.measured[-1])

    def of_rows(self, ask: Callable[[Sequence[int]], T]) -> Callable[[Sequence[int]], T]:
        """What says something of samples by their numbers, for the held-out ones."""

        def ask_of_rows(samples: Sequence[int]) -> T:
            with self._in_place({}):
                return ask(samples)

        return ask_of_rows

    @contextmanager
    def _in_place(self, beside: Mapping[str, Any]) -> Iterator[None]:
        """The trainer has the held-out rows in place of those that it learns from."""
        trainer, rows = self.trainer, {**self._rows, **beside}
        before = {name: getattr(trainer, name) for name in rows}
        vars(trainer).update(rows)
        try:
            yield
        finally:
            vars(trainer).update(before)

    @cached_property
    def _layout(self) -> Layout:
        """That of training, or padded rows where that is not exact for samples as long as the longest of these."""
        trainer = self.trainer
        longest = int(self._rows["prepared"].sizes("padded").longest.max())
        if longest <= trainer.longest:
            return trainer.layout  # type: ignore[no-any-return]
        with trainer.accelerator.autocast():
            return exact_for(self.context, trainer.model_wrapped, bare_model(trainer.model), [trainer.layout], longest)[0][0]

    def recall(self, measured: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what was measured until a checkpoint."""
        self.measured = [dict(each) for each in measured]
        self._write()

    def choose(self) -> dict[str, float]:
        """Put the weights in place that are published, once training has ended, and say which they are; returns what they measure."""
        context, trainer = self.context, self.trainer
        if context.config.selected_by is None:
            return _named(self.measured[-1])
        selected = self._choose()
        if selected is None:
            raise UserError(
                f"{context.at}.select: {context.config.selected_by} was a number in none of {len(self.measured)} measurements; look at the "
                f"held-out rows, or lower {context.at}.learning_rate"
            )
        trainer.saver.wait()
        any_rank(False)  # the weights of all ranks are there
        if selected.step != trainer.state.global_step:
            kept = find_weights(context, selected.step)
            if kept is None:
                raise UserError(
                    f"{context.at}: the weights of step {selected.step}, which is the best, were damaged; "
                    "run again, and it goes on from a checkpoint before it"
                )
            trainer.load_weights(kept)
        if context.is_main:
            write_selection(context.directory, selected)
            print(f"publishes {selected.words}", flush=True)
        (published,) = (each for each in self.measured if each["step"] == selected.step)
        return {"selected_step": float(selected.step), **_named(published)}

    def _choose(self) -> Selection | None:
        config = self.context.config
        if config.selected_by is None:
            return None
        return choose(self.measured, config.selected_by, config.heldout_metrics[config.selected_by])

    def _write(self) -> None:
        if self.context.is_main:
            disk.write_text(self.context.directory / FILE, "".join(json.dumps(each) + "\n" for each in self.measured))


def _named(measured: Mapping[str, Any]) -> dict[str, float]:
    return {f"{PREFIX}{name}": float(value) for name, value in measured.items() if name != "step"}
