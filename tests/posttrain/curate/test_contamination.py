"""Contamination against brute force, and against real rephrases of real test sets."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.config import validate
from posttrain.curate.contamination import (
    NEIGHBOURS,
    Contamination,
    Nearness,
    NgramIndex,
    around,
    largest,
    read_items,
    views_of,
    words_of,
)
from posttrain.curate.rows import prompt_of
from posttrain.curate.step import Bench, Candidate, Outcome
from posttrain.data.rows import Conversation, Row
from posttrain.data.source import open_source
from posttrain.error import UserError
from tests.posttrain.curate.bench import candidates_of, chat, pair
from tests.posttrain.curate.measured import ask, dataset, make_bench, minilm, policy, prompts_file

ITEMS = [
    "Which king of England signed the Magna Carta at Runnymede in the year 1215?",
    "Add two and two.",
    "Read the text.\nThe tower was built in 1889 for a fair and was meant to be taken down after twenty years.\nWhy does it still stand?",
]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return make_bench(tmp_path, decontaminate=dataset("exam", prompts_file(tmp_path / "exam.jsonl", ITEMS)))


def found(step: Contamination, rows: Sequence[Row], bench: Bench) -> list[int]:
    """Positions of the dropped rows."""
    return [(drop.index - 10) // 2 for drop in step.run(candidates_of(rows), bench).dropped]


def test_a_row_that_holds_an_item_is_dropped_and_says_which(bench: Bench, tmp_path: Path):
    rows = [
        chat("John.", prompt="Please help! WHICH king of England signed the “Magna Carta”, at Runnymede in the year 1215?"),
        chat("John.", prompt="Which king signed it?"),
    ]
    outcome = Contamination().run(candidates_of(rows), bench)
    assert [candidate.row for candidate in outcome.kept] == rows[1:]
    (drop,) = outcome.dropped
    assert (drop.reason, drop.detail, drop.match) == ("contamination: n-gram", "1.00, exam", f"{tmp_path}/exam.jsonl:1")
    assert outcome.facts == {"items": 3, "items found": {"exam": 1}}


def test_a_short_item_counts_where_it_is_a_whole_line(bench: Bench):
    rows = [
        chat("4", prompt="add two and two!"),
        chat("4", prompt="Answer in a word.\n\nAdd two and two."),
        chat("5", prompt="Add two and two, and then one."),
    ]
    assert found(Contamination(), rows, bench) == [0, 1]


def test_a_part_of_an_item_counts_by_its_share_of_the_shorter_text(bench: Bench):
    passage = "The tower was built in 1889 for a fair and was meant to be taken down after twenty years."
    rows = [
        chat("x", prompt=passage),  # a part of the item, all of the row
        chat("x", prompt=f"{passage} " + "It is made of iron, painted every seven years, and lit at night by lamps. " * 4),
        chat("x", prompt="The tower was built in 1889 for a fair, by people who wanted to see the river from above it, and a hill."),
    ]
    assert found(Contamination(), rows, bench) == [0, 1]
    assert found(Contamination(share=0.0), rows, bench) == [0, 1, 2]
    assert found(Contamination(share=0.0, ngram=13), rows, bench) == [0, 1]


def test_only_prompts_are_compared_unless_answers_are_asked_for(bench: Bench):
    rows = [chat("Add two and two."), pair("yes", "Add two and two.")]
    assert found(Contamination(), rows, bench) == []
    assert found(Contamination(answers=True), rows, bench) == [0, 1]


def test_shares_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in rng.integers(0, 3, rng.integers(1, 40))) for _ in range(80)]
    items, rows = texts[:30], texts[30:]

    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[start : start + 5]) for start in range(len(words) - 4)}

    index = NgramIndex(items, 5)
    for row in rows:
        shares = [
            float(item == row)
            if len(item.split()) < 5
            else (len(grams(item) & grams(row)) / min(len(grams(item)), len(grams(row))) if grams(row) else 0.0)
            for item in items
        ]
        best = index.best(row)
        assert (best or (0.0, None))[0] == max(shares)
        if best and best[0] < 1:
            assert best[1] == shares.index(max(shares))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't  STOP—now: 3.5 __", ["don", "t", "stop", "now", "3", "5"]),
        ("ﬁne Straße", ["fine", "strasse"]),
        ("2の問題 ok", ["2", "の", "問", "題", "ok"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
    ],
)
def test_words_are_compared_without_case_and_form(text: str, words: list[str]):
    assert words_of(text) == words


def test_the_last_line_is_looked_at_where_it_can_be_a_question():
    assert views_of("A long text.\nWhat does it say?\n") == ["A long text.\nWhat does it say?", "What does it say?"]
    assert views_of("A long text.\nAnswer:") == ["A long text.\nAnswer:"]
    assert views_of("What does it say?") == ["What does it say?"]


def test_nearness_is_that_of_brute_force():
    rng = np.random.default_rng(0)
    rows, views = (normal / np.linalg.norm(normal, axis=1, keepdims=True) for normal in rng.normal(size=(2, 120, 8)).astype(np.float32))
    owners = np.sort(np.concatenate([np.arange(90), rng.integers(0, 90, 30)]))
    nearness = Nearness(rows, views, owners)
    cosines = np.array([[max(row @ views[view] for view in np.flatnonzero(owners == item)) for item in range(90)] for row in rows])
    np.testing.assert_allclose(nearness.similarities(range(120)), cosines, atol=1e-6)

    def mean_of_neighbours(similarities: Any) -> float:
        return float(np.mean(sorted(similarities, reverse=True)[10:60]))

    around_items = nearness.around_items()
    np.testing.assert_allclose(around_items, [mean_of_neighbours(column) for column in cosines.T], atol=1e-6)
    best = nearness.best(range(20, 70), around_items, 0.5)
    for row, (similarity, margin, item) in zip(range(20, 70), best, strict=True):
        margins = [s - (mean_of_neighbours(cosines[row]) + around_items[i]) / 2 for i, s in enumerate(cosines[row])]
        near = [i for i in range(90) if cosines[row, i] >= 0.5]
        if near:
            assert int(item) == max(near, key=lambda i: margins[i])
            assert similarity == pytest.approx(cosines[row, int(item)], abs=1e-6)
            assert margin == pytest.approx(margins[int(item)], abs=1e-6)
        else:
            assert similarity < 0.5


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(1)
    nearness = Nearness(rng.normal(size=(200, 4)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32), np.arange(9))
    whole = nearness.around_items(), nearness.best(range(200), nearness.around_items(), 0.1)
    monkeypatch.setattr("posttrain.curate.contamination.CELLS_AT_ONCE", 100)
    np.testing.assert_allclose(nearness.around_items(), whole[0], atol=1e-6)
    np.testing.assert_allclose(nearness.best(range(200), whole[0], 0.1), whole[1], atol=1e-6)


def test_among_few_others_the_nearest_is_never_its_own_neighbour():
    for number in range(2, 80):
        similarities = np.zeros((1, number), dtype=np.float32)
        similarities[0, 0] = 1
        assert around(largest(similarities, NEIGHBOURS[1]), number)[0] == 0
    assert around(np.ones((1, 1), dtype=np.float32), 1)[0] == 0


def test_a_rephrase_is_found_by_a_sentence_model_and_the_rest_is_kept(bench: Bench):
    step = Contamination(similarity=0.6, embedder=minilm())
    rows = [
        ask("At Runnymede, in 1215, the Magna Carta was signed by which English monarch?"),
        ask("Which king of France built the palace of Versailles?"),
        ask("How do I bake bread without yeast?"),
        ask("Which king of England signed the Magna Carta at Runnymede in the year 1215?"),
    ]
    outcome = step.run(candidates_of(rows), bench)
    assert {(drop.index - 10) // 2: drop.reason for drop in outcome.dropped} == {0: "contamination: similarity", 3: "contamination: n-gram"}
    assert outcome.dropped[0].match == outcome.dropped[1].match
    assert float(outcome.dropped[0].detail.split(",")[0]) > 0.6


def test_a_rerun_decides_the_same(bench: Bench, tiny: Path, tmp_path: Path):
    against = dataset("exam", tmp_path / "exam.jsonl")
    rows = [chat(f"answer {n}", prompt=f"what is the colour of bird {n}?" + " and why?" * (n % 4)) for n in range(40)]
    step = Contamination(similarity=0.2, margin=0.0)
    outcomes: list[Outcome] = []
    for name in "ab":
        outcomes.append(step.run(candidates_of(rows), make_bench(tmp_path / name, policy=policy(tiny), decontaminate=against)))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] == step.run(candidates_of(rows), make_bench(tmp_path / "a", policy=policy(tiny), decontaminate=against))


@pytest.mark.parametrize("settings", [{"embedder": {"model": "."}}, {"margin": 0.1}])
def test_settings_of_similarity_are_refused_without_it(settings: dict[str, Any]):
    with pytest.raises(UserError, match=r"contamination\.(embedder|margin): has no effect without similarity"):
        validate(Contamination, settings, "stages.curate.steps[0].contamination")


# Real data.

CSV = {"format": "prompt", "columns": {"prompt": "question"}, "column_names": ["question", "a", "b", "c", "d", "answer"]}


def read_rephrases(shared: Path, name: str) -> list[Conversation]:
    lines = (shared / "data/decontam" / f"{name}_test_rephrase_english_filtered_question.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"].strip() for line in lines]
    return [ask(text, f"{name}:{number}") for number, text in enumerate(texts) if text]


@pytest.mark.real
def test_rephrases_of_real_test_sets_are_found_and_clean_rows_are_kept(shared: Path, tmp_path: Path):
    sets = {name: shared / "data/decontam" / f"{name}_test.csv" for name in ("sociology", "high_school_us_history")}
    bench = make_bench(tmp_path, decontaminate=[dataset(name, path, **CSV) for name, path in sets.items()])
    rephrases = {name: read_rephrases(shared, name) for name in sets}
    assert {name: len(rows) for name, rows in rephrases.items()} == {"sociology": 197, "high_school_us_history": 192}
    lines = (shared / "data/gsm8k_train/train.jsonl").read_text().splitlines()
    clean = [ask(json.loads(line)["question"], f"gsm8k:{number}") for number, line in enumerate(lines[:1500])]
    rows = [row for each in rephrases.values() for row in each] + clean
    candidates = [Candidate(number, "chat", row) for number, row in enumerate(rows)]
    outcome = Contamination(similarity=0.6, embedder=minilm()).run(candidates, bench)
    dropped = {drop.index: drop for drop in outcome.dropped}
    assert sum(number in dropped for number in range(197)) > 0.95 * 197
    assert sum(number in dropped for number in range(197, 389)) > 0.94 * 192
    assert sum(number in dropped for number in range(389, len(rows))) < 0.01 * len(clean)
    # The item that is named is, nearly always, the very one that was rephrased.
    origins = {item.origin: number for number, item in enumerate(read_items(bench, answers=False))}
    true = {number: int(row.origin.split(":")[1]) + (201 if number >= 197 else 0) for number, row in enumerate(rows[:389])}
    assert np.mean([origins[dropped[number].match or ""] == true[number] for number in range(389) if number in dropped]) > 0.95


@pytest.mark.real
def test_questions_of_the_same_kind_are_kept(shared: Path, tmp_path: Path):
    lines = (shared / "data/gsm8k_train/train.jsonl").read_text().splitlines()
    questions = [json.loads(line)["question"] for line in lines[:1500]]
    bench = make_bench(tmp_path, decontaminate=dataset("gsm8k", prompts_file(tmp_path / "exam.jsonl", questions[:500])))
    rows = [Candidate(number, "chat", ask(question)) for number, question in enumerate(questions[500:])]
    alone, with_margin = (
        Contamination(similarity=0.6, margin=margin, embedder=minilm()).run(rows, bench).dropped for margin in (0.0, None)
    )
    assert len(with_margin) < 0.01 * len(rows) < 0.5 * len(rows) < len(alone)


@pytest.mark.real
def test_instructions_that_stand_in_both_of_two_public_sets_are_found(shared: Path, tmp_path: Path):
    against = dataset(
        "user_oriented", shared / "data/self_instruct/user_oriented_instructions.jsonl", format="prompt", columns={"prompt": "instruction"}
    )
    bench = make_bench(tmp_path, decontaminate=against)
    records = json.loads((shared / "data/pandalm_testset/testset-v1.json").read_text())
    prompts = list(dict.fromkeys("\n\n".join(text for text in (record["instruction"], record["input"]) if text) for record in records))
    assert len(prompts) == 170
    outcome = Contamination().run(candidates_of([ask(prompt) for prompt in prompts]), bench)
    assert len(outcome.dropped) == 169
    pairs = dataset("pandalm", shared / "data/pandalm_testset/derived_pairs.jsonl", invalid_rows="drop")
    kept = Contamination().run(candidates_of(list(open_source(pairs.data, "sources.pandalm").rows())), bench).kept
    assert len({prompt_of(candidate.row) for candidate in kept}) <= 1
