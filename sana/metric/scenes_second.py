"""A second opinion on scenes, written apart from `sana.metric.scenes` and by other means.

It shares with the first the vocabulary and what is asked for, and no code that sees or judges: colours are
the nearest ones in CIE Lab, regions are joined by runs of pixels and union-find, and a shape is its radial
signature, the distance from the centroid to the outline in 72 directions, compared with signatures computed
from corners. Where the two disagree, one of them is wrong or the picture is on the edge: agreement is
measured in the tests.

Frozen by digest (`scenes_frozen.json`): no change here once a model has been judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sana.scenes import COLORS

DIRECTIONS = 72
"""Rays of a signature; a multiple of 3, 4 and 5, so that the corners of every shape are hit alike."""

WORST = 0.13
"""Greatest root mean square deviation from a signature, in mean radii, that is still the shape."""

WEAKEST = {"circle": 1.0, "square": 0.8, "triangle": 0.6, "star": 0.35, "cross": 0.45}
"""Least strength of a signature's ripple, relative to sharp corners: blur takes most from fine ones."""

SMALLEST, LARGEST = 10.0, 40.0
"""Extents that a shape can have, in pixels of a 64x64 picture."""

SPECK = 12.0
"""Regions of fewer pixels (of a 64x64 picture) are overlooked."""

FARTHEST = 38.0
"""Greatest CIE76 distance of an object's colour from the one that names it."""


GROUND = 22.0
"""Within this CIE76 distance of the background a pixel belongs to it."""


class Find(NamedTuple):
    """A region: its shape and colour (None: unknown) and its box (left, top, right, bottom) in pixels."""

    shape: str | None
    color: str | None
    left: float
    top: float
    right: float
    bottom: float


# --- colour -----------------------------------------------------------------------------------------

_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]])
_WHITE = _XYZ.sum(1)


def _linear_light() -> np.ndarray:
    value = np.arange(256) / 255.0
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


_LIGHT = _linear_light()


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE Lab (D65) of sRGB uint8 (..., 3)."""
    ratio = _LIGHT[rgb] @ (_XYZ / _WHITE[:, None]).T
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


_STRANGERS = {"white": (255, 255, 255), "violet": (130, 40, 200)}  # no colours of the scenes, but near some
_NAMES = (*COLORS, *_STRANGERS)
_LABS = lab(np.array([*COLORS.values(), *_STRANGERS.values()], np.uint8))


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(((a - b) ** 2).sum(-1))


_SHARPNESS = np.array([3.0, 1.0, 1.0])
"""Lightness says more than chroma about where an outline runs: decoders and JPEG blur it less."""

# --- regions ----------------------------------------------------------------------------------------


def regions(mask: np.ndarray) -> list[np.ndarray]:
    """Masks of the parts of a mask that touch by their edges: runs of rows, joined by union-find."""
    runs: list[tuple[int, int, int]] = []  # row, first column, one past the last
    parent: list[int] = []

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    previous: list[int] = []
    for row in np.flatnonzero(mask.any(1)).tolist():
        steps = np.flatnonzero(np.diff(np.concatenate(([0], mask[row].astype(np.int8), [0])))).tolist()
        current = []
        for first, last in zip(steps[::2], steps[1::2], strict=True):
            me = len(runs)
            runs.append((row, first, last))
            parent.append(me)
            current.append(me)
            for other in previous:
                above, left, right = runs[other]
                if above == row - 1 and left < last and first < right:
                    parent[root(other)] = root(me)
        previous = current
    parts: dict[int, np.ndarray] = {}
    for i, (row, first, last) in enumerate(runs):
        parts.setdefault(root(i), np.zeros(mask.shape, bool))[row, first:last] = True
    return list(parts.values())


_DISC = [(i, j) for i in range(5) for j in range(5) if (i - 2) ** 2 + (j - 2) ** 2 <= 5]


def _interior(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask whose four neighbours belong to it."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return inner


# --- shape ------------------------------------------------------------------------------------------

_ANGLES = np.arange(DIRECTIONS) * (2 * math.pi / DIRECTIONS)  # 0 is up, clockwise
_RAY_X, _RAY_Y = np.sin(_ANGLES), -np.cos(_ANGLES)


def _corners(shape: str) -> list[tuple[float, float]]:
    """The outline of a shape, y down; any size and place will do, a signature has neither."""
    if shape == "square":
        return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    if shape == "triangle":
        return [(0, -2), (math.sqrt(3), 1), (-math.sqrt(3), 1)]
    if shape == "cross":
        a = 0.36
        arm = [(a, -a), (a, -1), (-a, -1), (-a, -a)]
        quarters = [arm, [(-a, -a), (-1, -a), (-1, a), (-a, a)], [(-a, a), (-a, 1), (a, 1), (a, a)]]
        return [p for q in [*quarters, [(a, a), (1, a), (1, -a), (a, -a)]] for p in q[1:]]
    if shape == "star":
        radii = [1.0 if i % 2 == 0 else 0.45 for i in range(10)]
        return [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]
    return [(math.sin(i * math.pi / 60), -math.cos(i * math.pi / 60)) for i in range(120)]


def _signature_of_corners(corners: Sequence[tuple[float, float]]) -> np.ndarray:
    """Radii from the centroid, in units of their mean, by intersecting rays with edges."""
    area = x = y = 0.0
    edges = list(zip(corners, [*corners[1:], corners[0]], strict=True))
    for (ax, ay), (bx, by) in edges:
        cross = ax * by - bx * ay
        area, x, y = area + cross, x + (ax + bx) * cross, y + (ay + by) * cross
    x, y = x / (3 * area), y / (3 * area)
    radii = []
    for dx, dy in zip(_RAY_X, _RAY_Y, strict=True):
        reach = 0.0
        for (ax, ay), (bx, by) in edges:
            ex, ey = bx - ax, by - ay
            turn = dx * ey - dy * ex
            if abs(turn) < 1e-12:
                continue
            along = ((ax - x) * ey - (ay - y) * ex) / turn
            across = ((ax - x) * dy - (ay - y) * dx) / turn
            if -1e-9 <= across <= 1 + 1e-9:
                reach = max(reach, along)
        radii.append(reach)
    return np.array(radii) / np.mean(radii)


_SOLID = ("circle", "square", "triangle", "star", "cross")
_SIGNATURES = {shape: _signature_of_corners(_corners(shape)) for shape in _SOLID}


def _sample(field: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Values of a field between its pixel centres, bilinear; 0 outside."""
    padded = np.pad(field, 1)
    h, w = padded.shape
    x, y = np.clip(x + 0.5, 0, w - 1.001), np.clip(y + 0.5, 0, h - 1.001)
    i, j = y.astype(int), x.astype(int)
    v, u = y - i, x - j
    top = padded[i, j] * (1 - u) + padded[i, j + 1] * u
    return top * (1 - v) + (padded[i + 1, j] * (1 - u) + padded[i + 1, j + 1] * u) * v


