"""Encoders and decoders tile by tile, with the result of the whole map.

A half of the autoencoder is a chain of layers. Between two attention layers each output depends on a bounded
neighbourhood, so a tile of a segment's output is the chain applied to the part of the segment's input that the tile
reads, and what the cut made wrong is cropped away after every layer. Attention is linear: it needs of the whole map
only sums over its places, which are taken tile by tile too. So whole maps are kept only where the chain is cut into
segments, and everything in between is as large as a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sana.allocator import give_back
from sana.encoder.autoencoder.blocks import EViTBlock, Local

Interval = tuple[int, int]  # [first, end)
Area = tuple[Interval, Interval]  # rows, columns


@dataclass(frozen=True)
class Layer:
    """One link of a chain.

    Attributes:
        run: map (b, c, h, w) -> map; it pads with zeros.
        field, size: see `Local`.
        attention: the layer, where it attends to the whole map; `run` then takes the sums too.
        scale: outputs per input along an axis.
    """

    run: Callable[..., Tensor]
    field: Callable[[int, int], Interval]
    size: Callable[[int], int]
    attention: EViTBlock | None = None
    scale: float = 1.0


def layer_of(module: Local) -> Layer:
    """A module as a link."""
    attention = module if isinstance(module, EViTBlock) else None
    return Layer(module, module.field, module.size, attention, scale=module.size(2) / 2)


def convolution(run: Callable[[Tensor], Tensor], reach: int) -> Layer:
    """A function that reads `reach` places around each of its outputs as a link."""
    return Layer(run, partial(_beside, reach), _same)


def _beside(reach: int, first: int, end: int) -> Interval:
    return first - reach, end + reach


def _same(n: int) -> int:
    return n


@dataclass(frozen=True)
class Segment:
    """A part of a chain between two maps that are kept whole.

    Attributes:
        layers: only the first may be an attention layer.
        sizes: (height, width) before the first layer, and after each.
        tile: side of a tile of the output in its own places; None: the whole at once.
    """

    layers: tuple[Layer, ...]
    sizes: tuple[tuple[int, int], ...]
    tile: int | None = None

    def areas(self) -> list[Area]:
        """The tiles of the output."""
        return list(_areas(self.sizes[-1], self.tile))

    def source_areas(self) -> list[Area]:
        """Tiles of the input, as large as those of the output are there."""
        (before, _), (after, _) = self.sizes[0], self.sizes[-1]
        return list(_areas(self.sizes[0], None if self.tile is None else max(1, self.tile * before // after)))


def split(
    layers: Sequence[Layer], height: int, width: int, keep: Callable[[int], bool] = lambda i: True
) -> list[Segment]:
    """Cut a chain before every attention layer, and on the coarse side of those resampling layers that `keep` allows.

    Args:
        layers: the chain.
        height, width: of its input.
        keep: index of a layer -> whether its input may be kept whole. More cuts compute less twice; fewer keep less.
    """
    sizes = [(height, width)]
    for layer in layers:
        sizes.append((layer.size(sizes[-1][0]), layer.size(sizes[-1][1])))
    starts = [0]
    for i, layer in enumerate(layers):
        coarse = i > 0 and (layer.scale > 1 or layers[i - 1].scale < 1)
        if i > 0 and (layer.attention is not None or (coarse and keep(i))):
            starts.append(i)
    ends = [*starts[1:], len(layers)]
    return [Segment(tuple(layers[i:j]), tuple(sizes[i : j + 1])) for i, j in zip(starts, ends, strict=True)]


def run(segments: Sequence[Segment], x: Float[Tensor, "b c h w"], batch: int) -> Float[Tensor, "b d H W"]:
    """The chain's output, segment after segment, of `batch` samples at once, keeping no freed memory on the way."""
    y: Tensor | None = None
    for first in range(0, x.shape[0], batch):
        part = x[first : first + batch]
        for segment in segments:
            part = run_segment(segment, part)
        if batch >= x.shape[0]:
            return part
        if y is None:
            y = part.new_empty((x.shape[0], *part.shape[1:])).to(memory_format=torch.channels_last)
        y[first : first + batch] = part
        del part
    assert y is not None
    return y


