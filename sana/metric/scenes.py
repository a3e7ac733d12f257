"""The oracle of the scenes world: finds shapes, colours, counts and places by analysis, no learned part.

How it sees. A plane is fitted to the grey background; each pixel becomes a share (alpha) of the palette
colour that explains it best over that background; connected pixels are objects, split where two colours
touch. An object's colour is that of its core. Its shape is the best of the six analytic templates, each put
where area and centroid say and compared by soft intersection over union; below `QUALITY` it has none.

How it judges. A scene is a complete description, so the picture must hold exactly the objects of the prompt,
and this is stricter than GenEval, where further objects do no harm: each entry of ``include`` takes ``count``
objects of its shape (and colour) for itself, none is left over, nothing without a recognised shape lies
about, and a relation holds by GenEval's rule (`sana.scenes.relations`). ``exclude`` then says nothing new.

Frozen by digest (`scenes_frozen.json`): no change here once a model has been judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import Any, NamedTuple, cast

import numpy as np
from scipy import ndimage

from sana.scenes import COLORS, EXTENT, SHAPES, coverage, relations

QUALITY = {"circle": 0.85, "square": 0.84, "triangle": 0.82, "star": 0.76, "cross": 0.80, "ring": 0.78}
"""Least soft intersection over union with the template of a shape that gives an object its name."""

SHARP = 0.9
"""An agreement below this one is given a second chance with blurred templates."""

SIZE_RANGE = (10.0, 40.0)
"""Diameters that a shape can have, in pixels of a 64x64 picture (the generator draws 14 to 30)."""

DUST = 12.0
"""Connected pixels fewer than this are dirt and not looked at; in pixels of a 64x64 picture."""

COLOR_RADIUS = 75.0
"""Greatest distance in RGB of an object's core from the palette colour that names it."""

_PALETTE = np.array(list(COLORS.values()), float)
_NAMES = tuple(COLORS)

_LUMA = np.array([0.299, 0.587, 0.114])
_METRIC = np.eye(3) + 20.0 * np.outer(_LUMA, _LUMA)
"""Metric of RGB for outlines: decoders and JPEG keep lightness sharper than colour, so it counts for more."""

_CONTRAST = 1.5
"""Steepening of alpha around one half: takes back some blur, and noise far from the outline with it."""


