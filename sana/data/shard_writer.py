"""Writing one shard: a tar whose bytes depend on its samples alone, and the rows of the index that describe it."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import xxhash

from sana.data.caption import Caption
from sana.data.index import Entry, table
from sana.data.tar import member_name

PARTIAL = ".partial"
"""End of the names of files that are being written; they begin with a dot."""


class ShardWriter:
    """A tar that is written beside its place and renamed when it is whole.

    Names are fixed and times and owners are zero, so that equal samples give equal bytes. Used as a context; an
    exception leaves nothing behind.

    Args:
        folder, name: where the tar will be.
        number: of the shard, for the rows of the index.
    """

    def __init__(self, folder: Path, name: str, number: int) -> None:
        self.path, self.number = folder / name, number
        self._partial = folder / f".{name}{PARTIAL}"
        self._entries: list[Entry] = []
        self._digest = hashlib.sha256()
        self._offset = 0

    def __enter__(self) -> ShardWriter:
        self._file = open(self._partial, "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                # Two empty blocks end a tar, and whole records of 20 blocks make it up.
                self._write(bytes(2 * tarfile.BLOCKSIZE))
                self._write(bytes(-self._offset % tarfile.RECORDSIZE))
                self._file.flush()
                os.fsync(self._file.fileno())
                os.replace(self._partial, self.path)
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def add(
        self,
        key: str,
        members: Mapping[str, bytes],
        *,
        captions: tuple[Caption, ...],
        width: int,
        height: int,
        scores: Mapping[str, float] | None = None,
        hq: bool = False,
    ) -> None:
        """Append one sample.

        Args:
            key: without dots; unique in the shard.
            members: suffix ("jpg", "json", "npy", "poses.npy") -> bytes, written in this order.
            captions, width, height, scores, hq: for the index.
        """
        places, checksums = {}, {}
        for suffix, body in members.items():
            info = tarfile.TarInfo(f"{key}.{suffix}")  # its time, owner and group are zero
            info.size, info.mode = len(body), 0o644
            self._write(info.tobuf(tarfile.USTAR_FORMAT))
            name = member_name(suffix)
            if name:
                places[name] = (self._offset, len(body))
                checksums[name] = xxhash.xxh3_64_intdigest(body)
            self._write(body)
            self._write(bytes(-len(body) % tarfile.BLOCKSIZE))
        self._entries.append(
            Entry(key, self.number, captions, width, height, scores or {}, hq, members=places, checksums=checksums)
        )

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)

    def facts(self) -> dict[str, Any]:
        """Name, number of samples, bytes and sha256 of the shard, once it is whole."""
        return {
            "name": self.path.name,
            "count": len(self._entries),
            "bytes": self._offset,
            "sha256": self._digest.hexdigest(),
        }

    def rows(self) -> pa.Table:
        """Its rows of the index."""
        return table(self._entries)
