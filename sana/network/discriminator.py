"""Discriminators: logits that are high for real samples and low for generated ones."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, arXiv 1611.07004): a convolutional net that judges overlapping patches.

    `depth` convolutions of 4x4 and stride 2, each twice as wide as the one before; group norm (not batch norm: a
    sample's logits must not depend on the rest of its batch) from the second on; then 3x3 to one logit per place.

    Args:
        in_channels: channels of the images.
        width: channels after the first convolution; a multiple of 8.
        depth: number of halvings; a patch covers about 2^(depth + 2) pixels.
    """

    def __init__(self, in_channels: int = 3, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        if width % 8 or depth < 1:
            raise ValueError(f"PatchDiscriminator: width={width} must be a multiple of 8 and depth={depth} at least 1")
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for _ in range(depth - 1):
            layers += [nn.Conv2d(width, 2 * width, 4, 2, 1), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2)]
            width *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 p q"]:
        """Logits per patch; p = h / 2^depth, q = w / 2^depth."""
        return self.layers(image)
