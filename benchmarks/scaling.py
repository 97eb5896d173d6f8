"""How preparation scales with rows, and training with the length of sequences and with ranks.

    python benchmarks/scaling.py [--quick] [--only prepare|length|ranks] [--train-model DIR] [--json FILE]

Preparation: rows a second and memory from 1,000 rows to a million, over all cores. Each size is prepared in a process of its
own, from a JSONL file of short rows to Arrow, as `run` does it: read, rendered, tokenized twice at every boundary, masked,
checked and counted. Memory is the unique set size (what would be free if the process ended) of that process and of its
workers, sampled while they work; cores are CPU seconds by wall seconds.

Length: seconds of a step of SFT, by `posttrain run`, on one sequence of 256 to 4,096 tokens, and the operations that it needs.
Ranks: supervised tokens a second of one rank with a thread for each core, and of a rank for each core with one thread.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from measured import read_shape, write_lines
from peers import GLOBAL_BATCH_SIZE, MAX_LENGTH, SHARED, Bench, Contender, choose, make_model, read_examples, run_ours, workspace

from posttrain.config import DataSource

MODEL = Path(__file__).parent.parent / "posttrain" / "quickstart" / "base"
WORDS = "the a bird sky blue how many are there and why it is red green tree water house count turn list over word"
SAMPLE_EVERY_S = 0.2
LENGTHS = (256, 512, 1024, 2048, 4096)
STEPS = 4


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

    config = SFTConfig.model_validate({"max_length": 256})
    tokenizer, contract = load_tokenizer(Input("base", "policy", "", ModelSource(model=str(model))), "sft")
    context = StageContext("sft", config, {}, root, root)
    given = Input("chat", "dataset", "", DataSource.model_validate({"data": str(data)}))
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


def by_length(directory: Path, model: Path, lengths: list[int]) -> list[dict[str, float]]:
    """Seconds and operations of a step on one sequence, by its length; the first step, in which much is done once, is not counted."""
    rows, results = directory / "words.jsonl", []
    source = DataSource.model_validate({"data": str(rows)})
    shape = read_shape(model)
    for length in lengths:
        write_lines(rows, [{"prompt": "?", "completion": "word"}, {"prompt": "?", "completion": "word word"}])
        one, two = (example.num_tokens for example in read_examples("sft", [source], model, 2 * length)[0])
        num_words = 1 + (length - one) // (two - one)
        write_lines(rows, [{"prompt": "?", "completion": " ".join(["word"] * num_words)}] * STEPS)
        examples, _ = read_examples("sft", [source], model, 2 * length)
        bench = Bench("sft", directory, model, examples, STEPS, 2 * length, 2e-5, {"global_batch_size": 1}, None)
        (directory / str(length)).mkdir()
        run = run_ours(bench, Contender("ours", "ours", "fp32"), directory / str(length))
        flops = 3 * examples[0].forward_flops(shape, conventional=False, has_head=True)
        seconds = statistics.median(run.step_s[1:])
        results.append({"num_tokens": examples[0].num_tokens, "step_s": seconds, "flops": flops, "flops_per_s": flops / seconds})
    return results


def by_ranks(directory: Path, model: Path, data: Path, num_runs: int) -> list[dict[str, Any]]:
    """Supervised tokens a second on one rank and on as many as there are cores; runs taken in turn."""
    source = DataSource.model_validate({"data": str(data / "llamafactory_demo" / "alpaca_en_demo.json")})
    found, left_out = read_examples("sft", [source], model, MAX_LENGTH["sft"])
    examples = choose(found, STEPS * GLOBAL_BATCH_SIZE, str(dict(left_out)))
    bench = Bench("sft", directory, model, examples, STEPS, MAX_LENGTH["sft"], 2e-5, {}, None)
    cores = len(os.sched_getaffinity(0))
    seconds: dict[int, list[float]] = {1: [], cores: []}
    for number in range(num_runs):
        for num_ranks in seconds:
            place = directory / f"{num_ranks}_ranks_{number}"
            place.mkdir()
            run = run_ours(bench, Contender("ours", "ours", "fp32", {"num_processes": num_ranks}), place)
            seconds[num_ranks].append(run.train_s)
    trained = bench.total(lambda example: example.num_trained)
    return [
        {"num_ranks": ranks, "threads": cores // ranks, "trained_tokens_per_s": trained / statistics.median(took), "runs_s": took}
        for ranks, took in seconds.items()
    ]


def show_prepare(sizes: list[int], model: Path) -> list[dict[str, float]]:
    """Measure and print how preparation scales."""
    from rich.console import Console
    from rich.table import Table

    table = Table("rows", "s", "rows/s", "cores", "peak MiB", "of it by the work")
    results = []
    for size in sizes:
        found = measure(size, model)
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
    return results


def show_length(lengths: list[int], directory: Path, model: Path) -> list[dict[str, float]]:
    """Measure and print how a step scales with the length of its sequence."""
    from rich.console import Console
    from rich.table import Table

    results = by_length(directory, model, lengths)
    first = results[0]
    table = Table("tokens", "s", "GFLOP/s", "seconds, to the first", "operations, to the first")
    for row in results:
        growth = (f"{row[name] / first[name]:.2f}" for name in ("step_s", "flops"))
        table.add_row(f"{row['num_tokens']:,}", f"{row['step_s']:.2f}", f"{row['flops_per_s'] / 1e9:,.0f}", *growth)
    Console().print(table)
    return results


def show_ranks(directory: Path, model: Path, data: Path, num_runs: int) -> list[dict[str, Any]]:
    """Measure and print how training scales with ranks."""
    from rich.console import Console
    from rich.table import Table

    results = by_ranks(directory, model, data, num_runs)
    table = Table("ranks", "threads of each", "supervised tokens/s", "to one rank")
    for row in results:
        speed = row["trained_tokens_per_s"]
        table.add_row(str(row["num_ranks"]), str(row["threads"]), f"{speed:,.1f}", f"{speed / results[0]['trained_tokens_per_s']:.2f}")
    Console().print(table)
    return results


def main() -> None:
    """Measure what is asked for, print a table of each, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 100,000 rows, up to 1,024 tokens, one run of each number of ranks")
    parser.add_argument("--only", choices=("prepare", "length", "ranks"), action="append", help="only this part; repeatable")
    parser.add_argument("--model", type=Path, default=MODEL, help="directory of the tokenizer to prepare with; the quickstart's by default")
    parser.add_argument("--train-model", type=Path, default=SHARED / "models" / "smollm2", help="model to train; without weights, random")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder of real data sets")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    parts = arguments.only or ["prepare", "length", "ranks"]
    figures: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    if "prepare" in parts:
        figures["prepare"] = show_prepare([1_000, 10_000, 100_000] + ([] if arguments.quick else [1_000_000]), arguments.model)
    with workspace() as directory:
        if {"length", "ranks"} & set(parts):
            model = make_model(arguments.train_model, directory)
        if "length" in parts:
            figures["length"] = show_length([length for length in LENGTHS if not arguments.quick or length <= 1024], directory, model)
        if "ranks" in parts:
            figures["ranks"] = show_ranks(directory, model, arguments.data, 1 if arguments.quick else 3)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
