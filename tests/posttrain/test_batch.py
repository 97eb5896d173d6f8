"""Which sample is learned from when is a function of few numbers: the seed, the epoch, the global batch; never of ranks or restarts."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.batch import GlobalBatches, count_steps, deal, epoch_order, micro_batch_size

QUICK = settings(max_examples=80, deadline=None)


def stream(num_samples: int, seed: int, length: int) -> list[int]:
    """The reference: one epoch's order after the other, by hand."""
    samples: list[int] = []
    epoch = 0
    while len(samples) < length:
        samples += np.random.default_rng([seed, epoch]).permutation(num_samples).tolist()
        epoch += 1
    return samples[:length]


def lengths_of(num_samples: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 50, num_samples).tolist()


def batches(
    num_samples: int = 23, *, steps: int = 9, share: int = 4, micro: int = 2, rank: int = 0, world_size: int = 1, seed: int = 0
) -> GlobalBatches:
    return GlobalBatches(
        lengths_of(num_samples),
        num_steps=steps,
        global_batch_size=share * world_size,
        micro_batch_size=micro,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


# --- the stream --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [1, 2, 7, 1000])
def test_every_epoch_sees_every_sample_once(num_samples):
    orders = [epoch_order(num_samples, 3, epoch).tolist() for epoch in range(4)]
    assert all(sorted(order) == list(range(num_samples)) for order in orders)


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    np.random.seed(0)
    first = epoch_order(100, 3, 5).tolist()
    np.random.seed(1)
    epoch_order(100, 9, 9)
    assert epoch_order(100, 3, 5).tolist() == first
    others = [epoch_order(100, seed, epoch).tolist() for seed, epoch in ((3, 4), (4, 5), (5, 3), (0, 0), (0, 1), (1, 0))]
    assert all(one != other for i, one in enumerate([first, *others]) for other in [first, *others][:i])


def test_the_order_is_the_one_that_earlier_versions_trained_on():
    # Recorded with numpy 2.4.6, which does not promise it: where this fails, a run begun before cannot be resumed exactly.
    assert epoch_order(10, 0, 0).tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]


