"""Frechet distance between two sets of feature vectors, in float64, from streamed statistics.

    d^2 = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1^(1/2) S_2 S_1^(1/2))^(1/2)

(Dowson and Landau 1982; Heusel et al. 2017, eq. 6). With any R R' = S_1 the last trace is the sum of the square roots
of the eigenvalues of R' S_2 R, a symmetric matrix: stable, and an order of magnitude faster than the square root or
the eigenvalues of the general product S_1 S_2. R is the Cholesky factor where S_1 has full rank.
Covariances are unbiased (divided by N - 1), as in the reference implementations.

A Frechet distance means nothing without its feature space: `Frechet` takes the features as an argument and
names them in its result.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from scipy.linalg import eigh, lapack
from torch import Tensor

FULL_RANK = 1e-10  # least ratio of Cholesky pivots; below it rounding noise would count as variance

Features = Callable[[Tensor], Tensor]
"""uint8 images (n, h, w, 3) -> features (n, d)."""


class Statistics:
    """Count, mean and scatter of feature vectors seen so far; O(d^2) memory however many there are.

    Every batch is centred on its own mean and merged by the pairwise update of Chan, Golub and LeVeque
    (1979), so there is no cancellation for features far from zero, and the result does not depend on how the
    set was split into batches or ranks (to the last few bits).
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    @property
    def dim(self) -> int:
        """d, the length of a feature vector."""
        return self.mean.numel()

    @property
    def covariance(self) -> Tensor:
        """(d, d) unbiased covariance. Raises ValueError below two vectors."""
        if self.n < 2:
            raise ValueError(f"Statistics: covariance needs at least 2 feature vectors, got {self.n}")
        return self.scatter / (self.n - 1)

    def update(self, features: Tensor) -> Self:
        """Add a batch (b, d) of any float dtype, b >= 0.

        Raises ValueError for another d or non-finite features.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"Statistics: features have shape {tuple(features.shape)}, expected (b, {self.dim})")
        x = features.detach().to(device="cpu", dtype=torch.float64)
        if not torch.isfinite(x).all():
            raise ValueError("Statistics: a feature is not finite; look for blank or broken images")
        if len(x):
            mean = x.mean(0)
            centred = x - mean
            self._merge(len(x), mean, centred.T @ centred)
        return self

    def merge(self, other: Statistics) -> Self:
        """Add what another rank or part has seen. Raises ValueError for another d."""
        if other.dim != self.dim:
            raise ValueError(f"Statistics: cannot merge {other.dim} dimensions into {self.dim}")
        if other.n:
            self._merge(other.n, other.mean, other.scatter)
        return self

    def _merge(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.n + n
        delta = mean - self.mean
        self.mean = self.mean + delta * (n / total)
        self.scatter += scatter
        self.scatter.addr_(delta, delta, alpha=self.n * n / total)
        self.n = total

    def without(self, part: Statistics) -> Statistics:
        """The statistics of what is left when a part that was merged in is taken out again."""
        rest = Statistics(0)
        rest.n = self.n - part.n
        rest.mean = self.mean + (self.mean - part.mean) * (part.n / rest.n)
        delta = part.mean - rest.mean
        rest.scatter = (self.scatter - part.scatter).addr_(delta, delta, alpha=-part.n * rest.n / self.n)
        return rest


def frechet_distance(a: Statistics, b: Statistics, *, allow_small_n: bool = False) -> float:
    """Squared Frechet distance between the Gaussians fitted to two sets.

    Args:
        a, b: statistics of the two sets, of the same dimension d.
        allow_small_n: accept sets with fewer than d vectors. Their covariance is singular and the distance is
            biased upwards, so the number is for smoke tests only.

    Returns:
        d^2 >= 0 (the number called FID, whose square root is never taken).

    Raises:
        ValueError: different dimensions, or a set smaller than d without `allow_small_n`.
    """
    if a.dim != b.dim:
        raise ValueError(f"frechet_distance: {a.dim} feature dimensions on one side, {b.dim} on the other")
    small = min(a.n, b.n)
    if small < a.dim and not allow_small_n:
        raise ValueError(
            f"frechet_distance: {small} images for {a.dim} feature dimensions; give at least {a.dim} per "
            "side, or allow_small_n=true for a number that is only good for a smoke test"
        )
    return gaussian_distance(a.mean, a.covariance, b.mean, b.covariance)


def gaussian_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """The formula of this module for means (d,) and covariances (d, d), in float64."""
    mean_a, cov_a, mean_b, cov_b = (x.to(torch.float64) for x in (mean_a, cov_a, mean_b, cov_b))
    return _distance(mean_a, cov_a, mean_b, cov_b, matrix_root(cov_b))


def matrix_root(covariance: Tensor) -> Tensor:
    """R (d, k) with R R' = `covariance` (d, d) and k its numerical rank; the Cholesky factor where k = d.

    Directions without variance are left out: they add nothing to the trace but the square root of rounding noise.
    """
    factor = _cholesky(covariance)
    if factor is not None:
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()


def _cholesky(covariance: Tensor) -> Tensor | None:
    factor, failed = torch.linalg.cholesky_ex(covariance)
    pivots = factor.diagonal().square()
    return factor if not failed and pivots.min() > FULL_RANK * pivots.max() else None


def _distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor, root_b: Tensor) -> float:
    delta = mean_a - mean_b
    distance = delta @ delta + torch.trace(cov_a) + torch.trace(cov_b) - 2 * _trace_of_root(cov_a, root_b)
    return max(float(distance), 0.0)


def _trace_of_root(cov_a: Tensor, root_b: Tensor) -> float:
    """tr (R_b' S_a R_b)^(1/2)."""
    if root_b.shape[1] == len(root_b) and _cholesky(cov_a) is not None:
        # LAPACK's reduction of a generalised problem makes L' S L of a triangle L in half the operations of products.
        # Its arrays are columns, these are rows: what is lower here is upper there. The eigenvalues are taken of the
        # lower half: large entries come first, and so small eigenvalues keep their digits.
        reduce: Any = lapack.dsygst  # type: ignore[attr-defined]  # made at import
        product, _ = reduce(cov_a.cpu().numpy().T, root_b.cpu().numpy().T, itype=2, lower=0)
        values = eigh(product.T, lower=True, eigvals_only=True, driver="evd", overwrite_a=True, check_finite=False)
        return float(np.sqrt(values.clip(0)).sum())
    # Null directions of the product would each add the square root of its rounding noise; the singular values of
    # R_a' R_b are these square roots, without squaring first.
    return float(torch.linalg.svdvals(matrix_root(cov_a).T @ root_b).sum())


class Frechet:
    """Frechet distance of generated images to a reference set, as a metric.

    Args:
        features: uint8 (n, h, w, 3) -> (n, d), e.g. `sana.metric.features.scene_features`.
        reference: the real images: uint8 batches (b, h, w, 3), or a callable that gives them, read at the
            first call.
        feature_space: one sentence that goes beside the number: which features, at which size.
        batch_size: images per call of `features`.
        parts: number of parts of the delete-a-group jackknife that gives the interval (Shao and Wu 1989); it
            needs only streamed statistics. Its normal 95 % interval covers the spread from the draw of the
            generated images; it says nothing about the upward bias of any Frechet distance at finite N, so
            compare at equal N only.
        allow_small_n: as in `frechet_distance`.
    """

    def __init__(
        self,
        features: Features,
        reference: Iterable[Any] | Callable[[], Iterable[Any]],
        feature_space: str,
        batch_size: int = 256,
        parts: int = 20,
        allow_small_n: bool = False,
    ) -> None:
        if parts < 2:
            raise ValueError(f"Frechet: parts is {parts}, expected at least 2")
        self.features = features
        self.reference = reference
        self.feature_space = feature_space
        self.batch_size = batch_size
        self.parts = parts
        self.allow_small_n = allow_small_n
        self._reference: list[Statistics] | None = None
        self._size: tuple[int, int] | None = None

    def __call__(
        self, images: Sequence[Any], metadata: Sequence[Any] = (), clusters: Sequence[Hashable] | None = None
    ) -> dict[str, Any]:
        """Distance of `images` to the reference.

        Args:
            images: uint8 (n, h, w, 3), an array or anything that slices to one.
            metadata: not looked at: all metrics are called alike, and this one needs no prompts.
            clusters: one label per image; images of one label stay in one part of the jackknife. None: each
                by itself.

        Returns:
            ``{"mean", "interval", "level", "n", "reference_n", "reference_halves", "feature_space",
            "size"}``, where reference_halves is the distance between two halves of the reference: what a
            perfect generator would get at half the reference's N (None when the halves are smaller than d).

        Raises:
            ValueError: image size unlike the reference's; too few images (see `frechet_distance`).
        """
        reference = self._reference_parts()
        batches = (images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size))
        parts = self._statistics(batches, clusters)
        whole_reference, whole = merged(reference), merged(parts)
        value = frechet_distance(whole, whole_reference, allow_small_n=self.allow_small_n)
        halves = merged(reference[0::2]), merged(reference[1::2])
        floor = frechet_distance(*halves) if min(h.n for h in halves) >= whole.dim else None
        spread = 1.959963984540054 * jackknife_error(parts, whole_reference)
        assert self._size is not None
        return {
            "mean": value,
            "interval": [max(value - spread, 0.0), value + spread],
            "level": 0.95,
            "n": whole.n,
            "reference_n": whole_reference.n,
            "reference_halves": floor,
            "feature_space": self.feature_space,
            "size": list(self._size),
        }

    def _reference_parts(self) -> list[Statistics]:
        if self._reference is None:
            batches = self.reference() if callable(self.reference) else self.reference
            self._reference = self._statistics(batches)
        return self._reference

    def _statistics(self, batches: Iterable[Any], clusters: Sequence[Hashable] | None = None) -> list[Statistics]:
        """One `Statistics` per jackknife part.

        Cluster k goes to part k mod parts, however the batches are cut.
        """
        parts: list[Statistics] = []
        seen = 0
        first: dict[Hashable, int] = {}
        for batch in batches:
            x = torch.as_tensor(np.asarray(batch))
            if x.ndim != 4 or x.shape[-1] != 3 or x.dtype != torch.uint8:
                raise ValueError(
                    f"Frechet: images of shape {tuple(x.shape)} and {x.dtype}, expected uint8 (n, h, w, 3)"
                )
            size = (int(x.shape[1]), int(x.shape[2]))
            if self._size is None:
                self._size = size
            if size != self._size:
                raise ValueError(
                    f"Frechet: images of {size[0]}x{size[1]} pixels against {self._size[0]}x{self._size[1]}; "
                    "compare sets of one size"
                )
            y = self.features(x)
            if not parts:
                parts = [Statistics(y.shape[1]) for _ in range(self.parts)]
            labels = range(seen, seen + len(y)) if clusters is None else clusters[seen : seen + len(y)]
            part = torch.tensor([first.setdefault(label, len(first)) for label in labels]) % self.parts
            for i in range(self.parts):
                parts[i].update(y[part == i])
            seen += len(y)
        if not parts:
            raise ValueError("Frechet: no images on one side")
        return parts


def merged(parts: Iterable[Statistics]) -> Statistics:
    """Statistics of the union of the parts. Raises ValueError for no parts."""
    total: Statistics | None = None
    for part in parts:
        total = (Statistics(part.dim) if total is None else total).merge(part)
    if total is None:
        raise ValueError("merged: no statistics given")
    return total


def jackknife_error(parts: Sequence[Statistics], reference: Statistics) -> float:
    """Standard error of the distance of the union of `parts` to `reference`, deleting one part at a time.

    With G equal parts the variance is (G - 1) / G times the sum of squared deviations of the G leave-one-out
    values (Shao and Wu 1989). The reference's factor is computed once.
    """
    filled = [p for p in parts if p.n]
    if len(filled) < 2:
        return 0.0
    whole = merged(filled)
    if whole.n - max(p.n for p in filled) < 2:
        return 0.0
    covariance = reference.covariance
    root = matrix_root(covariance)
    values = []
    for part in filled:
        rest = whole.without(part)
        values.append(_distance(rest.mean, rest.covariance, reference.mean, covariance, root))
    g, x = len(filled), torch.tensor(values, dtype=torch.float64)
    return float(((g - 1) / g * (x - x.mean()).square().sum()).sqrt())
