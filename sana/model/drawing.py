"""Drawing requests into a folder, image by image, so that it can be stopped and gone on with.

Image k of a prompt always has the same seed, and batches are cut the same way every time. A batch whose images are all
there is skipped without computing anything; of a batch of which some are missing all are drawn, because the last bits
of a product depend on the company in the batch, and the missing ones are written. So an interrupted drawing ends with
the pixels of one that was not.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sana.aspect_ratio import drawn_size
from sana.model.draw_progress import DrawProgress
from sana.model.generate import REMEMBERED, Painter
from sana.model.preview import Preview
from sana.run.prompts import Request
from sana.run.records import to_json, write_atomically
from sana.run.sidecar import read_image, read_sidecar, save_grid, save_image
from sana.sampler.guided import OnStep, Sampler, Step

LOOSE = {"commit", "size", "pixels"}  # of a sidecar: they may differ between an image and the one that is asked for
GRID_PIXELS = 1 << 28  # a larger grid helps nobody


@dataclass(frozen=True)
class Job:
    """One image to draw.

    Attributes:
        path: of the PNG.
        prompt, negative, seed: of the image.
        drawn: (height, width) in pixels that the network draws.
        asked: (height, width) in pixels of the PNG.
        entry: number of its prompt.
        metadata: what its line of a file says besides.
    """

    path: Path
    prompt: str
    negative: str
    seed: int
    drawn: tuple[int, int]
    asked: tuple[int, int]
    entry: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """What its sidecar says of this image alone."""
        own: dict[str, Any] = {"prompt": self.prompt, "negative": self.negative, "seed": self.seed}
        if self.drawn != self.asked:
            own["drawn"] = [self.drawn[1], self.drawn[0]]
        return own | ({"metadata": dict(self.metadata)} if self.metadata else {})


def plan_jobs(
    requests: Sequence[Request],
    folder: str | Path,
    *,
    n: int | None,
    seed: int | Sequence[int],
    negative: str,
    height: int | None,
    width: int | None,
    size: int,
    multiple: int,
    bins: bool = True,
    layout: Literal["flat", "geneval"] = "flat",
) -> list[Job]:
    """The images of some requests: `n` of each, at seeds seed, seed + 1, ...

    Args:
        requests: what they leave open is as the other arguments say.
        folder: where the images go.
        n: images per prompt; None: 4, or as many as there are seeds.
        seed: of the first image of every prompt, or the seeds of all its images.
        negative: what to steer away from.
        height, width: pixels asked for; None: the other side, or `size`.
        size, multiple, bins: see `sana.aspect_ratio.drawn_size`.
        layout: "flat": ``<prompt>_<seed>.png``, numbered where there are several prompts. "geneval":
            ``00000/samples/00000.png``, where GenEval's own scorer looks.

    Raises:
        ValueError: seeds that occur twice or are not as many as n; a size that cannot be drawn.
    """
    folder, jobs = Path(folder), []
    for i, request in enumerate(requests):
        where = f"prompt {i} ({request.prompt[:40]!r}): " if len(requests) > 1 else ""
        seeds = _seeds(seed if request.seed is None else request.seed, n, where)
        h, w = request.height or height or request.width or width, request.width or width or request.height or height
        asked = (h or size, w or size)
        try:
            drawn = drawn_size(*asked, size, multiple, bins)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
        name = _name(request.prompt)
        for k, own in enumerate(seeds):
            if layout == "geneval":
                path = folder / f"{i:05d}" / "samples" / f"{k:05d}.png"
            else:
                path = folder / (f"{name}_{own}.png" if len(requests) == 1 else f"{i:05d}_{name}_{own}.png")
            unlike = negative if request.negative is None else request.negative
            jobs.append(Job(path, request.prompt, unlike, own, drawn, asked, i, request.metadata))
    return jobs


def _name(prompt: str) -> str:
    """The prompt as a part of a file name, of at most 60 letters and 150 bytes."""
    name = re.sub(r"\W+", "_", prompt).strip("_")[:60]
    return name.encode()[:150].decode(errors="ignore") or "empty"


def _seeds(seed: int | Sequence[int], n: int | None, where: str) -> list[int]:
    if n is not None and n < 1:
        raise ValueError(f"n: {n} images; expected at least 1")
    seeds = list(range(seed, seed + (4 if n is None else n))) if isinstance(seed, int) else list(seed)
    wrong = [s for s in seeds if not -(2**63) <= s < 2**63]
    if wrong or not seeds:
        raise ValueError(f"{where}seed: {wrong[0] if wrong else 'no seed'}; expected integers of 64 bits")
    twice = [s for s, count in Counter(seeds).items() if count > 1]
    if twice:
        raise ValueError(f"{where}seed: {twice[0]} is given twice; every image of a prompt needs its own")
    if n is not None and n != len(seeds):
        raise ValueError(f"{where}seed: {len(seeds)} seeds for n={n} images; leave n out, or give as many")
    return seeds


def draw_jobs(
    painter: Painter,
    jobs: Sequence[Job],
    sampler: Sampler,
    facts: Mapping[str, Any],
    *,
    batch: int,
    negative_mask: Literal["own", "caption"] | None = None,
    preview: tuple[Path, int] | None = None,
    progress: DrawProgress | None = None,
) -> Iterator[Path]:
    """Draw what is missing, and give the path of every image, those that were there included.

    Args:
        painter, sampler: what draws.
        jobs: see `plan_jobs`.
        facts: what all sidecars say; an image that was drawn under others (but for the commit) is drawn again.
        batch: images per network call.
        negative_mask: see `Painter.draw`.
        preview: a PNG that shows the current batch at every so many steps, removed at the end; None: none.
        progress: is told of every step.

    Raises:
        ValueError: a batch of no image; layers to perturb that the network does not have.
    """
    if batch < 1:
        raise ValueError(f"batch_size: {batch}; expected at least 1")
    painter.perturbed_layers(sampler)  # before anything is written
    shared, batches = json.loads(to_json(facts)), list(_batches(jobs, batch))
    missing = [{job.path for job in some if not is_finished(job, shared)} for some in batches]
    if progress is not None:
        progress.start(len(jobs), sum(len(some) for some, lack in zip(batches, missing, strict=True) if not lack))
    ahead = dict.fromkeys(job.prompt for some, lack in zip(batches, missing, strict=True) if lack for job in some)
    if painter.offload is not None and ahead:
        painter.remember(list(ahead)[:REMEMBERED])  # one visit of the text encoder
    shown = None if preview is None else Preview(painter, preview[0], preview[1])
    try:
        for some, lack in zip(batches, missing, strict=True):
            if lack:
                first = some[0]
                images = painter.draw(
                    [job.prompt for job in some],
                    [job.seed for job in some],
                    sampler,
                    *first.drawn,
                    batch=batch,
                    negative=first.negative,
                    negative_mask=negative_mask,
                    crop=first.asked,
                    on_step=_watchers(progress, shown, len(some)),
                )
                for job, image in zip(some, images, strict=True):
                    if job.path in lack:
                        save_job(job, image, shared)
            yield from (job.path for job in some)
    finally:
        if shown is not None:
            shown.close()
        if progress is not None:
            progress.close()


def draw_grid(path: str | Path, jobs: Sequence[Job]) -> Path:
    """A labelled picture of all images, one prompt per row.

    Raises:
        ValueError: prompts with different numbers of images, images of different sizes, or too large a picture.
    """
    rows: dict[int, list[Job]] = {}
    for job in jobs:
        rows.setdefault(job.entry, []).append(job)
    seeds = [[job.seed for job in row] for row in rows.values()]
    labels = [f"seed {s}" for s in seeds[0]] if all(row == seeds[0] for row in seeds) else []
    pixels = sum(job.asked[0] * job.asked[1] for job in jobs)
    if pixels > GRID_PIXELS:
        raise ValueError(
            f"grid: {len(jobs)} images have {pixels / 1e6:.0f} megapixels; give fewer prompts, or grid=false"
        )
    images = [[read_image(job.path) for job in row] for row in rows.values()]
    return save_grid(path, images, [row[0].prompt for row in rows.values()], labels)


def _batches(jobs: Sequence[Job], batch: int) -> Iterator[list[Job]]:
    """Jobs of one size and one negative prompt together, in order."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.drawn, job.asked, job.negative), []).append(job)
    for group in groups.values():
        for start in range(0, len(group), batch):
            yield group[start : start + batch]


