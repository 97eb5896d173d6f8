"""Endpoint: a language model behind an OpenAI-compatible HTTP interface, asked greedily, and nothing twice.

Nothing is sent anywhere but to the address that the config names. What comes back is on disk at once, word for word, so what
was cut off goes on where it was, and a reply can be looked up. A key comes from the environment and is written nowhere.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

from pydantic import Field

from posttrain import disk, secret
from posttrain.config import Config
from posttrain.curate.threads import each
from posttrain.data.rows import Message
from posttrain.error import UserError


class EndpointExecution(Config):
    """How it is asked, which changes no reply."""

    bears_identity: ClassVar[bool] = False

    api_key_env: str | None = None
    """Name of the environment variable that holds the key; by default none is sent."""
    timeout_s: float = Field(60.0, gt=0)
    """Seconds that a request may take."""
    max_retries: int = Field(5, ge=0)
    """How often a request is sent again that the server refused for a while, or did not answer in time."""
    num_requests: int = Field(8, ge=1)
    """Requests under way at once, on each rank."""


class Endpoint(EndpointExecution):
    """Which model is asked, where."""

    bears_identity: ClassVar[bool] = True

    base_url: str
    """Address of the interface, such as `http://127.0.0.1:8000/v1`. What is judged is sent there and nowhere else."""
    model: str
    """Name of the model that judges."""
    max_tokens: int = Field(512, ge=1)
    """Longest reply, in tokens."""

    def check_access(self, at: str) -> None:
        """Raise `UserError` where the library or the key is missing. Asks nobody."""
        from importlib.util import find_spec

        if find_spec("openai") is None:
            raise UserError(f'{at}: needs the library openai; run: pip install "posttrain[judge]"')
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise UserError(f"{at}.api_key_env: the environment has no variable {self.api_key_env!r}; set it, or leave it out")

    @property
    def digest(self) -> str:
        """Who is asked: another model, address or length of reply answers otherwise."""
        return disk.hash_json([self.base_url, self.model, self.max_tokens])

    def key(self, question: str) -> str:
        """What the reply to a question is known by."""
        return disk.hash_json([self.base_url, self.model, self.max_tokens, question])

    def ask_all(
        self, questions: Sequence[str], replies: "Replies", at: str, *, tick: Callable[[int], None] = lambda done: None
    ) -> list[str]:
        """The reply to each question, as it is known or asked for now; empty where the server refuses the very question.

        `tick` is told how many are there. Raises `UserError`, beginning with `at`, where the server refuses all, or is no such interface.
        """
        self.check_access(at)  # of the very host that this rank is on
        from openai import OpenAI

        asked = list(dict.fromkeys(questions))
        counting, done = Lock(), count(1)
        key = os.environ[self.api_key_env] if self.api_key_env else "none"
        with OpenAI(base_url=self.base_url, api_key=key, timeout=self.timeout_s, max_retries=self.max_retries) as client:

            def ask(question: str) -> str:
                reply = replies.get(self.key(question))
                if reply is None:
                    reply = self._ask(client, question, at)
                    replies.add(self.key(question), reply)
                with counting:
                    tick(next(done))
                return reply

            found = dict(zip(asked, each(ask, asked, self.num_requests), strict=True))
        return [found[question] for question in questions]

    def _ask(self, client: Any, question: str, at: str) -> str:
        import openai
        from openai.types.chat import ChatCompletion

        try:
            response = client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": question}], max_tokens=self.max_tokens, temperature=0, seed=0
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            # This very question is refused, for its length or content.
            print(f"{at}: {self.base_url} refused a question: {self._explain(error)}\n", end="", flush=True)  # whole, of several threads
            return ""
        except (openai.OpenAIError, ValueError) as error:
            raise UserError(f"{at}.base_url: {self.base_url}: {self._explain(error)}; mend that and run again, no reply is lost") from None
        # An address of something else may answer with a page, or with JSON of its own.
        if not isinstance(response, ChatCompletion) or response.choices is None:
            raise UserError(f"{at}.base_url: {self.base_url}: answers, but not as an OpenAI-compatible interface; give the address of one")
        message = response.choices[0].message if response.choices else None
        return self._masked(message.content or "") if message else ""

    def _explain(self, error: Exception) -> str:
        reasons = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
        return self._masked(" ".join(": ".join(reasons).split()))[:200]

    def _masked(self, text: str) -> str:
        """Without the key, which a server may repeat."""
        key = os.environ.get(self.api_key_env) if self.api_key_env else None
        return text.replace(key, secret.MASK) if key else text


class Replies:
    """What was replied, by the key of what was asked: on disk as soon as it comes, a file for each rank."""

    def __init__(self, directory: Path, rank: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = Lock()
        self._file = directory / f"replies-{rank}.jsonl"
        self._known = dict(entry for file in sorted(directory.glob("replies-*.jsonl")) for entry in read_replies(file))
        if self._file.is_file() and not self._file.read_bytes().endswith(b"\n"):
            self._write("\n")  # the last line of an attempt that was cut off takes no other with it

    def get(self, key: str) -> str | None:
        """The reply, where there was one."""
        return self._known.get(key)

    def add(self, key: str, reply: str) -> None:
        """Keep a reply."""
        with self._lock:
            self._known[key] = reply
            self._write(_line(key, reply))

    def _write(self, text: str) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(text)


def read_replies(file: Path) -> Iterator[tuple[str, str]]:
    """Keys and replies of a file."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                key, reply = json.loads(line)
            except ValueError:
                continue  # the last line of an attempt that was cut off
            yield key, reply


def write_replies(file: Path, replies: Iterable[tuple[str, str]]) -> None:
    """Write keys and replies as `read_replies` reads them."""
    file.write_text("".join(_line(key, reply) for key, reply in replies), encoding="utf-8")


def _line(key: str, reply: str) -> str:
    return json.dumps([key, reply], ensure_ascii=False) + "\n"


# --- what is asked ---------------------------------------------------------------------------------------------------


def check_places(prompt: str, places: Sequence[str]) -> str:
    """The prompt. Raises `ValueError` where it lacks one of the places, such as `{answer}`."""
    for place in places:
        if place not in prompt:
            raise ValueError(f"must hold {place}, where that of the row is put")
    return prompt


def fill(prompt: str, parts: Mapping[str, str]) -> str:
    """The prompt with each place, such as `{answer}`, filled by its part; at once, since a part may hold `{answer}` itself."""
    return re.sub("|".join(map(re.escape, parts)), lambda place: parts[place[0]], prompt)


def show_turns(messages: Sequence[Message]) -> str:
    """What was asked, for a judge: a lone message by itself, several with their roles."""
    turns = [said(messages[0])] if len(messages) == 1 else [f"{message['role']}: {said(message)}" for message in messages]
    return "\n\n".join(turns)


def said(message: Message) -> str:
    """The text of a message, with the calls of tools in it."""
    calls = message.get("tool_calls")
    return message["content"] + (json.dumps([call["function"] for call in calls], ensure_ascii=False) if calls else "")
