"""Work over all cores gives what work on one would, in order, holds little, and leaves no process behind."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from posttrain.error import UserError
from posttrain.parallel import chunks, map_chunks


def test_chunks_hold_every_item_once():
    assert [list(chunk) for chunk in chunks(iter(range(7)), 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(chunks([], 3)) == []


def test_results_come_in_order_whoever_is_done_first():
    def slow_at_first(chunk: list[int]) -> int:
        time.sleep(0.2 if chunk[0] == 0 else 0)
        return sum(chunk)

    assert list(map_chunks(slow_at_first, range(20), chunk_size=3, num_processes=3)) == [sum(chunk) for chunk in chunks(range(20), 3)]


def test_every_process_works_and_none_is_left():
    pids = set(map_chunks(lambda chunk: (time.sleep(0.1), os.getpid())[1], range(8), chunk_size=1, num_processes=2))
    assert len(pids) == 2 and os.getpid() not in pids
    assert not any(_alive(pid) for pid in pids)


def test_one_chunk_needs_no_process():
    assert set(map_chunks(lambda chunk: os.getpid(), range(8), chunk_size=8, num_processes=2)) == {os.getpid()}


def test_few_chunks_are_read_ahead():
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        for item in range(1000):
            read += 1
            yield item

    results = map_chunks(len, items(), chunk_size=1, num_processes=2)
    for taken in range(1, 50):
        next(results)
        assert read <= taken + 10


def test_what_work_raises_is_raised_here_and_ends_all():
    def fail(chunk: list[int]) -> int:
        if 5 in chunk:
            raise UserError("the fifth is wrong")
        return os.getpid()

    with pytest.raises(UserError, match="the fifth is wrong"):
        list(map_chunks(fail, range(100), chunk_size=1, num_processes=2))


def test_workers_end_with_the_process_that_forked_them(tmp_path):
    def note(chunk: list[int]) -> int:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(30)
        return 0

    parent = os.fork()
    if parent == 0:
        list(map_chunks(note, range(4), chunk_size=1, num_processes=2))
        os._exit(0)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(_alive, pids))


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
