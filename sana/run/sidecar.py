"""Images as PNG with a JSON beside each, so that every picture says how to make it again.

`a.png` has `a.json`: prompt, seed, steps, guidance, sampler, checkpoint digest, commit, size, and a digest of
the pixels. The PNG is put in place first and the JSON second, both in one step each, so an image with a
sidecar is complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sana.run.records import to_json

REQUIRED = ("prompt", "seed", "steps", "guidance", "sampler", "checkpoint", "commit")
"""What a sidecar must say; commit and checkpoint may be None where there is none."""

DIGEST_LENGTH = 16  # hexadecimal digits: 64 bits tell checkpoints apart and can be read aloud


def save_image(path: str | Path, image: NDArray[np.uint8], facts: Mapping[str, Any]) -> Path:
    """Write one image and its sidecar.

    Args:
        path: of the PNG; the sidecar gets the suffix ".json". Missing folders are made.
        image: (H, W, 3) uint8.
        facts: at least `REQUIRED`; "size" ([width, height] in pixels) and "pixels" (digest) are added.

    Returns:
        The path of the PNG.

    Raises:
        ValueError: a fact is missing, the suffix is not ".png", or the image is not uint8 RGB.
    """
    path = Path(path)
    missing = [key for key in REQUIRED if key not in facts]
    if missing:
        raise ValueError(f"{path.name}: the sidecar lacks {', '.join(missing)}")
    if path.suffix != ".png":
        raise ValueError(f"{path}: images are written as .png, so that no compression changes a score")
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"{path.name}: image is {image.dtype} of shape {image.shape}, expected uint8 (H, W, 3)"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="PNG")
    replace_bytes(path, data.getvalue())
    record = {**facts, "size": [image.shape[1], image.shape[0]], "pixels": pixel_digest(image)}
    replace_bytes(path.with_suffix(".json"), (to_json(record, indent=2) + "\n").encode())
    return path


def read_sidecar(path: str | Path) -> dict[str, Any] | None:
    """The sidecar of a PNG (or at a .json path), or None where it is missing or not an object."""
    try:
        record = json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def read_image(path: str | Path, record: Mapping[str, Any] | None = None) -> NDArray[np.uint8]:
    """Pixels of an image file as uint8 (H, W, 3).

    Raises:
        ValueError: the file is not an image, or its pixels are not those that the sidecar `record` was
            written for.
    """
    try:
        with Image.open(path) as file:
            image = np.asarray(file.convert("RGB"))
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read as an image ({error}); delete it and generate it again"
        ) from None
    if record is not None and "pixels" in record and record["pixels"] != pixel_digest(image):
        raise ValueError(
            f"{path}: its pixels are not those of its sidecar; delete both and generate it again"
        )
    return image


def pixel_digest(image: NDArray[np.uint8]) -> str:
    """Digest of the pixels and the size of an image, whatever file it is stored in."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()[:DIGEST_LENGTH]


def file_digest(path: str | Path) -> str:
    """SHA-256 of a checkpoint, shortened: of the file, or of the names and contents of all files of a
    directory.

    Raises:
        ValueError: there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file to take a digest of")
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        if file != path:
            digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:DIGEST_LENGTH]


def replace_bytes(path: Path, data: bytes) -> None:
    """Put a file in place in one step.

    Not synced to the disk: a killed process leaves no half file, a power cut may.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)
