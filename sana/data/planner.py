"""The global batches of a run, the same on every rank: a pure function of (seed, step).

Every step has one bucket and B samples of it, so all ranks have equal shapes however unequal the buckets are, and no
rank ends before another. What is left of a bucket when an epoch ends opens its part of the next one. How many
batches of a bucket lie before an epoch is a closed form, so nothing is replayed to start at any step.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sana.data.stream import Cell, Stream, generator, last_at_most


class Planned(NamedTuple):
    """One global batch: the number of its bucket, and B samples."""

    bucket: int
    samples: np.ndarray


class Planner:
    """Deals batches out of one stream per bucket.

    Args:
        streams: bucket number -> its samples.
        batch: B, global batch size.
        seed: of the run.

    Raises:
        ValueError: no stream, or no sample per batch.
    """

    def __init__(self, streams: dict[int, Stream], batch: int, seed: int) -> None:
        if not streams or batch < 1:
            raise ValueError(f"a plan needs samples and a batch of at least one, got {len(streams)} streams of {batch}")
        self.streams, self.batch, self.seed = dict(sorted(streams.items())), batch, seed
        self._epoch = lru_cache(maxsize=2)(self._arrange)

    def before(self, epoch: int) -> int:
        """Steps before an epoch."""
        return sum(stream.before(epoch) // self.batch for stream in self.streams.values())

    def start(self, position: int) -> int:
        """The first position from `position` on at which a batch may begin: with several buckets, a whole step."""
        return position if len(self.streams) == 1 else -(-position // self.batch) * self.batch

    def at(self, position: int) -> Planned:
        """The global batch of the B positions from `position` on, one that `start` returns unchanged.

        Raises:
            ValueError: `position` lies within a step of one bucket.
        """
        if len(self.streams) == 1:
            ((bucket, stream),) = self.streams.items()
            return Planned(bucket, stream.take(position, self.batch))
        step, within = divmod(position, self.batch)
        if within:
            raise ValueError(f"position {position} lies within a batch of {self.batch}")
        epoch = last_at_most(self.before, step)
        buckets, ranks = self._epoch(epoch)
        offset = step - self.before(epoch)
        stream = self.streams[int(buckets[offset])]
        number = stream.before(epoch) // self.batch + int(ranks[offset])
        return Planned(int(buckets[offset]), stream.take(number * self.batch, self.batch))

    def _arrange(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of every step of an epoch, and how many of the same bucket came before it in the epoch."""
        counts = [s.before(epoch + 1) // self.batch - s.before(epoch) // self.batch for s in self.streams.values()]
        order = generator(self.seed, epoch, "steps").permutation(sum(counts))
        shuffled = np.repeat(np.arange(len(counts)), counts)[order]
        ranks = np.empty(len(order), np.int64)
        for k, count in enumerate(counts):
            ranks[shuffled == k] = np.arange(count)
        return np.asarray(list(self.streams))[shuffled], ranks


def plan(
    sources: Sequence[np.ndarray],
    buckets: Sequence[np.ndarray] | None,
    batch: int,
    seed: int,
    *,
    weights: Sequence[float] | None = None,
    resampled: bool = False,
) -> Planner:
    """A planner over several sources whose samples lie in buckets.

    The epoch has as many samples as the sources together. Without weights it holds each sample once; with weights a
    share of its samples comes from each source, spread over the buckets as the source is.

    Args:
        sources: the samples of each source, as numbers that are unique over all of them.
        buckets: the bucket of each of these samples; None puts all into bucket 0.
        batch: global batch size.
        seed: of the run.
        weights: >= 0, one per source, in any unit.
        resampled: draw with replacement.

    Raises:
        ValueError: weights that do not fit, or no sample at all.
    """
    sizes = [len(samples) for samples in sources]
    total = sum(sizes)
    if weights is None:
        due = [Fraction(size) for size in sizes]
    else:
        if len(weights) != len(sources) or not any(weights) or not all(0 <= w < float("inf") for w in weights):
            raise ValueError(f"weights: expected {len(sources)}, not negative and not all zero, got {list(weights)}")
        if any(weight and not size for weight, size in zip(weights, sizes, strict=True)):
            raise ValueError("weights: a source without samples has a weight")
        exact = [Fraction(str(weight)) for weight in weights]
        due = [total * weight / sum(exact) for weight in exact]
    if total == 0:
        raise ValueError("no sample is left to train on")
    cells: dict[int, list[Cell]] = {}
    for k, samples in enumerate(sources):
        if due[k] == 0:
            continue
        if buckets is None:
            cells.setdefault(0, []).append(Cell(samples, due[k], str(k)))
            continue
        for bucket in np.unique(buckets[k]).tolist():
            members = samples[buckets[k] == bucket]
            cells.setdefault(bucket, []).append(Cell(members, due[k] * len(members) / sizes[k], str(k)))
    # One bucket keeps the order of a run without buckets.
    streams = {
        bucket: Stream(parts, seed, "" if len(cells) == 1 else f"bucket {bucket}", resampled=resampled)
        for bucket, parts in cells.items()
    }
    return Planner(streams, batch, seed)
