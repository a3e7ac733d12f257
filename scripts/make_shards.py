"""Write data as WebDataset shards.

python scripts/make_shards.py scenes DST --count 20000 --seed 1
    The embedded world: 64x64 scenes with prompts and captions (sana/data/synthetic.py).
python scripts/make_shards.py moving DST --count 1000 --seed 1 --kind shapes|room
    Videos of moving shapes, or of a room under a moving camera with its poses (sana/data/moving.py, room.py).
python scripts/make_shards.py images SRC DST
    Your own images: a folder of images with .txt or .json beside them, a .jsonl, .csv or .parquet of paths and
    captions, WebDataset tars, or the published SANA formats.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from sana.data.formats.open import open_source
from sana.data.moving_shards import MovingSet, write_moving_shards
from sana.data.scene_shards import write_scene_shards
from sana.data.write_shards import BAD, write_shards


def scenes(options: argparse.Namespace) -> str:
    began = time.monotonic()
    index = write_scene_shards(
        options.folder,
        options.count,
        options.seed,
        options.split,
        held_out=options.held_out,
        shard_size=options.shard_size,
        workers=options.workers,
    )
    seconds = time.monotonic() - began
    return f"{index['count']:,} scenes in {len(index['shards'])} shards: {options.folder} ({seconds:.1f} s)"


def moving(options: argparse.Namespace) -> str:
    began = time.monotonic()
    scenes = MovingSet(
        options.count, options.seed, options.kind, options.frames, options.fps, options.size, options.shard_size
    )
    shards = write_moving_shards(options.folder, scenes, options.split, workers=options.workers)
    return f"{options.count:,} clips in {len(shards)} shards: {options.folder} ({time.monotonic() - began:.1f} s)"


def images(options: argparse.Namespace) -> str:
    began = time.monotonic()
    if "://" not in options.source and Path(options.source).resolve() == options.folder.resolve():
        raise ValueError(f"SRC and DST are both {options.folder}: give another folder for the shards")
    limits = {"max_pixels": options.max_pixels, "caption_fields": tuple(options.caption_field)}
    source = open_source(options.source, options.source_split, **limits)
    written = write_shards(
        source, options.folder, options.split, shard_size=options.shard_size, workers=options.workers
    )
    seconds = time.monotonic() - began
    left_out = f"; {len(written.bad):,} left out, see {options.folder / BAD}" if written.bad else ""
    return f"{written.count:,} images in {len(written.shards)} shards: {options.folder} ({seconds:.1f} s){left_out}"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description="Write data as WebDataset shards.")
    kinds = top.add_subparsers(dest="kind", required=True, metavar="KIND")

    made = kinds.add_parser("scenes", help="64x64 scenes of plain shapes with prompts and captions")
    made.add_argument("folder", metavar="DST", help="new or empty folder, or one to complete or to add a split to")
    made.add_argument("--count", type=int, required=True, help="images in all")
    made.add_argument("--seed", type=int, required=True, help="sets with different seeds share no scene")
    made.add_argument("--held-out", action="store_true", help="only combinations that training never sees")
    made.add_argument("--shard-size", type=int, default=5000, help="images per shard (%(default)s)")
    made.add_argument("--workers", type=int, default=2, help="processes (%(default)s); changes no byte")
    made.add_argument("--split", default="train", help="first part of the shards' names (%(default)s)")
    made.set_defaults(run=scenes)

    made = kinds.add_parser("moving", help="videos with exact motion, or with exact cameras")
    made.add_argument("folder", metavar="DST", help="new or empty folder, or one to complete or to add a split to")
    made.add_argument("--count", type=int, required=True, help="clips in all")
    made.add_argument("--seed", type=int, required=True, help="sets with different seeds share no scene")
    made.add_argument("--kind", default="shapes", help="shapes on known paths, or a room with cameras (%(default)s)")
    made.add_argument("--frames", type=int, default=17, help="per clip (%(default)s)")
    made.add_argument("--fps", type=float, default=16.0, help="frames per second (%(default)s)")
    made.add_argument("--size", type=int, default=64, help="pixels on a side, even (%(default)s)")
    made.add_argument("--shard-size", type=int, default=500, help="clips per shard (%(default)s)")
    made.add_argument("--workers", type=int, default=2, help="processes (%(default)s); changes no byte")
    made.add_argument("--split", default="train", help="first part of the shards' names (%(default)s)")
    made.set_defaults(run=moving)

    own = kinds.add_parser("images", help="your own images with captions; unreadable ones are left out and reported")
    own.add_argument("source", metavar="SRC", help="folder, table, tar or URL; see sana/data/formats/open.py")
    own.add_argument("folder", metavar="DST", type=Path, help="new or empty folder, or one to complete")
    own.add_argument("--split", default="train", help="first part of the shards' names (%(default)s)")
    own.add_argument("--source-split", default="train", help="which split of SRC (%(default)s)")
    own.add_argument("--shard-size", type=int, default=5000, help="images per shard (%(default)s)")
    own.add_argument("--workers", type=int, default=2, help="processes (%(default)s); changes no byte")
    own.add_argument("--max-pixels", type=int, default=64_000_000, help="leave out larger images (%(default)s)")
    own.add_argument(
        "--caption-field",
        action="append",
        default=[],
        metavar="NAME",
        help="a field or column with captions; repeatable",
    )
    own.set_defaults(run=images)
    return top


def main() -> int:
    options = parser().parse_args()
    try:
        print(options.run(options))
    except (ValueError, OSError) as problem:
        print(f"make_shards: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make_shards: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
