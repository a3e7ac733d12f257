"""results.json: the numbers of one evaluation, with everything they depend on, and a table of them for the
console.

Keys of the file: `metric`, `value`, `interval` and `n` of the metric that was asked for first; `overall`, `tasks`
{task: number}, `held_out` and one number per further metric (`fid_scenes`) for programs that want a number; `figures`,
the same with interval, n and settings of each; `extremes`, the images with the highest and lowest scores of each metric
that scores them one by one; `settings`, what the first number and the images depend on; `steps`,
`seconds` and `peak_rss_gib` of training and evaluation together; `commit`; `files`, where images and verdicts lie.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from sana.run.records import read_metrics, to_json, write_atomically


def write_results(path: str | Path, results: Mapping[str, Any]) -> Path:
    """Write results.json in one step; folders are made. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_json(results, indent=2) + "\n")
    return path


def read_results(path: str | Path) -> dict[str, Any] | None:
    """A results.json, or None where it is missing or broken."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def training_facts(run_dir: str | Path) -> dict[str, Any]:
    """What the records of a run say about its training; a fact that they do not hold is None.

    Returns:
        ``{"steps": updates, "seconds": wall time, "peak_rss_gib": GiB}``. Steps are those of the last row of
        metrics.jsonl (or of status.json), seconds those of status.json (or between the first and last row).
    """
    run_dir = Path(run_dir)
    status = read_results(run_dir / "status.json") or {}
    try:
        rows = read_metrics(run_dir / "metrics.jsonl")
    except OSError:
        rows = []
    steps = [row["step"] for row in rows if isinstance(row.get("step"), int)]
    times = [row["time"] for row in rows if isinstance(row.get("time"), int | float)]
    return {
        "steps": max(steps) if steps else status.get("step"),
        "seconds": status.get("seconds") or (max(times) - min(times) if times else None),
        "peak_rss_gib": status.get("peak_rss_gib"),
    }


def results_table(results: Mapping[str, Any]) -> Table:
    """Table for the console: a line per task, overall, held-out tasks, and further metrics."""
    figures = results.get("figures", {})
    table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left")
    table.add_column("")
    for name in ("score", "95 % interval", "n"):
        table.add_column(name, justify="right")
    table.add_column("most common failure")
    for task, figure in figures.get("tasks", {}).items():
        table.add_row(task, *_cells(figure, percent=True), _failure(figure))
    if "overall" in figures:
        table.add_row("overall", *_cells(figures["overall"], percent=True), "mean of the tasks", style="bold")
    held_out = figures.get("held_out")
    if held_out:
        for task, figure in held_out.get("tasks", {}).items():
            table.add_row(f"held out: {task}", *_cells(figure, percent=True), _failure(figure), style="dim")
        table.add_row("held out", *_cells(held_out["overall"], percent=True), "combinations never trained on")
    for name, figure in figures.items():
        if name not in ("tasks", "overall", "held_out"):
            table.add_row(name, *_cells(figure, percent=False), str(figure.get("feature_space", "")).split(":")[0])
    return table


def _cells(figure: Mapping[str, Any], percent: bool) -> tuple[str, str, str]:
    low, high = figure["interval"]
    if percent:
        return f"{100 * figure['mean']:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}", f"{figure['n']:,}"
    return f"{figure['mean']:.4g}", f"{low:.4g} to {high:.4g}", f"{figure['n']:,}"


def _failure(figure: Mapping[str, Any]) -> str:
    reasons = figure.get("reasons") or {}
    return next((f"{reason} ({count})" for reason, count in reasons.items()), "")
