"""How much memory encoding or decoding takes, and the largest tiles that keep it within a budget.

Bytes are counted, not guessed: the layers are run on tensors without data, and whatever they allocate is added up until
it is freed. So the plan follows the code, in every dtype and under autocast. Not counted are what the process holds
besides (Python, torch, other models) and what a library allocates inside one call, some tens of megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sana.encoder.autoencoder.tiles import Layer, Segment, around, fields, largest, split, sums_of, through
from sana.ops.allocations import Allocations

TILES = (4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 64)  # sides in pixels, tried in this order
_KEPT = 4  # a map is kept whole between two segments where that takes at most a fourth of the budget


@dataclass(frozen=True)
class Plan:
    """How a batch is encoded or decoded.

    Attributes:
        segments: the chain, cut, with the tile of each part.
        batch: samples at once.
        bytes: most memory in use at once, weights included.
    """

    segments: tuple[Segment, ...]
    batch: int
    bytes: int


def make_plan(
    layers: Sequence[Layer], like: Tensor, weights: int, budget: int | None = None, tile: int | None = None
) -> Plan:
    """The largest tiles that keep a chain within a budget; the whole batch at once where that fits.

    Args:
        layers: of the encoder or of the decoder.
        like: what the input (b, c, h, w) is like: shape, dtype and device. Autocast counts where it is on. A fake
            tensor plans for layers whose weights are fake in the same mode.
        weights: bytes that are there all along.
        budget: bytes; None: no limit.
        tile: a side in pixels for every segment instead of the largest that fits.

    Raises:
        ValueError: the budget does not hold even the smallest tiles; the message has the bytes that would.
    """
    ledger = _Ledger(layers, like, weights)
    if tile is None:
        whole = ledger.whole()
        if budget is None or whole.bytes <= budget:
            return whole
    found: list[Plan] = []
    for keep in (lambda i: budget is None or ledger.maps[i].bytes * _KEPT <= budget, lambda i: False):
        found.append(ledger.tiled(keep, budget, tile))
        if budget is None or found[-1].bytes <= budget:
            return found[-1]
    needed = min(plan.bytes for plan in found)
    raise ValueError(f"{(budget or 0) / 2**30:.3g} GiB are too little: at least {needed / 2**30:.3g} GiB are needed, "
                     f"{weights / 2**30:.3g} of them for the weights")  # fmt: skip


@dataclass(frozen=True)
class _Map:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class _Ledger:
    """Bytes of a chain's maps, segments and tiles.

    Attributes:
        maps: of one sample: what each layer takes, and at the end the output.
    """

    def __init__(self, layers: Sequence[Layer], like: Tensor, weights: int) -> None:
        self.layers, self.weights, self.device = layers, weights, like.device
        self.mode = like.fake_mode if isinstance(like, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)
        self.batch, self.input = like.shape[0], _Map(tuple(like.shape), like.dtype)
        self.maps: list[_Map] = []
        self._trace(replace(self.input, shape=(1, *like.shape[1:])), self._note_maps)

    def whole(self) -> Plan:
        """Everything at once."""
        segments = split(self.layers, *self.input.shape[2:], keep=lambda i: False)

        def walk(x: Tensor) -> None:
            for segment in segments:
                x = through(segment, x, segment.areas()[0])

        return Plan(tuple(segments), self.batch, self.weights + self.input.bytes + self._trace(self.input, walk))

    def tiled(self, keep: Callable[[int], bool], budget: int | None, tile: int | None) -> Plan:
        """Sample by sample, each segment in the largest tiles that fit, or in the smallest where none does."""
        segments: list[Segment] = []
        held = self.weights + self.input.bytes + (self.batch * self.maps[-1].bytes if self.batch > 1 else 0)
        at = most = 0
        for segment in split(self.layers, *self.input.shape[2:], keep=keep):
            source, target = self.maps[at], self.maps[at + len(segment.layers)]
            choice, needed = segment, 0
            for choice in self._choices(segment, tile):
                needed = held + (source.bytes if at else 0) + (target.bytes if choice.tile else 0)
                needed += self._tile_bytes(choice, source)
                if budget is None or needed <= budget:
                    break
            segments.append(choice)
            most, at = max(most, needed), at + len(segment.layers)
        return Plan(tuple(segments), 1, most)

    def _choices(self, segment: Segment, tile: int | None) -> Iterator[Segment]:
        """The segment whole and in tiles, or in the tiles asked for."""
        height, width = segment.sizes[-1]
        pitch = max(self.input.shape[2], self.maps[-1].shape[2]) // height  # pixels per place
        sides = [max(1, side // pitch) for side in (TILES if tile is None else (tile,))]
        smaller = [side for side in sides if side < max(height, width)]
        if tile is None or not smaller:
            yield segment
        for side in dict.fromkeys(smaller):
            yield replace(segment, tile=side)

    def _tile_bytes(self, segment: Segment, source: _Map) -> int:
        """What the tile that reads most allocates, for the attention's sums or for the layers."""
        area = largest(segment.areas(), lambda area: fields(segment, area)[0])
        block = segment.layers[0].attention
        if block is None or segment.tile is None:
            return self._trace(source, lambda x: through(segment, x, area))
        attention, size = block.attention, segment.sizes[0]
        part = largest(segment.source_areas(), lambda area: around(area, attention.reach, size))

        def walk(x: Tensor) -> None:
            sums = sums_of(block, x, part)
            through(segment, x, area, sums)

        return self._trace(source, walk)

    def _note_maps(self, x: Tensor) -> None:
        for layer in self.layers:
            self.maps.append(_Map(tuple(x.shape), x.dtype))
            x = layer.run(x)
        self.maps.append(_Map(tuple(x.shape), x.dtype))

    def _trace(self, source: _Map, walk: Callable[[Tensor], object]) -> int:
        """The most bytes that a function of a map has allocated at once."""
        with torch.no_grad(), self.mode:
            x = torch.empty(source.shape, dtype=source.dtype, device=self.device, memory_format=torch.channels_last)
            with Allocations() as allocations:
                walk(x)
            return allocations.peak
