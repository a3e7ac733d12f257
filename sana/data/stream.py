"""The order of training samples: which sample stands at a position, as a pure function of (seed, position).

A `Stream` is endless and is dealt out in virtual epochs. It has one or more cells: sets of samples of which a fixed
number is due per epoch. In the plain case (one cell, all of it due) every epoch holds every sample once, freshly
permuted. In a mixture each cell walks through permutations of its own, so that weights are met exactly while no
sample of a source comes twice before all others came once. Nothing is remembered between positions: to go on after a
stop, one number is enough.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Filter:
    """Which samples take part, by their columns in the index.

    Attributes:
        min_side: least height and least width in pixels.
        scores: name -> least score; a sample without that score takes part, as in the published code.
        hq_only: only samples marked as of high quality.
    """

    min_side: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    hq_only: bool = False

    def kept(self, index: Any) -> np.ndarray | None:
        """Numbers of the samples that take part, ascending int64; None where all do.

        Args:
            index: of a source; `column(name)` gives width, height, hq and ``score.<name>``.

        Raises:
            ValueError: a score that no sample of this index has.
        """
        masks = []
        if self.min_side > 0:
            masks.append((index.column("width") >= self.min_side) & (index.column("height") >= self.min_side))
        for name, least in self.scores.items():
            try:
                score = index.column(f"score.{name}")
            except (KeyError, ValueError):
                raise ValueError(f"data.filter.scores: no sample has a score {name!r}") from None
            masks.append(np.isnan(score) | (score >= least))
        if self.hq_only:
            masks.append(np.asarray(index.column("hq"), bool))
        if not masks or all(mask.all() for mask in masks):
            return None
        return np.flatnonzero(np.logical_and.reduce(masks))


@dataclass(frozen=True)
class Cell:
    """Samples of one kind and how many of them are due per epoch.

    Attributes:
        members: their numbers, (n,) integers; not empty.
        due: samples per epoch, on average over epochs; n means each of them once.
        name: tells the walks of different cells apart.
    """

    members: np.ndarray
    due: Fraction
    name: str = ""

    def before(self, epoch: int) -> int:
        """Samples dealt before an epoch."""
        return epoch * self.due.numerator // self.due.denominator


class Stream:
    """An endless seeded sequence of samples.

    Args:
        cells: what it consists of.
        seed: of the run.
        name: streams of other names are in independent orders; "" is the order of a run without buckets.
        resampled: draw with replacement instead of each sample once.

    Raises:
        ValueError: no cell, an empty one, or none that is ever due.
    """

    def __init__(self, cells: Sequence[Cell], seed: int, name: str = "", *, resampled: bool = False) -> None:
        if not cells or any(len(cell.members) == 0 for cell in cells):
            raise ValueError("a stream needs at least one sample in each of its cells")
        if not any(cell.due > 0 for cell in cells):
            raise ValueError("a stream needs a cell of which samples are due")
        self.cells, self.seed, self.name, self.resampled = tuple(cells), seed, name, resampled
        self._epoch = lru_cache(maxsize=2)(self._deal)

    def before(self, epoch: int) -> int:
        """Position at which an epoch begins."""
        return sum(cell.before(epoch) for cell in self.cells)

    def take(self, first: int, count: int) -> np.ndarray:
        """The samples at positions first .. first + count - 1, (count,) integers."""
        epoch, missing = last_at_most(self.before, first), count
        parts = [self.cells[0].members[:0]]
        while missing > 0:
            samples = self._epoch(epoch)
            offset = first + count - missing - self.before(epoch)
            parts.append(samples[offset : offset + missing])
            missing -= len(parts[-1])
            epoch += 1
        return np.concatenate(parts)

    def _deal(self, epoch: int) -> np.ndarray:
        """All samples of one epoch in order."""
        samples = np.concatenate([self._walk(cell, epoch) for cell in self.cells])
        return samples[generator(self.seed, epoch, self.name).permutation(len(samples))]

    def _walk(self, cell: Cell, epoch: int) -> np.ndarray:
        """The samples of a cell that are due in an epoch."""
        first, last, size = cell.before(epoch), cell.before(epoch + 1), len(cell.members)
        if cell.due == size and not self.resampled:
            return cell.members  # each once; the epoch's own permutation mixes them
        parts = [cell.members[:0]]
        for lap in range(first // size, -(-last // size)):
            rng = generator(self.seed, lap, f"{self.name}/{cell.name}")
            order = rng.integers(0, size, size) if self.resampled else rng.permutation(size)
            parts.append(cell.members[order[max(first - lap * size, 0) : last - lap * size]])
        return np.concatenate(parts)


def generator(seed: int, epoch: int, name: str = "") -> np.random.Generator:
    """Random numbers of one epoch: Philox with the key (seed, epoch), or (digest of seed and name, epoch)."""
    key = seed & (2**64 - 1)
    if name:
        key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=np.array([key, epoch], np.uint64)))


def last_at_most(before: Any, value: int) -> int:
    """The greatest n >= 0 with before(n) <= value, for a function that starts at 0, never falls and grows without
    bound."""
    high = 1
    while before(high) <= value:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if before(middle) <= value else (low, middle)
    return low
