"""A small convolutional net that names what is in an image; its features serve as a perceptual distance."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class AttributeNet(nn.Module):
    """Images in [-1, 1] to one logit per attribute (a colour, a shape, a coloured shape, a count is present or not).

    Args:
        attributes: number of logits.
        widths: channels per stage; each stage halves the resolution.
    """

    def __init__(self, attributes: int, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        inputs = 3
        for width in widths:
            self.stages.append(nn.Sequential(
                nn.Conv2d(inputs, width, 3, stride=2, padding=1), nn.GroupNorm(4, width), nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU(),
            ))  # fmt: skip
            inputs = width
        self.head = nn.Linear(2 * inputs, attributes)

    def features(self, image: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Feature maps of all stages, finest first."""
        maps = []
        for stage in self.stages:
            image = stage(image)
            maps.append(image)
        return maps

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        """Logits of the attributes, from the mean (for counts) and the maximum (for presence) of the last map."""
        last = self.features(image)[-1].flatten(2)
        return self.head(torch.cat([last.mean(2), last.amax(2)], dim=1))


def train_attributes(
    net: AttributeNet, batches: Iterable[tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b k"]]], lr: float = 2e-3
) -> list[float]:
    """Fits the net in place to (images, 0/1 attributes) by binary cross-entropy; AdamW, one step per batch.

    Returns:
        the loss of every step.
    """
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    losses = []
    for image, target in batches:
        loss = F.binary_cross_entropy_with_logits(net(image), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    net.eval()
    return losses
