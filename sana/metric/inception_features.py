"""Images to Inception features in one named way, with everything that the features depend on stated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from sana.metric.inception import DIM, WEIGHTS, load_inception
from sana.metric.resize import RESIZERS, Mode, shrink
from sana.pretrained import locate, place


class InceptionFeatures:
    """2048 pooled features of images of any size.

    Args:
        weights: see `sana.pretrained`: the published file, or ``random:SEED``.
        mode: how images are resized; see `sana.metric.resize`.
        size: pixels that the shorter side is brought to first, as SANA's toolkit does; "pytorch-fid" only.
        device: "auto", or a torch device.

    Attributes:
        dim: 2048.
        settings: what a number made of these features depends on.

    Raises:
        MissingWeightsError: see `sana.pretrained.locate`.
        ValueError: an unknown mode, or `size` where it has no meaning.
    """

    dim = DIM

    def __init__(
        self, weights: str | None = None, mode: Mode = "clean", size: int | None = None, device: str = "auto"
    ) -> None:
        if mode not in RESIZERS:
            raise ValueError(f"mode: {mode!r} is not one of {', '.join(get_args(Mode))}")
        if size is not None and (mode != "pytorch-fid" or size < 1):
            raise ValueError(f"size: {size} with mode={mode}; only pytorch-fid has a size, a positive number of pixels")
        located = locate(weights, WEIGHTS, "features")
        self.device = place(device)
        self.mode, self.size = mode, size
        self.network = load_inception(located).to(self.device)
        self.settings: dict[str, Any] = {
            "features": "Inception-v3, 2048 pooled",
            "weights": located.said,
            "resize": mode if size is None else f"{mode}, shorter side to {size} px first",
        }

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 (h, w, 3) each -> (n, 2048) float64 on the CPU."""
        resize = RESIZERS[self.mode]
        pixels = [resize(image if self.size is None else shrink(image, self.size)) for image in images]
        with torch.autocast(self.device.type, enabled=False):  # of the run that evaluates itself
            return self.network(torch.stack(pixels).to(self.device)).double().cpu()
