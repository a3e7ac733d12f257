"""A room under a moving camera: ray-cast, so that pose, intrinsics and depth of every pixel are exact.

Walls have chequers of their own hue, boxes stand on the floor, and lamps (spheres of one plain colour) hang in the air.
Cameras move in all six degrees of freedom; the mean of all paths is to stand still. Captions say what is there, never
how the camera moves. Axes and pixels as in `sana.types.World`: y points down, so the floor is at +y.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from sana.data.moving import Moving, check_size, facts_of
from sana.data.world import Camera
from sana.scenes import COLORS, article

HALF = (4.0, 1.5, 4.0)  # metres from the centre of the room to its walls
CLEAR = 0.3  # metres that the camera keeps from everything
_SAMPLES = 2  # rays per pixel and axis
_WALLS = ((150, 120, 110), (120, 150, 125), (150, 150, 155), (125, 110, 95), (120, 125, 155), (150, 140, 110))
_LAMPS = ("red", "orange", "green", "blue", "pink", "cyan")


@dataclass(frozen=True)
class Room:
    """What stands in a room.

    Attributes:
        lamps: (n, 3) centres, and (n,) radii, metres.
        colors: n names of `sana.scenes.COLORS`.
        boxes: (m, 2, 3) lowest and highest corners.
        shades: (m, 3) colours of the boxes.
    """

    lamps: np.ndarray
    radii: np.ndarray
    colors: tuple[str, ...]
    boxes: np.ndarray
    shades: np.ndarray

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Metres from points (n, 3) to the nearest surface, negative inside things and outside of the room."""
        walls = (np.array(HALF) - np.abs(points)).min(axis=1)
        lamps = np.linalg.norm(points[:, None] - self.lamps, axis=2) - self.radii
        outside = np.maximum(self.boxes[:, 0] - points[:, None], points[:, None] - self.boxes[:, 1])
        boxes = np.linalg.norm(np.maximum(outside, 0), axis=2) + np.minimum(outside.max(axis=2), 0)
        return np.minimum(walls, np.concatenate([lamps, boxes], axis=1).min(axis=1))


def room(seed: int, index: int, frames: int = 17, fps: float = 16.0, size: int = 64) -> Moving:
    """A room seen along a path; arguments as in `sana.data.moving.shapes`.

    Returns:
        The video and its camera; facts["objects"] has color, centre (metres, world) and radius of each lamp.
    """
    check_size(frames, fps, size)
    place, camera = furnished(seed, index, frames, size)
    seen = [look(place, camera.pose[k], camera.intrinsics[k], size) for k in range(frames)]
    pictures, depths = np.stack([picture for picture, _ in seen]), np.stack([depth for _, depth in seen])
    objects = [
        {"shape": "lamp", "color": color, "centre": [float(x) for x in centre], "radius": float(radius)}
        for color, centre, radius in zip(place.colors, place.lamps, place.radii, strict=True)
    ]
    # A pixel that is all lamp has exactly its colour: only what is seen is told.
    names = [article(f"{c} lamp") for c in place.colors if (pictures == np.array(COLORS[c], np.uint8)).all(-1).any()]
    text = f"a room with {' and '.join(names)}" if names else "a room without lamps"
    captions = [{"source": "scene", "text": text, "score": 28.0}]
    facts = facts_of(index, captions, objects, frames, fps, size, mean_flow(depths, camera))
    return Moving(pictures, facts, camera)


def furnished(seed: int, index: int, frames: int, size: int) -> tuple[Room, Camera]:
    """What `room` draws: the room of (seed, index), and a path through it that keeps clear of everything."""
    rng = random.Random((seed << 64) + index)
    while True:
        place = _furnish(rng)
        camera = _walk(rng, place, frames, size)
        if camera is not None:
            return place, camera


