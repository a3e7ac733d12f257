"""Images that each have a file of their own: any folder of them, the published SANA folder, and tables of paths."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from sana.data.caption import Caption
from sana.data.formats.cached import Made, cached_index, reading
from sana.data.index import Entry, table
from sana.data.metadata import Facts, facts, number, parse_json, parse_text
from sana.data.record import BadSample, Limits, storable
from sana.data.scan import head_size
from sana.data.source import Source
from sana.data.storage import LocalFolder, Storage, scheme
from sana.data.tar import IMAGE_SUFFIXES

META_DATA = "meta_data.json"
TABLES = (".jsonl", ".csv", ".parquet")
PATH_COLUMNS = ("path", "file_name", "file", "image", "image_path", "filepath", "filename", "img_path")
"""What a column of paths may be called, in order of preference."""

_TEXTS = (".txt", ".caption")


def _entry(storage: Storage, path: str, key: str, said: Facts, meta: Mapping[str, Any], limits: Limits) -> Entry:
    """The row of one image file.

    Raises:
        ValueError: with the reason for which it cannot be used.
    """
    if not storable(path):
        raise ValueError("unsafe name: it is not plain UTF-8")
    try:
        if scheme(path) and isinstance(storage, LocalFolder):
            raise ValueError(f"unsafe url: {path[:80]!r} in a local table; give paths, or put the table there too")
        size = storage.stat(path).size
        if size > limits.max_bytes:
            raise ValueError(f"too many bytes: {size}, more than {limits.max_bytes}")
        sides = head_size(lambda offset, count: storage.read(path, offset, count), 0, size, limits.max_pixels)
    except FileNotFoundError:
        raise ValueError("missing file") from None
    except OSError as error:
        raise ValueError(f"unreadable: {type(error).__name__}: {error}") from error
    return Entry(
        key,
        0,
        said.captions,
        *sides,
        said.scores,
        said.hq,
        members={"image": (0, size)},
        path=path,
        meta=_json(meta),
    )


def _json(meta: Mapping[str, Any]) -> str:
    return json.dumps(dict(meta), separators=(",", ":"), default=str) if meta else ""


def _made(entries: list[Entry], bad: list[BadSample]) -> Made:
    return [table(entries)], [{"name": "", "bytes": 0}], bad


def open_images(storage: Storage, limits: Limits) -> Source:
    """Any folder of images, in any nesting, with ``NAME.txt``, ``NAME.caption`` or ``NAME.json`` beside ``NAME.png``.

    Raises:
        FileNotFoundError: there is no image.
    """
    files = storage.walk()
    images = [path for path in files if path.rpartition(".")[2].lower() in IMAGE_SUFFIXES]
    if not images:
        raise FileNotFoundError(
            f"{storage.root} holds neither shards nor images; expected *.tar, {', '.join(IMAGE_SUFFIXES)}, "
            f"or one table of paths and captions ({', '.join(TABLES)})"
        )

    def make() -> Made:
        entries, bad, seen = [], [], {}
        for path in reading(images, "images"):
            key = path.rpartition(".")[0]
            try:
                if seen.setdefault(key, path) != path:
                    raise ValueError(f"duplicate key: {seen[key]} has the same name; that one is used")
                meta = parse_json(storage.read(f"{key}.json")) if f"{key}.json" in files else {}
                text = next((parse_text(storage.read(key + s)) for s in _TEXTS if key + s in files), None)
                said = facts(meta, text, fields=limits.caption_fields)
                entries.append(_entry(storage, path, key, said, meta, limits))
            except ValueError as error:
                bad.append(BadSample(path, key, str(error)))
            except OSError as error:
                bad.append(BadSample(path, key, f"unreadable: {type(error).__name__}: {error}"))
        return _made(entries, bad)

    stamps = ([path, facts.size, facts.stamp] for path, facts in files.items())
    return _source(storage, "images", "images", limits, stamps, make)


def open_published(storage: Storage, limits: Limits) -> Source:
    """The folder of SANA's released code: ``meta_data.json`` = {"img_names": [...]}, ``NAME.png`` and ``NAME.txt``.

    Only the first line of a text counts. ``NAME*.json`` = {NAME: {caption: text or score}} adds captions and scores.
    """
    names = storage.names()
    there = set(names)
    listed = parse_json(storage.read(META_DATA)).get("img_names")
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ValueError(f'{storage.root}/{META_DATA}: expected {{"img_names": ["name1", ...]}}')
    stems = {_stem(name): name for name in listed}
    further = longest_stems([name for name in names if name.endswith(".json") and name != META_DATA], stems)

    def make() -> Made:
        entries, bad, seen = [], [], set()
        for listed_name in listed:
            key = _stem(listed_name)
            path = listed_name if key != listed_name else f"{listed_name}.png"
            try:
                if ".." in PurePosixPath(path).parts or path.startswith("/") or not storable(path):
                    raise ValueError("unsafe name: it leads out of the folder")
                if key in seen:
                    raise ValueError("duplicate key: it is listed twice")
                seen.add(key)
                captions, scores = _more(storage, key, further.get(key, []))
                text = None
                if f"{key}.txt" in there or "/" in key:
                    text = next(iter(parse_text(storage.read(f"{key}.txt")).splitlines()), "")
                said = facts(captions, text, fields=captions.keys(), caption_scores=scores)
                entries.append(_entry(storage, path, key, said, {}, limits))
            except FileNotFoundError:
                bad.append(BadSample(path, key, "no caption"))
            except OSError as error:
                bad.append(BadSample(path, key, f"unreadable: {type(error).__name__}: {error}"))
            except ValueError as error:
                bad.append(BadSample(path, key, str(error)))
        return _made(entries, bad)

    stamps = [[name, *_stat(storage, name)] for name in names if not name.startswith(".")]
    return _source(storage, "images", "meta_data", limits, stamps, make)


def _stem(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    return stem if suffix.lower() in IMAGE_SUFFIXES and stem else name


def _more(storage: Storage, key: str, files: list[str]) -> tuple[dict[str, str], dict[str, float]]:
    """Captions and scores of one sample in the JSON files of its name."""
    captions: dict[str, str] = {}
    scores: dict[str, float] = {}
    for name in files:
        for source, value in _object(parse_json(storage.read(name)).get(key)).items():
            if isinstance(value, str):
                captions[source] = value
            elif (score := number(value)) is not None:
                scores[source] = score
    return captions, scores


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def longest_stems(names: list[str], stems: Mapping[str, Any]) -> dict[str, list[str]]:
    """Stem -> names of files that begin with it and with no longer one: "a" -> ["a.json", "a_score.json"]."""
    lengths = sorted({len(stem) for stem in stems}, reverse=True)
    found: dict[str, list[str]] = {}
    for name in names:
        stem = next((name[:n] for n in lengths if name[:n] in stems and name[n : n + 1] in ("", ".", "_", "-")), None)
        if stem is not None:
            found.setdefault(stem, []).append(name)
    return found


def open_table(storage: Storage, name: str, limits: Limits) -> Source:
    """A ``.jsonl``, ``.csv`` or ``.parquet`` of paths (relative to it) and captions.

    Rows of one path are one sample with several captions. Columns are read as the JSON of a sample is
    (`sana.data.metadata`): "prompt", "caption", ..., and numbers whose name ends with "score".

    Raises:
        ValueError: there is no column of paths, or the file is none of these.
    """

    def make() -> Made:
        entries: dict[str, Entry] = {}
        bad: list[BadSample] = []
        for line, row in _rows(name, storage.read(name)):
            path = ""
            try:
                if isinstance(row, ValueError):
                    raise row
                found = next((row[c] for c in PATH_COLUMNS if row.get(c)), None)
                path = found if isinstance(found, str) else ""
                if not path:
                    raise ValueError(f"no image: none of the columns {', '.join(PATH_COLUMNS)} has a path")
                meta = {column: value for column, value in row.items() if value not in (None, "")}
                said = facts(meta, fields=limits.caption_fields)
                if path in entries:
                    entries[path] = _with_captions(entries[path], said.captions)
                else:
                    key = _stem(path)
                    entries[path] = _entry(storage, path, key, said, meta, limits)
            except ValueError as error:
                bad.append(BadSample(name, path or f"row {line}", str(error)))
        return _made(list(entries.values()), bad)

    stat = _stat(storage, name)
    return _source(storage, f"table-{name}", "table", limits, [[name, *stat]], make)


def _with_captions(entry: Entry, captions: tuple[Caption, ...]) -> Entry:
    return replace(entry, captions=entry.captions + tuple(c for c in captions if c not in entry.captions))


def _rows(name: str, data: bytes) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    if name.endswith(".parquet"):
        try:
            rows = parquet.read_table(pa.BufferReader(data)).to_pylist()
        except pa.ArrowException as error:
            raise ValueError(f"{name}: no readable parquet: {error}") from None
        yield from enumerate(rows, 1)
    elif name.endswith(".csv"):
        try:
            text = parse_text(data)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; a csv is UTF-8") from None
        try:
            for line, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), 1):
                yield line, {column: _typed(column, value) for column, value in row.items() if column}
        except csv.Error as error:
            raise ValueError(f"{name}: no readable csv: {error}") from None
    else:
        for line, body in enumerate(data.split(b"\n"), 1):
            if body.strip():
                try:
                    yield line, parse_json(body)
                except ValueError as error:
                    yield line, error


def _typed(column: str, value: Any) -> Any:
    """A csv has only texts; scores are numbers."""
    try:
        return float(value) if column.endswith("score") and value else value
    except ValueError:
        return value


def _stat(storage: Storage, name: str) -> tuple[int, str]:
    facts = storage.stat(name)
    return facts.size, facts.stamp


def _source(
    storage: Storage, name: str, kind: str, limits: Limits, stamps: Iterable[Any], make: Callable[[], Made]
) -> Source:
    index, bad = cached_index(storage, name, kind, limits, stamps, make)
    return Source(index, storage, limits, bad)
