"""Percentile bootstrap intervals of a mean and of a mean of task means.

Source: Efron 1979; Efron and Tibshirani 1993, ch. 13.

The unit that is drawn is the prompt, not the image: several images of one prompt share its difficulty, so
drawing images one by one would make the interval too narrow. `clusters` says which values belong together.

A percentile interval cannot leave the range of the data: a task with 100 right of 100 gets [1, 1]. Read it as
"the bootstrap has nothing to say here", not as certainty.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHUNK = 2_000_000
"""Drawn indices held at a time, which bounds the memory; the numbers do not depend on it."""


@dataclass(frozen=True)
class Interval:
    """A mean with its interval.

    Attributes:
        mean: of the values themselves (not of the resamples).
        low, high: ends of the interval.
        level: its nominal coverage, e.g. 0.95.
        n: number of values behind the mean.
    """

    mean: float
    low: float
    high: float
    level: float
    n: int

    def asdict(self) -> dict[str, float | int | list[float]]:
        """``{"mean", "interval": [low, high], "level", "n"}``: the form that goes to results.json."""
        return {"mean": self.mean, "interval": [self.low, self.high], "level": self.level, "n": self.n}


def mean_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of `values`.

    Args:
        values: (n,) finite numbers.
        clusters: (n,) labels; values with the same label are drawn together. None: each value is its own.
        level: coverage in (0, 1).
        resamples: number of bootstrap means.
        seed: the same seed gives the same interval, on every machine.

    Raises:
        ValueError: no values, a value that is not finite, labels of another length, level outside (0, 1).
    """
    return mean_of_means_interval({"": values}, {"": clusters}, level=level, resamples=resamples, seed=seed)


def mean_of_means_interval(
    groups: Mapping[str, ArrayLike],
    clusters: Mapping[str, Sequence[Hashable] | None] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Interval of the unweighted mean of the groups' means; each group is resampled by itself (stratified).

    GenEval's overall number is such a mean of six task means, whatever the tasks' sizes.

    Args:
        groups: name -> (n_g,) finite numbers.
        clusters: name -> (n_g,) labels or None, as in `mean_interval`. None: no labels anywhere.
        level, resamples, seed: as in `mean_interval`. Each group draws from its own stream (seed, rank of the
            name), so the interval does not depend on the order of the mapping.

    Raises:
        ValueError: as `mean_interval`; or no groups.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"bootstrap: level is {level}, expected a number in (0, 1) such as 0.95")
    if resamples < 1:
        raise ValueError(f"bootstrap: resamples is {resamples}, expected at least 1")
    if not groups:
        raise ValueError("bootstrap: no groups of values given")
    total = np.zeros(resamples)
    mean, count = 0.0, 0
    for rank, name in enumerate(sorted(groups)):
        labels = None if clusters is None else clusters.get(name)
        sums, sizes = _per_cluster(np.asarray(groups[name], dtype=np.float64), labels, name)
        rng = np.random.default_rng([seed, rank])
        total += _resampled_means(sums, sizes, resamples, rng)
        mean += float(sums.sum() / sizes.sum())
        count += int(sizes.sum())
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(total / len(groups), [tail, 1.0 - tail])
    return Interval(mean / len(groups), float(low), float(high), level, count)


def _per_cluster(
    values: NDArray[np.float64], labels: Sequence[Hashable] | None, name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of the values of each cluster, in order of first appearance."""
    where = f" of group {name!r}" if name else ""
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"bootstrap: values{where} have shape {values.shape}, expected (n,) with n >= 1")
    if not np.isfinite(values).all():
        raise ValueError(f"bootstrap: a value{where} is not finite")
    if labels is None:
        return values, np.ones_like(values)
    if len(labels) != values.size:
        raise ValueError(f"bootstrap: {values.size} values{where} but {len(labels)} cluster labels")
    first: dict[Hashable, int] = {}
    index = np.array([first.setdefault(label, len(first)) for label in labels])
    sums = np.bincount(index, weights=values).astype(np.float64)
    return sums, np.bincount(index).astype(np.float64)


def _resampled_means(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(resamples,) means of clusters drawn with replacement.

    Total of the drawn sums over total of the drawn sizes.
    """
    k = len(sums)
    rows = max(1, CHUNK // k)
    means = np.empty(resamples)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        drawn = rng.integers(0, k, size=(stop - start, k))
        means[start:stop] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return means
