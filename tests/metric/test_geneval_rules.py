"""GenEval's rules on a table of synthetic detections: every task and every boundary, each with its rule.

The rules are those of the published code, djghosh13/geneval, evaluation/evaluate_images.py; the third column of the
table says where in it, and the expected answers were worked out by hand from there.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from sana.metric.coco import CLASSES
from sana.metric.geneval import GenEval
from sana.metric.geneval_rules import Found, judge, keep, relative_position

RULES = {
    "threshold": "evaluate_image(): bbox[...] > confidence_threshold, THRESHOLD = 0.3",
    "counting threshold": "evaluate_image(): COUNTING_THRESHOLD = 0.9 if the tag is counting",
    "at most": "evaluate_image(): ordering[:MAX_OBJECTS], MAX_OBJECTS = 16",
    "include": "evaluate(): objects.get(classname)[:count], wrong if fewer than count",
    "exclude": "evaluate(): wrong if len(objects[classname]) >= count",
    "colour": "evaluate(): colors.count(color) < count is wrong, among the first count objects",
    "anchor": "evaluate(): matched_groups[target_group] is None is wrong",
    "position": "evaluate(): every pair of the two groups has to hold the relation",
    "direction": "relative_position(): revised offset / norm of the offset beyond +-0.5",
    "margin": "relative_position(): |offset| - 0.1 (dim_a + dim_b), at least 0",
    "nothing": "relative_position(): no relation if all |revised offset| < 1e-3",
    "order": "evaluate_image(): np.argsort of the scores, best first",
}


def at(cx: float, cy: float, w: float = 10, h: float = 10, score: float = 0.95) -> Found:
    return Found((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), score)


def many(n: int, score: float = 0.95) -> list[Found]:
    return [at(20 * i, 0, score=score) for i in range(n)]


def single(name: str = "dog", count: int = 1) -> dict[str, Any]:
    return {"tag": "single_object", "include": [{"class": name, "count": count}], "prompt": f"a photo of a {name}"}


def two(a: str = "dog", b: str = "cat") -> dict[str, Any]:
    include = [{"class": a, "count": 1}, {"class": b, "count": 1}]
    return {"tag": "two_object", "include": include, "prompt": f"{a} and {b}"}


def counting(n: int) -> dict[str, Any]:
    return {
        "tag": "counting",
        "include": [{"class": "clock", "count": n}],
        "exclude": [{"class": "clock", "count": n + 1}],
        "prompt": f"a photo of {n} clocks",
    }


def coloured(colour: str = "red", count: int = 1) -> dict[str, Any]:
    include = [{"class": "car", "count": count, "color": colour}]
    return {"tag": "colors", "include": include, "prompt": f"a {colour} car"}


def placed(relation: str) -> dict[str, Any]:
    include = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": [relation, 0]}]
    return {"tag": "position", "include": include, "prompt": f"a photo of a dog {relation} a cat"}


def attributes(a: str = "red", b: str = "blue") -> dict[str, Any]:
    include = [{"class": "car", "count": 1, "color": a}, {"class": "bus", "count": 1, "color": b}]
    return {"tag": "color_attr", "include": include, "prompt": f"a photo of a {a} car and a {b} bus"}


def pair(dx: float, dy: float, w: float = 10, h: float = 10) -> dict[str, list[Found]]:
    """A cat, and a dog at an offset from it."""
    return {"cat": [at(100, 100, w, h)], "dog": [at(100 + dx, 100 + dy, w, h)]}


# With two boxes of 10 x 10 an offset d along one axis is shortened by 0.1 x 20 = 2 to d - 2; along that axis alone the
# share is (d - 2) / d, so it is one half at d = 4 and above it beyond.
Case = tuple[str, str, dict[str, Any], dict[str, list[Found]], dict[str, list[str]], bool]
TABLE: list[Case] = [
    # --- single_object
    ("one object", "include", single(), {"dog": [at(0, 0)]}, {}, True),
    ("two are more than enough", "include", single(), {"dog": many(2)}, {}, True),
    ("sixteen too", "include", single(), {"dog": many(16)}, {}, True),
    ("others beside it do not matter", "include", single(), {"dog": many(1), "cat": many(3)}, {}, True),
    ("nothing at all", "include", single(), {}, {}, False),
    ("another class", "include", single(), {"cat": many(1)}, {}, False),
    ("score at 0.3", "threshold", single(), {"dog": many(1, 0.3)}, {}, False),
    ("score just above 0.3", "threshold", single(), {"dog": many(1, 0.3001)}, {}, True),
    ("score just below 0.3", "threshold", single(), {"dog": many(1, 0.2999)}, {}, False),
    ("0.3 in float32 is not above 0.3", "threshold", single(), {"dog": many(1, float(np.float32(0.3)))}, {}, False),
    ("next float32 above 0.3", "threshold", single(),
     {"dog": many(1, float(np.nextafter(np.float32(0.3), np.float32(1))))}, {}, True),
    ("score 0.9 is plenty here", "threshold", single(), {"dog": many(1, 0.9)}, {}, True),
    # --- two_object
    ("both", "include", two(), {"dog": many(1), "cat": many(1)}, {}, True),
    ("the first alone", "include", two(), {"dog": many(2)}, {}, False),
    ("the second alone", "include", two(), {"cat": many(2)}, {}, False),
    ("neither", "include", two(), {"bird": many(2)}, {}, False),
    ("several of each", "include", two(), {"dog": many(3), "cat": many(2)}, {}, True),
    ("second at the threshold", "threshold", two(), {"dog": many(1), "cat": many(1, 0.3)}, {}, False),
    ("second just above", "threshold", two(), {"dog": many(1), "cat": many(1, 0.31)}, {}, True),
    ("the same class twice needs one", "include", two("dog", "dog"), {"dog": many(1)}, {}, True),
    # --- counting
    ("two of two", "include", counting(2), {"clock": many(2)}, {}, True),
    ("three of three", "include", counting(3), {"clock": many(3)}, {}, True),
    ("four of four", "include", counting(4), {"clock": many(4)}, {}, True),
    ("one short", "include", counting(3), {"clock": many(2)}, {}, False),
    ("one too many", "exclude", counting(3), {"clock": many(4)}, {}, False),
    ("many too many", "exclude", counting(2), {"clock": many(9)}, {}, False),
    ("none", "include", counting(4), {}, {}, False),
    ("all at 0.9", "counting threshold", counting(2), {"clock": many(2, 0.9)}, {}, False),
    ("all just above 0.9", "counting threshold", counting(2), {"clock": many(2, 0.9001)}, {}, True),
    ("one of them at 0.9", "counting threshold", counting(2), {"clock": [*many(1), at(50, 0, score=0.9)]}, {}, False),
    ("a surplus one at 0.9 does not count", "counting threshold", counting(2),
     {"clock": [*many(2), at(50, 0, score=0.9)]}, {}, True),
    ("a surplus one above 0.9 does", "counting threshold", counting(2),
     {"clock": [*many(2), at(50, 0, score=0.91)]}, {}, False),
    ("0.89 counts elsewhere, not here", "counting threshold", counting(2), {"clock": many(2, 0.89)}, {}, False),
    ("others do not matter", "exclude", counting(2), {"clock": many(2), "dog": many(7)}, {}, True),
    ("sixteen are kept of twenty", "at most",
     {"tag": "counting", "include": [{"class": "clock", "count": 16}], "exclude": [{"class": "clock", "count": 17}],
      "prompt": ""}, {"clock": many(20)}, {}, True),
    ("seventeen can never be", "at most",
     {"tag": "counting", "include": [{"class": "clock", "count": 17}], "prompt": ""},
     {"clock": many(20)}, {}, False),
    # --- colors
    ("right colour", "colour", coloured(), {"car": many(1)}, {"car": ["red"]}, True),
    ("wrong colour", "colour", coloured(), {"car": many(1)}, {"car": ["blue"]}, False),
    ("no car to colour", "include", coloured(), {"bus": many(1)}, {"bus": ["red"]}, False),
    ("only the best car is asked", "colour", coloured(), {"car": many(2)}, {"car": ["blue", "red"]}, False),
    ("the best one is red, the other is not asked", "colour", coloured(),
     {"car": many(2)}, {"car": ["red", "blue"]}, True),
    ("two red of two", "colour", coloured(count=2), {"car": many(2)}, {"car": ["red", "red"]}, True),
    ("one red of two", "colour", coloured(count=2), {"car": many(2)}, {"car": ["red", "green"]}, False),
    ("car at the threshold", "threshold", coloured(), {"car": many(1, 0.3)}, {"car": ["red"]}, False),
    ("counting's threshold does not hold here", "threshold", coloured(), {"car": many(1, 0.5)}, {"car": ["red"]}, True),
    ("best first whatever the detector's order", "order", coloured(),
     {"car": [at(0, 0, score=0.5), at(50, 0, score=0.8)]}, {"car": ["red", "blue"]}, True),
    # --- position: the dog's place to the cat
    ("left", "direction", placed("left of"), pair(-50, 0), {}, True),
    ("right", "direction", placed("right of"), pair(50, 0), {}, True),
    ("above is up, y smaller", "direction", placed("above"), pair(0, -50), {}, True),
    ("below", "direction", placed("below"), pair(0, 50), {}, True),
    ("opposite of left", "direction", placed("left of"), pair(50, 0), {}, False),
    ("opposite of right", "direction", placed("right of"), pair(-50, 0), {}, False),
    ("opposite of above", "direction", placed("above"), pair(0, 50), {}, False),
    ("opposite of below", "direction", placed("below"), pair(0, -50), {}, False),
    ("above is not left", "direction", placed("left of"), pair(0, -50), {}, False),
    ("share exactly one half", "direction", placed("right of"), pair(4, 0), {}, False),
    ("share just above one half", "direction", placed("right of"), pair(4.01, 0), {}, True),
    ("share exactly one half, below", "direction", placed("below"), pair(0, 4), {}, False),
    ("share just above one half, below", "direction", placed("below"), pair(0, 4.01), {}, True),
    ("within the margin", "margin", placed("right of"), pair(2, 0), {}, False),
    ("a hair beyond the margin is nothing", "nothing", placed("right of"), pair(2.0005, 0), {}, False),
    ("same place", "nothing", placed("left of"), pair(0, 0), {}, False),
    ("diagonal is both: right", "direction", placed("right of"), pair(50, 50), {}, True),
    ("diagonal is both: below", "direction", placed("below"), pair(50, 50), {}, True),
    # Offset (50, 50), dims 10: 48 / 70.7 = 0.679. With boxes of 80 each way 50 - 16 = 34, 34 / 70.7 = 0.481.
    ("large boxes shorten a diagonal away", "margin", placed("right of"), pair(50, 50, 80, 80), {}, False),
    # (30, 17): 28 / 34.5 = 0.812 and 15 / 34.5 = 0.435: by the whole offset's length. By that of the shortened one,
    # 15 / 31.8 = 0.472 neither; (30, 19.5): 17.5 / 35.78 = 0.489 against 17.5 / 33.0 = 0.53 tells them apart.
    ("norm is the whole offset's", "direction", placed("below"), pair(30, 19.5), {}, False),
    ("and still right of", "direction", placed("right of"), pair(30, 19.5), {}, True),
    ("no cat to stand by", "anchor", placed("left of"), {"dog": many(1)}, {}, False),
    ("no dog to stand", "include", placed("left of"), {"cat": many(1)}, {}, False),
    ("cat at the threshold is no anchor", "anchor", placed("left of"),
     {"cat": [at(100, 100, score=0.3)], "dog": [at(50, 100)]}, {}, False),
    ("the best cat is the anchor", "order", placed("left of"),
     {"cat": [at(0, 100, score=0.5), at(200, 100, score=0.9)], "dog": [at(100, 100)]}, {}, True),
    ("every pair has to hold", "position",
     {"tag": "position", "include": [{"class": "cat", "count": 1},
                                     {"class": "dog", "count": 2, "position": ["left of", 0]}],
      "prompt": ""}, {"cat": [at(100, 0)], "dog": [at(0, 0), at(200, 0)]}, {}, False),
    ("every pair holds", "position",
     {"tag": "position", "include": [{"class": "cat", "count": 2},
                                     {"class": "dog", "count": 2, "position": ["left of", 0]}],
      "prompt": ""}, {"cat": [at(100, 0), at(150, 0)], "dog": [at(0, 0), at(20, 0)]}, {}, True),
    ("an anchor of the wrong colour is none", "anchor",
     {"tag": "position", "include": [{"class": "cat", "count": 1, "color": "black"},
                                     {"class": "dog", "count": 1, "position": ["left of", 0]}], "prompt": ""},
     pair(-50, 0), {"cat": ["white"]}, False),
    # --- color_attr
    ("both colours", "colour", attributes(), {"car": many(1), "bus": many(1)}, {"car": ["red"], "bus": ["blue"]}, True),
    ("swapped", "colour", attributes(), {"car": many(1), "bus": many(1)}, {"car": ["blue"], "bus": ["red"]}, False),
    ("first wrong", "colour", attributes(), {"car": many(1), "bus": many(1)},
     {"car": ["pink"], "bus": ["blue"]}, False),
    ("second wrong", "colour", attributes(), {"car": many(1), "bus": many(1)},
     {"car": ["red"], "bus": ["white"]}, False),
    ("bus missing", "include", attributes(), {"car": many(1)}, {"car": ["red"]}, False),
    ("same colour for both", "colour", attributes("red", "red"), {"car": many(1), "bus": many(1)},
     {"car": ["red"], "bus": ["red"]}, True),
    ("bus at the threshold", "threshold", attributes(), {"car": many(1), "bus": many(1, 0.3)},
     {"car": ["red"], "bus": ["blue"]}, False),
]  # fmt: skip


class Seen:
    """A detector that saw what it is told, and colours by the detector's ranking."""

    def __init__(self, objects: dict[str, list[Found]], colours: dict[str, list[str]]) -> None:
        self.objects, self.names, self.settings = objects, colours, {}

    def __call__(self, image: np.ndarray, *arguments: Any) -> Any:
        if not arguments:
            return self.objects
        found, name = arguments
        return self.names[name][: len(found)]


