"""The numbers of a run while it runs, and whether it is worth going on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana.run.records import read_metrics

if TYPE_CHECKING:
    from optuna import Study


def values_of(rows: Sequence[Mapping[str, Any]], metric: str | None) -> list[tuple[int, float]]:
    """(update, value) of every row of a metrics.jsonl that has a metric, the last value of each update."""
    if metric is None:
        return []
    found = {
        int(row["step"]): float(row[metric])
        for row in rows
        if metric in row and "step" in row and isinstance(row[metric], int | float)
    }
    return sorted(found.items())


def best_of(points: Sequence[tuple[int, float]], direction: str, which: str) -> float | None:
    """The value that stands for a run: the last of its numbers, or the best; None where it is not finite."""
    numbers = [value for _, value in points]
    if which == "best":
        numbers = [value for value in numbers if math.isfinite(value)]
        return (min(numbers) if direction == "minimize" else max(numbers)) if numbers else None
    return numbers[-1] if numbers and math.isfinite(numbers[-1]) else None


class Watch:
    """Reports a run's numbers to its Optuna trial and says when it shall be pruned.

    Args:
        study: with the pruner that decides.
        trial: id of the trial in the study's storage.
        metric: name in metrics.jsonl.
    """

    def __init__(self, study: Study, trial: int, metric: str) -> None:
        self.study, self.trial, self.metric = study, trial, metric
        self._reported = 0

    @classmethod
    def of(cls, folder: Path, settings: Mapping[str, Any], number: int) -> Watch | None:
        """The watch of a sweep's run; None where the sweep does not prune."""
        if not settings.get("prune"):
            return None
        from sana.run.search import open_study

        study = open_study(folder, settings)
        return cls(study, study.trials[number]._trial_id, settings["metric"])

    def look(self, metrics: Path) -> str | None:
        """Report what is new; the reason where the run shall end."""
        if not metrics.is_file():
            return None
        points = values_of(read_metrics(metrics), self.metric)
        fresh = points[self._reported :]
        self._reported = len(points)
        for step, value in fresh:
            self.study._storage.set_trial_intermediate_value(self.trial, step, value)
            trial = self.study._storage.get_trial(self.trial)
            if self.study.pruner.prune(self.study, trial):
                return f"{self.metric} {value:.4g} at update {step} is worse than the median of the other runs"
        return None
