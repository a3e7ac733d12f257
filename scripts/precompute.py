"""Encode before training what its frozen encoders would: latents of images, features of captions.

python scripts/precompute.py [cache=[latents,text]] [engine=local|ray] [workers=N] [part=I/M] [settings of train.py]

    python scripts/precompute.py model=sana_600m data=shards data.folder=/my/shards cache=[latents,text] workers=4
    python scripts/precompute.py ... part=2/8       the third of eight machines that share the folder
    python scripts/precompute.py ... engine=ray     on the Ray cluster of RAY_ADDRESS, or on a local one

The shards lie in "cache" beside the images (or in data.cache). What is there is left as it is, so the same command
goes on after a stop. Train with the same settings and data.cache_latents=required data.cache_text=required.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

OWN = ("cache", "engine", "workers", "part", "device")


@dataclass(frozen=True)
class Options:
    """The command line.

    Attributes:
        settings: of train.py.
        kinds: what is cached.
        engine: "local" or "ray".
        workers: processes or actors.
        part, parts: this machine's share.
        device: of the encoders.
    """

    settings: tuple[str, ...]
    kinds: tuple[str, ...] = ("latents",)
    engine: str = "local"
    workers: int = 1
    part: int = 0
    parts: int = 1
    device: str = "auto"


def read_options(words: list[str]) -> Options:
    """Tell this script's own settings from those of training; raises `ValueError`."""
    own, settings = {}, []
    for word in words:
        name, sign, value = word.partition("=")
        if sign and name in OWN:
            own[name] = value
        else:
            settings.append(word)
    kinds = tuple(re.findall(r"\w+", own.get("cache", "latents")))
    if not kinds or set(kinds) - {"latents", "text"}:
        raise ValueError(f"cache={own['cache']}: expected latents, text or [latents,text]")
    engine = own.get("engine", "local")
    if engine not in ("local", "ray"):
        raise ValueError(f"engine={engine}: expected local or ray")
    workers = own.get("workers", "1")
    if not workers.isdigit() or int(workers) < 1:
        raise ValueError(f"workers={workers}: expected a number of processes, 1 or more")
    part = re.fullmatch(r"(\d+)/(\d+)", own.get("part", "0/1"))
    if part is None or int(part[1]) >= int(part[2]):
        raise ValueError(f"part={own['part']}: expected I/M with I from 0 to M - 1, such as 0/4")
    device = own.get("device", "auto")
    return Options(tuple(settings), kinds, engine, int(workers), int(part[1]), int(part[2]), device)


def run(options: Options) -> str:
    """Make this machine's share of the caches."""
    from rich.console import Console
    from rich.progress import track

    from sana.data.ray_jobs import over_shards
    from sana.model.precompute import Caching, caching

    began, made = time.monotonic(), 0
    work = Caching(options.settings, options.kinds, options.device)
    mine = work.tasks()[options.part :: options.parts]
    there = set(mine) - set(work.missing())
    todo = [task for task in mine if task not in there]
    show = {"description": "caching", "total": len(todo), "console": Console(stderr=True)}
    if options.engine == "ray":
        gpus = 0.0 if options.device == "cpu" else _gpus()
        settings = (options.settings, options.kinds, options.device)
        for _, count in track(over_shards(todo, caching, settings, actors=options.workers, gpus=gpus), **show):
            made += count
    elif options.workers > 1 and len(todo) > 1:
        _spawn(options)
        left = set(work.missing()) & set(todo)
        if left:
            raise RuntimeError(f"{len(left)} of {len(todo)} shards were not made; see the messages above")
    else:
        made = sum(work(task) for task in track(todo, **show))
    seconds = time.monotonic() - began
    places = "\n".join(str(job.folder.path) for job in work.jobs)
    what = f"{made:,} samples in {len(todo)} shards" if made else f"{len(todo)} shards"
    return f"{what} cached, {len(there)} were there ({seconds:.1f} s):\n{places}"


def _spawn(options: Options) -> None:
    """This machine's share by several processes of this script, each with a share of its own."""
    processes = []
    for number in range(options.workers):
        # Task i of all goes to part i mod (parts * workers): the union of this machine's is i mod parts.
        part = f"part={options.part + number * options.parts}/{options.parts * options.workers}"
        own = [f"cache=[{','.join(options.kinds)}]", f"device={options.device}", part]
        command = [sys.executable, str(Path(__file__).resolve()), *options.settings, *own]
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        raise


def _gpus() -> float:
    import torch

    return 1.0 if torch.cuda.is_available() else 0.0


def main() -> int:
    from sana.run.error import ConfigError
    from sana.run.torchmetrics_later import later

    later()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    try:
        print(run(read_options(sys.argv[1:])))
    except ConfigError as problem:
        print(f"precompute: {problem}", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, RuntimeError) as problem:
        print(f"precompute: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("precompute: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
