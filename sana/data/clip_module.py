"""The LightningDataModule of clips: `Clip` batches of videos, or `World` batches where every frame has a camera."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from sana.data.clips import ClipReader, ClipSample, collate_clips
from sana.data.formats.open import open_source
from sana.data.loader import CaptionChoice, MicroBatches, Slot, micro_batches
from sana.data.planner import Planner, plan
from sana.data.record import BadSample, Limits
from sana.data.source import Source
from sana.types import Bad, Clip


class Clips(Dataset[Clip]):
    """Loads micro-batches of clips.

    Args:
        readers: one per source; their samples are numbered one source after another.
        choice: rule that takes one caption of several.
        seed: of that choice and of first-frame conditioning.
        first_frame, tell_motion: see `sana.data.clips.collate_clips`.
    """

    def __init__(
        self,
        readers: Sequence[ClipReader],
        choice: CaptionChoice,
        seed: int,
        *,
        first_frame: float = 0.0,
        tell_motion: bool = False,
    ) -> None:
        self.readers, self.choice, self.seed = list(readers), choice, seed
        self.first_frame, self.tell_motion = first_frame, tell_motion
        self.starts = np.cumsum([0, *(len(reader.source) for reader in self.readers)])

    def __getitems__(self, slots: list[Slot]) -> Clip:
        """A micro-batch; in the place of a clip that cannot be read stands the next good one, at weight 0.

        Raises:
            ValueError: no clip of the batch can be read, so that there is nothing of its shape.
        """
        read: dict[int, ClipSample] = {}
        keys, bad = [], {}
        for k, slot in enumerate(slots):
            number = int(np.searchsorted(self.starts, slot.sample, "right")) - 1
            reader, i = self.readers[number], slot.sample - int(self.starts[number])
            keys.append(reader.source.key(i))
            try:
                sample = reader.read(i, slot.position)
                self.choice(sample.captions, 0.0)
                read[k] = sample
            except BadSample as error:
                bad[k] = Bad(error.shard, error.key, error.reason)
            except ValueError as error:
                refused = reader.source.bad_sample(i, f"no caption: {error}")
                bad[k] = Bad(refused.shard, refused.key, refused.reason)
        if not read:
            shard, key, reason = bad[0]
            raise ValueError(f"none of {len(slots)} clips can be read; the first: {shard}/{key}: {reason}")
        shown = [next(j for j in (*range(k, len(slots)), *range(k)) if j in read) for k in range(len(slots))]
        samples = [replace(read[j], position=slots[k].position) for k, j in enumerate(shown)]
        batch = collate_clips(
            samples, self.choice, seed=self.seed, first_frame=self.first_frame, tell_motion=self.tell_motion
        )
        batch.key = keys
        batch.weight = torch.tensor([float(k in read) for k in range(len(slots))])
        batch.bad = [bad[k] for k in sorted(bad)]
        batch.source = [source if k in read else "" for k, source in enumerate(batch.source)]
        return batch


class ClipsData(LightningDataModule):
    """Training from shards of clips: KEY.mp4 with KEY.json, and for worlds KEY.camera.npz.

    The order, its resumption and what happens to clips that cannot be read are as in `sana.data.module.ShardsData`.

    Args:
        folder: place of the data, or several.
        batch_size: global batch, over all ranks and micro-batches.
        caption: how one caption of several is chosen.
        frames, fps, camera: of every clip, see `sana.data.clips.ClipReader`; shorter clips are reported as bad.
        size: (height, width) of the frames in pixels; None: they have one size already.
        least_motion, most_motion: bounds of the motion score in the index; clips without one take no part if set.
        first_frame: probability that a clip trains image-to-video.
        tell_motion: append the motion score to captions.
        micro_batch: samples that one process has in the network at a time; None: its whole share of the batch.
        limits: what a sample may have at most; None: those of `Limits`.
        cache: folder that keeps whole shards of data that lie at an address; None: only byte ranges are fetched.
        num_workers: loader processes per rank.
        max_bad_fraction: the run stops when a greater part of its clips cannot be read.
        seed: of the order and of every choice.

    Attributes:
        bad, reported: as in `ShardsData`.
    """

    def __init__(
        self,
        folder: str | list[str],
        batch_size: int,
        caption: CaptionChoice,
        *,
        frames: int,
        fps: float | None = None,
        size: tuple[int, int] | None = None,
        camera: bool = False,
        least_motion: float | None = None,
        most_motion: float | None = None,
        first_frame: float = 0.0,
        tell_motion: bool = False,
        micro_batch: int | None = None,
        limits: Limits | None = None,
        cache: str | None = None,
        num_workers: int = 0,
        max_bad_fraction: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.folders = [folder] if isinstance(folder, str) else list(folder)
        if not self.folders:
            raise ValueError("data.folder: at least one place is needed")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is in [0, 1], got {max_bad_fraction}")
        self.batch_size, self.choice, self.micro_batch, self.seed = batch_size, caption, micro_batch, seed
        self.frames, self.fps, self.camera = frames, fps, camera
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.motion = (least_motion, most_motion)
        self.first_frame, self.tell_motion = first_frame, tell_motion
        self.limits, self.cache, self.num_workers = limits or Limits(), cache, num_workers
        self.max_bad_fraction, self.bad, self.reported = max_bad_fraction, 0, False
        self._sources: list[Source] = []

    def sources(self) -> list[Source]:
        """The sources, opened once."""
        if not self._sources:
            self._sources = [open_source(f, cache=self.cache, **asdict(self.limits)) for f in self.folders]
        return self._sources

    def planner(self) -> Planner:
        """The global batches of this run.

        Raises:
            ValueError: no clip is left, or a bound on motion that no clip tells.
        """
        numbers, start = [], 0
        for source in self.sources():
            numbers.append(start + self._moving(source))
            start += len(source)
        if not sum(map(len, numbers)):
            raise ValueError("data.least_motion, data.most_motion: no clip is left to train on")
        return plan(numbers, None, self.batch_size, self.seed)

    def _moving(self, source: Source) -> np.ndarray:
        least, most = self.motion
        if least is None and most is None:
            return np.arange(len(source))
        if "motion" not in source.index.scores:
            raise ValueError("data.least_motion, data.most_motion: no clip has a score 'motion'")
        motion = source.index.column("score.motion")
        low, high = -np.inf if least is None else least, np.inf if most is None else most
        return np.flatnonzero((motion >= low) & (motion <= high))

    def clips(self) -> Clips:
        """What loads the clips."""
        readers = [
            ClipReader(source, self.frames, self.fps, self.size, self.camera, seed=self.seed)
            for source in self.sources()
        ]
        return Clips(readers, self.choice, self.seed, first_frame=self.first_frame, tell_motion=self.tell_motion)

    def prepare_data(self) -> None:
        """Index the data on one process."""
        self.sources()

    def fingerprint(self) -> str:
        """Digest of the training data, for the run's records."""
        return hashlib.sha256("\n".join(source.fingerprint() for source in self.sources()).encode()).hexdigest()

    def accumulation(self, world: int) -> int:
        """Micro-batches per update of each of `world` processes.

        Raises:
            ValueError: the global batch does not divide.
        """
        return micro_batches(self.batch_size, world, self.micro_batch)

    def train_dataloader(self) -> DataLoader[Any]:
        """Endless loader of this rank's micro-batches, from the first clip the recipe has not consumed."""
        trainer = self.trainer
        assert trainer is not None
        world = trainer.world_size
        batches = MicroBatches(
            self.planner(),
            [self.size or (0, 0)],
            int(getattr(trainer.lightning_module, "samples_seen", 0)),
            trainer.global_rank,
            world,
            micro=self.batch_size // world // self.accumulation(world),
        )
        return DataLoader(
            self.clips(),
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=self.num_workers,
            collate_fn=_whole,  # type: ignore[arg-type]
            persistent_workers=self.num_workers > 0,
        )

    def on_after_batch_transfer(self, batch: Clip, dataloader_idx: int) -> Clip:
        """The batch as it is.

        Raises:
            ValueError: a bad clip, and nothing that would report it.
        """
        if batch.bad and not self.reported:
            shard, key, reason = batch.bad[0]
            raise ValueError(f"{shard}/{key}: {reason}; to go on without bad samples add callback.bad_samples")
        return batch


def _whole(batch: Clip) -> Clip:
    """What a worker gives is a batch already."""
    return batch
