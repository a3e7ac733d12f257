"""What is done every so many updates, and once more at the end."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning import Callback, Trainer


class Due(Callback):
    """Does something every so many updates, never twice at one, and at the end of a run that was not told to stop: one
    that goes on will come to it, and must be gone soon.

    Args:
        every: updates between two times; at least 1, which the caller has checked.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._done = -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Do it when due."""
        if trainer.global_step % self.every == 0:
            self._once(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Do it at the end."""
        if pl_module.stopped is None:
            self._once(trainer, pl_module)

    def _once(self, trainer: Trainer, recipe: Any) -> None:
        if trainer.global_step != self._done:
            self._done = trainer.global_step
            with recipe.timed("evaluation"):
                self.act(trainer, recipe)

    @abstractmethod
    def act(self, trainer: Trainer, recipe: Any) -> None:
        """What is done; its time counts as evaluation."""
