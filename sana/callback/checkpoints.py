"""Checkpoints of a run: whole or absent, and one at the end however it ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Callback, Trainer


class Checkpoints(Callback):
    """Saves ``checkpoints/step_NNNNNNNN.ckpt`` every few updates, at the end, and at the first ctrl-C.

    A file is written beside its name and renamed, so a crash leaves the previous ones untouched. The first ctrl-C (or
    SIGTERM) lets the step in progress finish, saves and stops; a second one stops at once.

    Args:
        every: updates between checkpoints.
        keep: how many of the newest to keep.
    """

    def __init__(self, every: int = 1000, keep: int = 2) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"callback.checkpoints: every and keep must be at least 1, got {every} and {keep}")
        self.every, self.keep = every, keep
        self.interrupted: str | None = None
        self._before: dict[int, Any] = {}
        self._saved = -1

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take over the signals; clear what an earlier crash left half-written."""
        self._saved = trainer.global_step
        folder = self.folder(trainer)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.tmp"):
                leftover.unlink(missing_ok=True)

        def stop(number: int, frame: FrameType | None) -> None:
            self.interrupted = signal.Signals(number).name
            signal.signal(number, self._before[number])
            trainer.should_stop = True

        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, stop)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save when due."""
        step = trainer.global_step
        if step != self._saved and step % self.every == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the end, and give the signals back."""
        if trainer.global_step != self._saved:
            self.save(trainer)
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the signals back. Nothing is saved: the state may be half a step old, the last checkpoint is not."""
        self._restore()

    def save(self, trainer: Trainer) -> Path:
        """Write the checkpoint of the current update and drop the oldest ones."""
        path = self.folder(trainer) / f"step_{trainer.global_step:08d}.ckpt"
        temporary = path.with_name(path.name + ".tmp")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, path)
            for old in sorted(path.parent.glob("step_*.ckpt"))[: -self.keep]:
                old.unlink()
        self._saved = trainer.global_step
        return path

    @staticmethod
    def folder(trainer: Trainer) -> Path:
        """Where this run's checkpoints lie."""
        return Path(trainer.default_root_dir) / "checkpoints"

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
