"""Passes in threads: in order, ended by an error, and the same on any number of cores and ranks."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from posttrain.curate.diversity import Diversity
from posttrain.curate.embed import embed
from posttrain.curate.threads import each, each_batch
from tests.conftest import Ended
from tests.posttrain.curate.measured import make_bench, policy

Cli = Callable[..., Ended]


def test_results_come_in_order():
    def slow_at_first(number: int) -> int:
        time.sleep(0.05 if number == 0 else 0)
        return number * number

    assert each(slow_at_first, range(20), 4) == [number * number for number in range(20)]


def test_an_error_ends_the_rest():
    done = []

    def work(number: int) -> None:
        if number == 1:
            raise ValueError("one")
        time.sleep(0.01)
        done.append(number)

    with pytest.raises(ValueError, match="one"):
        each(work, range(1000), 2)
    assert len(done) < 50


def test_each_batch_is_the_work_of_one_thread_without_gradients():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert each_batch(lambda batch: (torch.get_num_threads(), torch.is_grad_enabled(), batch), [[1], [2, 3]]) == [
            (1, False, [1]),
            (1, False, [2, 3]),
        ]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_vectors_do_not_depend_on_the_number_of_threads(tiny: Path, tmp_path: Path):
    texts = [f"what is the colour of bird {number}?" + " and why?" * (number % 30) for number in range(200)]
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(embed(texts, Diversity(), make_bench(tmp_path / str(number), policy=policy(tiny))).tobytes())
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_two_ranks_decide_what_one_does(posttrain: Cli, tiny: Path, chat_file: Path, tmp_path: Path):
    exam = tmp_path / "exam.jsonl"
    exam.write_text('{"prompt": "what is the colour of bird 3?"}\n{"prompt": "how many are there?"}\n')
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(f"""
run: test
sources:
  base: {{model: {tiny}}}
  chat: {{data: {chat_file}}}
  more: {{data: {chat_file}, max_samples: 12}}
  exam: {{data: {exam}}}
stages:
  curate:
    inputs: {{data: [chat, more], policy: base, decontaminate: exam}}
    steps:
      - contamination: {{similarity: 0.9, margin: 0.0}}
      - quality: {{keep: 0.9}}
      - diversity: {{keep: 10}}
      - mixture: {{weights: {{chat: 2, more: 1}}}}
""")
    written = []
    for number in (1, 2):
        root = tmp_path / str(number)
        ended = posttrain("run", pipeline, "--root", root, f"stages.curate.num_processes={number}")
        assert ended.code == 0, ended.err
        written.append({path.name: path.read_bytes() for path in (root / "test/curate/output").iterdir()})
    assert written[0] == written[1]
    assert written[0]["rows.jsonl"]
