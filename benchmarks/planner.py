"""What `plan` says of memory, against what ranks take here; and what it says of GPUs, against what others published of theirs.

    python benchmarks/planner.py [measured|published] [--quick] [--json FILE]

measured: small models with random weights are trained by `posttrain run`, on one and two ranks, without DeepSpeed and under ZeRO-1,
2 and 3, with and without recomputed activations, adapters and experts. After two steps, when the optimizer has all its state, the ranks are
killed. Measured is by how much the anonymous memory of a rank has grown by then over that of the warm parent which it was forked
from; of two ranks the larger. The C library keeps what is freed (`posttrain/machine.py`), so growth is a peak. What a rank grows by with a
model of a million parameters, beyond what is planned for that, is what libraries take, as `runtime` has it: it is taken off, and
the rest is compared with what `plan --json` says without its `runtime`.

published: runs on GPUs whose settings are known, by their sources. Nothing is run.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from measured import write_lines

from posttrain import planner
from posttrain.hardware import HARDWARE
from posttrain.planner import Job, Shape, shape_of

CORES = "POSTTRAIN_CORES"
"""As in `posttrain/worker.py`, which imports torch."""

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "posttrain" / "quickstart" / "base"
SAMPLE_EVERY_S = 0.1
MEASURED_STEPS, NUM_STEPS = 2, 6
WORDS = "the a bird sky blue how many are there and why it is red green tree water house count turn list over word"


# --- measured --------------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "20M": {"hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1376, "num_key_value_heads": 4, "vocab_size": 4096},
    "30M, untied": {
        "hidden_size": 576,
        "num_hidden_layers": 6,
        "intermediate_size": 1536,
        "num_key_value_heads": 9,
        "num_attention_heads": 9,
        "vocab_size": 4096,
        "tie_word_embeddings": False,
    },
    "12M, half of it a table": {"hidden_size": 384, "num_hidden_layers": 4, "intermediate_size": 1024, "vocab_size": 16384},
    "26M, experts": {
        "hidden_size": 384,
        "num_hidden_layers": 4,
        "intermediate_size": 1024,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


@dataclass(frozen=True)
class Setting:
    """One run."""

    name: str
    model: str
    ranks: int = 1
    zero: int | None = None
    kind: str = "sft"
    config: Mapping[str, Any] = field(default_factory=dict)


BARE = {
    False: Setting("libraries alone", "1M"),
    True: Setting("libraries alone, DeepSpeed", "1M", zero=2),
}
"""By whether DeepSpeed is used."""
SETTINGS = (
    Setting("one rank", "20M"),
    Setting("two ranks", "20M", ranks=2),
    Setting("two ranks, ZeRO-1", "20M", ranks=2, zero=1),
    Setting("two ranks, ZeRO-2", "20M", ranks=2, zero=2),
    Setting("two ranks, ZeRO-3", "20M", ranks=2, zero=3),
    Setting("ZeRO-1", "20M", zero=1),
    Setting("ZeRO-2", "20M", zero=2),
    Setting("ZeRO-3", "20M", zero=3),
    Setting("1,024 tokens at once", "20M", config={"global_batch_size": 8, "micro_batch_tokens": 1024}),
    Setting("1,024 tokens, recomputed", "20M", config={"gradient_checkpointing": True, "global_batch_size": 8, "micro_batch_tokens": 1024}),
    Setting("untied", "30M, untied"),
    Setting("adapters", "30M, untied", config={"lora": {"r": 16}}),
    Setting("DPO", "20M", kind="dpo"),
    Setting("a large table", "12M, half of it a table"),
    Setting("experts", "26M, experts"),
    Setting("bf16", "20M", config={"bf16": True}),
    Setting("two ranks, ZeRO-3, untied", "30M, untied", ranks=2, zero=3),
    Setting("two ranks, ZeRO-2, bf16", "30M, untied", ranks=2, zero=2, config={"bf16": True}),
    Setting("two ranks, DPO, ZeRO-2", "20M", ranks=2, zero=2, kind="dpo"),
    Setting("two ranks, ZeRO-3, recomputed", "30M, untied", ranks=2, zero=3, config={"gradient_checkpointing": True}),
)
QUICK = ("one rank", "1,024 tokens, recomputed", "two ranks, ZeRO-2", "two ranks, ZeRO-3")


def make_model(path: Path, name: str) -> None:
    """Write a model with random weights and the tokenizer of the quickstart, whose tokens are fewer than it has room for."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    settings = {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        **MODELS[name],
    }
    torch.manual_seed(0)
    built: Any = (
        MixtralForCausalLM(MixtralConfig(**settings)) if "num_local_experts" in settings else LlamaForCausalLM(LlamaConfig(**settings))
    )
    built.save_pretrained(path)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(path)


