"""From planned batches to `Batch`es: who loads what, and what happens to samples that cannot be loaded.

Rank r of R takes its contiguous share of every global batch and cuts it into micro-batches; a worker loads whole
micro-batches. Every sample carries its position, so nothing in a batch depends on ranks, workers or their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sana.data.caption import Caption
from sana.data.planner import Planner
from sana.data.record import BadSample
from sana.data.transform import resize_and_crop
from sana.ops.random import uniform
from sana.types import Bad, Batch

CaptionChoice = Callable[[Sequence[Caption], float], Caption]


class Slot(NamedTuple):
    """One place in a batch: position in the stream, number of the sample over all sources, size in pixels."""

    position: int
    sample: int
    height: int
    width: int


class MicroBatches:
    """Batch sampler: endless micro-batches of one rank.

    Args:
        planner: of the global batches.
        sizes: bucket -> (height, width).
        start: first position not yet consumed.
        rank, world: this process and the number of processes.
        micro: samples per micro-batch; None: the rank's whole share of the global batch.

    Raises:
        ValueError: the global batch does not divide.
    """

    def __init__(
        self,
        planner: Planner,
        sizes: Sequence[tuple[int, int]],
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        micro: int | None = None,
    ) -> None:
        if planner.batch % world:
            raise ValueError(f"global batch {planner.batch} does not divide by {world} processes")
        self.share = planner.batch // world
        self.micro = micro or self.share
        if self.share % self.micro:
            raise ValueError(
                f"a rank's share of {self.share} samples does not divide into micro-batches of {self.micro}"
            )
        self.planner, self.sizes, self.start, self.rank = planner, list(sizes), start, rank

    def __iter__(self) -> Iterator[list[Slot]]:
        position = self.planner.start(self.start)
        first = self.rank * self.share
        while True:
            bucket, samples = self.planner.at(position)
            height, width = self.sizes[bucket]
            mine = samples[first : first + self.share].tolist()
            slots = [Slot(position + first + k, sample, height, width) for k, sample in enumerate(mine)]
            for offset in range(0, self.share, self.micro):
                yield slots[offset : offset + self.micro]
            position += self.planner.batch


class Samples(Dataset[Batch]):
    """Loads micro-batches out of sources.

    Args:
        sources: their samples are numbered one source after another.
        choice: rule that takes one caption of several by a uniform number.
        seed: of the caption choice, with the position.
        lanczos: resize by Lanczos instead of bicubically.
        latents: (samples of all sources, c, h, w) to give instead of images; not a number where there is none.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        choice: CaptionChoice,
        seed: int,
        *,
        lanczos: bool = False,
        latents: np.ndarray | None = None,
    ) -> None:
        self.sources, self.choice, self.seed = list(sources), choice, seed
        self.lanczos, self.latents = lanczos, latents
        self.starts = np.cumsum([0, *(len(source) for source in self.sources)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, sample: int) -> tuple[Any, int]:
        """The source of a sample, and its number there."""
        k = int(np.searchsorted(self.starts, sample, "right")) - 1
        return self.sources[k], sample - int(self.starts[k])

    def pixels(self, slot: Slot) -> np.ndarray:
        """The image of a slot at its size, uint8 (height, width, 3).

        Raises:
            BadSample: it cannot be read.
        """
        source, i = self.locate(slot.sample)
        picture = source.picture(i, size=(slot.height, slot.width))
        return resize_and_crop(picture, slot.height, slot.width, lanczos=self.lanczos)

    def latent(self, slot: Slot) -> np.ndarray:
        """The cached latent of a slot, (c, h, w).

        Raises:
            BadSample: there is none, because its image could not be read.
        """
        assert self.latents is not None
        latent = self.latents[slot.sample]
        if np.isnan(latent.flat[0]):
            source, i = self.locate(slot.sample)
            record = source.record(i)
            raise BadSample(record.shard, record.key, "corrupt image: it has no latent")
        return latent

    def __getitems__(self, slots: list[Slot]) -> Batch:
        """A micro-batch; all slots have one size. It is whole whatever the samples are like."""
        index = torch.tensor([slot.position for slot in slots], dtype=torch.int64)
        draws = uniform(self.seed, index, "caption").tolist()
        arrays: list[np.ndarray | None] = []
        captions: list[Caption] = []
        keys, bad = [], []
        for slot, u in zip(slots, draws, strict=True):
            source, i = self.locate(slot.sample)
            array, caption = None, Caption("", "")
            try:
                caption = self.caption(source.record(i), u)
                array = self.pixels(slot) if self.latents is None else self.latent(slot)
            except BadSample as error:
                caption = Caption("", "")
                bad.append(Bad(error.shard, error.key, error.reason))
            arrays.append(array)
            captions.append(caption)
            keys.append(source.key(i))
        good = [k for k, array in enumerate(arrays) if array is not None]
        places = [k if arrays[k] is not None else _next(good, k) for k in range(len(slots))]
        values = self._stack([None if k is None else arrays[k] for k in places], slots[0])
        return Batch(
            image=values if self.latents is None else None,
            latent=None if self.latents is None else values,
            caption=["" if k is None else captions[k].text for k in places],
            index=index,
            key=keys,
            weight=torch.tensor([float(array is not None) for array in arrays]),
            bad=bad,
            source=[caption.source for caption in captions],
        )

    def caption(self, record: Any, u: float) -> Caption:
        """The caption of a sample that u selects.

        Raises:
            BadSample: the rule finds none among its captions.
        """
        try:
            return self.choice(record.captions, u)
        except ValueError as error:
            raise BadSample(record.shard, record.key, f"no caption: {error}") from None

    def _stack(self, arrays: list[np.ndarray | None], slot: Slot) -> Tensor:
        """uint8 (b, 3, h, w) or latents; zeros where there is nothing."""
        if self.latents is not None:
            values = np.zeros((len(arrays), *self.latents.shape[1:]), self.latents.dtype)
        else:
            values = np.zeros((len(arrays), slot.height, slot.width, 3), np.uint8)
        for k, array in enumerate(arrays):
            if array is not None:
                values[k] = array
        tensor = torch.from_numpy(values)
        return tensor if self.latents is not None else tensor.permute(0, 3, 1, 2)


def _next(good: list[int], place: int) -> int | None:
    """The next good place after a bad one, from the start again behind the last; None where all are bad."""
    return next((k for k in good if k > place), good[0] if good else None)


def loader(samples: Samples, batches: MicroBatches, workers: int = 0) -> DataLoader[Any]:
    """Endless loader of the micro-batches of one rank, images as uint8.

    Args:
        samples: what is loaded.
        batches: in which order.
        workers: processes that load; 0 loads in this one.
    """
    return DataLoader(
        samples,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_whole,  # type: ignore[arg-type]
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _whole(batch: Batch) -> Batch:
    """What a worker gives is a batch already."""
    return batch


def to_float(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float in [-1, 1], of the same shape."""
    return pixels.float().div_(127.5).sub_(1.0)
