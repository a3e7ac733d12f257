"""Loading speed against webdataset, litdata and mosaicml-streaming: ``python scripts/bench_data.py --json out.json``.

Makes its pictures, shards and caches, and an environment for the other loaders through uv, all below --folder, and
keeps them for the next call. Every figure is the median of several rounds in which the sides take turns, each in
a process of its own; the machine should do nothing else. About 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("webdataset", "litdata", "streaming")
PACKAGES = ("webdataset", "litdata", "mosaicml-streaming", "torch", "simplejpeg")
CORRUPT = 0.05
FLIPS = 200


def picture(seed: int, side: int) -> bytes:
    """A JPEG with soft shapes and some grain, about as large as a photograph of its size."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    grainy = np.clip(soft + rng.normal(0, 6, soft.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grainy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_shards(folder: Path, count: int, side: int) -> Path:
    """Shards of pictures with four scored captions each, and their index; nothing if they are there."""
    from sana.data.formats.open import open_source
    from sana.data.write_shards import write_shards

    shards = folder / f"shards_{side}_{count}"
    source = folder / f"pictures_{side}_{count}"
    if not (shards / "done").exists():
        source.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            said = [
                {"source": f"captioner{k}", "text": f"picture {i} in the words of {k} " * 8, "score": 24.0 + 2 * k}
                for k in range(4)
            ]
            (source / f"{i:06d}.jpg").write_bytes(picture(i, side))
            (source / f"{i:06d}.json").write_text(json.dumps({"captions": said}))
        write_shards(open_source(source), shards, shard_size=512, workers=2)
        shutil.rmtree(source)
        (shards / "done").touch()
    return shards


def make_latents(shards: Path, channels: int = 32, side: int = 16) -> None:
    """A cache of random bf16 latents for the shards; the speed of reading does not depend on what they mean."""
    import torch

    from sana.data.cache_folder import CacheFolder, CacheKey
    from sana.data.cache_write import shards_of, write_latents
    from sana.data.formats.open import open_source

    source = open_source(shards)
    key = CacheKey("latents", source.fingerprint(), "random", "none", "bfloat16", f"{side * 16}x{side * 16}")
    parts = shards_of(source)
    folder = CacheFolder(shards / "cache" / key.name, key, tuple(part.name for part in parts), len(source))
    folder.create()
    blank = np.zeros((side * 16, side * 16, 3), np.uint8)
    for part in parts:
        write_latents(folder, part, lambda _: blank, lambda x: torch.randn(len(x), channels, side, side))


def make_corrupt(shards: Path) -> Path:
    """A copy of the shards in which the end of one picture in twenty is zero."""
    from sana.data.formats.open import open_source

    copy = shards.with_name(shards.name + "_corrupt")
    if not (copy / "done").exists():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(shards, copy, ignore=shutil.ignore_patterns("cache", "litdata", "mds", "done"))
        index = open_source(shards).index
        chosen = np.random.default_rng(0).permutation(len(index))[: round(CORRUPT * len(index))]
        for i in chosen.tolist():
            size = int(index.column("image_size")[i])
            with open(copy / index.shards[int(index.column("shard")[i])]["name"], "r+b") as file:
                file.seek(int(index.column("image_offset")[i]) + size // 2)
                file.write(bytes(size - size // 2))
        (copy / "done").touch()
    return copy


def make_long(folder: Path, shards: Path, rows: int = 1_000_000) -> Path:
    """An index of a million samples, all of which are pictures of one small shard, over and over."""
    from sana.data.index import Entry, Index, table, write

    long = folder / "long"
    name = "train.index.arrow"
    if not (long / name).exists():
        long.mkdir(parents=True, exist_ok=True)
        known = Index(shards / name)
        first = known.shards[0]
        shutil.copy(shards / first["name"], long / first["name"])
        pieces = np.flatnonzero(known.column("shard") == 0).tolist()
        places = {m: (known.column(f"{m}_offset"), known.column(f"{m}_size")) for m in ("image", "meta")}
        entries = [
            Entry(
                f"{i:08d}",
                0,
                known.captions(k),
                256,
                256,
                members={m: (int(at[k]), int(size[k])) for m, (at, size) in places.items()},
            )
            for i in range(rows)
            for k in [pieces[i % len(pieces)]]
        ]
        write(long / name, table(entries), [first], known.facts)
    return long


def count_flips(shards: Path) -> dict[str, int]:
    """Single flipped bits in pictures: how many this project notices, and how many a JPEG decoder does."""
    from sana.data.formats.open import open_source
    from sana.data.record import BadSample

    copy = shards.with_name(shards.name + "_flips")
    copy.mkdir(exist_ok=True)
    index = open_source(shards).index
    first = index.shards[0]["name"]
    for path in shards.iterdir():
        if path.is_file():
            shutil.copy(path, copy / path.name)
    source, rng = open_source(copy), np.random.default_rng(1)
    mine = np.flatnonzero(np.asarray(index.column("shard")) == 0)
    caught = decoder = 0
    for _ in range(FLIPS):
        i = int(rng.choice(mine))
        at = int(index.column("image_offset")[i]) + int(rng.integers(int(index.column("image_size")[i])))
        with open(copy / first, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << int(rng.integers(8))]))
            file.flush()
            try:
                source.image(i)
            except BadSample:
                caught += 1
            file.seek(int(index.column("image_offset")[i]))
            data = file.read(int(index.column("image_size")[i]))
            try:
                with Image.open(io.BytesIO(data)) as opened:
                    opened.load()
            except OSError:
                decoder += 1
            file.seek(at)
            file.write(bytes([byte]))
    shutil.rmtree(copy)
    return {"bit_flips": FLIPS, "bit_flips_caught": caught, "bit_flips_caught_by_decoder": decoder}


def peers_python(folder: Path) -> Path:
    """The interpreter of an environment with the other loaders, made if it is not there.

    Raises:
        FileNotFoundError: there is no uv.
    """
    environment = folder / "peers"
    python = environment / "bin" / "python"
    if not (environment / "done").exists():
        beside = Path(sys.executable).with_name("uv")
        uv = str(beside) if beside.exists() else shutil.which("uv")
        if uv is None:
            raise FileNotFoundError("uv is needed to make the environment of the other loaders: pip install uv")
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", version, str(environment)], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", str(python), *PACKAGES]
        subprocess.run(install, check=True)
        (environment / "done").touch()
    return python


