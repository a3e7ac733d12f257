"""Scenes written as WebDataset shards: tars of KEY.png + KEY.json with an index and ``index.json`` beside them.

The bytes of a shard depend on its parameters alone (and on zlib's version), not on the number of workers or
on what was interrupted: names are fixed, times and owners are zero, and each shard is written under another
name and then renamed. ``index.json`` is rewritten after every shard, so a second call goes on where the
first ended.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sana.data.formats.own import index_name
from sana.data.index import Index, join, table, write
from sana.data.metadata import facts as stated
from sana.data.record import Limits
from sana.data.scan import scan_tar
from sana.data.shard_writer import PARTIAL, ShardWriter
from sana.data.storage import LocalFolder
from sana.data.synthetic import GENERATOR, example
from sana.data.write_shards import LOCK, locked, progress_bar
from sana.scenes import TASKS

INDEX = "index.json"
_REPORT_EVERY = 100  # images between two reports of progress


@dataclass(frozen=True)
class SceneSet:
    """What determines every byte of a folder of shards.

    Attributes:
        count: images in all; the indices are 0 to count - 1.
        seed: of the generator. Sets with different seeds have no scene in common.
        split: first part of the names of the shards.
        held_out: whether the scenes are those that training never sees (`sana.scenes.HELD_OUT`).
        shard_size: images in each shard but the last.
        tasks: (task, weight) pairs; a scene is of a task as often as its weight says. Empty: all equally often.
    """

    count: int
    seed: int
    split: str = "train"
    held_out: bool = False
    shard_size: int = 5000
    tasks: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count}: expected at least one image")
        if self.shard_size < 1:
            raise ValueError(f"shard_size is {self.shard_size}: expected at least one image per shard")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: expected an integer in [0, 2**63)")
        if not self.split.replace("_", "").isalnum():
            raise ValueError(f"split is {self.split!r}: expected letters, digits and underscores")
        wrong = sorted({task for task, _ in self.tasks} - {*TASKS})
        if wrong:
            raise ValueError(f"tasks: there is no {wrong[0]!r}; expected some of {', '.join(TASKS)}")
        if self.tasks and not (
            all(weight >= 0 for _, weight in self.tasks) and any(weight for _, weight in self.tasks)
        ):
            raise ValueError(f"tasks: weights are not negative and not all zero, got {dict(self.tasks)}")

    def task(self, index: int) -> str | None:
        """The task that a scene is given; None leaves it to the scene."""
        if not self.tasks:
            return None
        names, weights = zip(*self.tasks, strict=True)
        return random.Random(f"{self.seed}/task/{index}").choices(names, weights)[0]

    def shards(self) -> list[tuple[str, int, int]]:
        """(name, first index, one past the last index) of each shard."""
        starts = range(0, self.count, self.shard_size)
        return [
            (f"{self.split}-{i:06d}.tar", start, min(start + self.shard_size, self.count))
            for i, start in enumerate(starts)
        ]


def encode_png(image: np.ndarray) -> bytes:
    """A PNG of an image, uint8 (h, w, 3): unfiltered and lightly compressed, five times as fast as Pillow's.

    Scenes are flat, so that filters would not make them smaller.
    """
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter type, 0
    rows[:, 1:] = image.reshape(height, -1)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(rows.tobytes(), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_shard(
    folder: Path, scenes: SceneSet, name: str, first: int, last: int, advance: Callable[[int], None]
) -> tuple[dict[str, Any], pa.Table]:
    """Write one shard; returns its entry of ``index.json`` and its rows of the index."""
    with ShardWriter(folder, name, first // scenes.shard_size) as shard:
        for done, index in enumerate(range(first, last), 1):
            image, facts = example(scenes.seed, index, scenes.task(index), held_out=scenes.held_out)
            members = {"png": encode_png(image), "json": json.dumps(facts, separators=(",", ":")).encode()}
            height, width, _ = image.shape
            shard.add(facts["key"], members, captions=stated(facts).captions, width=width, height=height)
            if done % _REPORT_EVERY == 0:
                advance(_REPORT_EVERY)
        advance((last - first) % _REPORT_EVERY)
    return shard.facts(), shard.rows()


_written: Any = None  # in a worker process: the number of images that all of them have written


def _start_worker(counter: Any) -> None:
    global _written
    _written = counter


def _write_shard_in_worker(
    folder: Path, scenes: SceneSet, name: str, first: int, last: int
) -> tuple[dict[str, Any], pa.Table]:
    def advance(images: int) -> None:
        with _written.get_lock():
            _written.value += images

    return _write_shard(folder, scenes, name, first, last, advance)


def _write_index(
    folder: Path, others: dict[str, Any], scenes: SceneSet, shards: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    done = [shards[name] for name, _, _ in scenes.shards() if name in shards]
    mine = _parameters(scenes) | {"complete": len(done) == len(scenes.shards()), "shards": done}
    index = {"kind": "scenes", "splits": {**others, scenes.split: mine}}
    partial = folder / f".{INDEX}{PARTIAL}"
    partial.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
    os.replace(partial, folder / INDEX)
    return mine


def _parameters(scenes: SceneSet) -> dict[str, Any]:
    tasks = [list(pair) for pair in scenes.tasks] or None  # as JSON gives it back; None in indices without the key
    return {"generator": GENERATOR, **asdict(scenes), "tasks": tasks}


def _read_index(folder: Path, scenes: SceneSet) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Shards of an earlier call by name, and the other splits of the folder.

    Raises:
        FileExistsError: when the folder holds something else than scenes, or another set under this split.
    """
    if not (folder / INDEX).exists():
        ours = {LOCK, f".{INDEX}{PARTIAL}"}
        strangers = sorted(p.name for p in folder.iterdir() if p.name not in ours)
        if strangers:
            raise FileExistsError(f"{folder} holds {strangers[0]!r} and no {INDEX}: give an empty or a new folder")
        return {}, {}
    try:
        index = json.loads((folder / INDEX).read_text())
        if index["kind"] != "scenes":
            raise ValueError
        splits = dict(index["splits"])
        found = splits.pop(scenes.split, None)
        shards = {shard["name"]: shard for shard in found["shards"]} if found else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FileExistsError(f"{folder / INDEX} is no index of scenes: give a new folder") from None
    for key, value in _parameters(scenes).items() if found else ():
        if found.get(key) != value:
            raise FileExistsError(
                f"{folder} holds another {scenes.split!r} set: {key} is {found.get(key)!r} there, "
                f"{value!r} was asked for; give a new folder"
            )
    return shards, splits


