"""Choosing one of several captions of an image.

Nothing here draws: the caller passes a uniform number from `sana.ops.random`, so that a sample gets the same
caption whoever loads it. A rule is called as ``rule(captions, u)`` and gives the caption; its
``probabilities`` are what the choice follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Caption(NamedTuple):
    """One description of an image.

    Attributes:
        source: who wrote it: "prompt", or the name of a captioner.
        text: the description.
        score: how well it matches the image, 100 times the cosine of CLIP in the published data; None if unknown.
    """

    source: str
    text: str
    score: float | None = None


class Captions(Sequence[Caption]):
    """Captions of a sample that are read when they are asked for: a rule looks at scores, and most texts are not used.

    Args:
        scores: of all of them, None where unknown.
        read: number -> caption.
    """

    __slots__ = ("_read", "scores")

    def __init__(self, scores: list[float | None], read: Callable[[int], Caption]) -> None:
        self.scores, self._read = scores, read

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, k: Any) -> Any:
        """Caption k, or those of a slice."""
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        if not -len(self) <= k < len(self):
            raise IndexError(k)
        return self._read(k % len(self))


@dataclass(frozen=True)
class PowerScore:
    """``p_i`` proportional to ``score_i^(1 / temperature)`` among scores of at least `threshold` (SANA's code).

    If no score reaches the threshold, the best is taken; if there are no scores at all, the caption of the
    source "prompt", or the first. Captions without a score are otherwise not chosen.

    Attributes:
        temperature: > 0; the published 0.1 is the tenth power. The smaller, the more often the best.
        threshold: least score of a candidate; the published recipes have 25.
    """

    temperature: float = 0.1
    threshold: float = 25.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def probabilities(self, captions: Sequence[Caption]) -> list[float]:
        """Probability of each caption; they sum to 1.

        Raises:
            ValueError: there is no caption, or a score is negative or not a number.
        """
        scores = _scores_of(captions)
        if not scores:
            raise ValueError(_NONE)
        best = -1.0
        for k, score in enumerate(scores):
            if score is not None:
                if not score >= 0:
                    raise ValueError(f"the score of a caption is not negative, got {score} from {captions[k].source}")
                best = max(best, score)
        if best < 0 or best < self.threshold:
            return _fallback(captions, scores)
        power, highest = 1 / self.temperature, best or 1.0
        weights = [0.0 if s is None or s < self.threshold else (s / highest) ** power for s in scores]
        total = sum(weights)
        if not total:  # the best score, and so each candidate's, is zero
            weights = [float(score is not None) for score in scores]
            total = sum(weights)
        return [weight / total for weight in weights]

    def __call__(self, captions: Sequence[Caption], u: float) -> Caption:
        """The caption that u in [0, 1) selects; errors as in `probabilities`."""
        return _pick(captions, self.probabilities(captions), u)


@dataclass(frozen=True)
class SoftmaxScore:
    """``p_i`` proportional to ``exp(score_i / temperature)`` (SANA's paper).

    Captions without a score are not chosen; if there are no scores at all, the caption of the source
    "prompt", or the first, is taken.

    Attributes:
        temperature: > 0, in units of the score.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def probabilities(self, captions: Sequence[Caption]) -> list[float]:
        """Probability of each caption; they sum to 1.

        Raises:
            ValueError: there is no caption, or a score is not a number.
        """
        scores = _scores(captions)
        if all(score is None for score in scores):
            return _fallback(captions, scores)
        return _softmax([None if s is None else s / self.temperature for s in scores])

    def __call__(self, captions: Sequence[Caption], u: float) -> Caption:
        """The caption that u in [0, 1) selects; errors as in `probabilities`."""
        return _pick(captions, self.probabilities(captions), u)


@dataclass(frozen=True)
class Proportion:
    """``p_i`` proportional to the weight of the caption's source, over the sources that the sample has.

    Attributes:
        weights: source -> weight >= 0; a source that is not named is never chosen.
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not any(self.weights.values()) or not all(w >= 0 for w in self.weights.values()):
            raise ValueError(f"caption proportions are not negative and not all zero, got {dict(self.weights)}")

    def probabilities(self, captions: Sequence[Caption]) -> list[float]:
        """Probability of each caption; they sum to 1. Captions of one source share its weight.

        Raises:
            ValueError: there is no caption, or none from a source with a weight.
        """
        _scores(captions)
        sources = [caption.source for caption in captions]
        shares = [self.weights.get(source, 0.0) / sources.count(source) for source in sources]
        total = sum(shares)
        if total == 0:
            raise ValueError(f"captions from {sources}, but proportions only for {sorted(self.weights)}")
        return [share / total for share in shares]

    def __call__(self, captions: Sequence[Caption], u: float) -> Caption:
        """The caption that u in [0, 1) selects; errors as in `probabilities`."""
        return _pick(captions, self.probabilities(captions), u)


_NONE = "a sample needs at least one caption to choose from, got none"


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"the temperature of a caption choice is positive, got {temperature}")


def _scores_of(captions: Sequence[Caption]) -> list[float | None]:
    return captions.scores if isinstance(captions, Captions) else [caption.score for caption in captions]


def _scores(captions: Sequence[Caption]) -> list[float | None]:
    if not len(captions):
        raise ValueError(_NONE)
    scores = _scores_of(captions)
    for k, score in enumerate(scores):
        if score is not None and math.isnan(score):
            raise ValueError(f"the score of the caption from {captions[k].source} is not a number")
    return scores


def _fallback(captions: Sequence[Caption], scores: list[float | None]) -> list[float]:
    """All on the best score; without any, on the source "prompt", else on the first caption."""
    known = [(score, -i) for i, score in enumerate(scores) if score is not None]
    if known:
        chosen = -max(known)[1]
    else:
        chosen = next((i for i, caption in enumerate(captions) if caption.source == "prompt"), 0)
    return [float(i == chosen) for i in range(len(captions))]


def _softmax(logits: list[float | None]) -> list[float]:
    """Softmax over the logits that are not None; the others get 0. All -inf counts as equal."""
    highest = max(logit for logit in logits if logit is not None)
    weights = [0.0 if logit is None else 1.0 if logit == highest else math.exp(logit - highest) for logit in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def _pick(captions: Sequence[Caption], probabilities: list[float], u: float) -> Caption:
    """Inverse of the cumulative distribution at u; a caption of probability 0 is never picked."""
    if not 0 <= u < 1:
        raise ValueError(f"the uniform number of a caption choice is in [0, 1), got {u}")
    cumulative, chosen = 0.0, None
    for k, p in enumerate(probabilities):
        if p > 0:
            cumulative += p
            chosen = k
            if u < cumulative:
                break
    assert chosen is not None  # probabilities sum to 1; where rounding left the sum below u, the last one is taken
    return captions[chosen]
