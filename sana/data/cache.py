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

from sana.data.arrow import numbers

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
        self._places = _Places(folders)
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
        self._places = _Places(folders)
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
            raise StaleCacheError(f"sample {i}: the caption {_short(caption)!r} is not among the cached ones")
        before = int(self._tokens[first : first + hits[0]].sum()) * self.channels * self.dtype.itemsize
        return int(self._places.shard[i]), int(self._places.offset[i]) + before, int(self._tokens[first + hits[0]])


class Files:
    """Byte ranges of local files, read into memory that is given; no descriptor is shared with another process."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._open: dict[int, int] = {}
        self._pid = os.getpid()

    def name(self, file: int) -> str:
        """Of a file, for messages."""
        return self._paths[file].name

    def read_into(self, file: int, offset: int, target: np.ndarray) -> bool:
        """Fill a row of bytes; False where the file ends before."""
        if self._pid != os.getpid():
            self._open, self._pid = {}, os.getpid()
        handle = self._open.get(file)
        if handle is None:
            if len(self._open) >= 256:
                os.close(self._open.pop(next(iter(self._open))))
            handle = self._open[file] = os.open(self._paths[file], os.O_RDONLY)
        return os.preadv(handle, [target.data], offset) == len(target)

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


class _Places:
    """Where every sample of some caches lies.

    Attributes:
        count: samples in all.
        shard: (count,) number of the file, -1 where there is none.
        offset: (count,) bytes, of the sample's first number.
        files: the tars.
        tables: (samples' numbers, rows) of each shard.
    """

    def __init__(self, folders: Sequence[CacheFolder]) -> None:
        self.count = sum(folder.count for folder in folders)
        self.shard = np.full(self.count, -1, np.int32)
        self.offset = np.zeros(self.count, np.int64)
        self.tables: list[tuple[np.ndarray, pa.RecordBatch]] = []
        self._bad: dict[int, str] = {}
        base, tars = 0, []
        for folder in folders:
            for name in folder.shards:
                table = _read_table(folder, name)
                samples = numbers(table["sample"]) + base
                self.shard[samples], self.offset[samples] = len(tars), numbers(table["offset"])
                for row in _valid(table["bad"]):
                    self._bad[int(samples[row])] = table["bad"][int(row)].as_py()
                    self.shard[samples[row]] = -1
                self.tables.append((samples, table))
                tars.append(folder.path / f"{name}.tar")
            base += folder.count
        self.files = Files(tars)

    def reason(self, i: int) -> str:
        """Why a sample is not there."""
        return self._bad.get(i, "missing file: it is not in the cache")


def _valid(array: pa.Array) -> list[int]:
    """Places that are not null."""
    if array.null_count == len(array):
        return []
    return [row for row, known in enumerate(array.is_valid().to_pylist()) if known]


def _read_table(folder: CacheFolder, name: str) -> pa.RecordBatch:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(folder.path / f"{name}.arrow")))
        table, size = reader.get_batch(0), int((reader.schema.metadata or {})[b"bytes"])
    except (OSError, KeyError, pa.ArrowException) as error:
        raise StaleCacheError(f"{folder.path}: shard {name} is not cached ({type(error).__name__})") from error
    tar = folder.path / f"{name}.tar"
    if not tar.is_file() or tar.stat().st_size != size:
        raise StaleCacheError(f"{tar} is not the file its index describes; delete {name}.arrow and cache it anew")
    samples = numbers(table["sample"])
    if len(samples) and not 0 <= samples.min() <= samples.max() < folder.count:
        raise StaleCacheError(f"{folder.path}: {name}.arrow names samples that the source does not have")
    return table


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
