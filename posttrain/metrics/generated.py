"""What any generated answer shows, whatever was asked: its length, whether it stops, and whether it goes round.

  repetition   of an answer's runs of four tokens the share that were there before in it        looping   at least half of them

Holtzman et al. (2020) found that likely text repeats itself; greedy answers are where it shows. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

RUN_TOKENS = 4
LOOPING = 0.5
"""An answer loops from this repetition on."""


def repetition(ids: Sequence[int]) -> float:
    """Share of the runs of four tokens that were there before; 0 where there is none."""
    runs = [tuple(ids[start : start + RUN_TOKENS]) for start in range(len(ids) - RUN_TOKENS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def is_looping(share: float) -> bool:
    """Whether an answer of that repetition goes round."""
    return share >= LOOPING


def was_asked(answer: Mapping[str, Any]) -> bool:
    """Whether a policy was asked for this answer, a result by row, or the conversation broke off before."""
    return bool(answer["ended"] or answer["num_tokens"])
