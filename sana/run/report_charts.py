"""Line and area charts as inline SVG.

No library, no script needed to read them, colours from the page's CSS.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 520, 264
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 34
MAX_POINTS = 600  # per line; more than the picture has columns of pixels


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: for the legend; "" for none.
        x, y: points by increasing x; y may be NaN, which leaves a gap.
        color: name of a CSS colour class of the page: "c0" to "c6", or "t0" to "t9" along a ramp.
        kind: "line", "faint" (background, such as unsmoothed values) or "dots" (line with points, for few
            values).
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    kind: Literal["line", "faint", "dots"] = "line"


def chart(
    title: str,
    caption: str,
    lines: Sequence[Line],
    *,
    log: bool = False,
    stacked: bool = False,
    percent: bool = False,
    zero: bool = False,
) -> str:
    """A `<figure>` with title, legend, picture, and caption.

    Args:
        title: what is shown, with its unit.
        caption: one sentence on how to read it.
        lines: back to front.
        log: logarithmic y axis; values that are not positive are left out.
        stacked: areas on top of each other instead of lines; all lines have the same x.
        percent: y is in [0, 1], shown in per cent from 0 to 100.
        zero: the y axis begins at zero.

    Returns:
        HTML, or "" when no line has a finite value.
    """
    lines = list(lines) if stacked else [_clean(line, log) for line in lines]
    lines = [line for line in lines if any(math.isfinite(v) for v in line.y)]
    if not lines:
        return ""
    tops = _stack(lines) if stacked else [list(line.y) for line in lines]
    x_low, x_high = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    low, high, clipped = _range(lines, tops, log, zero or stacked, percent)

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    marks = _axes(x_low, x_high, low, high, log, percent, px, py)
    floor = [0.0] * len(lines[0].x)
    for line, top in zip(lines, tops, strict=True):
        if stacked:
            marks.append(_area(line, floor, top, px, py))
            floor = top
        else:
            marks.append(_path(line, px, py))
    named = [line for line in lines if line.name]
    summary = "; ".join(f"{line.name}: {_summary(line, percent)}" for line in named)
    data = {
        "x": [LEFT, WIDTH - RIGHT, x_low, x_high],
        "lines": [
            {"n": line.name, "c": line.color, "x": list(line.x), "y": [_shown(v, percent) for v in line.y]}
            for line in named
        ],
    }
    legend = _legend(named, percent)
    note = f" The axis ends at {_tick(high)}; the line goes higher." if clipped else ""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3><ul class="legend">{legend}</ul>'
        f'<div class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}. '
        f'{escape(summary)}">{"".join(marks)}<line class="cursor" y1="{TOP}" '
        f'y2="{HEIGHT - BOTTOM}"/></svg><div class="tip" hidden></div></div>'
        f'<script type="application/json">{text}</script>'
        f"<figcaption>{escape(caption + note)}</figcaption></figure>"
    )


def clip_path() -> str:
    """The clip region that all charts refer to; it stands once in the page."""
    box = f'x="{LEFT}" y="{TOP - 4}" width="{WIDTH - LEFT - RIGHT + 6}" height="{HEIGHT - TOP - BOTTOM + 5}"'
    return f'<svg width="0" height="0" aria-hidden="true"><clipPath id="clip"><rect {box}/></clipPath></svg>'


def smooth(y: Sequence[float], window: int) -> list[float]:
    """Mean over about `window` values around each; NaN is skipped.

    The window shrinks on both sides at the start, so that a steep beginning is not dragged along, and on the right
    side alone at the end, so that the last value is still a mean.
    """
    n, half = len(y), max(0, window // 2)
    sums, counts = [0.0], [0]
    for value in y:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    out = []
    for i in range(n):
        low, high = max(0, i - half), min(n, i + min(half, i) + 1)
        count = counts[high] - counts[low]
        out.append((sums[high] - sums[low]) / count if count else math.nan)
    return out


def thin(x: Sequence[float], y: Sequence[float], points: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most about `points` points that keep the ends and, in every stretch, the lowest and highest value."""
    n = len(x)
    if n <= points:
        return list(x), list(y)
    kept = {0, n - 1}
    stretches = points // 2
    for k in range(stretches):
        inside = [i for i in range(k * n // stretches, (k + 1) * n // stretches) if math.isfinite(y[i])]
        if inside:
            kept |= {min(inside, key=y.__getitem__), max(inside, key=y.__getitem__)}
    order = sorted(kept)
    return [x[i] for i in order], [y[i] for i in order]


def common(series: Sequence[tuple[Sequence[float], Sequence[float]]], points: int = 240) -> list[list[float]]:
    """Bring series of (x, y) to the x that all have, averaged over stretches.

    [x, y_1, y_2, ...] for stacking.
    """
    maps = [dict(zip(*s, strict=True)) for s in series]
    shared = sorted(x for x in set.intersection(*map(set, maps)) if all(math.isfinite(m[x]) for m in maps))
    size = max(1, math.ceil(len(shared) / points))
    groups = [shared[i : i + size] for i in range(0, len(shared), size)]
    return [[g[-1] for g in groups]] + [[sum(m[x] for x in g) / len(g) for g in groups] for m in maps]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them, in steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], with 2 and 5 times them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low) > 3
    steps = [m * 10.0**p for p in powers for m in ((1,) if wide else (1, 2, 5))]
    inside = [s for s in steps if low * 0.999 <= s <= high * 1.001]
    return inside[:: math.ceil(len(inside) / 7)] if len(inside) > 7 else inside


