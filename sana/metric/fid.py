"""FID: the Frechet distance of Inception features to real images (Heusel et al. 2017), in float64 from streamed
statistics, with its interval and everything it depends on.

The number of N images is biased upwards, the more so the smaller N: compare at equal N only. Below 2048 images, the
number of features, it is refused. Statistics of the real images are cached under a fingerprint of the images and of
every setting that the features depend on, so a stale file is never taken for a fresh one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sana.metric.frechet import Statistics, frechet_distance, jackknife_error, merged
from sana.metric.pictures import Pictures
from sana.metric.ranks import rank, shared

UNKNOWN = 10**9
"""N of statistics whose file does not say it: they are trusted to be of enough images."""

NORMAL_95 = 1.959963984540054
"""Half width of the normal 95 % interval in standard errors."""

Batches = Callable[[], Iterable[Any]]
"""Gives uint8 batches (b, h, w, 3) of real images, such as the validation images of a run's data."""


class ImageFeatures(Protocol):
    """What `FID` needs of a feature space.

    Attributes:
        dim: d.
        settings: what the features depend on, for the record.
    """

    dim: int
    settings: dict[str, Any]

    def __call__(self, images: Sequence[np.ndarray], /) -> Tensor:
        """uint8 (h, w, 3) each -> (n, d) float64."""
        ...


class FID:
    """Distance of a set of images to a set of real ones.

    Args:
        features: the feature space, such as `sana.metric.inception_features.InceptionFeatures`.
        reference: folder of images or of WebDataset shards, a ``.npz`` file with "mu" (d,) and "sigma" (d, d), or a
            callable; None where the evaluation brings the real images of a run.
        batch_size: images per call of `features`.
        parts: of the delete-a-group jackknife that gives the interval (Shao and Wu 1989), and of the work that ranks
            share; the images of one prompt stay in one part.
        allow_small_n: accept fewer images than features; the number is then good for a smoke test only.
        cache: folder of the statistics of real images; None: ``$XDG_CACHE_HOME/sana/statistics``.
        name: of the metric, for messages.
    """

    def __init__(
        self,
        features: ImageFeatures,
        reference: str | Path | Batches | None = None,
        batch_size: int = 32,
        parts: int = 20,
        allow_small_n: bool = False,
        cache: str | Path | None = None,
        name: str = "fid",
    ) -> None:
        if parts < 2 or batch_size < 1:
            raise ValueError(f"{name}: parts is {parts} and batch_size {batch_size}; expected at least 2 and 1")
        self.features, self.reference, self.batch_size, self.parts = features, reference, batch_size, parts
        self.allow_small_n, self.name = allow_small_n, name
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.cache = Path(cache) if cache is not None else home / "sana" / "statistics"
        self._known: tuple[Statistics, str] | None = None

    def __call__(
        self, images: Sequence[Any], metadata: Sequence[Any] = (), clusters: Sequence[Hashable] | None = None
    ) -> dict[str, Any]:
        """The distance of `images` (uint8 (h, w, 3) each, of any size) to the reference.

        Returns:
            ``{"mean", "interval", "level", "n", "reference_n", "settings"}``; the same on every rank.

        Raises:
            ValueError: no reference, too few images on a side (see `sana.metric.frechet.frechet_distance`), or
                statistics made with other settings.
        """
        if len(images) < self.features.dim and not self.allow_small_n:  # before an hour of work
            raise ValueError(
                f"{self.name}: {len(images)} images for {self.features.dim} features; give at least that many, or "
                "allow_small_n=true for a number that is only good for a smoke test"
            )
        reference, source = self.real()
        parts = part_statistics(images, self.features, clusters, self.parts, self.batch_size)
        whole = merged(parts)
        value = frechet_distance(whole, reference, allow_small_n=self.allow_small_n)
        spread = NORMAL_95 * jackknife_error(parts, reference)
        reference_n = None if reference.n == UNKNOWN else reference.n
        return {
            "mean": value,
            "interval": [max(value - spread, 0.0), value + spread],
            "level": 0.95,
            "n": whole.n,
            "reference_n": reference_n,
            "settings": {**self.features.settings, "reference": source, "reference_n": reference_n},
        }

    def real(self) -> tuple[Statistics, str]:
        """Statistics of the real images, and where they come from."""
        if self._known is None:
            self._known = self._find()
        return self._known

    def _find(self) -> tuple[Statistics, str]:
        if self.reference is None:
            raise ValueError(f"{self.name}: no real images; give reference=FOLDER, shards or a .npz file")
        if callable(self.reference):
            known = Statistics(self.features.dim)
            for batch in self.reference():
                for start in range(0, len(batch), self.batch_size):
                    known.update(self.features(batch[start : start + self.batch_size]))
            return known, "validation images of the run's data"
        if str(self.reference).endswith(".npz"):
            return read_statistics(self.reference, self.features.settings, self.features.dim), str(self.reference)
        pictures = Pictures(self.reference)
        if len(pictures) < self.features.dim and not self.allow_small_n:
            raise ValueError(
                f"{self.name}: {len(pictures)} images in {self.reference} for {self.features.dim} features; give at "
                "least that many, or allow_small_n=true for a number that is only good for a smoke test"
            )
        key = json.dumps([pictures.fingerprint, self.features.settings, self.parts, self.batch_size], sort_keys=True)
        path = self.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"

        def cached(_: int) -> Statistics | None:
            return read_statistics(path, self.features.settings, self.features.dim) if path.exists() else None

        # One rank looks for all: machines may have caches of their own, and all have to go the same way.
        known = shared(1, cached)[0]
        if known is not None:
            return known, str(self.reference)
        known = merged(part_statistics(pictures, self.features, None, self.parts, self.batch_size))
        if rank() == 0:
            write_statistics(path, known, {**self.features.settings, "images": str(pictures.place)})
        return known, str(self.reference)


