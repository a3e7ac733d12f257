"""The scenes generator: pure, apart, inside, true to its captions, and without what is held out."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter

import numpy as np
import pytest

from sana.data.synthetic import (
    GENERATOR,
    JITTER,
    captions,
    example,
    make_scene,
    metadata,
    render,
    stated,
    vocabulary,
)
from sana.scenes import COLOR_TASKS, COLORS, EXTENT, HELD_OUT, RELATIONS, SHAPES, TASKS, combinations, plural

SCENES = [make_scene(5, i) for i in range(3000)]


def _digest(seed: int, indices: range) -> str:
    digest = hashlib.sha256()
    for i in indices:
        image, facts = example(seed, i)
        digest.update(image.tobytes())
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def test_pure_function_of_seed_and_index() -> None:
    backwards = [example(7, i) for i in reversed(range(20))][::-1]
    for i, (image, facts) in enumerate(backwards):
        again, same = example(7, i)
        np.testing.assert_array_equal(image, again)
        assert facts == same
    pictures = {example(s, i)[0].tobytes() for s in (0, 1, 2**40) for i in (0, 1, 2**40)}
    assert len(pictures) == 9


def test_bytes_of_this_version() -> None:
    """Pictures and words are part of a data set's identity: a change here needs a new GENERATOR."""
    assert GENERATOR == 1
    assert _digest(1, range(200)) == "699cbffd6b60f37370a463754661d070a8a8699076b8745ed04fbe07a2b2b9b6"


def test_objects_are_inside_apart_and_of_their_size() -> None:
    for scene in SCENES:
        assert 1 <= len(scene.objects) <= 4
        for o in scene.objects:
            half_width, half_height = (extent * o.size / 2 for extent in EXTENT[o.shape])
            assert 14 <= o.size <= 30
            assert o.cx - half_width > 1.9
            assert o.cx + half_width < 62.1
            assert o.cy - half_height > 1.9
            assert o.cy + half_height < 62.1
        for a, b in itertools.combinations(scene.objects, 2):
            assert max(abs(a.cx - b.cx), abs(a.cy - b.cy)) - (a.size + b.size) / 2 >= 3


def test_background_separates_objects_in_the_picture() -> None:
    """Between any two objects runs a line of background pixels: nothing touches."""
    from scipy.ndimage import label

    for scene in SCENES[:300]:
        image = render(scene).astype(int)
        background = np.ptp(image, axis=2) == 0  # greys, and black objects come close to it
        dark = image.max(2) < 130
        assert label(~background | dark, structure=np.ones((3, 3)))[1] == len(scene.objects)


def test_colors_stay_near_the_palette() -> None:
    palette = np.array(list(COLORS.values()), float)
    for scene in SCENES:
        for o in scene.objects:
            distance = np.linalg.norm(palette - o.rgb, axis=1)
            assert list(COLORS)[int(distance.argmin())] == o.color
            assert np.abs(np.array(o.rgb) - COLORS[o.color]).max() <= JITTER
            assert distance.min() * 4 < np.partition(distance, 1)[1]


def test_pixels_are_those_of_the_objects() -> None:
    for scene in SCENES[:100]:
        image = render(scene)
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
        for o in scene.objects:
            if o.shape != "ring":
                assert tuple(image[int(o.cy), int(o.cx)]) == o.rgb
        corner = image[0, 0].astype(int)
        assert np.ptp(corner) == 0
        assert 135 <= corner[0] <= 225


def test_other_sizes_show_the_same() -> None:
    for scene in SCENES[:20]:
        fine = render(scene, 256).astype(float).reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(fine - render(scene)).max() < 60  # corners, where a pixel's coverage is approximate
        assert np.abs(fine - render(scene)).mean() < 0.6


def test_tasks_and_their_scenes() -> None:
    counts = Counter(s.task for s in SCENES)
    assert set(counts) == set(TASKS)
    assert min(counts.values()) > 400
    for scene in SCENES:
        shapes, colors = {o.shape for o in scene.objects}, {o.color for o in scene.objects}
        if scene.task in ("single_object", "colors"):
            assert len(scene.objects) == 1
        elif scene.task == "counting":
            assert 2 <= len(scene.objects) <= 4
            assert len(shapes) == len(colors) == 1
        else:
            assert len(scene.objects) == len(shapes) == len(colors) == 2
    assert {o.shape for s in SCENES for o in s.objects} == set(SHAPES)
    pairs = {(o.color, o.shape) for s in SCENES for o in s.objects}
    assert len(pairs) == 48  # each pair is seen in training, in some relation
    named = Counter(s.named for s in SCENES if s.task == "position")
    assert 0.4 < named[True] / named.total() < 0.6


def test_metadata_is_geneval() -> None:
    for scene in SCENES[:600]:
        facts = metadata(scene)
        assert facts["tag"] == scene.task
        assert sum(e["count"] for e in facts["include"]) == len(scene.objects)
        assert all(("color" in e) == scene.named for e in facts["include"])
        positions = [e.get("position") for e in facts["include"]]
        assert positions == ([None, [scene.relation, 0]] if scene.task == "position" else [None] * len(positions))


