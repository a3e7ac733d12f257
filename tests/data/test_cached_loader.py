"""Training from caches: the loader gives latents and features of the very samples, captions and sizes it would load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from memory_source import Columns, Pictures
from torch import Tensor

from sana.data.bucket import Buckets
from sana.data.cache import LatentCache, TextCache
from sana.data.caching import Encoding, latent_jobs, text_jobs
from sana.data.caption import Proportion
from sana.data.loader import Samples, Slot
from sana.types import Bad, Batch

CHOICE = Proportion({"short": 1.0, "long": 1.0})
TABLE = Buckets([(8, 8), (8, 16)], [1.0, 0.5])
PIXELS = Encoding(lambda images: images * 0.5, "halved", "1")


def features(captions: list[str]) -> list[Tensor]:
    return [torch.tensor([[float(ord(c)), 1.0] for c in text]) for text in captions]


CHARACTERS = Encoding(features, "characters", "2", "plain")


class Indexed(Pictures):
    """Pictures with what a cache asks of an index."""

    def __init__(self, count: int, seed: int = 0) -> None:
        super().__init__(count, [(8, 8), (9, 18)], shards=2, seed=seed)
        columns = Columns(**self.index.columns, shard=np.arange(count) % 2)
        columns.shards = [{"name": "00000.tar"}, {"name": "00001.tar"}]  # type: ignore[attr-defined]
        columns.key = lambda i: f"{i:06d}"  # type: ignore[attr-defined]
        self.index = columns


def slots(samples: list[int], size: tuple[int, int], first: int = 0) -> list[Slot]:
    return [Slot(first + k, sample, *size) for k, sample in enumerate(samples)]


def cached(samples: Samples, folder: Path, flip: str = "none") -> Samples:
    """The same samples from caches."""
    parents = [folder] * len(samples.sources)
    latents = [job.complete() for job in latent_jobs(samples, TABLE, parents, PIXELS, "float32", flip)]
    text = [job.complete() for job in text_jobs(samples, parents, CHARACTERS, "float32")]
    return Samples(samples.sources, CHOICE, 5, latents=LatentCache(*latents), text=TextCache(*text), flip=flip)


def compare(ours: Batch, theirs: Batch) -> None:
    assert theirs.image is not None
    assert ours.image is None
    assert ours.latent is not None
    expected = (theirs.image.float() / 127.5 - 1) * 0.5
    torch.testing.assert_close(ours.latent, expected, rtol=1e-6, atol=1e-7)
    assert (ours.caption, ours.key, ours.source) == (theirs.caption, theirs.key, theirs.source)
    assert ours.text is not None
    assert ours.text_mask is not None
    for k, caption in enumerate(ours.caption):
        assert int(ours.text_mask[k].sum()) == len(caption)
        torch.testing.assert_close(ours.text[k, : len(caption)], features([caption])[0], rtol=0, atol=0)


@pytest.mark.parametrize("flip", ["none", "once", "both"])
def test_the_same_batches_as_without(tmp_path: Path, flip: str) -> None:
    sources = [Indexed(9), Indexed(6, seed=1)]
    plain = Samples(sources, CHOICE, 5, flip=flip)
    fast = cached(Samples(sources, CHOICE, 5), tmp_path, flip)
    for first in (0, 40, 1000):
        for size, numbers in (((8, 8), [0, 2, 13, 11, 4, 6, 8]), ((8, 16), [1, 3, 10, 5, 7, 12, 14])):
            compare(fast.__getitems__(slots(numbers, size, first)), plain.__getitems__(slots(numbers, size, first)))
    if flip == "both":  # both ways are seen
        seen = [fast.__getitems__(slots([4], (8, 8), first)).latent for first in range(20)]
        assert len({tuple(latent.flatten().tolist()) for latent in seen if latent is not None}) == 2


def test_bad_samples(tmp_path: Path) -> None:
    source = Indexed(9)
    source.files[4] = source.files[4][:40]
    fast = cached(Samples([source], CHOICE, 5), tmp_path)
    batch = fast.__getitems__(slots([2, 4, 0], (8, 8)))
    assert batch.weight is not None
    assert batch.weight.tolist() == [1, 0, 1]
    assert batch.latent is not None
    assert batch.text is not None
    assert torch.equal(batch.latent[1], batch.latent[2])
    assert torch.equal(batch.text[1], batch.text[2])
    assert [(bad.shard, bad.key) for bad in batch.bad] == [("00000.tar", "000004")]
    assert isinstance(batch.bad[0], Bad)
    plain = Samples([source], CHOICE, 5).__getitems__(slots([2, 4, 0], (8, 8)))
    assert (batch.key, batch.caption) == (plain.key, plain.caption)
    alone = fast.__getitems__(slots([4, 4], (8, 8)))
    assert alone.latent is not None
    assert alone.latent.shape == (2, 3, 8, 8)
    assert alone.weight is not None
    assert alone.weight.tolist() == [0, 0]
    assert alone.text_mask is not None
    assert bool(alone.text_mask.any(1).all())  # softmax over it is defined


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    calls = []

    def counted(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images

    samples = Samples([Indexed(9)], CHOICE, 5)
    for _ in range(2):
        (job,) = latent_jobs(samples, TABLE, [tmp_path], PIXELS._replace(encode=counted), "float16")
        assert len(job.missing()) == (2 if not calls or len(calls) > 4 else 0)
        job.complete()
        assert sum(calls) == 9
    (other,) = latent_jobs(samples, TABLE, [tmp_path], PIXELS, "bfloat16")
    assert len(other.missing()) == 2
