"""A source: samples by number, from whatever lies on the disk or behind a URL, with one index in front.

Every failure of one sample is a `BadSample`; nothing else is raised for what the bytes of a sample are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from sana.data.caption import Caption
from sana.data.decode import decode_image
from sana.data.index import Index
from sana.data.metadata import parse_json
from sana.data.record import BadSample, Limits, Record
from sana.data.storage import Storage

_SAMPLED = 256


class Source:
    """Samples of one data set. Any process may read one, but only one thread at a time.

    Args:
        index: where they lie and what is known about them.
        storage: reads the files that the index names.
        limits: what an image may have at most.
        bad: samples that were found unfit when the index was made; they have no number.

    Attributes:
        index: see `sana.data.index`; its columns are what planners and filters use.
        bad: see above.
    """

    def __init__(self, index: Index, storage: Storage, limits: Limits, bad: list[BadSample] | None = None) -> None:
        self.index, self.storage, self.limits, self.bad = index, storage, limits, bad or []
        self._shard = index.column("shard")
        self._checksums = {"image": index.column("checksum"), "meta": index.column("meta_checksum")}
        for member in set(index.members) - self._checksums.keys():
            if f"{member}_checksum" in index.names:
                self._checksums[member] = index.column(f"{member}_checksum")
        self._scores = {name: index.column(f"score.{name}") for name in index.scores}
        self._places = {m: (index.column(f"{m}_offset"), index.column(f"{m}_size")) for m in index.members}
        self._own_files = "path" in index.names

    def __len__(self) -> int:
        return len(self.index)

    def shard(self, i: int) -> str:
        """Name of the shard of sample i, or path of its file."""
        return (self._own_files and self.index.text("path", i)) or self.index.shards[self._shard[i]]["name"]

    def key(self, i: int) -> str:
        """Shard and key of sample i, for messages and records."""
        return f"{self.shard(i)}/{self.index.key(i)}" if not self._own_files else self.shard(i)

    def bad_sample(self, i: int, reason: str) -> BadSample:
        """The error that says why sample i cannot be used."""
        return BadSample(self.shard(i), self.index.key(i), reason)

    def read(self, i: int, member: str = "image") -> bytes:
        """The bytes of a member ("image", "meta", "latent", "clip", ...) of sample i, compared with its checksum.

        Raises:
            BadSample: there is no such member, or its bytes are missing, cut off or changed.
        """
        offset, size = (int(column[i]) for column in self._places.get(member, (_NONE, _NONE)))
        if not size:
            raise self.bad_sample(i, "no image" if member == "image" else f"missing file: it has no {member}")
        if size > self.limits.max_bytes:
            raise self.bad_sample(i, f"too many bytes: {size}, more than {self.limits.max_bytes}")
        try:
            data = self.storage.read(self.shard(i), offset, size)
        except FileNotFoundError:
            raise self.bad_sample(i, "missing file") from None
        except (OSError, ValueError) as error:
            raise self.bad_sample(i, f"unreadable: {type(error).__name__}: {error}") from error
        if len(data) < size:
            raise self.bad_sample(i, f"truncated: {len(data)} of {size} bytes of {member}")
        known = self._checksums.get(member)
        if known is not None and known[i] and xxhash.xxh3_64_intdigest(data) != known[i]:
            raise self.bad_sample(i, f"checksum: the bytes of {member} have changed")
        return data

    def record(self, i: int) -> Record:
        """Captions, size, scores and JSON of sample i.

        Raises:
            BadSample: its JSON cannot be read or has changed.
        """
        index = self.index
        try:
            if self._places["meta"][1][i]:
                meta = parse_json(self.read(i, "meta"))
            else:
                text = index.text("meta", i)
                meta = parse_json(text.encode()) if text else {}
        except ValueError as error:
            raise self.bad_sample(i, str(error)) from None
        scores = {name: float(column[i]) for name, column in self._scores.items() if column[i] == column[i]}
        return Record(
            key=index.key(i),
            shard=self.shard(i),
            captions=index.captions(i),
            width=int(index.column("width")[i]),
            height=int(index.column("height")[i]),
            scores=scores,
            hq=bool(index.column("hq")[i]),
            meta=meta,
        )

    def check(self, i: int, member: str) -> None:
        """Compare a member of sample i with its checksum, if that is known.

        Raises:
            BadSample: it has changed, or cannot be read.
        """
        known = self._checksums.get(member)
        if known is not None and known[i]:
            self.read(i, member)

    def captions(self, i: int) -> Sequence[Caption]:
        """The captions of sample i as the index has them; none of its bytes are read."""
        return self.index.choices(i)

    def image(self, i: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """Pixels of sample i, uint8 (H, W, 3), upright RGB; perhaps read-only.

        Args:
            i: number of the sample.
            size: least height and width needed; a larger JPEG is then decoded at a half, a quarter or an eighth.

        Raises:
            BadSample: the bytes are missing, cut off or changed, or no sound image.
        """
        data = self.read(i, "image")
        try:
            return decode_image(data, size=size, max_pixels=self.limits.max_pixels)
        except ValueError as error:
            raise self.bad_sample(i, str(error)) from error

    def fingerprint(self) -> str:
        """Digest of the samples: where they lie, what is known of them, and their bytes by checksum or by sampling."""
        digest = hashlib.sha256()
        for shard in self.index.shards:
            digest.update(f"{shard['name']}:{shard.get('bytes')};".encode())
        for part in self.index.digest_parts():
            digest.update(part)
        if len(self) and not self._checksums["image"].all():
            for i in range(0, len(self), max(1, len(self) // _SAMPLED)):
                try:
                    digest.update(self.read(i, "image"))
                except BadSample as error:
                    digest.update(error.reason.encode())
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return Source, (self.index, self.storage, self.limits, self.bad)


class _None:
    """A column of a member that no sample has."""

    def __getitem__(self, _: int) -> int:
        return 0


_NONE = _None()
