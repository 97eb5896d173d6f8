"""Batches: which samples a step learns from, and which rank and micro-batch holds each. Pure functions of few numbers.

Samples form one endless stream: the permutation of epoch 0, then that of epoch 1, and so on, each a function of (seed,
epoch) alone. Step k learns from samples k*G .. (k+1)*G of the stream, on 1 rank or on 64; so the position of a run is one
number, and no sample is left out at the end of an epoch. Within a step, samples are sorted by length, so that those
which are padded together are of like length, and dealt out so that ranks work on like lengths at the same time.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def epoch_order(num_samples: int, seed: int, epoch: int) -> Indices:
    """The order of all samples in an epoch, `(num_samples,)`."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def count_steps(num_samples: int, num_epochs: float, global_batch_size: int) -> int:
    """Steps after which every sample was seen `num_epochs` times; the last batch is filled up from the next epoch."""
    return max(1, math.ceil(num_samples * num_epochs / global_batch_size - 1e-9))


def micro_batch_size(share: int, at_most: int) -> int:
    """The largest divisor of a rank's share of a global batch that does not exceed `at_most`."""
    return next(size for size in range(min(share, at_most), 0, -1) if share % size == 0)


def deal(samples: Sequence[int] | Indices, lengths: Sequence[int] | Indices, size: int, world_size: int) -> list[list[list[int]]]:
    """Deal a global batch out: `[rank][micro-step]` -> samples.

    Sorted by length, cut into micro-batches of `size`, and those dealt to the ranks in turn: at each micro-step the
    ranks hold neighbours in length. The longest come first, so memory peaks at once and not hours later.
    """
    order = sorted(range(len(samples)), key=lambda position: (-int(lengths[position]), position))
    micro_batches = [[int(samples[position]) for position in order[start : start + size]] for start in range(0, len(order), size)]
    return [micro_batches[rank::world_size] for rank in range(world_size)]


def token_batches(lengths: Sequence[int], at_most: int) -> Iterator[list[int]]:
    """Positions in batches of at most `at_most` tokens, padding counted, the longest first; one that is longer stands alone."""
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    start = 0
    while start < len(order):
        size = max(1, at_most // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


class GlobalBatches:
    """The micro-batches of one rank, in order, from any step on; a batch sampler for `torch.utils.data.DataLoader`.

    `len` counts the micro-batches of the whole run, whatever step it starts from.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        num_steps: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        assert global_batch_size % (micro_batch_size * world_size) == 0, "ranks and micro-batches must divide the global batch"
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.num_steps = num_steps
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.accumulation = global_batch_size // (micro_batch_size * world_size)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_step = 0
        self._order: tuple[int, Indices] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.num_steps):
            samples = self.samples(step)
            yield from deal(samples, self.lengths[samples], self.micro_batch_size, self.world_size)[self.rank]

    def samples(self, step: int) -> Indices:
        """The samples of a step, in stream order, `(global_batch_size,)`."""
        positions = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        epochs, offsets = np.divmod(positions, len(self.lengths))
        return np.array([self._epoch(int(epoch))[offset] for epoch, offset in zip(epochs, offsets, strict=True)], dtype=np.int64)

    def num_tokens(self, step: int) -> int:
        """Tokens that a step reads, over all ranks, padding not counted."""
        return int(self.lengths[self.samples(step)].sum())

    def _epoch(self, epoch: int) -> Indices:
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.lengths), self.seed, epoch))
        return self._order[1]
