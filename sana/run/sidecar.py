"""Images as PNG with a JSON beside each, so that every picture says how to make it again.

`a.png` has `a.json`: prompt, seed, steps, guidance, sampler, checkpoint digest, commit, size, and a digest of
the pixels. The PNG carries the same in its metadata, as JSON under "parameters", for pictures that travel alone. It
is put in place first and the JSON second, both in one step each, so an image with a sidecar is complete.

A grid of samples (`samples/step_00000500.png`) is a labelled picture for people; its JSON says which label and
rectangle each cell has, so that the report can show one prompt over all steps.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from sana.run.records import to_json

REQUIRED = ("prompt", "seed", "steps", "guidance", "sampler", "checkpoint", "commit")
"""What a sidecar must say; commit and checkpoint may be None where there is none."""

PARAMETERS = "parameters"  # key of the facts in a PNG's metadata; where other tools look too
GAP, MARGIN, FONT, LINE = 6, 14, 13, 17  # of a grid, in pixels
CELL = 128  # images in a grid smaller than this are enlarged by a whole factor, so that single pixels stay visible
PAPER, INK = (255, 255, 255), (32, 36, 44)

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
        raise ValueError(f"{path.name}: image is {image.dtype} of shape {image.shape}, expected uint8 (H, W, 3)")
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**facts, "size": [image.shape[1], image.shape[0]], "pixels": pixel_digest(image)}
    text, data = PngInfo(), io.BytesIO()
    text.add_itxt(PARAMETERS, to_json(record))
    Image.fromarray(image).save(data, format="PNG", pnginfo=text)
    replace_bytes(path, data.getvalue())
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
    except (OSError, SyntaxError) as error:  # PIL raises either for a broken PNG
        raise ValueError(f"{path}: cannot be read as an image ({error}); delete it and generate it again") from None
    if record is not None and "pixels" in record and record["pixels"] != pixel_digest(image):
        raise ValueError(f"{path}: its pixels are not those of its sidecar; delete both and generate it again")
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


def save_grid(
    path: str | Path,
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    row_labels: Sequence[str],
    column_labels: Sequence[str] = (),
    title: str = "",
) -> Path:
    """Write a labelled grid of images, and where each cell is.

    Args:
        path: of the PNG. The sample grids of a run are named ``samples/step_<update>.png``: the report finds them.
        rows: equally many uint8 (H, W, 3) images of one size per row.
        row_labels: one per row, such as prompts.
        column_labels: one per column, or () for none.
        title: one line above all.

    Returns:
        The path of the PNG. Its JSON has "scale" (the factor by which images were enlarged) and "cells": a list of
        {"row": label, "column": label or number, "box": [left, top, width, height]}.

    Raises:
        ValueError: as `compose_grid`; or rows of different lengths or images of different sizes.
    """
    path = Path(path)
    shapes = {np.shape(image) for row in rows for image in row}
    if len(shapes) != 1 or len({len(row) for row in rows}) != 1:
        raise ValueError(f"{path}: a grid needs rows of one length and images of one size, got {sorted(shapes)}")
    picture, boxes, scale = compose_grid(np.stack([np.stack(row) for row in rows]), row_labels, column_labels, title)
    cells = [
        {"row": label, "column": column_labels[j] if column_labels else j, "box": box}
        for label, line in zip(row_labels, boxes, strict=True)
        for j, box in enumerate(line)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    picture.save(data, format="PNG", optimize=True)
    replace_bytes(path, data.getvalue())
    replace_bytes(path.with_suffix(".json"), (to_json({"scale": scale, "cells": cells}) + "\n").encode())
    return path


def compose_grid(
    images: NDArray[np.uint8],
    rows: Sequence[str],
    columns: Sequence[str] = (),
    title: str = "",
) -> tuple[Image.Image, list[list[tuple[int, int, int, int]]], int]:
    """Lay images out with a label before each row and above each column.

    Args:
        images: (r, c, H, W, 3) uint8.
        rows: r labels, such as prompts or steps; wrapped to the label column.
        columns: c labels, or () for none; wrapped to the width of a cell.
        title: one line above all.

    Returns:
        The picture; per row and column the (left, top, width, height) of the cell in it; and the whole factor
        by which every image was enlarged.

    Raises:
        ValueError: the number of labels is not that of the rows or columns, or the images are not uint8 RGB.
    """
    if images.ndim != 5 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"grid: images are {images.dtype} of shape {images.shape}, expected uint8 (r, c, H, W, 3)")
    r, c, height, width = images.shape[:4]
    if len(rows) != r or (columns and len(columns) != c):
        raise ValueError(f"grid: {len(rows)} row and {len(columns)} column labels for {r} rows and {c} columns")
    scale = max(1, CELL // max(height, width))
    w, h = width * scale, height * scale
    font = ImageFont.load_default(FONT)
    letter = max(font.getlength("n"), 1.0)
    row_lines = [textwrap.wrap(label, 24) or [""] for label in rows]
    column_lines = [textwrap.wrap(label, max(6, int(w / letter))) or [""] for label in columns]
    label_width = int(max(font.getlength(line) for lines in row_lines for line in lines)) + GAP + 4
    row_height = max(h, LINE * max(map(len, row_lines)))
    top = MARGIN + (LINE + GAP if title else 0) + LINE * max(map(len, column_lines), default=0)
    left = MARGIN + label_width
    picture = Image.new(
        "RGB", (left + c * (w + GAP) - GAP + MARGIN, top + r * (row_height + GAP) - GAP + MARGIN), PAPER
    )
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((MARGIN, MARGIN - 4), title, INK, ImageFont.load_default(FONT + 2))
    for j, lines in enumerate(column_lines):
        for k, line in enumerate(lines):
            draw.text((left + j * (w + GAP), top - LINE * (len(lines) - k)), line, INK, font)
    boxes: list[list[tuple[int, int, int, int]]] = []
    for i in range(r):
        y = top + i * (row_height + GAP)
        for k, line in enumerate(row_lines[i]):
            draw.text((MARGIN, y + (row_height - LINE * len(row_lines[i])) // 2 + LINE * k), line, INK, font)
        boxes.append([(left + j * (w + GAP), y, w, h) for j in range(c)])
        for j, (x, _, _, _) in enumerate(boxes[i]):
            picture.paste(Image.fromarray(images[i, j]).resize((w, h), Image.Resampling.NEAREST), (x, y))
    return picture, boxes, scale
