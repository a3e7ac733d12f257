"""Any source rewritten as our own shards: every image decoded once, what cannot be used left out and reported.

Shard k holds the samples k S to (k + 1) S - 1 of the source that are sound, so that its bytes depend on the source and
on S alone: not on the number of workers, nor on what was interrupted. Each shard is written beside its place and
renamed; a piece of the index is kept for it until all are there, so a second call goes on where the first ended.
"""

from __future__ import annotations

import fcntl
import io
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sana.data.decode import decode_image, image_format
from sana.data.formats.own import index_name, task_name
from sana.data.index import Index, join, write
from sana.data.record import BadSample
from sana.data.shard_writer import PARTIAL, ShardWriter
from sana.data.source import Source

BAD = "bad_samples.jsonl"
WIDS = "wids-meta.json"
LOCK = ".lock"
_PIECE = ".piece.arrow"
_REPORT_EVERY = 50  # images between two reports of progress
_STORED = ("jpg", "png", "webp")  # what every reader of WebDataset decodes; the rest becomes PNG


@dataclass(frozen=True)
class Written:
    """What is in the folder after a call.

    Attributes:
        shards: per shard name, count, bytes and sha256.
        count: samples in all of them.
        bad: samples that were left out.
    """

    shards: list[dict[str, Any]]
    count: int
    bad: list[BadSample]


