"""LightningDataModules: shards in, `Batch`es out, in an order that is a function of (seed, position)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from sana.data import latents as latent_cache
from sana.data.caption import Caption, PowerScore, Proportion, SoftmaxScore
from sana.data.latents import to_tensor
from sana.data.order import Order, PositionBatches
from sana.data.scene_shards import write_scene_shards
from sana.data.shards import ShardFolder
from sana.ops.random import uniform
from sana.types import Batch

CaptionChoice = PowerScore | SoftmaxScore | Proportion


class Positions(Dataset[tuple[int, int]]):
    """Maps a stream position to what one sample needs: its number, pixels or latent, and captions."""

    def __init__(self, shards: ShardFolder, order: Order, latents: np.ndarray | None) -> None:
        self.shards, self.order, self.latents = shards, order, latents

    def __getitem__(self, position: int) -> dict[str, Any]:  # type: ignore[override]
        i = self.order.sample(position)
        meta = self.shards.meta(i)
        item = {
            "position": position,
            "key": self.shards.key(i),
            "captions": _captions(meta, self.shards.key(i)),
        }
        if self.latents is None:
            item["image"] = self.shards.image(i)
        else:
            item["latent"] = self.latents[i]
        return item


def _captions(meta: dict[str, Any], key: str) -> list[Caption]:
    if meta.get("captions"):
        return [Caption(c["source"], c["text"], c.get("score")) for c in meta["captions"]]
    if "prompt" in meta:
        return [Caption("prompt", meta["prompt"])]
    raise ValueError(f"{key}: JSON has neither 'captions' nor 'prompt'")


def collate(items: list[dict[str, Any]], *, seed: int, choice: CaptionChoice) -> Batch:
    """Join samples into a `Batch`, choosing one caption each by its position."""
    index = torch.tensor([item["position"] for item in items], dtype=torch.int64)
    u = uniform(seed, index, "caption").tolist()
    caption = [choice(item["captions"], u[k]).text for k, item in enumerate(items)]
    image = latent = None
    if "image" in items[0]:
        image = to_tensor(np.stack([item["image"] for item in items]))
    else:
        latent = torch.from_numpy(np.stack([item["latent"] for item in items]))
    return Batch(image=image, latent=latent, caption=caption, index=index, key=[item["key"] for item in items])


class ShardsData(LightningDataModule):
    """Training from a folder of WebDataset shards.

    Args:
        folder: directory with ``{split}-*.tar``.
        batch_size: global batch, over all ranks and micro-batches.
        accumulate: micro-batches per update; each has ``batch_size / world / accumulate`` samples.
        caption: how one caption of several is chosen.
        cache_latents: encode every image once before training, with the recipe's `latent_encoder`, and keep the
            latents beside the shards.
        num_workers: loader processes per rank.
        validation: number of samples for validation losses, from the split "val" if there is one.
        seed: seed of the order and of caption choice.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int,
        caption: CaptionChoice,
        *,
        accumulate: int = 1,
        cache_latents: bool = False,
        num_workers: int = 0,
        validation: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed
        self.choice, self.cache_latents, self.num_workers = caption, cache_latents, num_workers
        self.validation = validation

    def prepare_data(self) -> None:
        """Check the folder on one process, and encode latents if asked."""
        if self.cache_latents:
            self._latents(ShardFolder(self.folder, "train"))

    def setup(self, stage: str) -> None:
        """Open the shards."""
        self.shards = ShardFolder(self.folder, "train")
        self.latents = self._latents(self.shards) if self.cache_latents else None

    def fingerprint(self) -> str:
        """Digest of the training shards, for the run's records."""
        return ShardFolder(self.folder, "train").fingerprint()

    def _latents(self, shards: ShardFolder) -> np.ndarray:
        recipe: Any = self.trainer.lightning_module if self.trainer is not None else None
        if not hasattr(recipe, "latent_encoder"):
            raise ValueError("data.cache_latents=true needs a recipe with an autoencoder; set it to false")
        encode, digest = recipe.latent_encoder()
        path = latent_cache.cache_path(self.folder, shards.fingerprint(), digest, "float16")
        return latent_cache.build(path, shards.image, len(shards), encode)

    def train_dataloader(self) -> DataLoader[Any]:
        """Endless loader of this rank's micro-batches, from the first sample the recipe has not consumed."""
        trainer = self.trainer
        assert trainer is not None
        world = trainer.world_size
        share = self.batch_size // world
        start = int(getattr(trainer.lightning_module, "samples_seen", 0))
        if share % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} over {world} ranks and accumulate {self.accumulate} does not divide"
            )
        batches = PositionBatches(self.batch_size, start, trainer.global_rank, world, micro=share // self.accumulate)
        return self._loader(self.shards, self.latents, batches)

    def validation_shards(self) -> ShardFolder:
        """The split "val" where it exists, else the training shards."""
        return ShardFolder(self.folder, "val" if any(self.folder.glob("val-*.tar")) else "train")

    def validation_images(self, batch: int = 256) -> Iterator[np.ndarray]:
        """All images of the validation split, uint8 (b, H, W, 3) at a time."""
        shards = self.validation_shards()
        for first in range(0, len(shards), batch):
            yield np.stack([shards.image(i) for i in range(first, min(first + batch, len(shards)))])

    def validation_batch(self) -> Batch:
        """A fixed batch for validation losses, from `validation_shards`."""
        shards = self.validation_shards()
        items = Positions(shards, Order(len(shards), self.seed), None)
        wanted = [items[p] for p in range(min(self.validation, len(shards)))]
        return collate(wanted, seed=self.seed, choice=self.choice)

    def _loader(self, shards: ShardFolder, latents: np.ndarray | None, batches: PositionBatches) -> DataLoader[Any]:
        return DataLoader(
            Positions(shards, Order(len(shards), self.seed), latents),
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=self.num_workers,
            collate_fn=partial(collate, seed=self.seed, choice=self.choice),
            persistent_workers=self.num_workers > 0,
        )


class ScenesData(ShardsData):
    """The embedded world: shards of procedural scenes, written on first use, then read like any other shards.

    Args:
        count: training images.
        held: images of the validation split.
        world_seed: seed of the generator (not of the run: two runs with different seeds share the data).
        folder, batch_size, caption, accumulate, cache_latents, num_workers, validation, seed: as in `ShardsData`.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int,
        caption: CaptionChoice,
        *,
        count: int,
        held: int = 512,
        world_seed: int = 0,
        tasks: Mapping[str, float] | None = None,
        accumulate: int = 1,
        cache_latents: bool = False,
        num_workers: int = 0,
        validation: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(
            folder,
            batch_size,
            caption,
            accumulate=accumulate,
            cache_latents=cache_latents,
            num_workers=num_workers,
            validation=validation,
            seed=seed,
        )
        self.count, self.held, self.world_seed, self.tasks = count, held, world_seed, tasks

    def prepare_data(self) -> None:
        """Write the shards that are missing, then do what any shards need."""
        self.write()
        super().prepare_data()

    def write(self) -> None:
        """Make the training and validation shards; returns at once where they exist."""
        workers = os.cpu_count() or 1
        write_scene_shards(self.folder, self.count, self.world_seed, "train", tasks=self.tasks, workers=workers)
        write_scene_shards(self.folder, self.held, self.world_seed + 1, "val", workers=workers)