def _trace(field: np.ndarray, reach: float) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Outer and inner radii in `DIRECTIONS` from the centroid of a field at level one half, and the centroid.

    The inner radius is where a ray that starts in a hole enters the object, 0 where it starts inside.
    """
    total = max(float(field.sum()), 1e-9)
    h, w = field.shape
    cx, cy = field.sum(0) @ (np.arange(w) + 0.5) / total, field.sum(1) @ (np.arange(h) + 0.5) / total
    step = 0.25
    radius = np.arange(0.0, reach, step)
    values = _sample(field, cx + radius[:, None] * _RAY_X, cy + radius[:, None] * _RAY_Y)
    solid = values >= 0.5
    last = len(radius) - 1 - solid[::-1].argmax(0)
    first = solid.argmax(0)
    hit = solid.any(0)
    columns = np.arange(DIRECTIONS)

    def crossing(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Where the level is met between samples a (solid) and b (not)."""
        high, low = values[a, columns], values[b, columns]
        share = (high - 0.5) / np.maximum(high - low, 1e-9)
        return radius[a] + (radius[b] - radius[a]) * np.clip(share, 0, 1)

    outer = crossing(last, np.minimum(last + 1, len(radius) - 1))
    inner = np.where(first > 0, crossing(first, np.maximum(first - 1, 0)), 0.0)
    return np.where(hit, outer, 0.0), np.where(hit, inner, 0.0), float(cx), float(cy)


def _name_shape(outer: np.ndarray, inner: np.ndarray) -> str | None:
    """The shape whose signature is nearest; a ring is a circle around a hole of about half its radius."""
    mean = outer.mean()
    if mean <= 0.0:
        return None
    ripple = outer / mean - 1.0
    errors = {}
    for shape, signature in _SIGNATURES.items():
        # Blur rounds corners off: the ripple of a shape may be weaker than that of its corners, not absent.
        ideal = signature - 1.0
        strength = np.clip(ripple @ ideal / max(ideal @ ideal, 1e-9), WEAKEST[shape], 1.1)
        errors[shape] = float(np.sqrt(((ripple - strength * ideal) ** 2).mean()))
    best = min(errors, key=errors.__getitem__)
    if errors[best] > WORST:
        return None
    holed = (inner > 0).mean()
    if holed < 0.5:
        return best
    hole = inner.mean() / mean
    return "ring" if best == "circle" and holed > 0.95 and 0.25 <= hole <= 0.72 else None


# --- seeing -----------------------------------------------------------------------------------------


