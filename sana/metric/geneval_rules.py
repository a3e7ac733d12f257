"""GenEval's rules, from detections to a verdict (Ghosh et al. 2023; djghosh13/geneval, evaluation/evaluate_images.py).

Detections and colours come from outside, so the rules are tested without any network. Where the paper and the
published code differ the code is followed, as all published numbers come from it:

* an object counts when its score is *above* 0.3, in counting prompts above 0.9; of each class the 16 best are kept;
* an item of "include" looks at its `count` best objects of its class alone, and fewer is wrong; more is right, unless
  "exclude" says otherwise;
* colours: at least `count` of these objects have to be of the colour;
* positions: each of these objects to each matched object of the target item, by `relative_position`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS = 0.3, 0.9, 16
MARGIN, LEAST_OFFSET, LEAST_SHARE = 0.1, 1e-3, 0.5


class Found(NamedTuple):
    """One object that a detector saw.

    Attributes:
        box: (x1, y1, x2, y2) in pixels, x to the right and y down.
        score: confidence in [0, 1].
        mask: (h, w) booleans, or None where the detector gives boxes only.
    """

    box: tuple[float, float, float, float]
    score: float
    mask: NDArray[np.bool_] | None = None


Objects = Mapping[str, Sequence[Found]]
ColoursOf = Callable[[Sequence[Found], str], Sequence[str]]
"""Objects of a class, and its name -> a colour for each."""
Relate = Callable[[Sequence[float], Sequence[float]], Iterable[str]]
"""Boxes of A and B -> what A is to B."""


def keep(objects: Objects, tag: str) -> dict[str, list[Found]]:
    """The objects that count for a prompt of a task, best first; classes without any are left out.

    Scores are compared in float32, the type that detectors give them in: one of exactly 0.3 does not count.
    """
    threshold = np.float32(COUNTING_THRESHOLD if tag == "counting" else THRESHOLD)
    kept = {}
    for name, found in objects.items():
        above = [f for f in found if np.float32(f.score) > threshold]
        if above:
            kept[name] = sorted(above, key=lambda f: -f.score)[:MAX_OBJECTS]
    return kept


def relative_position(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """What box A is to box B (x1, y1, x2, y2 each): some of "left of", "right of", "above", "below".

    The offset of the centres is shortened by a tenth of the summed widths and heights; what is left has to be more
    than half of the *whole* offset's length in a direction.
    """
    shortened, offsets = [], []
    for axis in (0, 1):
        offset = (a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2
        extent = abs(a[axis + 2] - a[axis]) + abs(b[axis + 2] - b[axis])
        shortened.append(math.copysign(max(abs(offset) - MARGIN * extent, 0.0), offset))
        offsets.append(offset)
    if all(abs(x) < LEAST_OFFSET for x in shortened):
        return set()
    dx, dy = (x / math.hypot(*offsets) for x in shortened)
    holds = {
        "left of": dx < -LEAST_SHARE,
        "right of": dx > LEAST_SHARE,
        "above": dy < -LEAST_SHARE,
        "below": dy > LEAST_SHARE,
    }
    return {name for name, true in holds.items() if true}


def judge(
    objects: Objects, line: Mapping[str, Any], colours: ColoursOf, relate: Relate = relative_position
) -> tuple[bool, str]:
    """Whether an image shows its prompt.

    Args:
        objects: those that count, best first; see `keep`.
        line: of the metadata: "include" and perhaps "exclude", items with "class", "count" and perhaps "color" and
            "position" [relation, index of the target item].
        colours: is asked only for objects whose number is right.
        relate: see `Relate`.

    Returns:
        Right or not, and what is wrong ("" when right), problems joined by "; ".

    Raises:
        ValueError: a position that refers to an item that does not come before it.
    """
    reasons: list[str] = []
    groups: list[Sequence[Found] | None] = []
    for item in line.get("include", ()):
        name, count = item["class"], item["count"]
        found = list(objects.get(name, ()))[:count]
        wrong = _number(name, count, found) or _colour(item, found, colours) or _place(item, found, groups, relate)
        groups.append(None if wrong else found)
        reasons += [wrong] if wrong else []
    for item in line.get("exclude", ()):
        there = len(objects.get(item["class"], ()))
        if there >= item["count"]:
            reasons.append(f"too many objects: {there} {item['class']}, expected fewer than {item['count']}")
    return not reasons, "; ".join(reasons)


def _number(name: str, count: int, found: Sequence[Found]) -> str:
    return f"missing objects: {len(found)} {name}, expected at least {count}" if len(found) < count else ""


def _colour(item: Mapping[str, Any], found: Sequence[Found], colours: ColoursOf) -> str:
    if "color" not in item:
        return ""
    seen = list(colours(found, item["class"]))
    if seen.count(item["color"]) >= item["count"]:
        return ""
    return f"wrong colour: {item['class']} is {', '.join(seen)}, expected {item['color']}"


def _place(
    item: Mapping[str, Any], found: Sequence[Found], groups: Sequence[Sequence[Found] | None], relate: Relate
) -> str:
    if "position" not in item:
        return ""
    relation, target = item["position"]
    if not 0 <= target < len(groups):
        raise ValueError(f"geneval: {item['class']} is {relation} item {target}, which does not come before it")
    anchors = groups[target]
    if anchors is None:
        return f"no anchor: {item['class']} has nothing to be {relation}"
    for a in found:
        for b in anchors:
            holds = set(relate(a.box, b.box))
            if relation not in holds:
                seen = " and ".join(sorted(holds)) or "nowhere in particular"
                return f"wrong place: {item['class']} is {seen}, expected {relation}"
    return ""
