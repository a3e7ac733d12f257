"""Filling caches, shard by shard: the functions that one process, many, or a Ray job run alike."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from sana.data.cache import DTYPES, CacheFolder, caption_hash, write_whole
from sana.ops.random import uniform

BATCH = 64
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


@dataclass
class _Rows:
    """What the Arrow file of a shard says."""

    tar: tarfile.TarFile
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, **values: Any) -> None:
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)

    def store(self, key: str, tensor: Tensor) -> int:
        """Add the member KEY.safetensors with one tensor; returns where its numbers begin."""
        body = save({"features": tensor.contiguous()})
        member = tarfile.TarInfo(f"{key}.safetensors")  # its time, owner and group are zero
        member.size, member.mode = len(body), 0o644
        begin = self.tar.offset + tarfile.BLOCKSIZE
        self.tar.addfile(member, io.BytesIO(body))
        if self.tar.offset < begin + len(body):  # a long name took more than one header
            raise ValueError(f"key {key!r} is too long for a tar")
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
    body = io.BytesIO()
    dtype, flip = DTYPES[folder.key.dtype], folder.key.flip
    latents: dict[int, Tensor] = {}
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    bad: dict[int, str] = {}
    coins = uniform(_FLIP_SEED, torch.tensor(shard.samples, dtype=torch.int64), "cached flip") < 0.5
    once = {i: flip == "once" and bool(coin) for i, coin in zip(shard.samples, coins.tolist(), strict=True)}

    def flush(group: list[tuple[int, np.ndarray]]) -> None:
        pixels = torch.from_numpy(np.stack([p[:, ::-1] if once[i] else p for i, p in group]))
        images = pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        ways = [images, images.flip(-1)] if flip == "both" else [images]
        coded = torch.stack([encode(way).float().cpu() for way in ways], dim=1)
        for (i, _), latent in zip(group, coded, strict=True):
            latents[i] = _checked(latent if flip == "both" else latent[0], dtype, shard.keys[shard.samples.index(i)])

    for i in shard.samples:
        try:
            pixels = load(i)
        except Exception as error:
            if not _is_bad(error):
                raise
            bad[i] = str(error)[:200] or type(error).__name__
            continue
        group = waiting.setdefault(pixels.shape, [])
        group.append((i, pixels))
        if len(group) == batch:
            flush(group)
            group.clear()
    for group in waiting.values():
        if group:
            flush(group)
    with tarfile.open(fileobj=body, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        rows = _Rows(tar)
        for i, key in zip(shard.samples, shard.keys, strict=True):
            if i in bad:
                rows.add(sample=i, offset=0, c=0, h=0, w=0, checksum=0, checksum_flipped=0, bad=bad[i])
                continue
            latent = latents.pop(i)
            ways = latent if flip == "both" else latent[None]
            sums = [xxhash.xxh3_64_intdigest(way.contiguous().view(torch.uint8).numpy()) for way in ways]
            c, h, w = latent.shape[-3:]
            begin = rows.store(key, latent)
            rows.add(sample=i, offset=begin, c=c, h=h, w=w, checksum=sums[0], checksum_flipped=sums[-1], bad=None)
    schema = pa.schema(
        [("sample", pa.int64()), ("offset", pa.int64()), ("c", pa.int32()), ("h", pa.int32()), ("w", pa.int32())]
        + [("checksum", pa.uint64()), ("checksum_flipped", pa.uint64()), ("bad", pa.string())]
    )
    _finish(folder.path, shard.name, body, rows.columns, schema)
    return len(shard.samples) - len(bad)


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
    body = io.BytesIO()
    dtype = DTYPES[folder.key.dtype]
    texts: dict[int, list[str]] = {}
    bad: dict[int, str] = {}
    for i in shard.samples:
        try:
            texts[i] = list(dict.fromkeys(captions(i)))
        except Exception as error:
            if not _is_bad(error):
                raise
            bad[i] = str(error)[:200] or type(error).__name__
    channels = 0
    with tarfile.open(fileobj=body, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        rows = _Rows(tar)
        names = dict(zip(shard.samples, shard.keys, strict=True))
        numbers = list(shard.samples)
        for first in range(0, len(numbers), batch):
            group = numbers[first : first + batch]
            wanted = list(dict.fromkeys(text for i in group for text in texts.get(i, [])))
            coded = dict(zip(wanted, encode(wanted), strict=True)) if wanted else {}
            for i in group:
                if i in bad:
                    rows.add(sample=i, offset=0, tokens=[], hash=[], bad=bad[i])
                    continue
                features = [_checked(coded[text].float().cpu(), dtype, names[i]) for text in texts[i]]
                channels = features[0].shape[1] if features else channels
                begin = rows.store(names[i], torch.cat(features)) if features else 0
                rows.add(
                    sample=i,
                    offset=begin,
                    tokens=[len(feature) for feature in features],
                    hash=[caption_hash(text) for text in texts[i]],
                    bad=None,
                )
    rows.columns["channels"] = [channels] * len(numbers)
    lists = [("tokens", pa.large_list(pa.int64())), ("hash", pa.large_list(pa.uint64()))]
    schema = pa.schema(
        [("sample", pa.int64()), ("offset", pa.int64()), *lists, ("bad", pa.string()), ("channels", pa.int32())]
    )
    _finish(folder.path, shard.name, body, rows.columns, schema)
    return len(numbers) - len(bad)


def _is_bad(error: Exception) -> bool:
    """Whether an error is the sample's: `ValueError`, `OSError`, and the sources' own `BadSample`."""
    return isinstance(error, ValueError | OSError) or type(error).__name__ == "BadSample"


def _checked(values: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """Rounded to the cache's dtype; refused where that loses more than precision."""
    rounded = values.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError(f"{key}: features are not finite in {str(dtype).removeprefix('torch.')}")
    return rounded


def _finish(folder: Path, name: str, body: io.BytesIO, columns: dict[str, list[Any]], schema: pa.Schema) -> None:
    """The tar first, its Arrow file last: what has one is complete."""
    write_whole(folder / f"{name}.tar", body.getbuffer())
    schema = schema.with_metadata({b"bytes": str(os.path.getsize(folder / f"{name}.tar")).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))
    write_whole(folder / f"{name}.arrow", memoryview(sink.getvalue()))