def write_shards(
    source: Source,
    folder: str | Path,
    split: str = "train",
    *,
    shard_size: int = 5000,
    workers: int = 2,
    progress: bool = True,
) -> Written:
    """Write a source as shards into a folder, or complete it, or find that it is there already.

    Args:
        source: any source; images keep their bytes, except that GIF, BMP and AVIF become PNG.
        folder: a new or empty folder, or one of an earlier call; other splits may share it.
        split: first part of the names of the shards.
        shard_size: samples of the source per shard.
        workers: processes, each writing whole shards. It changes no byte.
        progress: whether to show a bar with rate and remaining time.

    Raises:
        ValueError: for a parameter out of range, or a source without a sound image.
        FileExistsError: when the folder holds something else.
    """
    if shard_size < 1 or workers < 1:
        raise ValueError(f"shard_size is {shard_size} and workers {workers}: expected at least one of each")
    if not split.replace("_", "").isalnum():
        raise ValueError(f"split is {split!r}: expected letters, digits and underscores")
    if not len(source):
        first = f", such as {source.bad[0]}" if source.bad else ""
        raise ValueError(f"the source has no sample that can be used; {len(source.bad)} bad ones{first}")
    folder = Path(folder)
    task = {"source": source.fingerprint(), "shard_size": shard_size, "samples": len(source)}
    _check_folder(folder, split, task)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _check_folder(folder, split, task)
        names = [f"{split}-{i:06d}.tar" for i in range(-(-len(source) // shard_size))]
        if not (folder / index_name(split)).exists():
            for stale in folder.glob(f".{split}[-.]*{PARTIAL}"):  # of a process that was killed: we have the lock
                stale.unlink()
            _write_text(folder / task_name(split), json.dumps(task))
            missing = [i for i, name in enumerate(names) if _piece(folder, name) is None]
            ranges = [(i, names[i], i * shard_size, min((i + 1) * shard_size, len(source))) for i in missing]
            _write_all(source, folder, ranges, min(workers, max(1, len(missing))), progress, split)
            _finish(source, folder, split, names, task)
        for name in names:  # needed no more once the index is there, also if the call that wrote it was killed
            _piece_path(folder, name).unlink(missing_ok=True)
        (folder / task_name(split)).unlink(missing_ok=True)
        index = Index(folder / index_name(split))
    return Written(index.shards, len(index), [BadSample(*reasons) for reasons in index.facts["bad"]])


def _finish(source: Source, folder: Path, split: str, names: list[str], task: dict[str, Any]) -> None:
    """Join the pieces; the folder is complete once the index is there."""
    pieces = [_piece(folder, name) for name in names]
    parts = [index for index in pieces if index is not None]
    bad = [[b.shard, b.key, b.reason] for b in source.bad]
    bad += [reasons for index in parts for reasons in index.facts["bad"]]
    shards = [index.shards[0] for index in parts]
    if not any(shard["count"] for shard in shards):
        for name in names:
            (folder / name).unlink(missing_ok=True)
            _piece_path(folder, name).unlink(missing_ok=True)
        (folder / task_name(split)).unlink()
        raise ValueError(f"no image of the source can be used; the first is {': '.join(bad[0])}")
    rows = join([index.rows() for index in parts])
    facts = {"kind": "own", "task": task, "bad": bad}
    _write_bad(folder, split, bad)
    if split == "train":
        _write_wids(folder, shards)
    write(folder / index_name(split), rows, shards, facts)


def _write_wids(folder: Path, shards: list[dict[str, Any]]) -> None:
    """The list of shards that SANA's released reader wants, so that it can read ours."""
    listed = [{"url": shard["name"], "nsamples": shard["count"], "filesize": shard["bytes"]} for shard in shards]
    about = {"name": "train", "wids_version": 1, "shardlist": listed}
    _write_text(folder / WIDS, json.dumps(about, indent=1) + "\n")


def _write_bad(folder: Path, split: str, bad: list[list[str]]) -> None:
    """``bad_samples.jsonl``: the lines of other splits stay, those of this one are replaced."""
    path = folder / BAD
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["split"] != split]
    mine = [json.dumps({"split": split, "shard": s, "key": k, "reason": r}) for s, k, r in bad]
    _write_text(path, "".join(line + "\n" for line in [*kept, *mine]))


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name.lstrip('.')}{PARTIAL}")
    partial.write_text(text)
    os.replace(partial, path)


def _piece_path(folder: Path, name: str) -> Path:
    return folder / f".{name}{_PIECE}"


def _piece(folder: Path, name: str) -> Index | None:
    """The rows of a shard that is finished, else None."""
    try:
        index = Index(_piece_path(folder, name))
        return index if (folder / name).stat().st_size == index.shards[0]["bytes"] else None
    except (OSError, ValueError):
        return None


def _check_folder(folder: Path, split: str, task: dict[str, Any]) -> None:
    """Refuse a folder that holds something else under this split."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder for the shards")
    if (folder / index_name(split)).exists():
        found = Index(folder / index_name(split)).facts.get("task")
    elif (folder / task_name(split)).exists():
        found = json.loads((folder / task_name(split)).read_text())
    else:
        strangers = sorted(path.name for path in folder.glob(f"{split}-*.tar"))
        if strangers:
            raise FileExistsError(f"{folder} holds {strangers[0]} of another origin: give a new folder or split")
        return
    for key, value in task.items():
        if not found or found.get(key) != value:
            what = {"source": "its source was another or has changed since"}
            told = what.get(key, f"its {key} is {(found or {}).get(key)}, {value} was asked for")
            raise FileExistsError(f"{folder} holds another set of split {split!r}: {told}; give a new folder or split")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time; the kernel frees the lock of a process that died."""
    with open(folder / LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def progress_bar(shown: bool) -> Progress:
    """A bar with count, rate (field "rate") and remaining time, on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        disable=not shown,
        transient=True,
        console=Console(stderr=True),
    )


_counter: Any = None  # in a worker process: the number of images that all of them have done
_source: Source | None = None


def _start_worker(source: Source, counter: Any) -> None:
    global _counter, _source
    _counter, _source = counter, source


def _in_worker(folder: Path, number: int, name: str, first: int, last: int) -> None:
    def advance(images: int) -> None:
        with _counter.get_lock():
            _counter.value += images

    assert _source is not None
    write_shard(_source, folder, number, name, first, last, advance)


def _write_all(
    source: Source, folder: Path, ranges: list[tuple[int, str, int, int]], workers: int, shown: bool, split: str
) -> None:
    began = time.monotonic()
    with progress_bar(shown) as bar:
        task = bar.add_task(f"images {split}", total=sum(last - first for _, _, first, last in ranges), rate="")

        def show(done: int) -> None:
            bar.update(task, completed=done, rate=f"{done / max(time.monotonic() - began, 1e-9):,.0f} images/s")

        if workers == 1:
            total = 0

            def advance(images: int) -> None:
                nonlocal total
                total += images
                show(total)

            for number, name, first, last in ranges:
                write_shard(source, folder, number, name, first, last, advance)
            return
        # Spawned rather than forked: the caller may have threads (torch, a logger), which do not survive a fork.
        context = multiprocessing.get_context("spawn")
        counter = context.Value("q", 0)
        with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(source, counter)) as pool:
            pending = {pool.submit(_in_worker, folder, *part) for part in ranges}
            try:
                while pending:
                    done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                    show(counter.value)
                    for future in done:
                        future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def write_shard(
    source: Source, folder: Path, number: int, name: str, first: int, last: int, advance: Callable[[int], None]
) -> None:
    """Write samples first to last - 1 of a source as one shard, with its piece of the index."""
    bad: list[BadSample] = []
    with ShardWriter(folder, name, number) as shard:
        waiting = 0
        for i in range(first, last):
            try:
                _add(shard, source, i)
            except BadSample as error:
                bad.append(error)
            waiting += 1
            if waiting == _REPORT_EVERY:
                advance(waiting)
                waiting = 0
        advance(waiting)
    facts = {"bad": [[b.shard, b.key, b.reason] for b in bad]}
    write(_piece_path(folder, name), shard.rows(), [shard.facts()], facts)


def _add(shard: ShardWriter, source: Source, i: int) -> None:
    record = source.record(i)
    data = source.read(i)
    try:
        pixels = decode_image(data, max_pixels=source.limits.max_pixels)
    except ValueError as error:
        raise source.bad_sample(i, str(error)) from error
    height, width = pixels.shape[:2]
    suffix = image_format(data)
    if suffix not in _STORED:
        suffix, data = "png", _png(pixels)
    captions = [
        {"source": c.source, "text": c.text} | ({} if c.score is None else {"score": c.score}) for c in record.captions
    ]
    prompt = next((c.text for c in record.captions if c.source == "prompt"), record.captions[0].text)
    meta: dict[str, Any] = record.meta | {
        "prompt": prompt,
        "captions": captions,
        "width": width,
        "height": height,
        # The index keeps 32 bits: written with as many digits as these have.
        "scores": {name: float(str(np.float32(score))) for name, score in record.scores.items()},
        "hq": record.hq,
        "origin": source.key(i),
    }
    members = {str(suffix): data, "json": _json(meta)}
    shard.add(
        f"{i:09d}",
        members,
        captions=record.captions,
        width=width,
        height=height,
        scores=record.scores,
        hq=record.hq,
    )


def _json(meta: dict[str, Any]) -> bytes:
    try:
        return json.dumps(meta, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a character in some field that we do not use: kept, escaped
        return json.dumps(meta, separators=(",", ":")).encode()


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
