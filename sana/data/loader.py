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

from sana.data.cache import LatentCache, TextCache
from sana.data.cache_write import mirrored_once
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
        latents: cached ones of all sources, to give instead of images.
        text: cached features of the captions of all sources, to give with them.
        flip: "none"; "once": half of the images are mirrored, always the same ones; "both": anew at each position.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        choice: CaptionChoice,
        seed: int,
        *,
        lanczos: bool = False,
        latents: LatentCache | None = None,
        text: TextCache | None = None,
        flip: str = "none",
    ) -> None:
        self.sources, self.choice, self.seed = list(sources), choice, seed
        self.lanczos, self.latents, self.text, self.flip = lanczos, latents, text, flip
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

    def __getitems__(self, slots: list[Slot]) -> Batch:
        """A micro-batch; all slots have one size. It is whole whatever the samples are like."""
        index = torch.tensor([slot.position for slot in slots], dtype=torch.int64)
        draws = uniform(self.seed, index, "caption").tolist()
        captions, keys, bad = [], [], {}
        for k, (slot, u) in enumerate(zip(slots, draws, strict=True)):
            source, i = self.locate(slot.sample)
            caption = Caption("", "")
            try:
                caption = self.caption(source.record(i), u)
            except BadSample as error:
                bad[k] = Bad(error.shard, error.key, error.reason)
            captions.append(caption)
            keys.append(source.key(i))
        values = self._images(slots, index, bad) if self.latents is None else self._latents(slots, index, bad)
        good = [k for k in range(len(slots)) if k not in bad]
        places = [k if k not in bad else _next(good, k) for k in range(len(slots))]
        if bad and good:
            values = values[torch.tensor(places)]
        texts = ["" if k is None else captions[k].text for k in places]
        text, mask = (None, None) if self.text is None else self._features(slots, places, texts)
        return Batch(
            image=values if self.latents is None else None,
            latent=None if self.latents is None else values,
            caption=texts,
            index=index,
            key=keys,
            weight=torch.tensor([float(k not in bad) for k in range(len(slots))]),
            bad=[bad[k] for k in sorted(bad)],
            source=["" if k in bad else caption.source for k, caption in enumerate(captions)],
            text=text,
            text_mask=mask,
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

    def _images(self, slots: list[Slot], index: Tensor, bad: dict[int, Bad]) -> Tensor:
        """uint8 (b, 3, h, w); zeros for samples that are bad, which are added to `bad`."""
        values = np.zeros((len(slots), slots[0].height, slots[0].width, 3), np.uint8)
        mirrored = self._mirrored(slots, index)
        for k, slot in enumerate(slots):
            if k in bad:
                continue
            try:
                pixels = self.pixels(slot)
                values[k] = pixels[:, ::-1] if mirrored[k] else pixels
            except BadSample as error:
                bad[k] = Bad(error.shard, error.key, error.reason)
        return torch.from_numpy(values).permute(0, 3, 1, 2)

    def _latents(self, slots: list[Slot], index: Tensor, bad: dict[int, Bad]) -> Tensor:
        """(b, c, h, w) from the cache; as `_images`."""
        assert self.latents is not None
        flipped = self._mirrored(slots, index) if self.latents.both else None
        size = (slots[0].height, slots[0].width)
        values, reasons = self.latents.read([slot.sample for slot in slots], flipped, size=size)
        for k, reason in reasons.items():
            if k not in bad:
                source, i = self.locate(slots[k].sample)
                record = source.record(i)
                bad[k] = Bad(record.shard, record.key, reason)
        return values

    def _mirrored(self, slots: list[Slot], index: Tensor) -> list[bool]:
        """Which images are mirrored: a coin per position, or one per sample of a source."""
        if self.flip == "both":
            return (uniform(self.seed, index, "flip") < 0.5).tolist()
        if self.flip == "once":
            return mirrored_once([self.locate(slot.sample)[1] for slot in slots])
        return [False] * len(slots)

    def _features(self, slots: list[Slot], places: list[int | None], texts: list[str]) -> tuple[Tensor, Tensor]:
        """(b, l, c) cached features of the chosen captions, and their mask."""
        assert self.text is not None
        there = [place for place in places if place is not None]
        if not there:
            return torch.zeros(len(slots), 1, self.text.channels, dtype=self.text.dtype), _first_only(len(slots), 1)
        text, mask, reasons = self.text.read([slots[k].sample for k in there], texts)
        # Nothing but a cache that was damaged since it was made: a sample without features has no captions either.
        for k, reason in reasons.items():
            raise ValueError(f"{slots[there[k]].sample}: {reason}; make the cache of text anew")
        return text, mask


def _first_only(b: int, l: int) -> Tensor:
    """A mask under which softmax is defined, for samples that count nothing."""
    mask = torch.zeros(b, l, dtype=torch.bool)
    mask[:, 0] = True
    return mask


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
