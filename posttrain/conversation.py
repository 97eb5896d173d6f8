"""Conversation: questions put to one or several policies, on a terminal or from a pipe, each answered under its chat contract.

Answers are those of `model.generate` with the policy's own generation config, greedy unless a temperature is given. What is kept of
a conversation is a row of the format `messages`, so a source can read it.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.utils.logging import disable_progress_bar

from posttrain import disk
from posttrain.chat import ChatContract, encode_prompt, read_contract
from posttrain.config import nearest
from posttrain.error import UserError
from posttrain.generate import decode, stop_ids
from posttrain.inspection import visible
from posttrain.models import check_weights, load_policy, load_tokenizer
from posttrain.stage import Input

Message = dict[str, str]

COMMANDS = {
    "/reset": "begin again; the system prompt stays",
    "/system [TEXT]": "begin again with this system prompt, or with none",
    "/undo": "take back the last question and its answers",
    "/save FILE": "keep this conversation and those that follow in a JSONL file",
    "/help": "show this",
    "/quit": "end; so does Ctrl-D",
}
"""A line that begins with two slashes is no command, but says what follows the first."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn, by the names of transformers."""

    temperature: float = 0.0
    """Of the distribution that tokens are drawn from; 0: the likeliest token each time."""
    top_p: float = 1.0
    """Draw from the fewest tokens that hold so much of the probability."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0: from all."""
    repetition_penalty: float | None = None
    """Above 1, tokens that were there already become less likely; by default what the policy's generation config says."""
    max_new_tokens: int = 1024
    """Longest answer, in tokens."""
    seed: int = 0
    """Seed of the first answer; each question has the next one, and policies that are compared have the same."""

    def __post_init__(self) -> None:
        for option, value, neutral in (("--top-p", self.top_p, 1.0), ("--top-k", self.top_k, 0)):
            if not self.temperature and value != neutral:
                raise UserError(f"{option} {value}: has no effect where the likeliest token is taken; give --temperature too")

    def settings(self) -> dict[str, Any]:
        """What `model.generate` is told, beside the length."""
        kept = {} if self.repetition_penalty is None else {"repetition_penalty": self.repetition_penalty}
        if not self.temperature:
            return {"do_sample": False, **kept}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, **kept}


@dataclass(frozen=True)
class Speaker:
    """A policy that answers, under the name that it has in the pipeline file."""

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    contract: ChatContract

    def answer(self, messages: Sequence[Message], sampling: Sampling, streamer: TextStreamer | None = None) -> str:
        """What it says next. Raises `UserError` where it cannot be asked that."""
        ids = torch.tensor([encode_prompt(self.tokenizer, messages, None, "chat")], device=self.model.device)
        room = self.model.config.get_text_config().max_position_embeddings - ids.shape[1]
        if room < 1:
            raise UserError(f"chat: the conversation has {ids.shape[1]} tokens, more than {self.name} can read; begin again with /reset")
        torch.manual_seed(sampling.seed)
        generated = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(room, sampling.max_new_tokens),
            eos_token_id=stop_ids(self.tokenizer, self.contract),
            pad_token_id=self.tokenizer.pad_token_id,
            streamer=streamer,
            **sampling.settings(),
        )
        return decode(self.tokenizer, generated[0, ids.shape[1] :].tolist())


def open_speakers(given: Sequence[Input]) -> list[Speaker]:
    """The policies, ready to answer. One without a template is asked in the way of the first that has a contract."""
    disable_progress_bar()
    for policy in given:
        check_weights(policy, "chat")
    shared = next((contract for policy in given if (contract := read_contract(Path(policy.model.model))) is not None), None)
    speakers = []
    for policy in given:
        tokenizer, contract = load_tokenizer(policy, "chat", contract=shared)
        model: Any = load_policy(policy.model, tokenizer, contract, f"chat: {policy.name}", dtype="auto").eval()
        speakers.append(Speaker(policy.name, model.to("cuda") if torch.cuda.is_available() else model, tokenizer, contract))
    return speakers


