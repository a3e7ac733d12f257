"""Progress of training: one live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class TrainProgress(ProgressBar):
    """Updates done, samples per second, loss, the split of the step's time, elapsed time and ETA.

    Args:
        refresh: seconds between refreshes of the numbers on a terminal.
        plain_every: seconds between lines where the output is no terminal.
    """

    def __init__(self, refresh: float = 1.0, plain_every: float = 20.0) -> None:
        super().__init__()
        self.refresh, self.plain_every = refresh, plain_every
        self._progress: Progress | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing (ranks other than zero)."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the line."""
        self._total = trainer.max_steps if trainer.max_steps > 0 else None
        self._begin = self._shown = self._split_since = time.perf_counter()
        self._first = self._split_step = trainer.global_step
        self._samples = pl_module.samples_seen
        self._ended = self._begin
        self._parts: dict[str, float] = {"data": 0.0}
        if self._enabled and sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("[bold]train"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"),
                console=Console(stderr=True),
            )  # fmt: skip
            self._progress.start()
            self._task = self._progress.add_task("train", total=self._total, completed=self._first, numbers="")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Refresh when it is time."""
        now = time.perf_counter()
        due = self.refresh if self._progress else self.plain_every
        if not self._enabled or (now - self._shown < due and trainer.global_step != self._total):
            return
        self._shown = now
        step = trainer.global_step
        rate = (pl_module.samples_seen - self._samples) / max(now - self._begin, 1e-9)
        loss = pl_module.report.get("train/loss")
        numbers = f"{rate:.0f} samples/s" + (f", loss {float(loss):.4f}" if loss is not None else "")
        numbers += self._split(pl_module, step)
        bad = getattr(getattr(trainer, "datamodule", None), "bad", 0)
        numbers += f", {bad} bad samples" if bad else ""
        if self._progress:
            self._progress.update(self._task, completed=step, numbers=numbers)
        else:
            done = step - self._first
            left = (self._total - step) * (now - self._begin) / done if self._total and done else 0.0
            print(
                f"update {step}/{self._total or '?'}, {numbers}, ETA {left / 60:.1f} min",
                file=sys.stderr,
                flush=True,
            )

    def _split(self, recipe: Any, step: int) -> str:
        parts = {name: seconds for name, seconds in recipe.seconds.items() if seconds > 0}
        whole = sum(parts.values())
        if not whole:
            return ""
        shares = ", ".join(f"{name} {100 * seconds / whole:.0f}%" for name, seconds in sorted(parts.items()))
        return f" ({shares})"

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """End the line."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave the terminal usable."""
        self._stop()

    def _stop(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None
