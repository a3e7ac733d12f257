"""Validation losses at fixed samples, noise and times: comparable between steps and runs."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Trainer

from sana.callback.due import Due
from sana.callback.records import log_row


class ValidationLoss(Due):
    """Loss of the averaged network per range of t, every few updates.

    Random times and noises make a validation loss of a diffusion model mostly noise; fixed ones make it a curve.

    Args:
        every: updates between evaluations; it is also evaluated at the end.
        bins: equal ranges of t in [0, 1].
    """

    def __init__(self, every: int = 500, bins: int = 10) -> None:
        if every < 1 or bins < 1:
            raise ValueError(f"callback.validation: every and bins must be at least 1, got {every} and {bins}")
        super().__init__(every)
        self.bins = bins
        self._batch: Any = None

    def act(self, trainer: Trainer, recipe: Any) -> None:
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
