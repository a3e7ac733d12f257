"""A path or URL -> a `Source`, whatever lies there."""

from __future__ import annotations

import re
from pathlib import Path

from sana.data.formats.files import META_DATA, TABLES, open_images, open_published, open_table
from sana.data.formats.own import index_name, open_own, task_name
from sana.data.formats.tars import WIDS, open_tars, open_wids, tars_of_split
from sana.data.record import Limits
from sana.data.source import Source
from sana.data.storage import LocalFolder, Storage, open_storage, scheme

_MOST_SHARDS = 1_000_000


def open_source(
    where: str | Path,
    split: str = "train",
    *,
    max_pixels: int = Limits.max_pixels,
    max_bytes: int = Limits.max_bytes,
    max_members: int = Limits.max_members,
    caption_fields: tuple[str, ...] = (),
    cache: str | Path | None = None,
    cache_bytes: int | None = None,
) -> Source:
    """Open a data set by what lies at a place.

    In this order: our own shards (``SPLIT.index.arrow``); for "train" the published SANA shards (``wids-meta.json``)
    and the published SANA folder (``meta_data.json``); WebDataset tars (``SPLIT-*.tar``, else for "train" all that
    belong to no other split); a folder named SPLIT with any of these or of what follows; for "train" a table of paths
    and captions (the only ``.jsonl``, ``.csv`` or ``.parquet``), or images with ``.txt`` or ``.json`` beside them.
    Except for our own shards the data are read once to make an index, which is kept.

    Args:
        where: a folder; a ``.tar``, ``.jsonl``, ``.csv``, ``.parquet`` or ``wids-meta.json`` file; or a URL of one of
            them (s3, gs, http, https, hf). ``shard-{000..063}.tar`` names several tars.
        split: "train", "val", ...
        max_pixels, max_bytes, max_members, caption_fields: see `sana.data.record.Limits`.
        cache, cache_bytes: for URLs, see `sana.data.storage.open_storage`.

    Raises:
        FileNotFoundError: nothing there, or not this split.
        ValueError: what is there is not read; the message says what would be.
    """
    limits = Limits(max_pixels, max_bytes, max_members, tuple(caption_fields))
    folder, file = _parts(str(where))
    storage = open_storage(folder, cache, cache_bytes)
    if isinstance(storage, LocalFolder) and not Path(storage.root).is_dir():
        raise FileNotFoundError(
            f"{storage.root} does not exist; expected a folder of shards or of images "
            "(`python scripts/make_shards.py images SRC DST` makes shards)"
        )
    return _open_file(storage, file, split, limits) if file else _open_folder(storage, split, limits)


def _open_folder(storage: Storage, split: str, limits: Limits) -> Source:
    names = storage.names()
    if _has(storage, names, index_name(split)):
        return open_own(storage, split, limits)
    if task_name(split) in names:
        raise ValueError(f"{storage.root}: split {split!r} is not complete; run the same make_shards.py command again")
    if split == "train" and _has(storage, names, WIDS):
        return open_wids(storage, WIDS, limits)
    if split == "train" and META_DATA in names:
        return open_published(storage, limits)
    if tars := tars_of_split(names, split):
        return open_tars(storage, tars, split, limits)
    if not isinstance(storage, LocalFolder) and (split != "train" or not storage.walk()):
        raise FileNotFoundError(
            f"{storage.root}: neither {index_name(split)} nor tars of split {split!r} behind a URL; a server without "
            "listings needs the names of tars or of a table: shard-{000..063}.tar"
        )
    if isinstance(storage, LocalFolder) and (Path(storage.root) / split).is_dir():
        return _open_folder(LocalFolder(Path(storage.root) / split), "train", limits)
    if split != "train":
        raise FileNotFoundError(f"{storage.root} has no split {split!r}; expected {split}-*.tar or a folder {split}")
    tables = [name for name in names if name.endswith(TABLES) and name != "bad_samples.jsonl"]
    if len(tables) > 1:
        raise ValueError(f"{storage.root} has {len(tables)} tables ({', '.join(tables[:3])}); name the one to use")
    return open_table(storage, tables[0], limits) if tables else open_images(storage, limits)


def _open_file(storage: Storage, file: str, split: str, limits: Limits) -> Source:
    if file.endswith(".json"):
        return open_wids(storage, file, limits)
    if file.endswith(TABLES):
        return open_table(storage, file, limits)
    if file.endswith(".tar"):
        return open_tars(storage, _expanded(file), f"{split}-{_plain(file)}", limits)
    raise ValueError(f"{storage.root}/{file}: not read; expected .tar, {', '.join(TABLES)} or {WIDS}")


def _has(storage: Storage, names: list[str], name: str) -> bool:
    """Whether a file is there, also on a server that lists nothing."""
    if names or isinstance(storage, LocalFolder):
        return name in names
    try:
        storage.stat(name)
    except OSError:
        return False
    return True


def _expanded(name: str) -> list[str]:
    """``a-{00..12}.tar`` -> 13 names, as shells and WebDataset have it.

    Raises:
        ValueError: the range is empty or has more than a million shards.
    """
    found = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if not found:
        return [name]
    first, last = int(found[1]), int(found[2])
    if not 0 < last - first + 1 <= _MOST_SHARDS:
        raise ValueError(f"{name}: expected a range of 1 to {_MOST_SHARDS} shards, such as {{000..063}}")
    numbers = [f"{i:0{len(found[1])}d}" for i in range(first, last + 1)]
    return [name[: found.start()] + number + name[found.end() :] for number in numbers]


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def _parts(where: str) -> tuple[str, str]:
    """Folder, and the file in it if `where` is a file."""
    if not scheme(where):
        path = Path(where)
        is_file = path.is_file() or bool(re.search(r"\{\d+\.\.\d+\}", path.name))
        return (str(path.parent), path.name) if is_file else (str(path), "")
    if re.search(r"\.(tar|jsonl|csv|parquet|json)$", where):
        folder, _, name = where.rpartition("/")
        return folder, name
    return where.rstrip("/"), ""