def find(image: np.ndarray) -> list[Find]:
    """The regions of a picture, uint8 (H, W, 3); none without a plain grey background."""
    h, w, _ = image.shape
    unit = min(h, w) / 64
    colors = lab(image)
    flat = colors.reshape(-1, 3)
    ground = np.median(flat, axis=0)
    if np.hypot(ground[1], ground[2]) > 14.0 or not 38.0 <= ground[0] <= 97.0:
        return []
    from_ground = _distance(colors, ground)
    if (from_ground < GROUND).mean() < 0.5:
        return []
    to_names = np.sqrt(((flat[:, None, :] - _LABS) ** 2).sum(-1)).reshape(h, w, -1)
    label = to_names.argmin(-1)
    foreground = from_ground > np.clip(to_names.min(-1), GROUND, 45.0)
    found = []
    for region in regions(foreground):
        if region.sum() < SPECK * unit**2:
            continue
        inner = _interior(region)
        inner = inner if inner.sum() >= 4 else region
        votes = np.bincount(label[inner], minlength=len(_NAMES))
        large = [k for k in np.argsort(-votes) if votes[k] >= max(0.2 * votes.sum(), 8 * unit**2)]
        parts = [region] if len(large) < 2 else [region & (label == k) for k in large]
        for part, k in zip(parts, large or [int(votes.argmax())], strict=True):
            found.append(_describe(part, colors, ground, foreground, label == k, unit))
    return found


def _describe(
    part: np.ndarray,
    colors: np.ndarray,
    ground: np.ndarray,
    foreground: np.ndarray,
    named: np.ndarray,
    unit: float,
) -> Find:
    """Name one region."""
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    margin = math.ceil(2 * unit)
    top, left = max(rows[0] - margin, 0), max(columns[0] - margin, 0)
    window = (slice(top, rows[-1] + margin + 1), slice(left, columns[-1] + margin + 1))
    matter = part & named
    core = _interior(matter)
    color = np.median(colors[core if core.sum() >= 4 else matter if matter.any() else part], axis=0)
    far = _distance(_LABS, color)
    name = _NAMES[int(far.argmin())] if far.min() <= FARTHEST else None
    # From 0 on the ground to 1 in the object; one half is as far from the one as from the other.
    near = np.pad(part[window], 2)
    near = np.max([near[i : i + part[window].shape[0], j : j + part[window].shape[1]] for i, j in _DISC], axis=0)
    seen = colors[window] * _SHARPNESS
    a, b = _distance(seen, ground * _SHARPNESS), _distance(seen, color * _SHARPNESS)
    field = a / np.maximum(a + b, 1e-9)
    field[~near | (foreground[window] & ~part[window])] = 0.0
    field = np.clip((field - 0.5) * 1.6 + 0.5, 0.0, 1.0)
    outer, inner, cx, cy = _trace(field, reach=0.75 * math.hypot(*field.shape))
    x, y = left + cx + outer * _RAY_X, top + cy + outer * _RAY_Y
    extent = max(np.ptp(x), np.ptp(y)) / unit
    shape = _name_shape(outer, inner) if SMALLEST <= extent <= LARGEST else None
    return Find(
        shape,
        name if name in COLORS else None,
        float(x.min()),
        float(y.min()),
        float(x.max()),
        float(y.max()),
    )


# --- judging ----------------------------------------------------------------------------------------


def _stands(a: Find, b: Find, relation: str) -> bool:
    """GenEval's rule: beyond a tenth of the summed extents, within 60 degrees of the axis."""
    offset = []
    for a_low, a_high, b_low, b_high in (
        (a.left, a.right, b.left, b.right),
        (a.top, a.bottom, b.top, b.bottom),
    ):
        gap = (a_low + a_high - b_low - b_high) / 2
        slack = 0.1 * (a_high - a_low + b_high - b_low)
        offset.append(0.0 if abs(gap) <= slack else gap - math.copysign(slack, gap))
    along = {"left of": -offset[0], "right of": offset[0], "above": -offset[1], "below": offset[1]}[relation]
    return along > 0.5 * math.hypot(*offset)


def second(image: np.ndarray, metadata: Mapping[str, Any]) -> tuple[bool, str]:
    """Judge a picture by a line of GenEval's metadata: (right?, reason).

    Args:
        image: uint8 (H, W, 3) sRGB.
        metadata: ``include`` with class, count, and color and position where asked for.
    """
    left = find(image)
    if any(f.shape is None or f.color is None for f in left):
        return False, "something is there that has no name"
    taken: dict[int, list[Find]] = {}
    entries = list(enumerate(metadata["include"]))
    for i, wanted in sorted(entries, key=lambda e: "color" not in e[1]):  # the choosy ones first
        mine = [f for f in left if f.shape == wanted["class"] and ("color" not in wanted or f.color == wanted["color"])]
        if len(mine) < wanted["count"]:
            return (
                False,
                f"{wanted['count']} {wanted.get('color', '')} {wanted['class']} wanted, {len(mine)} there",
            )
        taken[i] = mine[: wanted["count"]]
        left = [f for f in left if f not in taken[i]]
    if left:
        return False, f"{len(left)} more than wanted"
    for i, wanted in entries:
        if "position" in wanted:
            relation, anchor = wanted["position"]
            if not _stands(taken[i][0], taken[anchor][0], relation):
                return False, f"not {relation}"
    return True, ""
