"""Batches: which samples a step learns from, and which rank and micro-batch holds each. Pure functions of few numbers.

Samples form one endless stream: the permutation of epoch 0, then that of epoch 1, and so on, each a function of (seed,
epoch) alone. Step k learns from samples k*G .. (k+1)*G of the stream, on 1 rank or on 64; so the position of a run is one
number, and no sample is left out at the end of an epoch. Within a step, samples are sorted by length and cut into
micro-batches by the tokens they cost, so that what is computed together is of like length, and dealt out so that ranks work
on like amounts at the same time.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def epoch_order(num_samples: int, seed: int, epoch: int) -> Indices:
    """The order of all samples in an epoch, `(num_samples,)`."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def count_steps(num_samples: int, num_epochs: float, global_batch_size: int) -> int:
    """Steps after which every sample was seen `num_epochs` times; the last batch is filled up from the next epoch."""
    return max(1, math.ceil(num_samples * num_epochs / global_batch_size - 1e-9))


@dataclass(frozen=True)
class Sizes:
    """What samples cost: tokens of their longest sequence, tokens computed for all of it, and how many sequences, each `(N,)`."""

    longest: Indices
    computed: Indices
    sequences: Indices
    is_padded: bool = False
    """Whether every sequence is filled up to the longest it is computed with."""

    def __getitem__(self, samples: Sequence[int] | Indices) -> "Sizes":
        at = np.asarray(samples, dtype=np.int64)
        return Sizes(self.longest[at], self.computed[at], self.sequences[at], self.is_padded)

    def __len__(self) -> int:
        return len(self.longest)

    def cut(self, at_most: int) -> list[int]:
        """Where each part begins, if samples are taken in order into parts of at most so many tokens; a longer one stands alone."""
        starts, total, widest, rows = [0], 0, 0, 0
        costs = zip(self.longest.tolist(), self.computed.tolist(), self.sequences.tolist(), strict=True)
        for position, (longest, computed, sequences) in enumerate(costs):
            total, widest, rows = total + computed, max(widest, longest), rows + sequences
            if position > starts[-1] and (rows * widest if self.is_padded else total) > at_most:
                starts.append(position)
                total, widest, rows = computed, longest, sequences
        return starts


def deal(samples: Sequence[int] | Indices, sizes: Sizes, micro_batch_tokens: int, world_size: int) -> list[list[list[int]]]:
    """Deal a global batch out: `[rank][micro-step]` -> samples; `sizes` are those of `samples`.

    Sorted by length, cut into micro-batches of at most `micro_batch_tokens` tokens, as few as every rank can have equally many
    of and of as equal cost as may be, and those dealt to the ranks in turn: at each micro-step the ranks hold neighbours in
    length. The longest come first, so memory peaks at once and not hours later.
    """
    order = sorted(range(len(samples)), key=lambda position: (-int(sizes.longest[position]), -int(sizes.computed[position]), position))
    ranked = sizes[order]
    most = len(samples) // world_size * world_size
    wanted = min(most, math.ceil(len(ranked.cut(micro_batch_tokens)) / world_size) * world_size)
    low, high = 1, int(ranked.longest.max(initial=1) * ranked.sequences.sum() + ranked.computed.sum())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(ranked.cut(middle)) <= wanted else (middle + 1, high)
    starts = [*ranked.cut(low), len(order)]
    while len(starts) - 1 < wanted:
        # Some rank would have a micro-batch less than others, which wait for it in a collective.
        widest = max(range(len(starts) - 1), key=lambda part: starts[part + 1] - starts[part])
        starts.insert(widest + 1, (starts[widest] + starts[widest + 1]) // 2)
    micro_batches = [[int(samples[position]) for position in order[start:end]] for start, end in itertools.pairwise(starts)]
    return [micro_batches[rank::world_size] for rank in range(world_size)]


def token_batches(lengths: Sequence[int], at_most: int) -> Iterator[list[int]]:
    """Positions in batches of at most `at_most` tokens, padding counted, the longest first; one that is longer stands alone."""
    each = np.asarray(lengths, dtype=np.int64)
    yield from sized_batches(Sizes(each, each, np.ones_like(each), is_padded=True), at_most)


def sized_batches(sizes: Sizes, at_most: int) -> Iterator[list[int]]:
    """Positions in batches that cost at most `at_most` tokens, the longest first; one that costs more stands alone."""
    if not len(sizes):
        return
    order = np.argsort(-sizes.longest, kind="stable")
    for start, end in itertools.pairwise([*sizes[order].cut(at_most), len(order)]):
        yield order[start:end].tolist()


class GlobalBatches:
    """The steps of one rank, in order, from any step on, each its micro-batches; a batch sampler for `torch.utils.data.DataLoader`.

    `len` counts the steps of the whole run, whatever step it starts from. `sizes` and `micro_batch_tokens` decide only how a
    global batch is cut up, and may be set until the first step is asked for. Without a seed every step takes the first samples.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        num_steps: int,
        global_batch_size: int,
        micro_batch_tokens: int,
        seed: int | None,
        rank: int,
        world_size: int,
    ) -> None:
        assert global_batch_size >= world_size, "every rank must have a sample of each step"
        self.sizes = sizes
        self.num_steps = num_steps
        self.global_batch_size = global_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_step = 0
        self._order: tuple[int, Indices] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[list[int]]]:
        for step in range(self.start_step, self.num_steps):
            yield self.deal(step)[self.rank]

    def deal(self, step: int) -> list[list[list[int]]]:
        """The samples of a step, `[rank][micro-step]`."""
        samples = self.samples(step)
        return deal(samples, self.sizes[samples], self.micro_batch_tokens, self.world_size)

    def samples(self, step: int) -> Indices:
        """The samples of a step, in stream order, `(global_batch_size,)`."""
        if self.seed is None:
            return np.arange(self.global_batch_size, dtype=np.int64) % len(self.sizes)
        positions = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        epochs, offsets = np.divmod(positions, len(self.sizes))
        both = zip(epochs.tolist(), offsets.tolist(), strict=True)
        return np.array([self._epoch(self.seed, epoch)[offset] for epoch, offset in both], dtype=np.int64)

    def _epoch(self, seed: int, epoch: int) -> Indices:
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.sizes), seed, epoch))
        return self._order[1]
