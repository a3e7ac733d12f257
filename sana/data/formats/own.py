"""Shards with the index that `make_shards.py` wrote beside them: ``SPLIT-000000.tar`` and ``SPLIT.index.arrow``."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from sana.data.formats.cached import cache_folder
from sana.data.index import Index
from sana.data.record import Limits
from sana.data.source import Source
from sana.data.storage import LocalFolder, Storage


def index_name(split: str) -> str:
    """File name of a split's index."""
    return f"{split}.index.arrow"


def task_name(split: str) -> str:
    """File that is there while a split is being written, and after a stop until the writer is called again."""
    return f".{split}.task.json"


def open_own(storage: Storage, split: str, limits: Limits) -> Source:
    """Shards that we wrote. Nothing but the index is read.

    Raises:
        FileNotFoundError: a shard of a local folder is missing; the message names it.
        ValueError: the index is damaged.
    """
    name = index_name(split)
    if isinstance(storage, LocalFolder):
        index = Index(Path(storage.root) / name)
        there = set(storage.names())
        missing = [shard["name"] for shard in index.shards if shard["name"] not in there]
        if missing:
            raise FileNotFoundError(
                f"{storage.root}: {len(missing)} of the {len(index.shards)} shards in {name} are missing, "
                f"{missing[0]} first; run make_shards.py again, or copy them"
            )
        return Source(index, storage, limits)
    return Source(Index(_downloaded(storage, name)), storage, limits)


def _downloaded(storage: Storage, name: str) -> Path:
    facts = storage.stat(name)
    digest = hashlib.sha256(f"{storage.root}/{name} {facts.size} {facts.stamp}".encode()).hexdigest()
    path = cache_folder() / f"{digest[:24]}.arrow"
    if not path.exists() or path.stat().st_size != facts.size:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            partial.write_bytes(storage.read(name))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path
