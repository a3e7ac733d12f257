"""A small feature space for 64x64 scenes: 96 hand-made numbers per image, the same on every machine.

It exists so that a Frechet distance can be computed for the embedded world without any downloaded network.
The number made from it is called `fid_scenes` and compares with nothing else: it is not FID on Inception
features.

Layout of the 96 features (pixels divided by 255):

====== =====================================================================================================
0-47   mean red, green, blue of each cell of a 4x4 grid (row-major): what is where
48-79  per quadrant (2x2, row-major), mean luma gradient magnitude in 8 unsigned orientation bins: form
80-95  occupancy of 8 colour corners (soft, trilinear), then of 8 luma-contrast levels: palette and sharpness
====== =====================================================================================================
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DIM = 96
SCENE_FEATURES = (
    "scene features v1, d = 96: 4x4 mean colours (48), 2x2 gradient orientation histograms (32), "
    "colour corners (8), gradient magnitude levels (8); not Inception, compares only with itself"
)
_ORIENTATIONS = 8
_LEVELS = torch.linspace(0.0, 1.0, 8, dtype=torch.float64)
_CORNERS = torch.tensor([[r, g, b] for r in (0, 1) for g in (0, 1) for b in (0, 1)], dtype=torch.float64)


def scene_features(images: Tensor) -> Tensor:
    """Features of a batch of images.

    Args:
        images: (n, h, w, 3) uint8 with h, w >= 8. Features of different image sizes do not compare.

    Returns:
        (n, 96) float64, each of order 1 or less. Depends on the image alone, not on the batch.

    Raises:
        ValueError: another shape or dtype.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != torch.uint8 or min(images.shape[1:3]) < 8:
        raise ValueError(
            f"scene_features: images of shape {tuple(images.shape)} and {images.dtype}, "
            "expected uint8 (n, h, w, 3) with h and w of at least 8"
        )
    x = images.permute(0, 3, 1, 2).to(torch.float64) / 255
    colours = F.adaptive_avg_pool2d(x, 4).permute(0, 2, 3, 1).flatten(1)
    magnitude, orientation = _gradient(x)
    return torch.cat([colours, _orientations(magnitude, orientation), _palette(x), _levels(magnitude)], dim=1)


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude and unsigned angle in [0, pi) of the luma's central differences, each (n, h - 2, w - 2)."""
    luma = torch.einsum("nchw,c->nhw", x, x.new_tensor([0.299, 0.587, 0.114]))
    dx = (luma[:, 1:-1, 2:] - luma[:, 1:-1, :-2]) / 2
    dy = (luma[:, 2:, 1:-1] - luma[:, :-2, 1:-1]) / 2
    return torch.hypot(dx, dy), torch.remainder(torch.atan2(dy, dx), torch.pi)


def _orientations(magnitude: Tensor, angle: Tensor) -> Tensor:
    """Gradient orientation histograms, (n, 32).

    Magnitude shared linearly between the two nearest of 8 bins (circular), averaged per quadrant, x 8.
    """
    place = angle / torch.pi * _ORIENTATIONS
    low = place.floor()
    share = place - low
    low = low.long() % _ORIENTATIONS
    bins = magnitude.new_zeros(len(magnitude), _ORIENTATIONS, *magnitude.shape[1:])
    bins.scatter_add_(1, low[:, None], (magnitude * (1 - share))[:, None])
    bins.scatter_add_(1, ((low + 1) % _ORIENTATIONS)[:, None], (magnitude * share)[:, None])
    return 8 * F.adaptive_avg_pool2d(bins, 2).permute(0, 2, 3, 1).flatten(1)


def _palette(x: Tensor) -> Tensor:
    """(n, 8): mean trilinear weight of every corner of the colour cube; sums to 1."""
    corners = _CORNERS.to(x.device)
    weights = [torch.where(c[:, None, None] > 0, x, 1 - x).prod(1).mean((1, 2)) for c in corners]
    return torch.stack(weights, dim=1)


def _levels(magnitude: Tensor) -> Tensor:
    """Soft histogram of 2 x gradient magnitude in [0, 1] over 8 levels, (n, 8); sums to 1.

    Blurred edges fill the middle levels, sharp ones the top, flat ground the first: this tells blur and noise
    apart.
    """
    place = (2 * magnitude).clamp(0, 1)[:, None]
    level = _LEVELS.to(magnitude.device)[:, None, None]
    return (1 - (place - level).abs() * (len(_LEVELS) - 1)).clamp_min(0).mean((2, 3))