def _legend(lines: Sequence[Line], percent: bool) -> str:
    """Swatch, name and last value of every line; a ramp only names its ends."""
    swatches = [f'<i class="{line.color}" title="{escape(line.name)}"></i>' for line in lines]
    if len(lines) > 7:
        return f'<li class="ramp">{escape(lines[0].name)} {"".join(swatches)} {escape(lines[-1].name)}</li>'
    values = [_shown(_last(line), percent) for line in lines]
    rows = zip(swatches, lines, values, strict=True)
    return "".join(f"<li>{swatch}{escape(line.name)} <b>{value}</b></li>" for swatch, line, value in rows)


def _clean(line: Line, log: bool) -> Line:
    y = [v if math.isfinite(v) and not (log and v <= 0) else math.nan for v in line.y]
    x, y = thin(line.x, y)
    return Line(line.name, x, y, line.color, line.kind)


def _stack(lines: Sequence[Line]) -> list[list[float]]:
    tops: list[list[float]] = []
    below = [0.0] * len(lines[0].x)
    for line in lines:
        below = [b + (v if math.isfinite(v) else 0.0) for b, v in zip(below, line.y, strict=True)]
        tops.append(below)
    return tops


def _range(
    lines: Sequence[Line], tops: Sequence[Sequence[float]], log: bool, zero: bool, percent: bool
) -> tuple[float, float, bool]:
    """Ends of the y axis, and whether it leaves out the highest values.

    A first spike must not flatten all else.
    """
    if percent:
        return 0.0, 1.0, False
    values = sorted(v for top in tops for v in top if math.isfinite(v))
    low, high = values[0], values[-1]
    usual = values[min(len(values) - 1, int(0.985 * len(values)))]
    clipped = False
    if log:
        low, high = low / 1.15, high * 1.15
        return (low, high, False) if high > low * 1.3 else (low / 2, high * 2, False)
    if zero:
        low = min(low, 0.0)
    if len(values) > 20 and high - low > 2.0 * (usual - low) > 0:
        high, clipped = low + 1.15 * (usual - low), True
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
        pad = abs(high) * 0.1 or 1.0
        return (0.0 if low >= 0 and zero else low - pad), high + pad, False
    pad = 0.05 * (high - low)
    return (low if zero and low >= 0 else low - pad), high + pad, clipped


def _axes(x_low, x_high, low, high, log, percent, px, py) -> list[str]:
    marks = []
    for y in log_ticks(low, high) if log else ticks(low, high, 4):
        label = f"{100 * y:.0f} %" if percent else _tick(y)
        marks.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
            f'<text x="{LEFT - 7}" y="{py(y) + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for x in ticks(x_low, x_high, 6):
        if x == int(x):
            anchor = "end" if px(x) > WIDTH - RIGHT - 14 else "middle"
            marks.append(f'<text x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="{anchor}">{_tick(x)}</text>')
    marks.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">updates</text>')
    return marks


def _path(line: Line, px, py) -> str:
    pieces, pen = [], "M"
    for x, y in zip(line.x, line.y, strict=True):
        if math.isfinite(y):
            pieces.append(f"{pen}{px(x):.1f} {py(y):.1f}")
            pen = "L"
        else:
            pen = "M"
    dots = ""
    if line.kind == "dots" or len(pieces) == 1:
        dots = "".join(
            f'<circle class="{line.color}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.6"/>'
            for x, y in zip(line.x, line.y, strict=True)
            if math.isfinite(y)
        )
    faint = " faint" if line.kind == "faint" else ""
    return f'<g clip-path="url(#clip)"><path class="curve {line.color}{faint}" d="{"".join(pieces)}"/>{dots}</g>'


def _area(line: Line, floor: Sequence[float], top: Sequence[float], px, py) -> str:
    there = [f"{px(x):.1f} {py(y):.1f}" for x, y in zip(line.x, top, strict=True)]
    back = [f"{px(x):.1f} {py(y):.1f}" for x, y in zip(line.x, floor, strict=True)]
    return f'<path class="area {line.color}" clip-path="url(#clip)" d="M{"L".join(there)}L{"L".join(back[::-1])}Z"/>'


def _last(line: Line) -> float:
    return next((v for v in reversed(line.y) if math.isfinite(v)), math.nan)


def _summary(line: Line, percent: bool) -> str:
    finite = [v for v in line.y if math.isfinite(v)]
    shown = [_shown(v, percent) for v in (finite[0], finite[-1], min(finite), max(finite))]
    return f"from {shown[0]} to {shown[1]}, lowest {shown[2]}, highest {shown[3]}"


def _shown(value: float, percent: bool) -> str:
    if not math.isfinite(value):
        return "none"
    return f"{100 * value:.1f} %" if percent else f"{value:.4g}"


def _tick(value: float) -> str:
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0e}".replace("e-0", "e-") if size < 1e-3 else f"{value:.4g}"
