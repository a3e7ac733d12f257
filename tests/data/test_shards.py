"""Random access to shards: real tars, written by the standard library, read in any order."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from sana.data.shards import ShardFolder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, counts: tuple[int, ...] = (3, 2)) -> list[np.ndarray]:
    rng, pictures = np.random.default_rng(0), []
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w") as tar:
            for _ in range(count):
                number = len(pictures)
                pictures.append(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
                add(tar, f"{number:08d}.png", png(pictures[-1]))
                add(tar, f"{number:08d}.json", json.dumps({"prompt": f"number {number}"}).encode())
    return pictures


def test_reads_what_was_written_in_any_order(tmp_path: Path) -> None:
    pictures = write(tmp_path)
    shards = ShardFolder(tmp_path)
    assert len(shards) == 5
    for i in (4, 0, 3, 1, 2):
        assert np.array_equal(shards.image(i), pictures[i])
        assert shards.meta(i) == {"prompt": f"number {i}"}
    assert shards.key(3) == "train-000001.tar/00000003"
    assert np.array_equal(pickle.loads(pickle.dumps(shards)).image(2), pictures[2])  # noqa: S301


def test_agrees_with_webdataset(tmp_path: Path) -> None:
    write(tmp_path)
    shards = ShardFolder(tmp_path)
    urls = [str(p) for p in sorted(tmp_path.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "json"))
    assert len(theirs) == len(shards)
    for i, (pixels, meta) in enumerate(theirs):
        assert np.array_equal(shards.image(i), pixels)
        assert shards.meta(i) == meta


def test_fingerprint_follows_contents(tmp_path: Path) -> None:
    write(tmp_path)
    before = ShardFolder(tmp_path).fingerprint()
    assert before == ShardFolder(tmp_path).fingerprint()
    data = bytearray((tmp_path / "train-000000.tar").read_bytes())
    data[512 + 60] ^= 1  # a bit of the first picture
    (tmp_path / "train-000000.tar").write_bytes(data)
    assert ShardFolder(tmp_path).fingerprint() != before


def test_bad_folders_and_shards_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ShardFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no shard train-\*\.tar"):
        ShardFolder(tmp_path)
    (tmp_path / "train-000000.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"train-000000\.tar: not a readable tar"):
        ShardFolder(tmp_path)
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        add(tar, "a.png", b"not a picture")
    with pytest.raises(ValueError, match=r"sample 'a' has no \.json"):
        ShardFolder(tmp_path)
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        add(tar, "a.png", b"not a picture")
        add(tar, "a.json", b"{}")
    with pytest.raises(ValueError, match=r"train-000000\.tar/a: image cannot be read"):
        ShardFolder(tmp_path).image(0)
