"""Small pictures and tars for the tests of sources, made with Pillow and the standard library alone."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def noise(seed: int, height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def png(seed: int, height: int = 6, width: int = 9) -> bytes:
    return encoded(noise(seed, height, width))


def make_tar(
    path: Path, members: Mapping[str, bytes] | list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT
) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for name, body in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
