"""How fast `near_duplicates` is, and how much it finds, on 100,000 rows of which the truth is known.

  python benchmarks/near_duplicates.py [--data ../shared/data] [--rows 100000] [--datasketch] [--json FILE]

The rows are real ones, each repeated with none, a few or many of its words changed. The truth is computed apart from the step,
in plain Python, by an exact similarity join: two sets of similarity t or more share one of their |S| - ceil(t |S|) + 1 rarest
elements (Chaudhuri et al., 2006), so comparing the sets that do finds every pair there is.

`--datasketch` runs the same search with that library's MinHash and index instead of rensa's, where it is installed.
"""

import argparse
import json
import math
import random
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from posttrain.config import DataSource
from posttrain.curate.duplicates import NearDuplicates, choose_bands, jaccard
from posttrain.curate.rows import map_texts, texts_of
from posttrain.curate.step import Bench, Candidate
from posttrain.curate.text import words
from posttrain.data.rows import Row
from posttrain.data.source import open_source
from posttrain.parallel import num_cores
from posttrain.progress import Progress
from posttrain.stage import StageConfig, StageContext

SOURCES: list[dict[str, Any]] = [
    {"data": "llamafactory_demo/alpaca_en_demo.json"},
    {"data": "gsm8k_train/train.jsonl", "columns": {"prompt": "question", "completion": "answer"}},
    {"data": "t0_p3_subset/sft.jsonl"},
]
SHARES = (0.0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3)
"""Shares of words that are changed, one drawn for each variant of a row."""
SEED = 0


