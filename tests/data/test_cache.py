"""Caches of latents and text: what is read is what was encoded, and nothing that was made otherwise is ever read."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from sana.data.cache import LatentCache, TextCache
from sana.data.cache_folder import CacheFolder, CacheKey, StaleCacheError, find_cache
from sana.data.cache_write import ShardSamples, shards_of, write_latents, write_text
from sana.data.record import BadSample

KEY = CacheKey("latents", "source", "DC-AE", "weights", "float16", resolution="8x6")


def picture(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (8, 6, 3), dtype=np.uint8)


def encode(images: Tensor) -> Tensor:
    """A stand-in whose latents are known in closed form: the pixels themselves, halved."""
    return images * 0.5


def expected(i: int, dtype: torch.dtype, mirror: bool = False) -> Tensor:
    pixels = picture(i)[:, ::-1] if mirror else picture(i)
    return torch.from_numpy(((pixels.astype(np.float32) / 127.5 - 1) * 0.5).transpose(2, 0, 1).copy()).to(dtype)


def shards(count: int = 10, size: int = 4) -> list[ShardSamples]:
    return [
        ShardSamples(
            f"train-{k:06d}",
            tuple(range(a, min(a + size, count))),
            tuple(f"k/{i}" for i in range(a, min(a + size, count))),
        )
        for k, a in enumerate(range(0, count, size))
    ]


def make(parent: Path, key: CacheKey = KEY, count: int = 10, **options: object) -> CacheFolder:
    parts = shards(count)
    folder = CacheFolder(parent / key.name, key, tuple(part.name for part in parts), count)
    folder.create()
    for part in parts:
        write_latents(folder, part, picture, encode, batch=3, **options)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reads_what_was_encoded_in_any_order(tmp_path: Path, dtype: str) -> None:
    cache = LatentCache(make(tmp_path, dataclasses.replace(KEY, dtype=dtype)))
    assert len(cache) == 10
    for samples in ([7], [9, 0, 4, 4, 3], list(range(10))):
        values, bad = cache.read(samples)
        assert not bad
        assert values.dtype == getattr(torch, dtype)
        for row, i in zip(values, samples, strict=True):
            torch.testing.assert_close(row, expected(i, values.dtype), rtol=1e-6, atol=1e-7)
    again = pickle.loads(pickle.dumps(cache))  # noqa: S301
    torch.testing.assert_close(again.read([3, 8])[0], cache.read([3, 8])[0], rtol=0, atol=0)


def test_members_are_plain_safetensors(tmp_path: Path) -> None:
    folder = make(tmp_path)
    with tarfile.open(folder.path / "train-000001.tar") as tar:
        assert sorted(tar.getnames()) == [f"k/{i}.safetensors" for i in range(4, 8)]
        tensor = load(tar.extractfile("k/5.safetensors").read())["features"]  # type: ignore[union-attr]
    torch.testing.assert_close(tensor, LatentCache(folder).read([5])[0][0], rtol=0, atol=0)


def test_flips(tmp_path: Path) -> None:
    both = LatentCache(make(tmp_path, dataclasses.replace(KEY, flip="both")))
    values, _ = both.read([2, 6, 9], [False, True, True])
    for row, (i, mirror) in zip(values, [(2, False), (6, True), (9, True)], strict=True):
        torch.testing.assert_close(row, expected(i, torch.float16, mirror), rtol=1e-3, atol=1e-3)
    once = LatentCache(make(tmp_path, dataclasses.replace(KEY, flip="once"), count=40))
    values, _ = once.read(range(40))
    mirrored = 0
    for i, row in enumerate(values):
        plain, other = expected(i, torch.float16), expected(i, torch.float16, True)
        assert torch.equal(row, plain) != torch.equal(row, other)
        mirrored += torch.equal(row, other)
    assert 10 <= mirrored <= 30  # a fair coin: 20 +- 3.2
    with pytest.raises(ValueError, match="one way, not both"):
        once.read([0], [True])


def test_stale_caches_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StaleCacheError, match="no cached latents in"):
        find_cache(tmp_path, KEY)
    folder = make(tmp_path)
    assert find_cache(tmp_path, KEY).path == folder.path
    for name, value in (
        ("dtype", "bfloat16"),
        ("weights", "others"),
        ("resolution", "16x16"),
        ("source", "changed"),
        ("flip", "both"),
    ):
        with pytest.raises(StaleCacheError, match=f"{name} is .* there, {value} here"):
            find_cache(tmp_path, dataclasses.replace(KEY, **{name: value}))
    (folder.path / "train-000002.arrow").unlink()
    with pytest.raises(StaleCacheError, match="1 of 3 shards are not cached yet"):
        find_cache(tmp_path, KEY)
    for name, value in (("dtype", "int8"), ("kind", "pixels"), ("flip", "sometimes")):
        with pytest.raises(ValueError, match=f"cache {name} '{value}'"):
            dataclasses.replace(KEY, **{name: value})


def test_goes_on_where_it_was_stopped_with_the_same_bytes(tmp_path: Path) -> None:
    whole = make(tmp_path / "a")
    part = make(tmp_path / "b")
    (part.path / "train-000001.arrow").unlink()
    (part.path / "train-000001.tar").write_bytes(b"half")
    calls: list[int] = []

    def counted(i: int) -> np.ndarray:
        calls.append(i)
        return picture(i)

    for shard in shards():
        write_latents(part, shard, counted, encode, batch=3)
    assert calls == [4, 5, 6, 7]

    def digests(folder: CacheFolder) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.path.iterdir())}

    assert digests(whole) == digests(part)


def test_an_error_leaves_no_half_shard(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path / KEY.name, KEY, ("train-000000",), 4)
    folder.create()
    with pytest.raises(ValueError, match="features are not finite in float16"):
        write_latents(folder, shards()[0], picture, lambda x: x * 1e6)
    assert [p.name for p in folder.path.iterdir()] == ["cache.json"]


def test_bad_samples_keep_their_place(tmp_path: Path) -> None:
    def load_some(i: int) -> np.ndarray:
        if i == 2:
            raise BadSample("train-000000.tar", "k/2", "corrupt image: broken data stream")
        return picture(i)

    parts = shards()
    folder = CacheFolder(tmp_path / KEY.name, KEY, tuple(part.name for part in parts), 10)
    folder.create()
    assert [write_latents(folder, part, load_some, encode) for part in parts] == [3, 4, 2]
    cache = LatentCache(folder)
    values, bad = cache.read([1, 2, 3])
    assert bad == {1: "corrupt image: broken data stream"}
    assert float(values[1].abs().max()) == 0
    torch.testing.assert_close(values[2], expected(3, torch.float16))
    assert cache.size(2) == (0, 0, 0)
    assert cache.size(3) == (3, 8, 6)
    values, bad = cache.read([2], size=(16, 6))  # a batch of bad ones only, of another bucket
    assert bad == {0: "corrupt image: broken data stream"}
    assert values.shape == (1, 3, 16, 6)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_flipped_bit_is_caught(tmp_path: Path, seed: int) -> None:
    folder = make(tmp_path)
    tar = folder.path / "train-000000.tar"
    good, rng = tar.read_bytes(), np.random.default_rng(seed)
    with tarfile.open(tar) as opened:
        info = opened.getmember("k/1.safetensors")
    body = 3 * 8 * 6 * 2
    first = info.offset_data + info.size - body
    for _ in range(100):
        data = bytearray(good)
        data[first + int(rng.integers(body))] ^= 1 << int(rng.integers(8))
        tar.write_bytes(bytes(data))
        assert list(LatentCache(folder).read([0, 1])[1]) == [1]
    tar.write_bytes(good[:-512])
    with pytest.raises(StaleCacheError, match=r"train-000000\.tar is not the file"):
        LatentCache(folder)


def test_buckets_share_a_cache(tmp_path: Path) -> None:
    """Images of several sizes: encoded by size, read by size, never mixed."""

    def load_any(i: int) -> np.ndarray:
        return np.full((4, 8, 3) if i % 3 else (8, 4, 3), i, np.uint8)

    parts = shards()
    folder = CacheFolder(tmp_path / KEY.name, KEY, tuple(part.name for part in parts), 10)
    folder.create()
    seen: list[tuple[int, ...]] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x

    for part in parts:
        write_latents(folder, part, load_any, watched, batch=2)
    cache = LatentCache(folder)
    assert cache.size(0) == (3, 8, 4)
    assert cache.size(1) == (3, 4, 8)
    torch.testing.assert_close(
        cache.read([0, 3, 9])[0][:, 0, 0, 0].float(), torch.tensor([0.0, 3, 9]) / 127.5 - 1, rtol=1e-3, atol=1e-3
    )
    assert {shape[2:] for shape in seen} == {(4, 8), (8, 4)}
    with pytest.raises(ValueError, match="different sizes in one batch"):
        cache.read([0, 1])


def test_two_sources(tmp_path: Path) -> None:
    cache = LatentCache(make(tmp_path), make(tmp_path, dataclasses.replace(KEY, source="other"), count=3))
    assert len(cache) == 13
    values, _ = cache.read([9, 10, 12])
    for row, i in zip(values, (9, 0, 2), strict=True):
        torch.testing.assert_close(row, expected(i, torch.float16), rtol=0, atol=0)
    with pytest.raises(ValueError, match="one dtype"):
        LatentCache(make(tmp_path), make(tmp_path, dataclasses.replace(KEY, dtype="float32")))


def features(captions: list[str]) -> list[Tensor]:
    """As many rows as words, each its length and place: known by hand."""
    return [
        torch.tensor([[len(word), k, 0.5, -1.0] for k, word in enumerate(text.split())]).reshape(-1, 4)
        for text in captions
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text(tmp_path: Path, dtype: str) -> None:
    key = CacheKey("text", "source", "Gemma", "weights", dtype, template="none")
    said = {i: [f"number {i}", "a b c", "one two three four five six"][: 1 + i % 3] for i in range(10)}
    parts = shards()
    folder = CacheFolder(tmp_path / key.name, key, tuple(part.name for part in parts), 10)
    folder.create()
    for part in parts:
        write_text(folder, part, said.__getitem__, features, batch=3)
    cache = TextCache(find_cache(tmp_path, key))
    text, mask, bad = cache.read([2, 7, 0], ["one two three four five six", "a b c", "number 0"])
    assert not bad
    assert text.shape == (3, 6, 4)
    assert mask.sum(1).tolist() == [6, 3, 2]
    for k, caption in enumerate(("one two three four five six", "a b c", "number 0")):
        wanted = features([caption])[0]
        torch.testing.assert_close(text[k, : len(wanted)].float(), wanted, rtol=0, atol=0)
        assert float(text[k, len(wanted) :].abs().sum()) == 0
    with pytest.raises(StaleCacheError, match="sample 3: the caption 'a new one' is not among the cached ones"):
        cache.read([3], ["a new one"])


def test_text_of_samples_without_captions(tmp_path: Path) -> None:
    key = CacheKey("text", "source", "Gemma", "weights", "float32")
    parts = shards(4)
    folder = CacheFolder(tmp_path / key.name, key, tuple(part.name for part in parts), 4)
    folder.create()
    write_text(folder, parts[0], lambda i: [] if i == 1 else [f"number {i}"], features)
    _, mask, bad = TextCache(folder).read([0, 1, 3], ["number 0", "", "number 3"])
    assert bad == {1: "no caption"}
    assert mask.sum(1).tolist() == [2, 0, 2]


class _Index:
    """The part of `sana.data.index.Index` that `shards_of` reads."""

    def __init__(self, counts: list[int]) -> None:
        self.shards = [{"name": name} for name in ("train-000000.tar", "deep/folder")]
        self._shard = np.repeat(np.arange(len(counts)), counts)

    def column(self, name: str) -> np.ndarray:
        assert name == "shard"
        return self._shard

    def key(self, i: int) -> str:
        return f"key{i}"


def test_shards_of_a_source() -> None:
    class Source:
        index = _Index([3, 7])

    found = shards_of(Source(), largest=4)
    assert [(s.name, s.samples) for s in found] == [
        ("000000-train-000000", (0, 1, 2)),
        ("000001-deep--folder-0000", (3, 4, 5, 6)),
        ("000001-deep--folder-0001", (7, 8, 9)),
    ]
    assert found[2].keys == ("key7", "key8", "key9")


@pytest.mark.slow
def test_speed(tmp_path: Path) -> None:
    """32x16x16 bf16, read and checked: processor time of one process, the best of five, for 30,000 per second."""
    key = dataclasses.replace(KEY, dtype="bfloat16")
    count = 4096
    parts = shards(count, 1024)
    folder = CacheFolder(tmp_path / key.name, key, tuple(part.name for part in parts), count)
    folder.create()
    latents = torch.randn(64, 32, 16, 16)
    for part in parts:
        write_latents(folder, part, lambda i: np.full((1, 1, 3), i % 256, np.uint8), lambda x: latents[: len(x)])
    order = np.random.default_rng(0).permutation(count)
    batches = [order[a : a + 64].tolist() for a in range(0, count, 64)]
    cache, room, best = LatentCache(folder), torch.empty(64 * 32 * 16 * 16 * 2, dtype=torch.uint8), float("inf")
    for _ in range(5):
        began = time.process_time()
        for batch in batches:
            got, bad = cache.read(batch, room=room)
            assert not bad
            assert got.data_ptr() == room.data_ptr()
        best = min(best, (time.process_time() - began) / (64 * len(batches)))
    assert best < 1 / 30_000
