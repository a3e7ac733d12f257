"""GenEval on scenes: six task means, their unweighted mean, intervals and reasons, from any scorer.

The aggregation is GenEval's (Ghosh et al. 2023): an image is right or wrong, a task's number is the mean over
its images, and the overall number is the mean of the task means, whatever their sizes. The scorer is an
argument, so the rules here are tested without one, and a learned detector can take the oracle's place.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sana.metric.bootstrap import mean_interval, mean_of_means_interval
from sana.scenes import TASKS

Scorer = Callable[[NDArray[np.uint8], Mapping[str, Any]], tuple[bool, str]]
"""uint8 image (H, W, 3) and one line of GenEval's metadata -> (right?, reason; "" when right)."""


@dataclass(frozen=True)
class Verdict:
    """What the scorer said about one image.

    Attributes:
        index: position of the image among those given.
        task: its tag.
        prompt: what was asked for.
        correct: whether the image shows it.
        reason: what is wrong, in the scorer's words; "" when correct.
    """

    index: int
    task: str
    prompt: str
    correct: bool
    reason: str


def judge(images: Sequence[Any], metadata: Sequence[Mapping[str, Any]], score: Scorer) -> list[Verdict]:
    """Verdict of every image, in order.

    Args:
        images: uint8 (H, W, 3) each; an array (n, H, W, 3) or a sequence that loads lazily.
        metadata: one line of GenEval's schema per image, with at least "tag" and "prompt".
        score: the scorer.

    Raises:
        ValueError: different lengths, an image that is not uint8 RGB, a line without tag or prompt, an
            unknown tag.
    """
    if len(images) != len(metadata):
        raise ValueError(f"geneval_scenes: {len(images)} images but {len(metadata)} lines of metadata")
    verdicts = []
    for i, line in enumerate(metadata):
        missing = [key for key in ("tag", "prompt", "include") if key not in line]
        if missing:
            raise ValueError(f"geneval_scenes: metadata of image {i} has no {' and no '.join(map(repr, missing))}")
        if line["tag"] not in TASKS:
            raise ValueError(f"geneval_scenes: image {i} has tag {line['tag']!r}, expected one of {', '.join(TASKS)}")
        image = np.asarray(images[i])
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"geneval_scenes: image {i} is {image.dtype} of shape {image.shape}, expected uint8 (H, W, 3)"
            )
        correct, reason = score(image, line)
        verdicts.append(Verdict(i, line["tag"], line["prompt"], bool(correct), "" if correct else str(reason)))
    return verdicts


def summarise(
    verdicts: Sequence[Verdict],
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Task means, overall mean, intervals and reasons.

    Args:
        verdicts: of `judge`.
        clusters: one label per verdict: which entry of the prompt list it belongs to. Several images of one
            entry are drawn together by the bootstrap. None: one image per entry.
        level, resamples, seed: of the bootstrap.

    Returns:
        ``{"overall": {"mean", "interval", "level", "n"}, "tasks": {task: the same and "reasons": {kind:
        count}}}``. Tasks are in GenEval's order and only those that occur; overall is the mean of their
        means. "reasons" is sorted by count and adds up to the number of wrong images.

    Raises:
        ValueError: no verdicts.
    """
    if not verdicts:
        raise ValueError("geneval_scenes: no images to summarise")
    values: dict[str, list[float]] = {}
    labels: dict[str, list[Hashable]] = {}
    reasons: dict[str, Counter[str]] = {}
    for i, verdict in enumerate(verdicts):
        values.setdefault(verdict.task, []).append(float(verdict.correct))
        labels.setdefault(verdict.task, []).append(i if clusters is None else clusters[i])
        reasons.setdefault(verdict.task, Counter())
        if not verdict.correct:
            reasons[verdict.task][kind_of(verdict.reason)] += 1
    draw = {"level": level, "resamples": resamples, "seed": seed}
    tasks = {
        task: mean_interval(values[task], labels[task], **draw).asdict()
        | {"reasons": dict(sorted(reasons[task].items(), key=lambda item: (-item[1], item[0])))}
        for task in TASKS
        if task in values
    }
    return {"overall": mean_of_means_interval(values, labels, **draw).asdict(), "tasks": tasks}


def kind_of(reason: str) -> str:
    """The class of a reason, for counting: what stands before its first colon or bracket."""
    return re.split(r":| \(", reason, maxsplit=1)[0].strip() or "no reason given"


class GenEvalScenes:
    """The two functions above as a metric: images and metadata in, one dict out.

    Args:
        score: the scorer, e.g. `sana.metric.scenes.score`.
        level, resamples, seed: of the bootstrap, as in `summarise`.

    Attributes:
        scores_prompts: True: it judges images against prompts, so held-out prompts are a second call.
    """

    scores_prompts = True

    def __init__(self, score: Scorer, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> None:
        self.score = score
        self.level = level
        self.resamples = resamples
        self.seed = seed

    def measure(self, images: Sequence[Any], metadata: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The verdict of each image as a plain dict, which is all that `summary` needs: it can be kept in a file and
        scoring gone on with later."""
        return [asdict(v) for v in judge(images, metadata, self.score)]

    def summary(self, rows: Sequence[Mapping[str, Any]], clusters: Sequence[Hashable] | None = None) -> dict[str, Any]:
        """`summarise` of the verdicts that `measure` gave, and the verdicts themselves as "verdicts"."""
        verdicts = [Verdict(i, r["task"], r["prompt"], r["correct"], r["reason"]) for i, r in enumerate(rows)]
        numbers = summarise(verdicts, clusters, level=self.level, resamples=self.resamples, seed=self.seed)
        return numbers | {"verdicts": [asdict(v) for v in verdicts]}

    def __call__(
        self,
        images: Sequence[Any],
        metadata: Sequence[Mapping[str, Any]],
        clusters: Sequence[Hashable] | None = None,
    ) -> dict[str, Any]:
        """`summary` of `measure`."""
        return self.summary(self.measure(images, metadata), clusters)
