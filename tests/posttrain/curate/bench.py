"""What the tests of curation steps share: rows in a line, and one step applied to them."""

from collections.abc import Sequence
from pathlib import Path

from posttrain.curate.step import Bench, Candidate, Outcome, Step
from posttrain.data.rows import Conversation, Pair, Row
from posttrain.progress import Progress
from posttrain.stage import StageConfig, StageContext


def chat(answer: str, prompt: str = "Tell me about it.", origin: str = "x.jsonl:1") -> Conversation:
    """A question and its answer."""
    return Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], None, [], origin)


def pair(chosen: str, rejected: str, prompt: str = "Tell me about it.", origin: str = "x.jsonl:1") -> Pair:
    """A question with two answers."""
    said = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return Pair([{"role": "user", "content": prompt}], said[0], said[1], None, origin)  # type: ignore[arg-type]


def candidates_of(rows: Sequence[Row]) -> list[Candidate]:
    """The rows as candidates, with numbers that are not their positions."""
    return [Candidate(10 + 2 * position, "source", row) for position, row in enumerate(rows)]


def apply(step: Step, rows: Sequence[Row], seed: int = 0) -> Outcome:
    """What the step decides about the rows."""
    nowhere = Path("/nowhere")
    context = StageContext("curate", StageConfig(), {}, nowhere, nowhere)
    progress = Progress(nowhere, is_main=False)
    progress.phase(step.name, len(rows))
    return step.run(candidates_of(rows), Bench(context, seed, progress, nowhere))


def dropped(step: Step, rows: Sequence[Row]) -> dict[int, str]:
    """Position of each dropped row to the reason."""
    return {(drop.index - 10) // 2: drop.reason for drop in apply(step, rows).dropped}
