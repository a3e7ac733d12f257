"""Caches of what frozen encoders make of a source: latents of images, and token features of captions.

A cache is a folder of shards beside the images, one tar per shard of the source, whose members ``KEY.safetensors`` any
tool can read; an Arrow file beside each tar says where each tensor lies, so that a batch is read at random with one
system call per sample, straight into its place. ``cache.json`` holds the `CacheKey`: everything that the contents
depend on. The folder's name is a digest of it, and what was made with another key is never read: a change of weights,
dtype, resolution, template or source leads to another folder or to a `StaleCacheError` that names the difference.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

FACTS = "cache.json"
VERSION = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FLIPS = ("none", "once", "both")


class StaleCacheError(ValueError):
    """There is no complete cache for what a run needs; the message says what differs and how to make one."""


@dataclass(frozen=True)
class CacheKey:
    """Everything that the contents of a cache depend on.

    Attributes:
        kind: "latents" or "text".
        source: fingerprint of the images and captions.
        model: the encoder's name, for messages.
        weights: digest of its weights and structure.
        dtype: "float32", "float16" or "bfloat16", of what is stored.
        resolution: latents: how images were brought to their sizes, such as "64x64" or the table of buckets.
        flip: latents: "none"; "once": half of the images are mirrored, decided per image; "both": either way is stored.
        template: text: what stands around a caption, and where it is cut.

    Raises:
        ValueError: a kind, dtype or flip that does not exist.
    """

    kind: str
    source: str
    model: str
    weights: str
    dtype: str
    resolution: str = ""
    flip: str = "none"
    template: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("latents", "text"):
            raise ValueError(f"cache kind {self.kind!r}: expected latents or text")
        if self.dtype not in DTYPES:
            raise ValueError(f"cache dtype {self.dtype!r}: expected {', '.join(DTYPES)}")
        if self.flip not in FLIPS or (self.kind == "text" and self.flip != "none"):
            raise ValueError(f"cache flip {self.flip!r}: expected {', '.join(FLIPS)}, and none for text")

    @property
    def name(self) -> str:
        """Name of the cache's folder."""
        digest = hashlib.sha256(json.dumps([VERSION, asdict(self)], sort_keys=True).encode()).hexdigest()
        return f"{self.kind}-{digest[:16]}"

    def differences(self, other: CacheKey) -> list[str]:
        """What differs from another key: "dtype is float16 there, bfloat16 here"."""
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{name} is {_short(theirs[name])} there, {_short(value)} here"
            for name, value in mine.items()
            if theirs[name] != value
        ]


