"""What the tests share: where the real models and data are, and the command line called in this process.

Called in-process, `run` starts the warm parent once for the whole test session, so that each test that trains pays a
second for it instead of twenty.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


class Commands:
    """The commands on the pipeline file of a folder, with the root beside it."""

    here: Path
    call: Callable[..., Ended]

    @property
    def config(self) -> Path:
        return self.here / "pipeline.yaml"

    @property
    def root(self) -> Path:
        return self.here / "runs"

    def ended(self, command: str, *arguments: str) -> Ended:
        return self.call(command, self.config, "--root", self.root, *arguments)

    def done(self, command: str, *arguments: str) -> str:
        ended = self.ended(command, *arguments)
        assert ended.code == 0, ended.err
        return ended.out

    def refused(self, command: str = "plan", *arguments: str) -> str:
        """The one line that the command ended with, its exit code being 2."""
        ended = self.ended(command, *arguments)
        assert ended.code == 2, ended
        (line,) = ended.err.splitlines()
        return line.removeprefix("error: ")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data."""
    if not SHARED.is_dir():
        pytest.skip("the real models and data are not here")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A real base model of 260,032 parameters, without pad token and chat template."""
    return shared / "models" / "stories260K"


@pytest.fixture
def posttrain(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """`posttrain("run", "x.yaml", ...)`: one command, as `python pipeline.py` would run it from the top of the repository."""
    import pipeline

    monkeypatch.chdir(REPOSITORY)

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["pipeline.py", *map(str, arguments)])
        capfd.readouterr()
        code = pipeline.main()
        out, err = capfd.readouterr()
        return Ended(code, out, err)

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of two layers with random weights: byte-level vocabulary, `<s>` and `</s>`, no pad token, no template."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny")


def make_tiny(path: Path) -> Path:
    """Write the model of `tiny` into `path`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(
        ["what is the colour of the sky, and how many birds are there? the answer is blue, and there are"] * 4, trainer
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=False,
            initializer_range=0.2,  # wide, so that logits, losses and their differences are not all alike
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


COLOURS = ["red", "green", "blue", "black", "white", "grey", "pink", "brown"]


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 conversations of unequal length, every third of two turns."""
    return write_chat(tmp_path_factory.mktemp("data") / "chat.jsonl", 24)


def write_chat(path: Path, num_rows: int) -> Path:
    """Write conversations like those of `chat_file` into `path`."""
    rows = []
    for number in range(num_rows):
        messages = [
            {"role": "user", "content": f"what is the colour of bird {number}?" + " and why?" * (number % 4)},
            {"role": "assistant", "content": f"the colour is {COLOURS[number % 8]}" + ", as the sky" * (number % 5)},
        ]
        if number % 3 == 0:
            messages += [{"role": "user", "content": "are there more?"}, {"role": "assistant", "content": f"there are {number}"}]
        rows.append({"messages": messages})
    return _write_rows(path, rows)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 preference pairs of unequal length."""
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 16)


def write_pairs(path: Path, num_rows: int) -> Path:
    """Write pairs like those of `pairs_file` into `path`."""
    return _write_rows(
        path,
        [
            {
                "prompt": f"what is the colour of bird {number}?",
                "chosen": f"the answer is {COLOURS[number % 8]}" + " and more" * (number % 3),
                "rejected": "there are birds" + " in the sky" * (number % 4) + f" {number}",
            }
            for number in range(num_rows)
        ],
    )


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pipeline_file(tmp_path: Path, tiny: Path, chat_file: Path, pairs_file: Path) -> Path:
    """A pipeline of sft, dpo and eval on the tiny model, of a few steps each; it measures on what it trains on."""
    path = tmp_path / "pipeline.yaml"
    path.write_text(
        f"""
run: test
sources:
  base: {{model: {tiny}}}
  chat: {{data: {chat_file}}}
  prefs: {{data: {pairs_file}}}
stages:
  sft:
    inputs: {{policy: base, data: chat}}
    learning_rate: 1e-3
    global_batch_size: 8
    max_length: 128
    num_train_epochs: 2
    preflight: {{held_out: 1.0}}
  dpo:
    inputs: {{policy: sft, data: prefs}}
    learning_rate: 1e-3
    global_batch_size: 8
    max_length: 128
    num_train_epochs: 2
    preflight: {{held_out: 1.0}}
  eval: {{inputs: {{policies: [base, sft, dpo], data: [chat, prefs]}}, max_new_tokens: 8}}
"""
    )
    return path


@contextmanager
def killing(process: str, when: Callable[[], bool]) -> Iterator[None]:
    """Kill a process that a command starts meanwhile, named like `sft:run:1`, as soon as it is so."""
    is_over = threading.Event()

    def kill() -> None:
        while not when():
            if is_over.wait(0.01):
                return
        next(child for child in active_children() if child.name == process).kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        is_over.set()
        killer.join()


def read_samples(stage: Path) -> list[dict[str, Any]]:
    """The samples that a stage trained on."""
    from datasets import Dataset

    prepared = Path(json.loads((stage / "prepared.json").read_text())["path"])
    return list(Dataset.from_file(str(prepared / "rows.arrow")))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
