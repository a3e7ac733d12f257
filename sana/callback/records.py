"""Writes the numbers of a run: one line of metrics.jsonl at a time, and the same to the other loggers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from torch import Tensor

from sana.callback.throughput import memory_numbers, peak_flops
from sana.model.base import Recipe
from sana.run.records import MetricsLog
from sana.run.summary import summarise


class Records(Callback):
    """Logs the recipe's report every few updates, with the step-time split, throughput, utilisation and memory.

    ``train/tflops`` and ``train/mfu`` are per device and count the operations that the model needs, recomputation left
    out; the peak behind mfu is that of the data sheet, or of a product measured at the start where none is known.
    ``time/<part>`` are seconds per update: "data" is waiting for it, "checkpoint" what saving held training up.

    Args:
        every: updates between two lines; the first update is always logged.
    """

    def __init__(self, every: int = 20) -> None:
        if every < 1:
            raise ValueError(f"callback.records.every must be at least 1, got {every}")
        self.every = every
        self.metrics: MetricsLog | None = None
        self.latest: dict[str, float] = {}  # last value of each number
        self._last = (0, 0, 0.0)  # updates, samples, wall time at the last line
        self._flops = 0.0  # of this rank at the last line
        self._peak = 0.0
        self._ended = 0.0
        self._evaluation = 0.0  # seconds of evaluation when the last step ended

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open the log, start the clocks; a run that goes on appends to what it wrote up to its checkpoint."""
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "metrics.jsonl"
            MetricsLog.cut(path, trainer.global_step)
            self.metrics = MetricsLog(path)
            self._peak = peak_flops(pl_module.device, "bf16" in str(trainer.precision))
        self._flops = pl_module.flops
        self._last = (trainer.global_step, pl_module.samples_seen, time.perf_counter())
        self._ended = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """What passed since the last step ended was waiting for data, but for what callbacks say they used."""
        waited = time.perf_counter() - self._ended
        pl_module.seconds["data"] += max(waited - (pl_module.seconds["evaluation"] - self._evaluation), 0.0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write a line when one is due."""
        step = trainer.global_step
        if step != self._last[0] and (step % self.every == 0 or step == 1):
            self._line(trainer, pl_module, step)
        self._ended = time.perf_counter()
        self._evaluation = pl_module.seconds["evaluation"]

    def _line(self, trainer: Trainer, recipe: Recipe, step: int) -> None:
        updates, samples, since = self._last
        now = time.perf_counter()
        row = {name: _number(value) for name, value in recipe.report.items()}
        row["train/samples"] = recipe.samples_seen
        row["train/samples_per_s"] = (recipe.samples_seen - samples) / max(now - since, 1e-9)
        if recipe.flops > self._flops:
            rate = (recipe.flops - self._flops) / max(now - since, 1e-9)
            row["train/tflops"] = rate / 1e12
            if self._peak:
                row["train/mfu"] = rate / self._peak
        self._flops = recipe.flops
        row |= memory_numbers(recipe.device)
        for part, seconds in recipe.seconds.items():
            row[f"time/{part}"] = seconds / max(step - updates, 1)
        recipe.seconds.clear()
        self._last = (step, recipe.samples_seen, now)
        self.write(trainer, step, row)

    def write(self, trainer: Trainer, step: int, row: dict[str, float]) -> None:
        """Append one line and pass it to the trainer's loggers; other callbacks log through this too."""
        self.latest |= row
        if self.metrics is not None:
            self.metrics.write(step, row)
        for logger in trainer.loggers:
            logger.log_metrics(row, step)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Close the log."""
        if self.metrics is not None:
            self.metrics.close()
            summarise(self.metrics.path)  # so that reading a thousand runs reads no rows
            self.metrics = None


def log_row(trainer: Trainer, row: dict[str, float]) -> None:
    """Log numbers of another callback at the current update, through the run's `Records`."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Records):
            callback.write(trainer, trainer.global_step, row)


def _number(value: Tensor | float) -> float:
    return float(value)
