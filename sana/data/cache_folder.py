"""A cache of encoded samples on disk: its folder, the key of all that its contents depend on, and how it is found."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import xxhash

FACTS = "cache.json"
VERSION = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FLIPS = ("none", "once", "both")


class StaleCacheError(ValueError):
    """There is no complete cache for what a run needs; the message says what differs and how to make one."""


@dataclass(frozen=True)
class CacheKey:
    """Everything that the contents of a cache depend on.

    Attributes:
        kind: "latents" or "text".
        source: fingerprint of the images and captions.
        model: the encoder's name, for messages.
        weights: digest of its weights and structure.
        dtype: "float32", "float16" or "bfloat16", of what is stored.
        resolution: latents: how images were brought to their sizes, such as "64x64" or the table of buckets.
        flip: latents: "none"; "once": half of the images are mirrored, decided per image; "both": either way is stored.
        template: text: what stands around a caption, and where it is cut.

    Raises:
        ValueError: a kind, dtype or flip that does not exist.
    """

    kind: str
    source: str
    model: str
    weights: str
    dtype: str
    resolution: str = ""
    flip: str = "none"
    template: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("latents", "text"):
            raise ValueError(f"cache kind {self.kind!r}: expected latents or text")
        if self.dtype not in DTYPES:
            raise ValueError(f"cache dtype {self.dtype!r}: expected {', '.join(DTYPES)}")
        if self.flip not in FLIPS or (self.kind == "text" and self.flip != "none"):
            raise ValueError(f"cache flip {self.flip!r}: expected {', '.join(FLIPS)}, and none for text")

    @property
    def name(self) -> str:
        """Name of the cache's folder."""
        digest = hashlib.sha256(json.dumps([VERSION, asdict(self)], sort_keys=True).encode()).hexdigest()
        return f"{self.kind}-{digest[:16]}"

    def differences(self, other: CacheKey) -> list[str]:
        """What differs from another key: "dtype is float16 there, bfloat16 here"."""
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{name} is {short(theirs[name])} there, {short(value)} here"
            for name, value in mine.items()
            if theirs[name] != value
        ]


@dataclass(frozen=True)
class CacheFolder:
    """A cache on disk, complete or on its way.

    Attributes:
        path: its folder.
        key: what it depends on.
        shards: names of its shards (those of the source, without suffix).
        count: samples of the source.
    """

    path: Path
    key: CacheKey
    shards: tuple[str, ...]
    count: int

    @property
    def done(self) -> list[str]:
        """Shards that are finished: their Arrow file is written last."""
        return [shard for shard in self.shards if (self.path / f"{shard}.arrow").is_file()]

    @classmethod
    def open(cls, path: Path) -> CacheFolder:
        """A cache folder by its ``cache.json``.

        Raises:
            StaleCacheError: there is none, or it is of another version.
        """
        try:
            facts = json.loads((path / FACTS).read_text())
            if facts["version"] != VERSION:
                raise StaleCacheError(f"{path}: a cache of version {facts['version']}, expected {VERSION}")
            return cls(path, CacheKey(**facts["key"]), tuple(facts["shards"]), facts["count"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, StaleCacheError):
                raise
            raise StaleCacheError(f"{path}: no cache ({FACTS} is missing or unreadable)") from None

    def create(self) -> None:
        """Make the folder with its facts; nothing changes where another process did it already."""
        self.path.mkdir(parents=True, exist_ok=True)
        facts = {"version": VERSION, "key": asdict(self.key), "count": self.count, "shards": list(self.shards)}
        write_whole(self.path / FACTS, json.dumps(facts, indent=1).encode() + b"\n")


def find_cache(parent: Path, key: CacheKey) -> CacheFolder:
    """The complete cache of a key among those in a folder.

    Raises:
        StaleCacheError: there is none; the message names what differs in the nearest one, or what is missing.
    """
    advice = "make it with `python scripts/precompute.py` and the settings of this run"
    if (parent / key.name / FACTS).is_file():
        found = CacheFolder.open(parent / key.name)
        missing = len(found.shards) - len(found.done)
        if missing:
            raise StaleCacheError(f"{found.path}: {missing} of {len(found.shards)} shards are not cached yet; {advice}")
        return found
    others = []
    for path in sorted(parent.glob(f"{key.kind}-*/{FACTS}")):
        try:
            others.append(CacheFolder.open(path.parent))
        except StaleCacheError:
            continue
    if not others:
        raise StaleCacheError(f"no cached {key.kind} in {parent}; {advice}")
    nearest = min(others, key=lambda other: len(key.differences(other.key)))
    what = "; ".join(key.differences(nearest.key))
    raise StaleCacheError(f"the cached {key.kind} in {nearest.path} do not belong to this run: {what}; {advice}")


def caption_hash(text: str) -> int:
    """What a caption is looked up by: xxh3_64 of its UTF-8."""
    return xxhash.xxh3_64_intdigest(text.encode())


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file beside its place and rename it, so that it is never found half written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def short(value: object) -> str:
    """A value as a part of a message, of at most 40 letters."""
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
