"""Samples of a student beside those of its teacher while it learns: the same prompts and noise every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Trainer

from sana.callback.due import Due
from sana.callback.records import log_row
from sana.model.generate import Painter
from sana.run.sidecar import save_grid
from sana.sampler.guided import Sampler


class Comparison(Due):
    """Saves ``samples/step_NNNNNNNN.png``: a row per prompt; the student in few steps, and the teacher in many.

    Logs ``samples/distance_<steps>``, the root mean square distance of the student's pixels in [0, 1] from the
    teacher's, which has the same noise: a student that is consistent with its teacher comes near it in one step.

    Args:
        prompts: one row each, at seed 0 of the row.
        student: how the student draws; its number of steps is replaced by each of `steps`.
        teacher: how the teacher draws.
        steps: columns of the student.
        every: updates between pictures; there is one at the end too.
        size: pixels of a side.

    Raises:
        ValueError: every is below 1, or no number of steps is given.
    """

    def __init__(
        self,
        prompts: list[str],
        student: Sampler,
        teacher: Sampler,
        steps: Sequence[int] = (1, 2, 4),
        every: int = 1000,
        size: int = 64,
    ) -> None:
        if every < 1 or not steps:
            raise ValueError(
                f"callback.samples: every is at least 1 and steps not empty, got {every} and {list(steps)}"
            )
        super().__init__(every)
        self.prompts, self.student, self.teacher = list(prompts), student, teacher
        self.steps, self.size = list(steps), size
        self._of_teacher: np.ndarray | None = None

    def act(self, trainer: Trainer, recipe: Any) -> None:
        parts = recipe.frozen.autoencoder, recipe.frozen.text_encoder, recipe.null_like, recipe.frozen.offload
        seeds, sides = list(range(len(self.prompts))), (self.size, self.size)
        with trainer.precision_plugin.forward_context():
            if self._of_teacher is None:
                painter = Painter(recipe.frozen.teacher, *parts)
                self._of_teacher = painter.draw(self.prompts, seeds, self.teacher, *sides)
            with recipe.averaged("network") as network:
                painter = Painter(network, *parts)
                columns = [
                    painter.draw(self.prompts, seeds, replace(self.student, steps=n), *sides) for n in self.steps
                ]
        near = self._of_teacher.astype(np.float64)
        far = {n: float(np.sqrt(np.mean((c - near) ** 2))) / 255 for n, c in zip(self.steps, columns, strict=True)}
        log_row(trainer, {f"samples/distance_{n}": value for n, value in far.items()})
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "samples" / f"step_{trainer.global_step:08d}.png"
            rows = [list(images) for images in zip(*columns, self._of_teacher, strict=True)]
            labels = [f"{n} step{'s' * (n > 1)}" for n in self.steps] + [f"teacher, {self.teacher.steps}"]
            title = f"update {trainer.global_step}" + (", averaged weights" if "network" in recipe.ema else "")
            save_grid(path, rows, self.prompts, labels, title)
