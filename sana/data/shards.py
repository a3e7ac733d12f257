"""Random access to WebDataset shards: tar files of samples KEY.png|jpg|webp + KEY.json.

A tar is scanned once for member offsets; afterwards a sample is two `pread`s. So any order of samples, any number of
readers and any resume position cost the same, and the order never depends on workers or ranks.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sana.data.caption import Caption
from sana.data.decode import image_size
from sana.data.record import BadSample, Record

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 64_000_000  # refuse decompression bombs before a pixel is decoded


@dataclass(frozen=True)
class Member:
    """Where one sample lies: shard number and byte ranges of its image and its JSON inside the tar."""

    shard: int
    key: str
    image: tuple[int, int]
    meta: tuple[int, int]


class ShardFolder:
    """All samples of the shards ``{split}-*.tar`` of one folder, in the order of file name and position.

    Args:
        folder: directory that holds the tars.
        split: first part of the tars' names, such as "train"; "" takes every tar.

    Raises:
        FileNotFoundError: no folder or no shard; the message says how to make them.
        ValueError: a sample without image or without JSON, with the shard's name.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"data folder {self.folder} does not exist; "
                f"make one with `python scripts/make_shards.py scenes {self.folder}`"
            )
        pattern = f"{split}-*.tar" if split else "*.tar"
        self.paths = sorted(self.folder.glob(pattern))
        if not self.paths:
            raise FileNotFoundError(f"no shard {pattern} in {self.folder}; expected WebDataset tars")
        self.members = [m for i, path in enumerate(self.paths) for m in _scan(i, path)]
        self._files: dict[int, int] = {}
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self.members)

    def key(self, i: int) -> str:
        """Shard and sample name, for messages."""
        member = self.members[i]
        return f"{self.paths[member.shard].name}/{member.key}"

    def image(self, i: int) -> np.ndarray:
        """Pixels of sample i, uint8 (H, W, 3)."""
        data = self._read(self.members[i].shard, self.members[i].image)
        try:
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(f"{picture.width}x{picture.height} pixels, more than {MAX_PIXELS}")
                return np.asarray(picture.convert("RGB"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.key(i)}: image cannot be read: {error}") from error

    def meta(self, i: int) -> dict[str, Any]:
        """The sample's JSON."""
        return json.loads(self._read(self.members[i].shard, self.members[i].meta))

    def fingerprint(self) -> str:
        """Digest of names, sizes and layout of the shards: changes when any shard is replaced by another."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path.name}:{path.stat().st_size};".encode())
        for member in self.members:
            digest.update(f"{member.shard}:{member.key}:{member.image}:{member.meta};".encode())
        # Layouts can coincide by accident, contents hardly: sample the bytes too.
        for i in range(0, len(self), max(1, len(self) // 256)):
            digest.update(self._read(self.members[i].shard, self.members[i].image))
        return digest.hexdigest()

    def _read(self, shard: int, where: tuple[int, int]) -> bytes:
        if self._pid != os.getpid():  # a forked worker must not share file positions or descriptors' lifetimes
            self._files, self._pid = {}, os.getpid()
        if shard not in self._files:
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], where[1], where[0])
        if len(data) != where[1]:
            raise ValueError(f"{self.paths[shard].name}: ends early, {where[1]} bytes expected at {where[0]}")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        if getattr(self, "_pid", None) == os.getpid():
            for handle in self._files.values():
                os.close(handle)


def _scan(shard: int, path: Path) -> list[Member]:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                stem, suffix = os.path.splitext(info.name)
                kind = "image" if suffix.lower() in IMAGE_SUFFIXES else "meta" if suffix == ".json" else None
                if kind:
                    samples.setdefault(stem, {})[kind] = (info.offset_data, info.size)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a readable tar: {error}") from error
    for key, parts in samples.items():
        for kind in ("image", "meta"):
            if kind not in parts:
                raise ValueError(f"{path}: sample {key!r} has no {'picture' if kind == 'image' else '.json'}")
    return [Member(shard, key, parts["image"], parts["meta"]) for key, parts in samples.items()]


class ShardSource(ShardFolder):
    """The shards of one split behind the interface of sources, until those of `sana.data.formats` replace it."""

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        super().__init__(folder, split)
        self.index = self

    @property
    def shards(self) -> list[dict[str, Any]]:
        return [{"name": path.name} for path in self.paths]

    def column(self, name: str) -> np.ndarray:
        if name == "shard":
            return np.array([m.shard for m in self.members])
        sizes = [image_size(self._read(m.shard, m.image)) for m in self.members]
        return np.array([size[("width", "height").index(name)] for size in sizes])

    def record(self, i: int) -> Record:
        shard, key = self.key(i).split("/", 1)
        meta = self.meta(i)
        captions = [Caption(c["source"], c["text"], c.get("score")) for c in meta.get("captions", ())]
        return Record(key, shard, tuple(captions or [Caption("prompt", meta["prompt"])]), 0, 0, meta=meta)

    def image(self, i: int, size: tuple[int, int] | None = None) -> np.ndarray:
        try:
            return super().image(i)
        except ValueError as error:
            raise BadSample(*self.key(i).split("/", 1), str(error)) from None