def main() -> None:
    """Make the rows, run the step, compare with the truth, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of real data sets")
    parser.add_argument("--rows", type=int, default=100_000, help="rows to make of them")
    parser.add_argument("--datasketch", action="store_true", help="measure that library, too")
    parser.add_argument("--json", type=Path, help="file to write the table to")
    arguments = parser.parse_args()
    step = NearDuplicates()
    candidates = make_candidates(arguments.data, arguments.rows)
    num_words = sum(len(words("\n".join(texts_of(candidate.row)))) for candidate in candidates)
    print(f"{len(candidates):,} rows of {num_words / len(candidates):.0f} words on average, {num_cores()} cores", flush=True)

    results = [("rensa", *measure(step, candidates))]
    if arguments.datasketch:
        results.append(("datasketch", *with_datasketch(step, candidates)))
    truth, similarity = true_duplicates(candidates, step)
    table = []
    for library, found, seconds, peak_bytes in results:
        right = sum(similarity(position, match) >= step.threshold for position, match in found.items())
        table.append(
            {
                "library": library,
                "rows": len(candidates),
                "seconds": round(seconds, 1),
                "peak_gb": round(peak_bytes / 1e9, 2),
                "duplicates": len(truth),
                "found": len(found),
                "recall": len(truth & set(found)) / len(truth),
                "precision": right / len(found),
                "beyond_truth": len(set(found) - truth),
            }
        )
    print("  ".join(f"{name:>12}" for name in table[0]))
    for row in table:
        print("  ".join(f"{f'{value:.5f}' if name in ('recall', 'precision') else value:>12}" for name, value in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"cores": num_cores(), "seed": SEED, "table": table}, indent=1) + "\n")


def make_candidates(data: Path, num_rows: int) -> list[Candidate]:
    """Real rows and variants of them, in random order; the origin of each is its number."""
    sources = [DataSource(**{**fields, "data": str(data / fields["data"])}) for fields in SOURCES]
    real = [row for source in sources for row in open_source(source, "benchmark").rows()]
    rng = random.Random(SEED)
    vocabulary = sorted({word for row in real for word in words("\n".join(texts_of(row)))})
    rows = [*real[:num_rows], *(perturb(rng.choice(real), rng, vocabulary) for _ in range(num_rows - len(real)))]
    rng.shuffle(rows)
    return [Candidate(index, "benchmark", replace(row, origin=str(index))) for index, row in enumerate(rows)]


def perturb(row: Row, rng: random.Random, vocabulary: Sequence[str]) -> Row:
    """The row with a share of its words changed for others."""
    share = rng.choice(SHARES)

    def change(text: str) -> str:
        return " ".join(rng.choice(vocabulary) if rng.random() < share else word for word in text.split(" "))

    return map_texts(row, change) if share else row


def measure(step: NearDuplicates, candidates: Sequence[Candidate]) -> tuple[dict[int, int], float, int]:
    """What the step drops, each with the row that it repeats, its seconds, and its peak of memory, rows included."""
    bench = make_bench(len(candidates))
    start = time.monotonic()
    outcome = step.run(candidates, bench)
    seconds = time.monotonic() - start
    return {drop.index: int(drop.match or "") for drop in outcome.dropped}, seconds, peak_bytes()


def with_datasketch(step: NearDuplicates, candidates: Sequence[Candidate]) -> tuple[dict[int, int], float, int]:
    """The same search, with the signatures and the index of datasketch."""
    import datasketch

    num_bands, band_size = choose_bands(step.threshold)
    found: dict[int, int] = {}
    start = time.monotonic()
    shingles = step._shingle(candidates, make_bench(len(candidates)))
    index = datasketch.MinHashLSH(num_perm=num_bands * band_size, params=(num_bands, band_size))
    tokens = [[int(value) & 0xFFFFFFFF for value in array] for array in shingles]
    signatures = datasketch.MinHash.generator(tokens, num_perm=num_bands * band_size, seed=1, hashfunc=lambda value: value)
    for position, signature in enumerate(signatures):
        mine = shingles[position]
        near = [(jaccard(mine, shingles[other]), -other) for other in index.query(signature)]
        best = max(near, default=(0.0, 0))
        if best[0] >= step.threshold:
            found[position] = -best[1]
        else:
            index.insert(position, signature)
    return found, time.monotonic() - start, peak_bytes()


def true_duplicates(candidates: Sequence[Candidate], step: NearDuplicates) -> tuple[set[int], Any]:
    """The rows that are alike to one kept before them, every pair considered; and the similarity of two rows."""
    ids: dict[str, int] = {}
    sets: list[frozenset[int]] = []
    for candidate in candidates:
        sequence = words("\n".join(texts_of(candidate.row)))
        ngrams = {" ".join(sequence[i : i + step.ngram]) for i in range(max(1, len(sequence) - step.ngram + 1))} if sequence else set()
        sets.append(frozenset(ids.setdefault(ngram, len(ids)) for ngram in ngrams))
    counts = Counter(element for elements in sets for element in elements)

    def similarity(a: int, b: int) -> float:
        common = len(sets[a] & sets[b])
        return common / (len(sets[a]) + len(sets[b]) - common)

    duplicates: set[int] = set()
    kept_with: dict[int, list[int]] = defaultdict(list)
    for position, elements in enumerate(sets):
        rarest = sorted(elements, key=lambda element: (counts[element], element))
        prefix = rarest[: len(elements) - math.ceil(step.threshold * len(elements)) + 1] if elements else []
        others = {other for element in prefix for other in kept_with[element]}
        if any(similarity(position, other) >= step.threshold for other in others):
            duplicates.add(position)
        else:
            for element in prefix:
                kept_with[element].append(position)
    return duplicates, similarity


def make_bench(num_rows: int) -> Bench:
    """What the step works with, outside of a run."""
    nowhere = Path("/nowhere")
    progress = Progress(nowhere, is_main=False)
    progress.phase("near_duplicates", num_rows)
    return Bench(StageContext("curate", StageConfig(), {}, nowhere, nowhere), SEED, progress, nowhere)


def peak_bytes() -> int:
    """The most memory that this process, or one of its children, has held."""
    scale = 1 if sys.platform == "darwin" else 1024
    return scale * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


if __name__ == "__main__":
    main()
