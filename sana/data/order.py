"""The order of training samples: a pure function of (seed, position), whatever the ranks and workers.

A run consumes one endless global stream. Position p belongs to epoch p // N and is sample perm(seed, epoch)[p % N].
Global batch s holds positions [s B, (s + 1) B); rank r of R takes its contiguous share of each. So equal global
batches come at any world size, and a resumed run continues at the next unseen position by knowing one number.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np


class Order:
    """Seeded order over N samples, a fresh permutation in every epoch.

    Args:
        count: N, number of samples in an epoch.
        seed: seed of the run.
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError(f"an order needs at least one sample, got {count}")
        self.count, self.seed = count, seed
        self._permutation = lru_cache(maxsize=2)(self._make)

    def _make(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[self.seed & (2**64 - 1), epoch])).permutation(self.count)

    def sample(self, position: int) -> int:
        """The sample at a position of the stream."""
        epoch, offset = divmod(position, self.count)
        return int(self._permutation(epoch)[offset])


class PositionBatches:
    """Batch sampler: endless lists of stream positions for one rank, from `start` on.

    Args:
        batch: global batch size, divisible by `world`.
        start: first position not yet consumed, a multiple of nothing in particular.
        rank, world: this process and the number of processes.
        micro: samples per yielded list; the rank's share of the global batch is cut into lists of this size.

    Raises:
        ValueError: the global batch does not divide.
    """

    def __init__(self, batch: int, start: int = 0, rank: int = 0, world: int = 1, micro: int | None = None) -> None:
        if batch % world:
            raise ValueError(f"global batch {batch} does not divide by {world} processes")
        share = batch // world
        micro = micro or share
        if share % micro:
            raise ValueError(f"a rank's share of {share} samples does not divide into micro-batches of {micro}")
        self.batch, self.start, self.rank, self.world, self.micro, self.share = (
            batch,
            start,
            rank,
            world,
            micro,
            share,
        )

    def __iter__(self) -> Iterator[list[int]]:
        base = self.start
        while True:
            first = base + self.rank * self.share
            for offset in range(0, self.share, self.micro):
                yield list(range(first + offset, first + offset + self.micro))
            base += self.batch