def _write_columns(
    folder: Path, scenes: SceneSet, shards: dict[str, dict[str, Any]], rows: dict[str, pa.Table]
) -> None:
    """The index that readers use; shards of an earlier call are read for it."""
    for number, (name, _, _) in enumerate(scenes.shards()):
        if name not in rows:
            entries, bad = scan_tar(LocalFolder(folder), name, number, Limits(), checksums=True)
            assert not bad, bad[0]  # its sha256 is that of what we wrote
            rows[name] = table(entries)
    names = [name for name, _, _ in scenes.shards()]
    facts = {"kind": "own", "task": _parameters(scenes), "bad": []}
    write(folder / index_name(scenes.split), join([rows[n] for n in names]), [shards[n] for n in names], facts)


def _has_columns(folder: Path, scenes: SceneSet) -> bool:
    try:
        return Index(folder / index_name(scenes.split)).facts.get("task") == _parameters(scenes)
    except (OSError, ValueError):
        return False


def write_scene_shards(
    folder: str | Path,
    count: int,
    seed: int,
    split: str = "train",
    *,
    held_out: bool = False,
    shard_size: int = 5000,
    tasks: Mapping[str, float] | None = None,
    workers: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a set of scenes as shards into a folder, or complete it, or find that it is there already.

    Args:
        folder: a new or empty folder, or one of an earlier call with the same parameters or another split.
        count, seed, split, held_out, shard_size, tasks: see `SceneSet`.
        workers: processes, each writing whole shards. It changes no byte.
        progress: whether to show a bar with rate and remaining time.

    Returns:
        What ``index.json`` has under "splits" for this one: generator, count, seed, split, held_out,
        shard_size, complete and shards (name, count, bytes, sha256 each).

    Raises:
        ValueError: for a parameter out of range.
        FileExistsError: when the folder holds something else.
    """
    scenes = SceneSet(count, seed, split, held_out, shard_size, tuple((tasks or {}).items()))
    if workers < 1:
        raise ValueError(f"workers is {workers}: expected at least one")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder for the shards")
    if folder.is_dir():
        _read_index(folder, scenes)  # refuse before the lock file is made
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        listed, others = _read_index(folder, scenes)
        for stale in folder.glob(f".*{PARTIAL}"):  # of a process that was killed: we have the lock
            stale.unlink()
        finished = {
            name: shard
            for name, shard in listed.items()
            if (folder / name).is_file() and _digest(folder / name) == shard["sha256"]
        }
        missing = [shard for shard in scenes.shards() if shard[0] not in finished]
        index = _write_index(folder, others, scenes, finished)
        if not missing:
            if not _has_columns(folder, scenes):
                _write_columns(folder, scenes, finished, {})
            return index
        rows: dict[str, pa.Table] = {}
        total = sum(last - first for _, first, last in missing)
        began = time.monotonic()
        with progress_bar(progress) as bar:
            task = bar.add_task(f"scenes {split}", total=total, rate="")

            def show(done: int) -> None:
                rate = done / max(time.monotonic() - began, 1e-9)
                bar.update(task, completed=done, rate=f"{rate:,.0f} images/s")

            for entry, found in _write_all(folder, scenes, missing, min(workers, len(missing)), show):
                finished[entry["name"]] = entry
                rows[entry["name"]] = found
                index = _write_index(folder, others, scenes, finished)
        _write_columns(folder, scenes, finished, rows)
    return index


def _write_all(
    folder: Path,
    scenes: SceneSet,
    missing: list[tuple[str, int, int]],
    workers: int,
    show: Callable[[int], None],
) -> Iterator[tuple[dict[str, Any], pa.Table]]:
    """Entries and rows of the shards as they are finished, with ``show(images written so far)`` now and then."""
    if workers == 1:
        written = 0

        def advance(images: int) -> None:
            nonlocal written
            written += images
            show(written)

        for shard in missing:
            yield _write_shard(folder, scenes, *shard, advance)
        return
    # Spawned rather than forked: the caller may have threads (torch, a logger), which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(counter,)) as pool:
        pending = {pool.submit(_write_shard_in_worker, folder, scenes, *shard) for shard in missing}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                show(counter.value)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
