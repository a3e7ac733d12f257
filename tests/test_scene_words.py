"""What `sana.scenes` says against closed forms, brute force and its own claims."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from sana.scenes import (
    COLOR_TASKS,
    COLORS,
    EXTENT,
    HELD_OUT,
    OPPOSITE,
    RELATIONS,
    ROLES,
    SHAPES,
    TASKS,
    article,
    combinations,
    coverage,
    entry,
    eval_prompts,
    plural,
    relations,
    signed_distance,
    vocabulary,
)

AREA = {
    "circle": math.pi,
    "ring": math.pi * (1 - 0.5**2),
    "square": 4 * 0.9**2,
    "triangle": math.sqrt(3),
    "cross": 2 * 2 * 0.72 - 0.72**2,
    "star": 10 * 0.5 * 1.05 * (1.05 * 0.45) * math.sin(math.pi / 5),
}


def test_six_shapes_and_eight_colors_apart() -> None:
    assert len(set(SHAPES)) == 6
    assert len(COLORS) == 8
    pairs = itertools.combinations(np.array(list(COLORS.values()), float), 2)
    assert min(np.linalg.norm(a - b) for a, b in pairs) > 105
    greys = np.arange(140, 224)[:, None].repeat(3, 1)
    assert min(np.linalg.norm(greys - c, axis=1).min() for c in COLORS.values()) > 115


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_area_and_extent_of_the_shape(shape: str) -> None:
    radius = 9.37
    grid = np.arange(-12, 12, 0.02) + 0.01
    inside = signed_distance(shape, grid[None, :], grid[:, None], radius) < 0
    assert inside.sum() * 0.02**2 == pytest.approx(AREA[shape] * radius**2, rel=2e-3)
    rows, columns = grid[inside.any(1)], grid[inside.any(0)]
    assert columns.max() == pytest.approx(EXTENT[shape][0] * radius, abs=0.05)
    assert -columns.min() == pytest.approx(EXTENT[shape][0] * radius, abs=0.05)
    assert rows.max() == pytest.approx(EXTENT[shape][1] * radius, abs=0.05)
    assert -rows.min() == pytest.approx(EXTENT[shape][1] * radius, abs=0.05)
    # Anti-aliased pixels hold the same area as the exact shape, wherever it lies between them.
    pixel = np.arange(-14, 14) + 0.5
    soft = coverage(shape, pixel[None, :] - 0.31, pixel[:, None] + 0.17, radius)
    assert soft.sum() == pytest.approx(AREA[shape] * radius**2, rel=0.02)


def test_distance_is_euclidean_near_edges() -> None:
    """Against the distance to densely sampled outline points, for points beside straight edges."""
    x, y = np.array([0.0, 3.0, -6.5]), np.array([-9.0, -8.2, -9.9])
    np.testing.assert_allclose(signed_distance("square", x, y, 10.0), -y - 9.0)
    slope = np.array([math.sqrt(3), -1.0]) / 2  # outward normal of the triangle's right side
    middle = np.array([5.0, 0.0])
    for d in (-1.5, 0.0, 2.0):
        point = middle + d * slope
        assert signed_distance("triangle", *point, 10.0) == pytest.approx(d, abs=1e-9)
    tip, notch = np.array([0.0, -10.5]), 4.725 * np.array([math.sin(math.pi / 5), -math.cos(math.pi / 5)])
    edge = notch - tip
    normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge) * -1
    shift = np.array([0.0, 10.5 * (1 - math.cos(math.pi / 5)) / 2])
    for d in (-1.0, 0.0, 0.7):
        point = (tip + notch) / 2 + shift + d * normal
        assert abs(signed_distance("star", *point, 10.0)) == pytest.approx(abs(d), abs=1e-9)


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown shape 'hexagon'"):
        signed_distance("hexagon", np.zeros(1), np.zeros(1), 1.0)


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-30, 0, ("left of",)),
        (30, 5, ("right of",)),
        (2, -25, ("above",)),
        (0, 25, ("below",)),
        (20, 20, ("right of", "below")),
        (3, -3, ()),  # closer than a tenth of the summed extents
    ],
)
def test_relations(dx: float, dy: float, expected: tuple[str, ...]) -> None:
    assert relations((30 + dx, 30 + dy, 20, 20), (30, 30, 20, 20)) == expected


def test_relations_turn_round() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (tuple(rng.uniform([0, 0, 10, 10], [64, 64, 30, 30])) for _ in range(2))
        assert {OPPOSITE[r] for r in relations(a, b)} == set(relations(b, a))


def test_held_out_is_as_documented() -> None:
    assert len(HELD_OUT) == 36
    assert set(itertools.product(COLORS, SHAPES, ROLES)).issuperset(HELD_OUT)
    assert set(Counter((shape, role) for _, shape, role in HELD_OUT).values()) == {1}
    assert set(Counter((color, shape) for color, shape, _ in HELD_OUT).values()) == {1}
    assert set(Counter((color, role) for color, _, role in HELD_OUT).values()) == {1}
    assert set(Counter(color for color, _, _ in HELD_OUT).values()) <= {4, 5, 6}


def test_words() -> None:
    words = vocabulary()
    assert words == sorted(set(words))
    assert len(words) < 120
    assert all(word.isalpha() and word == word.lower() for word in words)
    assert article("orange star") == "an orange star"
    assert [plural(s) for s in ("circle", "cross")] == ["circles", "crosses"]


def test_combinations_of_a_prompt() -> None:
    include = [
        {"class": "square", "count": 1, "color": "blue"},
        {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]},
    ]
    line = entry("position", include)
    assert line["prompt"] == "a red circle left of a blue square"
    assert combinations(line) == {
        ("red", "circle", "and"),
        ("blue", "square", "and"),
        ("red", "circle", "left of"),
        ("blue", "square", "right of"),
    }
    assert combinations(entry("colors", [{"class": "star", "count": 1, "color": "cyan"}])) == {
        ("cyan", "star", "alone")
    }
    assert combinations(entry("single_object", [{"class": "star", "count": 1}])) == set()


@pytest.mark.parametrize("held_out", [False, True])
def test_eval_prompts(held_out: bool) -> None:
    prompts = eval_prompts(100, seed=3, held_out=held_out)
    tasks = COLOR_TASKS if held_out else TASKS
    assert Counter(p["tag"] for p in prompts) == dict.fromkeys(tasks, 100)
    known = set(vocabulary())
    for p in prompts:
        assert set(p) == {"tag", "include", "exclude", "prompt"}
        assert set(p["prompt"].split()) <= known
        assert bool(combinations(p) & HELD_OUT) == held_out
        for e in p["include"]:
            assert e["class"] in SHAPES
            assert e.get("color", "red") in COLORS
            assert e.get("position", ["above", 0])[0] in RELATIONS
    by_task = {t: [p["prompt"] for p in prompts if p["tag"] == t] for t in tasks}
    if held_out:
        assert set(Counter(by_task["colors"])) == {f"{article(c)} {s}" for c, s, r in HELD_OUT if r == "alone"}
        assert all(any(c in p.split() for c in COLORS) for p in by_task["position"])
    else:
        assert {t: len(set(ps)) for t, ps in by_task.items()} == {
            "single_object": 6,
            "two_object": 30,
            "counting": 18,
            "colors": 42,
            "position": 100,
            "color_attr": 100,
        }
        assert set(Counter(by_task["counting"]).values()) == {5, 6}
        named = [any(c in p.split() for c in COLORS) for p in by_task["position"]]
        assert named == [True, False] * 50
        lines = [p for p in prompts if p["tag"] == "counting"]
        assert all(p["exclude"] == [{**p["include"][0], "count": p["include"][0]["count"] + 1}] for p in lines)
    assert prompts == eval_prompts(100, seed=3, held_out=held_out)
    assert prompts != eval_prompts(100, seed=4, held_out=held_out)
    shorter = eval_prompts(7, seed=3, held_out=held_out)
    assert shorter == [p for i in range(len(tasks)) for p in prompts[100 * i : 100 * i + 7]]


def test_no_prompts_asked_for() -> None:
    with pytest.raises(ValueError, match="per_task is 0"):
        eval_prompts(0, seed=0)