def look(place: Room, pose: np.ndarray, intrinsics: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One frame: (size, size, 3) uint8, and the depth along the axis through each pixel's first ray, (size, size).

    Each pixel is the mean of `_SAMPLES` x `_SAMPLES` rays.
    """
    fine = (np.arange(size * _SAMPLES) + 0.5) / _SAMPLES
    u, v = np.meshgrid(fine, fine)
    local = np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3) @ np.linalg.inv(intrinsics).T
    colour, depth = _cast(place, pose[:3, 3], local @ pose[:3, :3].T)
    colour = colour.reshape(size, _SAMPLES, size, _SAMPLES, 3).mean(axis=(1, 3))
    return (colour + 0.5).astype(np.uint8), depth.reshape(size * _SAMPLES, -1)[::_SAMPLES, ::_SAMPLES]


def mean_flow(depths: np.ndarray, camera: Camera) -> float:
    """Mean length of the optical flow from each frame to the next, pixels per frame, over what stays before the camera.

    Args:
        depths: (f, h, w) along the axis, at the first of each pixel's rays.
    """
    height, width = depths.shape[1:]
    first = 0.5 / _SAMPLES
    u, v = np.meshgrid(np.arange(width) + first, np.arange(height) + first)
    pixels = np.stack([u, v], axis=-1).reshape(-1, 2)
    total = []
    for k in range(len(depths) - 1):
        rays = np.column_stack([pixels, np.ones(len(pixels))]) @ np.linalg.inv(camera.intrinsics[k]).T
        points = (rays * depths[k].reshape(-1, 1)) @ camera.pose[k, :3, :3].T + camera.pose[k, :3, 3]
        seen, depth = camera.at(np.array([k + 1])).project(points)
        ahead = depth[0] > 0.1
        total.append(np.linalg.norm(seen[0] - pixels, axis=1)[ahead].mean())
    return float(np.mean(total))


def _cast(place: Room, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours (n, 3) in [0, 255] and depths (n,) of what rays of unit depth hit first."""
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1.0 / rays
    walls = (np.where(rays > 0, np.array(HALF), -np.array(HALF)) - origin) * inverse
    axis = np.nanargmin(walls, axis=1)
    depth = walls[np.arange(len(rays)), axis]
    side = 2 * axis + (rays[np.arange(len(rays)), axis] > 0)
    colour = _chequered(np.array(_WALLS, float)[side], origin + depth[:, None] * rays, axis, 1.0)
    for corners, shade in zip(place.boxes, place.shades, strict=True):
        low, high = (corners[0] - origin) * inverse, (corners[1] - origin) * inverse
        enter, leave = np.minimum(low, high), np.maximum(low, high)
        face, near = enter.argmax(axis=1), enter.max(axis=1)
        hit = (near < leave.min(axis=1)) & (near > 0) & (near < depth)
        points = origin + near[hit, None] * rays[hit]
        colour[hit] = _chequered(np.broadcast_to(shade, points.shape), points, face[hit], 0.25)
        depth = np.where(hit, near, depth)
    square = (rays**2).sum(axis=1)
    for centre, radius, name in zip(place.lamps, place.radii, place.colors, strict=True):
        along = rays @ (centre - origin) / square
        inside = along**2 - (np.dot(centre - origin, centre - origin) - radius**2) / square
        near = along - np.sqrt(np.maximum(inside, 0))
        hit = (inside > 0) & (near > 0) & (near < depth)
        colour[hit] = COLORS[name]
        depth = np.where(hit, near, depth)
    return colour, depth


def _chequered(shade: np.ndarray, points: np.ndarray, axis: np.ndarray, side: float) -> np.ndarray:
    """A surface's colour: darker in every other cell of `side` metres, and by the way it faces."""
    cells = np.floor(points / side + 0.013).astype(int)
    cells[np.arange(len(cells)), axis] = 0  # across the surface rounding would decide
    dark = np.where(cells.sum(axis=1) % 2, 0.62, 1.0) * np.array([0.85, 1.0, 0.92])[axis]
    return shade * dark[:, None]


def _furnish(rng: random.Random) -> Room:
    colors = tuple(rng.sample(_LAMPS, rng.randint(2, 4)))
    lamps = [[rng.uniform(-h + 0.7, h - 0.7) for h in HALF] for _ in colors]
    boxes, shades = [], []
    for _ in range(rng.randint(2, 4)):
        x, z = rng.uniform(-3.2, 3.2), rng.uniform(-3.2, 3.2)
        wide, deep, tall = rng.uniform(0.2, 0.6), rng.uniform(0.2, 0.6), rng.uniform(0.5, 2.2)
        boxes.append([[x - wide, HALF[1] - tall, z - deep], [x + wide, HALF[1], z + deep]])
        shades.append([rng.uniform(90, 190) for _ in range(3)])
    radii = [rng.uniform(0.2, 0.35) for _ in colors]
    return Room(np.array(lamps), np.array(radii), colors, np.array(boxes), np.array(shades))


def _walk(rng: random.Random, place: Room, frames: int, size: int) -> Camera | None:
    """A smooth path; None where it comes too near to something."""
    t = np.linspace(0.0, 1.0, frames)

    def smooth(reach: float) -> np.ndarray:
        line, wave, phase = rng.uniform(-reach, reach), rng.uniform(-reach, reach) / 3, rng.random()
        return line * t + wave * (np.sin(2 * math.pi * (t + phase)) - math.sin(2 * math.pi * phase))

    start = np.array([rng.uniform(-2.5, 2.5), rng.uniform(-0.5, 0.7), rng.uniform(-2.5, 2.5)])
    origin = start + np.stack([smooth(1.0), smooth(0.3), smooth(1.0)], axis=1)
    if place.distance(origin).min() < CLEAR:
        return None
    yaw, pitch, roll = rng.uniform(-math.pi, math.pi) + smooth(0.6), smooth(0.2), smooth(0.15)
    pose = np.tile(np.eye(4), (frames, 1, 1))
    pose[:, :3, :3] = _turn(yaw, 1) @ _turn(pitch, 0) @ _turn(roll, 2)
    pose[:, :3, 3] = origin
    focal = size / 2 / math.tan(math.radians(rng.uniform(40.0, 100.0)) / 2)
    centre = [size / 2, size / 2]
    if rng.random() < 0.2:
        centre = [x + rng.uniform(-0.1, 0.1) * size for x in centre]
    k = np.array([[focal, 0.0, centre[0]], [0.0, focal, centre[1]], [0.0, 0.0, 1.0]])
    return Camera(pose, np.tile(k, (frames, 1, 1)))


def _turn(angle: np.ndarray, axis: int) -> np.ndarray:
    """(f, 3, 3) rotations about an axis."""
    c, s = np.cos(angle), np.sin(angle)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    result = np.tile(np.eye(3), (len(angle), 1, 1))
    result[:, i, i], result[:, i, j], result[:, j, i], result[:, j, j] = c, -s, s, c
    return result