@QUICK
@given(
    num_samples=st.integers(1, 60),
    share=st.sampled_from([1, 2, 3, 4, 6]),
    world_size=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_a_step_learns_from_its_stretch_of_the_stream_on_any_number_of_ranks_and_micro_batches(num_samples, share, world_size, seed, data):
    micro = data.draw(st.sampled_from([size for size in range(1, share + 1) if share % size == 0]))
    size, num_steps = share * world_size, 5
    whole = stream(num_samples, seed, num_steps * size)
    ranks = [
        list(batches(num_samples, steps=num_steps, share=share, micro=micro, rank=rank, world_size=world_size, seed=seed))
        for rank in range(world_size)
    ]
    accumulation = share // micro
    for step in range(num_steps):
        of_step = [micro_batch for rank in ranks for micro_batch in rank[step * accumulation : (step + 1) * accumulation]]
        assert all(len(micro_batch) == micro for micro_batch in of_step)
        assert sorted(itertools.chain(*of_step)) == sorted(whole[step * size : (step + 1) * size])


def test_a_step_that_ends_an_epoch_is_filled_up_from_the_next():
    epochs = batches(5, steps=3, share=4, micro=4)
    order = [epoch_order(5, 0, epoch).tolist() for epoch in range(3)]
    assert [epochs.samples(step).tolist() for step in range(3)] == [
        order[0][:4],
        order[0][4:] + order[1][:3],
        order[1][3:] + order[2][:2],
    ]


def test_a_global_batch_may_be_larger_than_the_data():
    assert sorted(batches(2, share=5, micro=1).samples(0).tolist()) == sorted([0, 1, 0, 1, epoch_order(2, 0, 2).tolist()[0]])


def test_steps_can_be_asked_for_in_any_order():
    asked = batches(7, share=3, micro=1)
    backwards = [asked.samples(step).tolist() for step in (8, 2, 5, 2, 0)]
    assert backwards == [batches(7, share=3, micro=1).samples(step).tolist() for step in (8, 2, 5, 2, 0)]


# --- resuming ----------------------------------------------------------------------------------------------------------


@QUICK
@given(num_samples=st.integers(1, 40), world_size=st.sampled_from([1, 2, 4]), start=st.integers(0, 9), data=st.data())
def test_a_resumed_run_goes_on_with_exactly_the_micro_batches_that_were_left(num_samples, world_size, start, data):
    rank, micro = data.draw(st.integers(0, world_size - 1)), data.draw(st.sampled_from([1, 2, 4]))
    whole = list(batches(num_samples, micro=micro, rank=rank, world_size=world_size))
    resumed = batches(num_samples, micro=micro, rank=rank, world_size=world_size)
    resumed.start_step = start
    assert list(resumed) == whole[start * (4 // micro) :]


def test_a_run_resumed_on_other_ranks_learns_from_the_same_samples_in_the_same_steps():
    before = [batches(share=8, micro=4).samples(step).tolist() for step in range(9)]
    after = [batches(share=2, micro=1, rank=3, world_size=4).samples(step).tolist() for step in range(9)]
    assert before == after


def test_len_counts_the_micro_batches_of_the_whole_run_wherever_it_starts():
    counted = batches(steps=9, share=4, micro=2)
    assert len(counted) == len(list(counted)) == 18
    counted.start_step = 8
    assert len(counted) == 18 and len(list(counted)) == 2


def test_iterating_twice_gives_the_same_twice():
    twice = batches()
    assert list(twice) == list(twice)


def test_what_does_not_divide_is_refused():
    with pytest.raises(AssertionError, match="divide the global batch"):
        batches(share=4, micro=3)


# --- steps and sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_samples", "num_epochs", "size", "steps"),
    [
        (64, 1, 64, 1),
        (65, 1, 64, 2),
        (64, 2, 64, 2),
        (10, 3, 4, 8),
        (100, 0.5, 10, 5),
        (100, 0.1, 64, 1),
        (3, 0.1, 64, 1),
        (30, 0.1, 3, 1),
        (10, 1.1, 11, 1),
    ],
)
def test_steps_suffice_for_the_epochs_asked_for_and_no_more(num_samples, num_epochs, size, steps):
    assert count_steps(num_samples, num_epochs, size) == steps


@QUICK
@given(num_samples=st.integers(1, 10**6), tenths=st.integers(1, 100), size=st.integers(1, 4096))
def test_steps_are_counted_as_exact_arithmetic_would(num_samples, tenths, size):
    assert count_steps(num_samples, tenths / 10, size) == math.ceil(Fraction(num_samples * tenths, 10) / size)


@given(share=st.integers(1, 200), at_most=st.integers(1, 200))
def test_a_micro_batch_is_the_largest_that_fits_and_divides(share, at_most):
    size = micro_batch_size(share, at_most)
    assert share % size == 0 and size <= at_most
    assert not any(share % larger == 0 for larger in range(size + 1, min(share, at_most) + 1))


def test_tokens_of_a_step_are_those_of_all_ranks():
    lengths = lengths_of(23)
    for world_size in (1, 2, 4):
        step = batches(share=8 // world_size, micro=1, world_size=world_size)
        assert step.num_tokens(3) == sum(lengths[sample] for sample in stream(23, 0, 32)[24:])


# --- dealing out -------------------------------------------------------------------------------------------------------


def test_a_batch_is_dealt_as_here_by_hand():
    samples, lengths = [10, 11, 12, 13, 14, 15, 16, 17], [3, 9, 1, 7, 7, 2, 8, 5]
    # by length: 11 (9), 16 (8), 13 (7), 14 (7), 17 (5), 10 (3), 15 (2), 12 (1)
    assert deal(samples, lengths, 2, 2) == [[[11, 16], [17, 10]], [[13, 14], [15, 12]]]
    assert deal(samples, lengths, 2, 1) == [[[11, 16], [13, 14], [17, 10], [15, 12]]]
    assert deal(samples, lengths, 1, 4) == [[[11], [17]], [[16], [10]], [[13], [15]], [[14], [12]]]


@QUICK
@given(share=st.sampled_from([1, 2, 4, 6]), world_size=st.sampled_from([1, 2, 4]), data=st.data())
def test_the_longest_come_first_and_neighbours_in_length_work_at_the_same_time(share, world_size, data):
    micro = data.draw(st.sampled_from([size for size in range(1, share + 1) if share % size == 0]))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=share * world_size, max_size=share * world_size))
    dealt = deal(range(len(lengths)), lengths, micro, world_size)
    in_time = [sample for step in zip(*dealt, strict=True) for micro_batch in step for sample in micro_batch]
    assert sorted(in_time) == list(range(len(lengths)))
    assert [lengths[sample] for sample in in_time] == sorted(lengths, reverse=True)
