"""A judge of scenes that sees colours and nothing else: cheap, and wrong about shapes, numbers and places."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from sana.reward.judge import Images, Lines, SingleJudge
from sana.scenes import COLORS

RADIUS = 53.0  # in RGB: below half of the least distance between two colours, so that a pixel has one name at most
LEAST = 20 / 64**2  # share of the pixels that a colour needs to count; the smallest shape has five times that
_PALETTE = np.array(list(COLORS.values()), np.float64)


class AskedColours(SingleJudge):
    """Intersection over union of the colours that the prompt names and those that the picture has.

    For a prompt that names none it has nothing to say: 0 for every picture.

    Args:
        name: see `Judge`.
    """

    def __init__(self, name: str = "colours") -> None:
        super().__init__(name, {"radius": RADIUS, "least": LEAST})

    def score(self, images: Images, lines: Lines) -> NDArray[np.float64]:
        """(n,) in [0, 1]."""
        return np.array([_overlap(image, line["prompt"]) for image, line in zip(images, lines, strict=True)])


def _overlap(image: NDArray[np.uint8], prompt: str) -> float:
    asked = set(re.findall(r"\w+", prompt.lower())) & set(COLORS)
    if not asked:
        return 0.0
    distance = ((image[..., None, :].astype(np.float64) - _PALETTE) ** 2).sum(-1)
    shares = (distance < RADIUS**2).mean((0, 1))
    shown = {name for name, share in zip(COLORS, shares, strict=True) if share >= LEAST}
    return len(asked & shown) / len(asked | shown)
