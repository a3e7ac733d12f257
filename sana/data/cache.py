"""Caches of what frozen encoders make of a source: latents of images, and token features of captions.

A cache is a folder of shards beside the images, one tar per shard of the source, whose members ``KEY.safetensors`` any
tool can read; an Arrow file beside each tar says where each tensor lies, so that a batch is read at random with one
system call per sample, straight into its place. ``cache.json`` holds the `CacheKey`: everything that the contents
depend on. The folder's name is a digest of it, and what was made with another key is never read: a change of weights,
dtype, resolution, template or source leads to another folder or to a `StaleCacheError` that names the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from sana.data.arrow import numbers
from sana.data.cache_folder import DTYPES, CacheFolder, StaleCacheError, caption_hash, short
from sana.data.cache_places import Places


class LatentCache:
    """Cached latents of one or more sources, read at random.

    Args:
        folders: a complete cache of kind "latents" per source; their samples are numbered one source after another.

    Attributes:
        dtype: of the latents.
        both: whether each image is stored mirrored too.

    Raises:
        StaleCacheError: shards are missing, or a tar does not belong to its index.
        ValueError: caches of different dtypes, or mirrored in different ways.
    """

    def __init__(self, *folders: CacheFolder) -> None:
        self.folders = folders
        if len({(folder.key.dtype, folder.key.flip) for folder in folders}) != 1:
            raise ValueError("cached latents of all sources need one dtype and one way of flipping")
        self.dtype = DTYPES[folders[0].key.dtype]
        self.both = folders[0].key.flip == "both"
        self._places = Places(folders)
        self._shape = np.zeros((len(self), 3), np.int32)
        self._stride = 1
        self._checksum = np.zeros((len(self), 2), np.uint64)
        for samples, table in self._places.tables:
            self._shape[samples] = np.stack([numbers(table[name]) for name in ("c", "h", "w")], axis=1)
            coded = np.flatnonzero(numbers(table["h"]))
            if len(coded):
                self._stride = table["height"][int(coded[0])].as_py() // table["h"][int(coded[0])].as_py()
            self._checksum[samples, 0] = numbers(table["checksum"])
            self._checksum[samples, 1] = numbers(table["checksum_flipped"])

    def __len__(self) -> int:
        return self._places.count

    @property
    def largest(self) -> int:
        """Bytes of the largest latent."""
        return int(self._shape.astype(np.int64).prod(axis=1).max(initial=0)) * self.dtype.itemsize

    def __reduce__(self) -> tuple[Any, ...]:
        return LatentCache, self.folders

    def size(self, i: int) -> tuple[int, int, int]:
        """(c, h, w) of a sample's latent; (0, 0, 0) of one that could not be encoded."""
        c, h, w = self._shape[i].tolist()
        return c, h, w

    def read(
        self,
        samples: Sequence[int] | np.ndarray,
        flipped: Sequence[bool] | np.ndarray | None = None,
        *,
        size: tuple[int, int] | None = None,
        room: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, str]]:
        """Latents of samples of one size.

        Args:
            samples: their numbers.
            flipped: which of them to read mirrored, where both ways are stored.
            size: (height, width) of the images in pixels, for batches in which every sample is bad.
            room: bytes to read them into, where they fit.

        Returns:
            (b, c, h, w) in the cache's dtype, and place -> reason of those that have no latent or whose bytes were
            changed since; their rows are 0.

        Raises:
            ValueError: latents of different sizes, or `flipped` where one way is stored.
        """
        if flipped is not None and not self.both:
            raise ValueError(f"{self.folders[0].path} holds each image one way, not both")
        wanted = np.asarray(samples, np.int64)
        shard, offset, shapes = self._places.shard[wanted], self._places.offset[wanted], self._shape[wanted]
        there = shard >= 0
        bad = {int(k): self._places.reason(int(wanted[k])) for k in np.flatnonzero(~there)}
        c, h, w = shapes[there.argmax()].tolist() if there.any() else self._like(size)
        if (shapes[there] != (c, h, w)).any():
            raise ValueError(f"latents of different sizes in one batch: {sorted(set(map(tuple, shapes.tolist())))}")
        length = c * h * w * self.dtype.itemsize
        which = np.zeros(len(wanted), np.int64) if flipped is None else np.asarray(flipped, np.int64)
        checksum = self._checksum[wanted, which].tolist()
        need = len(wanted) * length
        if room is None or need > room.numel():
            room = torch.empty(need, dtype=torch.uint8)
        out = room[:need].view(len(wanted), length)
        rows = out.numpy()
        read, digest = self._places.files.read_into, xxhash.xxh3_64_intdigest
        for k, (file, at) in enumerate(zip(shard.tolist(), (offset + which * length).tolist(), strict=True)):
            row = rows[k]
            if file < 0:
                row[:] = 0
                continue
            if not read(file, at, row) or digest(row) != checksum[k]:
                bad[k] = f"checksum: {self._places.files.name(file)} was changed since it was written"
                row[:] = 0
        return out.view(self.dtype).view(len(wanted), c, h, w), bad

    def _like(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """(c, h, w) of a latent that is not there."""
        c, h, w = self._shape.max(axis=0).tolist()
        return (c, h, w) if size is None else (c, size[0] // self._stride, size[1] // self._stride)


class TextCache:
    """Cached token features of the captions of one or more sources, read at random.

    Args:
        folders: a complete cache of kind "text" per source, as in `LatentCache`.

    Raises:
        StaleCacheError: shards are missing, or a tar does not belong to its index.
        ValueError: caches of different dtypes or widths.
    """

    def __init__(self, *folders: CacheFolder) -> None:
        self.folders = folders
        self.dtype = DTYPES[folders[0].key.dtype]
        self._places = Places(folders)
        tables = self._places.tables
        widths = {int(width) for _, table in tables for width in np.unique(numbers(table["channels"])) if width}
        if len(widths) != 1 or len({folder.key.dtype for folder in folders}) != 1:
            raise ValueError("cached features of all sources need one dtype and one width")
        (self.channels,) = widths
        counts = np.zeros(len(self), np.int64)
        for samples, table in tables:
            counts[samples] = np.diff(numbers(table["tokens"].offsets))
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self._tokens = np.zeros(int(self._first[-1]), np.int64)
        self._hash = np.zeros(int(self._first[-1]), np.uint64)
        for samples, table in tables:
            ends = numbers(table["tokens"].offsets)
            each = np.diff(ends)
            at = np.repeat(self._first[samples] - ends[:-1], each) + np.arange(ends[-1])
            self._tokens[at] = numbers(table["tokens"].values)
            self._hash[at] = numbers(table["hash"].values)

    def __len__(self) -> int:
        return self._places.count

    def __reduce__(self) -> tuple[Any, ...]:
        return TextCache, self.folders

    def read(self, samples: Sequence[int], captions: Sequence[str]) -> tuple[Tensor, Tensor, dict[int, str]]:
        """Features of one caption of each sample.

        Args:
            samples: their numbers.
            captions: the caption that was chosen for each; it is looked up by its text.

        Returns:
            (b, l, c) in the cache's dtype, zero beyond each caption's tokens, with l the longest of the batch; the mask
            (b, l), True on tokens; and place -> reason of samples that have no features or cannot be read.

        Raises:
            StaleCacheError: a caption is not among those that were cached.
        """
        bad: dict[int, str] = {}
        places = []
        for k, (i, caption) in enumerate(zip(samples, captions, strict=True)):
            if self._places.shard[i] < 0:
                bad[k] = self._places.reason(int(i))
                places.append((-1, 0, 0))
            else:
                places.append(self._find(int(i), caption))
        longest = max(tokens for _, _, tokens in places)
        text = torch.zeros((len(places), longest, self.channels), dtype=self.dtype)
        mask = torch.zeros((len(places), longest), dtype=torch.bool)
        rows = text.view(torch.uint8).numpy()
        for k, (file, at, tokens) in enumerate(places):
            if k not in bad and not self._places.files.read_into(file, at, rows[k, :tokens].reshape(-1)):
                bad[k] = f"truncated: {self._places.files.name(file)}"
            mask[k, :tokens] = k not in bad
        return text, mask, bad

    def _find(self, i: int, caption: str) -> tuple[int, int, int]:
        """(file, offset, tokens) of a caption."""
        first, last = self._first[i], self._first[i + 1]
        hits = np.flatnonzero(self._hash[first:last] == np.uint64(caption_hash(caption)))
        if not len(hits):
            raise StaleCacheError(f"sample {i}: the caption {short(caption)!r} is not among the cached ones")
        before = int(self._tokens[first : first + hits[0]].sum()) * self.channels * self.dtype.itemsize
        return int(self._places.shard[i]), int(self._places.offset[i]) + before, int(self._tokens[first + hits[0]])
