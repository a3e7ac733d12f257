"""Moving scenes written as WebDataset shards: tars of KEY.mp4 + KEY.json, and KEY.camera.npz of cameras.

The bytes of a shard depend on its parameters alone (and on the versions of x264 and FFmpeg). Each shard is written
under another name and then renamed, so a second call goes on where the first was stopped. ``moving.json`` beside the
shards holds the parameters.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from sana.data.caption import Caption
from sana.data.moving import GENERATOR, check_size, example
from sana.data.shard_writer import ShardWriter
from sana.data.video import encode_mp4
from sana.data.world import write_camera

PARAMETERS = "moving.json"


@dataclass(frozen=True)
class MovingSet:
    """What determines every byte of a folder of moving scenes.

    Attributes:
        count: clips in all.
        seed: of the generator.
        kind: "shapes" or "room".
        frames, fps, size: length, rate and side of each clip.
        shard_size: clips in each shard but the last.
    """

    count: int
    seed: int
    kind: str = "shapes"
    frames: int = 17
    fps: float = 16.0
    size: int = 64
    shard_size: int = 500

    def __post_init__(self) -> None:
        if self.count < 1 or self.shard_size < 1:
            raise ValueError(f"{self.count} clips in shards of {self.shard_size}: expected at least one of each")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: expected an integer in [0, 2**63)")
        if self.kind not in ("shapes", "room"):
            raise ValueError(f"{self.kind!r} is no kind of moving scene: expected shapes or room")
        check_size(self.frames, self.fps, self.size)

    def shards(self, split: str) -> list[tuple[str, int, int]]:
        """(name, first index, one past the last index) of each shard."""
        starts = range(0, self.count, self.shard_size)
        return [
            (f"{split}-{i:06d}.tar", start, min(start + self.shard_size, self.count)) for i, start in enumerate(starts)
        ]


def write_moving_shards(
    folder: str | Path, scenes: MovingSet, split: str = "train", *, workers: int = 1, progress: bool = True
) -> list[Path]:
    """Write a set of moving scenes into a folder, or complete it, or find that it is there already.

    Args:
        folder: new or empty, or of an earlier call with the same parameters or another split.
        scenes: what to write.
        split: first part of the shards' names.
        workers: processes, each writing whole shards. It changes no byte.
        progress: whether to show a bar.

    Returns:
        The shards.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: no workers, or a split that is no name.
    """
    if workers < 1 or not split.replace("_", "").isalnum():
        raise ValueError(f"workers {workers}, split {split!r}: expected one or more, and letters, digits, underscores")
    folder = Path(folder)
    splits = _read_parameters(folder)
    wanted = {"generator": GENERATOR, **asdict(scenes)}
    if splits.get(split, wanted) != wanted:
        differs = [
            f"{k} is {splits[split].get(k)!r}, asked {v!r}" for k, v in wanted.items() if splits[split].get(k) != v
        ]
        raise FileExistsError(f"{folder} holds another {split!r} set: {'; '.join(differs)}; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / PARAMETERS, json.dumps({**splits, split: wanted}, indent=1, sort_keys=True).encode() + b"\n")
    shards = scenes.shards(split)
    missing = [shard for shard in shards if not (folder / shard[0]).exists()]
    done = _write_all(folder, scenes, missing, min(workers, len(missing)))
    for _ in track(done, f"moving {split}", len(missing), console=Console(stderr=True), disable=not progress):
        pass
    return [folder / name for name, _, _ in shards]


def _read_parameters(folder: Path) -> dict[str, dict[str, object]]:
    """What the folder holds by split; refuses folders with other things in them."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder for the shards")
    if not folder.exists() or not any(folder.iterdir()):
        return {}
    try:
        return dict(json.loads((folder / PARAMETERS).read_text()))
    except (OSError, ValueError):
        raise FileExistsError(f"{folder} is not empty and has no {PARAMETERS}: give an empty or a new folder") from None


def _write_all(folder: Path, scenes: MovingSet, shards: list[tuple[str, int, int]], workers: int) -> Iterator[None]:
    if workers <= 1:
        for shard in shards:
            yield _write_shard(folder, scenes, *shard)
        return
    # Spawned: the caller may have threads, which do not survive a fork.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_write_shard, folder, scenes, *shard) for shard in shards]
        for future in futures:
            yield future.result()


def _write_shard(folder: Path, scenes: MovingSet, name: str, first: int, last: int) -> None:
    with ShardWriter(folder, name, first // scenes.shard_size) as writer:
        for index in range(first, last):
            made = example(scenes.seed, index, scenes.kind, scenes.frames, scenes.fps, scenes.size)
            members = {
                "json": json.dumps(made.facts, separators=(",", ":")).encode(),
                "mp4": encode_mp4(made.frames, scenes.fps),
            }
            if made.camera is not None:
                members["camera.npz"] = write_camera(made.camera)
            captions = tuple(Caption(c["source"], c["text"], c["score"]) for c in made.facts["captions"])
            scores = {"motion": made.facts["motion"]}
            writer.add(
                made.facts["key"], members, captions=captions, width=scenes.size, height=scenes.size, scores=scores
            )


def _replace(path: Path, body: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(body)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
