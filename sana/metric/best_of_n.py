"""What choosing among n images gains, from one pool of N images per prompt.

Drawing n fresh images for every n would cost the sum of all n and give a noisy curve. The mean over all subsets of n of
the N is an unbiased estimate of the same expectation, has less variance, and has a closed form (a U-statistic of order
statistics): sorted by score, the image of rank i in 1..N is the best of a subset in C(i-1, n-1) of C(N, n) cases.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import ConstantInputWarning, spearmanr

from sana.metric.bootstrap import mean_of_means_interval


def expected_best(scores: ArrayLike, values: ArrayLike, ns: Sequence[int]) -> NDArray[np.float64]:
    """Expected value of the image that has the highest score among n, for each n.

    Images of equal scores are as likely chosen as each other. That is the expectation for any rule that breaks ties by
    the order of drawing, because images of one prompt are exchangeable.

    Args:
        scores: (prompts, N), by which the judge chooses.
        values: (prompts, N), what the choice is worth, such as another judge's scores.
        ns: each in [1, N].

    Returns:
        (prompts, len(ns)) float64.

    Raises:
        ValueError: other shapes, numbers that are not finite, or n out of range.
    """
    judged, worth = (np.asarray(a, np.float64) for a in (scores, values))
    if judged.ndim != 2 or judged.shape != worth.shape or judged.size == 0:
        raise ValueError(f"best of n: scores {judged.shape} and values {worth.shape}, expected (prompts, N) of both")
    if not (np.isfinite(judged).all() and np.isfinite(worth).all()):
        raise ValueError("best of n: a score or value is not finite")
    size = judged.shape[1]
    wrong = [n for n in ns if not 1 <= n <= size]
    if wrong:
        raise ValueError(f"best of n: n is {wrong[0]}, but the pool has {size} images per prompt")
    weights = np.stack([_weights(size, n) for n in ns], 1)
    means = np.stack([_mean_of_ties(s, v) for s, v in zip(judged, worth, strict=True)])
    return means @ weights


def _weights(size: int, n: int) -> NDArray[np.float64]:
    """(size,): chance of each rank, lowest first, to be the best of n.

    P(best has rank <= i) = C(i, n) / C(N, n), a product of ratios (i - n) / i from N downwards; the chance of rank i is
    that times n / i. Neither subtracts, so the relative error stays at rounding for any N, and nothing overflows.
    """
    rank = np.arange(size, 0, -1, dtype=np.float64)
    ratios = np.clip((rank - n) / rank, 0.0, None)
    below = np.concatenate(([1.0], np.cumprod(ratios[:-1])))
    return (below * n / rank)[::-1] * (np.arange(1, size + 1) >= n)


def _mean_of_ties(scores: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values in the order of scores, lowest first, each replaced by the mean over the images of its score."""
    _, group = np.unique(scores, return_inverse=True)
    means = np.bincount(group, values) / np.bincount(group)
    return means[np.sort(group)]


def best_of_n_curve(
    scores: ArrayLike,
    values: ArrayLike,
    ns: Sequence[int],
    groups: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """`expected_best` over prompts, with bootstrap intervals; prompts are what is drawn.

    Args:
        scores, values, ns: as in `expected_best`.
        groups: task of each prompt: the mean is then that of the task means, as GenEval's, and prompts are drawn within
            tasks. None: the plain mean.
        level, resamples, seed: of the bootstrap. The draws are the same for every n.

    Returns:
        For each n ``{"best_of", "mean", "interval": [low, high], "level", "n": prompts}``.

    Raises:
        ValueError: as `expected_best`; or not one group per prompt.
    """
    each = expected_best(scores, values, ns)
    tags = ["" for _ in each] if groups is None else list(groups)
    if len(tags) != len(each):
        raise ValueError(f"best of n: {len(tags)} groups for {len(each)} prompts")
    rows = []
    for n, column in zip(ns, each.T, strict=True):
        parts = {tag: column[[i for i, own in enumerate(tags) if own == tag]] for tag in dict.fromkeys(tags)}
        found = mean_of_means_interval(parts, level=level, resamples=resamples, seed=seed)
        rows.append({"best_of": int(n), **found.asdict()})
    return rows


def rank_correlation(a: ArrayLike, b: ArrayLike) -> dict[str, Any]:
    """Spearman's rank correlation of two judges over the images of a pool.

    Choosing compares images of one prompt, so what counts is the correlation within prompts; over all images together
    it also holds how hard the prompts are.

    Args:
        a, b: (prompts, N) scores.

    Returns:
        ``{"within": mean over the prompts in which neither judge is constant, "prompts": how many those are,
        "of": prompts, "overall": over all images}``; None where there is none.
    """
    x, y = (np.asarray(s, np.float64) for s in (a, b))
    within = [r for r in map(_spearman, x, y) if r is not None]
    mean = float(np.mean(within)) if within else None
    return {"within": mean, "prompts": len(within), "of": len(x), "overall": _spearman(x.ravel(), y.ravel())}


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(spearmanr(a, b)[0])  # type: ignore[arg-type]
