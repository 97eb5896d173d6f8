"""What ranks tell one another, in groups of several processes and in one alone.

`python -m tests.posttrain.test_ranks DIRECTORY` has three ranks tell one another what they have, and writes what each heard there.
"""

import json
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch.distributed as dist

from posttrain.ranks import any_rank, of_all_ranks, of_main, shares_of_all_ranks, sum_over_ranks
from tests.conftest import REPOSITORY

SIZE = 3


def test_every_rank_hears_what_all_of_them_have(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.posttrain.test_ranks", str(tmp_path)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-4000:]
    heard = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(SIZE)]
    for rank, each in enumerate(heard):
        assert each == {
            "main": "rank 0",
            "all": ["rank 0", "rank 1", "rank 2"],
            "shares": ["a", "b", "c", "d"],
            "sum": 1 + 10 + 100,
            "last": True,
            "none": False,
            "last, of the first two or the third": rank == 2,
        }


def test_a_process_alone_hears_itself() -> None:
    mine = ["what it has"]
    assert of_main(mine) is mine
    assert of_all_ranks(mine) == [mine]
    assert shares_of_all_ranks({1: "b", 0: "a"}) == ["a", "b"]
    assert sum_over_ranks(7) == 7
    assert any_rank(True)
    assert not any_rank(False)


def _tell(directory: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=SIZE)
    pair, rest = dist.new_group([0, 1]), dist.new_group([2])
    # Places 0 to 3, dealt out in no order, one of them to two ranks.
    share = [{2: "c"}, {3: "d", 0: "a"}, {1: "b", 2: "c"}][rank]
    heard: dict[str, Any] = {
        "main": of_main(f"rank {rank}"),
        "all": of_all_ranks(f"rank {rank}"),
        "shares": shares_of_all_ranks(share),
        "sum": sum_over_ranks(10**rank),
        "last": any_rank(rank == 2),
        "none": any_rank(False),
        "last, of the first two or the third": any_rank(rank == 2, pair if rank < 2 else rest),
    }
    (directory / f"{rank}.json").write_text(json.dumps(heard))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    ranks = [get_context("fork").Process(target=_tell, args=(Path(sys.argv[1]), rank)) for rank in range(SIZE)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
