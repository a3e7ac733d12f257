"""Loaders side by side: ours and those of other projects, over the same pictures, with the same work per sample.

Every side yields batches of (uint8 pixels (b, 3, s, s), captions): JPEG decoded, scaled and cut, one of the captions
chosen by score. The others decode with Pillow, as their documentation shows, or with ``--pixels own`` by this project's
functions, so that what is left is the loader. A side imports its library only when it is asked for, and of this project
only what needs nothing but numpy, Pillow, torch and simplejpeg, so that it runs in an environment of its own:
``python -m sana.bench.data_sides NAME FOLDER ...`` prints one line of JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sana.data.caption import Caption, PowerScore
from sana.data.decode import decode_image
from sana.data.transform import resize_and_crop
from sana.run.environment import peak_rss_gib

CHOICE = PowerScore(temperature=0.1, threshold=25.0)
SEED = 0
Batches = Iterator[Any]


def plain(image: bytes, size: int) -> np.ndarray:
    """Decode, scale to cover a square and cut out the middle, as anybody would write it: Pillow, the whole picture."""
    with Image.open(io.BytesIO(image)) as opened:
        picture = opened.convert("RGB")
    w, h = picture.size
    if min(w, h) != size:
        w, h = (size, h * size // w) if w < h else (w * size // h, size)
        picture = picture.resize((w, h), Image.Resampling.BICUBIC)
    left, top = (w - size) // 2, (h - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def own(image: bytes, size: int) -> np.ndarray:
    """The same by this project's functions."""
    return resize_and_crop(decode_image(image, size=(size, size)), size, size)


PIXELS: dict[str, Callable[[bytes, int], np.ndarray]] = {"plain": plain, "own": own}
"""What the other loaders decode with."""
pixels = plain


def one(image: bytes, meta: bytes, size: int) -> tuple[np.ndarray, str]:
    """The work on one sample: pixels (size, size, 3) and a caption."""
    captions = [Caption(c["source"], c["text"], c["score"]) for c in json.loads(meta)["captions"]]
    return pixels(image, size), CHOICE(captions, random.random()).text


def join(samples: list[tuple[np.ndarray, str]]) -> tuple[torch.Tensor, list[str]]:
    """A batch of samples."""
    return torch.from_numpy(np.stack([image for image, _ in samples])).permute(0, 3, 1, 2), [t for _, t in samples]


def bare(folder: Path, size: int, batch: int, workers: int) -> Batches:
    """No loader: the work on samples that lie in memory, in one process."""
    import tarfile

    members: dict[str, dict[str, bytes]] = {}
    with tarfile.open(sorted(folder.glob("train-*.tar"))[0]) as tar:
        for info in tar:
            stem, _, suffix = info.name.partition(".")
            members.setdefault(stem, {})[suffix] = tar.extractfile(info).read()  # type: ignore[union-attr]
    samples = list(members.values())
    while True:
        for first in range(0, len(samples) - batch + 1, batch):
            yield join([one(s["jpg"], s["json"], size) for s in samples[first : first + batch]])


def ours(folder: Path, size: int, batch: int, workers: int) -> Batches:
    """This project's loader over shards and their index."""
    from sana.data.formats.open import open_source
    from sana.data.loader import MicroBatches, Samples, loader
    from sana.data.planner import plan

    source = open_source(folder)
    planner = plan([np.arange(len(source), dtype=np.uint32)], None, batch, SEED)
    samples = Samples([source], CHOICE, SEED)
    for made in loader(samples, MicroBatches(planner, [(size, size)]), workers):
        yield made.image, made.caption


def latents(folder: Path, size: int, batch: int, workers: int) -> Batches:
    """This project's loader over the cached latents of the shards; their cache is the only one in "cache"."""
    from sana.data.cache import LatentCache
    from sana.data.cache_folder import CacheFolder
    from sana.data.formats.open import open_source
    from sana.data.loader import MicroBatches, Samples, loader
    from sana.data.planner import plan

    source = open_source(folder)
    planner = plan([np.arange(len(source), dtype=np.uint32)], None, batch, SEED)
    (path,) = (folder / "cache").glob("latents-*")
    samples = Samples([source], CHOICE, SEED, latents=LatentCache(CacheFolder.open(path)))
    for made in loader(samples, MicroBatches(planner, [(size, size)]), workers):
        yield made.latent, made.caption


