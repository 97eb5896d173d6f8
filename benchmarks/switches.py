"""What each technique of the training core contributes: steps of one loop in one process, with one thing changed at a time.

  python benchmarks/switches.py [--task sft|dpo] [--bf16] [--steps N] [--runs N] [--only NAME] [--model DIR] [--data DIR] [--json FILE]

Each row is a process of its own that trains on the same global batches of 8, with the parts of `posttrain/` that a stage trains with:
seconds of a step (the median of those after the first two), of the first step, tokens a second, CPU seconds of user and system, and
the most that was resident. Rows are run in turn; with several runs a figure is their median. An allocator that is not installed is
left out (Debian: libjemalloc2, libtcmalloc-minimal4).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peers import GLOBAL_BATCH_SIZE, MAX_LENGTH, SHARED, choose, make_model, pair_sources, read_examples, workspace

from posttrain.config import DataSource
from posttrain.launch.local import LIBRARIES
from posttrain.parallel import num_cores

ALLOCATORS = {"jemalloc": "libjemalloc.so.2", "tcmalloc": "libtcmalloc_minimal.so.4"}
WARM_UP = 2
"""Steps in which memory is touched for the first time."""
ALWAYS: dict[str, dict[str, Any]] = {
    "as ours": {},
    "rows padded": {"layout": "padded"},
    "half as many tokens at once": {"tokens": 0.5},
    "twice as many tokens at once": {"tokens": 2.0},
    "logits of all positions": {"is_plain": True},
    "activations computed again": {"recompute": True},
    "AdamW not fused": {"fused": False},
    "memory given back": {"keeps": False},
    "jemalloc": {"allocator": "jemalloc", "keeps": False},
    "tcmalloc": {"allocator": "tcmalloc", "keeps": False},
    "threads wait passively": {"env": {"OMP_WAIT_POLICY": "PASSIVE"}},
    "one thread": {"threads": 1},
}
IN_BF16: dict[str, dict[str, Any]] = {
    "attention by the library's kernel": {"is_kernel": True},
    "weights cast for each micro-batch": {"casts_once": False},
}


def main() -> None:
    """Run every row in turn, print the table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("sft", "dpo"), default="sft")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--only", action="append", metavar="NAME", help="only this row, and `as ours`; repeatable")
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "smollm2", help="model; without weights, random ones are made")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder of real data sets")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(train(**json.loads(arguments.child))))
        return
    rows = ALWAYS | (IN_BF16 if arguments.bf16 else {})
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rows if not arguments.only or name in ("as ours", *arguments.only)}
    with workspace() as directory:
        model = make_model(arguments.model, directory)
        alpaca = DataSource.model_validate({"data": str(arguments.data / "llamafactory_demo" / "alpaca_en_demo.json")})
        sources = [alpaca] if arguments.task == "sft" else pair_sources(arguments.data)
        examples = choose(
            read_examples(arguments.task, sources, model, MAX_LENGTH[arguments.task])[0], arguments.steps * GLOBAL_BATCH_SIZE, "too long"
        )
        samples = directory / "samples.json"
        samples.write_text(json.dumps([example.columns for example in examples]), encoding="utf-8")
        for _ in range(arguments.runs):
            for name in [*found]:
                settings = dict(rows[name])
                env = {**os.environ, **LIBRARIES, **settings.pop("env", {})}
                if library := ALLOCATORS.get(settings.pop("allocator", "")):
                    path = next(Path("/usr/lib").glob(f"*/{library}"), None)
                    if path is None:
                        found.pop(name)
                        continue
                    env["LD_PRELOAD"] = str(path)
                child = {"model": str(model), "samples": str(samples), "bf16": arguments.bf16, **settings}
                command = [sys.executable, __file__, "--child", json.dumps(child)]
                ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
                if ended.returncode:
                    raise SystemExit(f"{name}: {ended.stderr[-2000:]}")
                found[name].append(json.loads(ended.stdout.splitlines()[-1]))
                print(f"{name}: {found[name][-1]['step_s']:.2f} s a step", flush=True)
    figures = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    print_figures(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps({"task": arguments.task, "bf16": arguments.bf16, "rows": figures}, indent=1) + "\n")