def part_statistics(
    images: Sequence[Any],
    features: Callable[[Sequence[np.ndarray]], Tensor],
    clusters: Sequence[Hashable] | None,
    parts: int,
    batch_size: int,
) -> list[Statistics]:
    """One `Statistics` per jackknife part, shared over the ranks; empty parts are left out.

    The k-th distinct cluster goes to part k mod `parts`. Batches are cut within a part, so the numbers do not depend
    on the number of ranks, not even in their last bits.

    Raises:
        ValueError: no images, or labels of another length.
    """
    if not len(images) or (clusters is not None and len(clusters) != len(images)):
        raise ValueError(f"{len(images)} images and {0 if clusters is None else len(clusters)} labels of prompts")
    first: dict[Hashable, int] = {}
    labels = range(len(images)) if clusters is None else clusters
    part = np.array([first.setdefault(label, len(first)) % parts for label in labels])

    def piece(p: int) -> Statistics:
        own = np.flatnonzero(part == p).tolist()
        statistics: Statistics | None = None
        for start in range(0, len(own), batch_size):
            batch = features([images[i] for i in own[start : start + batch_size]])
            statistics = (Statistics(batch.shape[1]) if statistics is None else statistics).update(batch)
        assert statistics is not None
        return statistics

    return shared(int(part.max()) + 1, piece)


def write_statistics(path: str | Path, statistics: Statistics, settings: dict[str, Any]) -> None:
    """Write a ``.npz`` with mu, sigma, n and settings (JSON) in one step; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    mean, sigma = statistics.mean.numpy(), statistics.covariance.numpy()
    np.savez(temporary, mu=mean, sigma=sigma, n=statistics.n, settings=json.dumps(settings))
    os.replace(temporary, path)


def read_statistics(path: str | Path, settings: dict[str, Any], dim: int) -> Statistics:
    """Statistics from a ``.npz``: ours, or anybody's with mu (d,) and sigma (d, d), the unbiased covariance.

    Args:
        path: of the file.
        settings: of the features that will be compared with it; a file that says otherwise is refused.
        dim: d.

    Raises:
        ValueError: not such a file, another d, or made with other settings.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            content = dict(file)
        mean, sigma = (torch.from_numpy(np.asarray(content[k], np.float64)) for k in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"reference: {path} is not a file of statistics with mu and sigma ({error})") from None
    if mean.shape != (dim,) or sigma.shape != (dim, dim):
        raise ValueError(f"reference: {path} has mu {tuple(mean.shape)} and sigma {tuple(sigma.shape)}, not d = {dim}")
    if not (torch.isfinite(mean).all() and torch.isfinite(sigma).all()):
        raise ValueError(f"reference: {path} has numbers that are not finite")
    made = json.loads(str(content["settings"])) if "settings" in content else {}
    for key, value in settings.items():
        if key in made and made[key] != value:
            raise ValueError(f"reference: {path} was made with {key} = {made[key]!r}, now it is {value!r}")
    statistics = Statistics(dim)
    statistics.n = int(content["n"]) if "n" in content else UNKNOWN
    statistics.mean, statistics.scatter = mean, sigma * (statistics.n - 1)
    return statistics