@dataclass(frozen=True)
class Side:
    """One loader in a process of its own.

    Attributes:
        name: see `sana.bench.data_sides`.
        folder: of the shards.
        python: the interpreter of its environment.
        pixels: by which functions the others decode, "plain" or "own".
    """

    name: str
    folder: Path
    python: Path = Path(sys.executable)
    pixels: str = "plain"

    def run(self, **options: float) -> dict[str, Any]:
        """Its figures.

        Raises:
            RuntimeError: it failed, with the end of what it printed.
        """
        words = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [str(self.python), "-m", "sana.bench.data_sides", self.name, str(self.folder), *words]
        command.append(f"--pixels={self.pixels}")
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {done.stderr.strip()[-2000:]}")
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        return json.loads(lines[-1]) if lines else {}


def medians(sides: dict[str, Side], rounds: int, **options: float) -> dict[str, float]:
    """Samples per second of several sides, in turns: name -> median over the rounds."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            rates[name].append(side.run(**options)["samples_per_s"])
            print(f"round {number + 1}: {name} {rates[name][-1]:,.0f} samples/s", file=sys.stderr, flush=True)
    return {name: statistics.median(found) for name, found in rates.items()}


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Every measurement of the README of experiments/bench_data."""
    folder: Path = options.folder
    small = make_shards(folder, options.samples, 256)
    larger = {side: make_shards(folder, options.samples // 8, side) for side in (384, 1024)}
    if not (small / "cache").exists():
        make_latents(small)
    wanted = [peer for peer in PEERS if peer in options.peers.split(",")]
    theirs = peers_python(folder) if wanted else Path(sys.executable)
    for peer, made in (("litdata", "litdata"), ("streaming", "mds")):
        if peer in wanted and not (small / made / "done").exists():
            shutil.rmtree(small / made, ignore_errors=True)
            Side(f"write-{peer}", small, theirs).run()
            (small / made / "done").touch()
    result: dict[str, Any] = {"cores": os.cpu_count(), "samples": options.samples, "rounds": options.rounds}
    times = {"seconds": options.seconds}
    ours, others = Side("ours", small), {peer: Side(peer, small, theirs) for peer in wanted}
    # With our decoder in their place, what is left is the loaders themselves.
    same = {f"{peer} with our decoder": Side(peer, small, theirs, "own") for peer in wanted}
    two = medians({"ours": ours, **others, **same}, options.rounds, workers=2, **times)
    result["samples_per_s"] = two
    for peer in wanted:
        result[f"ratio_{peer}"] = two["ours"] / two[peer]
    for peer in wanted:
        result[f"ratio_{peer}_with_our_decoder"] = two["ours"] / two[f"{peer} with our decoder"]
    bare = {"bare": Side("bare", small), "bare with our decoder": Side("bare", small, pixels="own")}
    none = medians({**bare, "ours": ours, **others}, options.rounds, workers=0, **times)
    result["samples_per_s_without_workers"] = none
    for side, shards in larger.items():
        sides = {"ours": Side("ours", shards)}
        if "webdataset" in wanted:
            sides["webdataset"] = Side("webdataset", shards, theirs)
        big = medians(sides, options.rounds, workers=2, **times)
        result[f"samples_per_s_{side}_to_256"] = big
        if "webdataset" in big:
            result[f"ratio_webdataset_{side}_to_256"] = big["ours"] / big["webdataset"]
    cached = {"latents": Side("latents", small)}
    result["latents_per_s"] = medians(cached, options.rounds, workers=2, **times)["latents"]
    pair = {"ours clean": ours, "ours corrupt": Side("ours", make_corrupt(small))}
    corrupt = medians(pair, options.rounds, workers=2, **times)
    # Both count the places of bad samples, so this is the rate of good ones over clean x (1 - k).
    result["corrupt_fraction"] = CORRUPT
    result["share_of_clean_rate_when_corrupt"] = corrupt["ours corrupt"] / corrupt["ours clean"]
    result.update(count_flips(small))
    long = Side("ours", make_long(folder, small)).run(workers=2, seconds=1)
    result["first_batch_s_of_1000000"] = long["first_batch_s"]
    result["memory_gib_of_1000000"] = long["memory_gib"]
    result["resident_kib_by_epoch"] = ours.run(workers=0, epochs=10, per_epoch=options.samples)["resident_kib"]
    return result


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, default=ROOT / "cache" / "bench_data", help="keeps what is made")
    options.add_argument(
        "--samples", type=int, default=4096, help="pictures of 256x256, an eighth as many of 384x384 and 1024x1024"
    )
    options.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--peers", default=",".join(PEERS), help="which others; none: only ours")
    options.add_argument("--json", type=Path, help="file for the figures")
    given = options.parse_args()
    try:
        result = bench(given)
    except (ValueError, OSError, RuntimeError, subprocess.CalledProcessError) as problem:
        print(f"bench_data: {problem}", file=sys.stderr)
        return 1
    text = json.dumps(result, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
