"""Kernel distances between two sets of features: KID (Binkowski et al. 2018) and CMMD (Jayasumana et al. 2024)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana.metric.fid import NORMAL_95, Batches, ImageFeatures
from sana.metric.pictures import Pictures
from sana.metric.ranks import shared_features


def polynomial_mmd2(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of x (n, d) and y (m, d) under the kernel (a.b / d + 1)^3, in float64; may be negative."""
    x, y = x.double(), y.double()
    n, m, d = len(x), len(y), x.shape[1]
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def gaussian_mmd2(x: Tensor, y: Tensor, sigma: float = 10.0, block: int = 2048) -> float:
    """Squared MMD of x (n, d) and y (m, d) under exp(-|a - b|^2 / (2 sigma^2)), pairs of a vector with itself
    included, in float64 and in blocks of rows. Never negative but for rounding."""

    def mean(a: Tensor, b: Tensor) -> Tensor:
        sums = [torch.exp(-(torch.cdist(rows, b) ** 2) / (2 * sigma**2)).sum() for rows in a.split(block)]
        return torch.stack(sums).sum() / (len(a) * len(b))

    x, y = x.double(), y.double()
    return float(mean(x, x) + mean(y, y) - 2 * mean(x, y))


class FeatureSets:
    """Base of metrics that need all features of both sets at once.

    Args:
        features: the feature space.
        reference: as `sana.metric.fid.FID` takes it, but for ``.npz``.
        batch_size: images per call of `features`.
        name: of the metric, for messages.
    """

    def __init__(
        self,
        features: ImageFeatures,
        reference: str | Path | Batches | None = None,
        batch_size: int = 32,
        name: str = "kid",
    ) -> None:
        self.features, self.reference, self.batch_size, self.name = features, reference, batch_size, name
        self._real: Tensor | None = None

    def sets(self, images: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Features (n, d) of the images and (m, d) of the real ones, the same on every rank.

        Raises:
            ValueError: no reference, or one that has statistics only.
        """
        return shared_features(images, self.features, self.batch_size), self.real()

    def real(self) -> Tensor:
        """Features of the real images."""
        if self._real is not None:
            return self._real
        if self.reference is None or str(self.reference).endswith(".npz"):
            raise ValueError(
                f"{self.name}: no real images; give reference=FOLDER or shards (a .npz of statistics is not enough)"
            )
        if callable(self.reference):
            self._real = torch.cat([self.features(batch) for batch in self.reference()])
        else:
            self._real = shared_features(Pictures(self.reference), self.features, self.batch_size)
        return self._real

    def settings(self) -> dict[str, Any]:
        """What the number depends on."""
        source = "validation images of the run's data" if callable(self.reference) else str(self.reference)
        return {**self.features.settings, "reference": source, "reference_n": len(self.real())}


class KID(FeatureSets):
    """Kernel Inception distance: the mean of `polynomial_mmd2` over random subsets.

    Unlike FID it is not biased by N. The interval is that of the mean over the subsets.

    Args:
        features, reference, batch_size, name: see `FeatureSets`.
        subsets, subset_size: how many subsets of how many images; a smaller set gives smaller subsets.
        seed: of the subsets.
    """

    def __init__(
        self,
        features: ImageFeatures,
        reference: str | Path | Batches | None = None,
        batch_size: int = 32,
        name: str = "kid",
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(features, reference, batch_size, name)
        if subsets < 1 or subset_size < 2:
            raise ValueError(f"{name}: {subsets} subsets of {subset_size}; expected at least 1 of at least 2")
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def __call__(
        self, images: Sequence[Any], metadata: Sequence[Any] = (), clusters: Sequence[Hashable] | None = None
    ) -> dict[str, Any]:
        """``{"mean", "interval", "level", "n", "std", "settings"}``; std is over the subsets."""
        x, y = self.sets(images)
        size = min(self.subset_size, len(x), len(y))
        if size < 2:
            raise ValueError(f"{self.name}: {len(x)} and {len(y)} images; expected at least 2 on each side")
        rng = np.random.default_rng(self.seed)
        values = np.array(
            [
                polynomial_mmd2(*(z[torch.from_numpy(rng.permutation(len(z))[:size])] for z in (x, y)))
                for _ in range(self.subsets)
            ]
        )
        mean, std = float(values.mean()), float(values.std(ddof=1)) if self.subsets > 1 else 0.0
        spread = NORMAL_95 * std / self.subsets**0.5
        own = {"subsets": self.subsets, "subset_size": size, "seed": self.seed}
        return {
            "mean": mean,
            "interval": [mean - spread, mean + spread],
            "level": 0.95,
            "n": len(x),
            "std": std,
            "settings": {**self.settings(), **own},
        }


class CMMD(FeatureSets):
    """1000 times `gaussian_mmd2` of unit CLIP image embeddings, sigma = 10; no normality assumed.

    Args:
        features, reference, batch_size, name: see `FeatureSets`; features of unit length.
        parts: of the delete-a-group jackknife over the generated images.
    """

    def __init__(
        self,
        features: ImageFeatures,
        reference: str | Path | Batches | None = None,
        batch_size: int = 32,
        name: str = "cmmd",
        parts: int = 20,
    ) -> None:
        super().__init__(features, reference, batch_size, name)
        if parts < 2:
            raise ValueError(f"{name}: parts is {parts}; expected at least 2")
        self.parts = parts

    def __call__(
        self, images: Sequence[Any], metadata: Sequence[Any] = (), clusters: Sequence[Hashable] | None = None
    ) -> dict[str, Any]:
        """``{"mean", "interval", "level", "n", "settings"}``."""
        x, y = self.sets(images)
        value = 1000 * gaussian_mmd2(x, y)
        part = torch.arange(len(x)) % self.parts
        filled = [p for p in range(self.parts) if 0 < int((part == p).sum()) < len(x)]
        rest = torch.tensor([1000 * gaussian_mmd2(x[part != p], y) for p in filled], dtype=torch.float64)
        g = len(filled)
        spread = NORMAL_95 * float(((g - 1) / g * (rest - rest.mean()).square().sum()).sqrt()) if g > 1 else 0.0
        return {
            "mean": value,
            "interval": [value - spread, value + spread],
            "level": 0.95,
            "n": len(x),
            "settings": {**self.settings(), "sigma": 10.0, "scale": 1000},
        }


def precision_recall(x: Tensor, y: Tensor, k: int = 3, block: int = 2048) -> tuple[Tensor, Tensor]:
    """Which generated vectors lie among the real ones, and which real among the generated (Kynkaanniemi et al. 2019).

    A vector lies among a set when it is within the distance of some member to that member's k-th neighbour.

    Args:
        x: (n, d) generated.
        y: (m, d) real.
        k: neighbours, the member itself not counted.
        block: rows at a time.

    Returns:
        (n,) and (m,) booleans; their means are precision and recall.

    Raises:
        ValueError: a set of k vectors or fewer.
    """
    if min(len(x), len(y)) <= k:
        raise ValueError(f"precision_recall: {len(x)} and {len(y)} images; expected more than k = {k} on each side")
    x, y = x.double(), y.double()

    def radii(z: Tensor) -> Tensor:
        return torch.cat([torch.cdist(rows, z).kthvalue(k + 1).values for rows in z.split(block)])

    def among(a: Tensor, b: Tensor) -> Tensor:
        reach = radii(b)
        return torch.cat([(torch.cdist(rows, b) <= reach).any(1) for rows in a.split(block)])

    return among(x, y), among(y, x)


class PrecisionRecall(FeatureSets):
    """Precision (are the images like real ones?) and recall (are all kinds of real ones there?) as two figures.

    Args:
        features, reference, batch_size, name: see `FeatureSets`.
        k: neighbours.
    """

    def __init__(
        self,
        features: ImageFeatures,
        reference: str | Path | Batches | None = None,
        batch_size: int = 32,
        name: str = "precision_recall",
        k: int = 3,
    ) -> None:
        super().__init__(features, reference, batch_size, name)
        self.k = k

    def __call__(
        self, images: Sequence[Any], metadata: Sequence[Any] = (), clusters: Sequence[Hashable] | None = None
    ) -> dict[str, Any]:
        """``{"several": {"precision": figure, "recall": figure}}``; intervals are those of a share (normal)."""
        settings: dict[str, Any] = {"k": self.k}
        figures = {}
        x, y = self.sets(images)
        for name, hits in zip(("precision", "recall"), precision_recall(x, y, self.k), strict=True):
            share = float(hits.double().mean())
            spread = NORMAL_95 * (share * (1 - share) / len(hits)) ** 0.5
            figures[name] = {
                "mean": share,
                "interval": [max(share - spread, 0.0), min(share + spread, 1.0)],
                "level": 0.95,
                "n": len(x),
                "settings": {**self.settings(), **settings},
            }
        return {"several": figures}
