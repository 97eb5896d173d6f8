"""Duplicates against brute force: every pair of rows compared in plain Python."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from posttrain.config import DataSource
from posttrain.curate.duplicates import ExactDuplicates, NearDuplicates, WordHashes, choose_bands, jaccard, shingle
from posttrain.curate.rows import texts_of
from posttrain.curate.text import words
from posttrain.data.rows import Conversation, Row
from posttrain.data.source import open_source
from tests.posttrain.curate.bench import apply, chat, dropped, pair


def shingles(row: Row, ngram: int) -> set[tuple[str, ...]]:
    """The sequences of `ngram` words of a row without tools, as the definition says."""
    sequence = words("\n".join(texts_of(row)))
    return {tuple(sequence[i : i + ngram]) for i in range(max(1, len(sequence) - ngram + 1))} if sequence else set()


def similarity(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b) if a or b else 0.0


def by_brute_force(rows: Sequence[Row], threshold: float, ngram: int, order: Sequence[int] | None = None) -> set[int]:
    """The rows that are alike to one that is kept before them, every pair compared."""
    sets = [shingles(row, ngram) for row in rows]
    kept: list[int] = []
    for position in order or range(len(rows)):
        if not any(similarity(sets[position], sets[other]) >= threshold for other in kept):
            kept.append(position)
    return set(range(len(rows))) - set(kept)


VOCABULARY = [f"word{n}" for n in range(200)]


def perturbed(num_families: int, seed: int) -> list[Row]:
    """Families of rows that differ in some of their words, from none to a third of them, in mixed order."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for _ in range(num_families):
        base = rng.choices(VOCABULARY, k=rng.randint(3, 120))
        for share in (0.0, 0.005, 0.01, 0.02, 0.04, 0.1, 0.3):
            text = [rng.choice(VOCABULARY) if rng.random() < share else word for word in base]
            rows.append(chat(" ".join(text), prompt=base[0], origin=f"{len(rows)}"))
    rng.shuffle(rows)
    return rows


