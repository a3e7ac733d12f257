"""Latents encoded once and kept on disk, keyed by everything they depend on.

A stale cache is never used: the key holds the shards' fingerprint, the encoder's digest, the pixel size and the dtype;
another key is another file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

Encode = Callable[[Tensor], Tensor]


def cache_path(folder: Path, *key: str) -> Path:
    """The file that holds the latents of `key`."""
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    return folder / f"latents-{digest}.npy"


def build(
    path: Path,
    images: Callable[[int], np.ndarray | None],
    count: int,
    encode: Encode,
    *,
    batch: int = 256,
) -> np.ndarray:
    """Memory-mapped float16 latents (count, c, h, w), encoded first if `path` does not exist.

    Args:
        path: the cache file; written beside and renamed at the end, so that a half-written file is never found.
        images: sample number -> uint8 (H, W, 3); None where it cannot be read: its latent is not a number.
        count: number of samples.
        encode: images (b, 3, H, W) in [-1, 1] -> latents (b, c, h, w).
        batch: images per call of `encode`.

    Raises:
        ValueError: latents out of float16's range or not finite.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            _write(temporary, images, count, encode, batch)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    latents = np.load(path, mmap_mode="r")
    if len(latents) != count:
        raise ValueError(f"{path} holds {len(latents)} latents, {count} expected; delete it")
    return latents


def _write(
    path: Path,
    images: Callable[[int], np.ndarray | None],
    count: int,
    encode: Encode,
    batch: int,
) -> None:
    target = None
    for first in track(range(0, count, batch), "encoding latents", console=Console(stderr=True)):
        last = min(first + batch, count)
        loaded = [images(i) for i in range(first, last)]
        good = [k for k, image in enumerate(loaded) if image is not None]
        if not good:
            if target is not None:
                target[first:last] = np.nan
            continue
        latents = encode(to_tensor(np.stack([image for image in loaded if image is not None]))).float().cpu()
        if not bool(torch.isfinite(latents).all()) or float(latents.abs().max()) > 6e4:
            raise ValueError(f"latents of samples {first}..{last - 1} are not finite or exceed float16")
        if target is None:
            shape = (count, *latents.shape[1:])
            target = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
            target[:first] = np.nan
        target[first:last] = np.nan
        target[[first + k for k in good]] = latents.numpy().astype(np.float16)
    if target is None:
        raise ValueError("no image can be read, so there is nothing to encode")
    target.flush()


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (b, H, W, 3) -> float (b, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
