"""What a reward is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor


class Reward(Protocol):
    """A frozen judge of images.

    Attributes:
        settings: which network with which weights, for the record.
    """

    settings: dict[str, Any]

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str], /) -> Tensor:
        """uint8 (h, w, 3) each and as many prompts -> (n,) float32 on the CPU."""
        ...


def paired(images: Sequence[Any], prompts: Sequence[str]) -> None:
    """Refuse lists of different lengths.

    Raises:
        ValueError: they differ, or are empty.
    """
    if len(images) != len(prompts) or not len(images):
        raise ValueError(f"reward: {len(images)} images and {len(prompts)} prompts; expected equally many, not none")