class Detection(NamedTuple):
    """One object found in a picture.

    Attributes:
        shape: one of `SHAPES`, or None when nothing fits.
        color: a name of `COLORS`, or None when none is near.
        cx, cy: centre of its box in pixels.
        size: diameter in pixels.
        quality: soft intersection over union with the best template, in [0, 1].
    """

    shape: str | None
    color: str | None
    cx: float
    cy: float
    size: float
    quality: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(cx, cy, width, height) in pixels."""
        width, height = EXTENT[self.shape] if self.shape else (1.0, 1.0)
        return self.cx, self.cy, width * self.size, height * self.size

    def __str__(self) -> str:
        return f"{self.color or 'uncoloured'} {self.shape or 'blob'}"


class Verdict(NamedTuple):
    """Whether a picture shows its prompt; ``reason`` says what is wrong, and is "" when nothing is."""

    correct: bool
    reason: str
    detections: tuple[Detection, ...]


# --- seeing -----------------------------------------------------------------------------------------


def _unit_moments() -> dict[str, tuple[float, float]]:
    """Per shape of radius 1: its area, and how far its centroid lies below the centre of its box."""
    step = 1.0 / 200
    grid = np.arange(-1.2 + step / 2, 1.2, step)
    moments = {}
    for shape in SHAPES:
        inside = coverage(shape, grid[None, :], grid[:, None], 1.0, softness=step)
        area = inside.sum()
        moments[shape] = (float(area * step**2), float((inside * grid[:, None]).sum() / area))
    return moments


_MOMENTS = _unit_moments()


def _squared(vectors: np.ndarray) -> np.ndarray:
    """Squared length along the last axis."""
    return np.einsum("...i,...i->...", vectors, vectors)


def _background(image: np.ndarray) -> np.ndarray | None:
    """The plane (h, w, 3) fitted to the background, or None where there is no plain, neutral one."""
    h, w, _ = image.shape
    edge = max(2, round(3 * min(h, w) / 64))
    border = np.ones((h, w), bool)
    border[edge:-edge, edge:-edge] = False
    y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y], axis=-1)
    plane, weights = np.broadcast_to(np.median(image[border], axis=0), image.shape), np.zeros((3, 3))
    for radius in (60.0, 45.0):
        near = _squared(image - plane) < radius**2
        if near.mean() < 0.5:
            return None
        a = terms[near]
        weights = np.linalg.solve(a.T @ a, a.T @ image[near])
        plane = terms @ weights
    middle = weights[0]  # the other terms are zero in the middle
    neutral = np.ptp(middle) <= 35.0 and 90.0 <= middle.mean() <= 245.0
    return plane if neutral else None


def _connected(mask: np.ndarray) -> list[np.ndarray]:
    """Masks of the parts of a mask that touch by their edges."""
    numbered, count = cast("tuple[np.ndarray, int]", ndimage.label(mask))
    return [numbered == i for i in range(1, count + 1)]


def _pieces(alpha: np.ndarray, label: np.ndarray, dust: float) -> list[np.ndarray]:
    """Masks of the objects: connected pixels, taken apart by colour where two colours share them."""
    pieces = []
    for mask in _connected(alpha >= 0.5):
        if mask.sum() < dust:
            continue
        core = label[mask & (alpha >= 0.8)]
        votes = np.bincount(core, minlength=len(_NAMES))
        strong = np.flatnonzero(votes >= max(dust, 0.15 * core.size))
        if len(strong) < 2:
            pieces.append(mask)
            continue
        for color in strong:
            pieces += [part for part in _connected(mask & (label == color)) if part.sum() >= dust]
    return pieces


def _steep(alpha: np.ndarray) -> np.ndarray:
    return np.clip(_CONTRAST * (alpha - 0.5) + 0.5, 0.0, 1.0)


def _shape(alpha: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, str, float, float, float]:
    """(quality, shape, cx, cy, size) of the best template for a window of alpha at offsets x (w,), y (h,)."""
    area = max(float(alpha.sum()), 1.0)
    mx, my = (alpha.sum(0) @ x) / area, (alpha.sum(1) @ y) / area

    def agreement(shape: str, grow: float, blur: float) -> tuple[float, str, float, float, float]:
        unit_area, below = _MOMENTS[shape]
        radius = grow * (area / unit_area) ** 0.5
        cx, cy = mx, my - below * radius
        template = coverage(shape, x[None, :] - cx, y[:, None] - cy, radius)
        if blur > 0.0:
            template = ndimage.gaussian_filter(template, blur, mode="constant")
        template = _steep(template)
        shared = np.minimum(alpha, template).sum()
        return float(shared / (area + template.sum() - shared)), shape, cx, cy, 2 * radius

    ranked = sorted((agreement(shape, 1.0, 0.0) for shape in SHAPES), reverse=True)
    if ranked[0][0] >= SHARP:
        return ranked[0]
    # Blurred, perhaps: so are the templates then, and as blur moves the outline, the size is free too.
    tries = [
        agreement(shape, grow, blur) for _, shape, *_ in ranked[:3] for grow in (0.94, 1.0, 1.06) for blur in (0.7, 1.4)
    ]
    return max(ranked[0], *tries)


def detect(image: np.ndarray) -> list[Detection]:
    """The objects of a picture, from left to right; none where there is no plain grey background.

    Args:
        image: uint8 (H, W, 3) sRGB, at least 16 pixels each way.

    Raises:
        ValueError: when it is something else.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 16:
        raise ValueError(f"image is {image.dtype} {image.shape}: expected uint8 (H, W, 3) of 16 pixels or more")
    pixels = image.astype(float)
    plane = _background(pixels)
    if plane is None:
        return []
    scale = min(image.shape[:2]) / 64
    dust = DUST * scale**2
    # Each pixel over the background as alpha times one palette colour, the one that leaves the least
    # residual.
    offset = pixels - plane
    rays = _PALETTE - plane[image.shape[0] // 2, image.shape[1] // 2]
    along, lengths = offset @ rays.T, _squared(rays)
    shares = np.clip(along / lengths, 0.0, 1.3)
    residual = _squared(offset)[..., None] + shares * (shares * lengths - 2.0 * along)
    label = residual.argmin(-1)
    alpha = np.take_along_axis(shares, label[..., None], -1)[..., 0]
    # What no mixture explains (white, violet, ...) is an object too.
    unexplained = np.take_along_axis(residual, label[..., None], -1)[..., 0] > 65.0**2
    pieces = _pieces(np.where(unexplained, 1.0, alpha), label, dust)
    taken = np.any([np.zeros(label.shape, bool), *pieces], axis=0)
    found = []
    for piece in pieces:
        window = _window(piece, max(2, round(2 * scale)))
        free = piece[window] | ~taken[window]
        found.append(_describe(pixels, plane, alpha, piece, free, window, scale))
    return sorted(found, key=lambda d: d.cx)


def _window(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """Rows and columns of a mask's box and a margin around it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (
        slice(max(rows[0] - margin, 0), rows[-1] + margin + 1),
        slice(max(columns[0] - margin, 0), columns[-1] + margin + 1),
    )


def _describe(
    pixels: np.ndarray,
    plane: np.ndarray,
    alpha: np.ndarray,
    piece: np.ndarray,
    free: np.ndarray,
    window: tuple[slice, slice],
    scale: float,
) -> Detection:
    """Colour and shape of one object; ``free`` are the pixels of the window that belong to no other one."""
    inside, seen, ground = piece[window], pixels[window], plane[window]
    core = inside & (alpha[window] >= 0.8)
    color = np.median(seen[core if core.sum() >= DUST / 2 * scale**2 else inside], axis=0)
    distance = _squared(_PALETTE - color)
    name = _NAMES[int(distance.argmin())] if distance.min() <= COLOR_RADIUS**2 else None
    # Alpha once more, along the object's own colour rather than the palette's.
    ray = color - ground.mean((0, 1))
    metric = _METRIC @ ray
    soft = _steep((seen - ground) @ metric / max(ray @ metric, 1.0))
    soft *= free & ndimage.binary_dilation(inside, iterations=max(2, round(2 * scale)))
    x = np.arange(window[1].start, window[1].start + inside.shape[1]) + 0.5
    y = np.arange(window[0].start, window[0].start + inside.shape[0]) + 0.5
    quality, shape, cx, cy, size = _shape(soft, x, y)
    known = quality >= QUALITY[shape] and SIZE_RANGE[0] <= size / scale <= SIZE_RANGE[1]
    return Detection(shape if known else None, name, float(cx), float(cy), float(size), quality)


# --- judging ----------------------------------------------------------------------------------------


def _fits(found: Detection, wanted: Mapping[str, Any]) -> bool:
    return found.shape == wanted["class"] and wanted.get("color", found.color) == found.color


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "nothing"


def judge(found: list[Detection], metadata: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the objects found are those of the prompt, and what is wrong if not."""
    include = metadata["include"]
    wanted = [entry for entry in include for _ in range(entry["count"])]
    seen = _listed([str(d) for d in found])
    blobs = [d for d in found if d.shape is None or d.color is None]
    if blobs:
        return False, f"unrecognised: {blobs[0]} (found {seen})"
    if len(found) != len(wanted):
        return False, f"{len(wanted)} objects asked for, {len(found)} found ({seen})"
    matches = [
        order for order in permutations(found) if all(_fits(d, entry) for d, entry in zip(order, wanted, strict=True))
    ]
    if not matches:
        shapes_right = sorted(str(d.shape) for d in found) == sorted(entry["class"] for entry in wanted)
        what = "wrong colours" if shapes_right else "wrong shapes"
        return False, f"{what}: {metadata.get('prompt', 'the prompt')!r}, found {seen}"
    for i, entry in enumerate(include):
        if "position" not in entry:
            continue
        # With a relation every entry counts one object, so that entries and objects have the same indices.
        relation, anchor = entry["position"]
        if not any(relation in relations(order[i].box, order[anchor].box) for order in matches):
            holds = relations(matches[0][i].box, matches[0][anchor].box)
            return False, f"wrong place: {relation} asked for, {_listed(list(holds))} found"
    return True, ""


def score(image: np.ndarray, metadata: Mapping[str, Any]) -> Verdict:
    """Judge a picture by a line of GenEval's metadata.

    Args:
        image: uint8 (H, W, 3) sRGB.
        metadata: ``include`` with class, count, and color and position where asked for; ``prompt`` for
            messages.

    Raises:
        ValueError: for an image of another kind, or metadata with unknown names.
    """
    for entry in metadata["include"]:
        if entry["class"] not in SHAPES or entry.get("color", "red") not in COLORS:
            raise ValueError(f"unknown shape or colour in {entry}: see sana.scenes")
        if "position" in entry and any(other["count"] != 1 for other in metadata["include"]):
            raise ValueError(f"a relation between several objects in {metadata['include']}: expected one each")
    found = detect(image)
    return Verdict(*judge(found, metadata), tuple(found))


def oracle(image: np.ndarray, metadata: Mapping[str, Any]) -> tuple[bool, str]:
    """`score` as `sana.metric.geneval_scenes` wants a scorer: (right?, reason)."""
    return score(image, metadata)[:2]
