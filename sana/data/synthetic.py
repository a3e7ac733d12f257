"""Scenes: seeded pictures of 1 to 4 plain shapes with prompts of GenEval's six tasks and four captions each.

Everything is a pure function of (seed, index): a scene is drawn from Python's Mersenne twister, whose
``random()`` is the same on every version and machine, and is rendered with float64 numpy. What the words
mean, and which combinations of colour, shape and relation are held out of training, is written in
`sana.scenes`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from sana.scenes import (
    COLOR_TASKS,
    COLORS,
    EXTENT,
    HELD_OUT,
    NUMBERS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    TASKS,
    article,
    coverage,
    entry,
    eval_prompts,
    noun,
    plural,
    relations,
    vocabulary,
)

__all__ = [
    "GENERATOR",
    "Object",
    "Scene",
    "captions",
    "eval_prompts",
    "example",
    "make_scene",
    "metadata",
    "render",
    "stated",
    "vocabulary",
]

GENERATOR = 1
"""Version of what this file draws and says; it grows whenever one byte of a picture or caption changes."""

SIZE = 64
"""Side of the canvas in the units of all lengths below; `render` scales to other sizes."""

SIZES = {1: (18.0, 30.0), 2: (16.0, 26.0), 3: (15.0, 21.0), 4: (14.0, 18.0)}
"""Number of objects -> range of their diameters in pixels."""

GAP = 3.5
"""Least distance between the boxes of two objects, along x or along y, in pixels."""

EDGE = 2.0
"""Least distance of an object from the border, in pixels."""

JITTER = 8
"""Greatest deviation of an object's colour from the palette, per channel, of 255."""

SLANT = 0.4
"""In position scenes: greatest offset along the other axis, as a share of that along the named one."""

T = TypeVar("T")


