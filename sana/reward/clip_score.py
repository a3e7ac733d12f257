"""Rewards that are cosines of CLIP embeddings: CLIP score (Hessel et al. 2021), HPSv2 (Wu et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from sana.nn.clip import Clip
from sana.reward.protocol import paired


class ClipScore:
    """The trained logit scale (about 100) times the cosine of image and prompt; not cut off at zero, as SANA's tool.

    Args:
        model, weights, device: see `sana.nn.clip.Clip`. SANA's numbers have OpenAI's ViT-L/14.
        scale: instead of the trained one; 1 gives the cosine, which HPSv2 is with its own weights of ViT-H-14.
        key: of the setting that names the weights, for messages.
    """

    def __init__(
        self,
        model: str = "ViT-L-14-quickgelu",
        weights: str | None = "openai",
        device: str = "auto",
        scale: float | None = None,
        key: str = "metric.clip_score.reward.weights",
    ) -> None:
        self.clip = Clip(model, weights, device, key)
        self.scale = self.clip.scale if scale is None else scale
        self.settings: dict[str, Any] = {**self.clip.settings, "scale": self.scale}

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """(n,) scores."""
        paired(images, prompts)
        return self.scale * (self.clip.images(images) * self.clip.texts(prompts)).sum(1)
