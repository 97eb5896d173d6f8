"""How much memory of its machine a rank takes while a large model is loaded, trained and published under ZeRO-3 or FSDP2, phase by phase.

    python benchmarks/host_memory.py [--layers N] [--ranks N] [--fsdp] [--lora] [--json FILE]

One step of SFT by plain SGD, which keeps no state, on short rows, of a model with random weights: 20 layers are 1.0 billion
parameters. Counted is the anonymous memory of the process that has most, less what it has before the model: pages of files are
the kernel's to take back. What shards need is counted by hand: 4 bytes of a parameter to load it; with DeepSpeed's own copy and
the gradient 12 where it is published; each shared out among ranks. With adapters the 4 bytes are
all but for the two tables of tokens, which are trained as the model gets new ones: other weights are frozen. Under FSDP2 they are all,
as it keeps neither a copy nor, by then, gradients. The target is 1.3 times that.

What does not grow with a model is scaled down with this one: DeepSpeed keeps up to a tenth of the weights gathered, where its default of a
billion numbers would be all of them, and files of weights have a sixteenth of them, where they would be one or two.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from measured import run_measured, tree, write_lines

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "posttrain" / "quickstart"
VOCABULARY, WIDTH = 32000, 2048
LOAD_BYTES, PUBLISH_BYTES = 4, 12
"""Bytes for each parameter, over all ranks, that shards need by the end of a phase; the first of both if weights are all that is kept."""


def make_model(directory: Path, num_layers: int) -> int:
    """Write a model with random weights in bfloat16, and return how many parameters it has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(QUICKSTART / "base", directory, ignore=shutil.ignore_patterns("*.safetensors"))
    shape = {"intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    known = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    ids = {name: known[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in known}
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, **shape, **ids, num_hidden_layers=num_layers, tie_word_embeddings=False)
    )
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory)
    return model.num_parameters()


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file stands behind; 0 where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def main() -> None:
    """Run the stage, print a line for each phase, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20, help="layers of the model")
    parser.add_argument("--ranks", type=int, default=2, help="number of processes")
    parser.add_argument("--fsdp", action="store_true", help="share the model out by FSDP2, and not by ZeRO-3")
    parser.add_argument("--lora", action="store_true", help="train adapters, which are merged where they are published")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="posttrain-benchmark-") as scratch:
        directory = Path(scratch)
        num_parameters = make_model(directory / "model", arguments.layers)
        write_lines(directory / "rows.jsonl", [{"prompt": f"count to {n}", "completion": "1 2 3"} for n in range(8)])
        training = {"max_steps": 1, "global_batch_size": arguments.ranks, "optim": "sgd", "num_processes": arguments.ranks}
        training |= {"max_shard_size": 2 * num_parameters // 16, "lora": {} if arguments.lora else None}
        zero = json.loads((ROOT / "ds_configs" / "zero3.json").read_text(encoding="utf-8"))
        kept = dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), num_parameters // 10)
        zero["zero_optimization"] |= kept
        (directory / "zero3.json").write_text(json.dumps(zero))
        way = {"fsdp": "full_shard"} if arguments.fsdp else {"deepspeed": str(directory / "zero3.json")}
        stage = {"inputs": {"policy": "base", "data": "rows"}, **training, **way}
        sources = {"base": {"model": str(directory / "model")}, "rows": {"data": str(directory / "rows.jsonl")}}
        (directory / "config.yaml").write_text(json.dumps({"run": "memory", "sources": sources, "stages": {"sft": stage}}))
        peaks: dict[str, int] = {}

        def watch() -> None:
            try:
                phase = json.loads((directory / "runs" / "memory" / "sft" / "progress.json").read_text())["phase"]
            except (OSError, ValueError):
                return
            peaks[phase] = max(peaks.get(phase, 0), *map(anonymous_bytes, tree(os.getpid())[1:]))

        command = [sys.executable, str(ROOT / "pipeline.py"), "run", str(directory / "config.yaml"), "--root", str(directory / "runs")]
        run_measured(command, env={"HF_HUB_OFFLINE": "1"}, log=directory / "log", watch=watch)
    before = next(iter(peaks.values()))
    rows: dict[str, Any] = {}
    num_trained = 0 if arguments.fsdp else 2 * VOCABULARY * WIDTH if arguments.lora else num_parameters
    needs = {"load model": LOAD_BYTES * num_parameters}
    needs["publish"] = LOAD_BYTES * num_parameters + (PUBLISH_BYTES - LOAD_BYTES) * num_trained
    for phase, peak in peaks.items():
        rows[phase] = {"peak_bytes": peak - before}
        line = f"{phase:16} {(peak - before) / 2**30:6.2f} GiB"
        if whole := needs.get(phase):
            needed = whole / arguments.ranks
            rows[phase] |= {"needed_bytes": needed, "ratio": (peak - before) / needed}
            line += f", {(peak - before) / needed:.2f} times the {needed / 2**30:.2f} GiB that shards need"
        print(line)
    if arguments.json:
        figures = {"num_parameters": num_parameters, "num_ranks": arguments.ranks, "before_bytes": before, "phases": rows}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
