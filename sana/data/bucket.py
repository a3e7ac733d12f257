"""The sizes that images are brought to: one square, the published aspect buckets, or a table of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sana.aspect_ratio import NOMINAL, RATIOS_1024

LANCZOS_FROM = 2048
"""Nominal size from which the published recipes resize by Lanczos rather than bicubically."""


@dataclass(frozen=True)
class Buckets:
    """A table of image sizes; an image goes to the one whose ratio is nearest to its own.

    Attributes:
        sizes: (height, width) in pixels of each bucket.
        ratios: height / width by which an image chooses, one per bucket; published tables round theirs.
        lanczos: resize by Lanczos instead of bicubically.

    Raises:
        ValueError: no bucket, as many ratios as sizes are not given, or a side or ratio is not positive.
    """

    sizes: Sequence[tuple[int, int]]
    ratios: Sequence[float]
    lanczos: bool = False

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.ratios):
            raise ValueError(f"buckets: {len(self.sizes)} sizes and {len(self.ratios)} ratios, expected equally many")
        if min(min(size) for size in self.sizes) < 1 or min(self.ratios) <= 0:
            raise ValueError("buckets: sides and ratios are positive")

    def __len__(self) -> int:
        return len(self.sizes)

    def nearest(self, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Number of the bucket of each image, (n,) int64: least |ratio - height / width|, the first of equals.

        Args:
            heights, widths: (n,) in pixels, positive.
        """
        if len(self) == 1:
            return np.zeros(len(heights), np.int64)
        wanted = np.asarray(heights, np.float64) / np.asarray(widths, np.float64)
        order = np.argsort(self.ratios, kind="stable")
        ratios = np.asarray(self.ratios, np.float64)[order]
        above = np.clip(np.searchsorted(ratios, wanted), 1, len(ratios) - 1)
        below = above - 1
        # The difference of the two distances, not a midpoint: ties must fall as they do in a search over all.
        difference = np.abs(ratios[above] - wanted) - np.abs(ratios[below] - wanted)
        nearest = np.where(difference < 0, order[above], order[below])
        return np.where(difference == 0, np.minimum(order[above], order[below]), nearest).astype(np.int64)


def square(size: int) -> Buckets:
    """One bucket: every image becomes size x size pixels."""
    return Buckets([(size, size)], [1.0], size >= LANCZOS_FROM)


def published(size: int) -> Buckets:
    """The 40 buckets that SANA was trained on at a nominal size of 512, 1024, 2048 or 4096 px.

    Raises:
        ValueError: no table was published for this size (that of 256 px does not fit autoencoders of ratio 32).
    """
    if size not in NOMINAL:
        raise ValueError(f"buckets: none are published for {size} px, only for {', '.join(map(str, NOMINAL))}")
    sizes = [(h * size // 1024, w * size // 1024) for h, w in RATIOS_1024.values()]
    return Buckets(sizes, [float(ratio) for ratio in RATIOS_1024], size >= LANCZOS_FROM)


def by_area(area: int, step: int, min_ratio: float = 0.25, max_ratio: float = 4.0) -> Buckets:
    """All sizes of about one area whose sides are multiples of a step.

    For every height there is the width that comes nearest to the area, and for every width the height; of sizes with
    equal ratio the one nearest to the area stays. The ratios are exact.

    Args:
        area: pixels of an image, such as 1024 * 1024.
        step: both sides are multiples of it: the autoencoder's ratio times the network's patch.
        min_ratio, max_ratio: range of height / width.

    Raises:
        ValueError: no size is in the range.
    """
    if area < 1 or step < 1 or not 0 < min_ratio <= max_ratio:
        raise ValueError(
            f"buckets: area and step are positive and min_ratio <= max_ratio, got {area}, {step}, "
            f"{min_ratio} and {max_ratio}"
        )
    best: dict[float, tuple[int, int]] = {}
    for side in range(step, max(int((area * max(max_ratio, 1 / min_ratio)) ** 0.5), step) + step, step):
        other = max(step, round(area / side / step) * step)
        for height, width in ((side, other), (other, side)):
            ratio = height / width
            known = best.get(ratio)
            if min_ratio <= ratio <= max_ratio and (
                known is None or abs(height * width - area) < abs(known[0] * known[1] - area)
            ):
                best[ratio] = (height, width)
    if not best:
        raise ValueError(f"buckets: no size of {area} pixels in steps of {step} has a ratio in the range")
    ratios = sorted(best)
    return Buckets([best[ratio] for ratio in ratios], ratios, area >= LANCZOS_FROM**2)
