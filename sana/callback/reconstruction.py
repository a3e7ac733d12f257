"""Reconstructions of held-out images while an autoencoder trains, and its weights at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from torch import Tensor

from sana.callback.records import log_row
from sana.encoder.autoencoder.dc_ae import load, save
from sana.metric.psnr import psnr
from sana.run.sidecar import save_grid


class Reconstruction(Callback):
    """Logs the PSNR of fixed held-out images and saves ``samples/step_NNNNNNNN.png`` (originals above reconstructions).

    At the end it writes ``autoencoder.safetensors`` (bfloat16) into the run directory: the averaged weights with the
    latent's normalisation folded in, ready for `sana.encoder.autoencoder.dc_ae.load`.

    Args:
        every: updates between two measurements.
        shown: images in the grid.
    """

    def __init__(self, every: int = 1000, shown: int = 8) -> None:
        if every < 1 or shown < 1:
            raise ValueError(f"callback.reconstruction: every and shown must be at least 1, got {every} and {shown}")
        self.every, self.shown = every, shown
        self._images: Tensor | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure when due."""
        if trainer.global_step % self.every == 0:
            with pl_module.timed("evaluation"):
                self._measure(trainer, pl_module.export(self._held_out(trainer, pl_module)))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the weights, and measure what was written; a run that will go on does not."""
        if pl_module.stopped is not None:
            return
        with pl_module.timed("evaluation"):
            model = pl_module.export(self._held_out(trainer, pl_module))
            if trainer.is_global_zero:
                path = Path(trainer.default_root_dir) / "autoencoder.safetensors"
                save(model, path, torch.bfloat16)
                self._measure(trainer, load(path).to(pl_module.device))

    def _held_out(self, trainer: Trainer, recipe: Any) -> Tensor:
        images = self._images
        if images is None:
            batch = trainer.datamodule.validation_batch()  # type: ignore[attr-defined]
            images = self._images = batch.image.to(recipe.device)
        return images

    @torch.no_grad()
    def _measure(self, trainer: Trainer, model: Any) -> None:
        assert self._images is not None
        restored = torch.cat([model(part) for part in self._images.split(64)])
        values = psnr(self._images, restored)
        log_row(trainer, {"validation/psnr": float(values.mean()), "validation/psnr_worst": float(values.min())})
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "samples" / f"step_{trainer.global_step:08d}.png"
            rows = [list(_pixels(part[: self.shown])) for part in (self._images, restored)]
            title = f"update {trainer.global_step}: {float(values.mean()):.2f} dB"
            save_grid(path, rows, ["held-out images", "reconstructions"], (), title)


def _pixels(images: Tensor) -> np.ndarray:
    """(b, 3, h, w) in [-1, 1] -> uint8 (b, h, w, 3)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