def test_the_table_is_large_enough_and_covers_everything():
    assert len(TABLE) >= 60
    assert {case[2]["tag"] for case in TABLE} == {
        "single_object", "two_object", "counting", "colors", "position", "color_attr"
    }  # fmt: skip
    assert {case[1] for case in TABLE} == set(RULES)
    assert len({case[0] for case in TABLE}) == len(TABLE)


@pytest.mark.parametrize("case", TABLE, ids=lambda case: f"{case[2]['tag']}: {case[0]}")
def test_rules(case: Case):
    _, _, line, objects, colours, expected = case
    seen = Seen(objects, colours)
    right, reason = GenEval(seen, seen).verdict(np.zeros((8, 8, 3), np.uint8), line)
    assert right == expected, reason
    assert (reason == "") == right


@pytest.mark.parametrize("seed", [0, 1])
def test_relations_by_the_published_formula_in_numpy(seed):
    """Random boxes against the formula written with arrays, as the paper's code has it."""
    rng = np.random.default_rng(seed)
    seen: set[frozenset[str]] = set()
    for _ in range(300):
        corners = np.sort(rng.uniform(0, 60, size=(2, 2, 2)), axis=1)  # box, corner, axis
        centres, dims = corners.mean(1), corners[:, 1] - corners[:, 0]
        offset = centres[0] - centres[1]
        revised = np.maximum(np.abs(offset) - 0.1 * dims.sum(0), 0) * np.sign(offset)
        x, y = revised / np.linalg.norm(offset)
        holds = (("left of", x < -0.5), ("right of", x > 0.5), ("above", y < -0.5), ("below", y > 0.5))
        expected = {name for name, true in holds if true}
        if (np.abs(revised) < 1e-3).all():
            expected = set()
        got = relative_position(corners[0].ravel(), corners[1].ravel())
        assert got == expected
        seen.add(frozenset(got))
    assert len(seen) >= 8, "all four, pairs of them, and nothing"


