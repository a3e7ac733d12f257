"""The words of the scenes world and their meaning: shapes, colours, relations, prompts, held-out
combinations.

A leaf like `sana.types`: the generator (`sana.data.synthetic`), the scorers (`sana.metric.scenes`) and the
tiny text encoder all agree on what is written here, and none of them imports another. Coordinates are
pixels, x to the right and y down; the centre of the pixel in row i and column j is (j + 0.5, i + 0.5).

Held-out combinations. A *combination* is (colour, shape, relation), relation being one of `ROLES`:

* ``alone``: the object is the only one of its scene ("a red circle");
* ``and``: the scene has exactly two objects, wherever they are ("a red circle and a blue square");
* ``left of``, ``right of``, ``above``, ``below``: the scene has exactly two objects and this one stands so
  to the other, by the rule `relations` (a diagonal neighbour has two of them).

There are 8 x 6 x 6 = 288. `HELD_OUT` has 36 of them (12.5 %): one colour for each (shape, relation), such
that no (colour, shape) pair is held out in more than one relation, no colour twice in one relation, and
each colour 4 to 6 times. No training scene of one or two objects contains one of them, whatever its task
and whether its prompt names colours or not, so that no true caption could state one; scenes of three or
four objects have no such relation.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (255, 140, 0),
    "yellow": (250, 235, 50),
    "green": (25, 160, 60),
    "cyan": (30, 205, 225),
    "blue": (35, 60, 220),
    "pink": (240, 80, 190),
    "black": (20, 20, 25),
}
"""Name -> sRGB uint8. No two are nearer than 107 in RGB, none nearer than 115 to a grey of 140 to 223."""

RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOR_TASKS = ("colors", "position", "color_attr")
"""The tasks whose prompts name colours (position: about half of them): those that have held-out prompts."""

NUMBERS = ("zero", "one", "two", "three", "four")

ROLES = ("alone", "and", *RELATIONS)


def _held_out() -> frozenset[tuple[str, str, str]]:
    colors = tuple(COLORS)
    # Both strides are odd, hence invertible modulo 8: distinct colours along either axis.
    return frozenset(
        (colors[(3 * s + 5 * r + 1) % len(colors)], shape, role)
        for s, shape in enumerate(SHAPES)
        for r, role in enumerate(ROLES)
    )


HELD_OUT: frozenset[tuple[str, str, str]] = _held_out()


def relations(a: Sequence[float], b: Sequence[float], margin: float = 0.1) -> tuple[str, ...]:
    """Which relations box ``a`` has to box ``b``, by GenEval's rule (Ghosh et al. 2023, evaluation code).

    Args:
        a, b: (cx, cy, width, height) in pixels.
        margin: share of the summed widths (heights) by which an offset is shortened before its direction
            counts.

    Returns:
        Zero, one or two of `RELATIONS`: those within 60 degrees of the shortened offset.
    """
    dx, dy = a[0] - b[0], a[1] - b[1]
    dx = math.copysign(max(abs(dx) - margin * (a[2] + b[2]), 0.0), dx)
    dy = math.copysign(max(abs(dy) - margin * (a[3] + b[3]), 0.0), dy)
    norm = math.hypot(dx, dy)
    if norm == 0.0:
        return ()
    holds = (dx / norm < -0.5, dx / norm > 0.5, dy / norm < -0.5, dy / norm > 0.5)
    return tuple(name for name, true in zip(RELATIONS, holds, strict=True) if true)


# --- shapes ---------------------------------------------------------------------------------------

_TRIANGLE = math.sqrt(3.0) / 2.0
_STAR_OUTER, _STAR_INNER = 1.05, 0.45
_STAR_SHIFT = _STAR_OUTER * (1.0 - math.cos(math.pi / 5.0)) / 2.0
_CROSS_ARM = 0.36
_RING_HOLE = 0.5
_SQUARE = 0.9

EXTENT: dict[str, tuple[float, float]] = {
    "circle": (1.0, 1.0),
    "square": (_SQUARE, _SQUARE),
    "triangle": (1.0, _TRIANGLE),
    "star": (_STAR_OUTER * math.sin(math.radians(72.0)), _STAR_OUTER - _STAR_SHIFT),
    "cross": (1.0, 1.0),
    "ring": (1.0, 1.0),
}
"""Half width and half height of each shape of size 2 (radius 1); the centre of its box is its place."""


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline of a shape centred at the origin: negative inside, in pixels.

    It is exact along the edges; beyond corners it may be shorter than the true one, which anti-aliasing
    does not see.

    Args:
        shape: one of `SHAPES`.
        x, y: offsets from the centre of the shape's box in pixels, broadcastable.
        radius: half of the size in pixels.

    Raises:
        ValueError: for an unknown shape.
    """
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        middle = 0.5 * (1.0 + _RING_HOLE) * radius
        return np.abs(np.hypot(x, y) - middle) - 0.5 * (1.0 - _RING_HOLE) * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - _SQUARE * radius
    if shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        long, short = radius, _CROSS_ARM * radius
        return np.minimum(np.maximum(ax - long, ay - short), np.maximum(ax - short, ay - long))
    if shape == "triangle":
        # Equilateral, side 2 radius, apex up: the base, and the two sides by symmetry.
        side = _TRIANGLE * np.abs(x) - 0.5 * (y + _TRIANGLE * radius)
        return np.maximum(side, y - _TRIANGLE * radius)
    if shape == "star":
        outer = _STAR_OUTER * radius
        inner = _STAR_INNER * outer
        x, up = np.abs(x), -(y - _STAR_SHIFT * radius)
        # Five-fold symmetry: turn each point into the sector around the nearest tip, then mirror it.
        angle = np.arctan2(x, up)
        fold = np.abs(angle - 2 * math.pi / 5 * np.round(angle / (2 * math.pi / 5)))
        length = np.hypot(x, up)
        px, py = length * np.sin(fold), length * np.cos(fold)
        ex, ey = inner * math.sin(math.pi / 5), inner * math.cos(math.pi / 5) - outer
        return (-px * ey + (py - outer) * ex) / math.hypot(ex, ey)
    raise ValueError(f"unknown shape {shape!r}: expected one of {', '.join(SHAPES)}")


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float, softness: float = 1.0) -> np.ndarray:
    """Share of each pixel inside the shape, in [0, 1]: a ramp of ``softness`` pixels across the outline."""
    return np.clip(0.5 - signed_distance(shape, x, y, radius) / softness, 0.0, 1.0)


