"""Held-out loss and preference accuracy of saved models: the plain script that one writes who has no pipeline.

  python benchmarks/heldout_loss.py --rows FILE --json FILE MODEL ...

A row is `{"prompt", "completion"}` or `{"prompt", "chosen", "rejected"}`, all text. Answers are scored in fp32, in padded batches of
like lengths.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH_SIZE = 8


def main() -> None:
    """Score every model, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="directories of saved models")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL file of held-out rows")
    parser.add_argument("--json", type=Path, required=True, help="file to write the figures to")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.rows.read_text(encoding="utf-8").splitlines()]
    found = {str(model): score(model, rows) for model in arguments.models}
    print(json.dumps(found, indent=1))
    arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@torch.inference_mode()
def score(path: Path, rows: list[dict[str, str]]) -> dict[str, float]:
    """The loss over all tokens of the completions, and the share of pairs whose chosen answer is the likelier."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    answers = [(number, name) for number, row in enumerate(rows) for name in row if name != "prompt"]
    ids = {key: tokenizer(rows[key[0]]["prompt"] + rows[key[0]][key[1]]).input_ids for key in answers}
    starts = {number: len(tokenizer(row["prompt"]).input_ids) for number, row in enumerate(rows)}
    logps: dict[tuple[int, str], float] = {}
    answers.sort(key=lambda key: len(ids[key]))
    for first in range(0, len(answers), BATCH_SIZE):
        batch = answers[first : first + BATCH_SIZE]
        padded = tokenizer.pad({"input_ids": [ids[key] for key in batch]}, return_tensors="pt", padding_side="right")
        scored = model(**padded).logits[:, :-1].log_softmax(-1).gather(-1, padded["input_ids"][:, 1:, None])[..., 0]
        for line, key in enumerate(batch):
            logps[key] = float(scored[line, starts[key[0]] - 1 : len(ids[key]) - 1].sum())
    completions = [key for key in logps if key[1] == "completion"]
    pairs = [number for number, name in logps if name == "chosen"]
    num_tokens = sum(len(ids[key]) - starts[key[0]] for key in completions)
    wins = sum(logps[number, "chosen"] > logps[number, "rejected"] for number in pairs)
    return {"nll": -sum(logps[key] for key in completions) / num_tokens, "preference accuracy": wins / len(pairs)}


if __name__ == "__main__":
    main()
