"""A process that computes takes its share of the cores, and keeps the memory that it frees."""

import json
import subprocess
import sys
from typing import Any

import pytest

from posttrain.parallel import num_cores

PROBE = """
import json, resource, sys
import torch
from posttrain.machine import make_ready

if sys.argv[1] != "0":
    make_ready(int(sys.argv[1]))
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensor = torch.empty(2**24).fill_(1.0)  # 64 MiB
    del tensor
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps({"threads": torch.get_num_threads(), "faults": faults}))
"""


def probe(local_world_size: int) -> dict[str, Any]:
    """A process made ready as one of so many, or not at all: its threads, and the pages that each of twenty large tensors took anew."""
    ended = subprocess.run([sys.executable, "-c", PROBE, str(local_world_size)], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@pytest.mark.parametrize("local_world_size", [1, 2, 64])
def test_ranks_of_a_machine_share_its_cores(local_world_size: int) -> None:
    assert probe(local_world_size)["threads"] == max(1, num_cores() // local_world_size)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told to")
def test_a_large_tensor_takes_the_memory_of_the_last_one() -> None:
    taken_anew = probe(0)["faults"][-1]
    if taken_anew < 100:
        pytest.skip("this C library keeps it by itself, or its pages are huge")
    # An aligned chunk is not found again before its neighbours are free too (glibc bug 14581), so the first ones may be new.
    assert sum(probe(1)["faults"][-10:]) < taken_anew / 10


GIVEN_BACK = """
import json, psutil, torch
from posttrain.machine import give_memory_back, make_ready

held = [psutil.Process().memory_info().rss]
make_ready(1)
for _ in range(2):
    tensor = torch.empty(2**26).fill_(1.0)  # 256 MiB
    del tensor
    held.append(psutil.Process().memory_info().rss)
    give_memory_back()
    held.append(psutil.Process().memory_info().rss)
print(json.dumps(held))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told to")
def test_what_was_kept_is_given_back_and_no_more_is_kept() -> None:
    ended = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True)
    before, kept, after, again, _ = json.loads(ended.stdout)
    if kept - before < 2**27:
        pytest.skip("this C library gives it back by itself")
    assert after - before < 2**26
    assert again - before < 2**26, "what is freed from then on goes back at once"