class Conversation:
    """What was said to each of some policies, and by it."""

    def __init__(self, speakers: Sequence[Speaker], sampling: Sampling, *, system: str | None = None, file: Path | None = None) -> None:
        self.speakers = speakers
        self._sampling = sampling
        self._system: list[Message] = []
        self._said: dict[str, list[Message]] = {speaker.name: [] for speaker in speakers}
        self._ended: list[str] = []
        self._file: Path | None = None
        self._before = ""
        if system is not None:
            self.begin(system)
        if file is not None:
            self.keep(file)

    def ask(self, text: str, stream: TextStreamer | None = None) -> Iterator[tuple[str, str]]:
        """Name and answer of each policy, as they come; they count as said once all are there. Raises `UserError`."""
        question = {"role": "user", "content": text}
        answers = {}
        for speaker in self.speakers:
            asked = [*self._system, *self._said[speaker.name], question]
            answers[speaker.name] = speaker.answer(asked, self._sampling, stream)
            yield speaker.name, answers[speaker.name]
        for name, answer in answers.items():
            self._said[name] += [question, {"role": "assistant", "content": answer}]
        self._sampling = replace(self._sampling, seed=self._sampling.seed + 1)
        self._write()

    def begin(self, system: str | None = None) -> None:
        """Begin again, with another system prompt where one is given; an empty one is none. Raises `UserError` where it cannot be."""
        messages = self._system if system is None else [{"role": "system", "content": system}] if system else []
        for speaker in self.speakers:
            encode_prompt(speaker.tokenizer, [*messages, {"role": "user", "content": "?"}], None, f"chat: {speaker.name}")
        self._ended += self._rows()
        self._system, self._said = messages, {name: [] for name in self._said}

    def undo(self) -> bool:
        """Take the last question and its answers back; whether there was one."""
        was_there = any(self._said.values())
        self._said = {name: said[:-2] for name, said in self._said.items()}
        self._write()
        return was_there

    def keep(self, file: Path) -> None:
        """Write this conversation and those that follow into `file`, after what it holds. Raises `UserError` where that cannot be."""
        if file.suffix != ".jsonl":
            raise UserError(f"{file}: conversations are kept as JSONL; give a name that ends with .jsonl")
        try:
            before = file.read_text(encoding="utf-8") if file.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UserError(f"{file}: cannot be read ({reason}); give another file to keep conversations in") from None
        self._file, self._before, self._ended = file, before + ("\n" if before and not before.endswith("\n") else ""), []
        self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        try:
            disk.write_text(self._file, self._before + "".join([*self._ended, *self._rows()]))
        except OSError as error:
            raise UserError(f"{self._file}: cannot be written ({error.strerror}); give another file to keep conversations in") from None

    def _rows(self) -> list[str]:
        """The conversation as lines of JSONL, one for each policy; none where nothing was said."""
        rows = [{"policy": name, "messages": [*self._system, *said]} for name, said in self._said.items() if said]
        return [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]


class _Printer(TextStreamer):
    """Prints an answer as it comes, with what cannot be seen in it spelt."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print some of it."""
        print(visible(text), end="\n" if stream_end else "", flush=True)


def ask(conversation: Conversation, text: str, console: Console) -> None:
    """Put one question, and show the answers: one as it comes, several side by side on a terminal, else one after another by name."""
    if len(conversation.speakers) == 1:
        tokenizer: Any = conversation.speakers[0].tokenizer
        for _ in conversation.ask(text, _Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)):
            pass
        return
    if not console.is_terminal:
        for name, answer in conversation.ask(text):
            print(f"{name}: {visible(answer)}", flush=True)
        return
    answers = {}
    with console.status(""):
        for name, answer in conversation.ask(text):
            answers[name] = Text(visible(answer), overflow="fold")
    table = Table(*answers, expand=True)
    table.add_row(*answers.values())
    console.print(table)


def talk(conversation: Conversation, console: Console) -> None:
    """Put the lines of standard input to the policies, until it ends; those that begin with a slash are commands."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  what is typed can be edited, and had again
        names = " and ".join(speaker.name for speaker in conversation.speakers)
        print(f"Talking to {names}. /help shows the commands, Ctrl-D ends.")
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        try:
            if line.startswith("/") and not line.startswith("//"):
                _obey(conversation, command, argument.strip())
            elif line:
                ask(conversation, line.removeprefix("/"), console)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("\ncut off, and not kept")


def _obey(conversation: Conversation, command: str, argument: str) -> None:
    """Do what a command says. Raises `UserError` where there is none of that name."""
    commands: Mapping[str, Callable[[], object]] = {
        "/reset": conversation.begin,
        "/system": lambda: conversation.begin(argument),
        "/undo": lambda: print("taken back" if conversation.undo() else "there is nothing to take back"),
        "/save": lambda: conversation.keep(Path(argument)),
        "/help": lambda: print("\n".join(f"  {name:16}{what}" for name, what in COMMANDS.items())),
    }
    if command not in commands:
        hint = nearest(command, [*commands, "/quit"])
        raise UserError(f"{command}: is no command; {hint}; a line that is to begin with a slash begins with two")
    commands[command]()
