"""Discriminators: logits that are high for real samples and low for generated ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
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


class FeatureDiscriminator(nn.Module):
    """Small heads on the features of a frozen network (LADD: Sauer et al. 2024, arXiv:2403.12015; SANA-Sprint,
    arXiv:2503.09641), one per layer, shaped as in StyleGAN-T (Sauer et al. 2023, arXiv:2301.09515).

    Args:
        width: channels of the features.
        layers: blocks of the network whose output is judged, counted from 0.
        kernel: tokens that the residual convolution of a head covers; odd.
        group: samples that share the statistics of a norm, at most; a batch is cut into equal groups.

    Raises:
        ValueError: no layer, a layer named twice, an even kernel or a group below 1.
    """

    def __init__(self, width: int, layers: Sequence[int], kernel: int = 9, group: int = 8) -> None:
        super().__init__()
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"FeatureDiscriminator: layers are different blocks, at least one; got {list(layers)}")
        if kernel % 2 == 0 or group < 1:
            raise ValueError(f"FeatureDiscriminator: kernel={kernel} must be odd and group={group} at least 1")
        self.width, self.layers, self.group = width, tuple(layers), group
        self.heads = nn.ModuleList(Head(width, kernel, group) for _ in layers)

    def forward(self, features: Mapping[int, Float[Tensor, "b n d"]]) -> Float[Tensor, "b k"]:
        """Logits, k = layers x tokens, from what `Sana.features` gives for `layers`."""
        judged = [head(features[i].mT) for head, i in zip(self.heads, self.layers, strict=True)]
        return torch.cat([logits.flatten(1) for logits in judged], dim=1)


class Head(nn.Module):
    """From features of tokens to a logit each: point, residual over neighbours in a circle, point.

    Args:
        width: channels.
        kernel: of the residual convolution.
        group: see `FeatureDiscriminator`.
    """

    def __init__(self, width: int, kernel: int, group: int) -> None:
        super().__init__()
        self.point = SpectralConv(width, width, 1)
        self.point_norm = LocalNorm(width, group)
        self.along = SpectralConv(width, width, kernel)
        self.along_norm = LocalNorm(width, group)
        self.out = SpectralConv(width, 1, 1)

    def forward(self, x: Float[Tensor, "b d n"]) -> Float[Tensor, "b 1 n"]:
        y = F.leaky_relu(self.point_norm(self.point(x)), 0.2)
        y = (y + F.leaky_relu(self.along_norm(self.along(y)), 0.2)) / math.sqrt(2)
        return self.out(y)


class SpectralConv(nn.Module):
    """Circular 1-d convolution whose weight is divided by its largest singular value (Miyato et al. 2018,
    arXiv:1802.05957), by one power iteration per forward in training."""

    left: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        layer = nn.Conv1d(inputs, outputs, kernel)  # for its initial values
        self.weight, self.bias, self.pad = layer.weight, layer.bias, kernel // 2
        self.register_buffer("left", F.normalize(torch.randn(outputs), dim=0))

    def forward(self, x: Float[Tensor, "b i n"]) -> Float[Tensor, "b o n"]:
        matrix = self.weight.flatten(1)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            right = F.normalize(matrix.mT @ self.left, dim=0, eps=1e-12)
            left = F.normalize(matrix @ right, dim=0, eps=1e-12)
            if self.training:
                self.left.copy_(left)
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight / (left @ (matrix @ right))
        if self.pad:  # by hand: torch's circular padding goes round once at most
            x = x[..., torch.arange(-self.pad, x.shape[-1] + self.pad, device=x.device) % x.shape[-1]]
        return F.conv1d(x, weight.to(x.dtype), self.bias)


class LocalNorm(nn.Module):
    """Batch norm over groups of neighbouring samples, without running statistics: the same in training and after.

    Args:
        width: channels.
        group: samples per group, at most.
        eps: added to the variance.
    """

    def __init__(self, width: int, group: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.group, self.eps = group, eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "b d n"]) -> Float[Tensor, "b d n"]:
        groups = -(-len(x) // self.group)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.cat([self._normal(part) for part in wide.tensor_split(groups)]).to(x.dtype)

    def _normal(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=(0, 2), correction=0, keepdim=True)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight[:, None] + self.bias[:, None]
