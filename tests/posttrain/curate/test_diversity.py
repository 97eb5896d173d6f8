"""Diversity against greedy selection that looks at everything each time, and on clusters made by hand."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from posttrain.config import validate
from posttrain.curate.diversity import Diversity, coverage, facility_location, k_center
from posttrain.curate.embed import normalize
from posttrain.error import UserError
from tests.posttrain.curate.bench import candidates_of
from tests.posttrain.curate.measured import ask, make_bench, minilm, policy

Vectors = npt.NDArray[np.float32]


def random_vectors(number: int, seed: int = 0) -> Vectors:
    return normalize(np.random.default_rng(seed).normal(size=(number, 6)).astype(np.float32))


def clusters(sizes: tuple[int, ...]) -> tuple[Vectors, list[int]]:
    """Vectors about orthogonal centres, and the cluster of each."""
    rng = np.random.default_rng(0)
    owners = [cluster for cluster, size in enumerate(sizes) for _ in range(size)]
    vectors = np.eye(len(sizes))[owners] + rng.normal(scale=0.02, size=(len(owners), len(sizes)))
    return normalize(vectors.astype(np.float32)), owners


def brute_k_center(vectors: Vectors, number: int, first: int) -> list[int]:
    distances = 1 - vectors.astype(np.float64) @ vectors.T
    picked = [first]
    while len(picked) < number:
        left = [row for row in range(len(vectors)) if row not in picked]
        picked.append(max(left, key=lambda row: min(distances[row, other] for other in picked)))
    return picked


def brute_facility_location(vectors: Vectors, number: int) -> list[int]:
    nearness = (1 + vectors.astype(np.float64) @ vectors.T) / 2
    picked: list[int] = []
    while len(picked) < number:
        left = [row for row in range(len(vectors)) if row not in picked]
        picked.append(max(left, key=lambda row: nearness[:, [*picked, row]].max(axis=1).sum()))
    return picked


@pytest.mark.parametrize("seed", range(3))
def test_k_center_is_greedy(seed: int):
    vectors = random_vectors(90, seed)
    assert list(k_center(vectors, 30, first=seed)) == brute_k_center(vectors, 30, first=seed)


@pytest.mark.parametrize("seed", range(3))
def test_lazy_facility_location_is_greedy(seed: int):
    vectors = random_vectors(200, seed)
    assert list(facility_location(vectors, 40)) == brute_facility_location(vectors, 40)


def test_every_cluster_is_represented():
    vectors, owners = clusters((100, 40, 3, 1, 60))
    for picked in (list(k_center(vectors, 5, first=7)), list(facility_location(vectors, 5))):
        assert sorted(owners[row] for row in picked) == [0, 1, 2, 3, 4]


def test_facility_location_begins_with_what_stands_for_most():
    vectors, owners = clusters((100, 40, 3, 1, 60))
    assert [owners[row] for row in facility_location(vectors, 3)] == [0, 4, 1]


def test_rows_that_are_equal_are_picked_once_each_in_order():
    vectors = normalize(np.ones((6, 3), dtype=np.float32))
    assert list(k_center(vectors, 6, first=2)) == [2, 0, 1, 3, 4, 5]
    assert list(facility_location(vectors, 6)) == [0, 1, 2, 3, 4, 5]


def test_coverage_is_that_of_the_nearest_picked_row(monkeypatch: pytest.MonkeyPatch):
    vectors = random_vectors(50)
    nearest = (vectors @ vectors[[3, 8, 20]].T).max(axis=1)
    monkeypatch.setattr("posttrain.curate.diversity.CELLS_AT_ONCE", 30)
    assert coverage(vectors, [3, 8, 20]) == pytest.approx({"mean cosine": nearest.mean(), "least cosine": nearest.min()})


SUBJECTS = {
    "bread": ["How do I bake bread?", "Give me a recipe for baking bread.", "How is bread baked at home?", "I want to bake bread. How?"],
    "moon": ["How far away is the moon?", "What is the distance to the moon?", "How many miles is it to the moon?", "Is the moon far?"],
    "rent": ["Can a landlord raise the rent?", "My landlord raises the rent.", "When may rent be raised?", "May my rent be raised?"],
}


@pytest.mark.parametrize("method", ["k_center", "facility_location"])
def test_prompts_of_every_subject_are_kept(method: str, tmp_path: Path):
    step = Diversity.model_validate({"keep": 3, "method": method, "embedder": minilm()})
    prompts = [prompt for subject in SUBJECTS.values() for prompt in subject]
    outcome = step.run(candidates_of([ask(prompt) for prompt in prompts]), make_bench(tmp_path, seed=1))
    kept = [prompts.index(candidate.row.messages[0]["content"]) // 4 for candidate in outcome.kept]  # type: ignore[union-attr]
    assert kept == [0, 1, 2]
    assert {drop.reason for drop in outcome.dropped} == {"diversity: over the budget"}
    assert len(outcome.dropped) == 9


@pytest.mark.parametrize("method", ["k_center", "facility_location"])
def test_a_rerun_keeps_the_same(method: str, tiny: Path, tmp_path: Path):
    rows = candidates_of([ask(f"what is the colour of bird {n}?" + " and why?" * (n % 4)) for n in range(50)])
    step = Diversity.model_validate({"keep": 0.2, "method": method})
    outcomes = [step.run(rows, make_bench(tmp_path / name, seed=3, policy=policy(tiny))) for name in "aab"]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert len(outcomes[0].kept) == 10
    assert [candidate.index for candidate in outcomes[0].kept] == sorted(candidate.index for candidate in outcomes[0].kept)


def test_the_seed_decides_where_k_center_begins(tiny: Path, tmp_path: Path):
    rows = candidates_of([ask(f"what is the colour of bird {n}?") for n in range(30)])
    step = Diversity(keep=1, method="k_center")
    kept = {step.run(rows, make_bench(tmp_path / str(seed), seed, policy=policy(tiny))).kept[0].index for seed in range(5)}
    assert len(kept) > 1


def test_a_budget_for_all_needs_no_model(tmp_path: Path):
    rows = candidates_of([ask(f"prompt {n}") for n in range(5)])
    assert Diversity(keep=5).run(rows, make_bench(tmp_path)).kept == rows
    assert Diversity(keep=1.0).run(rows, make_bench(tmp_path)).kept == rows


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.5, "all"])
def test_a_budget_is_a_number_or_a_share(keep: object):
    with pytest.raises(UserError, match=r"diversity\.keep"):
        validate(Diversity, {"keep": keep}, "stages.curate.steps[0].diversity")
