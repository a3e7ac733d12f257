"""LAION's aesthetic predictor (improved-aesthetic-predictor): how much people liked to look at an image, 1 to 10."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana.nn.clip import Clip
from sana.pretrained import Published, locate, seeded
from sana.reward.mlp import Head, read_tensors
from sana.reward.protocol import paired

HEAD = Published(
    "the linear head of the aesthetic predictor",
    "sac+logos+ava1-l14-linearMSE.pth",
    "https://github.com/christophschuhmann/improved-aesthetic-predictor",
)


class Aesthetic:
    """A `Head` on unit embeddings of OpenAI's ViT-L/14; the prompt is not looked at.

    Args:
        head: its weights, see `sana.pretrained`.
        model, weights, device: see `sana.nn.clip.Clip`.
    """

    def __init__(
        self,
        head: str | None = None,
        model: str = "ViT-L-14-quickgelu",
        weights: str | None = "openai",
        device: str = "auto",
    ) -> None:
        located = locate(head, HEAD, "metric.aesthetic.reward.head")
        self.clip = Clip(model, weights, device, "metric.aesthetic.reward.weights")
        with seeded(located.seed or 0):
            self.head = Head(self.clip.dim).requires_grad_(False)
        if located.path is not None:
            self.head.fill(read_tensors(str(located.path)), located.given)
        self.settings: dict[str, Any] = {**self.clip.settings, "head": located.said}

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """(n,) scores."""
        paired(images, prompts)
        return self.head(self.clip.images(images))
