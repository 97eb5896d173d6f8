"""A mixture: shares, determinism, and what cannot be shared out."""

from collections import Counter
from pathlib import Path

import pytest

from posttrain.config import validate
from posttrain.curate.mixture import Mixture, share_out
from posttrain.curate.step import Candidate, Outcome
from posttrain.data.source import unit
from posttrain.error import UserError
from tests.posttrain.curate.bench import chat
from tests.posttrain.curate.measured import dataset, make_bench


def candidates(**counts: int) -> list[Candidate]:
    """So many candidates of each data set, in order."""
    sources = [source for source, count in counts.items() for _ in range(count)]
    return [Candidate(3 * number, source, chat(f"answer {number}")) for number, source in enumerate(sources)]


def mix(
    weights: dict[str, float], given: list[Candidate], directory: Path, seed: int = 0, names: tuple[str, ...] = ("a", "b", "c")
) -> Outcome:
    bench = make_bench(directory, seed, data=[dataset(name, directory / "x.jsonl") for name in names])
    return Mixture(weights=weights).run(given, bench)


def test_the_scarcest_data_set_sets_the_total(tmp_path: Path):
    outcome = mix({"a": 0.5, "b": 0.3, "c": 0.2}, candidates(a=100, b=30, c=500), tmp_path)
    assert Counter(candidate.source for candidate in outcome.kept) == {"a": 50, "b": 30, "c": 20}
    assert {drop.reason for drop in outcome.dropped} == {"over its share of the mixture"}
    assert len(outcome.kept) + len(outcome.dropped) == 630
    assert outcome.facts == {"taken": {"a": 50, "b": 30, "c": 20}}


def test_kept_rows_stay_in_order_and_are_those_of_least_hash(tmp_path: Path):
    given = candidates(a=40, b=10)
    outcome = mix({"a": 1, "b": 1}, given, tmp_path, seed=7, names=("a", "b"))
    kept = [candidate.index for candidate in outcome.kept]
    assert kept == sorted(kept)
    by_hash = sorted((candidate.index for candidate in given if candidate.source == "a"), key=lambda index: unit(7, f"mixture {index}"))
    assert {index for index in kept if index < 120} == set(by_hash[:10])


def test_the_seed_alone_decides(tmp_path: Path):
    given = candidates(a=40, b=10)
    kept = [[candidate.index for candidate in mix({"a": 1, "b": 1}, given, tmp_path, seed, ("a", "b")).kept] for seed in (1, 1, 2)]
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.7, "b": 0.2, "c": 0.1}, {"a": 3.0, "b": 2.0, "c": 0.5}])
def test_no_share_is_off_by_a_row_or_more_and_none_is_beyond_what_is_there(weights: dict[str, float]):
    for counts in ({"a": 17, "b": 5, "c": 31}, {"a": 1, "b": 1, "c": 1}, {"a": 1000, "b": 999, "c": 77}):
        takes = share_out(weights, counts)
        total = sum(takes.values())
        for source, take in takes.items():
            assert abs(take - total * weights[source] / sum(weights.values())) < 1
            assert take <= counts[source]
        grown = total + len(weights)
        assert any(grown * weights[source] / sum(weights.values()) > counts[source] for source in counts)


@pytest.mark.parametrize(
    ("weights", "counts", "said"),
    [
        (
            {"a": 1.0, "bb": 1.0},
            {"a": 2, "b": 2},
            "stages.curate: mixture.weights.bb: no data set of this stage has that name; did you mean 'b'",
        ),
        ({"a": 1.0}, {"a": 2, "b": 2}, "stages.curate: mixture.weights: names no share of b"),
        ({"a": 1.0, "b": 1.0}, {"a": 2}, "stages.curate: mixture.weights.b: no row of it is left"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(weights: dict[str, float], counts: dict[str, int], said: str, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        mix(weights, candidates(**counts), tmp_path, names=("a", "b"))
    assert said in str(caught.value)


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": -1.0}])
def test_shares_are_above_0(weights: dict[str, float]):
    with pytest.raises(UserError, match=r"steps\[0\].mixture.weights"):
        validate(Mixture, {"weights": weights}, "steps[0].mixture")
