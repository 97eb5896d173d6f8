"""The words that ranks leave on the shared disk when they fail."""

from pathlib import Path
from typing import Any

from posttrain import disk
from posttrain.error import UserError
from posttrain.heartbeat import Lookout
from posttrain.ledger import Attempt
from posttrain.worker import ERROR_FILE


def first_words(directory: Path, attempt: Attempt) -> tuple[int, dict[str, Any]] | None:
    """The rank that was the first to leave word of why it failed, on whatever machine, and its word. What comes after is most often only
    that others lost it."""
    paths = {rank: attempt.logs(directory) / ERROR_FILE.format(rank=rank) for rank in range(attempt.num_processes)}
    records = {rank: record for rank, path in paths.items() if (record := disk.read_json(path))}
    return min(records.items(), key=lambda entry: entry[1]["time"], default=None)


def raise_words(directory: Path, attempt: Attempt, lookout: Lookout | None = None) -> None:
    """Raise that word, as a launcher does, with what `lookout` has found; nothing where there is none."""
    if first := first_words(directory, attempt):
        rank, record = first
        if record["kind"] == "user":
            raise UserError(record["message"])
        raise (lookout or Lookout(directory, attempt, attempt.num_processes)).died(rank, f"rank {rank}: {record['message']}")