def write_data(directory: Path) -> None:
    """Conversations and pairs, all longer than they may be, so that each is cut to the longest that is allowed."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choices(WORDS.split(), k=count))

    write_lines(directory / "chat.jsonl", [{"prompt": words(5) + "?", "completion": words(150)} for _ in range(64)])
    pairs = [{"prompt": words(5) + "?", "chosen": words(150), "rejected": words(150)} for _ in range(64)]
    write_lines(directory / "pairs.jsonl", pairs)


def write_pipeline(directory: Path, setting: Setting) -> Path:
    """The pipeline file of a setting: a step is two samples of 128 tokens for each rank, one at a time."""
    zero = {} if setting.zero is None else {"deepspeed": str(ROOT / "ds_configs" / f"zero{setting.zero}.json")}
    stage = {
        "kind": setting.kind,
        "inputs": {"policy": "base", "data": "data"},
        "global_batch_size": 2 * setting.ranks,
        "max_steps": NUM_STEPS,
        "max_length": 128,
        "micro_batch_tokens": 128,
        "on_overflow": "truncate",
        "save_minutes": None,
        "preflight": {"unstopped": 1.0, "over_max_length": 1.0, "duplicates": 1.0},
        **zero,
        **setting.config,
    }
    sources = {
        "base": {"model": str(TOKENIZER if setting.model == "1M" else directory / setting.model)},
        "data": {"data": str(directory / ("pairs.jsonl" if setting.kind == "dpo" else "chat.jsonl"))},
    }
    name = "".join(letter if letter.isalnum() else "-" for letter in setting.name)
    path = directory / f"{name}.yaml"
    pipeline = {"run": name, "sources": sources, "stages": {"stage": stage}, "launcher": {"kind": "local", "num_processes": setting.ranks}}
    path.write_text(json.dumps(pipeline))  # which is YAML too
    return path


def call(*arguments: object) -> int:
    """A command of the project, in this process, so that the libraries are imported once for all settings."""
    import pipeline

    sys.argv = ["pipeline.py", *map(str, arguments)]
    return pipeline.main()


def anonymous_bytes(pid: int) -> int | None:
    """Memory of a process that is backed by no file; None where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), None)