def test_keeping_is_by_score_and_stable():
    kept = keep({"dog": [at(i, 0, score=s) for i, s in enumerate((0.4, 0.9, 0.3, 0.9, 0.31))]}, "colors")
    assert [f.box[0] + 5 for f in kept["dog"]] == [1, 3, 0, 4]
    assert keep({"dog": many(2, 0.2)}, "colors") == {}


def test_reasons_name_what_is_wrong():
    objects = {"cat": many(1), "dog": [at(500, 0)]}
    assert judge(objects, placed("left of"), lambda f, n: [])[1].startswith("wrong place: dog is right of")
    assert judge({"dog": many(1)}, placed("left of"), lambda f, n: [])[1].split(":")[0] == "missing objects"
    with pytest.raises(ValueError, match="does not come before it"):
        judge({"dog": many(1)}, {"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, lambda f, n: [])


def image(n: int) -> np.ndarray:
    return np.full((4, 4, 3), n, np.uint8)


class Recorded:
    """A detector that knows the objects of image n by its grey."""

    def __init__(self, objects: list[dict[str, list[Found]]]) -> None:
        self.objects, self.settings = objects, {"detector": "recorded"}

    def __call__(self, picture: np.ndarray) -> dict[str, list[Found]]:
        return self.objects[int(picture[0, 0, 0])]


class Red:
    settings = {"colours": "all red"}  # noqa: RUF012

    def __call__(self, picture: np.ndarray, objects: list[Found], name: str) -> list[str]:
        return ["red"] * len(objects)


def test_means_are_those_of_six_tasks_whatever_their_sizes():
    lines = [single(), single(), single(), two(), counting(2), coloured(), placed("left of"), attributes()]
    objects = [{"dog": many(1)}, {"dog": many(1)}, {}, {"dog": many(1)}, {"clock": many(2)}, {"car": many(1)},
               pair(-50, 0), {"car": many(1), "bus": many(1)}]  # fmt: skip
    results = GenEval(Recorded(objects), Red(), resamples=50)([image(i) for i in range(8)], lines)
    tasks = {task: figure["mean"] for task, figure in results["tasks"].items()}
    expected = {"single_object": 2 / 3, "two_object": 0, "counting": 1, "colors": 1, "position": 1, "color_attr": 0}
    assert tasks == pytest.approx(expected)
    assert results["overall"]["mean"] == pytest.approx(sum(expected.values()) / 6)
    assert results["shares"]["images"] == pytest.approx(5 / 8)
    assert results["settings"]["detector"] == "recorded"
    clustered = GenEval(Recorded(objects), Red(), resamples=50)([image(i) for i in range(3)], lines[:3], [0, 1, 1])
    assert clustered["shares"] == {"images": pytest.approx(2 / 3), "prompts": 1.0}


def test_an_all_zero_run_is_refused():
    blind = GenEval(Recorded([{}, {}]), Red(), resamples=50)
    with pytest.raises(ValueError, match="none of 2 images is right, and in 2 the detector found nothing"):
        blind([image(0), image(1)], [single(), two()])
    allowed = GenEval(Recorded([{}, {}]), Red(), resamples=50, allow_zero=True)
    assert allowed([image(0), image(1)], [single(), two()])["overall"]["mean"] == 0


def test_names_are_cocos_with_three_of_genevals():
    assert len(set(CLASSES)) == 80
    assert CLASSES[0] == "person"
    assert CLASSES[-1] == "toothbrush"
    assert CLASSES[64:67] == ("computer mouse", "tv remote", "computer keyboard")


OFFICIAL = ["person", "bench", "hair drier", "donut", "couch", "potted plant", "dining table", "tv", "cell phone"]


def test_official_lines_are_understood():
    assert set(OFFICIAL) <= set(CLASSES)
    line = json.loads('{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", '
                      '"count": 3}], "prompt": "a photo of two clocks"}')  # fmt: skip
    seen = Seen({"clock": many(2)}, {})
    assert GenEval(seen, seen).verdict(image(0), line)[0]
