"""Images of a folder with what is known of each: drawn here or elsewhere, in GenEval's layout or flat."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sana.model.candidates import FILE, POOL
from sana.run.prompts import read_prompts
from sana.run.results import read_results
from sana.run.sidecar import read_image, read_sidecar

MAIN, HELD_OUT = "prompts", "held_out"
MANIFEST = "drawing.json"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
Lines = Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, Any]]


class Images(Sequence[NDArray[np.uint8]]):
    """Images of a folder, read when asked for and checked against their sidecars; a slice is a list."""

    def __init__(self, paths: Sequence[Path], records: Sequence[Mapping[str, Any]]) -> None:
        self.paths, self.records = paths, records

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: Any) -> Any:
        """Image i as uint8 (H, W, 3), or the list of those of a slice."""
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return read_image(self.paths[i], self.records[i])


def read_lines(path: str | Path) -> Lines:
    """Prompts of a file, with whatever it says of each.

    Args:
        path: what `sana.run.prompts.read_prompts` takes: GenEval's evaluation_metadata.jsonl, a text file, or a JSON
            mapping from names to prompts (MJHQ-30K's meta_data.json), which gives a mapping here too.

    Raises:
        ConfigError: see `read_prompts`.
    """
    requests = read_prompts(str(path))
    lines = [{**r.metadata, "prompt": r.prompt} for r in requests]
    if Path(path).suffix.lower() == ".json":
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if isinstance(content, dict) and "prompt" not in content:
            return dict(zip(map(str, content), lines, strict=True))
    return lines


def find_images(
    folder: str | Path, lines: Lines | None = None, *, prompts: bool = True
) -> list[tuple[Path, dict[str, Any]]]:
    """Images of a folder with what is known of each, ordered by path.

    What is known is the line of `lines` that an image belongs to, or its sidecar, or GenEval's ``metadata.jsonl`` in
    its folder or the one above; the record always has "metadata", "split" and "entry". ``grid.png`` is left out, as
    GenEval has it, and so are the candidates that a choice was made from (`sana.model.best_of`).

    Args:
        folder: of the images.
        lines: prompts: a list, whose line n belongs to ``<n>/samples/*``, ``<n>.png`` and ``<n>_<sample>.png``
            (n from 0, with or without leading zeros), or a mapping, whose keys are the names of images or of their
            folders. None: every image says what it is.
        prompts: whether the prompts are needed; without, an image about which nothing is known is taken too.

    Raises:
        ValueError: no images, an image about which nothing is known or that belongs to no line, or a drawing that is
            not finished.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"images: {folder} is not a folder")
    found = []
    known = read_results(folder / MANIFEST)
    suffixes = SUFFIXES if known is None else (".png",)
    paths = (p for p in folder.rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith("."))
    others = folder / POOL if (folder / FILE).is_file() else None
    for path in sorted(p for p in paths if p.name != "grid.png" and others not in p.parents):
        record = read_sidecar(path) or {}
        home = path.parent.parent if path.parent.name == "samples" else path.parent
        if lines is not None:
            entry, line = _line_of(path, home if home != folder else path, lines)
            if record.get("prompt", line["prompt"]) != line["prompt"]:
                raise ValueError(f"{path}: its sidecar says {record['prompt']!r}, the metadata {line['prompt']!r}")
            record |= {"metadata": line, "entry": entry, "split": MAIN}
        elif "metadata" not in record:
            above = [p / "metadata.jsonl" for p in (path.parent, path.parent.parent)]
            line = next((m for m in map(read_results, above) if m is not None), None)
            if line is None and prompts:
                raise ValueError(
                    f"evaluate: {path} has neither a sidecar with metadata nor a metadata.jsonl; give metadata=FILE"
                )
            record["metadata"] = line or {}
        record.setdefault("split", MAIN)
        record.setdefault("entry", str(home.relative_to(folder)) if home != folder else path.stem)
        found.append((path, record))
    if not found:
        raise ValueError(f"evaluate: no {'PNG ' if known is not None else ''}images in {folder}")
    if known is not None and known["images"] != len(found):
        raise ValueError(
            f"evaluate: {folder} holds {len(found)} of {known['images']} images; run the drawing again to finish it"
        )
    return found


def _line_of(path: Path, named: Path, lines: Lines) -> tuple[int | str, Mapping[str, Any]]:
    """The key and the line of an image; `named` is what bears the number: the image or its folder."""
    name = named.stem if named == path else named.name
    if isinstance(lines, Mapping):
        key = next((k for k in (name, path.stem, re.sub(r"[_-]\d+$", "", name)) if k in lines), None)
        if key is None:
            raise ValueError(f"{path}: the metadata has no key {name!r}")
        return key, lines[key]
    match = re.fullmatch(r"(\d+)(?:[_-]\d+)?", name)
    if match is None:
        raise ValueError(
            f"{path}: cannot tell its line of the metadata; name images <line>.png or <line>_<sample>.png, or lay them "
            "out as <line>/samples/<sample>.png, lines counted from 0"
        )
    entry = int(match[1])
    if entry >= len(lines):
        raise ValueError(f"{path}: there is no line {entry}; the metadata has {len(lines)}, counted from 0")
    return entry, lines[entry]
