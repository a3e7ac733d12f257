"""The second scorer: right by itself, and of one mind with the first."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
from scipy import ndimage
from test_scenes import SEED, degradations, planted

from sana.data.synthetic import make_scene, metadata, render
from sana.metric.scenes import oracle
from sana.metric.scenes_second import find, lab, regions, second
from sana.scenes import COLORS, eval_prompts


def test_lab_of_known_colors() -> None:
    """Published values of sRGB primaries and white under D65, to the second decimal."""
    rgb = np.array([[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]], np.uint8)
    expected = [
        [100, 0, 0],
        [53.24, 80.09, 67.20],
        [87.73, -86.18, 83.18],
        [32.30, 79.19, -107.86],
        [0, 0, 0],
    ]
    np.testing.assert_allclose(lab(rgb), expected, atol=0.02)
    greys = lab(np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1))
    assert np.abs(greys[:, 1:]).max() < 0.02
    assert np.all(np.diff(greys[:, 0]) > 0)


@pytest.mark.parametrize("density", [0.3, 0.5, 0.6, 0.9])
def test_regions_are_those_of_scipy(density: float) -> None:
    rng = np.random.default_rng(3)
    for shape in ((17, 23), (1, 40), (40, 1), (31, 31)):
        mask = rng.random(shape) < density
        numbered, count = ndimage.label(mask)
        expected = {(numbered == i).tobytes() for i in range(1, count + 1)}
        assert {part.tobytes() for part in regions(mask)} == expected
    assert regions(np.zeros((5, 5), bool)) == []


def test_real_scenes_and_boxes() -> None:
    for index in range(250):
        scene = make_scene(SEED, index)
        image = render(scene)
        assert second(image, metadata(scene)) == (True, "")
        for o in scene.objects:
            x, y, w, h = o.box
            f = min(find(image), key=lambda f: abs(f.left + f.right - 2 * x) + abs(f.top + f.bottom - 2 * y))
            assert (f.shape, f.color) == (o.shape, o.color)
            # Rays may pass between the tips of a star and anti-aliasing rounds corners: within a pixel or so.
            assert max(abs(f.left - x + w / 2), abs(f.right - x - w / 2)) < 1.6
            assert max(abs(f.top - y + h / 2), abs(f.bottom - y - h / 2)) < 1.6


def test_agreement_on_real_and_planted() -> None:
    same = []
    for index in range(120):
        scene = make_scene(SEED, index)
        same.append(oracle(render(scene), metadata(scene))[0] == second(render(scene), metadata(scene))[0])
        same += [oracle(image, facts)[0] == second(image, facts)[0] for _, image, facts in planted(index)]
    assert len(same) > 500
    assert np.mean(same) >= 0.99


def test_agreement_on_degraded() -> None:
    same: dict[str, list[bool]] = {}
    for kind, degrade in degradations(1).items():
        for index in range(70):
            scene = make_scene(SEED + 2, index)
            cases = [(render(scene), metadata(scene)), *((i, f) for _, i, f in planted(index)[:1])]
            for image, facts in cases:
                image = degrade(image)
                same.setdefault(kind, []).append(oracle(image, facts)[0] == second(image, facts)[0])
    assert np.mean([np.mean(v) for v in same.values()]) >= 0.99
    assert min(np.mean(v) for v in same.values()) >= 0.97


def test_nothing_passes() -> None:
    rng = np.random.default_rng(0)
    pictures = [np.full((64, 64, 3), v, np.uint8) for v in (0, 128, 180, 255)]
    pictures += list(rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8))
    pictures += list(np.clip(180 + rng.normal(0, 30, (5, 64, 64, 3)), 0, 255).astype(np.uint8))
    prompts = eval_prompts(4, seed=0)
    assert not any(second(image, p)[0] for image in pictures for p in prompts)


def test_hues_of_the_palette_are_apart() -> None:
    """The palette is separable by hue or darkness alone, whatever the colour space."""
    hues = sorted(colorsys.rgb_to_hsv(*(c / 255 for c in rgb))[0] * 360 for n, rgb in COLORS.items() if n != "black")
    gaps = np.diff([*hues, hues[0] + 360])
    assert gaps.min() > 18
    labs = lab(np.array(list(COLORS.values()), np.uint8))
    distances = [math.dist(a, b) for i, a in enumerate(labs) for b in labs[:i]]
    assert min(distances) > 40
