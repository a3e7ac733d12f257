"""Filling caches, shard by shard: the functions that one process, many, or a Ray job run alike."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from sana.data.cache_folder import DTYPES, CacheFolder, caption_hash, write_whole
from sana.data.record import BadSample
from sana.ops.random import uniform

BATCH = 64
_PLACE = [("sample", pa.int64()), ("offset", pa.int64()), ("bad", pa.string())]
_SHAPE = [("c", pa.int32()), ("h", pa.int32()), ("w", pa.int32()), ("height", pa.int32())]
_LATENTS = pa.schema([*_PLACE, *_SHAPE, ("checksum", pa.uint64()), ("checksum_flipped", pa.uint64())])
_LISTS = [("tokens", pa.large_list(pa.int64())), ("hash", pa.large_list(pa.uint64()))]
_TEXT = pa.schema([*_PLACE, *_LISTS, ("channels", pa.int32())])
_EMPTY: dict[str, Any] = {"bad": None, "tokens": [], "hash": []}
_FLIP_SEED = 0  # of flips decided at caching: part of the data, not of a run


@dataclass(frozen=True)
class ShardSamples:
    """Samples of one shard of the source.

    Attributes:
        name: of the shard, without suffix.
        samples: their numbers in the source.
        keys: their names in the shard.
    """

    name: str
    samples: tuple[int, ...]
    keys: tuple[str, ...]


def mirrored_once(samples: Sequence[int]) -> list[bool]:
    """Which samples of a source are mirrored where that is decided once: half of them, by their numbers."""
    return (uniform(_FLIP_SEED, torch.tensor(list(samples), dtype=torch.int64), "cached flip") < 0.5).tolist()


def shards_of(source: Any, largest: int = 5000) -> list[ShardSamples]:
    """The shards of a source as they are to be cached: its own, cut where they are larger than `largest`.

    Args:
        source: with `len`, and `index` as in `sana.data.index`.
    """
    index = source.index
    number = np.asarray(index.column("shard"))
    result = []
    for k, shard in enumerate(index.shards):
        samples = np.flatnonzero(number == k)
        stem = str(shard["name"]).removesuffix(".tar").strip("/").replace("/", "--") or "samples"
        pieces = max(1, -(-len(samples) // largest))
        for piece, part in enumerate(np.array_split(samples, pieces)):
            name = f"{k:06d}-{stem}" if pieces == 1 else f"{k:06d}-{stem}-{piece:04d}"
            if len(part):
                result.append(ShardSamples(name, tuple(part.tolist()), tuple(index.key(int(i)) for i in part)))
    return result


class _Writer:
    """One shard on its way: a tar that grows on disk, and the rows of its Arrow file."""

    def __init__(self, folder: Path, shard: ShardSamples, schema: pa.Schema) -> None:
        self._folder, self._name, self._schema = folder, shard.name, schema
        self._names = dict(zip(shard.samples, shard.keys, strict=True))
        self._partial = folder / f".{shard.name}.tar.{os.getpid()}.partial"
        self._rows: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> _Writer:
        self._file = open(self._partial, "wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The tar first, its Arrow file last: a shard that has one is complete."""
        try:
            if kind is None:
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                os.replace(self._partial, self._folder / f"{self._name}.tar")
                self._index(self._file.tell())
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def row(self, sample: int, **values: Any) -> None:
        """Add a sample's row; columns that are not given are null or 0."""
        self._rows[sample] = values

    def _index(self, size: int) -> None:
        """Rows in the order of the shard."""
        columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        for sample in self._names:
            values = {"sample": sample, "bad": None, **self._rows[sample]}
            for name, column in columns.items():
                column.append(values.get(name, _EMPTY.get(name, 0)))
        schema = self._schema.with_metadata({b"bytes": str(size).encode()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))
        write_whole(self._folder / f"{self._name}.arrow", memoryview(sink.getvalue()))

    def store(self, sample: int, tensor: Tensor) -> int:
        """Add the member KEY.safetensors with one tensor; returns where its numbers begin."""
        key = self._names[sample]
        body = save({"features": tensor.contiguous()})
        member = tarfile.TarInfo(f"{key}.safetensors")  # its time, owner and group are zero
        member.size, member.mode = len(body), 0o644
        self._tar.addfile(member, io.BytesIO(body))
        begin = self._tar.offset - -(-len(body) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return begin + len(body) - tensor.numel() * tensor.element_size()


def write_latents(
    folder: CacheFolder,
    shard: ShardSamples,
    load: Callable[[int], np.ndarray],
    encode: Callable[[Tensor], Tensor],
    *,
    batch: int = BATCH,
) -> int:
    """Encode the images of one shard, unless that is done.

    Args:
        folder: of a key of kind "latents"; made already.
        shard: which samples.
        load: sample number -> uint8 (H, W, 3) as training would see it. What it raises as `ValueError` or `OSError`
            makes the sample a bad one: its reason is kept in its place.
        encode: (b, 3, H, W) in [-1, 1] -> latents (b, c, h, w).
        batch: images per call of `encode`; images of one size are encoded together.

    Returns:
        Number of samples that were encoded now.

    Raises:
        ValueError: latents that are not finite or exceed the range of the cache's dtype.
    """
    if (folder.path / f"{shard.name}.arrow").is_file():
        return 0
    dtype, flip = DTYPES[folder.key.dtype], folder.key.flip
    names = dict(zip(shard.samples, shard.keys, strict=True))
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    once = {i: flip == "once" and coin for i, coin in zip(shard.samples, mirrored_once(shard.samples), strict=True)}

    def flush(writer: _Writer, group: list[tuple[int, np.ndarray]]) -> None:
        pixels = torch.from_numpy(np.stack([p[:, ::-1] if once[i] else p for i, p in group]))
        images = pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        ways = [images, images.flip(-1)] if flip == "both" else [images]
        coded = torch.stack([encode(way).float().cpu() for way in ways], dim=1)
        for (i, shown), latent in zip(group, coded, strict=True):
            ways = _checked(latent, dtype, names[i]).contiguous()
            sums = [xxhash.xxh3_64_intdigest(way.view(torch.uint8).numpy().data) for way in ways]
            c, h, w = ways.shape[-3:]
            begin = writer.store(i, ways if flip == "both" else ways[0])
            place = {"offset": begin, "c": c, "h": h, "w": w, "height": len(shown)}
            writer.row(i, **place, checksum=sums[0], checksum_flipped=sums[-1])

    good = 0
    with _Writer(folder.path, shard, _LATENTS) as writer:
        for i in shard.samples:
            try:
                pixels = load(i)
            except (BadSample, ValueError, OSError) as error:
                writer.row(i, bad=_reason(error))
                continue
            good += 1
            group = waiting.setdefault(pixels.shape, [])
            group.append((i, pixels))
            if len(group) == batch:
                flush(writer, group)
                group.clear()
        for group in waiting.values():
            if group:
                flush(writer, group)
    return good


def write_text(
    folder: CacheFolder,
    shard: ShardSamples,
    captions: Callable[[int], Sequence[str]],
    encode: Callable[[list[str]], list[Tensor]],
    *,
    batch: int = BATCH,
) -> int:
    """Encode all captions of one shard, unless that is done; arguments and returns as in `write_latents`.

    Args:
        captions: sample number -> its captions; features are looked up by the text.
        encode: captions -> features of each one's own tokens, (l, c).
    """
    if (folder.path / f"{shard.name}.arrow").is_file():
        return 0
    dtype = DTYPES[folder.key.dtype]
    names = dict(zip(shard.samples, shard.keys, strict=True))
    good = 0
    with _Writer(folder.path, shard, _TEXT) as writer:
        for first in range(0, len(shard.samples), batch):
            texts: dict[int, list[str]] = {}
            for i in shard.samples[first : first + batch]:
                try:
                    texts[i] = list(dict.fromkeys(captions(i)))
                    if not texts[i]:
                        raise ValueError("no caption")
                except (BadSample, ValueError, OSError) as error:
                    texts.pop(i, None)
                    writer.row(i, bad=_reason(error), tokens=[], hash=[])
            wanted = list(dict.fromkeys(text for found in texts.values() for text in found))
            coded = dict(zip(wanted, encode(wanted), strict=True)) if wanted else {}
            for i, found in texts.items():
                features = [_checked(coded[text].float().cpu(), dtype, names[i]) for text in found]
                lengths = [len(feature) for feature in features]
                begin = writer.store(i, torch.cat(features))
                hashes = [caption_hash(text) for text in found]
                writer.row(i, offset=begin, tokens=lengths, hash=hashes, channels=features[0].shape[1])
            good += len(texts)
    return good


def _reason(error: Exception) -> str:
    return (error.reason if isinstance(error, BadSample) else str(error))[:200] or type(error).__name__


def _checked(values: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """Rounded to the cache's dtype; refused where that loses more than precision."""
    rounded = values.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError(f"{key}: features are not finite in {str(dtype).removeprefix('torch.')}")
    return rounded
