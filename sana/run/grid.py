"""Labelled grids of images, as PNG for people and with a JSON of the cells for programs.

`samples/step_000500.png` is what a person opens; `samples/step_000500.json` says which prompt, seed and
rectangle each cell has, so that the report can show one prompt over all steps.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sana.run.records import to_json
from sana.run.sidecar import replace_bytes

GAP, MARGIN, FONT, LINE = 6, 14, 13, 17  # pixels
CELL = 128  # images smaller than this are enlarged by a whole factor, so that single pixels stay visible
PAPER, INK = (255, 255, 255), (32, 36, 44)


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
        raise ValueError(
            f"grid: images are {images.dtype} of shape {images.shape}, expected uint8 (r, c, H, W, 3)"
        )
    r, c, height, width = images.shape[:4]
    if len(rows) != r or (columns and len(columns) != c):
        raise ValueError(
            f"grid: {len(rows)} row and {len(columns)} column labels for {r} rows and {c} columns"
        )
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


def save_samples(
    folder: str | Path,
    step: int,
    images: NDArray[np.uint8],
    prompts: Sequence[str],
    seeds: Sequence[int],
    weights: str = "",
) -> Path:
    """Write the sample grid of one training step: rows are prompts, columns are seeds.

    Args:
        folder: ``samples`` of the run's directory; made if missing.
        step: update number; the file is ``step_<six digits>.png`` with a .json beside it.
        images: (prompts, seeds, H, W, 3) uint8.
        prompts, seeds: labels of the rows and columns; the same ones at every step.
        weights: which weights drew them, such as "EMA"; part of the title.

    Returns:
        The path of the PNG.

    Raises:
        ValueError: as `compose_grid`.
    """
    title = f"step {step:,}" + (f", {weights}" if weights else "")
    picture, boxes, scale = compose_grid(images, prompts, [f"seed {s}" for s in seeds], title)
    path = Path(folder) / f"step_{step:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    cells: list[dict[str, Any]] = [
        {"prompt": prompt, "seed": seed, "box": boxes[i][j]}
        for i, prompt in enumerate(prompts)
        for j, seed in enumerate(seeds)
    ]
    data = io.BytesIO()
    picture.save(data, format="PNG", optimize=True)
    replace_bytes(path, data.getvalue())
    layout = {"step": step, "weights": weights, "scale": scale, "cells": cells}
    replace_bytes(path.with_suffix(".json"), (to_json(layout) + "\n").encode())
    return path