@pytest.mark.parametrize("threshold, ngram", [(0.8, 5), (0.5, 3), (0.9, 1), (1.0, 5), (0.3, 2)])
def test_near_duplicates_are_those_of_brute_force(threshold: float, ngram: int) -> None:
    rows = perturbed(60, seed=1)
    outcome = apply(NearDuplicates(threshold=threshold, ngram=ngram), rows)
    found = {(drop.index - 10) // 2 for drop in outcome.dropped}
    assert found == by_brute_force(rows, threshold, ngram)
    assert 20 < len(found) < len(rows) - 20
    origins = {row.origin: row for row in rows}
    kept = {candidate.row.origin for candidate in outcome.kept}
    for drop in outcome.dropped:
        assert drop.match in kept, "the row that it repeats is there to be learned"
        value = similarity(*(shingles(row, ngram) for row in (rows[(drop.index - 10) // 2], origins[drop.match])))
        assert value >= threshold
        assert drop.detail == f"similarity {value:.3f}"


def test_the_longest_can_be_kept_instead_of_the_first() -> None:
    cut = random.Random(2)
    rows: list[Row] = []
    for row in perturbed(40, seed=2):
        said = texts_of(row)[1].split()
        rows.append(chat(" ".join(said[: len(said) - cut.randint(0, len(said) // 8)]), prompt=said[0]))
    lengths = [len(shingles(row, 5)) for row in rows]
    order = sorted(range(len(rows)), key=lambda position: (-lengths[position], position))
    found = dropped(NearDuplicates(keep="longest"), rows)
    assert set(found) == by_brute_force(rows, 0.8, 5, order)
    assert set(found) != set(dropped(NearDuplicates(), rows))


def test_the_seed_of_the_signatures_changes_nothing_that_is_found() -> None:
    rows = perturbed(40, seed=3)
    assert [apply(NearDuplicates(), rows, seed=n).dropped for n in (1, 2)] == [apply(NearDuplicates(), rows, seed=0).dropped] * 2


def test_all_rows_may_be_the_same_or_none_have_words() -> None:
    same = [chat("the very same answer to all of it", origin=str(n)) for n in range(700)]
    assert set(dropped(NearDuplicates(), same)) == set(range(1, 700))
    assert dropped(NearDuplicates(by="answer"), [chat("..."), chat("..."), chat("?!")]) == {}
    assert dropped(NearDuplicates(), []) == {}


def test_only_prompts_or_answers_can_be_compared() -> None:
    prompt, answer = "what is the colour of the sky on a clear day?", "it is blue, since blue light is scattered the most"
    rows = [chat(answer, prompt), chat("who can tell such a thing on a day like this?", prompt), chat(answer, "and of the sea in the sun?")]
    assert dropped(NearDuplicates(), rows) == {}
    assert dropped(NearDuplicates(by="prompt"), rows) == {1: "near duplicate"}
    assert dropped(NearDuplicates(by="answer"), rows) == {2: "near duplicate"}


def calling(city: str) -> Row:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
    messages = [{"role": "user", "content": "how is the weather there?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return Conversation(messages, None, [], city)  # type: ignore[arg-type]


def test_rows_that_differ_in_what_a_tool_is_called_with_are_no_duplicates() -> None:
    assert dropped(NearDuplicates(), [calling("Berlin"), calling("Rome"), calling("Berlin")]) == {2: "near duplicate"}
    assert dropped(ExactDuplicates(), [calling("Berlin"), calling("Rome"), calling("Berlin")]) == {2: "exact duplicate"}


def test_exact_duplicates_differ_in_case_and_white_space_alone() -> None:
    rows = [
        chat("It is  Blue.\n", origin="a"),
        chat("it is blue.", origin="b"),
        chat("It is blue!"),
        chat("It is blue.", "Another question?"),
    ]
    (drop,) = apply(ExactDuplicates(), rows).dropped
    assert (drop.index, drop.reason, drop.match) == (12, "exact duplicate", "a")
    assert dropped(ExactDuplicates(by="prompt"), rows) == {1: "exact duplicate", 2: "exact duplicate"}


def test_roles_tools_and_checks_tell_rows_apart() -> None:
    def row(**fields: object) -> Row:
        made = {"messages": chat("b", "a").messages, "tools": None, "checks": [], "origin": "x"} | fields
        return Conversation(**made)  # type: ignore[arg-type]

    other_roles = row(messages=[{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}])
    tools, checks = row(tools=[{"type": "function", "function": {"name": "f"}}]), row(checks=[{"kind": "regex_match", "pattern": "b"}])
    assert dropped(ExactDuplicates(), [row(), other_roles, tools, checks, row()]) == {4: "exact duplicate"}


def test_a_pair_with_the_same_answer_twice_teaches_nothing() -> None:
    rows = [pair("Yes.", "yes. "), pair("Yes.", "No."), pair("No.", "Yes.")]
    assert dropped(ExactDuplicates(), rows) == {0: "same answers"}


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0])
def test_pairs_at_the_threshold_become_candidates_nearly_always(threshold: float) -> None:
    num_bands, band_size = choose_bands(threshold)
    assert 1 - (1 - threshold**band_size) ** num_bands >= 0.999
    assert num_bands * band_size <= 256


def test_hashed_shingles_have_the_similarity_of_the_words_themselves() -> None:
    rows, hashes = perturbed(8, seed=4), WordHashes()
    hashed = [shingle(words("\n".join(texts_of(row))), 5, hashes) for row in rows]
    plain = [shingles(row, 5) for row in rows]
    for a in range(len(rows)):
        for b in range(len(rows)):
            assert jaccard(hashed[a], hashed[b]) == similarity(plain[a], plain[b])


@pytest.mark.real
def test_real_rows_against_brute_force(shared: Path) -> None:
    path = shared / "data" / "pandalm_testset" / "derived_pairs.jsonl"
    rows = list(open_source(DataSource(data=str(path), invalid_rows="drop"), "pairs").rows())
    assert set(dropped(NearDuplicates(), rows)) == by_brute_force(rows, 0.8, 5)
    exact, seen = set(), set()
    for number, row in enumerate(json.loads(line) for line in path.read_text().splitlines()):
        key = tuple(" ".join(row[name].lower().split()) for name in ("prompt", "chosen", "rejected"))
        if key in seen and all(key):
            exact.add(number)
        seen.add(key)
    places = [f"{path}:{number + 1}" for number in sorted(exact)]
    found = apply(ExactDuplicates(), rows).dropped
    assert [rows[(drop.index - 10) // 2].origin for drop in found if drop.reason == "exact duplicate"] == places
