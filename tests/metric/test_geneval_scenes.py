"""GenEval's aggregation with planted verdicts: every number is counted by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sana.metric.geneval_scenes import GenEvalScenes, judge, kind_of, summarise
from sana.scenes import TASKS


def planted(image, line) -> tuple[bool, str]:
    """A scorer that reads its verdict from the first pixel."""
    code = int(image[0, 0, 0])
    return (True, "") if code == 0 else (False, f"kind {code}: details of {line['prompt']}")


def case(codes: dict[str, list[int]]):
    images, lines = [], []
    for task, values in codes.items():
        for i, code in enumerate(values):
            image = np.zeros((8, 8, 3), np.uint8)
            image[0, 0, 0] = code
            images.append(image)
            lines.append({"tag": task, "include": [], "exclude": [], "prompt": f"{task} {i}"})
    return np.stack(images), lines


CODES = {
    "position": [0, 1, 1, 2],
    "single_object": [0, 0],
    "two_object": [0, 0, 0, 1, 1],
    "counting": [3] * 10,
    "colors": [0, 0, 0, 4],
    "color_attr": [0, 5, 5, 6, 7],
}


def test_overall_is_the_mean_of_task_means_not_of_images():
    result = GenEvalScenes(planted)(*case(CODES))
    means = {
        "position": 0.25,
        "single_object": 1.0,
        "two_object": 0.6,
        "counting": 0.0,
        "colors": 0.75,
        "color_attr": 0.2,
    }
    assert list(result["tasks"]) == list(TASKS)
    for task, expected in means.items():
        row = result["tasks"][task]
        assert row["mean"] == pytest.approx(expected)
        assert row["n"] == len(CODES[task])
        assert row["interval"][0] <= expected <= row["interval"][1]
        assert sum(row["reasons"].values()) == round(len(CODES[task]) * (1 - expected))
    assert result["overall"]["mean"] == pytest.approx(sum(means.values()) / 6)
    assert result["overall"]["n"] == 30
    pooled = sum(v == 0 for values in CODES.values() for v in values) / 30
    assert result["overall"]["mean"] != pytest.approx(pooled)
    assert result["tasks"]["counting"]["interval"] == [0.0, 0.0]
    assert list(result["tasks"]["color_attr"]["reasons"].items()) == [
        ("kind 5", 2),
        ("kind 6", 1),
        ("kind 7", 1),
    ]
    assert result["tasks"]["single_object"]["reasons"] == {}


def test_verdicts_keep_order_prompt_and_reason():
    images, lines = case(CODES)
    verdicts = judge(images, lines, planted)
    assert [v.index for v in verdicts] == list(range(30))
    assert verdicts[1].reason == "kind 1: details of position 1"
    assert (verdicts[0].correct, verdicts[0].reason) == (True, "")
    as_dicts = GenEvalScenes(planted)(images, lines)["verdicts"]
    assert as_dicts[1] == {
        "index": 1,
        "task": "position",
        "prompt": "position 1",
        "correct": False,
        "reason": "kind 1: details of position 1",
    }
    json.dumps(as_dicts)


def test_only_some_tasks():
    result = GenEvalScenes(planted)(*case({"position": [0, 1], "colors": [0, 0]}))
    assert list(result["tasks"]) == ["colors", "position"]
    assert result["overall"]["mean"] == pytest.approx(0.75)


def test_images_of_one_prompt_count_as_one_draw():
    images, lines = case({"colors": [0] * 40 + [1] * 40})
    verdicts = judge(images, lines, planted)
    prompts = np.arange(80) // 4
    wide, narrow = summarise(verdicts, prompts.tolist()), summarise(verdicts)
    assert wide["overall"]["mean"] == narrow["overall"]["mean"] == 0.5
    ratio = np.ptp(wide["overall"]["interval"]) / np.ptp(narrow["overall"]["interval"])
    assert ratio == pytest.approx(2.0, rel=0.15)


def test_images_are_read_one_at_a_time():
    images, lines = case({"colors": [0, 1, 0]})
    read = []

    class Lazy:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            read.append(i)
            return images[i]

    assert GenEvalScenes(planted)(Lazy(), lines)["overall"]["mean"] == pytest.approx(2 / 3)  # type: ignore[arg-type]
    assert read == [0, 1, 2]


def test_bad_input_is_refused():
    images, lines = case({"colors": [0, 1]})
    with pytest.raises(ValueError, match="2 images but 1 lines"):
        judge(images, lines[:1], planted)
    with pytest.raises(ValueError, match="image 0 is float64 of shape"):
        judge(images / 255, lines, planted)
    with pytest.raises(ValueError, match="image 1 has tag 'colour'"):
        judge(images, [lines[0], lines[1] | {"tag": "colour"}], planted)
    with pytest.raises(ValueError, match="image 0 has no 'prompt'"):
        judge(images[:1], [{"tag": "colors", "include": []}], planted)
    with pytest.raises(ValueError, match="no images"):
        summarise([])


def test_kind_of_a_reason():
    assert kind_of("count: expected 2 circles, found 3") == "count"
    assert kind_of("2 objects asked for, 3 found (red star, ...)") == "2 objects asked for, 3 found"
    assert kind_of("blank image") == "blank image"
    assert kind_of("") == "no reason given"
