"""How long the whole chain takes, from raw files to held-out loss, next to the same steps by TRL's command line.

  python benchmarks/chain.py [--quick] [--one-beta] [--steps N] [--runs N] [--model DIR] [--json FILE]

Ours is one `posttrain run` of sft -> dpo -> eval. Theirs is `trl sft`, `trl dpo` on what it saved, and a plain script that scores
the base, the first and the second model (heldout_loss.py): with TRL's defaults, and with the settings that are fastest here.
The sweep is that chain for four values of beta: of ours one `posttrain run` with four dpo stages, from nothing; of theirs one SFT
and four times the rest. `ratio_chain` is their wall-clock seconds by ours, with their fastest settings; `sweep_cost` is what the
four cost by what one does.
"""

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measured import run_measured, write_lines
from peers import (
    GLOBAL_BATCH_SIZE,
    MAX_LENGTH,
    OFFLINE,
    QUICK_MAX_LENGTH,
    TRL,
    Bench,
    Contender,
    Example,
    Task,
    choose,
    common_options,
    file_order,
    make_model,
    ordered,
    our_settings,
    our_stage,
    out_of_time,
    peer_environment,
    posttrain_command,
    read_examples,
    trl_command,
    trl_recipe,
    workspace,
    write_figures,
)

from posttrain.artifact import read_artifact
from posttrain.config import DataSource

BETAS = (0.1, 0.05, 0.2, 0.5)
"""The first is that of the chain by itself."""
LEARNING_RATES: dict[Task, float] = {"sft": 2e-5, "dpo": 5e-7}
NOT_SAVED = {"save_strategy": "no"}
"""Nothing but the final model is written."""
THEIRS = {each.name: each if each.name == "trl default" else replace(each, settings=each.settings | NOT_SAVED) for each in TRL}


@dataclass(frozen=True)
class Chain:
    """What all sides are given."""

    directory: Path
    model: Path
    train: dict[Task, list[Example]]
    held_out: dict[Task, list[Example]]
    num_steps: int
    max_length: int
    ours: dict[str, Any]


def main() -> None:
    """Measure the sides in turn, print the table, and write the figures."""
    options = common_options(__doc__ or "")
    options.add_argument("--one-beta", action="store_true", help="leave the sweep out")
    arguments = options.parse_args()
    num_steps = arguments.steps or (2 if arguments.quick else 12)
    num_held_out = 4 if arguments.quick else 32
    max_length = QUICK_MAX_LENGTH if arguments.quick else MAX_LENGTH["dpo"]
    names = [] if arguments.only_ours else ["trl fp32"] if arguments.quick else list(THEIRS)
    names = [name for name in names if arguments.contender is None or name in arguments.contender]
    has_sweep = not (arguments.quick or arguments.one_beta)
    left_out = ["the sweep, and all sides of TRL but one"] if arguments.quick else [] if has_sweep else ["the sweep"]
    files: dict[Task, tuple[str, ...]] = {
        "sft": ("llamafactory_demo/alpaca_en_demo.json",),
        "dpo": ("llamafactory_demo/dpo_en_demo.json", "pandalm_testset/derived_pairs.jsonl"),
    }
    with workspace() as directory:
        model = make_model(arguments.model, directory)
        train: dict[Task, list[Example]] = {}
        held_out: dict[Task, list[Example]] = {}
        for task, paths in files.items():
            sources = [DataSource.model_validate({"data": str(arguments.data / path), "invalid_rows": "drop"}) for path in paths]
            found, counts = read_examples(task, sources, model, max_length)
            left_out += [f"{task}: {count} rows: {reason}" for reason, count in counts.items() if count]
            drawn = choose(found, num_steps * GLOBAL_BATCH_SIZE + num_held_out, "; ".join(left_out))
            train[task], held_out[task] = drawn[num_held_out:], drawn[:num_held_out]
        chain = Chain(directory, model, train, held_out, num_steps, max_length, our_settings(arguments))
        seconds: dict[str, list[tuple[float, float | None]]] = {name: [] for name in ("ours", *names)}
        metrics: dict[str, dict[str, float]] = {}
        for number in range(arguments.runs):
            round_started = time.monotonic()
            betas = BETAS if number + 1 == arguments.runs and has_sweep else BETAS[:1]  # the last round goes on to the sweep
            for name in seconds:
                one, four, metrics[name] = run_ours(chain, betas) if name == "ours" else run_theirs(chain, THEIRS[name], betas)
                seconds[name].append((one, four))
                print(
                    f"run {number + 1} of {arguments.runs}: {name}: {one:.1f} s{f', four betas: {four:.1f} s' if four else ''}", flush=True
                )
            if out_of_time(arguments, round_started, number):
                left_out.append(f"runs {number + 2} to {arguments.runs} of each side, for want of time")
                break
        figures = summarize(chain, seconds, metrics, left_out)
        print_figures(figures)
        write_figures(arguments.json, figures)