def _clearly(relation: str, a: dict, b: dict) -> bool:
    """a stands so to b: beyond it along the axis, and more so than along the other."""
    dx, dy = a["cx"] - b["cx"], a["cy"] - b["cy"]
    along, across = {
        "left of": (-dx, dy),
        "right of": (dx, dy),
        "above": (-dy, dx),
        "below": (dy, dx),
    }[relation]
    return along > 8 and along > 0.55 * abs(across)


def test_captions_are_true() -> None:
    """Read each caption word by word against the list of objects."""
    numbers = {"one": 1, "two": 2, "three": 3, "four": 4}
    singular = {plural(s): s for s in SHAPES}
    for index in range(800):
        _, facts = example(9, index)
        objects = facts["objects"]
        shapes = Counter(o["shape"] for o in objects)
        for caption in facts["captions"]:
            text = caption["text"].replace("to the ", "")
            words = text.split()
            for i, word in enumerate(words):
                before = words[i - 1] if i else ""
                if word in shapes or word in SHAPES:
                    assert shapes[word] >= 1, text
                    if before in COLORS:
                        assert any((o["shape"], o["color"]) == (word, before) for o in objects), text
                if word in singular:
                    assert shapes[singular[word]] == len(objects), text
                if word in COLORS:
                    assert word in {o["color"] for o in objects}, text
                if word in numbers and caption["source"] != "photo":
                    assert numbers[word] == len(objects), text
                if word in ("large", "small"):
                    size = next(o["size"] for o in objects if o["shape"] == words[i + 2])
                    assert size > 23.9 if word == "large" else size < 18.6, text
            for relation in RELATIONS:
                if f" {relation} " in text:
                    left, right = (part.split() for part in text.split(f" {relation} "))
                    a = next(o for o in objects if o["shape"] in left)
                    b = next(o for o in objects if o["shape"] in right)
                    assert _clearly(relation, a, b), text


def test_four_captions_with_scores() -> None:
    rows = [captions(s) for s in SCENES]
    known = vocabulary()
    used: set[str] = set()
    for scene, row in zip(SCENES, rows, strict=True):
        assert [c["source"] for c in row] == ["plain", "photo", "verbose", "terse"]
        assert len({c["text"] for c in row}) == 4
        assert all(15 <= c["score"] <= 35 for c in row)
        assert row[0]["text"] == metadata(scene)["prompt"]
        used |= {word for c in row for word in c["text"].split(" ")}
    assert sorted(used) == known
    mean = np.mean([[c["score"] for c in row] for row in rows], axis=0)
    assert mean[3] < mean[:3].min() - 5
    assert mean[2] == mean.max()


def _box(o: dict) -> tuple[float, float, float, float]:
    w, h = EXTENT[o["shape"]]
    return o["cx"] - w * o["size"] / 2, o["cy"] - h * o["size"] / 2, w * o["size"], h * o["size"]


def test_training_never_shows_what_is_held_out() -> None:
    """By brute force over the JSON, any relation counting that could be called true at all."""
    held = {(c, s): r for c, s, r in HELD_OUT}
    for index in range(2000):
        _, facts = example(3, index)
        assert not combinations(facts) & HELD_OUT
        objects = facts["objects"]
        for o in objects:
            role = held.get((o["color"], o["shape"]))
            if role == "alone":
                assert len(objects) > 1
            elif role == "and":
                assert len(objects) != 2
            elif role is not None and len(objects) == 2:
                other = objects[1] if o is objects[0] else objects[0]
                (x, y, w, h), (u, v, p, q) = _box(o), _box(other)
                dx, dy = x + w / 2 - u - p / 2, y + h / 2 - v - q / 2
                along, across = {
                    "left of": (-dx, dy),
                    "right of": (dx, dy),
                    "above": (-dy, dx),
                    "below": (dy, dx),
                }[role]
                # Nothing within 45 degrees of the held-out direction.
                assert along < abs(across) + 1e-6 or along < 0.1 * (w + p + h + q)


def test_held_out_scenes_show_it() -> None:
    seen: set[tuple[str, str, str]] = set()
    for task in COLOR_TASKS:
        for index in range(300):
            scene = make_scene(3, index, task, held_out=True)
            claimed = combinations(metadata(scene)) & HELD_OUT
            assert claimed
            assert claimed <= stated(scene.objects)
            seen |= claimed
    assert seen == HELD_OUT
    assert {make_scene(3, i, held_out=True).task for i in range(50)} == set(COLOR_TASKS)


def test_relations_hold_with_a_margin() -> None:
    for index in range(400):
        scene = make_scene(1, index, "position")
        anchor, subject = scene.objects
        dx, dy = subject.cx - anchor.cx, subject.cy - anchor.cy
        along, across = (dx, dy) if scene.relation in ("left of", "right of") else (dy, dx)
        sign = -1 if scene.relation in ("left of", "above") else 1
        assert sign * along >= (anchor.size + subject.size) / 2 + 3
        assert abs(across) <= 0.4 * abs(along)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1, "index": 0}, "expected integers"),
        ({"seed": 0, "index": 2**63}, "expected integers"),
        ({"seed": 0, "index": 0, "task": "colours"}, "'colours' is no task: expected one of single_object"),
        ({"seed": 0, "index": 0, "task": "counting", "held_out": True}, "no task with held-out prompts"),
    ],
)
def test_bad_input_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scene(**arguments)
