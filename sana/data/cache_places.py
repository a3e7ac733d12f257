"""Where every sample of a cache lies, and reading byte ranges of its files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sana.data.arrow import numbers
from sana.data.cache_folder import CacheFolder, StaleCacheError


class Files:
    """Byte ranges of local files, read into memory that is given; no descriptor is shared with another process."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._open: dict[int, int] = {}
        self._pid = os.getpid()

    def name(self, file: int) -> str:
        """Of a file, for messages."""
        return self._paths[file].name

    def read_into(self, file: int, offset: int, target: np.ndarray) -> bool:
        """Fill a row of bytes; False where the file ends before."""
        if self._pid != os.getpid():
            self._open, self._pid = {}, os.getpid()
        handle = self._open.get(file)
        if handle is None:
            if len(self._open) >= 256:
                os.close(self._open.pop(next(iter(self._open))))
            handle = self._open[file] = os.open(self._paths[file], os.O_RDONLY)
        return os.preadv(handle, [target.data], offset) == len(target)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        if getattr(self, "_pid", None) == os.getpid():
            for handle in self._open.values():
                os.close(handle)


class Places:
    """Where every sample of some caches lies.

    Attributes:
        count: samples in all.
        shard: (count,) number of the file, -1 where there is none.
        offset: (count,) bytes, of the sample's first number.
        files: the tars.
        tables: (samples' numbers, rows) of each shard.
    """

    def __init__(self, folders: Sequence[CacheFolder]) -> None:
        self.count = sum(folder.count for folder in folders)
        self.shard = np.full(self.count, -1, np.int32)
        self.offset = np.zeros(self.count, np.int64)
        self.tables: list[tuple[np.ndarray, pa.RecordBatch]] = []
        self._bad: dict[int, str] = {}
        base, tars = 0, []
        for folder in folders:
            for name in folder.shards:
                table = _read_table(folder, name)
                samples = numbers(table["sample"]) + base
                self.shard[samples], self.offset[samples] = len(tars), numbers(table["offset"])
                for row in _valid(table["bad"]):
                    self._bad[int(samples[row])] = table["bad"][int(row)].as_py()
                    self.shard[samples[row]] = -1
                self.tables.append((samples, table))
                tars.append(folder.path / f"{name}.tar")
            base += folder.count
        self.files = Files(tars)

    def reason(self, i: int) -> str:
        """Why a sample is not there."""
        return self._bad.get(i, "missing file: it is not in the cache")


def _valid(array: pa.Array) -> list[int]:
    """Places that are not null."""
    if array.null_count == len(array):
        return []
    return [row for row, known in enumerate(array.is_valid().to_pylist()) if known]


def _read_table(folder: CacheFolder, name: str) -> pa.RecordBatch:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(folder.path / f"{name}.arrow")))
        table, size = reader.get_batch(0), int((reader.schema.metadata or {})[b"bytes"])
    except (OSError, KeyError, pa.ArrowException) as error:
        raise StaleCacheError(f"{folder.path}: shard {name} is not cached ({type(error).__name__})") from error
    tar = folder.path / f"{name}.tar"
    if not tar.is_file() or tar.stat().st_size != size:
        raise StaleCacheError(f"{tar} is not the file its index describes; delete {name}.arrow and cache it anew")
    samples = numbers(table["sample"])
    if len(samples) and not 0 <= samples.min() <= samples.max() < folder.count:
        raise StaleCacheError(f"{folder.path}: {name}.arrow names samples that the source does not have")
    return table
