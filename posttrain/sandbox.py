"""The sandbox: what a chat template, which is a program by a stranger, may take.

What it may do is limited by transformers, which renders in jinja's immutable sandbox, and on plain values alone. What it may
take is limited here: the length of its text, the processor time and the memory for a conversation, the length of what comes
out. Powers are refused when a template is parsed, since nothing can interrupt the computing of one.
"""

import functools
import os
import resource
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from posttrain.error import UserError

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_TEMPLATE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 1 << 25
MAX_RENDER_S = 5.0
"""Processor time for one rendering; those of models people use take less than a thousandth of it for a common row."""
MAX_RENDER_BYTES = 1 << 30
"""Memory that may be added while a conversation is rendered."""
MAX_ROUND_DIGITS = 100
REMEMBER_S = 0.1
"""How long it is remembered how much memory the process has: long for a row, and too short to grow by much."""

_is_limited = False
_held = 0.0, 0, 0
"""When, by which process and how many bytes it was found to have."""


class OverLimit(UserError):
    """A template is no good for any row, or takes more for one than it may: going on with the next would help nobody."""


class _TimeUp(BaseException):
    """Raised inside of a template; no `except Exception` of jinja may hold it."""


@functools.lru_cache(maxsize=8)
def problem_with(template: str) -> str | None:
    """Why a template is not to be rendered, or None. Raises what jinja does where it is no template."""
    from jinja2 import nodes

    if len(template) > MAX_TEMPLATE_CHARS:
        return f"has {len(template):,} characters, over {MAX_TEMPLATE_CHARS:,}"
    for node in _parser().parse(template).find_all((nodes.Pow, nodes.Filter)):
        if isinstance(node, nodes.Pow) or _may_compute_power(node):
            return f"computes a power in line {node.lineno}, which nothing can interrupt"
    return None


def _may_compute_power(node: object) -> bool:
    """Whether a filter is `round`, itself or by `map`, to a number of digits that is not there to be read: it computes 10 ** digits."""
    from jinja2 import nodes

    assert isinstance(node, nodes.Filter)
    arguments = [*node.args, *(keyword.value for keyword in node.kwargs)]
    if node.name == "map" and node.args:
        named, *arguments = arguments
        if not isinstance(named, nodes.Const):
            return True
        name = named.value
    else:
        name = node.name
    if name != "round":
        return node.name == "map" and node.dyn_args is not None
    constants = [argument.value for argument in arguments if isinstance(argument, nodes.Const)]
    is_known = len(constants) == len(arguments) and node.dyn_args is None and node.dyn_kwargs is None
    return not is_known or any(isinstance(value, (int, float)) and value > MAX_ROUND_DIGITS for value in constants)


@functools.cache
def _parser() -> "Environment":
    """What parses the templates that transformers takes; it renders nothing."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag that marks what the assistant says."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])


class Limits:
    """A block that raises `OverLimit`, naming `origin`, where it takes too much processor time or memory; inside of another, the
    time begins anew.

    Only the main thread of a process can be interrupted, and only Linux can limit memory: elsewhere the block just runs. It costs
    a few microseconds, since a million rows are rendered some four times each.
    """

    __slots__ = ("is_outermost", "memory", "origin")

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.is_outermost = False

    def __enter__(self) -> None:
        global _is_limited
        if threading.current_thread() is not threading.main_thread():
            return
        if not _is_limited:
            _heed_timer()
            self.memory = resource.getrlimit(resource.RLIMIT_AS)
            if sys.platform == "linux":
                resource.setrlimit(resource.RLIMIT_AS, (_most_bytes(*self.memory), self.memory[1]))
            self.is_outermost = _is_limited = True
        # Time of this process on a processor, not of the clock: work of the lowest priority may wait for long.
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_RENDER_S)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _is_limited
        if not self.is_outermost:
            return
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        except _TimeUp:
            kind = _TimeUp
        _is_limited = False
        resource.setrlimit(resource.RLIMIT_AS, self.memory)
        if kind is _TimeUp:
            raise OverLimit(f"{self.origin}: the chat template takes over {MAX_RENDER_S:g} s to render it; use another template") from None
        if kind is MemoryError:
            mebibytes = MAX_RENDER_BYTES >> 20
            raise OverLimit(f"{self.origin}: the chat template takes over {mebibytes} MiB to render it; use another template") from None


@functools.cache
def _heed_timer() -> None:
    """Take the signal of the timer, which nothing else here sets; processes that are forked inherit this."""
    signal.signal(signal.SIGVTALRM, _stop)


def _stop(signum: int, frame: FrameType | None) -> None:
    if _is_limited:
        raise _TimeUp


def _most_bytes(soft: int, hard: int) -> int:
    """Address space that this process may have from now on, what it has included: read anew when it may have grown."""
    global _held
    now = time.monotonic()
    if now - _held[0] > REMEMBER_S or _held[1] != os.getpid():
        _held = now, os.getpid(), _held_bytes()
    return min(size for size in (_held[2] + MAX_RENDER_BYTES, soft, hard) if size != resource.RLIM_INFINITY)


def _held_bytes() -> int:
    """Address space of this process."""
    handle = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(handle, 64).split()[0]) * resource.getpagesize()
    finally:
        os.close(handle)
