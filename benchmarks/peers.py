"""The same training by `posttrain run`, by TRL's command line and by LLaMA-Factory's: shared by the benchmarks that compare them.

All sides get one directory of fp32 weights, the same tokens with the same ones trained, and the same global batches in the same
order; this is checked, not assumed. Ours reads raw rows, and what it prepared is compared with what was expected; TRL reads
token ids where it takes them (SFT) and else text, of which only rows are kept that its tokenization turns into the very same
ids, and the tokens that it counts are compared; LLaMA-Factory reads token ids.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

from measured import Shape, Usage, causal_pairs, matmul_peaks, read_lines, read_shape, run_measured, write_lines

from posttrain.config import DataSource, ModelSource
from posttrain.parallel import num_cores

ROOT = Path(__file__).resolve().parent.parent
RECORDER = Path(__file__).resolve().parent / "recorder"
SHARED = Path("../shared")
GLOBAL_BATCH_SIZE = 8
SEED = 0
MAX_LENGTH: dict["Task", int] = {"sft": 1024, "dpo": 512, "reward": 512, "orpo": 512}
"""Longer rows are left out; of pairs so that a peer which keeps all logits fits into memory with its default batch."""
QUICK_MAX_LENGTH = 96
QUICK_S = 280.0
"""Seconds from the start of the program after which no round of `--quick` should end."""
STARTED = time.monotonic()
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
BELONGINGS = {"sft": ("input_ids", "labels")} | dict.fromkeys(("dpo", "reward", "orpo"), ("prompt_ids", "chosen_ids", "rejected_ids"))
"""Columns of the samples of each task."""
COMPARED = {"orpo": "log_odds_ratio"}
"""What of the log is compared between the sides, where that is not the loss: TRL's ORPO trains the prompt too, and ours does not."""
PASSES = {"sft": 3, "dpo": 4, "reward": 3, "orpo": 3}
"""Forward passes that a step costs: a backward pass is two, the reference of DPO one more."""

