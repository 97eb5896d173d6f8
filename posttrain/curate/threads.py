"""Threads: passes of a model that come out the same on any number of cores, and requests that wait side by side."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def each(work: Callable[[T], R], items: Iterable[T], num_threads: int, *, start: Callable[[], None] | None = None) -> list[R]:
    """`work` of each item, in order, in threads that each call `start` first. What is raised here ends it with the items under way."""
    pool = ThreadPoolExecutor(num_threads, initializer=start)
    try:
        return list(pool.map(work, items))
    finally:
        pool.shutdown(cancel_futures=True)


def each_batch(work: Callable[[list[int]], R], batches: Iterable[list[int]]) -> list[R]:
    """`work`, a pass of a model without gradients, of each batch of positions, in order.

    On a CPU each batch is the work of one thread, and as many are under way as torch has threads: one pass that is spread over
    threads rounds by their number, and then a stage would decide otherwise on two ranks than on one.
    """
    import torch

    def pass_through(batch: list[int]) -> R:
        with torch.no_grad():
            return work(batch)

    if torch.cuda.is_available():
        return [pass_through(batch) for batch in batches]
    num_threads = torch.get_num_threads()
    try:
        return each(pass_through, batches, num_threads, start=lambda: torch.set_num_threads(1))
    finally:
        torch.set_num_threads(num_threads)
