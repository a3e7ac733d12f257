"""Rows of a benchmark: a file that is whole after every row, a table to read, bars to look at."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

PEERS = ("eager", "compiled", "naive")
"""What ours is held against: diffusers (or its expression in torch) as it is, compiled, and our own naive way."""


@dataclass
class Row:
    """One thing measured.

    Attributes:
        stage, name, shape, dtype: which; together they are the row's key.
        ms: side -> median, min (ms) and repeats.
        ratio: peer -> its median time over ours, both from the same turns.
        error: side -> |out - reference| / |reference|, the reference in at least fp32.
        floor_ms: the roofline's, for the least work that gives the result.
        predicted_ms: the roofline's, for the kernels that ours runs.
        bars: what the row has to reach: a peer's name -> least ratio, "ms" -> most milliseconds, "mfu" -> least.
        facts: what else was found, such as mfu.
        failed: side -> why it has no number.
    """

    stage: str
    name: str
    shape: str
    dtype: str
    ms: dict[str, dict[str, float]] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    floor_ms: float | None = None
    predicted_ms: float | None = None
    bars: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What no other row is called."""
        return " | ".join((self.stage, self.name, self.shape, self.dtype))

    def take(self, times: Mapping[str, list[float]]) -> None:
        """Times in ms of sides that took turns."""
        for side, one in times.items():
            self.ms[side] = {"median": median(one), "min": min(one), "repeats": len(one)}
        if times.get("ours"):
            for side, one in times.items():
                if side != "ours":
                    self.ratio[side] = median(one) / median(times["ours"])

    def reached(self) -> dict[str, bool | None]:
        """Bar -> whether it is reached; None: nothing was measured."""
        found: dict[str, bool | None] = {}
        for bar, least in self.bars.items():
            if bar == "ms":
                found[bar] = self.ms["ours"]["median"] <= least if "ours" in self.ms else None
            else:
                value = self.facts.get(bar) if bar == "mfu" else self.ratio.get(bar)
                found[bar] = None if value is None else value >= least
        return found


class Book:
    """Rows in a file, which is replaced whole after each of them.

    Args:
        path: of the JSON; rows that it holds are read. None: kept in memory alone.
        about: facts of the machine and the run, written beside the rows.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any] | None = None) -> None:
        self.path, self.about, self.rows = path, dict(about or {}), {}
        if path is not None and path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            self.about = held.get("about", {}) | self.about
            for one in held["rows"]:
                one.pop("reached", None)
                row = Row(**one)
                self.rows[row.key] = row

    def put(self, row: Row) -> None:
        """Add or replace a row and write the file."""
        self.rows[row.key] = row
        if self.path is None:
            return
        rows = [asdict(one) | {"reached": one.reached()} for one in self.rows.values()]
        text = json.dumps({"about": self.about, "rows": rows}, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(text + "\n", encoding="utf-8")
        os.replace(beside, self.path)


def table(rows: Iterable[Row]) -> str:
    """The rows as text, widths made to fit."""
    head = ["what", "shape", "ours ms", "eager", "compiled", "naive", "floor", "predicted", "error", "peer's", "bars"]
    lines = [head]
    for row in rows:
        mine = row.ms.get("ours")
        line = [f"{row.stage}: {row.name}", f"{row.shape} {row.dtype}", _number(mine["median"] if mine else None)]
        line += [f"{row.ratio[peer]:.2f}x" if peer in row.ratio else "-" for peer in PEERS]
        line += [_number(row.floor_ms), _number(row.predicted_ms)]
        line += [f"{row.error[side]:.1e}" if side in row.error else "-" for side in ("ours", "eager")]
        words = {True: "met", False: "missed", None: "not measured yet"}
        line.append(", ".join(f"{bar} {least:g}: {words[row.reached()[bar]]}" for bar, least in row.bars.items()))
        line[-1] += "".join(f" [{side}: {why[:90]}]" for side, why in row.failed.items())
        line[-1] += "".join(f" {name}={value:.3g}" for name, value in row.facts.items() if isinstance(value, float))
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    return "\n".join(
        " ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1]]) for line in lines
    )


def plot(rows: Iterable[Row], path: Path) -> None:
    """Bars of how many times faster ours is than each peer; 1 is marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.ratio]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.45 * max(1, len(rows))))
    colours = {"eager": "tab:blue", "compiled": "tab:orange", "naive": "tab:grey"}
    for i, row in enumerate(rows):
        for j, peer in enumerate(PEERS):
            if peer in row.ratio:
                axes.barh(i + 0.27 * (j - 1), row.ratio[peer], 0.25, color=colours[peer])
                axes.text(row.ratio[peer], i + 0.27 * (j - 1), f" {row.ratio[peer]:.2f}", va="center", fontsize=6)
    axes.set_yticks(range(len(rows)), [f"{row.stage}: {row.name}\n{row.shape} {row.dtype}" for row in rows], fontsize=6)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time of the peer / ours")
    axes.legend([pyplot.Rectangle((0, 0), 1, 1, color=colours[p]) for p in PEERS], PEERS, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
