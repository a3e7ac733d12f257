"""What a published network is timed on: images, batch, captions, and what a row has to reach."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sana.types import Grid

TEXT = 300
"""Tokens of a caption."""


@dataclass(frozen=True)
class Shape:
    """One row: a size of `sana.bench.parts.SIZES` at a resolution and batch, and what it has to reach."""

    size: str
    px: int
    batch: int
    bars: tuple[tuple[str, float], ...] = ()

    @property
    def text(self) -> str:
        """For the row."""
        return f"{self.size} {self.px}px b{self.batch}"

    @property
    def grid(self) -> Grid:
        """In tokens."""
        return Grid(1, self.px // 32, self.px // 32)


def caption_mask(batch: int, device: torch.device) -> Tensor:
    """(batch, TEXT): a fifth is masked, so that the mask has work to do."""
    return (torch.arange(TEXT, device=device) < TEXT * 4 // 5).repeat(batch, 1)