Task = Literal["sft", "dpo", "reward", "orpo"]
Who = Literal["ours", "trl", "llamafactory"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Example:
    """One row: as our side reads it, as token ids, and as the text that TRL turns into these ids."""

    raw: dict[str, Any]
    columns: dict[str, list[int]]
    text: dict[str, str]

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """Length of each sequence, and how many of its tokens are trained."""
        if "labels" in self.columns:
            labels = self.columns["labels"]
            return [(len(labels), sum(label >= 0 for label in labels))]
        prompt = len(self.columns["prompt_ids"])
        return [(prompt + len(answer), len(answer)) for answer in (self.columns["chosen_ids"], self.columns["rejected_ids"])]

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, a prompt counted with each answer."""
        return sum(length for length, _ in self.sequences)

    @property
    def num_trained(self) -> int:
        """Tokens that the loss is of."""
        return sum(trained for _, trained in self.sequences)

    def forward_flops(self, shape: Shape, *, conventional: bool, has_head: bool) -> float:
        """Operations of one pass; a prompt is computed once, or, as convention counts, with each answer."""
        pairs = sum(causal_pairs(length) for length, _ in self.sequences)
        repeated = 0 if conventional or "prompt_ids" not in self.columns else len(self.columns["prompt_ids"])
        return shape.forward_flops(self.num_tokens - repeated, self.num_trained if has_head else 0, pairs - causal_pairs(repeated))


@dataclass(frozen=True)
class Contender:
    """One row of the table: who trains, and with which settings of their own."""

    name: str
    who: Who
    precision: Precision
    settings: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    is_sorted: bool = False
    """Whether the rows of each global batch come sorted by length, so that micro-batches of several steps hold like lengths."""


@dataclass(frozen=True)
class Result:
    """One run of a contender."""

    contender: str
    train_s: float
    """From the beginning of the first step to the end of the last."""
    step_s: list[float]
    """Of each step."""
    reference_s: float
    """The pass of the reference model over all pairs, where it is done before training."""
    losses: list[float]
    usage: Usage
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase of our stage, as its progress tells; what is in `train` beside the steps is settling and saving."""


@dataclass(frozen=True)
class Bench:
    """What all contenders are given."""

    task: Task
    directory: Path
    model: Path
    examples: list[Example]
    """In the order in which they are trained."""
    num_steps: int
    max_length: int
    learning_rate: float
    ours: dict[str, Any]
    """Further settings of our stage."""
    llamafactory: Path | None

    def total(self, measure: Callable[[Example], float]) -> float:
        """A measure summed over all examples."""
        return sum(map(measure, self.examples))


def ordered(examples: Sequence[Example], is_sorted: bool) -> list[Example]:
    """The examples as a peer is given them: as they are, or the longest of each global batch first."""
    batches = [examples[start : start + GLOBAL_BATCH_SIZE] for start in range(0, len(examples), GLOBAL_BATCH_SIZE)]
    return [each for batch in batches for each in (sorted(batch, key=lambda e: -e.num_tokens) if is_sorted else batch)]


# --- the command line ------------------------------------------------------------------------------------------------


def common_options(description: str) -> argparse.ArgumentParser:
    """The options that the benchmarks against peers share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within five minutes: few steps, short rows, the most telling contenders")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each contender, taken in turn")
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "smollm2", help="model; without weights, random ones are made")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder of real data sets")
    parser.add_argument("--llamafactory", type=Path, help="virtual environment that LLaMA-Factory is installed in")
    parser.add_argument("--only-ours", action="store_true", help="leave the peers out")
    parser.add_argument("--contender", action="append", metavar="NAME", help="only the contender of this name, and `ours`; repeatable")
    parser.add_argument("--layout", help="layout of our side, as the stage's field of that name")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="further setting of our stages; repeatable")
    parser.add_argument("--tune", action="store_true", help="every setting of the peers that was tried")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def our_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `--layout` and `--set` ask of our stages."""
    settings = dict(setting.split("=", 1) for setting in arguments.set)
    values = {key: _read_value(value) for key, value in settings.items()}
    return values | ({"layout": arguments.layout} if arguments.layout else {})


def _read_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@contextmanager
def workspace() -> Iterator[Path]:
    """A directory for models, data and runs, taken down at the end."""
    with tempfile.TemporaryDirectory(prefix="posttrain-benchmark-") as directory:
        yield Path(directory)


# --- what all are given ----------------------------------------------------------------------------------------------


def make_model(source: Path, directory: Path, task: Task = "sft") -> Path:
    """The model with its chat contract, in fp32; where `source` has no weights, they are drawn at random.

    For `reward` it has a head that gives one number, drawn at random too, so that all sides start from the same.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from posttrain.models import LOADERS, load_tokenizer
    from posttrain.stage import Input

    if not list(source.glob("*.safetensors")):
        torch.manual_seed(SEED)
        drawn = directory / "drawn"
        built: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
        built.save_pretrained(drawn)
        AutoTokenizer.from_pretrained(source).save_pretrained(drawn)
        source = drawn
    given = Input("model", "policy", "", ModelSource(model=str(source)))
    tokenizer: Any
    tokenizer, contract = load_tokenizer(given, "benchmark")
    torch.manual_seed(SEED)
    model: Any = LOADERS["reward_model" if task == "reward" else "policy"](
        given.model, tokenizer, contract, "benchmark", dtype=torch.float32
    )
    made = directory / "model"
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    contract.save(made)
    return made


def read_examples(task: Task, sources: Sequence[DataSource], model: Path, max_length: int) -> tuple[list[Example], Counter[str]]:
    """The rows that all sides see alike, and how many are left out for which reason."""
    from posttrain.data.samples import LeftOut
    from posttrain.data.source import open_source
    from posttrain.models import load_tokenizer
    from posttrain.stage import Input
    from stages import dpo, sft  # all stages of pairs make the same samples

    tokenizer, contract = load_tokenizer(Input("model", "policy", "", ModelSource(model=str(model))), "benchmark")
    fields: dict[str, Any] = {"max_length": max_length, "on_overflow": "drop"}
    if task == "sft":
        encoder = sft.encoder(sft.SFTConfig.model_validate(fields), tokenizer, contract, "benchmark")
    else:
        encoder = dpo.encoder(dpo.DPOConfig.model_validate(fields), tokenizer, contract, "benchmark")
    examples, left_out = [], Counter[str]()
    for source in sources:
        opened = open_source(source, "benchmark")
        for row in opened.rows():
            names = ("messages",) if task == "sft" else ("prompt", "chosen", "rejected")
            raw = {name: getattr(row, name) for name in names}
            if not all(message["content"].strip() for messages in raw.values() for message in messages):
                left_out["an empty answer, or another fault of form"] += 1
                continue
            try:
                sample = encoder.encode(row)
            except LeftOut as fault:
                left_out[fault.fault] += 1
                continue
            text = _as_text(tokenizer, raw, sample.columns)
            if text is None:
                left_out["text with other tokens"] += 1
                continue
            examples.append(Example(raw, sample.columns, text))
        left_out["an empty answer, or another fault of form"] += len(opened.invalid)
    return examples, left_out


def _as_text(tokenizer: Any, raw: dict[str, Any], columns: dict[str, list[int]]) -> dict[str, str] | None:
    """Prompt and answers as text that TRL turns into these very ids; None where it would make others of them."""
    from posttrain.chat import render

    if "labels" in columns:
        messages, answers = raw["messages"][:-1], {"completion": raw["messages"][-1:]}
        trained = [position for position, label in enumerate(columns["labels"]) if label >= 0]
        start, end = trained[0], trained[-1] + 1
        prompt_ids, answer_ids = columns["input_ids"][:start], {"completion": columns["input_ids"][start:end]}
    else:
        messages, answers = raw["prompt"], {"chosen": raw["chosen"], "rejected": raw["rejected"]}
        prompt_ids, answer_ids = columns["prompt_ids"], {name: columns[f"{name}_ids"] for name in answers}
    prompt = render(tokenizer, messages, None, "benchmark", add_generation_prompt=True)
    whole = {name: render(tokenizer, messages + answer, None, "benchmark") for name, answer in answers.items()}
    stop = tokenizer.eos_token
    texts = {name: text[len(prompt) : text.find(stop, len(prompt)) + len(stop)] for name, text in whole.items()}
    added = tokenizer.bos_token if tokenizer(text="").input_ids else ""  # TRL has the tokenizer add what begins a text
    prompt = prompt.removeprefix(added)
    is_same = tokenizer(text=prompt).input_ids == prompt_ids and all(
        tokenizer(text=prompt + text).input_ids == prompt_ids + answer_ids[name] for name, text in texts.items()
    )
    return {"prompt": prompt, **texts} if is_same else None


def pair_sources(data: Path) -> list[DataSource]:
    """The preference pairs that all benchmarks of them read."""
    files = ("llamafactory_demo/dpo_en_demo.json", "pandalm_testset/derived_pairs.jsonl")
    return [DataSource.model_validate({"data": str(data / file), "invalid_rows": "drop"}) for file in files]


def choose(examples: Sequence[Example], count: int, said: str) -> list[Example]:
    """So many of the examples, drawn by the seed."""
    if len(examples) < count:
        raise SystemExit(f"{count} rows are needed and {len(examples)} are there, as others are left out ({said}); lower --steps")
    return random.Random(SEED).sample(examples, count)


# --- our side --------------------------------------------------------------------------------------------------------


def our_stage(bench: Bench) -> dict[str, Any]:
    """The stage's config, without its inputs."""
    from posttrain.recipe import PreflightLimits

    return {
        "learning_rate": bench.learning_rate,
        "max_steps": bench.num_steps,
        "global_batch_size": GLOBAL_BATCH_SIZE,
        "max_length": bench.max_length,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": SEED,
        "preflight": dict.fromkeys(PreflightLimits.model_fields, 1.0),
        **bench.ours,
    }


def posttrain_command(config: Path, root: Path, *overrides: str) -> list[str]:
    """`posttrain run`."""
    return [sys.executable, str(ROOT / "pipeline.py"), "run", str(config), *overrides, "--root", str(root)]


def run_ours(bench: Bench, contender: Contender, directory: Path) -> Result:
    """Train by `posttrain run`."""
    write_lines(directory / "rows.jsonl", [example.raw for example in file_order(bench.examples)])
    config = {
        "run": "benchmark",
        "sources": {"base": {"model": str(bench.model)}, "rows": {"data": str(directory / "rows.jsonl")}},
        "stages": {bench.task: {"inputs": {"policy": "base", "data": "rows"}, **our_stage(bench), **contender.settings}},
    }
    (directory / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    stage = directory / "runs" / "benchmark" / bench.task
    phases: list[tuple[str, float]] = []

    def watch() -> None:
        try:
            phase = json.loads((stage / "progress.json").read_text(encoding="utf-8"))["phase"]
        except (OSError, ValueError):
            return
        if not phases or phases[-1][0] != phase:
            phases.append((phase, time.monotonic()))

    command = posttrain_command(directory / "config.yaml", directory / "runs")
    usage = run_measured(command, env={**OFFLINE, **contender.env}, log=directory / "log", watch=watch)
    _check_prepared(bench, stage)
    steps = read_lines(stage / "metrics.jsonl")
    step_s = [step["step_time_s"] for step in steps]
    took = {phase: end - start for (phase, start), (_, end) in pairwise(phases)}
    compared = [step[COMPARED.get(bench.task, "loss")] for step in steps]
    return Result(contender.name, sum(step_s), step_s, took.get("reference", 0.0), compared, usage, took)


def file_order(examples: Sequence[Example]) -> list[Example]:
    """The rows as they must stand in a file for our side to train them in the order given."""
    from posttrain.batch import epoch_order

    placed: list[Example] = list(examples)
    for position, index in enumerate(epoch_order(len(examples), SEED, 0)):
        placed[index] = examples[position]
    return placed


def _check_prepared(bench: Bench, stage: Path) -> None:
    """Our side must have prepared the very tokens that the peers were given."""
    from posttrain import disk
    from posttrain.data.prepared import open_prepared

    prepared = open_prepared(Path(disk.read_json(stage / "prepared.json")["path"])).load()
    for number, (sample, example) in enumerate(zip(prepared, file_order(bench.examples), strict=True)):
        for name in BELONGINGS[bench.task]:
            if sample[name] != example.columns[name]:
                raise SystemExit(f"row {number}: our side prepared other {name} than the peers were given; nothing can be compared")


# --- the peers -------------------------------------------------------------------------------------------------------


def trl_command(task: Task, flags: Mapping[str, Any]) -> list[str]:
    """TRL's command of that name; it has none for ORPO, so `trl_orpo.py` is that."""
    given = [text for name, value in flags.items() if value is not None for text in (f"--{name}", str(value))]
    if task == "orpo":
        return [sys.executable, str(Path(__file__).parent / "trl_orpo.py"), *given]
    return [str(Path(sys.executable).parent / "trl"), task, *given]


def trl_recipe(num_steps: int, max_length: int, learning_rate: float) -> dict[str, Any]:
    """What must be the same on all sides, as TRL and transformers name it."""
    return {
        "max_steps": num_steps,
        "per_device_train_batch_size": GLOBAL_BATCH_SIZE,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": SEED,
        "max_length": max_length,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "use_cpu": True,  # without it transformers refuses bf16 on a machine that has no GPU
    }


def run_trl(bench: Bench, contender: Contender, directory: Path) -> Result:
    """Train by TRL's command line."""
    rows = ordered(bench.examples, contender.is_sorted)
    write_lines(directory / "rows" / "train.jsonl", [_trl_row(bench.task, row) for row in rows])
    flags = {
        "model_name_or_path": bench.model,
        "dataset_name": directory / "rows",
        "output_dir": directory / "output",
        **trl_recipe(bench.num_steps, bench.max_length, bench.learning_rate),
        **contender.settings,
    }
    # What is None no flag can say, so it stands in a file.
    (directory / "none.yaml").write_text(json.dumps({name: value for name, value in flags.items() if value is None}), encoding="utf-8")
    result, logged = _run_recorded(bench, trl_command(bench.task, {"config": directory / "none.yaml", **flags}), contender, directory)
    if bench.task != "orpo" and logged[-1]["num_tokens"] != bench.total(lambda example: example.num_tokens):
        raise SystemExit(f"{contender.name} trained on {logged[-1]['num_tokens']} tokens, not those of our side; nothing can be compared")
    return result


def _trl_row(task: Task, row: Example) -> dict[str, Any]:
    if task == "reward":
        return {f"{name}_ids": row.columns["prompt_ids"] + row.columns[f"{name}_ids"] for name in ("chosen", "rejected")}
    return row.columns if task == "sft" else row.text


def run_llamafactory(bench: Bench, contender: Contender, directory: Path) -> Result:
    """Train by LLaMA-Factory's command line."""
    assert bench.llamafactory is not None, "without its environment it is no contender"
    write_lines(directory / "rows.jsonl", [_llamafactory_row(row.columns) for row in ordered(bench.examples, contender.is_sorted)])
    programs = bench.llamafactory.absolute() / "bin"
    convert = "import sys, datasets; datasets.load_dataset('json', data_files=sys.argv[1], split='train').save_to_disk(sys.argv[2])"
    environment = {**OFFLINE, "HF_DATASETS_CACHE": str(directory / "cache"), "DISABLE_VERSION_CHECK": "1"}
    subprocess.run(
        [programs / "python", "-c", convert, directory / "rows.jsonl", directory / "rows"],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
    )
    recipe = trl_recipe(bench.num_steps, bench.max_length, bench.learning_rate)
    config = {
        "model_name_or_path": str(bench.model),
        "stage": bench.task,
        "do_train": True,
        "finetuning_type": "full",
        "template": "empty",
        "dataset": "rows",  # must be named, and is not read, since there is a tokenized one
        "tokenized_path": str(directory / "rows"),
        "cutoff_len": recipe.pop("max_length"),
        "disable_shuffling": True,
        "output_dir": str(directory / "output"),
        **{name: value for name, value in recipe.items() if name != "train_sampling_strategy"},
        **contender.settings,
    }
    (directory / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    command = [str(programs / "llamafactory-cli"), "train", str(directory / "config.yaml")]
    return _run_recorded(bench, command, replace(contender, env={**contender.env, "DISABLE_VERSION_CHECK": "1"}), directory)[0]


def _llamafactory_row(columns: dict[str, list[int]]) -> dict[str, Any]:
    media = dict.fromkeys(("images", "videos", "audios"))
    if "labels" in columns:
        return {"input_ids": columns["input_ids"], "attention_mask": [1] * len(columns["labels"]), "labels": columns["labels"], **media}
    row: dict[str, Any] = {}
    for name in ("chosen", "rejected"):
        prompt, answer = columns["prompt_ids"], columns[f"{name}_ids"]
        row[f"{name}_input_ids"] = prompt + answer
        row[f"{name}_attention_mask"] = [1] * len(prompt + answer)
        row[f"{name}_labels"] = [-100] * len(prompt) + answer
    return {**row, **media}


def _run_recorded(bench: Bench, command: list[str], contender: Contender, directory: Path) -> tuple[Result, list[dict[str, Any]]]:
    """Run a peer's command line with the recorder in it; what it found, and what the trainer logged for each step."""
    env = peer_environment(directory) | {"BENCHMARK_RECORD": str(directory / "record"), "PYTHONPATH": str(RECORDER)} | contender.env
    usage = run_measured(command, env=env, log=directory / "log")
    record = read_lines(directory / "record")
    at = {event: [line["at"] for line in record if line["event"] == event] for event in ("made", "begin", "end")}
    logged = [line for line in record if line["event"] == "log" and "loss" in line]
    reference_s = at["begin"][0] - at["made"][0] if contender.settings.get("precompute_ref_log_probs") else 0.0
    losses = [line[COMPARED.get(bench.task, "loss")] for line in logged]
    step_s = [end - begin for begin, end in zip(at["begin"], at["end"], strict=True)]
    return Result(contender.name, at["end"][-1] - at["begin"][0], step_s, reference_s, losses, usage), logged


def peer_environment(directory: Path) -> dict[str, str]:
    """Environment of a peer, which keeps nothing outside of `directory`."""
    return {**OFFLINE, "HF_DATASETS_CACHE": str(directory / "cache")}


RUN: dict[Who, Callable[[Bench, Contender, Path], Result]] = {"ours": run_ours, "trl": run_trl, "llamafactory": run_llamafactory}


# --- the contenders --------------------------------------------------------------------------------------------------

FP32 = {"bf16": False, "gradient_checkpointing": False}
BF16 = {"bf16": True, "gradient_checkpointing": False}
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "68719476736", "MALLOC_TOP_PAD_": "268435456"}
"""Lets the C library keep what is freed, where it would give large blocks back to the kernel, and fault them in again."""


def our_contenders(precision: Precision) -> list[Contender]:
    """Our side as it runs by default, in `precision`, and in the other one."""
    other: Precision = "fp32" if precision == "bf16" else "bf16"
    return [Contender("ours", "ours", precision), Contender(f"ours {other}", "ours", other, {"bf16": other == "bf16"})]


def micro(size: int) -> dict[str, int]:
    """A global batch in micro-batches of `size`."""
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": GLOBAL_BATCH_SIZE // size}


# `accelerate launch`, by which the command line starts, gives one thread where nothing else is said.
ALL_CORES = {"OMP_NUM_THREADS": str(num_cores())}
TRL_BEST = {**KEEP_MEMORY, **ALL_CORES}
TRL = [
    Contender("trl default", "trl", "bf16"),
    Contender("trl fp32", "trl", "fp32", {**FP32, **micro(2)}, TRL_BEST, is_sorted=True),
    Contender("trl bf16", "trl", "bf16", {**BF16, **micro(2)}, TRL_BEST, is_sorted=True),
]
TRL_TRIED = [
    Contender("trl default, all cores", "trl", "bf16", env=ALL_CORES),
    Contender("trl fp32, one core", "trl", "fp32", {**FP32, **micro(2)}, KEEP_MEMORY, is_sorted=True),
    Contender("trl fp32, usual malloc", "trl", "fp32", {**FP32, **micro(2)}, ALL_CORES, is_sorted=True),
    *(Contender(f"trl fp32 by {size}", "trl", "fp32", {**FP32, **micro(size)}, TRL_BEST, is_sorted=True) for size in (1, 4, 8)),
    Contender("trl fp32 eager", "trl", "fp32", {**FP32, **micro(2), "attn_implementation": "eager"}, TRL_BEST, is_sorted=True),
    Contender("trl fp32 unfused AdamW", "trl", "fp32", {**FP32, **micro(2), "optim": "adamw_torch"}, TRL_BEST, is_sorted=True),
    Contender("trl fp32 passive", "trl", "fp32", {**FP32, **micro(2)}, {**TRL_BEST, "OMP_WAIT_POLICY": "PASSIVE"}, is_sorted=True),
]
LLAMAFACTORY_BEST = {"disable_gradient_checkpointing": True, **micro(2)}
LLAMAFACTORY = [
    Contender("llamafactory default", "llamafactory", "fp32"),
    Contender("llamafactory fp32", "llamafactory", "fp32", LLAMAFACTORY_BEST, KEEP_MEMORY, is_sorted=True),
    Contender("llamafactory bf16", "llamafactory", "bf16", {**LLAMAFACTORY_BEST, "bf16": True}, KEEP_MEMORY, is_sorted=True),
]
LLAMAFACTORY_TRIED = [
    Contender("llamafactory fp32 by 1", "llamafactory", "fp32", {**LLAMAFACTORY_BEST, **micro(1)}, KEEP_MEMORY, is_sorted=True),
    Contender("llamafactory fp32, usual malloc", "llamafactory", "fp32", LLAMAFACTORY_BEST, is_sorted=True),
]


# --- the comparison --------------------------------------------------------------------------------------------------


def run_benchmark(
    task: Task, sources: Sequence[DataSource], arguments: argparse.Namespace, *, learning_rate: float, tried: Sequence[Contender]
) -> None:
    """Make the model and the data, run all contenders in turn, print and write the figures."""
    from posttrain.stage import load_stage

    num_steps = arguments.steps or (2 if arguments.quick else 12)
    max_length = QUICK_MAX_LENGTH if arguments.quick else MAX_LENGTH[task]
    config = load_stage(task, "benchmark").config.model_validate(our_settings(arguments))
    contenders = our_contenders("bf16" if config.uses_bf16 else "fp32")
    said: list[str] = []
    if arguments.quick:
        said.append(f"rows over {max_length} tokens, our side in the other precision, TRL in bf16 but by default, and LLaMA-Factory")
        contenders = contenders[:1]
    if arguments.only_ours:
        said.append("all peers, as --only-ours asks")
    else:
        contenders += [*(TRL[:2] if arguments.quick else TRL), *([*TRL_TRIED, *tried] if arguments.tune else [])]
        if task in ("reward", "orpo"):
            said.append("LLaMA-Factory, which is measured for SFT and DPO alone")
        elif arguments.llamafactory is None and not arguments.quick:
            said.append("LLaMA-Factory, as no --llamafactory names an environment")
        elif not arguments.quick:
            contenders += [*LLAMAFACTORY, *(LLAMAFACTORY_TRIED if arguments.tune else [])]
    if arguments.contender is not None:
        contenders = [each for each in contenders if each.name in ("ours", *arguments.contender)]
    with workspace() as directory:
        model = make_model(arguments.model, directory, task)
        found, left_out = read_examples(task, sources, model, max_length)
        said += [f"{count} rows: {reason}" for reason, count in left_out.items() if count]
        examples = choose(found, num_steps * GLOBAL_BATCH_SIZE, "; ".join(said))
        bench = Bench(
            task, directory, model, examples, num_steps, max_length, learning_rate, our_settings(arguments), arguments.llamafactory
        )
        write_figures(arguments.json, compare(bench, contenders, arguments, said))


def compare(bench: Bench, contenders: Sequence[Contender], arguments: argparse.Namespace, left_out: list[str]) -> dict[str, Any]:
    """Run all contenders in turn, print the table, and return the figures."""
    peaks = matmul_peaks()
    results: dict[str, list[Result]] = {contender.name: [] for contender in contenders}
    for number in range(arguments.runs):
        round_started = time.monotonic()
        for contender in contenders:
            directory = bench.directory / f"run_{contender.name.replace(' ', '_')}"
            directory.mkdir()
            results[contender.name].append(RUN[contender.who](bench, contender, directory))
            shutil.rmtree(directory)
            said = results[contender.name][-1]
            print(f"run {number + 1} of {arguments.runs}: {contender.name}: {said.train_s:.1f} s in training", flush=True)
        if out_of_time(arguments, round_started, number):
            left_out.append(f"runs {number + 2} to {arguments.runs} of each contender, for want of time")
            break
    peaks = {precision: max(peak, again) for (precision, peak), again in zip(peaks.items(), matmul_peaks().values(), strict=True)}
    return _summarize(bench, contenders, results, peaks, left_out)


def out_of_time(arguments: argparse.Namespace, round_started: float, number: int) -> bool:
    """Whether another round, as long as the last, would end after what `--quick` promises."""
    now = time.monotonic()
    return arguments.quick and number + 1 < arguments.runs and 2 * now - STARTED - round_started > QUICK_S


def _summarize(
    bench: Bench, contenders: Sequence[Contender], results: dict[str, list[Result]], peaks: dict[str, float], left_out: list[str]
) -> dict[str, Any]:
    shape = read_shape(bench.model)
    passes, has_head = PASSES[bench.task], bench.task != "reward"
    flops = passes * bench.total(lambda example: example.forward_flops(shape, conventional=False, has_head=has_head))
    flops_conventional = passes * bench.total(lambda example: example.forward_flops(shape, conventional=True, has_head=has_head))
    amount = bench.total(lambda example: example.num_trained) if bench.task == "sft" else len(bench.examples)
    rows: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        runs = results[contender.name]
        seconds = statistics.median(run.train_s + run.reference_s for run in runs)
        rows[contender.name] = {
            "who": contender.who,
            "precision": contender.precision,
            "settings": contender.settings,
            "env": contender.env,
            "speed": amount / seconds,
            "seconds": seconds,
            "reference_s": statistics.median(run.reference_s for run in runs),
            "wall_s": statistics.median(run.usage.wall_s for run in runs),
            "cpu_user_s": statistics.median(run.usage.cpu_user_s for run in runs),
            "cpu_system_s": statistics.median(run.usage.cpu_system_s for run in runs),
            "peak_process_mib": statistics.median(run.usage.peak_process_bytes for run in runs) / 2**20,
            "peak_tree_mib": statistics.median(run.usage.peak_tree_bytes for run in runs) / 2**20,
            "mfu": flops / seconds / peaks["bf16"],
            "mfu_own_peak": flops / seconds / peaks[contender.precision],
            "mfu_conventional": flops_conventional / seconds / peaks["bf16"],
            "losses": runs[0].losses,
            "runs": [asdict(run) for run in runs],
        }
    figures = {
        "task": bench.task,
        **_ratios(contenders, rows),
        "unit": "supervised tokens/s" if bench.task == "sft" else "pairs/s",
        "num_steps": bench.num_steps,
        "global_batch_size": GLOBAL_BATCH_SIZE,
        "num_examples": len(bench.examples),
        "num_tokens": bench.total(lambda example: example.num_tokens),
        "num_trained_tokens": bench.total(lambda example: example.num_trained),
        "flops": flops,
        "flops_conventional": flops_conventional,
        "matmul_peaks": peaks,
        "cores": len(os.sched_getaffinity(0)),
        "left_out": left_out,
        "rows": rows,
    }
    print_figures(figures)
    return figures


def _ratios(contenders: Sequence[Contender], rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How our first row compares with the peers'; a figure that needs a row that was not run is None."""
    ours = rows[contenders[0].name]
    ours_by_precision = {c.precision: rows[c.name] for c in contenders if c.who == "ours"}
    peers = {c.name: rows[c.name] for c in contenders if c.who != "ours"}
    best = max(peers, key=lambda name: peers[name]["speed"], default=None)
    plain = {c.who: rows[c.name]["losses"] for c in reversed(contenders) if c.precision == "fp32"}
    differences = {who: loss_difference(plain["ours"], losses) for who, losses in plain.items() if who != "ours" and "ours" in plain}
    return {
        "ours": contenders[0].name,
        "ratio_default": ours["speed"] / peers["trl default"]["speed"] if "trl default" in peers else None,
        "ratio_default_in_bf16": (
            ours_by_precision["bf16"]["speed"] / peers["trl default"]["speed"]
            if "trl default" in peers and "bf16" in ours_by_precision
            else None
        ),
        "ratio_best": ours["speed"] / peers[best]["speed"] if best else None,
        "best_peer": best,
        "mfu": ours["mfu"],
        "mfu_own_peak": ours["mfu_own_peak"],
        "mfu_conventional": ours["mfu_conventional"],
        "peak_memory_ratio": ours["peak_process_mib"] / peers[best]["peak_process_mib"] if best else None,
        "peak_memory_ratios": {name: ours["peak_process_mib"] / row["peak_process_mib"] for name, row in peers.items()},
        "loss_max_rel_diff": differences.get("trl"),
        "loss_max_rel_diffs": differences,
        "first_losses": {name: row["losses"][0] for name, row in rows.items()},
    }


def loss_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference of two courses of losses, step by step, relative to theirs."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def print_figures(figures: dict[str, Any]) -> None:
    """The table, and the figures below it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    heads = (figures["unit"], "to the first", "s", "of it reference", "wall s", "CPU s user + system", "MiB process", "MiB all")
    table = Table("contender", *heads, "MFU bf16 peak", "MFU own peak", "first loss", "last loss")
    first = next(iter(figures["rows"].values()))
    for name, row in figures["rows"].items():
        table.add_row(
            name,
            f"{row['speed']:,.2f}",
            f"{row['speed'] / first['speed']:.2f}",
            f"{row['seconds']:.1f}",
            f"{row['reference_s']:.1f}",
            f"{row['wall_s']:.1f}",
            f"{row['cpu_user_s']:.0f} + {row['cpu_system_s']:.0f}",
            f"{row['peak_process_mib']:,.0f}",
            f"{row['peak_tree_mib']:,.0f}",
            f"{row['mfu']:.1%}",
            f"{row['mfu_own_peak']:.1%}",
            f"{row['losses'][0]:.6f}",
            f"{row['losses'][-1]:.6f}",
        )
    console.print(table)
    if figures["loss_max_rel_diffs"]:
        courses = {name: row["losses"] for name, row in figures["rows"].items() if row["precision"] == "fp32"}
        losses = Table("step", *courses)
        for step, values in enumerate(zip(*courses.values(), strict=True), 1):
            losses.add_row(str(step), *(f"{value:.7f}" for value in values))
        console.print(losses)
    keys = ("ratio_default", "ratio_best", "best_peer", "mfu", "mfu_own_peak", "mfu_conventional", "peak_memory_ratio", "loss_max_rel_diff")
    for key in keys:
        value = figures[key]
        console.print(f"{key}: {'-' if value is None else f'{value:.4g}' if isinstance(value, float) else value}")
    peaks = figures["matmul_peaks"]
    console.print(f"matrix products: {peaks['fp32'] / 1e9:.0f} GFLOP/s in fp32, {peaks['bf16'] / 1e9:.0f} in bf16")
    for what in figures["left_out"]:
        console.print(f"left out: {what}", soft_wrap=True)


def write_figures(path: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures where asked."""
    if path is not None:
        plain = json.dumps(figures, indent=1, default=str)
        path.write_text(plain.replace("NaN", "null") + "\n", encoding="utf-8")
