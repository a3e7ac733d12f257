"""Measures of image pairs as metrics: reconstructions against the originals of the same names (PSNR, SSIM, LPIPS)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana.metric.bootstrap import mean_interval
from sana.metric.pictures import Pictures

Measure = Callable[[Tensor, Tensor], Tensor]
"""(b, 3, h, w) in [-1, 1] twice -> (b,)."""


class Pairs:
    """The mean of a measure over pairs of images, and its interval.

    Args:
        measure: such as `sana.metric.psnr.psnr`.
        reference: folder of the originals. Its n-th image in the order of names belongs to the n-th of the images, and
            there have to be equally many; the sizes of each pair have to be equal.
        name: for messages.
        level, resamples, seed: of the bootstrap.
    """

    def __init__(
        self,
        measure: Measure,
        reference: str | Path | None = None,
        name: str = "psnr",
        level: float = 0.95,
        resamples: int = 10_000,
        seed: int = 0,
    ) -> None:
        self.measure_pair, self.reference, self.name = measure, reference, name
        self.level, self.resamples, self.seed = level, resamples, seed

    def __call__(
        self,
        images: Sequence[Any],
        metadata: Sequence[Mapping[str, Any]] = (),
        clusters: Sequence[Hashable] | None = None,
    ) -> dict[str, Any]:
        """``{"mean", "interval", "level", "n", "settings"}``.

        Raises:
            ValueError: no folder of originals, another number of them, or another size.
        """
        if self.reference is None or callable(self.reference):
            raise ValueError(f"{self.name}: compares image by image; give reference=FOLDER with the originals")
        originals = Pictures(self.reference)
        if len(originals) != len(images):
            raise ValueError(f"{self.name}: {len(images)} images and {len(originals)} originals in {self.reference}")
        values = []
        for i in range(len(images)):
            x, y = np.asarray(images[i]), originals[i]
            if x.shape != y.shape:
                raise ValueError(f"{self.name}: image {i} is {x.shape[:2]}, its original {y.shape[:2]} pixels")
            values.append(float(self.measure_pair(_tensor(x), _tensor(y))))
        finite = [v for v in values if np.isfinite(v)]
        if not finite:
            raise ValueError(f"{self.name}: all {len(values)} images equal their originals; is it the same folder?")
        draw = {"level": self.level, "resamples": self.resamples, "seed": self.seed}
        settings = {"reference": str(self.reference), "equal_to_original": len(values) - len(finite)}
        own = getattr(self.measure_pair, "settings", {})
        return mean_interval(finite, **draw).asdict() | {"settings": {**own, **settings}}


def _tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
