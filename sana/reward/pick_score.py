"""PickScore (Kirstain et al. 2023): CLIP-H in Hugging Face's form, trained on which of two images people picked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sana.pretrained import Published, locate, place
from sana.reward.protocol import paired

WEIGHTS = Published(
    "PickScore v1, with the processor of CLIP-ViT-H-14-laion2B-s32B-b79K in the same folder",
    "the folder of yuvalkirstain/PickScore_v1",
    "hf://yuvalkirstain/PickScore_v1",
)


class PickScore:
    """exp(logit scale) times the cosine, as published (about 20 for good images).

    Args:
        weights: folder with a CLIPModel and its processor, or ``hf://organisation/repository``.
        device: "auto", or a torch device.
        batch_size: images per call of the network.
        key: of the setting that names the weights, for messages.
    """

    def __init__(
        self,
        weights: str | None = None,
        device: str = "auto",
        batch_size: int = 16,
        key: str = "metric.pick_score.reward.weights",
    ) -> None:
        located = locate(weights, WEIGHTS, key)
        if located.path is None:
            raise ValueError(f"{key}={weights}: needs a folder, which says the architecture and the words")
        from transformers import AutoProcessor, CLIPModel

        self.device, self.batch_size = place(device), batch_size
        network: Any = CLIPModel.from_pretrained(located.path)
        self.network = network.to(self.device).float().eval().requires_grad_(False)
        self.processor: Any = AutoProcessor.from_pretrained(located.path)
        self.settings: dict[str, Any] = {"reward": "PickScore", "weights": located.said}

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """(n,) scores."""
        paired(images, prompts)
        scores = []
        for start in range(0, len(images), self.batch_size):
            one = slice(start, start + self.batch_size)
            pictures = [Image.fromarray(np.asarray(x)) for x in images[one]]
            inputs = self.processor(
                images=pictures, text=list(prompts[one]), padding=True, truncation=True, max_length=77,
                return_tensors="pt",
            ).to(self.device)  # fmt: skip
            with torch.autocast(self.device.type, enabled=False):
                out = self.network(**inputs)
            cosine = (F.normalize(out.image_embeds, dim=-1) * F.normalize(out.text_embeds, dim=-1)).sum(1)
            scores.append((self.network.logit_scale.exp() * cosine).float().cpu())
        return torch.cat(scores)