def webdataset(folder: Path, size: int, batch: int, workers: int) -> Batches:
    """webdataset, shuffled as its documentation shows, skipping what cannot be read."""
    wds: Any = import_module("webdataset")
    shards = [str(path) for path in sorted(folder.glob("train-*.tar"))]
    data = (
        wds.WebDataset(shards, resampled=True, shardshuffle=False, handler=wds.warn_and_continue)
        .shuffle(1000)
        .to_tuple("jpg", "json")
        .map(lambda sample: one(sample[0], sample[1], size), handler=wds.warn_and_continue)
        .batched(batch, collation_fn=join, partial=False)
    )
    yield from wds.WebLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def litdata(folder: Path, size: int, batch: int, workers: int) -> Batches:
    """litdata over chunks of the same files; `write_litdata` makes them."""
    ld: Any = import_module("litdata")

    class Data(ld.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            image, meta = super().__getitem__(index)
            return one(bytes(image), bytes(meta), size)  # it gives views

    data = Data(str(folder / "litdata"), shuffle=True, drop_last=True, seed=SEED)
    made = ld.StreamingDataLoader(
        data, batch_size=batch, num_workers=workers, collate_fn=join, persistent_workers=workers > 0
    )
    while True:
        yield from made


def streaming(folder: Path, size: int, batch: int, workers: int) -> Batches:
    """mosaicml-streaming over MDS shards of the same files; `write_streaming` makes them."""
    library: Any = import_module("streaming")

    class Data(library.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return one(sample["jpg"], sample["json"], size)

    data = Data(local=str(folder / "mds"), shuffle=True, batch_size=batch, shuffle_seed=SEED)
    made = DataLoader(
        data, batch_size=batch, num_workers=workers, collate_fn=join, drop_last=True, persistent_workers=workers > 0
    )
    while True:
        yield from made


def _files(folder: Path) -> Iterator[tuple[bytes, bytes]]:
    """(jpg, json) of every sample of the shards."""
    import tarfile

    for path in sorted(folder.glob("train-*.tar")):
        members: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for info in tar:
                stem, _, suffix = info.name.partition(".")
                members.setdefault(stem, {})[suffix] = tar.extractfile(info).read()  # type: ignore[union-attr]
        yield from ((sample["jpg"], sample["json"]) for sample in members.values())


def _same(sample: Any) -> Any:
    return sample


def write_litdata(folder: Path) -> None:
    """The files of the shards as chunks for litdata, 64 MB each as it suggests."""
    ld: Any = import_module("litdata")
    samples = list(_files(folder))
    ld.optimize(fn=_same, inputs=samples, output_dir=str(folder / "litdata"), chunk_bytes="64MB", num_workers=1)


def write_streaming(folder: Path) -> None:
    """The files of the shards as MDS for mosaicml-streaming."""
    library: Any = import_module("streaming")
    with library.MDSWriter(out=str(folder / "mds"), columns={"jpg": "bytes", "json": "bytes"}) as writer:
        for image, meta in _files(folder):
            writer.write({"jpg": image, "json": meta})


SIDES: dict[str, Callable[[Path, int, int, int], Batches]] = {
    side.__name__: side for side in (bare, ours, latents, webdataset, litdata, streaming)
}
WRITERS: dict[str, Callable[[Path], None]] = {"litdata": write_litdata, "streaming": write_streaming}


def measure(batches: Batches, seconds: float, skip: int = 8) -> dict[str, Any]:
    """Samples per second after `skip` batches, seconds to the first batch, and the greatest memory of this process."""
    first = time.perf_counter()
    next(batches)
    first = time.perf_counter() - first
    for _ in range(skip):
        next(batches)
    began, seen = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        seen += len(next(batches)[1])
    rate = seen / (time.perf_counter() - began)
    return {"samples_per_s": rate, "first_batch_s": first, "samples": seen, "memory_gib": peak_rss_gib()}


def memory(batches: Batches, per_epoch: int, epochs: int, batch: int) -> dict[str, Any]:
    """Resident memory of this process at the end of every epoch, KiB."""
    page, found = resource.getpagesize() // 1024, []
    for _ in range(epochs):
        for _ in range(per_epoch // batch):
            next(batches)
        found.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
    return {"resident_kib": found}


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("side", choices=[*SIDES, *(f"write-{name}" for name in WRITERS)])
    options.add_argument("folder", type=Path)
    options.add_argument("--size", type=int, default=256)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--seconds", type=float, default=10.0)
    options.add_argument("--epochs", type=int, default=0)
    options.add_argument("--per-epoch", type=int, default=0)
    options.add_argument("--pixels", choices=PIXELS, default="plain", help="by which functions the others decode")
    given = options.parse_args()
    torch.set_num_threads(1)
    global pixels  # workers are forked
    pixels = PIXELS[given.pixels]
    if given.side.startswith("write-"):
        WRITERS[given.side.removeprefix("write-")](given.folder)
        return 0
    if given.side in ("ours", "latents"):  # what is timed begins after imports
        import sana.data.cache
        import sana.data.formats.open
        import sana.data.loader  # noqa: F401
    batches = SIDES[given.side](given.folder, given.size, given.batch, given.workers)
    if given.epochs:
        result = memory(batches, given.per_epoch, given.epochs, given.batch)
    else:
        result = measure(batches, given.seconds)
    print("\n" + json.dumps(result), flush=True)
    sys.stderr.flush()
    os._exit(0)  # some loaders' workers and threads do not end by themselves


if __name__ == "__main__":
    raise SystemExit(main())
