"""Watching: the page of a run that goes on, served to browsers of this machine alone.

A page of another site could be made to resolve to this address, and would then read what is served here; so a request is answered
only where it names this machine as its host. Nothing is served but the page, and nothing is written.
"""

import hashlib
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from posttrain.error import UserError

ADDRESS = "127.0.0.1"
RENDER_EVERY_S = 2.0
"""A page is not made anew more often than this, however many ask."""


class PageServer(ThreadingHTTPServer):
    """Serves one page that is made anew as often as it is asked for, within reason."""

    daemon_threads = True

    def __init__(self, port: int, render: Callable[[], str]) -> None:
        """Listen on `port` of this machine, or on any free one for 0. Raises `OSError` where it is taken."""
        super().__init__((ADDRESS, port), _Handler)
        self._render = render
        self._making = threading.Lock()
        self._made: tuple[float, bytes] | None = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that left before it had its answer, such as a tab that was closed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.server_port}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        """What a request from this machine calls it."""
        return tuple(f"{name}:{self.server_port}" for name in (ADDRESS, "localhost"))

    def page(self) -> bytes:
        """The page as it is now, or was a moment ago."""
        with self._making:
            if self._made is None or time.monotonic() - self._made[0] > RENDER_EVERY_S:
                page = self._render().encode()
                self._made = (time.monotonic(), page)
            return self._made[1]


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version = "posttrain"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        """The page, or that it is still the one which the browser has."""
        if self.headers.get("Host") not in self.server.hosts:
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, b"this page is for the machine that it is served on\n", "text/plain")
        elif self.path != "/":
            self._answer(HTTPStatus.NOT_FOUND, b"there is one page here: /\n", "text/plain")
        else:
            try:
                page = self.server.page()
            except UserError as error:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode(errors="backslashreplace"), "text/plain")
                return
            tag = f'"{hashlib.sha256(page).hexdigest()}"'
            if self.headers.get("If-None-Match") == tag:
                self._answer(HTTPStatus.NOT_MODIFIED, b"", "text/html", tag)
            else:
                self._answer(HTTPStatus.OK, page, "text/html", tag)

    def _answer(self, status: HTTPStatus, body: bytes, kind: str, tag: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each request."""
