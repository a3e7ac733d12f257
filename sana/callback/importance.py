"""How much each block of the network changes its tokens while it trains: when new blocks leave the identity."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from sana.callback.due import Due
from sana.callback.records import log_row
from sana.network.importance import BlockImportance
from sana.types import Batch


class Importance(Due):
    """Logs the importance of every block (`sana.network.importance`) as ``importance/block_07``.

    The trained network, not its average, sees the same samples at the same noise and evenly spaced times every time; on
    all ranks, so that sharded networks work. Training goes on as if it had not been asked.

    Args:
        every: updates between two lines; there is one at the start and one at the end too.
        samples: of the validation data.
        times: evenly spaced in (0, 1); all samples are seen at each.
    """

    def __init__(self, every: int = 500, samples: int = 4, times: int = 5) -> None:
        if min(every, samples, times) < 1:
            raise ValueError(
                f"callback.importance: every, samples and times must be at least 1, got {every}, {samples}, {times}"
            )
        super().__init__(every)
        self.samples, self.times = samples, times
        self._batch: Batch | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the start."""
        self._once(trainer, pl_module)

    def act(self, trainer: Trainer, recipe: Any) -> None:
        network = recipe.trainables()["network"]
        training = network.training
        network.eval()
        try:
            with isolate_rng(), torch.no_grad():
                batch = self._few(trainer, recipe)
                with trainer.precision_plugin.forward_context(), BlockImportance(network) as importance:
                    recipe.validation_losses(network, batch, self.times)
                values = importance.values()
        finally:
            network.train(training)
        digits = max(2, len(str(len(values) - 1)))
        log_row(trainer, {f"importance/block_{i:0{digits}d}": value for i, value in enumerate(values)})

    def _few(self, trainer: Trainer, recipe: Any) -> Batch:
        """The first validation samples, encoded once."""
        few = self._batch
        if few is None:
            all_of_it: Batch = trainer.datamodule.validation_batch()  # type: ignore[attr-defined]
            n = self.samples
            few = Batch(
                image=None if all_of_it.image is None else all_of_it.image[:n],
                latent=None if all_of_it.latent is None else all_of_it.latent[:n],
                caption=all_of_it.caption[:n],
                index=all_of_it.index[:n],
                key=all_of_it.key[:n],
            )
            few = recipe.transfer_batch_to_device(few, recipe.device, 0)
            few.latent = recipe.latents(few).squeeze(2)
            self._batch = few
        return few
