"""Makes what the quickstart starts from: its data, and its base language model, trained from scratch.

  python -m posttrain.quickstart.make data DIR      sft.jsonl pairs.jsonl heldout.jsonl heldout_pairs.jsonl, in a second
  python -m posttrain.quickstart.make base DIR      a tokenizer and a Llama of about 0.9 M parameters, in about twelve minutes on one core

Both are shipped beside this file, so a user never has to run it. It is here because a base model that nobody can make
again is a black box. The data are the same bytes on every machine; the weights differ in rounding from one machine to another.

The base model is what a real one is: it continues text, was never shown a chat, has `<s>` and `</s>` and no pad token,
and no chat template. SFT has to bring all of that.
"""

import argparse
import json
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.quickstart import tasks

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
VOCABULARY = 1024
"""Rows of the embedding. The corpus has merges for some 850 tokens; as in many real models, the rest is padding."""
NUM_SFT_ROWS, NUM_PAIRS, NUM_HELDOUT, NUM_HELDOUT_PAIRS = 2400, 1600, 480, 200

NUM_STEPS = 10_000
BATCH_DOCUMENTS = 16
"""Small on purpose: many small steps teach a small model to copy in half the tokens that large batches need."""
NUM_DOCUMENTS = NUM_STEPS * BATCH_DOCUMENTS
NUM_TOKENIZER_DOCUMENTS = 20_000
WARMUP_STEPS = 100
PEAK_LEARNING_RATE = 1.5e-3


def write_data(directory: Path) -> None:
    """Write the four data files."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in data_files().items():
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def data_files() -> dict[str, list[tasks.Row]]:
    """The rows of each data file, by file name."""
    return {
        "sft.jsonl": tasks.sft_rows(NUM_SFT_ROWS),
        "pairs.jsonl": tasks.pair_rows(NUM_PAIRS),
        "heldout.jsonl": tasks.heldout_rows(NUM_HELDOUT),
        "heldout_pairs.jsonl": tasks.pair_rows(NUM_HELDOUT_PAIRS, part="heldout"),
    }


def write_base(directory: Path, num_steps: int = NUM_STEPS, num_documents: int = NUM_DOCUMENTS) -> None:
    """Train the tokenizer and the model on the corpus, and write both in Hugging Face layout."""
    documents = list(tasks.corpus(num_documents))
    tokenizer = train_tokenizer(documents[:NUM_TOKENIZER_DOCUMENTS])
    model = new_model(tokenizer)
    pretrain(model, batches(tokenizer, documents), num_steps)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_tokenizer(documents: Iterable[str]) -> "PreTrainedTokenizerFast":
    """A byte-level BPE, with every digit a token of its own so that sums can be learnt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, EOS], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, model_max_length=512)


def new_model(tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    """A Llama with random weights, the same ones every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.08,  # about 1 / sqrt(hidden_size): with the usual 0.02 so small a model sits still for a thousand steps
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: "PreTrainedTokenizerFast", documents: list[str]) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
    """Token ids and labels, both of shape (BATCH_DOCUMENTS, longest), without end: one document a row, each closed by `</s>`.

    Documents of like length share a batch, so little is padding; padding has the label -100, which the loss leaves out.
    """
    import torch

    end = tokenizer.convert_tokens_to_ids(EOS)
    encoded = [[*ids, end] for ids in tokenizer(documents)["input_ids"]]
    rng = random.Random(0)
    while True:
        rng.shuffle(encoded)
        for at in range(0, len(encoded), 50 * BATCH_DOCUMENTS):
            near = sorted(encoded[at : at + 50 * BATCH_DOCUMENTS], key=len)
            groups = [near[i : i + BATCH_DOCUMENTS] for i in range(0, len(near), BATCH_DOCUMENTS)]
            rng.shuffle(groups)
            for group in groups:
                longest = len(group[-1])
                ids = [row + [end] * (longest - len(row)) for row in group]
                labels = [row + [-100] * (longest - len(row)) for row in group]
                yield torch.tensor(ids), torch.tensor(labels)


def pretrain(model: "LlamaForCausalLM", data: "Iterator[tuple[torch.Tensor, torch.Tensor]]", num_steps: int) -> None:
    """Next-token prediction with AdamW: warm-up, then a constant rate, then in the second half linear decay to zero."""
    import torch

    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1, 2 - 2 * step / num_steps))
    started = time.monotonic()
    for step, (ids, labels) in zip(range(1, num_steps + 1), data, strict=False):
        loss: Any = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step} of {num_steps}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """`data DIR` or `base DIR`."""
    parser = argparse.ArgumentParser(
        prog="python -m posttrain.quickstart.make", description="Make the quickstart's data or its base model."
    )
    parser.add_argument("what", choices=["data", "base"], help="what to make")
    parser.add_argument("directory", type=Path, help="where to write it")
    given = parser.parse_args()
    {"data": write_data, "base": write_base}[given.what](given.directory)


if __name__ == "__main__":
    main()
