"""Caching before training: the same settings as train.py's lead to the same caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sana.data.cache_write import ShardSamples
from sana.data.caching import Job
from sana.model.encoding import encode_captions, encode_latents
from sana.model.frozen import Frozen

KINDS = ("latents", "text")


class Caching:
    """The caches that a training with some settings would read.

    Args:
        settings: the command line of train.py.
        kinds: which of "latents" and "text".
        device: where the encoders lie; "auto": the first GPU if there is one.

    Attributes:
        jobs: one per kind and source.

    Raises:
        sana.run.error.ConfigError: settings that train.py would refuse.
    """

    def __init__(self, settings: Sequence[str], kinds: Sequence[str], device: str = "auto") -> None:
        from sana.run.build import build
        from sana.run.error import ConfigError
        from sana.run.saved import prepare

        config = prepare("train", settings).config
        where = torch.device(
            "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        )
        data: Any = build(config.data, "data")
        if hasattr(data, "write"):  # the embedded world makes its shards at first use
            data.write()
        self.jobs: list[Job] = []
        for kind in kinds:
            name = {"latents": "autoencoder", "text": "text"}[kind]
            if config.encoder.get(name) is None:
                raise ConfigError(f"encoder.{name}: this recipe has none, so there is nothing to cache as {kind}")
            encoder = build(config.encoder[name], f"encoder.{name}").to(where)
            Frozen(encoder=encoder)
            encoding = encode_latents(encoder, where) if kind == "latents" else encode_captions(encoder)
            self.jobs += data.cache_jobs(kind, encoding)

    def tasks(self) -> list[str]:
        """Names of all shards of all caches, done or not, in a fixed order."""
        return [f"{number}/{shard.name}" for number, job in enumerate(self.jobs) for shard in job.shards]

    def missing(self) -> list[str]:
        """Names of the shards that are not there yet."""
        return [f"{number}/{shard.name}" for number, job in enumerate(self.jobs) for shard in job.missing()]

    def __call__(self, task: str) -> int:
        """Make one shard; returns the number of samples encoded, 0 where it was there."""
        number, _, name = task.partition("/")
        job = self.jobs[int(number)]
        job.folder.create()
        return job.write(self._shard(job, name))

    @staticmethod
    def _shard(job: Job, name: str) -> ShardSamples:
        return next(shard for shard in job.shards if shard.name == name)


def caching(settings: tuple[str, ...], kinds: tuple[str, ...], device: str) -> Callable[[str], int]:
    """`Caching`, as an actor of a Ray job makes it."""
    return Caching(settings, kinds, device)