def run_segment(segment: Segment, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
    """One segment's output, tile after tile."""
    areas = segment.areas()
    if len(areas) == 1:
        return through(segment, x, areas[0], spent=_give_back)
    sums: Tensor | None = None
    if (block := segment.layers[0].attention) is not None:
        for area in segment.source_areas():
            part = sums_of(block, x, area)
            _give_back(x)
            sums = part if sums is None else sums.add_(part)
    y: Tensor | None = None
    for rows, columns in areas:
        part = through(segment, x, (rows, columns), sums, spent=_give_back)
        if y is None:
            shape = (*part.shape[:2], *segment.sizes[-1])
            y = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
        y[:, :, slice(*rows), slice(*columns)] = part
        del part  # or it would live on beside the next one
    assert y is not None
    return y


def sums_of(block: EViTBlock, x: Float[Tensor, "b c h w"], area: Area) -> Tensor:
    """The part of the attention's sums that an area of the map adds."""
    outer = around(area, block.attention.reach, (x.shape[2], x.shape[3]))
    inner = [slice(first - p, end - p) for (first, end), (p, _) in zip(area, outer, strict=True)]
    return block.attention.sums(_dense(x[:, :, slice(*outer[0]), slice(*outer[1])]), *inner)


def around(area: Area, reach: int, size: tuple[int, int]) -> Area:
    """An area and `reach` more places on each side, where the map has them."""
    rows, columns = ((max(0, p - reach), min(n, q + reach)) for (p, q), n in zip(area, size, strict=True))
    return rows, columns


def through(
    segment: Segment,
    x: Float[Tensor, "b c h w"],
    area: Area,
    sums: Tensor | None = None,
    spent: Callable[[Tensor], None] = lambda x: None,
) -> Float[Tensor, "b d h_out w_out"]:
    """An area of a segment's output, from the part of the whole input x that it reads; `spent` is called after each
    layer, when what it no longer needs is freed."""
    read = fields(segment, area)
    x = _dense(x[:, :, slice(*read[0][0]), slice(*read[0][1])])
    for layer, (before, after) in zip(segment.layers, pairwise(read), strict=True):
        x = layer.run(x) if layer.attention is None else layer.run(x, sums)
        top, left = (layer.size(interval[0]) for interval in before)
        rows, columns = after
        x = _dense(x[:, :, rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left])
        spent(x)
    return x


def _dense(x: Tensor) -> Tensor:
    """x itself where nothing was cut off, else a copy without the rest: what was cut off is freed."""
    return x.contiguous(memory_format=torch.channels_last)


def _give_back(x: Tensor) -> None:
    """Maps of many sizes would leave gaps in the heap: 0.2 GiB at 768 px, and more than the plan allows."""
    if x.device.type == "cpu":
        give_back()


def _areas(size: tuple[int, int], tile: int | None) -> Iterator[Area]:
    """Squares that cover a map, row by row; the last of a row or column may be smaller."""
    height, width = size
    for row in range(0, height, tile or height):
        for column in range(0, width, tile or width):
            yield (row, min(height, row + (tile or height))), (column, min(width, column + (tile or width)))


def fields(segment: Segment, area: Area) -> list[Area]:
    """What an area of the output reads of the input of each layer, first the first layer's; the area itself last."""
    found = [area]
    for layer, size in zip(reversed(segment.layers), reversed(segment.sizes[:-1]), strict=True):
        wanted = (layer.field(*interval) for interval in found[-1])
        rows, columns = ((max(0, p), min(n, q)) for (p, q), n in zip(wanted, size, strict=True))
        found.append((rows, columns))
    return found[::-1]


def largest(areas: Sequence[Area], reads: Callable[[Area], Area]) -> Area:
    """The area that reads most places: one from the inside, where there is one."""

    def places(area: Area) -> int:
        (top, bottom), (left, right) = reads(area)
        return (bottom - top) * (right - left)

    return max(areas, key=places)


def modules(stages: Sequence[nn.Module]) -> Iterator[Layer]:
    """The layers of stages, in order."""
    for stage in stages:
        for module in stage.children():
            assert isinstance(module, Local)
            yield layer_of(module)
