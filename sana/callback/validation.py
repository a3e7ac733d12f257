"""Validation losses at fixed samples, noise and times: comparable between steps and runs."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, Trainer

from sana.callback.records import log_row


class ValidationLoss(Callback):
    """Loss of the averaged network per range of t, every few updates.

    Random times and noises make a validation loss of a diffusion model mostly noise; fixed ones make it a curve.

    Args:
        every: updates between evaluations; it is also evaluated at the end.
        bins: equal ranges of t in [0, 1].
    """

    def __init__(self, every: int = 500, bins: int = 10) -> None:
        if every < 1 or bins < 1:
            raise ValueError(f"callback.validation: every and bins must be at least 1, got {every} and {bins}")
        self.every, self.bins = every, bins
        self._done = -1
        self._batch: Any = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Evaluate when due."""
        if trainer.global_step != self._done and trainer.global_step % self.every == 0:
            with pl_module.timed("evaluation"):
                self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Evaluate the end."""
        if trainer.global_step != self._done and pl_module.stopped is None:
            with pl_module.timed("evaluation"):
                self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, recipe: Any) -> None:
        self._done = trainer.global_step
        if self._batch is None:
            batch = trainer.datamodule.validation_batch()  # type: ignore[attr-defined]
            self._batch = recipe.transfer_batch_to_device(batch, recipe.device, 0)
            self._batch.latent = recipe.latents(self._batch).squeeze(2)
        with (
            recipe.averaged("network") as network,
            trainer.precision_plugin.forward_context(),
            torch.no_grad(),
        ):
            losses = recipe.validation_losses(network, self._batch, self.bins)
        row = {f"val/loss_t{k}": float(loss) for k, loss in enumerate(losses)}
        log_row(trainer, {"val/loss": float(losses.mean()), **row})
