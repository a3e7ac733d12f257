"""Cross-faded tiles: how diffusers' `AutoencoderDC` saves memory. For parity; `tiles` gives the result of the whole.

Each tile is encoded or decoded as if it were an image. Attention then sees a tile instead of the image, so the result
depends on the size of the tiles, and seams are hidden by fading linearly from one tile to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def check_blending(blending: Sequence[int], ratio: int) -> None:
    """Refuse what are not a tile and a stride in pixels.

    Raises:
        ValueError: not two multiples of the autoencoder's ratio with 0 < stride <= tile.
    """
    if len(blending) != 2 or not 0 < blending[1] <= blending[0] or any(side % ratio for side in blending):
        raise ValueError(f"blending must be [tile, stride] in pixels, multiples of {ratio} with 0 < stride <= tile, "
                         f"got {list(blending)}")  # fmt: skip


def blend_tiles(
    run: Callable[[Tensor], Tensor], x: Float[Tensor, "b c h w"], source: tuple[int, int], target: tuple[int, int]
) -> Float[Tensor, "b d H W"]:
    """A map from overlapping tiles, faded vertically, then horizontally; whole where it is no larger than a tile.

    Args:
        run: encoder or decoder.
        x: its input.
        source: tile and stride in places of the input.
        target: the same in places of the output.
    """
    (tile, step), (side, stride) = source, target
    if x.shape[2] <= tile and x.shape[3] <= tile:
        return run(x)
    strips: list[Tensor] = []
    above: list[Tensor] = []
    for i in range(0, x.shape[2], step):
        row: list[Tensor] = []
        for j, left in enumerate(range(0, x.shape[3], step)):
            part = run(x[:, :, i : i + tile, left : left + tile])
            if above:
                part = _fade(above[j], part, side - stride, 2)
            if row:
                part = _fade(row[-1], part, side - stride, 3)
            row.append(part)
        strips.append(torch.cat([part[:, :, :stride, :stride] for part in row], dim=3))
        above = row
    return torch.cat(strips, dim=2)


def _fade(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """`after`, whose first `extent` places go over linearly from the last ones of `before`."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    shape = [1, 1, 1, 1]
    shape[dim] = extent
    weight = torch.arange(extent, device=after.device, dtype=after.dtype).div_(max(1, extent)).view(shape)
    end, start = before.narrow(dim, before.shape[dim] - extent, extent), after.narrow(dim, 0, extent)
    rest = after.narrow(dim, extent, after.shape[dim] - extent)
    return torch.cat([end * (1 - weight) + start * weight, rest], dim=dim)
