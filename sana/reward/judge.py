"""Judges: who chooses among the images of one prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sana.reward.protocol import Reward

Images = Sequence[NDArray[np.uint8]]
Lines = Sequence[Mapping[str, Any]]
"""For each image what is known of it: at least "prompt"; in the scenes world also GenEval's "include"."""


class Judge(ABC):
    """Scores the candidates of a prompt. Larger is better; only the order within a prompt means something.

    Scoring has two halves, so that images can be scored while others are still being drawn: each of `parts` looks at
    single images, and `combine` sees all numbers of one prompt.

    Args:
        name: under which its scores are recorded.

    Attributes:
        settings: what the scores depend on, for the record.
    """

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name, self.settings = name, dict(settings)

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, SingleJudge]:
        """What looks at images, by the names of their scores."""

    @abstractmethod
    def combine(self, parts: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """Scores (N,) of all candidates of a prompt from what each part said of them."""

    def check(self, lines: Lines) -> None:
        """Refuse what it could not judge, before anything is drawn.

        Raises:
            ValueError: such a line.
        """
        for part in self.parts.values():
            if part is not self:
                part.check(lines)


class SingleJudge(Judge):
    """A judge that scores every image by itself."""

    @property
    def parts(self) -> Mapping[str, SingleJudge]:
        """Itself."""
        return {self.name: self}

    def combine(self, parts: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """Its own scores."""
        return parts[self.name]

    @abstractmethod
    def score(self, images: Images, lines: Lines) -> NDArray[np.float64]:
        """uint8 (h, w, 3) each and as many lines -> (n,)."""


class RewardJudge(SingleJudge):
    """A reward as a judge.

    Args:
        name: see `Judge`.
        reward: see `sana.reward.protocol`.
    """

    def __init__(self, name: str, reward: Reward) -> None:
        super().__init__(name, reward.settings)
        self.reward = reward

    def score(self, images: Images, lines: Lines) -> NDArray[np.float64]:
        """The reward's numbers."""
        return self.reward(images, [line["prompt"] for line in lines]).double().numpy()
