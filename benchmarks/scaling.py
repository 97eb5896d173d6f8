"""How preparation scales: rows a second and memory from 1,000 rows to a million, over all cores.

    python benchmarks/scaling.py [--quick] [--json FILE]

Each size is prepared in a process of its own, from a JSONL file of short rows to Arrow, as `run` does it: read, rendered,
tokenized twice at every boundary, masked, checked and counted. Memory is the unique set size (what would be free if the
process ended) of that process and of its workers, sampled while they work; cores are CPU seconds by wall seconds.
"""

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parent.parent / "posttrain" / "quickstart" / "base"
WORDS = "the a bird sky blue how many are there and why it is red green tree water house count turn list over word"
SAMPLE_EVERY_S = 0.2


def write_rows(path: Path, num_rows: int) -> None:
    """A JSONL file of short conversations, no two alike."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            question = " ".join(draw.choices(WORDS.split(), k=draw.randint(5, 20)))
            answer = " ".join(draw.choices(WORDS.split(), k=draw.randint(5, 30)))
            file.write(json.dumps({"prompt": f"{question} {number}?", "completion": answer}) + "\n")


def prepare(root: Path, data: Path, model: Path, found: Any) -> None:
    """Prepare the file under `root`, and put wall seconds, CPU seconds and the number of rows into `found`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from posttrain.config import DataSource, ModelSource
    from posttrain.data.prepared import prepare as prepare_rows
    from posttrain.models import load_tokenizer
    from posttrain.stage import Input, StageContext
    from stages.sft import SFTConfig, encoder

    config = SFTConfig(max_length=256)
    tokenizer, contract = load_tokenizer(Input("base", "policy", "", ModelSource(model=str(model))), "sft")
    context = StageContext("sft", config, {}, root, root)
    given = Input("chat", "dataset", "", DataSource(data=str(data)))
    found["started"] = time.monotonic()
    before = os.times()
    made = prepare_rows(context, given, encoder(config, tokenizer, contract, "stages.sft"))
    after = os.times()
    found["wall_s"] = time.monotonic() - found["started"]
    found["cpu_s"] = sum(after[:4]) - sum(before[:4])
    found["num_rows"] = made.num_rows


def unique_bytes(pid: int) -> int:
    """Bytes that would be free if the process ended, its children's too."""
    total = 0
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return total
    return total + sum(unique_bytes(int(child)) for child in children)


def measure(num_rows: int, model: Path) -> dict[str, float]:
    """One size, in a fresh process."""
    with tempfile.TemporaryDirectory() as directory, multiprocessing.Manager() as manager:
        root = Path(directory)
        write_rows(root / "data.jsonl", num_rows)
        found = manager.dict()
        process = multiprocessing.get_context("spawn").Process(target=prepare, args=(root, root / "data.jsonl", model, found))
        process.start()
        peak, at_start = 0, 0

        def watch() -> None:
            nonlocal peak, at_start
            while process.is_alive():
                now = unique_bytes(process.pid or 0)
                if "started" not in found:
                    at_start = now
                peak = max(peak, now)
                time.sleep(SAMPLE_EVERY_S)

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.join()
        watcher.join()
        assert process.exitcode == 0, f"preparing {num_rows} rows failed"
        wall_s = found["wall_s"]
        return {
            "num_rows": found["num_rows"],
            "wall_s": wall_s,
            "rows_per_s": found["num_rows"] / wall_s,
            "cores": found["cpu_s"] / wall_s,
            "peak_mib": peak / 2**20,
            "above_start_mib": (peak - at_start) / 2**20,
        }


def main() -> None:
    """Measure every size, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 100,000 rows")
    parser.add_argument("--model", type=Path, default=MODEL, help="directory of the tokenizer; the quickstart's by default")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    sizes = [1_000, 10_000, 100_000] + ([] if arguments.quick else [1_000_000])
    table = Table("rows", "s", "rows/s", "cores", "peak MiB", "of it by the work")
    results = []
    for size in sizes:
        found = measure(size, arguments.model)
        results.append(found)
        table.add_row(
            f"{found['num_rows']:,}",
            f"{found['wall_s']:.1f}",
            f"{found['rows_per_s']:,.0f}",
            f"{found['cores']:.2f}",
            f"{found['peak_mib']:,.0f}",
            f"{found['above_start_mib']:,.0f}",
        )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"prepare": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
