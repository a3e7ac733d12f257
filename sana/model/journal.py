"""What has been scored already, so that scoring that was stopped goes on where it was.

A line per image is appended as soon as it is scored. Its key is a digest of the pixels, the prompt's line, the metric's
settings and the code's commit, so nothing that was scored otherwise is ever taken over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sana.metric.ranks import rank, shared
from sana.run.records import to_json
from sana.run.sidecar import pixel_digest

CHUNK = 16  # images that are scored together


def measure(
    metric: Any, images: Sequence[Any], metadata: Sequence[Mapping[str, Any]], folder: Path | None, about: Any
) -> list[dict[str, Any]]:
    """``metric.measure`` of every image, shared over the ranks, without doing again what a journal has.

    Args:
        metric: with `measure` (images, lines -> a JSON object per image) and `settings`.
        images, metadata: equally many.
        folder: of the journals, one per rank; None keeps none.
        about: what the scores depend on besides image, line and settings, such as the commit.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    known = {} if folder is None else _read(folder)

    def chunk(k: int) -> list[dict[str, Any]]:
        span = range(k * CHUNK, min((k + 1) * CHUNK, len(images)))
        pixels, lines = [images[i] for i in span], [metadata[i] for i in span]
        keys = [_key(x, line, metric, about) for x, line in zip(pixels, lines, strict=True)]
        lacking = list(dict.fromkeys(i for i, key in enumerate(keys) if key not in known))
        if lacking:
            rows = metric.measure([pixels[i] for i in lacking], [lines[i] for i in lacking])
            new = {keys[i]: row for i, row in zip(lacking, rows, strict=True)}
            if folder is not None:
                _append(folder / f"{rank()}.jsonl", new)
            known.update(new)
        return [known[key] for key in keys]

    return [row for rows in shared(-(-len(images) // CHUNK), chunk) for row in rows]


def _key(image: Any, line: Mapping[str, Any], metric: Any, about: Any) -> str:
    said = to_json([pixel_digest(image), dict(line), type(metric).__qualname__, metric.settings, about])
    return hashlib.sha256(said.encode()).hexdigest()[:24]


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
                rows[line["key"]] = line["row"]
            except (ValueError, TypeError, KeyError):
                continue  # cut off by a kill; it is scored again
    return rows


def _append(path: Path, rows: Mapping[str, Any]) -> None:
    # The line before may have been cut off, so each begins with a new line of its own.
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join("\n" + to_json({"key": key, "row": row}) for key, row in rows.items()))
