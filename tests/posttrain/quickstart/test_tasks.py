"""The quickstart's data: reproducible, split by prompt, and answerable."""

import json
from pathlib import Path

import pytest

from posttrain.metrics.check import read_checks, score
from posttrain.quickstart import make, tasks

SHIPPED = Path(make.__file__).parent / "data"
FILES = ("sft.jsonl", "pairs.jsonl", "heldout.jsonl", "heldout_pairs.jsonl")


@pytest.fixture(scope="module")
def files() -> dict[str, list[tasks.Row]]:
    return make.data_files()


def prompts(rows: list[tasks.Row]) -> set[str]:
    return {(row.get("prompt") or row["messages"])[0]["content"] for row in rows}


def keys(part: tasks.Part, num: int) -> set[tuple[str, str]]:
    return {(e.family, e.key) for e in tasks.examples(part, num, seed=0)}


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    make.write_data(tmp_path / "a")
    make.write_data(tmp_path / "b")
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in FILES)


def test_another_seed_gives_other_rows() -> None:
    assert tasks.sft_rows(100, seed=0) != tasks.sft_rows(100, seed=1)
    assert list(tasks.corpus(100, seed=0)) != list(tasks.corpus(100, seed=1))


@pytest.mark.parametrize("name", FILES)
def test_the_shipped_file_is_what_the_generator_makes(files: dict[str, list[tasks.Row]], name: str) -> None:
    shipped = [json.loads(line) for line in (SHIPPED / name).read_text(encoding="utf-8").splitlines()]
    assert shipped == files[name]


def test_what_is_trained_on_and_what_is_held_out_share_no_prompt(files: dict[str, list[tasks.Row]]) -> None:
    held_out = prompts(files["heldout.jsonl"]) | prompts(files["heldout_pairs.jsonl"])
    assert not held_out & prompts(files["sft.jsonl"])
    assert not held_out & prompts(files["pairs.jsonl"])
    assert not prompts(files["sft.jsonl"]) & prompts(files["pairs.jsonl"])


def test_the_parts_share_no_question_in_other_words() -> None:
    held_out = keys("heldout", 1000)
    assert not held_out & keys("sft", 3000)
    assert not held_out & keys("pairs", 3000)


def test_the_corpus_solves_no_held_out_exercise_and_tells_every_opposite(files: dict[str, list[tasks.Row]]) -> None:
    corpus = "\n".join(tasks.corpus(20_000)) + "\n"
    assert not [row for row in files["heldout.jsonl"] if row["messages"][0]["content"] + "\n" in corpus]
    assert all(f"The opposite of {word} is {other}." in corpus for pair in tasks.OPPOSITES for word, other in (pair, pair[::-1]))


def test_every_reference_answer_passes_its_checks(files: dict[str, list[tasks.Row]]) -> None:
    for number, row in enumerate(files["heldout.jsonl"]):
        checks = read_checks(row["checks"], f"heldout.jsonl:{number}")
        assert checks and all(score(check, row["messages"][1]["content"]) == 1.0 for check in checks), row


@pytest.mark.parametrize("part", ["pairs", "heldout"])
def test_no_mistake_of_an_example_is_right(part: tasks.Part) -> None:
    for example in tasks.examples(part, 700, seed=3):
        checks = read_checks(example.checks, example.family)
        assert len(example.mistakes) >= 2
        for mistake in example.mistakes:
            assert not all(score(check, mistake) for check in checks), (example, mistake)


def test_every_family_is_in_every_file(files: dict[str, list[tasks.Row]]) -> None:
    for rows in files.values():
        assert {row["family"] for row in rows} == set(tasks.FAMILIES)


def test_the_data_are_small_enough_to_ship() -> None:
    assert sum((SHIPPED / name).stat().st_size for name in FILES) <= 1_000_000
