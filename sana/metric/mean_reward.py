"""The mean of a reward over images, with a bootstrap interval over prompts; it can be stopped and gone on with."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sana.metric.bootstrap import mean_interval


class MeanReward:
    """A reward as a metric.

    Args:
        reward: (images, prompts) -> (n,), with `settings`; see `sana.reward.protocol`.
        level, resamples, seed: of the bootstrap; images of one prompt are drawn together.

    Attributes:
        needs_prompts: True: it judges images by their prompts.
        settings: of the reward.
    """

    needs_prompts = True

    def __init__(
        self,
        reward: Callable[[Sequence[Any], Sequence[str]], Tensor],
        level: float = 0.95,
        resamples: int = 10_000,
        seed: int = 0,
    ) -> None:
        self.reward, self.level, self.resamples, self.seed = reward, level, resamples, seed
        self.settings: dict[str, Any] = dict(reward.settings)  # type: ignore[attr-defined]

    def measure(self, images: Sequence[Any], metadata: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """``{"score": number}`` for each image.

        Raises:
            ValueError: a line without "prompt".
        """
        missing = next((i for i, line in enumerate(metadata) if "prompt" not in line), None)
        if missing is not None:
            raise ValueError(f"reward: image {missing} of these has no prompt; give metadata=FILE")
        scores = self.reward(images, [line["prompt"] for line in metadata])
        return [{"score": score} for score in scores.tolist()]

    def summary(self, rows: Sequence[Mapping[str, Any]], clusters: Sequence[Hashable] | None = None) -> dict[str, Any]:
        """``{"mean", "interval", "level", "n", "settings"}`` of the numbers that `measure` gave."""
        draw = {"level": self.level, "resamples": self.resamples, "seed": self.seed}
        return mean_interval([row["score"] for row in rows], clusters, **draw).asdict() | {"settings": self.settings}

    def __call__(
        self,
        images: Sequence[Any],
        metadata: Sequence[Mapping[str, Any]],
        clusters: Sequence[Hashable] | None = None,
    ) -> dict[str, Any]:
        """`summary` of `measure`."""
        return self.summary(self.measure(images, metadata), clusters)
