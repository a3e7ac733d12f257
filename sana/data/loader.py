"""From planned batches to `Batch`es: who loads what, and what happens to samples that cannot be loaded.

Rank r of R takes its contiguous share of every global batch and cuts it into micro-batches; a worker loads whole
micro-batches. Every sample carries its position, so nothing in a batch depends on ranks, workers or their number.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sana.data.cache import LatentCache, TextCache
from sana.data.cache_write import mirrored_once
from sana.data.caption import Caption
from sana.data.planner import Planner
from sana.data.record import BadSample
from sana.data.shared import Buffers, Sent
from sana.data.transform import resize_and_crop
from sana.ops.random import uniform
from sana.types import Bad, Batch

CaptionChoice = Callable[[Sequence[Caption], float], Caption]
Places = list[tuple[Any, int]]
"""Source and number there of every sample of a batch."""


class Slot(NamedTuple):
    """One place in a batch: position in the stream, number of the sample over all sources, size in pixels."""

    position: int
    sample: int
    height: int
    width: int


def micro_batches(batch: int, world: int, micro: int | None) -> int:
    """Micro-batches per update of each process.

    Args:
        batch: global batch.
        world: processes.
        micro: samples of one micro-batch; None: a process has its whole share at a time.

    Raises:
        ValueError: the global batch does not divide.
    """
    share, rest = divmod(batch, world)
    size = micro or share
    if rest or size < 1 or share % size:
        raise ValueError(
            f"data.batch_size: {batch} samples over {world} processes do not divide into micro-batches of "
            f"{size or 'any size'}"
        )
    return share // size


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


_DRAWN = 1024
"""Positions whose uniform numbers are drawn together."""


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
        self._drawn: tuple[int, list[float]] = (-1, [])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, samples: Sequence[int]) -> list[tuple[Any, int]]:
        """The source of each sample, and its number there."""
        if len(self.sources) == 1:
            return [(self.sources[0], sample) for sample in samples]
        numbers = np.asarray(samples, np.int64)
        which = np.searchsorted(self.starts, numbers, "right") - 1
        inside = (numbers - self.starts[which]).tolist()
        return [(self.sources[k], i) for k, i in zip(which.tolist(), inside, strict=True)]

    def pixels(self, slot: Slot) -> np.ndarray:
        """The image of a slot at its size, uint8 (height, width, 3).

        Raises:
            BadSample: it cannot be read.
        """
        return self._pixels(*self.locate([slot.sample])[0], slot)

    def _pixels(self, source: Any, i: int, slot: Slot) -> np.ndarray:
        pixels = source.image(i, size=(slot.height, slot.width))
        return resize_and_crop(pixels, slot.height, slot.width, lanczos=self.lanczos)

    def __getitems__(self, slots: list[Slot], room: Tensor | None = None) -> Batch:
        """A micro-batch; all slots have one size. It is whole whatever the samples are like.

        Args:
            slots: what to load.
            room: bytes in which its images or latents are to lie, where they fit.
        """
        index = torch.tensor([slot.position for slot in slots], dtype=torch.int64)
        draws = self._draws(slots, index)
        places, captions, bad = self.locate([slot.sample for slot in slots]), [], {}
        for k, ((source, i), u) in enumerate(zip(places, draws, strict=True)):
            caption = Caption("", "")
            try:
                caption = self.caption(source, i, u)
            except BadSample as error:
                bad[k] = Bad(error.shard, error.key, error.reason)
            captions.append(caption)
        load = self._images if self.latents is None else self._latents
        values = load(slots, places, index, bad, room)
        good = [k for k in range(len(slots)) if k not in bad]
        shown = [k if k not in bad else _next(good, k) for k in range(len(slots))]
        if good:
            for k in bad:
                values[k] = values[shown[k]]
        texts = ["" if k is None else captions[k].text for k in shown]
        text, mask = (None, None) if self.text is None else self._features(slots, shown, texts)
        return Batch(
            image=values if self.latents is None else None,
            latent=None if self.latents is None else values,
            caption=texts,
            index=index,
            key=[source.key(i) for source, i in places],
            weight=torch.tensor([float(k not in bad) for k in range(len(slots))]),
            bad=[bad[k] for k in sorted(bad)],
            source=["" if k in bad else caption.source for k, caption in enumerate(captions)],
            text=text,
            text_mask=mask,
        )

    def _draws(self, slots: list[Slot], index: Tensor) -> list[float]:
        """Uniform numbers for the choice of captions. They are drawn for many positions at a time: the next micro-batch
        continues this one, and drawing takes the same time for a thousand numbers as for ten."""
        first, last = slots[0].position, slots[-1].position
        block = first // _DRAWN
        if last // _DRAWN != block or [slot.position for slot in slots] != list(range(first, first + len(slots))):
            return uniform(self.seed, index, "caption").tolist()
        if self._drawn[0] != block:
            positions = torch.arange(block * _DRAWN, (block + 1) * _DRAWN)
            self._drawn = block, uniform(self.seed, positions, "caption").tolist()
        return self._drawn[1][first - block * _DRAWN : last + 1 - block * _DRAWN]

    def caption(self, source: Any, i: int, u: float) -> Caption:
        """The caption of sample i of a source that u selects.

        Raises:
            BadSample: the rule finds none among its captions; or, where images are read, its JSON has changed.
        """
        if self.latents is None:
            source.check(i, "meta")
        captions = source.captions(i)
        try:
            return self.choice(captions, u)
        except ValueError as error:
            raise source.bad_sample(i, f"no caption: {error}") from None

    def _images(
        self, slots: list[Slot], places: Places, index: Tensor, bad: dict[int, Bad], room: Tensor | None
    ) -> Tensor:
        """uint8 (b, 3, h, w); zeros for samples that are bad, which are added to `bad`."""
        shape = (len(slots), slots[0].height, slots[0].width, 3)
        need = math.prod(shape)
        if room is None or need > room.numel():
            room = torch.empty(need, dtype=torch.uint8)
        values = room[:need].view(shape)
        rows, mirrored = values.numpy(), self._mirrored(places, index)
        for k, slot in enumerate(slots):
            if k not in bad:
                try:
                    pixels = self._pixels(*places[k], slot)
                    rows[k] = pixels[:, ::-1] if mirrored[k] else pixels
                except BadSample as error:
                    bad[k] = Bad(error.shard, error.key, error.reason)
            if k in bad:
                rows[k] = 0
        return values.permute(0, 3, 1, 2)

    def _latents(
        self, slots: list[Slot], places: Places, index: Tensor, bad: dict[int, Bad], room: Tensor | None
    ) -> Tensor:
        """(b, c, h, w) from the cache; as `_images`."""
        assert self.latents is not None
        flipped = self._mirrored(places, index) if self.latents.both else None
        size = (slots[0].height, slots[0].width)
        values, reasons = self.latents.read([slot.sample for slot in slots], flipped, size=size, room=room)
        for k, reason in reasons.items():
            if k not in bad:
                source, i = places[k]
                error = source.bad_sample(i, reason)
                bad[k] = Bad(error.shard, error.key, error.reason)
        return values

    def _mirrored(self, places: Places, index: Tensor) -> list[bool]:
        """Which images are mirrored: a coin per position, or one per sample of a source."""
        if self.flip == "both":
            return (uniform(self.seed, index, "flip") < 0.5).tolist()
        if self.flip == "once":
            return mirrored_once([i for _, i in places])
        return [False] * len(places)

    def _features(self, slots: list[Slot], shown: list[int | None], texts: list[str]) -> tuple[Tensor, Tensor]:
        """(b, l, c) cached features of the chosen captions, and their mask."""
        assert self.text is not None
        there = [place for place in shown if place is not None]
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


class _Task(list[Slot]):
    """Slots of a micro-batch, and the number of the buffer it is to lie in."""

    buffer: int | None = None


class _Tasks:
    """Batch sampler: micro-batches with a free buffer each, where there is one."""

    def __init__(self, batches: Iterable[list[Slot]], buffers: Buffers) -> None:
        self.batches, self.buffers = batches, buffers

    def __iter__(self) -> Iterator[_Task]:
        for slots in self.batches:
            task = _Task(slots)
            task.buffer = self.buffers.take()
            yield task


class _Loading(Dataset[Batch]):
    """Samples that are loaded into buffers."""

    def __init__(self, samples: Samples, buffers: Buffers) -> None:
        self.samples, self.buffers = samples, buffers

    def __getitems__(self, task: _Task) -> Batch | Sent:
        if task.buffer is None:
            return self.samples.__getitems__(task)
        away = get_worker_info() is not None
        room = self.buffers.room(task.buffer) if away else self.buffers.lend(task.buffer)
        batch = self.samples.__getitems__(task, room)
        return Sent(self.buffers, task.buffer, batch, "image" if batch.latent is None else "latent") if away else batch


_AHEAD, _AHEAD_BYTES = (2, 8), 64 << 20
"""Micro-batches that each worker prepares in advance: as many as fit into so many bytes, within bounds. Small ones are
ready faster than processes wake each other."""
_HELD = 3
"""Micro-batches that the trainer has at a time: the one it works on, the next one, and one to spare."""


_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl.h."""