def run_ours(chain: Chain, betas: Sequence[float]) -> tuple[float, float | None, dict[str, float]]:
    """Seconds of `posttrain run` for the first beta and for all, each from nothing, and the metrics of the first."""
    one, metrics = run_once(chain, betas[:1])
    return one, run_once(chain, betas)[0] if len(betas) > 1 else None, metrics


def run_once(chain: Chain, betas: Sequence[float]) -> tuple[float, dict[str, float]]:
    """Seconds of one `posttrain run` with a dpo stage for each beta, and the metrics of the first."""
    directory = fresh(chain, "ours")
    rows: dict[str, Any] = {}
    for task in chain.train:
        for part, examples in (("train", file_order(chain.train[task])), ("held_out", chain.held_out[task])):
            write_lines(directory / f"{task}_{part}.jsonl", [example.raw for example in examples])
            rows[f"{task}_{part}"] = {"data": str(directory / f"{task}_{part}.jsonl")}
    trained: dict[Task, dict[str, Any]] = {}
    for task, policy in (("sft", "base"), ("dpo", "sft")):
        bench = Bench(task, directory, chain.model, [], chain.num_steps, chain.max_length, LEARNING_RATES[task], chain.ours, None)
        trained[task] = {"inputs": {"policy": policy, "data": f"{task}_train"}, **our_stage(bench)}
    tuned = {f"dpo_{number}" if number else "dpo": {**trained["dpo"], "kind": "dpo", "beta": beta} for number, beta in enumerate(betas)}
    evaluation = {"inputs": {"policies": ["base", "sft", *tuned], "data": ["sft_held_out", "dpo_held_out"]}, "num_shown": 0}
    stages = {"sft": trained["sft"], **tuned, "eval": evaluation}
    config = {"run": "chain", "sources": {"base": {"model": str(chain.model)}, **rows}, "stages": stages}
    (directory / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    command = posttrain_command(directory / "config.yaml", directory / "runs")
    seconds = run_measured(command, env=OFFLINE, log=directory / "log").wall_s
    report = read_artifact(directory / "runs" / "chain" / "eval")
    assert report is not None, "a run that ends well has finished all its stages"
    shutil.rmtree(directory)
    return seconds, {name: value for name, value in report.metrics.items() if name.endswith(("nll", "preference accuracy"))}


def run_theirs(chain: Chain, contender: Contender, betas: Sequence[float]) -> tuple[float, float | None, dict[str, float]]:
    """Seconds of TRL's command line and of the script for the first beta, SFT with it, and for all, and the metrics of the first."""
    directory = fresh(chain, contender.name.replace(" ", "_"))
    for task, examples in chain.train.items():
        write_lines(directory / task / "train.jsonl", [example.text for example in ordered(examples, contender.is_sorted)])
    write_lines(directory / "held_out.jsonl", [example.text for examples in chain.held_out.values() for example in examples])
    env = {**peer_environment(directory), **contender.env}
    seconds = []
    for beta in betas:
        started = time.monotonic()
        if beta == betas[0]:
            run_measured(trl_command("sft", flags(chain, contender, directory, "sft")), env=env, log=directory / "log_sft")
        given = {**flags(chain, contender, directory, "dpo"), "beta": beta, "output_dir": directory / f"dpo_{beta}_output"}
        run_measured(trl_command("dpo", given), env=env, log=directory / f"log_dpo_{beta}")
        models = [chain.model, directory / "sft_output", directory / f"dpo_{beta}_output"]
        scored = directory / f"scored_{beta}.json"
        script = [sys.executable, str(Path(__file__).parent / "heldout_loss.py"), *map(str, models)]
        run_measured(
            [*script, "--rows", str(directory / "held_out.jsonl"), "--json", str(scored)], env=env, log=directory / f"log_score_{beta}"
        )
        seconds.append(time.monotonic() - started)
    scores = json.loads((directory / f"scored_{betas[0]}.json").read_text(encoding="utf-8"))
    shutil.rmtree(directory)
    metrics = zip(("base", "sft", "dpo"), scores.values(), strict=True)
    found = {f"{policy}.{name}": value for policy, values in metrics for name, value in values.items()}
    return seconds[0], sum(seconds) if len(betas) > 1 else None, found


def flags(chain: Chain, contender: Contender, directory: Path, task: Task) -> dict[str, Any]:
    """The flags of `trl sft` or `trl dpo`."""
    return {
        "model_name_or_path": chain.model if task == "sft" else directory / "sft_output",
        "dataset_name": directory / task,
        "output_dir": directory / f"{task}_output",
        **trl_recipe(chain.num_steps, chain.max_length, LEARNING_RATES[task]),
        **contender.settings,
    }


def fresh(chain: Chain, name: str) -> Path:
    """A new directory in the workspace."""
    directory = chain.directory / f"chain_{name}"
    directory.mkdir()
    return directory


def summarize(
    chain: Chain, seconds: dict[str, list[tuple[float, float | None]]], metrics: dict[str, dict[str, float]], left_out: list[str]
) -> dict[str, Any]:
    """Medians and ratios; a figure that needs what was not run is None."""
    one = {name: statistics.median(run[0] for run in runs) for name, runs in seconds.items()}
    four = {name: sweep / first if sweep is not None else None for name, runs in seconds.items() for first, sweep in runs[-1:]}
    theirs = {name: value for name, value in one.items() if name != "ours"}
    best = min(theirs, key=lambda name: theirs[name], default=None)
    return {
        "ratio_chain": one[best] / one["ours"] if best else None,
        "best_peer": best,
        "ratio_chain_default": one["trl default"] / one["ours"] if "trl default" in one else None,
        "sweep_cost": four["ours"],
        "sweep_costs": four,
        "seconds": one,
        "runs": seconds,
        "betas": BETAS,
        "metrics": metrics,
        "num_steps": chain.num_steps,
        "num_held_out": {task: len(rows) for task, rows in chain.held_out.items()},
        "cores": len(os.sched_getaffinity(0)),
        "left_out": left_out,
    }


def print_figures(figures: dict[str, Any]) -> None:
    """The table, and the figures below it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table("side", "one chain, s", "to ours", "four betas, s", "by one", "dpo: nll", "dpo: preference accuracy")
    for name, one in figures["seconds"].items():
        last, cost, found = figures["runs"][name][-1], figures["sweep_costs"][name], figures["metrics"][name]
        sweep = (f"{last[1]:.1f}", f"{cost:.2f}") if cost else ("-", "-")
        scores = (f"{found['dpo.nll']:.4f}", f"{found['dpo.preference accuracy']:.3f}")
        table.add_row(name, f"{one:.1f}", f"{one / figures['seconds']['ours']:.2f}", *sweep, *scores)
    console.print(table)
    for key in ("ratio_chain", "best_peer", "ratio_chain_default", "sweep_cost"):
        value = figures[key]
        console.print(f"{key}: {'-' if value is None else f'{value:.4g}' if isinstance(value, float) else value}")
    for what in figures["left_out"]:
        console.print(f"left out: {what}", soft_wrap=True)


if __name__ == "__main__":
    main()
