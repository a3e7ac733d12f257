"""The scenes' oracle as GenEval's detector gives the oracle's own numbers through GenEval's rules."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sana.data.synthetic import make_scene, metadata, render
from sana.metric.geneval import GenEval
from sana.metric.geneval_rules import Found
from sana.metric.geneval_scenes import GenEvalScenes
from sana.metric.scenes import detect, oracle
from sana.scenes import SHAPES, relations


class Oracle:
    """The scenes' detector with its colours."""

    settings = {"detector": "oracle"}  # noqa: RUF012

    def __call__(self, image, *arguments):
        if arguments:
            objects, _ = arguments
            return [self.colours[f.box] for f in objects]
        found, self.colours = {}, {}
        for d in detect(image):
            cx, cy, w, h = d.box
            box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            self.colours[box] = d.color
            found.setdefault(d.shape, []).append(Found(box, 1.0))
        return found


def centred(a, b):
    """`sana.scenes.relations` on corner boxes."""
    return relations(*(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1) for x1, y1, x2, y2 in (a, b)))


def strict(line):
    """The oracle takes just what was asked for; GenEval says so with "exclude"."""
    counts = Counter(item["class"] for item in line["include"] for _ in range(item["count"]))
    return {**line, "exclude": [{"class": s, "count": counts[s] + 1} for s in SHAPES]}


@pytest.mark.parametrize("seed", [0, 1])
def test_injected_oracle_gives_its_own_numbers(seed):
    rng = np.random.default_rng(seed)
    scenes = [make_scene(seed, int(i)) for i in rng.integers(0, 100_000, size=60)]
    lines = [metadata(s) for s in scenes]
    keep = [i for i, line in enumerate(lines) if len({e["class"] for e in line["include"]}) == len(line["include"])]
    images = [render(scenes[i]) for i in keep]
    lines = [strict(lines[i]) for i in keep]
    wrong = [images[(k + 7) % len(images)] if k % 3 == 0 else x for k, x in enumerate(images)]
    seen = Oracle()
    ours = GenEval(seen, seen, relate=centred, resamples=100)(wrong, lines)
    theirs = GenEvalScenes(oracle, resamples=100)(wrong, lines)
    assert [v["correct"] for v in ours["verdicts"]] == [v["correct"] for v in theirs["verdicts"]]
    assert 0.3 < ours["overall"]["mean"] < 0.9
    assert ours["overall"] == theirs["overall"]
