"""Best of N (SANA-1.5, arXiv:2501.18427, section 4): of the candidates of a prompt, those that a judge scores highest.

With a judge that scores images one by one, a tournament of pairs has the winner of a sort, so N scores are enough.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def keep_best(scores: ArrayLike, k: int) -> NDArray[np.int64]:
    """Which candidates to keep, best first.

    Of equal scores the later candidate goes first, as in the published comparison of pairs, where the second of a pair
    wins a tie. Hence ``keep_best(scores, 1)`` is the winner of any tournament that keeps the candidates in order.

    Args:
        scores: (n,) finite, larger is better.
        k: in [1, n].

    Returns:
        (k,) indices.

    Raises:
        ValueError: scores of another shape or not finite, or k out of range.
    """
    found = np.asarray(scores, np.float64)
    if found.ndim != 1 or not np.isfinite(found).all():
        raise ValueError(f"best of n: scores of shape {found.shape}, expected (n,) finite numbers")
    if not 1 <= k <= len(found):
        raise ValueError(f"best of n: {k} of {len(found)} candidates cannot be kept")
    order = np.lexsort((-np.arange(len(found)), -found))
    return order[:k].astype(np.int64)
