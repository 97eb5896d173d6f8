"""The machine: what a process that computes should set, and what this one can do."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Event

import torch

from posttrain.parallel import num_cores

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4

_is_kept = Event()


def make_ready(local_world_size: int) -> None:
    """Set this process up for computing as one of several on its machine."""
    torch.set_num_threads(max(1, num_cores() // local_world_size))
    if not torch.cuda.is_available():
        keep_memory()


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of matrices in bfloat16 (AVX512-BF16 or AMX)."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def keep_memory() -> None:
    """Let the allocator keep what is freed.

    glibc gives every tensor over 32 MiB pages of its own, which the kernel fills with zeros each time they are asked for: that
    was a quarter of the CPU time of a step that projects every position. Where the C library is another one, nothing is set.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # never
    mallopt(M_TOP_PAD, 2**26)
    _is_kept.set()


def give_memory_back() -> None:
    """Have the allocator give back what is free, and what will be: for work that holds much and computes little."""
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 2**16)  # these three are glibc's own
    mallopt(M_TRIM_THRESHOLD, 2**17)
    mallopt(M_TOP_PAD, 0)
    trim(0)
    _is_kept.clear()


@contextmanager
def giving_memory_back() -> Iterator[None]:
    """Have no memory kept for a while, where it is: it stays in holes that large tensors of other sizes do not fit into."""
    if not _is_kept.is_set():
        yield
        return
    give_memory_back()
    try:
        yield
    finally:
        keep_memory()
