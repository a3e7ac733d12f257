"""CLIP image embeddings as a feature space, for CMMD (Jayasumana et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from sana.nn.clip import Clip


class ClipFeatures:
    """Unit embeddings of images.

    Args:
        model, weights, device: see `sana.nn.clip.Clip`; CMMD is published with OpenAI's ViT-L/14 at 336 px.
    """

    def __init__(
        self, model: str = "ViT-L-14-336-quickgelu", weights: str | None = "openai", device: str = "auto"
    ) -> None:
        self.clip = Clip(model, weights, device, "metric.cmmd.features.weights")
        self.dim, self.settings = self.clip.dim, self.clip.settings

    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 (h, w, 3) each -> (n, d) float64."""
        return self.clip.images(images).double()
