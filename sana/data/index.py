"""What is known about every sample of a source, as columns of one memory-mapped Arrow file.

Opening costs the same for a thousand and for a hundred million samples, and processes share the pages. A row says
where a sample's bytes lie, how large its image is, its captions and its scores; `Index.column` gives a column as a
numpy array without a copy.

Columns: ``key``; ``shard`` (number of the shard in `Index.shards`); ``image_offset``, ``image_size`` (bytes);
``meta_offset``, ``meta_size``; ``width``, ``height`` (pixels as seen, 0 without an image); ``checksum`` and
``meta_checksum`` (xxh3_64 of the bytes, 0 unknown); ``hq`` (0 or 1); ``captions``. As the source has them:
``score.<name>`` (float32, NaN unknown); ``<member>_offset``, ``<member>_size`` and ``<member>_checksum`` of further
members such as "latent" or "clip" (size 0: none); ``path`` (the sample's own file, if each has one); ``meta`` (JSON).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sana.data.arrow import numbers
from sana.data.caption import Caption, Captions

VERSION = 1
"""Of the file format; an index of another version is refused."""

_CAPTION = pa.struct([("source", pa.large_string()), ("text", pa.large_string()), ("score", pa.float64())])
_FIXED: dict[str, pa.DataType] = {
    "key": pa.large_string(),
    "shard": pa.int32(),
    "image_offset": pa.int64(),
    "image_size": pa.int64(),
    "meta_offset": pa.int64(),
    "meta_size": pa.int64(),
    "width": pa.int32(),
    "height": pa.int32(),
    "checksum": pa.uint64(),
    "meta_checksum": pa.uint64(),
    "hq": pa.uint8(),
    "captions": pa.large_list(_CAPTION),
}
_TEXT = ("path", "meta")


@dataclass
class Entry:
    """One row of an index.

    Attributes:
        key, shard, captions, width, height, scores, hq: see the columns above.
        members: name ("image", "meta", "latent", ...) -> (offset, size) in the shard.
        checksums: name of a member -> xxh3_64 of its bytes, where known.
        path: the sample's own file, instead of a place in a shard.
        meta: JSON of the sample that stands in no member.
    """

    key: str
    shard: int
    captions: tuple[Caption, ...]
    width: int = 0
    height: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    hq: bool = False
    members: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    checksums: Mapping[str, int] = field(default_factory=dict)
    path: str | None = None
    meta: str | None = None


def table(entries: Iterable[Entry]) -> pa.Table:
    """Rows as columns; a score, member, path or meta becomes a column when any row has it."""
    rows = list(entries)
    columns: dict[str, pa.Array] = {
        "key": pa.array([row.key for row in rows], pa.large_string()),
        "shard": pa.array([row.shard for row in rows], pa.int32()),
        "width": pa.array([row.width for row in rows], pa.int32()),
        "height": pa.array([row.height for row in rows], pa.int32()),
        "checksum": pa.array([row.checksums.get("image", 0) for row in rows], pa.uint64()),
        "meta_checksum": pa.array([row.checksums.get("meta", 0) for row in rows], pa.uint64()),
        "hq": pa.array([int(row.hq) for row in rows], pa.uint8()),
        "captions": _captions_array(rows),
    }
    members = sorted({name for row in rows for name in row.members} | {"image", "meta"})
    for name in members:
        places = [row.members.get(name, (0, 0)) for row in rows]
        columns[f"{name}_offset"] = pa.array([place[0] for place in places], pa.int64())
        columns[f"{name}_size"] = pa.array([place[1] for place in places], pa.int64())
        if name not in ("image", "meta") and any(name in row.checksums for row in rows):
            columns[f"{name}_checksum"] = pa.array([row.checksums.get(name, 0) for row in rows], pa.uint64())
    for name in sorted({name for row in rows for name in row.scores}):
        values = [row.scores.get(name, float("nan")) for row in rows]
        columns[f"score.{name}"] = pa.array(np.asarray(values, np.float32))
    for name in _TEXT:
        if any(getattr(row, name) is not None for row in rows):
            columns[name] = pa.array([getattr(row, name) or "" for row in rows], pa.large_string())
    return pa.table({name: columns[name] for name in [*_FIXED, *sorted(columns.keys() - _FIXED.keys())]})


def _captions_array(rows: list[Entry]) -> pa.Array:
    flat = [caption for row in rows for caption in row.captions]
    scores = [float("nan") if caption.score is None else caption.score for caption in flat]
    values = pa.StructArray.from_arrays(
        [
            pa.array([caption.source for caption in flat], pa.large_string()),
            pa.array([caption.text for caption in flat], pa.large_string()),
            pa.array(np.asarray(scores, np.float64)),
        ],
        fields=list(_CAPTION),
    )
    ends = np.cumsum([0, *(len(row.captions) for row in rows)], dtype=np.int64)
    return pa.LargeListArray.from_arrays(pa.array(ends), values)


def join(tables: Iterable[pa.Table]) -> pa.Table:
    """One table after another; a column that one lacks is filled with "unknown" there."""
    whole = pa.concat_tables(tables, promote_options="default")
    for name in set(whole.column_names) - _FIXED.keys():
        column = whole[name]
        unknown: Any = float("nan") if name.startswith("score.") else "" if name in _TEXT else 0
        if column.null_count:
            whole = whole.set_column(whole.schema.get_field_index(name), name, column.fill_null(unknown))
    fixed = [*_FIXED, *sorted(set(whole.column_names) - _FIXED.keys())]
    return whole.select(fixed)


def serialise(rows: pa.Table, shards: list[dict[str, Any]], facts: Mapping[str, Any]) -> pa.Buffer:
    """The bytes of an index file.

    Args:
        rows: from `table` or `join`.
        shards: one dict per shard with at least "name" and "bytes".
        facts: whatever else is to be known about the whole; JSON.
    """
    about = {"version": VERSION, "shards": shards, "facts": dict(facts)}
    schema = rows.schema.with_metadata({b"sana": json.dumps(about, separators=(",", ":"), sort_keys=True).encode()})
    batches = rows.combine_chunks().cast(schema).to_batches()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        # One batch, so that every column is one piece of memory.
        writer.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], schema))
    return sink.getvalue()


def write(path: str | Path, rows: pa.Table, shards: list[dict[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write an index file, beside its place and then renamed."""
    partial = Path(path).with_name(f".{Path(path).name.lstrip('.')}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(serialise(rows, shards, facts))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class Index:
    """An index, memory-mapped from a file or held in memory.

    Args:
        source: path of the file, or the bytes of one.

    Attributes:
        shards: per shard "name", "bytes" and what the writer added.
        facts: what the writer said about the whole.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no index, or one of another version.
    """

    def __init__(self, source: str | Path | pa.Buffer | bytes) -> None:
        self._source = source
        try:
            mapped = pa.memory_map(str(source)) if isinstance(source, str | Path) else pa.BufferReader(source)
            reader = pa.ipc.open_file(mapped)
            batch = reader.get_batch(0)
            about = json.loads((reader.schema.metadata or {})[b"sana"])
            version = about["version"]
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, KeyError, ValueError, IndexError) as error:
            raise ValueError(f"{self._name}: not an index of samples; delete it to have it made anew") from error
        if version != VERSION:
            raise ValueError(f"{self._name}: an index of version {version}, expected {VERSION}; delete it")
        self.shards: list[dict[str, Any]] = about["shards"]
        self.facts: dict[str, Any] = about["facts"]
        self._batch = batch
        self._keys = _Strings(batch["key"])
        self._texts = {name: _Strings(batch[name]) for name in _TEXT if name in batch.schema.names}
        captions = batch["captions"]
        self._caption_ends = numbers(captions.offsets)
        self._caption_source = _Strings(captions.values.field("source"))
        self._caption_text = _Strings(captions.values.field("text"))
        self._caption_score = numbers(captions.values.field("score"))
        self._columns: dict[str, np.ndarray] = {}

    @property
    def _name(self) -> str:
        return str(self._source) if isinstance(self._source, str | Path) else "index in memory"

    def __len__(self) -> int:
        return self._batch.num_rows

    def __reduce__(self) -> tuple[Any, ...]:
        source = self._source
        return Index, (source if isinstance(source, str | Path | bytes) else source.to_pybytes(),)

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return self._batch.schema.names

    @property
    def scores(self) -> list[str]:
        """Names of the scores, without "score."."""
        return [name.removeprefix("score.") for name in self.names if name.startswith("score.")]

    @property
    def members(self) -> list[str]:
        """Names of the members that some sample has: "image", "meta", "latent", ..."""
        return [name.removesuffix("_offset") for name in self.names if name.endswith("_offset")]

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, one value per sample, read-only and without a copy.

        Raises:
            KeyError: no such column of numbers; the message names those there are.
        """
        if name not in self._columns:
            fit = [n for n in self.names if n not in ("key", "captions", *_TEXT)]
            if name not in fit:
                raise KeyError(f"{self._name} has no column of numbers {name!r}; it has {', '.join(fit)}")
            self._columns[name] = numbers(self._batch[name])
        return self._columns[name]

    def key(self, i: int) -> str:
        """Name of sample i within its shard."""
        return self._keys[i]

    def text(self, name: str, i: int) -> str:
        """Column "path" or "meta" of sample i; "" where there is none."""
        return self._texts[name][i] if name in self._texts else ""

    def captions(self, i: int) -> tuple[Caption, ...]:
        """The captions of sample i."""
        first, last = self._caption_ends[i : i + 2].tolist()
        sources, texts = self._caption_source.several(first, last), self._caption_text.several(first, last)
        scores = [None if score != score else score for score in self._caption_score[first:last].tolist()]
        return tuple(map(Caption, sources, texts, scores))

    def choices(self, i: int) -> Captions:
        """The captions of sample i, each read when it is asked for."""
        first, last = self._caption_ends[i : i + 2].tolist()
        scores = [None if score != score else score for score in self._caption_score[first:last].tolist()]

        def read(k: int) -> Caption:
            return Caption(self._caption_source[first + k], self._caption_text[first + k], scores[k])

        return Captions(scores, read)

    def caption_counts(self) -> np.ndarray:
        """Number of captions of each sample, int64."""
        return np.diff(self._caption_ends)

    def caption_lengths(self) -> dict[str, np.ndarray]:
        """Caption source -> lengths of its captions in bytes, int64, over all samples."""
        sources = np.asarray(self._batch["captions"].values.field("source").dictionary_encode().indices)
        names = self._batch["captions"].values.field("source").dictionary_encode().dictionary.to_pylist()
        lengths = np.diff(self._caption_text.ends)
        return {name: lengths[sources == number] for number, name in enumerate(names)}

    def rows(self) -> pa.Table:
        """All columns, as `join` takes them."""
        return pa.Table.from_batches([self._batch]).replace_schema_metadata(None)

    def digest_parts(self) -> Iterator[bytes | memoryview]:
        """The bytes of everything that identifies the samples: keys, places, sizes, checksums, captions, scores."""
        for name in sorted(self.names):
            yield name.encode()
            if name == "captions":
                # The offsets are those of slices that begin at 0: the file holds one batch.
                yield np.ascontiguousarray(self._caption_ends).data
                for strings in (self._caption_source, self._caption_text):
                    yield from strings.parts()
                yield np.ascontiguousarray(self._caption_score).data
            elif name == "key":
                yield from self._keys.parts()
            elif name in _TEXT:
                yield from self._texts[name].parts()
            else:
                yield np.ascontiguousarray(self.column(name)).data


class _Strings:
    """A column of strings, read one at a time in about a microsecond."""

    def __init__(self, array: pa.Array) -> None:
        _, ends, data = array.buffers()
        self.ends = np.frombuffer(ends, np.int64)[array.offset : array.offset + len(array) + 1] if ends else _NO_ENDS
        self.data = memoryview(data) if data else memoryview(b"")

    def __getitem__(self, i: int) -> str:
        return str(self.data[self.ends[i] : self.ends[i + 1]], "utf-8")

    def several(self, first: int, last: int) -> list[str]:
        """The strings from number `first` to `last` - 1, which lie one behind the other."""
        ends = self.ends[first : last + 1].tolist()
        return [str(self.data[a:b], "utf-8") for a, b in pairwise(ends)]

    def parts(self) -> Iterator[memoryview]:
        yield np.ascontiguousarray(self.ends).data
        yield self.data[int(self.ends[0]) : int(self.ends[-1])]


_NO_ENDS = np.zeros(1, np.int64)