def children(pid: int) -> list[int]:
    """Processes that a process started and that are there now."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except OSError:
            continue
    return found


class Sampler(threading.Thread):
    """Waits until the stage in `directory` has made its steps, notes by how much each rank has grown, and kills the ranks."""

    def __init__(self, directory: Path) -> None:
        super().__init__(daemon=True)
        self.directory = directory
        self.grown: list[int] = []
        self.is_done = threading.Event()

    def run(self) -> None:
        """Wait, note and kill."""
        metrics = self.directory / "metrics.jsonl"
        while not metrics.is_file() or metrics.read_text().count("\n") < MEASURED_STEPS:
            if self.is_done.wait(SAMPLE_EVERY_S):
                return
        # Ranks are forked from the warm parent, which was started from here; while they train it has no other children.
        ranks = [(rank, parent) for parent in children(os.getpid()) for rank in children(parent)]
        self.grown = [(anonymous_bytes(rank) or 0) - (anonymous_bytes(parent) or 0) for rank, parent in ranks]
        for rank, _ in ranks:
            os.kill(rank, signal.SIGKILL)


def measure(directory: Path, setting: Setting) -> dict[str, Any]:
    """Plan and run one setting."""
    path = write_pipeline(directory, setting)
    read, write = os.pipe()
    kept = os.dup(1)
    os.dup2(write, 1)
    try:
        code = call("plan", path, "--root", directory / "runs", "--json")
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(write)
    with os.fdopen(read) as pipe:
        planned = pipe.read()
    assert code == 0, planned
    needs = json.loads(planned)[0]["needs"]
    stage = directory / "runs" / path.stem / "stage"
    sampler = Sampler(stage)
    sampler.start()
    log = os.open(directory / f"{path.stem}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    try:
        code = call("run", path, "--root", directory / "runs")
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        sampler.is_done.set()
        sampler.join()
    if not sampler.grown:
        said = (directory / f"{path.stem}.log").read_text()
        raise RuntimeError(f"{setting.name} ended with {code} before it was measured:\n{said}")
    # Nothing is published.
    predicted = max(size for phase, size in needs["phases"].items() if phase != "publish") - needs["memory"]["runtime"]
    grown = max(sampler.grown)
    return {
        "setting": setting.name,
        "model": setting.model,
        "predicted": predicted,
        "grown": grown,
        "memory": needs["memory"],
        "layout": json.loads((stage / "layout.json").read_text()),
    }


def run_measured(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """All settings, each with a line as soon as it is known."""
    # One thread for each rank: where others compute too, several wait for one another without end, and memory is the same.
    os.environ |= {"HF_HUB_OFFLINE": "1", CORES: "1"}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        chosen = [setting for setting in SETTINGS if setting.name in names]
        for model in dict.fromkeys(setting.model for setting in chosen):
            make_model(directory / model, model)
        write_data(directory)
        bare = {}
        for is_deepspeed in sorted({setting.zero is not None for setting in chosen}):
            found = measure(directory, BARE[is_deepspeed])
            bare[is_deepspeed] = found["grown"] - found["predicted"]
            print(f"{BARE[is_deepspeed].name}: {bare[is_deepspeed] / 1e6:,.0f} MB", flush=True)
        print("| setting | model | predicted MB | measured MB | error |\n|---|---|---|---|---|")
        for setting in chosen:
            row = measure(directory, setting)
            row["measured"] = row["grown"] - bare[setting.zero is not None]
            row["error"] = row["predicted"] / row["measured"] - 1
            rows.append(row)
            megabytes = f"{row['predicted'] / 1e6:,.0f} | {row['measured'] / 1e6:,.0f}"
            print(f"| {row['setting']} | {row['model']} | {megabytes} | {row['error']:+.0%} |", flush=True)
    errors = [abs(row["error"]) for row in rows]
    print(f"\nmedian error {statistics.median(errors):.1%}, largest {max(errors):.1%}, {len(rows)} settings")
    return rows


# --- published -------------------------------------------------------------------------------------------------------


def decoder(hidden: int, layers: int, intermediate: int, heads: int, keys: int, vocabulary: int, *, gated: bool = True) -> Shape:
    """The shape of a decoder with a head of its own; without a gate also that of GPT, OPT and MPT, their tables tied."""
    width = keys * (hidden // heads)
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    if gated:
        tensors["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors |= {f"{at}.self_attn.{name}.weight": (hidden, hidden) for name in ("q_proj", "o_proj")}
        tensors |= {f"{at}.self_attn.{name}.weight": (width, hidden) for name in ("k_proj", "v_proj")}
        tensors |= {f"{at}.mlp.{name}.weight": (intermediate, hidden) for name in (("gate_proj", "up_proj") if gated else ("fc1",))}
        tensors[f"{at}.mlp.down_proj.weight"] = (hidden, intermediate)
    config = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate, "vocab_size": vocabulary}
    return shape_of({**config, "num_attention_heads": heads, "num_key_value_heads": keys}, tensors)


SHAPES = {
    "Llama-3.1-8B": decoder(4096, 32, 14336, 32, 8, 128256),
    "Llama-3.1-70B": decoder(8192, 80, 28672, 64, 8, 128256),
    "Llama-3.1-405B": decoder(16384, 126, 53248, 128, 8, 128256),
    "LLaMA-7B": decoder(4096, 32, 11008, 32, 32, 32000),
    "Mistral-7B": decoder(4096, 32, 14336, 32, 8, 32000),
    "OLMo-2-1B": decoder(2048, 16, 8192, 16, 16, 100352),
    "Qwen-1.8B": decoder(2048, 24, 5504, 16, 16, 151936),
    "Qwen-7B": decoder(4096, 32, 11008, 32, 32, 151936),
    "Qwen-14B": decoder(5120, 40, 13696, 40, 40, 152064),
    "Qwen-72B": decoder(8192, 80, 24576, 64, 64, 152064),
    "MPT-7B": decoder(4096, 32, 16384, 32, 32, 50432, gated=False),
    "MPT-30B": decoder(7168, 48, 28672, 64, 64, 50432, gated=False),
    "MPT-70B": decoder(8192, 80, 32768, 64, 64, 50432, gated=False),
    "OPT-350M": decoder(1024, 24, 4096, 16, 16, 50272, gated=False),
    "OPT-6.7B": decoder(4096, 32, 16384, 32, 32, 50272, gated=False),
    "OPT-13B": decoder(5120, 40, 20480, 40, 40, 50272, gated=False),
    "OPT-30B": decoder(7168, 48, 28672, 56, 56, 50272, gated=False),
    "OPT-66B": decoder(9216, 64, 36864, 72, 72, 50272, gated=False),
}
FOUNDRY = "MosaicML, llm-foundry, scripts/train/benchmarking/README.md"
QWEN = "Qwen, README.md of QwenLM/Qwen, Profiling of Memory and Speed"
CHAT = "Yao et al., 2023, DeepSpeed-Chat, blogs/deepspeed-chat/README.md, tables 1, 2"
TULU = "Lambert et al., 2024, Tulu 3 (arXiv 2411.15124)"
TITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1, 3"
KEMPNER = "Kempner Institute, KempnerForge, Benchmarks"
OLMO = "Ai2, open-instruct, docs/olmo2.md"


@dataclass(frozen=True)
class Case:
    """A published figure: `tokens/s` of one GPU, `hours` of a run, or `GB` on one GPU."""

    what: str
    published: float
    model: str
    run: str
    hardware: str
    source: str
    job: Job

    def predicted(self) -> float:
        """The same figure as the planner has it."""
        shape, hardware = SHAPES[self.model], HARDWARE[self.hardware]
        if self.what == "GB":
            return planner.memory(shape, self.job, hardware).total / 1e9
        timed = planner.time(shape, self.job, hardware)
        if self.what == "hours":
            assert timed.total_s is not None
            return timed.total_s / 3600
        return timed.tokens_per_s / self.job.world_size


def job(
    world_size: int,
    length: int,
    at_once: int,
    batch: int,
    *,
    kind: str = "sft",
    zero: int | None = 3,
    steps: int | None = None,
    **more: Any,
) -> Job:
    """A job whose samples are all of one length, `at_once` of them in a micro-batch."""
    sequences = 2 if kind == "dpo" else 1
    fields: dict[str, Any] = {
        "zero_stage": zero,
        "max_length": length,
        "tokens_per_row": float(length * sequences),
        "num_steps": steps,
        "bucket_numbers": 500_000_000,
    }
    return Job(kind, world_size, 8, global_batch_size=batch, micro_batch_tokens=at_once * length * sequences, **{**fields, **more})


def lora(model: str, rank: int, **more: Any) -> dict[str, Any]:
    """Adapters on every linear matrix, as Qwen's scripts have them."""
    shape = SHAPES[model]
    widths = 3 * shape.hidden_size + shape.hidden_size + 2 * shape.hidden_size + 3 * (shape.hidden_size + shape.hidden_width)
    return {"num_trained": rank * shape.num_layers * widths, **more}