def loader(samples: Samples, batches: MicroBatches, workers: int = 0) -> DataLoader[Any]:
    """Endless loader of the micro-batches of one rank, images as uint8.

    Args:
        samples: what is loaded.
        batches: in which order.
        workers: processes that load; 0 loads in this one.
    """
    largest = max(3 * h * w for h, w in batches.sizes) if samples.latents is None else samples.latents.largest
    size = max(batches.micro * largest, 1)
    ahead = min(max(_AHEAD_BYTES // size, _AHEAD[0]), _AHEAD[1])
    buffers = Buffers(_HELD + ahead * workers, size)
    return DataLoader(
        _Loading(samples, buffers),
        batch_sampler=_Tasks(batches, buffers),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_whole,  # type: ignore[arg-type]
        persistent_workers=workers > 0,
        prefetch_factor=ahead if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_end_with_trainer,
    )


def _end_with_trainer(worker: int) -> None:
    """A worker whose trainer was killed would wait for ever to hand over a batch that is larger than a pipe, and hold
    memory and whatever the trainer's output went to. On Linux the kernel ends it too."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        trainer = multiprocessing.parent_process()
        direct = multiprocessing.get_start_method() != "forkserver"
        if direct and trainer is not None and os.getppid() != trainer.pid:
            os._exit(1)  # it was killed before the kernel was asked


def _whole(batch: Batch) -> Batch:
    """What a worker gives is a batch already."""
    return batch


def to_float(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float in [-1, 1], of the same shape."""
    return pixels.float().div_(127.5).sub_(1.0)