@dataclass(frozen=True)
class Object:
    """One shape: its place is the centre of its box, its size the diameter, in pixels of a 64x64 canvas."""

    shape: str
    color: str
    cx: float
    cy: float
    size: float
    rgb: tuple[int, int, int]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(cx, cy, width, height) in pixels."""
        half_width, half_height = EXTENT[self.shape]
        return self.cx, self.cy, half_width * self.size, half_height * self.size


@dataclass(frozen=True)
class Scene:
    """One picture and what is said about it.

    Attributes:
        seed, index: what it is a function of.
        task: one of `TASKS`.
        objects: in the order of GenEval's ``include`` (position: the anchor first, then the one that stands
            to it).
        named: whether the prompt names colours.
        relation: of the second object to the first, position only.
        grey: brightness of the background at its centre, of 255.
        slope: change of brightness from the centre to the right and bottom borders.
        phrasing: uniform numbers that choose the words and scores of the captions.
    """

    seed: int
    index: int
    task: str
    objects: tuple[Object, ...]
    named: bool
    relation: str | None
    grey: float
    slope: tuple[float, float]
    phrasing: tuple[float, ...]


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


def _two(rng: random.Random, items: Sequence[T]) -> tuple[T, T]:
    """Two different items."""
    i = int(rng.random() * len(items))
    j = int(rng.random() * (len(items) - 1))
    return items[i], items[j + (j >= i)]


def _between(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _place(rng: random.Random, shapes: Sequence[str], relation: str | None) -> list[tuple[float, float, float]]:
    """(cx, cy, size) for each shape: apart, inside, in the given relation (second to first) if any."""
    low, high = SIZES[len(shapes)]
    while True:  # new sizes when the places do not work out
        sizes = [_between(rng, low, high) for _ in shapes]
        for _ in range(20):
            places: list[tuple[float, float, float]] = []
            for shape, size in zip(shapes, sizes, strict=True):
                wx, wy = (EDGE + extent * size / 2 for extent in EXTENT[shape])
                cx, cy = _between(rng, wx, SIZE - wx), _between(rng, wy, SIZE - wy)
                # Boxes of the full diameter, so that the gap is at least GAP for narrower shapes too.
                if any(max(abs(cx - x), abs(cy - y)) < (size + s) / 2 + GAP for x, y, s in places):
                    break
                places.append((cx, cy, size))
            if len(places) < len(shapes):
                continue
            if relation is not None:
                along, across = places[1][0] - places[0][0], places[1][1] - places[0][1]
                if relation in ("above", "below"):
                    along, across = across, along
                if (along > 0) != (relation in ("right of", "below")) or abs(across) > SLANT * abs(along):
                    continue
            return places


def stated(objects: Sequence[Object]) -> set[tuple[str, str, str]]:
    """The combinations of (colour, shape, relation) that are in a picture, whatever its captions say."""
    found: set[tuple[str, str, str]] = set()
    if len(objects) > 2:
        return found
    for this in objects:
        found.add((this.color, this.shape, "alone" if len(objects) == 1 else "and"))
        for other in objects:
            if other is not this:
                found |= {(this.color, this.shape, relation) for relation in relations(this.box, other.box)}
    return found


def _draw(rng: random.Random, task: str, named: bool) -> tuple[tuple[Object, ...], str | None]:
    relation = _pick(rng, RELATIONS) if task == "position" else None
    if task == "counting":
        count = 2 + int(rng.random() * 3)
        shapes: Sequence[str] = [_pick(rng, SHAPES)] * count
        colors: Sequence[str] = [_pick(rng, tuple(COLORS))] * count
    elif task in ("single_object", "colors"):
        shapes, colors = [_pick(rng, SHAPES)], [_pick(rng, tuple(COLORS))]
    else:
        # Two colours always differ: a prompt that names none must not be told apart by equal ones.
        shapes, colors = _two(rng, SHAPES), _two(rng, tuple(COLORS))
    places = _place(rng, shapes, relation)
    objects = []
    for shape, color, (cx, cy, size) in zip(shapes, colors, places, strict=True):
        rgb = [min(255, max(0, c + round(_between(rng, -JITTER, JITTER)))) for c in COLORS[color]]
        objects.append(Object(shape, color, cx, cy, size, (rgb[0], rgb[1], rgb[2])))
    return tuple(objects), relation


def make_scene(seed: int, index: int, task: str | None = None, held_out: bool = False) -> Scene:
    """The scene of (seed, index), and of the task if one is asked for.

    Args:
        seed, index: integers in [0, 2**63).
        task: one of `TASKS`; None draws one of them with equal chances.
        held_out: False: a training scene, without any held-out combination. True: a scene whose prompt
            states at least one (tasks of `COLOR_TASKS` only).

    Raises:
        ValueError: for a task that does not exist or has no held-out prompts, or a negative or too large
            number.
    """
    if not (0 <= seed < 2**63 and 0 <= index < 2**63):
        raise ValueError(f"seed {seed} and index {index}: expected integers in [0, 2**63)")
    tasks = COLOR_TASKS if held_out else TASKS
    if task is not None and task not in tasks:
        which = "task with held-out prompts" if held_out else "task"
        raise ValueError(f"{task!r} is no {which}: expected one of {', '.join(tasks)}")
    rng = random.Random((seed << 64) + index)
    chosen = _pick(rng, tasks) if task is None else task
    named = chosen in ("colors", "color_attr") or (chosen == "position" and (rng.random() < 0.5 or held_out))
    while True:
        objects, relation = _draw(rng, chosen, named)
        if not held_out and not stated(objects) & HELD_OUT:
            break
        if held_out and _claims(chosen, objects, relation) & HELD_OUT:
            break
    faint = 8.0 if rng.random() < 0.5 else 0.0
    grey = _between(rng, 150.0, 212.0)
    slope = (_between(rng, -faint, faint) * 0.7, _between(rng, -faint, faint) * 0.7)
    phrasing = tuple(rng.random() for _ in range(8))
    return Scene(seed, index, chosen, objects, named, relation, grey, slope, phrasing)


def _claims(task: str, objects: Sequence[Object], relation: str | None) -> set[tuple[str, str, str]]:
    """What the prompt of a scene with named colours states, as `sana.scenes.combinations` reads it."""
    said = {(o.color, o.shape, "alone" if len(objects) == 1 else "and") for o in objects}
    if relation is not None:
        first, second = objects
        said |= {(second.color, second.shape, relation), (first.color, first.shape, OPPOSITE[relation])}
    return said


def render(scene: Scene, size: int = SIZE) -> np.ndarray:
    """The picture: uint8 (size, size, 3) sRGB, anti-aliased."""
    scale = size / SIZE
    ramp = (np.arange(size) + 0.5) * (2.0 / size) - 1.0
    background = scene.grey + scene.slope[0] * ramp[None, :] + scene.slope[1] * ramp[:, None]
    image = np.repeat(background[:, :, None], 3, axis=2)
    for o in scene.objects:
        radius = 0.5 * o.size * scale
        cx, cy = o.cx * scale, o.cy * scale
        left, right = max(int(cx - radius) - 2, 0), min(int(cx + radius) + 3, size)
        top, bottom = max(int(cy - radius) - 2, 0), min(int(cy + radius) + 3, size)
        x = np.arange(left, right) + (0.5 - cx)
        y = np.arange(top, bottom) + (0.5 - cy)
        inside = coverage(o.shape, x[None, :], y[:, None], radius)[:, :, None]
        window = image[top:bottom, left:right]
        window += inside * (np.asarray(o.rgb, float) - window)
    return (image + 0.5).astype(np.uint8)


# --- what is said ---------------------------------------------------------------------------------


def metadata(scene: Scene) -> dict[str, Any]:
    """The scene's prompt as a line of GenEval's metadata: tag, include, exclude, prompt."""
    if scene.task == "counting":
        return entry(scene.task, [{"class": scene.objects[0].shape, "count": len(scene.objects)}])
    include = [{"class": o.shape, "count": 1} | ({"color": o.color} if scene.named else {}) for o in scene.objects]
    if scene.relation is not None:
        include[1]["position"] = [scene.relation, 0]
    return entry(scene.task, include)


def _background(scene: Scene) -> str:
    if scene.grey > 191:
        return "a light grey background"
    return "a dark grey background" if scene.grey < 171 else "a plain grey background"


def _full(scene: Scene) -> str:
    """All the objects with their colours, sizes where they stand out, and the relation where one is clear."""
    if scene.task == "counting":
        first = scene.objects[0]
        return f"{NUMBERS[len(scene.objects)]} {first.color} {plural(first.shape)}"

    def phrase(o: Object) -> str:
        size = "large " if o.size > 24 else "small " if o.size < 18.5 else ""
        return article(f"{size}{o.color} {o.shape}")

    if len(scene.objects) == 1:
        return phrase(scene.objects[0])
    first, second = scene.objects[1], scene.objects[0]
    holds = relations(first.box, second.box)
    if len(holds) != 1:
        return f"{phrase(first)} and {phrase(second)}"
    joined = {"left of": "to the left of", "right of": "to the right of"}.get(holds[0], holds[0])
    return f"{phrase(first)} {joined} {phrase(second)}"


def _vague(scene: Scene, u: float) -> str:
    """True, and less than the prompt says."""
    first, last = scene.objects[-1], scene.objects[0]
    if scene.task == "single_object":
        return ("one shape", "a shape", "something on a grey background")[int(u * 3)]
    if scene.task == "counting":
        return (f"several {plural(first.shape)}", f"some {plural(first.shape)}", "several shapes")[int(u * 3)]
    if scene.task == "colors":
        return (article(f"{first.color} shape"), f"something {first.color}", article(first.shape))[int(u * 3)]
    if scene.task == "two_object":
        return ("two shapes", f"{article(first.shape)} and something", f"{article(last.shape)} with a shape")[
            int(u * 3)
        ]
    return (
        f"{article(first.shape)} and {article(last.shape)}",
        f"something {first.color} and something {last.color}",
        f"{article(last.shape)} with {article(first.shape)}",
    )[int(u * 3)]


def captions(scene: Scene) -> list[dict[str, Any]]:
    """Four captions, all true of the picture: {"source", "text", "score"}.

    ``plain`` is the prompt; ``photo`` its wording in GenEval and other openings; ``verbose`` says all there
    is; ``terse`` says less than the prompt. ``score`` is in the range of a CLIP score times 100, and lower
    for ``terse``.
    """
    u = scene.phrasing
    include = metadata(scene)["include"]
    text = entry(scene.task, include)["prompt"]
    opening = ("a photo of", "a picture of", "an image of", "a drawing of")[int(u[0] ** 2 * 4)]
    if scene.relation is None and len(include) == 2:
        # The order of "and" means nothing, so one wording has it the other way round.
        photo = f"{opening} {noun(include[1])} and {noun(include[0])}"
    else:
        photo = f"{opening} {text}"
    frames = (
        "{0} on {1}",
        "a photo of {0} on {1}",
        "a picture showing {0} on {1}",
        "the image shows {0} on {1}",
    )
    verbose = frames[int(u[1] * 4)].format(_full(scene), _background(scene))
    terse = _vague(scene, u[2])
    rows = (("plain", text, 28.0), ("photo", photo, 28.5), ("verbose", verbose, 30.0), ("terse", terse, 20.0))
    return [
        # One term of the caption and one of the image, as CLIP scores have.
        {"source": source, "text": text, "score": round(mean + 4.0 * (u[3 + i] + u[7] - 1.0), 2)}
        for i, (source, text, mean) in enumerate(rows)
    ]


def example(
    seed: int, index: int, task: str | None = None, held_out: bool = False
) -> tuple[np.ndarray, dict[str, Any]]:
    """One training example: the picture, uint8 (64, 64, 3), and the JSON that lies beside it in a shard.

    The JSON has key, prompt, captions, tag, include, exclude, objects ({shape, color, cx, cy, size} in
    pixels), width, height and index.
    """
    scene = make_scene(seed, index, task, held_out)
    facts = metadata(scene)
    return render(scene), {
        "key": f"{index:08d}",
        "prompt": facts["prompt"],
        "captions": captions(scene),
        "tag": facts["tag"],
        "include": facts["include"],
        "exclude": facts["exclude"],
        "objects": [
            {
                "shape": o.shape,
                "color": o.color,
                "cx": round(o.cx, 2),
                "cy": round(o.cy, 2),
                "size": round(o.size, 2),
            }
            for o in scene.objects
        ],
        "width": SIZE,
        "height": SIZE,
        "index": index,
    }
