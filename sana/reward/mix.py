"""Several judges as one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from sana.reward.judge import Judge, SingleJudge


class Mix(Judge):
    """Weighted sum of ranks.

    Within the candidates of a prompt each judge's scores are replaced by their ranks, from 0 (worst) to 1 (best), equal
    scores sharing the mean of theirs; a judge that finds all alike says one half of each. Ranks, not standard scores:
    the scales of judges have nothing to do with each other, and a yes-no judge has a gap between its two kinds of
    scores beside which a standard score would see no other difference.

    Args:
        name: see `Judge`.
        judges: by name; null leaves one out.
        weights: of the same names; a negative one seeks what that judge finds bad.

    Raises:
        ValueError: fewer than two judges, one that is itself a mix, or weights that do not fit them.
    """

    def __init__(self, name: str, judges: Mapping[str, SingleJudge | None], weights: Mapping[str, float]) -> None:
        chosen = {key: judge for key, judge in judges.items() if judge is not None}
        if len(chosen) < 2:
            raise ValueError(f"judges: {', '.join(chosen) or 'none'}; a mix needs two or more")
        nested = [key for key, judge in chosen.items() if not isinstance(judge, SingleJudge)]
        if nested:
            raise ValueError(f"judges.{nested[0]}: is a mix itself; name its judges here")
        for key in chosen:
            if not (math.isfinite(weights.get(key, 0)) and weights.get(key, 0)):
                raise ValueError(
                    f"weights.{key}: {weights.get(key)}; expected a number other than 0, or judges.{key}=null"
                )
        left = [key for key in weights if key not in judges]
        if left:
            raise ValueError(f"weights.{left[0]}: there is no such judge; judges: {', '.join(judges)}")
        self.weights = {key: float(weights[key]) for key in chosen}
        settings = {key: {"weight": self.weights[key], **judge.settings} for key, judge in chosen.items()}
        super().__init__(name, settings)
        self._parts = chosen

    @property
    def parts(self) -> Mapping[str, SingleJudge]:
        """The judges."""
        return self._parts

    def combine(self, parts: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """Weighted sum of ranks in [0, 1]."""
        return np.sum([weight * _ranks(parts[key]) for key, weight in self.weights.items()], axis=0)


def _ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    n = len(scores)
    return (rankdata(scores) - 1) / (n - 1) if n > 1 else np.full(n, 0.5)
