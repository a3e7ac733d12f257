"""A scorer of scenes as a judge, also for prompts that come without GenEval's metadata."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sana.reward.judge import Images, Lines, SingleJudge
from sana.scenes import COLORS, NUMBERS, RELATIONS, SHAPES, entry, plural

Scorer = Callable[[NDArray[np.uint8], Mapping[str, Any]], tuple[bool, str]]
"""uint8 image (H, W, 3) and a line of GenEval's metadata -> (right?, what is wrong)."""

_COUNTS = {"a": 1, "an": 1} | {word: n for n, word in enumerate(NUMBERS) if n > 1}
_CLASSES = {form: shape for shape in SHAPES for form in (shape, plural(shape))}
_PHRASE = re.compile(rf"({'|'.join(_COUNTS)}) (?:({'|'.join(COLORS)}) )?({'|'.join(_CLASSES)})")


class SceneVerdict(SingleJudge):
    """1 for a picture that shows its prompt, 0 for one that does not.

    Args:
        name: see `Judge`.
        score: the scorer, such as `sana.metric.scenes.oracle`.
    """

    def __init__(self, name: str, score: Scorer) -> None:
        function: Any = score.func if isinstance(score, partial) else score
        super().__init__(name, {"scorer": f"{function.__module__}.{function.__qualname__}"})
        self._score = score

    def check(self, lines: Lines) -> None:
        """Refuse prompts that are not of the scenes world.

        Raises:
            ValueError: the first of them.
        """
        for line in lines:
            _complete(line, self.name)

    def score(self, images: Images, lines: Lines) -> NDArray[np.float64]:
        """(n,) of 0 and 1."""
        whole = [_complete(line, self.name) for line in lines]
        return np.array([float(self._score(image, line)[0]) for image, line in zip(images, whole, strict=True)])


def _complete(line: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = line if "include" in line else read_scene(line["prompt"])
    if found is None:
        raise ValueError(
            f"judge: {name} knows only prompts of the scenes world, such as 'a red circle left of a blue square'; "
            f"got {line['prompt']!r:.80}"
        )
    return found


def read_scene(prompt: str) -> dict[str, Any] | None:
    """The line of GenEval's metadata whose prompt this is (see `sana.scenes.prompt`); None where there is none."""
    parts = re.split(rf" (and|{'|'.join(RELATIONS)}) ", prompt)
    things = [_thing(part) for part in parts[::2]]
    if any(thing is None for thing in things) or len(things) > 2:
        return None
    include = [thing for thing in things if thing is not None]
    if len(include) == 2 and parts[1] != "and":
        include = [include[1], include[0] | {"position": [parts[1], 0]}]
        tag = "position"
    elif len(include) == 2:
        tag = "color_attr" if any("color" in thing for thing in include) else "two_object"
    else:
        tag = "counting" if include[0]["count"] > 1 else "colors" if "color" in include[0] else "single_object"
    found = entry(tag, include)
    return found if found["prompt"] == prompt else None  # "two circle", "an red ring", ...


def _thing(text: str) -> dict[str, Any] | None:
    match = _PHRASE.fullmatch(text)
    if match is None:
        return None
    count, color, word = match.groups()
    thing: dict[str, Any] = {"class": _CLASSES[word], "count": _COUNTS[count]}
    return thing if color is None else thing | {"color": color}