def chat(gpus: int, **more: Any) -> Job:
    """Step 3 of DeepSpeed-Chat: 131.9 thousand prompts and answers of 256 tokens each, 1,024 a step, with a reward model of 350M."""
    sampled: dict[str, Any] = {
        "max_completion_length": 256,
        "tokens_per_row": 256.0,
        "is_referenced": True,
        "judges": (SHAPES["OPT-350M"],),
    }
    return job(gpus, 512, 8, 1024, kind="rlhf", steps=129, recompute=True, **sampled, **more)


CASES = (
    Case("tokens/s", 10643, "MPT-7B", "pretraining, 8 GPUs, 2,048 tokens", "h100-80gb", FOUNDRY, job(8, 2048, 6, 48, recompute=False)),
    Case("tokens/s", 8611, "MPT-7B", "8 GPUs, 4,096, recomputed", "h100-80gb", FOUNDRY, job(8, 4096, 16, 256, recompute=True)),
    Case("tokens/s", 2002, "MPT-30B", "8 GPUs, 2,048, recomputed", "h100-80gb", FOUNDRY, job(8, 2048, 3, 504, recompute=True)),
    Case("tokens/s", 1039, "MPT-70B", "64 GPUs, 2,048, recomputed", "h100-80gb", FOUNDRY, job(64, 2048, 8, 2048, recompute=True)),
    Case("tokens/s", 4641, "MPT-7B", "8 GPUs, 2,048", "a100-80gb", FOUNDRY, job(8, 2048, 6, 96, recompute=False)),
    Case("tokens/s", 3684, "MPT-7B", "8 GPUs, 4,096, recomputed", "a100-80gb", FOUNDRY, job(8, 4096, 16, 256, recompute=True)),
    Case("tokens/s", 916, "MPT-30B", "8 GPUs, 2,048, recomputed", "a100-80gb", FOUNDRY, job(8, 2048, 3, 504, recompute=True)),
    Case("tokens/s", 410, "MPT-70B", "64 GPUs, 2,048, recomputed", "a100-80gb", FOUNDRY, job(64, 2048, 8, 2048, recompute=True)),
    Case("tokens/s", 5762, "Llama-3.1-8B", "pretraining, 8 GPUs of 500 W, 8,192", "h100-80gb", TITAN, job(8, 8192, 2, 16, recompute=False)),
    Case("tokens/s", 5605, "Llama-3.1-8B", "128 GPUs of 500 W, 8,192", "h100-80gb", TITAN, job(128, 8192, 2, 256, recompute=False)),
    Case("tokens/s", 9746, "LLaMA-7B", "4 GPUs, 4,096, recomputed", "h200-141gb", KEMPNER, job(4, 4096, 8, 128, recompute=True)),
    Case("tokens/s", 3151, "Qwen-7B", "LoRA, 1 GPU, 2,048, recomputed", "a100-80gb", QWEN,
         job(1, 2048, 1, 8, zero=None, recompute=True, **lora("Qwen-7B", 64))),
    Case("tokens/s", 1707, "Qwen-7B", "the same, 256", "a100-80gb", QWEN,
         job(1, 256, 1, 8, zero=None, recompute=True, **lora("Qwen-7B", 64))),
    Case("tokens/s", 1950, "Qwen-14B", "LoRA, 1 GPU, 2,048, recomputed", "a100-80gb", QWEN,
         job(1, 2048, 1, 8, zero=None, recompute=True, **lora("Qwen-14B", 64))),
    Case("tokens/s", 2341, "Qwen-7B", "4 bits, 1 GPU, 2,048, recomputed", "a100-80gb", QWEN,
         job(1, 2048, 1, 8, zero=None, recompute=True, **lora("Qwen-7B", 64, in_4bit=True))),
    Case("tokens/s", 275, "Qwen-72B", "4 bits, 1 GPU, 2,048, recomputed", "a100-80gb", QWEN,
         job(1, 2048, 1, 8, zero=None, recompute=True, **lora("Qwen-72B", 64, in_4bit=True))),
    Case("tokens/s", 1820, "Qwen-7B", "ZeRO-3, 2 GPUs, 1,024, recomputed", "a100-80gb", QWEN, job(2, 1024, 1, 16, recompute=True)),
    Case("tokens/s", 359, "Qwen-72B", "LoRA, ZeRO-3, 4 GPUs, 2,048, recomputed", "a100-80gb", QWEN,
         job(4, 2048, 1, 32, recompute=True, **lora("Qwen-72B", 64))),
    Case("hours", 3, "Mistral-7B", "Zephyr SFT, 16 GPUs, 290M tokens in rows of 2,048; `2 to 4`", "a100-80gb",
         "Tunstall et al., 2023, Zephyr (arXiv 2310.16944), sec. 4", job(16, 2048, 8, 128, steps=1107, recompute=True)),
    Case("hours", 3, "Mistral-7B", "Zephyr DPO, 16 GPUs, 3 times 61,135 pairs, 450 tokens taken; `2 to 4`", "a100-80gb",
         "the same", job(16, 450, 2, 32, kind="dpo", steps=5731, recompute=True)),
    Case("hours", 6, "Llama-3.1-8B", "Tulu 3 SFT, 32 GPUs, twice 939,344 rows, 650 tokens taken", "h100-80gb", TULU,
         job(32, 650, 1, 128, steps=14677, recompute=False)),
    Case("hours", 50, "Llama-3.1-70B", "Tulu 3 SFT, 64 GPUs, the same rows", "h100-80gb", TULU,
         job(64, 650, 1, 128, steps=14677, recompute=True)),
    Case("hours", 10, "Llama-3.1-8B", "Tulu 3 DPO, 8 GPUs, 271,409 pairs, 650 tokens taken", "h100-80gb", TULU,
         job(8, 650, 1, 128, kind="dpo", steps=2120, recompute=True)),
    Case("hours", 19, "Llama-3.1-70B", "Tulu 3 DPO, 64 GPUs, 334,302 pairs, offloaded", "h100-80gb", TULU,
         job(64, 650, 1, 128, kind="dpo", steps=2612, recompute=True, offload_optimizer=True, offload_weights=True)),
    Case("hours", 9, "OLMo-2-1B", "SFT, 8 GPUs, twice 866,000 rows, 2 at once, 650 tokens taken", "h100-80gb", OLMO,
         job(8, 650, 2, 128, steps=13531, recompute=False)),
    Case("hours", 2, "OLMo-2-1B", "DPO, ZeRO-2, 8 GPUs, 378,000 pairs, 8 at once", "h100-80gb", OLMO,
         job(8, 650, 8, 128, kind="dpo", zero=2, steps=2953, recompute=True)),
    Case("hours", 4.1, "OPT-6.7B", "RLHF, 8 GPUs", "a100-80gb", CHAT, chat(8)),
    Case("hours", 9, "OPT-13B", "RLHF, 8 GPUs", "a100-80gb", CHAT, chat(8)),
    Case("hours", 18, "OPT-30B", "RLHF, 8 GPUs", "a100-80gb", CHAT, chat(8)),
    Case("hours", 1.25, "OPT-13B", "RLHF, 64 GPUs", "a100-80gb", CHAT, chat(64)),
    Case("hours", 4, "OPT-30B", "RLHF, 64 GPUs", "a100-80gb", CHAT, chat(64)),
    Case("hours", 7.5, "OPT-66B", "RLHF, 64 GPUs", "a100-80gb", CHAT, chat(64)),
    Case("hours", 3, "LLaMA-7B", "Alpaca, 8 GPUs, 3 times 52,002 rows of up to 512 tokens, 4 at once", "a100-80gb",
         "Taori et al., 2023, Stanford Alpaca", job(8, 200, 4, 128, steps=1218, recompute=False)),
    Case("GB", 20.1, "Qwen-7B", "LoRA, 256 tokens", "a100-80gb", QWEN, job(1, 256, 1, 8, zero=None, recompute=True, **lora("Qwen-7B", 64))),
    Case("GB", 23.8, "Qwen-7B", "LoRA, 2,048 tokens", "a100-80gb", QWEN,
         job(1, 2048, 1, 8, zero=None, recompute=True, **lora("Qwen-7B", 64))),
    Case("GB", 36.6, "Qwen-7B", "LoRA, 8,192 tokens", "a100-80gb", QWEN,
         job(1, 8192, 1, 8, zero=None, recompute=True, **lora("Qwen-7B", 64))),
    Case("GB", 34.6, "Qwen-14B", "LoRA, 256 tokens", "a100-80gb", QWEN,
         job(1, 256, 1, 8, zero=None, recompute=True, **lora("Qwen-14B", 64))),
    Case("GB", 11.5, "Qwen-7B", "4 bits, 256 tokens", "a100-80gb", QWEN,
         job(1, 256, 1, 8, zero=None, recompute=True, **lora("Qwen-7B", 64, in_4bit=True))),
    Case("GB", 61.4, "Qwen-72B", "4 bits, 256 tokens", "a100-80gb", QWEN,
         job(1, 256, 1, 8, zero=None, recompute=True, **lora("Qwen-72B", 64, in_4bit=True))),
    Case("GB", 53.9, "Qwen-72B", "LoRA, ZeRO-3, 4 GPUs, 256 tokens", "a100-80gb", QWEN,
         job(4, 256, 1, 32, recompute=True, **lora("Qwen-72B", 64))),
    Case("GB", 69.6, "Qwen-7B", "ZeRO-3, 2 GPUs, 256 tokens", "a100-80gb", QWEN, job(2, 256, 1, 16, recompute=True)),
    Case("GB", 43.5, "Qwen-1.8B", "1 GPU, 256 tokens", "a100-80gb", QWEN, job(1, 256, 1, 8, zero=None, recompute=True)),
)  # fmt: skip


