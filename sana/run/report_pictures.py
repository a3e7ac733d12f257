"""Pictures of a report: the sample grid over training, images that the scorer called right or wrong, and those with the
highest and lowest scores."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from sana.run.report_read import Frame

ROWS, COLUMNS = 9, 8  # of the grid over training
SHOTS = 4  # right ones and wrong ones per task
SIDE = 256  # larger images are reduced to this, as JPEG


def grid_over_training(frames: Sequence[Frame]) -> str:
    """Rows are steps, columns are prompts, always with the same seed.

    Or the pictures as they are without layout.
    """
    laid_out = [frame for frame in frames if frame.layout]
    if not laid_out:
        return _plain_frames(frames)
    columns = _columns(laid_out[-1])
    rows = []
    for frame in spread(laid_out, ROWS):
        cells = {(c["row"], c["column"]): c for c in _cells(frame)}
        try:
            with Image.open(frame.picture) as file:
                picture = file.convert("RGB")
        except (OSError, SyntaxError):
            continue
        row = [f'<div class="step">{"start" if frame.step == 0 else f"{frame.step:,}"}</div>']
        for key in columns:
            cell = cells.get(key)
            row.append(_cell(picture, cell, frame) if cell else "<div></div>")
        rows.append("".join(row))
    heads = "".join(f'<div class="head">{escape(str(label))}</div>' for label, _ in columns)
    style = f"grid-template-columns:64px repeat({len(columns)},minmax(0,128px));min-width:{64 + 82 * len(columns)}px"
    return (
        f'<div class="card scroll"><div class="matrix" style="{style}"><div class="step head">updates</div>{heads}'
        f"{''.join(rows)}</div></div>"
    )


def _columns(frame: Frame) -> list[tuple[str, Any]]:
    """Up to COLUMNS cells of the newest grid: the first one of every row, then further ones where there is room."""
    rows: dict[str, list[Any]] = {}
    for cell in _cells(frame):
        rows.setdefault(cell["row"], []).append(cell["column"])
    labels = spread(list(rows), COLUMNS)
    each = max(1, COLUMNS // max(1, len(labels)))
    return [(label, column) for label in labels for column in rows[label][:each]]


def _cells(frame: Frame) -> list[dict[str, Any]]:
    cells = (frame.layout or {}).get("cells", [])
    return [c for c in cells if isinstance(c, dict) and {"row", "column", "box"} <= set(c) and len(c["box"]) == 4]


def _cell(picture: Image.Image, cell: Mapping[str, Any], frame: Frame) -> str:
    left, top, width, height = cell["box"]
    scale = max(1, int((frame.layout or {}).get("scale", 1)))
    image = picture.crop((left, top, left + width, top + height))
    image = image.resize((max(1, width // scale), max(1, height // scale)), Image.Resampling.NEAREST)
    return tag(image, f"{cell['row']}, after {frame.step} updates")


def _plain_frames(frames: Sequence[Frame]) -> str:
    figures = []
    for frame in spread(frames, 6):
        try:
            with Image.open(frame.picture) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError):
            continue
        picture = tag(image, f"Samples after {frame.step} updates", side=1100)
        figures.append(f"<figure>{picture}<figcaption>after {frame.step:,} updates</figcaption></figure>")
    return f'<div class="card frames">{"".join(figures)}</div>' if figures else ""


def examples(verdicts: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """Per task, some images that were right and some that were wrong, each with its prompt and the reason."""
    blocks = []
    for key, title in titles.items():
        split, task = key.split("/", 1)
        mine = [v for v in verdicts if v.get("tag") == task and v.get("split") == split]
        right = _shots([v for v in mine if v.get("correct")])
        wrong = _shots([v for v in mine if not v.get("correct")])
        if right or wrong:
            sides = [
                f'<div><h4>{name}</h4><div class="shots">{shots or "<p class=label>none</p>"}</div></div>'
                for name, shots in (("Right", right), ("Wrong", wrong))
            ]
            blocks.append(
                f'<div class="card task"><h3>{escape(title)}</h3><div class="pair">{"".join(sides)}</div></div>'
            )
    return "".join(blocks)


def extremes(folder: str | Path, name: str, ends: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The images of a folder that a metric scored highest and lowest, each with its prompt and score."""
    sides = []
    for key, title in (("best", "Highest"), ("worst", "Lowest")):
        shots = []
        for entry in ends.get(key, ()):
            prompt = str(entry.get("prompt") or entry["filename"])
            picture = from_file(Path(folder) / entry["filename"], f"{title}: {prompt}")
            caption = f"<figcaption>{escape(prompt)}<small>{entry['score']:.4g}</small></figcaption>"
            shots.append(f'<figure class="shot">{picture}{caption}</figure>' if picture else "")
        sides.append(
            f'<div><h4>{title}</h4><div class="shots">{"".join(shots) or "<p class=label>none</p>"}</div></div>'
        )
    return f'<div class="card task"><h3>{escape(name)}</h3><div class="pair">{"".join(sides)}</div></div>'


def _shots(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """The first images with different prompts (and reasons), then any others."""
    first: dict[Any, Mapping[str, Any]] = {}
    for verdict in verdicts:
        first.setdefault((verdict.get("prompt"), str(verdict.get("reason", ""))[:12]), verdict)
    chosen = list(first.values())
    chosen += [v for v in verdicts if v not in chosen]
    shots = []
    for verdict in chosen:
        if len(shots) == SHOTS:
            break
        prompt, right = str(verdict.get("prompt", "")), bool(verdict.get("correct"))
        reason = "" if right else f"<small>{escape(str(verdict.get('reason', '')))}</small>"
        picture = from_file(verdict["path"], f"{'Right' if right else 'Wrong'}: {prompt}")
        if picture:
            caption = f'<figcaption><span aria-hidden="true">{"✓" if right else "✗"}</span> {escape(prompt)}{reason}'
            shots.append(f'<figure class="shot {"yes" if right else "no"}">{picture}{caption}</figcaption></figure>')
    return "".join(shots)


def from_file(path: str | Path, alt: str) -> str:
    """`tag` of an image file, or "" when it cannot be read."""
    try:
        with Image.open(path) as file:
            return tag(file.convert("RGB"), alt)
    except (OSError, SyntaxError):
        return ""


def tag(image: Image.Image, alt: str, side: int = SIDE) -> str:
    """An `<img>` that holds its own bytes: PNG up to `side` pixels, reduced JPEG above."""
    data = io.BytesIO()
    if max(image.size) <= side:
        kind = "png"
        image.save(data, format="PNG", optimize=True)
    else:
        kind = "jpeg"
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(data, format="JPEG", quality=90)
    text = base64.b64encode(data.getvalue()).decode()
    width, height = image.size
    return (
        f'<img src="data:image/{kind};base64,{text}" width="{width}" height="{height}" '
        f'loading="lazy" decoding="async" alt="{escape(alt)}">'
    )


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spaced, with the first and the last."""
    n = len(items)
    if n <= count:
        return list(items)
    return [items[round(k * (n - 1) / (count - 1))] for k in range(count)]