def is_finished(job: Job, shared: Mapping[str, Any]) -> bool:
    """Whether the image is there, as it would be drawn now; `shared` has been through JSON."""
    record = read_sidecar(job.path)
    if record is None or not job.path.is_file() or record.get("size") != [job.asked[1], job.asked[0]]:
        return False
    wanted = {**shared, **json.loads(to_json(job.facts))}
    return all(record.get(k) == wanted.get(k) for k in (record.keys() | wanted.keys()) - LOOSE)


def save_job(job: Job, image: np.ndarray, shared: Mapping[str, Any]) -> None:
    """Write an image (H, W, 3) uint8 where its job says, with the facts that it shares with others and its own."""
    if job.path.parent.name == "samples":  # GenEval's layout, whose scorer reads the line from here
        job.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(dict(job.metadata) or {"prompt": job.prompt}, ensure_ascii=False)
        write_atomically(job.path.parent.parent / "metadata.jsonl", line + "\n")
    save_image(job.path, image, {**shared, **job.facts})


def _watchers(progress: DrawProgress | None, preview: Preview | None, images: int) -> OnStep | None:
    watchers: list[Callable[[Step], None]] = []
    if progress is not None:
        watchers.append(lambda step: progress.step(images, step.steps))
    if preview is not None:
        watchers.append(preview)
    if not watchers:
        return None

    def on_step(step: Step) -> None:
        for watcher in watchers:
            watcher(step)

    return on_step
