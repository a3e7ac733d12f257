"""What a report needs from a run's directory; whatever is missing or broken there is left empty."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana.run.records import read_metrics
from sana.run.results import read_results
from sana.run.runs import load_run

Series = tuple[list[float], list[float]]
"""Steps and values of one metric, by increasing step; values may be NaN."""


@dataclass
class Frame:
    """The sample grid of one step: the picture, and which cell is what if `sana.run.sidecar.save_grid` wrote it."""

    step: int
    picture: Path
    layout: dict[str, Any] | None


@dataclass
class Run:
    """One run's directory as read.

    Attributes:
        path: the directory.
        summary: `sana.run.runs.load_run`: status, reason, started, seconds, step, overrides, commit, ...
        details: traceback of a failed run, or "".
        environment: environment.json.
        config: text of config.yaml, or "".
        series: metric -> steps and values.
        frames: sample grids by step.
        verdicts: lines of the evaluation's verdicts.jsonl, each with "path" of the image.
    """

    path: Path
    summary: dict[str, Any]
    details: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    series: dict[str, Series] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)


def read_run(path: str | Path, results: dict[str, Any] | None) -> Run:
    """Everything about a run that a report shows. Never fails on missing or broken records.

    Raises:
        ValueError: `path` is not a directory.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"report: {path} is not a directory of a run")
    status = read_results(path / "status.json") or {}
    return Run(
        path=path,
        summary=load_run(path),
        details=str(status.get("details") or ""),
        environment=read_results(path / "environment.json") or {},
        config=_text(path / "config.yaml"),
        series=_series(path / "metrics.jsonl"),
        frames=_frames(path / "samples"),
        verdicts=_verdicts((results or {}).get("files", {})),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _series(path: Path) -> dict[str, Series]:
    """Per metric, its last value at every step: a resumed run writes some steps twice."""
    try:
        rows = read_metrics(path)
    except OSError:
        return {}
    values: dict[str, dict[float, float]] = {}
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int | float) or not math.isfinite(step):
            continue
        for key, value in row.items():
            if key not in ("step", "time") and isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault(key, {})[float(step)] = float(value)
    return {key: ([x for x, _ in sorted(v.items())], [v[x] for x in sorted(v)]) for key, v in values.items()}


def _frames(folder: Path) -> list[Frame]:
    frames = []
    for picture in folder.glob("step_*.png") if folder.is_dir() else ():
        match = re.fullmatch(r"step_(\d+)", picture.stem)
        if match:
            layout = read_results(picture.with_suffix(".json"))
            frames.append(Frame(int(match[1]), picture, layout if layout and layout.get("cells") else None))
    return sorted(frames, key=lambda frame: frame.step)


def _verdicts(files: dict[str, Any]) -> list[dict[str, Any]]:
    if "verdicts" not in files or "images" not in files:
        return []
    lines = []
    for text in _text(Path(files["verdicts"])).splitlines():
        try:
            line = json.loads(text)
            lines.append({**line, "path": Path(files["images"]) / line["filename"]})
        except (ValueError, TypeError, KeyError):
            continue
    return lines
