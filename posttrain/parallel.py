"""Work on rows with all cores: an ordered map over chunks, in processes forked for it, that holds few chunks at a time."""

import ctypes
import itertools
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

PR_SET_PDEATHSIG = 1
CHUNKS_AHEAD = 4
"""Chunks for each process that are read ahead of the one whose result is awaited."""

_work: Callable[[Any], Any] | None = None


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`items` in lists of `size`, the last one shorter; one is held at a time."""
    rest = iter(items)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk


def map_chunks(work: Callable[[Sequence[T]], R], items: Iterable[T], *, chunk_size: int, num_processes: int | None = None) -> Iterator[R]:
    """`work` of each chunk of `items`, in order, whatever process is done first; by default with a process for each core.

    `work` may be a closure, since the processes are forked after it is made; items and results are sent by pickle. One chunk,
    or one process, is worked on right here. What `work` raises is raised here.
    """
    global _work
    num_processes = num_cores() if num_processes is None else num_processes
    pieces = chunks(items, chunk_size)
    first = list(itertools.islice(pieces, 2))
    pieces = itertools.chain(first, pieces)
    if num_processes == 1 or len(first) < 2:
        yield from map(work, pieces)
        return
    _work = work  # the processes are forked at the first `submit`, and take it along
    with ProcessPoolExecutor(num_processes, mp_context=get_context("fork"), initializer=_start, initargs=(os.getpid(),)) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for piece in pieces:
                waiting.append(pool.submit(_call, piece))
                if len(waiting) >= CHUNKS_AHEAD * num_processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            _work = None


def _start(parent: int) -> None:
    """End with the process that forked this one, and leave signals to it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _call(piece: Sequence[Any]) -> Any:
    assert _work is not None, "it was set before this process was forked"
    return _work(piece)
