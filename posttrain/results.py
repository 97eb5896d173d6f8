"""Results: all that an evaluation found, one line for each policy, row and measure, as a Parquet file beside its table.

  import datasets; datasets.load_dataset("parquet", data_files="runs/r/eval/output/rows.parquet")

What a measure does not say is null. Everything else that speaks of an evaluation (its table, gates, the report) is drawn from these.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "rows.parquet"
ROWS_AT_ONCE = 4096


def schema() -> "pa.Schema":
    """The columns. `policy`, `row`, `origin` and `measure` are of every line."""
    import pyarrow as pa

    settings = {
        "engine": pa.string(),  # what generated, with its version
        "weights": pa.string(),  # hash of what the model is
        "contract": pa.string(),  # hash of the chat contract: the template, and where an answer ends
        "stop_tokens": pa.list_(pa.string()),
        "max_new_tokens": pa.int64(),
        "is_greedy": pa.bool_(),
    }
    columns = {
        "policy": pa.string(),
        "row": pa.int64(),  # its number among all rows of the data sets, from 0
        "origin": pa.string(),  # its place, such as heldout.jsonl:12
        "measure": pa.string(),
        "turn": pa.int32(),  # which of the answers to the row, from 1
        "score": pa.float64(),
        "weight": pa.float64(),
        # Of what is scored: the log-probability in nats, and how many tokens and bytes it is of.
        "logp": pa.float64(),
        "num_tokens": pa.int64(),  # of an answer, without its stop token
        "num_bytes": pa.int64(),
        # Of the tokens of a conversation, by bin of how likely the likeliest token was (`posttrain.metrics.calibration`).
        "bin_tokens": pa.list_(pa.int64()),
        "bin_confidence": pa.list_(pa.float64()),  # the sum of that
        "bin_right": pa.list_(pa.int64()),  # how many were that token
        # Of what is generated.
        "answer": pa.string(),
        "ended": pa.bool_(),  # whether it came to a stop token
        "repetition": pa.float64(),
        "has_drifted": pa.bool_(),  # into another language; null where that cannot be told
        "checks": pa.list_(pa.string()),  # as JSON
        "verdicts": pa.list_(pa.float64()),  # of each check 1 or 0; of a duel, of the judge's both verdicts
        "loose_verdicts": pa.list_(pa.float64()),  # as verdicts, with instructions taken loosely
        "settings": pa.struct(list(settings.items())),
        # Of a duel with the first policy.
        "baseline": pa.string(),  # what that answered
        "outcome": pa.float64(),  # 1 won, 1/2 tied, 0 lost
        "replies": pa.list_(pa.string()),  # of the judge
        "rewards": pa.list_(pa.float64()),
    }
    return pa.schema(list(columns.items()))


def write_results(output: Path, results: Iterable[Mapping[str, Any]]) -> None:
    """Write them into the directory of a report. A field that is no column is a mistake of the measure, and raises `ValueError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns, lines = schema(), list(results)
    if unknown := {name for line in lines for name in line} - set(columns.names):
        raise ValueError(f"results have fields that are no columns of {FILE}: {', '.join(sorted(unknown))}")
    pq.write_table(pa.Table.from_pylist(_in_utf8(lines), schema=columns), output / FILE, compression="zstd")


def _in_utf8(value: Any) -> Any:
    """The same, with half of a surrogate pair written out: a judge may say one, in JSON, and Parquet has none."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {name: _in_utf8(each) for name, each in value.items()}
    return [_in_utf8(each) for each in value] if isinstance(value, list) else value


def read_results(output: Path) -> Iterator[dict[str, Any]]:
    """The results in the directory of a report, in the order in which they were written; what is null is left out.

    Raises `OSError` or `ValueError` where there are none, or they are damaged.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(output / FILE) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE):
            for line in batch.to_pylist():
                yield {name: value for name, value in line.items() if value is not None}
