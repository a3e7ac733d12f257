"""A grid of samples while training: the same prompts and the same noise every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Trainer

from sana.callback.due import Due
from sana.model.generate import Painter
from sana.run.sidecar import save_grid
from sana.sampler.guided import Sampler


class SampleGrid(Due):
    """Draws fixed prompts at fixed seeds with the averaged network and saves ``samples/step_NNNNNNNN.png``.

    Args:
        prompts: one row each.
        sampler: how they are drawn.
        per_prompt: columns; column n has the same noise in every row and at every step.
        every: updates between grids; there is one at the end too.
        size: pixels of a side.
    """

    def __init__(
        self, prompts: list[str], sampler: Sampler, per_prompt: int = 4, every: int = 1000, size: int = 64
    ) -> None:
        if every < 1:
            raise ValueError(f"callback.samples.every must be at least 1, got {every}")
        super().__init__(every)
        self.prompts, self.sampler, self.per_prompt, self.size = list(prompts), sampler, per_prompt, size

    def act(self, trainer: Trainer, recipe: Any) -> None:
        prompts = [prompt for prompt in self.prompts for _ in range(self.per_prompt)]
        seeds = list(range(self.per_prompt)) * len(self.prompts)
        with recipe.averaged("network") as network, trainer.precision_plugin.forward_context():
            parts = recipe.frozen.autoencoder, recipe.frozen.text_encoder, recipe.null_like
            painter = Painter(network, *parts, recipe.frozen.offload)
            images = painter.draw(prompts, seeds, self.sampler, self.size, self.size)
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "samples" / f"step_{trainer.global_step:08d}.png"
            rows = [list(images[k : k + self.per_prompt]) for k in range(0, len(images), self.per_prompt)]
            title = f"update {trainer.global_step}" + (", averaged weights" if "network" in recipe.ema else "")
            save_grid(path, rows, self.prompts, [f"seed {n}" for n in range(self.per_prompt)], title)