def train(
    model: str,
    samples: str,
    *,
    bf16: bool,
    layout: str = "",
    tokens: float = 1.0,
    is_plain: bool = False,
    recompute: bool = False,
    fused: bool = True,
    keeps: bool = True,
    threads: int = 0,
    is_kernel: bool = False,
    casts_once: bool = True,
) -> dict[str, float]:
    """Take the steps, and say what they took."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from posttrain import attention
    from posttrain.batch import deal
    from posttrain.forward import attach, exact_layouts, to_batch
    from posttrain.layout import conversation_group, grid, measure, pair_group
    from posttrain.machine import make_ready
    from posttrain.settle import most_tokens

    if keeps:
        make_ready(1)
    torch.set_num_threads(threads or num_cores())
    if is_kernel:
        attention.LONGEST = 0
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    if recompute:
        loaded.gradient_checkpointing_enable()
    groups = [
        pair_group(each["prompt_ids"], [each["chosen_ids"], each["rejected_ids"]])
        if "prompt_ids" in each
        else conversation_group(each["input_ids"], [label >= 0 for label in each["labels"]])
        for each in json.loads(Path(samples).read_text(encoding="utf-8"))
    ]
    has_pairs = len(groups[0].branches) == 2

    def casting(enabled: bool = bf16) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)

    if not is_plain:
        attach(loaded)
    with casting():
        budget = int(tokens * most_tokens(loaded))
        wanted: Any = "padded" if is_plain else layout or ("shared" if has_pairs else "packed")
        assert is_plain or exact_layouts(loaded, loaded, [wanted], max(group.longest for group in groups))[0] == [wanted]

    def log_probs(batch: list[Any]) -> Any:
        """Of each counted token, in a padded grid."""
        if not is_plain:
            return loaded(**to_batch(batch, wanted, 0), fused_lm_head=True).log_probs
        rows = grid(batch, 0)
        labels = rows.pop("labels")[:, 1:]
        given = loaded(**rows, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        return given.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)

    optimizer = torch.optim.AdamW(loaded.parameters(), lr=1e-5, fused=fused)
    seconds: list[float] = []
    for start in range(0, len(groups), GLOBAL_BATCH_SIZE):
        batch = groups[start : start + GLOBAL_BATCH_SIZE]
        began = time.monotonic()
        dealt = deal(np.arange(len(batch)), measure(batch, wanted), budget, 1)[0]
        with casting() if casts_once else nullcontext():
            for numbers in dealt:
                with casting():
                    given = log_probs([batch[number] for number in numbers]).sum(-1)
                chosen = given[: len(numbers)] - given[len(numbers) :] if has_pairs else given
                loss = -torch.nn.functional.logsigmoid(0.1 * chosen).sum() if has_pairs else -given.sum()
                with casting(enabled=False):
                    (loss / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(loaded.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.monotonic() - began)
    used = resource.getrusage(resource.RUSAGE_SELF)
    count: Callable[[Any], int] = lambda group: sum(len(group.prefix) + len(branch) for branch in group.branches)  # noqa: E731
    steady = [sum(map(count, groups[n * GLOBAL_BATCH_SIZE : (n + 1) * GLOBAL_BATCH_SIZE])) for n in range(WARM_UP, len(seconds))]
    return {
        "step_s": statistics.median(seconds[WARM_UP:]),
        "first_step_s": seconds[0],
        "tokens_per_s": sum(steady) / sum(seconds[WARM_UP:]),
        "cpu_user_s": used.ru_utime,
        "cpu_system_s": used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
    }


def print_figures(figures: dict[str, dict[str, float]]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("changed", "tokens/s", "of ours", "s a step", "s the first", "CPU s user + system", "MiB")
    ours = figures["as ours"]["tokens_per_s"]
    for name, row in figures.items():
        table.add_row(
            name,
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / ours:.2f}",
            f"{row['step_s']:.2f}",
            f"{row['first_step_s']:.2f}",
            f"{row['cpu_user_s']:.0f} + {row['cpu_system_s']:.0f}",
            f"{row['peak_mib']:,.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()
