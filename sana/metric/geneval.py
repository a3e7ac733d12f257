"""GenEval (Ghosh et al. 2023) in this environment: a detector and a judge of colours from outside, the published rules
between them, and the means that are published.

The published numbers were made with mmdet's Mask2Former, which needs a Python of its own; Hugging Face's has other
weights, so a number says which detector it comes from, and small differences are to be expected, most of all in
counting, whose threshold of 0.9 is sensitive.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sana.metric.geneval_rules import Found, Objects, Relate, judge, keep, relative_position
from sana.metric.geneval_scenes import GenEvalScenes


class Detector(Protocol):
    """Finds objects of named classes.

    Attributes:
        settings: which detector this is, for the record.
    """

    settings: dict[str, Any]

    def __call__(self, image: NDArray[np.uint8], /) -> Objects:
        """uint8 (h, w, 3) -> all objects by class, of any score and in any order."""
        ...


class ColourJudge(Protocol):
    """Names the colours of objects.

    Attributes:
        settings: how, for the record.
    """

    settings: dict[str, Any]

    def __call__(self, image: NDArray[np.uint8], objects: Sequence[Found], name: str, /) -> Sequence[str]:
        """A colour for each object of class `name`."""
        ...


class GenEval(GenEvalScenes):
    """The benchmark as a metric.

    Args:
        detector: see `Detector`, such as `sana.metric.mask2former.Mask2Former`.
        colours: see `ColourJudge`, such as `sana.metric.clip_colours.ClipColours`.
        relate: which relations two boxes have.
        allow_zero: accept a run in which no image at all is right.
        level, resamples, seed: of the bootstrap.
    """

    def __init__(
        self,
        detector: Detector,
        colours: ColourJudge,
        relate: Relate = relative_position,
        allow_zero: bool = False,
        level: float = 0.95,
        resamples: int = 10_000,
        seed: int = 0,
    ) -> None:
        super().__init__(self.verdict, level, resamples, seed)
        self.detector, self.colours, self.relate, self.allow_zero = detector, colours, relate, allow_zero
        self.settings = {**detector.settings, **colours.settings, "rules": "GenEval: 0.3, counting 0.9, at most 16"}

    def verdict(self, image: NDArray[np.uint8], line: Mapping[str, Any]) -> tuple[bool, str]:
        """Whether one image shows its line of the metadata, and why not."""
        objects = keep(self.detector(image), line["tag"])
        right, reason = judge(objects, line, lambda some, name: self.colours(image, some, name), self.relate)
        seen = ", ".join(f"{len(found)} {name}" for name, found in objects.items()) or "nothing"
        return right, reason if right else f"{reason} (found {seen})"

    def summary(self, rows: Sequence[Mapping[str, Any]], clusters: Sequence[Hashable] | None = None) -> dict[str, Any]:
        """See `GenEvalScenes.summary`; with the share of images that are right ("images"), the share of prompts of
        which one image is ("prompts"), and the settings.

        Raises:
            ValueError: nothing is right, which is what a broken detector looks like.
        """
        if not self.allow_zero and not any(row["correct"] for row in rows):
            blind = sum("(found nothing)" in row["reason"] for row in rows)
            raise ValueError(
                f"geneval: none of {len(rows)} images is right, and in {blind} the detector found nothing; that is "
                "what wrong weights or wrong files look like. Look at them; metric.geneval.allow_zero=true accepts it"
            )
        labels = list(range(len(rows))) if clusters is None else list(clusters)
        prompts: dict[Hashable, bool] = {}
        for label, row in zip(labels, rows, strict=True):
            prompts[label] = prompts.get(label, False) or bool(row["correct"])
        shares = {
            "images": sum(bool(row["correct"]) for row in rows) / len(rows),
            "prompts": sum(prompts.values()) / len(prompts),
        }
        return super().summary(rows, clusters) | {"shares": shares, "settings": self.settings}
