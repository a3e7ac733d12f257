"""Indexes of data that somebody else wrote: made once, kept beside the data or in a cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from rich.console import Console
from rich.progress import track

from sana.data.index import VERSION, Index, join, serialise, table
from sana.data.record import BadSample, Limits
from sana.data.storage import LocalFolder, Storage

T = TypeVar("T")

Made = tuple[list[pa.Table], list[dict[str, Any]], list[BadSample]]
"""Rows in pieces, shards, and bad samples."""


def cached_index(
    storage: Storage, name: str, kind: str, limits: Limits, stamps: Iterable[Any], make: Callable[[], Made]
) -> tuple[Index, list[BadSample]]:
    """The index of some data, from the cache if it is that of these data, else made and cached.

    Args:
        storage: where the data lie.
        name: what is opened there (a split, a file); distinguishes indexes of one folder.
        kind: name of the format.
        limits: part of what an index depends on.
        stamps: names, sizes and times of change of the files; JSON.
        make: reads the data.
    """
    digest = hashlib.sha256(f"{VERSION} {kind} {json.dumps(asdict(limits), sort_keys=True)}".encode())
    for stamp in stamps:
        digest.update(json.dumps(stamp).encode())
    stamp = digest.hexdigest()
    file = f".index-{name}.arrow"
    beside = [Path(storage.root) / file] if isinstance(storage, LocalFolder) and Path(storage.root).is_dir() else []
    elsewhere = cache_folder() / f"{hashlib.sha256(f'{storage.root} {name}'.encode()).hexdigest()[:24]}.arrow"
    places = [*beside, elsewhere]
    for place in places:
        try:
            index = Index(place)
        except (OSError, ValueError):
            continue
        if index.facts.get("stamp") == stamp:
            return index, [BadSample(*reasons) for reasons in index.facts["bad"]]
    pieces, shards, bad = make()
    facts = {"kind": kind, "stamp": stamp, "bad": [[b.shard, b.key, b.reason] for b in bad]}
    data = serialise(join(pieces) if pieces else table([]), shards, facts)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _replace(place, data)
        except OSError:  # a read-only place
            continue
        return Index(place), bad
    return Index(data), bad


def reading(things: list[T], what: str) -> Iterator[T]:
    """The things one after another, with a bar on a terminal: making an index of many takes minutes."""
    console = Console(stderr=True)
    shown = console.is_terminal and len(things) > 1
    return iter(track(things, f"reading {what} once", console=console, transient=True, disable=not shown))


def cache_folder() -> Path:
    """Where indexes go whose data lie in a read-only or remote place: ``$XDG_CACHE_HOME/sana-lab/index``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sana-lab" / "index"


def _replace(place: Path, data: pa.Buffer) -> None:
    partial = place.with_name(f".{place.name.lstrip('.')}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
        os.replace(partial, place)
    finally:
        partial.unlink(missing_ok=True)
