"""Curate: from many rows to a few good ones, step by step, with an account of every row.

Each listed step is given the rows that the one before it kept, and keeps, mends or drops each of them, for a reason that
is written down. A row that does not fit its format is dropped, and accounted for, like any other.

Reads: data (one or more data sets, all of conversations or all of preference pairs); and what single steps ask for:
decontaminate (data sets that must not be learned from), policy, reward (a reward model).  Writes: dataset.
A step's outcome is saved when it is done, so a stage that was cut off goes on with the step that it was at.
"""

from typing import Any, ClassVar

from pydantic import SerializationInfo, field_serializer, field_validator

from posttrain.curate.steps import Listed, check_inputs, identify_steps, list_steps, parse_steps, step_classes
from posttrain.error import UserError, heed_signals
from posttrain.stage import Role, Stage, StageConfig, StageContext

CHEAP_STEPS: list[Listed] = [
    "normalize", "exact_duplicates", "length", "refusals", "boilerplate", "placeholders", "markup", "near_duplicates",
]  # fmt: skip


class CurateConfig(StageConfig):
    """Which steps, in which order."""

    bears_identity: ClassVar[bool] = True

    seed: int = 0
    """Seed of all that a step draws at random."""
    steps: list[Listed] = CHEAP_STEPS
    """Steps in order: each a name, or a name with settings, such as `{length: {max_answer_words: 500}}`."""

    @field_validator("steps", mode="plain")
    @classmethod
    def _shortest(cls, listed: Any) -> Any:
        try:
            return list_steps(parse_steps(listed, "steps"))
        except UserError:
            return listed  # `check` refuses it, with the whole path

    @field_serializer("steps")
    def _identify(self, listed: list[Listed], info: SerializationInfo) -> list[Listed]:
        # Without defaults it is asked for to be fingerprinted.
        return identify_steps(parse_steps(listed, "steps"), "steps") if info.exclude_defaults else listed

    def check(self, num_processes: int, at: str) -> None:
        """Refuse what is no list of steps, or a step that is set wrongly."""
        identify_steps(parse_steps(self.steps, f"{at}.steps"), f"{at}.steps")


def prepare(context: StageContext[CurateConfig]) -> None:
    """Check that every step has what it needs and every data set can be read; nothing is curated yet."""
    from posttrain.curate.intake import open_sources

    steps = parse_steps(context.config.steps, f"{context.at}.steps")
    check_inputs(steps, list(context.inputs), context.at)
    for position, step in enumerate(steps):
        step.check(f"{context.at}.steps[{position}].{step.name}")
    open_sources(context)


def run(context: StageContext[CurateConfig]) -> dict[str, float]:
    """Read, take step after step, and write; every rank decides the same, the main one writes."""
    from posttrain.curate.account import Account
    from posttrain.curate.intake import read_rows
    from posttrain.curate.saved import StopInOrder, forget_if_idle, forget_outcomes, load_outcome, save_outcome, save_start
    from posttrain.curate.step import Bench

    progress = StopInOrder(context.directory, is_main=context.is_main)
    steps = parse_steps(context.config.steps, f"{context.at}.steps")
    with heed_signals(progress.note_signal), forget_if_idle(context):
        account = Account(read_rows(context, progress))
        save_start(context)
        for number, step in enumerate(steps, 1):
            outcome = load_outcome(context, number, account.candidates)
            if outcome is None:
                progress.phase(f"{step.name} ({number} of {len(steps)})", len(account.candidates))
                bench = Bench(context, context.config.seed, progress, context.checkpoints / f"measured-{number}")
                outcome = save_outcome(context, number, account.candidates, step.run(account.candidates, bench))
                progress.stop_if_asked()
            account.settle(step, outcome)
            if not account.candidates:
                forget_outcomes(context)
                raise UserError(f"{context.at}.steps: {account.why_empty()}")
        progress.phase("write")
        if context.is_main:
            account.write(context.output, context.config.seed)
    return account.metrics()


STAGE = Stage(
    kind="curate",
    config=CurateConfig,
    inputs={
        "data": Role("dataset", many=True),
        "decontaminate": Role("dataset", many=True, optional=True),
        "policy": Role("policy", optional=True),
        "reward": Role("reward_model", optional=True),
    },
    output="dataset",
    prepare=prepare,
    run=run,
    parts=step_classes,
)
