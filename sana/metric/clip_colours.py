"""Colours of objects by CLIP, as GenEval asks for them (Ghosh et al. 2023, section 3.2 and the published code)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sana.metric.geneval_rules import Found
from sana.nn.clip import Clip

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {c} {name}", "a photo of a {c}-colored {name}", "a photo of a {c} object")
GROUND = (153, 153, 153)  # #999


class ClipColours:
    """Zero-shot classification of each object, cut out onto grey and cropped to its box.

    Args:
        model, weights, device: see `sana.nn.clip.Clip`; the published numbers have OpenAI's ViT-L/14.
    """

    def __init__(self, model: str = "ViT-L-14-quickgelu", weights: str | None = "openai", device: str = "auto") -> None:
        self.clip = Clip(model, weights, device, "metric.geneval.colours.weights")
        self.settings: dict[str, Any] = {"colours": "CLIP on masked crops", **self.clip.settings}
        self._classes: dict[str, Tensor] = {}

    def __call__(self, image: NDArray[np.uint8], objects: Sequence[Found], name: str) -> list[str]:
        """The likeliest of the ten colours for each object of class `name`."""
        if not objects:
            return []
        features = self.clip.images([cut(image, found) for found in objects])
        best = (features @ self._of(name).T).argmax(1)
        return [COLOURS[i] for i in best.tolist()]

    def _of(self, name: str) -> Tensor:
        """(10, d): the unit mean of the templates' embeddings per colour."""
        if name not in self._classes:
            texts = [t.format(c=c, name=name) for c in COLOURS for t in TEMPLATES]
            means = self.clip.texts(texts).view(len(COLOURS), len(TEMPLATES), -1).mean(1)
            self._classes[name] = F.normalize(means, dim=-1)
        return self._classes[name]


def cut(image: NDArray[np.uint8], found: Found) -> NDArray[np.uint8]:
    """The object on grey ground, cropped to its box (rounded to whole pixels, at least one)."""
    picture = Image.fromarray(image)
    if found.mask is not None:
        if found.mask.shape != image.shape[:2]:
            raise ValueError(f"geneval: a mask of {found.mask.shape} for an image of {image.shape[:2]}")
        picture = Image.composite(picture, Image.new("RGB", picture.size, GROUND), Image.fromarray(found.mask))
    x1, y1, x2, y2 = (round(v) for v in found.box)
    return np.asarray(picture.crop((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1))))