def run_published() -> list[dict[str, Any]]:
    """Every case, predicted and published."""
    print("| figure | model | run | hardware | published | predicted | ratio |\n|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for case in CASES:
        predicted = case.predicted()
        ratio = predicted / case.published
        rows.append(
            {"what": case.what, "model": case.model, "run": case.run, "published": case.published, "predicted": predicted, "ratio": ratio}
        )
        shown = f"{case.published:,g} | {predicted:,.0f}" if case.what == "tokens/s" else f"{case.published:g} | {predicted:.1f}"
        print(f"| {case.what} | {case.model} | {case.run} | {case.hardware} | {shown} | {ratio:.2f} |")
    for what in dict.fromkeys(case.what for case in CASES):
        off = [max(row["ratio"], 1 / row["ratio"]) for row in rows if row["what"] == what]
        print(f"{what}: off by a factor of {statistics.median(off):.2f} in the median, {max(off):.2f} at most, {len(off)} figures")
    return rows


# --- the command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["measured", "published"], default="measured")
    parser.add_argument("--quick", action="store_true", help="four settings")
    parser.add_argument("--only", action="append", help="a setting by its name; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.what == "published":
        rows = run_published()
    else:
        rows = run_measured(tuple(arguments.only or (QUICK if arguments.quick else [setting.name for setting in SETTINGS])))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
