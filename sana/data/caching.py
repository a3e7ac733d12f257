"""What a run's data have to have cached, and in which folders: the joint of sources, sizes and encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from sana.data.bucket import Buckets
from sana.data.cache_folder import CacheFolder, CacheKey, find_cache
from sana.data.cache_write import ShardSamples, shards_of, write_latents, write_text
from sana.data.loader import Samples, Slot


class Encoding(NamedTuple):
    """A frozen encoder, as a cache needs it.

    Attributes:
        encode: images (b, 3, H, W) in [-1, 1] -> latents (b, c, h, w), or captions -> features (l, c) of each.
        model: its name.
        weights: digest of its structure and weights.
        template: what stands around captions, and where they are cut.
    """

    encode: Callable[[Any], Any]
    model: str
    weights: str
    template: str = ""


@dataclass(frozen=True)
class Job:
    """One source's cache of one kind, complete or not.

    Attributes:
        folder: where it lies.
        shards: all of its shards.
        write: makes one of them, unless it is there; returns the number of samples encoded.
    """

    folder: CacheFolder
    shards: tuple[ShardSamples, ...]
    write: Callable[[ShardSamples], int]

    def missing(self) -> list[ShardSamples]:
        """Shards that are not there yet."""
        done = set(self.folder.done)
        return [shard for shard in self.shards if shard.name not in done]

    def complete(self) -> CacheFolder:
        """Write what is missing, here and now, with a progress bar."""
        missing = self.missing()
        if missing:
            self.folder.create()
            for shard in track(missing, f"caching {self.folder.key.kind}", console=Console(stderr=True)):
                self.write(shard)
        return self.folder

    def found(self) -> CacheFolder:
        """The folder, which has to be complete: see `find_cache`."""
        return find_cache(self.folder.path.parent, self.folder.key)


def cache_parent(data: str, cache: str | None) -> Path:
    """The folder that holds the caches of a place of data: "cache" beside it where none is given.

    Raises:
        ValueError: none is given, and the data lie at an address.
    """
    if cache is not None:
        return Path(cache)
    if "://" in data:
        raise ValueError(f"data.cache: a folder is needed to keep latents or features of {data}")
    path = Path(data)
    return (path if path.is_dir() else path.parent) / "cache"


def latent_jobs(
    samples: Samples, table: Buckets, parents: Sequence[Path], encoding: Encoding, dtype: str, flip: str = "none"
) -> list[Job]:
    """The caches of latents of every source.

    Args:
        samples: loads the images.
        table: the sizes they are brought to.
        parents: per source, the folder that holds its caches.
        encoding: of images.
        dtype, flip: see `CacheKey`.
    """
    resolution = " ".join(f"{h}x{w}" for h, w in table.sizes) + (" lanczos" if table.lanczos else "")
    jobs = []
    for number, (source, parent) in enumerate(zip(samples.sources, parents, strict=True)):
        key = CacheKey("latents", source.fingerprint(), encoding.model, encoding.weights, dtype, resolution, flip)
        sizes = [np.maximum(source.index.column(name), 1) for name in ("height", "width")]
        buckets, start = table.nearest(*sizes), int(samples.starts[number])

        def load(i: int, buckets: np.ndarray = buckets, start: int = start) -> np.ndarray:
            return samples.pixels(Slot(0, start + i, *table.sizes[int(buckets[i])]))

        def write(shard: ShardSamples, folder: CacheFolder, load: Callable[[int], np.ndarray] = load) -> int:
            return write_latents(folder, shard, load, encoding.encode)

        jobs.append(_job(parent, key, source, write))
    return jobs


def text_jobs(samples: Samples, parents: Sequence[Path], encoding: Encoding, dtype: str) -> list[Job]:
    """The caches of the features of all captions of every source; arguments as in `latent_jobs`."""
    jobs = []
    for source, parent in zip(samples.sources, parents, strict=True):
        key = CacheKey(
            "text", source.fingerprint(), encoding.model, encoding.weights, dtype, template=encoding.template
        )

        def captions(i: int, source: Any = source) -> list[str]:
            return [caption.text for caption in source.record(i).captions]

        def write(shard: ShardSamples, folder: CacheFolder, captions: Callable[[int], list[str]] = captions) -> int:
            return write_text(folder, shard, captions, encoding.encode)

        jobs.append(_job(parent, key, source, write))
    return jobs


def _job(parent: Path, key: CacheKey, source: Any, write: Callable[[ShardSamples, CacheFolder], int]) -> Job:
    shards = tuple(shards_of(source))
    folder = CacheFolder(parent / key.name, key, tuple(shard.name for shard in shards), len(source))
    return Job(folder, shards, lambda shard: write(shard, folder))