# --- words ----------------------------------------------------------------------------------------


def plural(shape: str) -> str:
    """ "circles", "crosses"."""
    return shape + ("es" if shape.endswith("s") else "s")


def article(noun: str) -> str:
    """``noun`` with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def noun(entry: dict[str, Any]) -> str:
    """The phrase for one entry of GenEval's ``include``: "a red circle", "three circles"."""
    color = f"{entry['color']} " if "color" in entry else ""
    if entry["count"] == 1:
        return article(color + entry["class"])
    return f"{NUMBERS[entry['count']]} {color}{plural(entry['class'])}"


def prompt(tag: str, include: Sequence[dict[str, Any]]) -> str:
    """The plain prompt of a GenEval entry. In ``position`` the second entry stands to the first."""
    if tag == "position":
        return f"{noun(include[1])} {include[1]['position'][0]} {noun(include[0])}"
    return " and ".join(noun(entry) for entry in include)


_CAPTION_WORDS = (
    "a an and of on the to with some several one two three four photo picture image drawing showing shows "
    "plain light dark grey background small large shape shapes something left right above below"
)


def vocabulary() -> list[str]:
    """Every word that a prompt or a caption can hold, sorted; all lower case, no punctuation."""
    words = {*_CAPTION_WORDS.split(), *COLORS, *SHAPES, *map(plural, SHAPES)}
    return sorted(words)


