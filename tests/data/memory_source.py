"""Sources for tests: real encoded pictures in memory, behind the interface that all sources have."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sana.data.caption import Caption
from sana.data.decode import decode_image
from sana.data.record import BadSample, Record


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


class Columns:
    def __init__(self, **columns: np.ndarray) -> None:
        self.columns = columns

    def column(self, name: str) -> np.ndarray:
        return self.columns[name]


class Pictures:
    """`count` noisy pictures of the given sizes in turn, in `shards` shards; every sample has its own colour."""

    def __init__(
        self, count: int, sizes: Sequence[tuple[int, int]] = ((8, 8),), shards: int = 1, seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.pixels = [rng.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8) for i in range(count)]
        self.files = [encode(pixels) for pixels in self.pixels]
        self.shards = shards
        self.index = Columns(
            height=np.array([p.shape[0] for p in self.pixels], np.int32),
            width=np.array([p.shape[1] for p in self.pixels], np.int32),
        )

    def __len__(self) -> int:
        return len(self.files)

    def key(self, i: int) -> str:
        return f"{i % self.shards:05d}.tar/{i:06d}"

    def record(self, i: int) -> Record:
        captions = (Caption("short", f"number {i}", 30.0), Caption("long", f"a picture, number {i}", 20.0))
        height, width = self.pixels[i].shape[:2]
        return Record(f"{i:06d}", f"{i % self.shards:05d}.tar", captions, width, height)

    def check(self, i: int, member: str) -> None:
        """Nothing is known about the JSON."""

    def captions(self, i: int) -> tuple[Caption, ...]:
        return self.record(i).captions

    def bad_sample(self, i: int, reason: str) -> BadSample:
        return BadSample(self.record(i).shard, self.record(i).key, reason)

    def image(self, i: int, size: tuple[int, int] | None = None) -> np.ndarray:
        try:
            return decode_image(self.files[i], size=size, max_pixels=10**6)
        except ValueError as error:
            raise self.bad_sample(i, str(error)) from None

    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(self.files)).hexdigest()

    def write(self, folder: Path, shards: int, split: str = "train") -> Path:
        """The same pictures as WebDataset shards, in order."""
        folder.mkdir(parents=True, exist_ok=True)
        for shard, numbers in enumerate(np.array_split(np.arange(len(self)), shards)):
            with tarfile.open(folder / f"{split}-{shard:05d}.tar", "w") as tar:
                for i in numbers.tolist():
                    captions = [caption._asdict() for caption in self.record(i).captions]
                    for name, data in (
                        (f"{i:06d}.png", self.files[i]),
                        (f"{i:06d}.json", json.dumps({"captions": captions}).encode()),
                    ):
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        return folder
