"""LightningDataModules: sources in, `Batch`es out, in an order that is a function of (seed, position)."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from sana.data.bucket import Buckets, square
from sana.data.cache import LatentCache, TextCache
from sana.data.cache_folder import DTYPES, FLIPS
from sana.data.caching import Encoding, Job, cache_parent, latent_jobs, text_jobs
from sana.data.caption import PowerScore, Proportion, SoftmaxScore
from sana.data.formats.open import open_source
from sana.data.loader import MicroBatches, Samples, Slot, loader, micro_batches, to_float
from sana.data.planner import Planner, plan
from sana.data.record import BadSample, Limits
from sana.data.scene_shards import write_scene_shards
from sana.data.source import Source
from sana.data.stream import Cell, Filter, Stream
from sana.scenes import TASKS
from sana.types import Batch


class ShardsData(LightningDataModule):
    """Training from images with captions: shards, or folders and lists of images; see `sana.data.formats`.

    Args:
        folder: place of the data, or several places that are mixed.
        batch_size: global batch, over all ranks and micro-batches.
        size: pixels of a side; images are scaled to cover the square and cut. None: they have one size already.
        weights: share of the samples that comes from each folder, in any unit; None: each sample once per epoch.
        buckets: sizes by aspect ratio to bring images to instead of one square.
        filter: which samples take part; None: all.
        resampled: draw with replacement instead of each sample once per epoch.
        limits: what a sample may have at most, before it is read; None: those of `Limits`.
        cache: folder that keeps what was fetched or computed: whole shards of data that lie at an address, latents and
            features of captions. None: only byte ranges are fetched; what is computed lies in "cache" beside the data.
        caption: how one caption of several is chosen.
        micro_batch: samples that one process has in the network at a time; gradients of as many micro-batches are added
            up as the global batch takes. None: its whole share at once.
        cache_latents: train on latents that are kept in shards beside the images (`sana.data.cache`): true encodes
            what is not there before training; "required" refuses to train unless scripts/precompute.py made them.
        cache_text: the same for features of the captions.
        cache_dtype: of both: "float16", "bfloat16" or "float32".
        flip: mirror images: "none"; "once": half of them, always the same; "both": anew at each position.
        num_workers: loader processes per rank.
        validation: number of samples for validation losses, from the split "val" if there is one.
        max_bad_fraction: the run stops when a greater part of its samples cannot be read.
        inspect: only look at the data (`sana.data.inspect`), do not train.
        seed: seed of the order and of caption choice.

    Attributes:
        bad: samples that could not be read so far, counted by whoever reports them.
        reported: whether somebody reports them; if nobody does, the first one is an error.
    """

    def __init__(
        self,
        folder: str | list[str],
        batch_size: int,
        caption: PowerScore | SoftmaxScore | Proportion,
        *,
        size: int | None = None,
        weights: list[float] | None = None,
        buckets: Buckets | None = None,
        filter: Filter | None = None,
        resampled: bool = False,
        limits: Limits | None = None,
        cache: str | None = None,
        micro_batch: int | None = None,
        cache_latents: bool | str = False,
        cache_text: bool | str = False,
        cache_dtype: str = "float16",
        flip: str = "none",
        num_workers: int = 0,
        validation: int = 64,
        max_bad_fraction: float = 0.01,
        inspect: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.folders = [folder] if isinstance(folder, str) else list(folder)
        if not self.folders:
            raise ValueError("data.folder: at least one place is needed")
        if weights is not None and len(weights) != len(self.folders):
            raise ValueError(f"data.weights: {len(weights)} given for {len(self.folders)} folders")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is in [0, 1], got {max_bad_fraction}")
        for name, value, allowed in (
            ("cache_latents", cache_latents, (True, False, "required")),
            ("cache_text", cache_text, (True, False, "required")),
            ("cache_dtype", cache_dtype, tuple(DTYPES)),
            ("flip", flip, FLIPS),
        ):
            if value not in allowed:
                raise ValueError(f"data.{name} is {value!r}, expected one of {', '.join(map(str, allowed))}")
        self.batch_size, self.micro_batch, self.seed = batch_size, micro_batch, seed
        self.size, self.weights, self.buckets = size, weights, buckets
        self.filter, self.resampled = filter or Filter(), resampled
        self.choice, self.num_workers = caption, num_workers
        self.cached = {"latents": cache_latents, "text": cache_text}
        self.cache_dtype, self.flip = cache_dtype, flip
        self.limits, self.cache = limits or Limits(), cache
        self.validation, self.max_bad_fraction, self.inspect = validation, max_bad_fraction, inspect
        self.bad, self.reported = 0, False
        self._sources: dict[str, list[Source]] = {}

    def sources(self, split: str = "train") -> list[Source]:
        """The sources of a split, opened once; for "val" those that have it, else all of "train".

        Raises:
            FileNotFoundError: nothing to train on.
        """
        if split not in self._sources:
            found = []
            for folder in self.folders:
                try:
                    found.append(open_source(folder, split, cache=self.cache, **asdict(self.limits)))
                except FileNotFoundError:
                    if split == "train":
                        raise
            self._sources[split] = found or self.sources()
        return self._sources[split]

    def table(self, sources: Sequence[Source]) -> Buckets:
        """The sizes of batches.

        Raises:
            ValueError: `size` is None and the images have several sizes.
        """
        if self.buckets is not None:
            return self.buckets
        if self.size is not None:
            return square(self.size)
        columns = [[source.index.column(name) for source in sources] for name in ("height", "width")]
        sizes = {(int(h), int(w)) for h, w in np.unique(np.stack([np.concatenate(c) for c in columns], 1), axis=0)}
        if len(sizes) != 1:
            raise ValueError(f"data.size: the images have {len(sizes)} sizes; give the one to bring them to")
        return Buckets(list(sizes), [1.0])

    def planner(self) -> Planner:
        """The global batches of this run."""
        sources, numbers, buckets = self.sources(), [], []
        table = self.table(sources)
        starts = np.cumsum([0, *(len(source) for source in sources)])
        dtype = np.uint32 if starts[-1] < 2**32 else np.uint64
        for source, start in zip(sources, starts, strict=False):
            kept = self.filter.kept(source.index)
            kept = np.arange(len(source)) if kept is None else kept
            numbers.append((kept + start).astype(dtype))
            if len(table) > 1:
                height, width = (np.maximum(source.index.column(name)[kept], 1) for name in ("height", "width"))
                buckets.append(table.nearest(height, width))
        if not sum(map(len, numbers)):
            raise ValueError("data.filter: no sample is left to train on")
        return plan(
            numbers, buckets or None, self.batch_size, self.seed, weights=self.weights, resampled=self.resampled
        )

    def samples(self, split: str = "train") -> Samples:
        """What loads the images of a split, as they are stored but for their size."""
        sources = self.sources(split)
        return Samples(sources, self.choice, self.seed, lanczos=self.table(sources).lanczos)

    def prepare_data(self) -> None:
        """Index the data on one process, and encode latents if asked."""
        self.sources("val")
        self.sources()
        self._caches()

    def fingerprint(self) -> str:
        """Digest of the training data, for the run's records."""
        digests = [source.fingerprint() for source in self.sources()]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def accumulation(self, world: int) -> int:
        """Micro-batches per update of each of `world` processes.

        Raises:
            ValueError: the global batch does not divide.
        """
        return micro_batches(self.batch_size, world, self.micro_batch)

    def train_dataloader(self) -> DataLoader[Any]:
        """Endless loader of this rank's micro-batches, from the first sample the recipe has not consumed."""
        trainer = self.trainer
        assert trainer is not None
        world = trainer.world_size
        micro = self.batch_size // world // self.accumulation(world)
        recipe, planner = trainer.lightning_module, self.planner()
        sizes = [self.table(self.sources()).sizes[bucket] for bucket in planner.streams]
        _check_multiples(sizes, recipe)
        seen = int(getattr(recipe, "samples_seen", 0))
        if planner.start(seen) != seen:
            warnings.warn(
                f"{seen} samples were seen, which is within a batch of {self.batch_size}: the batch size has changed, "
                "so with buckets some samples of this epoch come again and others do not",
                stacklevel=2,
            )
        batches = MicroBatches(
            planner,
            self.table(self.sources()).sizes,
            seen,
            trainer.global_rank,
            world,
            micro=micro,
        )
        samples = self.samples()
        samples.latents, samples.text, samples.flip = *self._caches(), self.flip
        return loader(samples, batches, self.num_workers)

    def batches(self) -> Iterator[Batch]:
        """The global batches of a new run, endlessly, as the loader gives them (pixels as uint8)."""
        samples = self.samples()
        for slots in MicroBatches(self.planner(), self.table(samples.sources).sizes):
            yield samples.__getitems__(slots)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Pixels become numbers in [-1, 1], on the device.

        Raises:
            ValueError: a bad sample, and nothing that would report it.
        """
        if batch.bad and not self.reported:
            shard, key, reason = batch.bad[0]
            raise ValueError(f"{shard}/{key}: {reason}; to go on without bad samples add callback.bad_samples")
        return _in_range(batch)

    def validation_images(self, batch: int = 256) -> Iterator[np.ndarray]:
        """All readable images of the validation split, uint8 (b, H, W, 3) at a time, at one size."""
        samples, images = self.samples("val"), []
        for slot in self.slots(samples, range(len(samples))):
            try:
                images.append(samples.pixels(slot))
            except BadSample:
                continue
            if len(images) == batch:
                yield np.stack(images)
                images = []
        if images:
            yield np.stack(images)

    def validation_batch(self) -> Batch:
        """A fixed batch for validation losses: the first good samples of the validation split in seeded order."""
        samples = self.samples("val")
        order = Stream([Cell(np.arange(len(samples)), Fraction(len(samples)))], self.seed).take(0, len(samples))
        parts = []
        for slot in self.slots(samples, order.tolist()):
            part = samples.__getitems__([slot])
            if not part.bad:
                parts.append(part)
            if len(parts) == self.validation:
                break
        if not parts:
            raise ValueError("no sample of the validation split can be read")
        return _in_range(
            Batch(
                image=torch.cat([part.image for part in parts]),
                latent=None,
                caption=[part.caption[0] for part in parts],
                index=torch.cat([part.index for part in parts]),
                key=[part.key[0] for part in parts],
            )
        )

    def slots(self, samples: Samples, order: Sequence[int]) -> list[Slot]:
        """Positions 0, 1, ... of a pass over samples, all of the size that is nearest to a square."""
        table = self.table(samples.sources)
        height, width = table.sizes[int(table.nearest(np.ones(1), np.ones(1))[0])]
        return [Slot(position, sample, height, width) for position, sample in enumerate(order)]

    def cache_jobs(self, kind: str, encoding: Encoding) -> list[Job]:
        """The caches of every source that this run reads, complete or not.

        Args:
            kind: "latents" or "text".
            encoding: how they are made.
        """
        samples = self.samples()
        parents = [cache_parent(folder, self.cache) for folder in self.folders]
        if kind == "text":
            return text_jobs(samples, parents, encoding, self.cache_dtype)
        return latent_jobs(samples, self.table(samples.sources), parents, encoding, self.cache_dtype, self.flip)

    def _caches(self) -> tuple[LatentCache | None, TextCache | None]:
        """The caches that this run reads, made first where that is allowed."""
        found: dict[str, Any] = {"latents": None, "text": None}
        for kind, wanted in self.cached.items():
            if wanted is False:
                continue
            recipe: Any = self.trainer.lightning_module if self.trainer is not None else None
            if not hasattr(recipe, "encodings"):
                raise ValueError(f"data.cache_{kind}={wanted} needs a recipe with frozen encoders; set it to false")
            jobs = self.cache_jobs(kind, recipe.encodings()[kind])
            folders = [job.found() if wanted == "required" else job.complete() for job in jobs]
            found[kind] = LatentCache(*folders) if kind == "latents" else TextCache(*folders)
        return found["latents"], found["text"]


def _check_multiples(sizes: Sequence[tuple[int, int]], recipe: Any) -> None:
    """Refuse sizes that the recipe's autoencoder and network would cut.

    Raises:
        ValueError: with the first such size.
    """
    frozen = getattr(recipe, "frozen", ())
    autoencoder = frozen.autoencoder if "autoencoder" in frozen else None  # type: ignore[union-attr]
    step = int(getattr(autoencoder, "ratio", 1)) * int(getattr(getattr(recipe, "network", None), "patch", 1))
    for height, width in sizes:
        if height % step or width % step:
            raise ValueError(f"data: images of {height}x{width} pixels, expected sides that are multiples of {step}")


def _in_range(batch: Batch) -> Batch:
    """A batch whose pixels are floats in [-1, 1]."""
    if batch.image is None or batch.image.is_floating_point():
        return batch
    return replace(batch, image=to_float(batch.image))


class ScenesData(ShardsData):
    """The embedded world: shards of procedural scenes, written on first use, then read like any other shards.

    Args:
        folder: where the shards lie or will lie.
        count: training images.
        held: images of the validation split.
        world_seed: seed of the generator (not of the run: two runs with different seeds share the data).
        tasks: weights of the tasks among the training images; those that have one make up the validation split, all
            equally often. None: all six, equally often.
        batch_size, caption, size, micro_batch, cache_latents, cache_text, num_workers, validation, max_bad_fraction,
            inspect, seed: as in `ShardsData`.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int,
        caption: PowerScore | SoftmaxScore | Proportion,
        *,
        count: int,
        held: int = 512,
        world_seed: int = 0,
        tasks: Mapping[str, float] | None = None,
        size: int | None = None,
        micro_batch: int | None = None,
        cache_latents: bool | str = False,
        cache_text: bool | str = False,
        num_workers: int = 0,
        validation: int = 64,
        max_bad_fraction: float = 0.01,
        inspect: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            folder,
            batch_size,
            caption,
            size=size,
            micro_batch=micro_batch,
            cache_latents=cache_latents,
            cache_text=cache_text,
            num_workers=num_workers,
            validation=validation,
            max_bad_fraction=max_bad_fraction,
            inspect=inspect,
            seed=seed,
        )
        self.count, self.held, self.world_seed, self.tasks = count, held, world_seed, tasks

    def prepare_data(self) -> None:
        """Write the shards that are missing, then do what any shards need."""
        self.write()
        super().prepare_data()

    def write(self) -> None:
        """Make the training and validation shards; returns at once where they exist.

        Validation has the tasks that are trained, all equally often, whatever their weights.
        """
        workers, trained = os.cpu_count() or 1, [t for t in TASKS if self.tasks is None or self.tasks.get(t)]
        alike = None if len(trained) == len(TASKS) else dict.fromkeys(trained, 1.0)
        write_scene_shards(self.folders[0], self.count, self.world_seed, "train", tasks=self.tasks, workers=workers)
        write_scene_shards(self.folders[0], self.held, self.world_seed + 1, "val", tasks=alike, workers=workers)