# --- prompts to be judged on ----------------------------------------------------------------------


def combinations(metadata: dict[str, Any]) -> set[tuple[str, str, str]]:
    """The (colour, shape, relation) combinations that a GenEval prompt states; empty without colours."""
    found: set[tuple[str, str, str]] = set()
    include = metadata["include"]
    total = sum(entry["count"] for entry in include)
    for i, entry in enumerate(include):
        if "color" not in entry or total > 2:
            continue
        pair = (entry["color"], entry["class"])
        found.add((*pair, "alone" if total == 1 else "and"))
        for other in include:
            if "position" in other:
                relation, anchor = other["position"]
                if other is entry:
                    found.add((*pair, relation))
                elif anchor == i:
                    found.add((*pair, OPPOSITE[relation]))
    return found


def entry(tag: str, include: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of GenEval's metadata: tag, include, exclude (one more than asked for), prompt."""
    exclude = [{"class": e["class"], "count": e["count"] + 1} for e in include] if tag == "counting" else []
    return {"tag": tag, "include": include, "exclude": exclude, "prompt": prompt(tag, include)}


def _one(shape: str, color: str | None = None) -> dict[str, Any]:
    return {"class": shape, "count": 1} | ({} if color is None else {"color": color})


@cache
def _all_entries(tag: str, named: bool) -> list[dict[str, Any]]:
    """Every prompt of a task, naming colours or not; cached, so copy before changing one."""
    pairs = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    colored = [(c, d) for c in COLORS for d in COLORS if c != d]
    if tag == "single_object" and not named:
        return [entry(tag, [_one(shape)]) for shape in SHAPES]
    if tag == "counting" and not named:
        return [entry(tag, [{"class": shape, "count": n}]) for shape in SHAPES for n in (2, 3, 4)]
    if tag == "colors" and named:
        return [entry(tag, [_one(shape, color)]) for shape in SHAPES for color in COLORS]
    if tag == "two_object" and not named:
        return [entry(tag, [_one(a), _one(b)]) for a, b in pairs]
    if tag == "color_attr" and named:
        return [entry(tag, [_one(a, c), _one(b, d)]) for a, b in pairs for c, d in colored]
    if tag == "position":
        return [
            entry(tag, [_one(a, c), _one(b, d) | {"position": [relation, 0]}])
            for relation in RELATIONS
            for a, b in pairs
            for c, d in (colored if named else [(None, None)])
        ]
    return []


def eval_prompts(per_task: int, seed: int, held_out: bool = False) -> list[dict[str, Any]]:
    """Prompts to judge a model on, task by task, as lines of GenEval's metadata.

    All different prompts of a task come before one is repeated (single_object has 6, counting 18, colors
    42), every second one of position names colours, and a longer list begins like a shorter one within each
    task.

    Args:
        per_task: prompts of each task.
        seed: of the order.
        held_out: False: the six tasks, no prompt stating a held-out combination. True: the tasks of
            `COLOR_TASKS`, each prompt with colours and stating at least one held-out combination.

    Raises:
        ValueError: when ``per_task`` is not positive.
    """
    if per_task < 1:
        raise ValueError(f"per_task is {per_task}: expected at least 1")
    chosen: list[dict[str, Any]] = []
    for tag in COLOR_TASKS if held_out else TASKS:
        pools = []
        for named in (True,) if held_out else (True, False):
            pool = [e for e in _all_entries(tag, named) if bool(combinations(e) & HELD_OUT) == held_out]
            rng = random.Random(f"{seed}/{tag}/{named}/{held_out}")
            order = sorted((rng.random(), i) for i in range(len(pool)))
            pools += [[pool[i] for _, i in order]] if pool else []
        # Position has two pools, with and without colours, and takes from them in turn.
        turns = ((pools[i % len(pools)], i // len(pools)) for i in range(per_task))
        chosen += [copy.deepcopy(pool[i % len(pool)]) for pool, i in turns]
    return chosen
