"""Moving scenes with exact motion: small videos of shapes whose places are known in every frame.

`shapes` draws two-dimensional shapes on their paths; `sana.data.room` draws a room under a moving camera. Both are
functions of (seed, index) alone, so that what a reader or a model makes of them can be judged against the truth.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from sana.data.world import Camera
from sana.scenes import COLORS, SHAPES, article, coverage

GENERATOR = "moving-1"  # changes whenever the same (seed, index) gives another video
_GAP = 2.0  # pixels between the boxes of two shapes, and to the border, of 64
_DIRECTIONS = ("right", "down", "left", "up")


@dataclass(frozen=True)
class Moving:
    """A video and the truth about it.

    Attributes:
        frames: (f, size, size, 3) uint8 RGB.
        facts: what its JSON says: captions, size, rate, motion score, objects with their places.
        camera: of each frame, for scenes in space.
    """

    frames: np.ndarray
    facts: dict[str, Any]
    camera: Camera | None = None


@dataclass(frozen=True)
class Path:
    """Where a shape is at a time: a straight line and a swing around it.

    Attributes:
        start: (x, y) at time 0, pixels.
        velocity: pixels per second.
        swing: (x, y) amplitude, pixels.
        period, phase: of the swing, in seconds and turns.
    """

    start: tuple[float, float]
    velocity: tuple[float, float]
    swing: tuple[float, float]
    period: float
    phase: float

    def at(self, seconds: np.ndarray) -> np.ndarray:
        """(n, 2) places at (n,) times."""
        wave = np.sin(2 * math.pi * (seconds / self.period + self.phase)) - math.sin(2 * math.pi * self.phase)
        return np.outer(seconds, self.velocity) + np.outer(wave, self.swing) + np.array(self.start)


def check_size(frames: int, fps: float, size: int) -> None:
    """Refuse what cannot be written as a video; raises `ValueError`."""
    if frames < 2 or not fps > 0 or size < 16 or size % 2:
        raise ValueError(
            f"{frames} frames of {size} pixels at {fps:g} per second: "
            "expected 2 frames or more, an even size of 16 or more, and a positive rate"
        )


def shapes(seed: int, index: int, frames: int = 17, fps: float = 16.0, size: int = 64) -> Moving:
    """One to three shapes of different colours on paths that neither meet nor leave the picture.

    Args:
        seed, index: integers in [0, 2**63).
        frames, fps, size: length, rate and side of the video.

    Returns:
        The video; facts["objects"] has shape, color, size (pixels) and track, the centre (x, y) in each frame.
    """
    check_size(frames, fps, size)
    rng = random.Random((seed << 64) + index)
    times = np.arange(frames) / fps
    colors = rng.sample(sorted(COLORS), rng.choice((1, 1, 2, 3)))
    objects: list[dict[str, Any]] = []
    tracks: list[np.ndarray] = []
    scale = size / 64
    while len(objects) < len(colors):
        shape = rng.choice(SHAPES)
        diameter = rng.uniform(11.0, 17.0) * scale
        path = _path(rng, frames / fps, scale)
        track = path.at(times)
        if not _fits(track, diameter, size, scale, list(zip(tracks, objects, strict=True))):
            continue
        tracks.append(track)
        objects.append({"shape": shape, "color": colors[len(objects)], "size": diameter})
    pictures, area = _draw(objects, tracks, rng.uniform(150.0, 212.0), size)
    steps = [np.linalg.norm(np.diff(track, axis=0), axis=1).mean() for track in tracks]
    motion = float(np.dot(area, steps)) / size**2
    for thing, track in zip(objects, tracks, strict=True):
        thing["track"] = [[round(float(x), 4), round(float(y), 4)] for x, y in track]
        thing["size"] = round(thing["size"], 4)
    return Moving(pictures, facts_of(index, _caption(objects, tracks), objects, frames, fps, size, motion))


def facts_of(
    index: int,
    captions: list[dict[str, Any]],
    objects: list[dict[str, Any]],
    frames: int,
    fps: float,
    size: int,
    motion: float,
) -> dict[str, Any]:
    """The JSON of a moving scene. `motion` is its mean optical flow in pixels per frame."""
    return {
        "key": f"{index:08d}",
        "prompt": captions[0]["text"],
        "captions": captions,
        "width": size,
        "height": size,
        "frames": frames,
        "fps": fps,
        "motion": round(motion, 5),
        "objects": objects,
        "index": index,
    }


def _path(rng: random.Random, seconds: float, scale: float) -> Path:
    """Half of the paths are straight; all directions are equally likely."""
    angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(6.0, 30.0) * scale
    velocity = (length * math.cos(angle) / seconds, length * math.sin(angle) / seconds)
    swing = rng.uniform(2.0, 5.0) * scale if rng.random() < 0.5 else 0.0
    across = (-swing * math.sin(angle), swing * math.cos(angle))
    start = (rng.uniform(8.0, 56.0) * scale, rng.uniform(8.0, 56.0) * scale)
    return Path(start, velocity, across, seconds * rng.uniform(0.6, 1.2), rng.random())


def _fits(
    track: np.ndarray, diameter: float, size: int, scale: float, others: list[tuple[np.ndarray, dict[str, Any]]]
) -> bool:
    edge = diameter / 2 + _GAP * scale
    if track.min() < edge or track.max() > size - edge:
        return False
    return all(
        (np.abs(track - other).max(axis=1) > (diameter + thing["size"]) / 2 + _GAP * scale).all()
        for other, thing in others
    )


def _draw(
    objects: list[dict[str, Any]], tracks: list[np.ndarray], grey: float, size: int
) -> tuple[np.ndarray, list[float]]:
    """(f, size, size, 3) uint8, and the area of each shape in pixels."""
    centres = np.arange(size) + 0.5
    pictures = np.full((len(tracks[0]), size, size, 3), grey)
    area = []
    for thing, track in zip(objects, tracks, strict=True):
        inside = np.stack(
            [coverage(thing["shape"], centres[None] - x, centres[:, None] - y, thing["size"] / 2) for x, y in track]
        )
        pictures += inside[..., None] * (np.array(COLORS[thing["color"]], float) - pictures)
        area.append(float(inside.sum()) / len(track))
    return (pictures + 0.5).astype(np.uint8), area


def _caption(objects: list[dict[str, Any]], tracks: list[np.ndarray]) -> list[dict[str, Any]]:
    """Two captions: with the motion of the first shape, and without."""
    names = [article(f"{thing['color']} {thing['shape']}") for thing in objects]
    scene = " and ".join(names)
    x, y = tracks[0][-1] - tracks[0][0]
    turn = round(math.atan2(y, x) / (math.pi / 2)) % 4
    return [
        {"source": "plain", "text": f"{names[0]} moving {_DIRECTIONS[turn]}" + _rest(names[1:]), "score": 30.0},
        {"source": "scene", "text": scene, "score": 26.0},
    ]


def _rest(names: list[str]) -> str:
    return "".join(f" and {name}" for name in names)


def example(seed: int, index: int, kind: str = "shapes", frames: int = 17, fps: float = 16.0, size: int = 64) -> Moving:
    """A moving scene of a kind: "shapes" or "room"; see `shapes` and `sana.data.room.room`."""
    if kind == "shapes":
        return shapes(seed, index, frames, fps, size)
    if kind == "room":
        from sana.data.room import room

        return room(seed, index, frames, fps, size)
    raise ValueError(f"{kind!r} is no kind of moving scene: expected shapes or room")
