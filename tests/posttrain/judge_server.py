"""A chat completions interface on loopback, for what asks a judge."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Server:
    """The interface, and what it was asked. `answer` gives status and text for a question, and how often it was asked; of bytes, a page."""

    answer: Callable[[str, int], tuple[int, str | bytes]] = lambda question, times: (200, "Fine.\nScore: 7")
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""

    def times(self, text: str) -> int:
        """How often something was asked that holds the text."""
        return sum(text in question for question in self.questions)

    @property
    def questions(self) -> list[str]:
        """All that was asked."""
        return [request["messages"][0]["content"] for request in self.asked]


@contextmanager
def serving() -> Iterator[Server]:
    """A server while the block lasts."""
    state = Server()
    lock = threading.Lock()
    under_way = 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal under_way
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = request["messages"][0]["content"]
            with lock:
                before = state.times(question)
                state.asked.append(request)
                state.keys.append(self.headers["Authorization"])
                under_way += 1
                state.most_at_once = max(state.most_at_once, under_way)
            status, text = state.answer(question, before) if self.path == "/v1/chat/completions" else (404, "no such path")
            body: dict[str, Any] = {"error": {"message": text}}
            if status == 200 and isinstance(text, str):
                message = {"role": "assistant", "content": text}
                choices = [{"index": 0, "finish_reason": "stop", "message": message}]
                body = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"], "choices": choices}
            data = text if isinstance(text, bytes) else json.dumps(body).encode()
            with lock:
                under_way -= 1
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if isinstance(text, bytes) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status in (429, 500):
                self.send_header("Retry-After", "0.01")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield state
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