@dataclass(frozen=True)
class CacheFolder:
    """A cache on disk, complete or on its way.

    Attributes:
        path: its folder.
        key: what it depends on.
        shards: names of its shards (those of the source, without suffix).
        count: samples of the source.
    """

    path: Path
    key: CacheKey
    shards: tuple[str, ...]
    count: int

    @property
    def done(self) -> list[str]:
        """Shards that are finished: their Arrow file is written last."""
        return [shard for shard in self.shards if (self.path / f"{shard}.arrow").is_file()]

    @classmethod
    def open(cls, path: Path) -> CacheFolder:
        """A cache folder by its ``cache.json``.

        Raises:
            StaleCacheError: there is none, or it is of another version.
        """
        try:
            facts = json.loads((path / FACTS).read_text())
            if facts["version"] != VERSION:
                raise StaleCacheError(f"{path}: a cache of version {facts['version']}, expected {VERSION}")
            return cls(path, CacheKey(**facts["key"]), tuple(facts["shards"]), facts["count"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, StaleCacheError):
                raise
            raise StaleCacheError(f"{path}: no cache ({FACTS} is missing or unreadable)") from None

    def create(self) -> None:
        """Make the folder with its facts; nothing changes where another process did it already."""
        self.path.mkdir(parents=True, exist_ok=True)
        facts = {"version": VERSION, "key": asdict(self.key), "count": self.count, "shards": list(self.shards)}
        write_whole(self.path / FACTS, json.dumps(facts, indent=1).encode() + b"\n")


def find_cache(parent: Path, key: CacheKey) -> CacheFolder:
    """The complete cache of a key among those in a folder.

    Raises:
        StaleCacheError: there is none; the message names what differs in the nearest one, or what is missing.
    """
    advice = "make it with `python scripts/precompute.py` and the settings of this run"
    if (parent / key.name / FACTS).is_file():
        found = CacheFolder.open(parent / key.name)
        missing = len(found.shards) - len(found.done)
        if missing:
            raise StaleCacheError(f"{found.path}: {missing} of {len(found.shards)} shards are not cached yet; {advice}")
        return found
    others = []
    for path in sorted(parent.glob(f"{key.kind}-*/{FACTS}")):
        try:
            others.append(CacheFolder.open(path.parent))
        except StaleCacheError:
            continue
    if not others:
        raise StaleCacheError(f"no cached {key.kind} in {parent}; {advice}")
    nearest = min(others, key=lambda other: len(key.differences(other.key)))
    what = "; ".join(key.differences(nearest.key))
    raise StaleCacheError(f"the cached {key.kind} in {nearest.path} do not belong to this run: {what}; {advice}")


class LatentCache:
    """Cached latents of a source, read at random.

    Args:
        folder: a complete cache of kind "latents".

    Attributes:
        bad: sample number -> reason, of samples that could not be encoded.

    Raises:
        StaleCacheError: shards are missing, or a tar does not belong to its index.
    """

    def __init__(self, folder: CacheFolder) -> None:
        self.folder = folder
        self.dtype = DTYPES[folder.key.dtype]
        self.variants = 2 if folder.key.flip == "both" else 1
        self._shard, self._offset, self._checksum, self.bad, tables = _places(folder)
        self._shape = np.zeros((folder.count, 3), np.int32)
        for table in tables:
            self._shape[table["sample"].to_numpy()] = np.stack(
                [table[name].to_numpy() for name in ("c", "h", "w")], axis=1
            )
        self._files = Files([folder.path / f"{shard}.tar" for shard in folder.shards])

    def __len__(self) -> int:
        return self.folder.count

    def __reduce__(self) -> tuple[Any, ...]:
        return LatentCache, (self.folder,)

    def size(self, i: int) -> tuple[int, int, int]:
        """(c, h, w) of a sample's latent."""
        c, h, w = self._shape[i]
        return int(c), int(h), int(w)

    def read(self, samples: Sequence[int] | np.ndarray, flipped: Sequence[bool] | np.ndarray | None = None) -> Tensor:
        """Latents of samples of one size, (b, c, h, w) in the cache's dtype.

        Args:
            samples: their numbers.
            flipped: which of them to read mirrored, where both ways are stored.

        Raises:
            ValueError: latents of different sizes, a sample that could not be encoded, bytes that were changed since, or
                `flipped` where one way is stored.
        """
        numbers = np.asarray(samples, np.int64)
        shapes = self._shape[numbers]
        for i in numbers[self._shard[numbers] < 0] if self.bad else ():
            raise ValueError(f"sample {i} has no latent: {self.bad.get(int(i), 'it is not in the cache')}")
        if (shapes != shapes[0]).any():
            raise ValueError(f"latents of different sizes in one batch: {sorted(set(map(tuple, shapes.tolist())))}")
        if flipped is not None and self.variants == 1:
            raise ValueError(f"{self.folder.path} holds each image one way (flip={self.folder.key.flip}), not both")
        c, h, w = shapes[0].tolist()
        size = c * h * w * self.dtype.itemsize
        offset, checksum = self._offset[numbers], self._checksum[numbers, 0]
        if flipped is not None:
            mirror = np.asarray(flipped, bool)
            offset = offset + mirror * size
            checksum = np.where(mirror, self._checksum[numbers, 1], checksum)
        out = torch.empty((len(numbers), size), dtype=torch.uint8)
        rows = out.numpy()
        read, digest = self._files.read_into, xxhash.xxh3_64_intdigest
        places = zip(self._shard[numbers].tolist(), offset.tolist(), checksum.tolist(), strict=True)
        for k, (shard, at, expected) in enumerate(places):
            row = rows[k]
            read(shard, at, row)
            if digest(row) != expected:
                raise ValueError(f"sample {numbers[k]}: {self.folder.shards[shard]}.tar was changed (checksum)")
        return out.view(self.dtype).view(len(numbers), c, h, w)


class TextCache:
    """Cached token features of captions, read at random.

    Args:
        folder: a complete cache of kind "text".

    Raises:
        StaleCacheError: shards are missing, or a tar does not belong to its index.
    """

    def __init__(self, folder: CacheFolder) -> None:
        self.folder = folder
        self.dtype = DTYPES[folder.key.dtype]
        self._shard, self._offset, _, self.bad, tables = _places(folder)
        counts = np.zeros(folder.count, np.int64)
        for table in tables:
            counts[table["sample"].to_numpy()] = np.diff(np.asarray(table["tokens"].offsets))
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self._tokens = np.zeros(int(self._first[-1]), np.int64)
        self._hash = np.zeros(int(self._first[-1]), np.uint64)
        self.channels = int(tables[0]["channels"][0].as_py()) if tables and len(tables[0]) else 0
        for table in tables:
            starts = np.repeat(self._first[table["sample"].to_numpy()], np.diff(np.asarray(table["tokens"].offsets)))
            ends = np.asarray(table["tokens"].offsets)
            within = np.arange(ends[-1] - ends[0]) - np.repeat(ends[:-1] - ends[0], np.diff(ends))
            self._tokens[starts + within] = table["tokens"].flatten().to_numpy()
            self._hash[starts + within] = table["hash"].flatten().to_numpy()
        self._files = Files([folder.path / f"{shard}.tar" for shard in folder.shards])

    def __len__(self) -> int:
        return self.folder.count

    def __reduce__(self) -> tuple[Any, ...]:
        return TextCache, (self.folder,)

    def read(self, samples: Sequence[int], captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features of one caption of each sample.

        Args:
            samples: their numbers.
            captions: the text of the caption that was chosen for each, which is looked up among the cached ones.

        Returns:
            (b, l, c) in the cache's dtype, zero beyond each caption's tokens, and the mask (b, l), True on tokens; l is
            the longest of the batch.

        Raises:
            StaleCacheError: a caption is not among those that were cached.
            ValueError: a sample that could not be encoded.
        """
        places = [self._find(int(i), text) for i, text in zip(samples, captions, strict=True)]
        longest = max(tokens for _, _, tokens in places)
        text = torch.zeros((len(places), longest, self.channels), dtype=self.dtype)
        mask = torch.zeros((len(places), longest), dtype=torch.bool)
        rows = text.view(torch.uint8).numpy()
        for k, (shard, at, tokens) in enumerate(places):
            self._files.read_into(shard, at, rows[k, :tokens].reshape(-1))
            mask[k, :tokens] = True
        return text, mask

    def _find(self, i: int, caption: str) -> tuple[int, int, int]:
        """(shard, offset, tokens) of a caption."""
        if self._shard[i] < 0:
            raise ValueError(f"sample {i} has no features: {self.bad.get(i, 'it is not in the cache')}")
        first, last = self._first[i], self._first[i + 1]
        hits = np.flatnonzero(self._hash[first:last] == np.uint64(caption_hash(caption)))
        if not len(hits):
            raise StaleCacheError(f"sample {i}: the caption {_short(caption)!r} is not in {self.folder.path}")
        before = int(self._tokens[first : first + hits[0]].sum()) * self.channels * self.dtype.itemsize
        return int(self._shard[i]), int(self._offset[i]) + before, int(self._tokens[first + hits[0]])


class Files:
    """Byte ranges of a few local files, read into memory that is given; descriptors survive neither fork nor pickling."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._open: dict[int, int] = {}
        self._pid = os.getpid()

    def read_into(self, file: int, offset: int, target: Any) -> None:
        """Fill a writable buffer; raises `ValueError` where the file ends before."""
        if self._pid != os.getpid():
            self._open, self._pid = {}, os.getpid()
        handle = self._open.get(file)
        if handle is None:
            if len(self._open) >= 256:
                os.close(self._open.pop(next(iter(self._open))))
            handle = self._open[file] = os.open(self._paths[file], os.O_RDONLY)
        if os.preadv(handle, [target], offset) != len(target):
            raise ValueError(f"{self._paths[file]} ends early: {len(target)} bytes expected at {offset}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        if getattr(self, "_pid", None) == os.getpid():
            for handle in self._open.values():
                os.close(handle)


def caption_hash(text: str) -> int:
    """What a caption is looked up by: xxh3_64 of its UTF-8."""
    return xxhash.xxh3_64_intdigest(text.encode())


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file beside its place and rename it, so that it is never found half written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _places(
    folder: CacheFolder,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, str], list[pa.RecordBatch]]:
    """Per sample: shard (-1: none), offset and checksums of its first tensor; reasons of bad ones; the shards' tables."""
    shard_of = np.full(folder.count, -1, np.int32)
    offset = np.zeros(folder.count, np.int64)
    checksum = np.zeros((folder.count, 2), np.uint64)
    bad: dict[int, str] = {}
    tables = []
    for number, shard in enumerate(folder.shards):
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(folder.path / f"{shard}.arrow")))
            table, size = reader.get_batch(0), int((reader.schema.metadata or {})[b"bytes"])
        except (OSError, KeyError, pa.ArrowException) as error:
            raise StaleCacheError(f"{folder.path}: shard {shard} is not cached ({type(error).__name__})") from error
        tar = folder.path / f"{shard}.tar"
        if not tar.is_file() or tar.stat().st_size != size:
            raise StaleCacheError(f"{tar} is not the file that its index describes; delete {shard}.arrow and cache anew")
        samples = table["sample"].to_numpy()
        if len(samples) and (samples.min() < 0 or samples.max() >= folder.count):
            raise StaleCacheError(f"{folder.path}: {shard}.arrow names samples that the source does not have")
        shard_of[samples] = number
        offset[samples] = table["offset"].to_numpy()
        for k, name in enumerate(("checksum", "checksum_flipped")):
            if name in table.schema.names:
                checksum[samples, k] = table[name].to_numpy()
        for row in np.flatnonzero(table["bad"].is_valid().to_numpy(zero_copy_only=False)):
            bad[int(samples[row])] = table["bad"][int(row)].as_py()
            shard_of[samples[row]] = -1
        tables.append(table)
    return shard_of, offset, checksum, bad, tables


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
