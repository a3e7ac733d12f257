"""What judges said of candidates: scores.jsonl, a line per image and judge.

Lines are appended as images are scored and never changed. A line counts for an image only if it is of the same pixels,
prompt and judge, so a score is never taken over from another drawing; the candidates themselves may be gone by then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sana.run.records import to_json

FILE, POOL = "scores.jsonl", "pool"
DIGITS = 16


def digest(value: Any) -> str:
    """Of anything that goes into JSON."""
    return hashlib.sha256(json.dumps(json.loads(to_json(value)), sort_keys=True).encode()).hexdigest()[:DIGITS]


@dataclass(frozen=True)
class Candidate:
    """One image of a pool.

    Attributes:
        image: name of its file in the pool.
        entry: number of its prompt.
        seed: of its noise.
        line: what is known of the prompt.
        pixels: their digest.
        drawing: digest of all that the pool was drawn with.
    """

    image: str
    entry: int
    seed: int
    line: Mapping[str, Any]
    pixels: str
    drawing: str


class Scores:
    """The scores of a folder.

    Args:
        folder: of the chosen images.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE
        self._known = {_key(row): float(row["score"]) for row in read_rows(self.path)}

    def get(self, candidate: Candidate, judge: str, settings: Any) -> float | None:
        """The score of an image by a judge of such settings; None where there is none."""
        return self._known.get(_key(_row(candidate, judge, settings, 0.0)))

    def add(self, candidates: Iterable[Candidate], judge: str, settings: Any, scores: Iterable[float]) -> None:
        """Record what is not recorded yet."""
        rows = [_row(c, judge, settings, float(s)) for c, s in zip(candidates, scores, strict=True)]
        new = {_key(row): row for row in rows if _key(row) not in self._known}
        if not new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")  # by a kill
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" * torn + "".join(to_json(row) + "\n" for row in new.values()))
        self._known.update((key, row["score"]) for key, row in new.items())


def _row(candidate: Candidate, judge: str, settings: Any, score: float) -> dict[str, Any]:
    return {
        "entry": candidate.entry,
        "image": candidate.image,
        "seed": candidate.seed,
        "line": dict(candidate.line),
        "pixels": candidate.pixels,
        "drawing": candidate.drawing,
        "judge": judge,
        "settings": digest(settings),
        "score": score,
    }


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    same = ("image", "entry", "pixels", "drawing", "judge", "settings")
    return (*(row[name] for name in same), digest(row["line"]))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a scores.jsonl in the order written; [] where there is none."""
    rows = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(text)
            if _key(row) and {"score", "seed"} <= row.keys():
                rows.append(row)
        except (ValueError, TypeError, KeyError):
            continue  # cut off by a kill
    return rows


@dataclass(frozen=True)
class Pool:
    """A finished pool.

    Attributes:
        candidates: (prompts, N), of every prompt in the order of drawing.
        scores: (prompts, N) by each judge that has seen all of them.
    """

    candidates: list[list[Candidate]]
    scores: dict[str, NDArray[np.float64]]

    @property
    def tasks(self) -> list[str] | None:
        """GenEval's tag of each prompt; None where one has none."""
        tags = [some[0].line.get("tag") for some in self.candidates]
        return None if None in tags else [str(tag) for tag in tags]


def read_pool(folder: str | Path) -> Pool:
    """The pool that was drawn last into a folder, by its scores alone: the candidates need not be there any more.

    Where a judge scored an image twice with different settings, the later score counts.

    Raises:
        ValueError: no scores; prompts that are not scored by the same number of images, as in a drawing that was
            interrupted.
    """
    path = Path(folder) / FILE
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: no scores; draw with sample.py ... best_of=N judge=NAME out={folder}")
    rows = [row for row in rows if row["drawing"] == rows[-1]["drawing"]]
    names = ("image", "entry", "seed", "line", "pixels", "drawing")
    found: dict[tuple[int, str], Candidate] = {}
    for row in rows:
        found[row["entry"], row["image"]] = Candidate(**{name: row[name] for name in names})
    table: dict[str, dict[tuple[int, str], float]] = {}
    for row in rows:
        at = row["entry"], row["image"]
        if row["pixels"] == found[at].pixels and row["line"] == found[at].line:
            table.setdefault(row["judge"], {})[at] = float(row["score"])
    prompts: dict[int, list[Candidate]] = {}
    for candidate in found.values():
        prompts.setdefault(candidate.entry, []).append(candidate)
    order = [prompts[entry] for entry in sorted(prompts)]
    sizes = {len(some) for some in order}
    if len(sizes) > 1:
        raise ValueError(f"{path}: prompts have {min(sizes)} to {max(sizes)} images; draw again to finish the pool")
    keys = [[(c.entry, c.image) for c in some] for some in order]
    scores = {
        judge: np.array([[known[at] for at in some] for some in keys])
        for judge, known in table.items()
        if known.keys() >= found.keys()
    }
    return Pool(order, scores)
