"""Best of N: candidates of each prompt are drawn, judged as they come, and the best kept (SANA-1.5, arXiv:2501.18427).

Candidate k of a prompt is the image that plain drawing gives for its seed. Prompts are taken one after another and a
prompt's candidates in batches, which are drawn and judged whole, so that one prompt's candidates lie on the disk at a
time and an interrupted choice ends with the pixels, scores and ranks of one that was not. Scores stay in scores.jsonl;
candidates that were not kept are deleted as soon as their prompt is decided, unless all are to be kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sana.model.candidates import POOL, Candidate, Scores, digest
from sana.model.draw_progress import DrawProgress, OneOfMany
from sana.model.drawing import LOOSE, Job, draw_jobs, is_finished, plan_jobs, save_job
from sana.model.generate import REMEMBERED, Painter
from sana.reward.judge import Judge
from sana.run.prompts import Request
from sana.run.records import to_json
from sana.run.sidecar import pixel_digest, read_image, read_sidecar
from sana.sampler.best_of_n import keep_best
from sana.sampler.guided import Sampler


@dataclass(frozen=True)
class Choice:
    """How images are chosen.

    Attributes:
        judge: who scores them.
        best_of: candidates per prompt.
        keep: how many are kept.
        keep_all: whether the others are kept too, in the folder ``pool``.
    """

    judge: Judge
    best_of: int
    keep: int = 1
    keep_all: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        """What the sidecar of a kept image says of the choice."""
        return {"best_of": self.best_of, "judge": {"name": self.judge.name, **self.judge.settings}}


@dataclass(frozen=True)
class Prompt:
    """One prompt of a choice.

    Attributes:
        jobs: its candidates, in the folder ``pool``.
        kept: where the chosen ones go, best first.
    """

    jobs: list[Job]
    kept: list[Path]


def plan_choice(
    requests: Sequence[Request],
    folder: str | Path,
    choice: Choice,
    *,
    layout: Literal["flat", "geneval"] = "flat",
    **plan: Any,
) -> list[Prompt]:
    """The candidates of some requests and the names of those that will be kept.

    Args:
        requests: see `sana.run.prompts.read_prompts`.
        folder: where the chosen images go, as ``<prompt>_rank1.png`` or, in GenEval's layout, ``00000.png`` and on.
        choice: see `Choice`.
        layout, plan: as of `sana.model.drawing.plan_jobs`, without n.

    Raises:
        ValueError: as `plan_jobs`; or a prompt that the judge does not understand.
    """
    folder = Path(folder)
    prompts: list[Prompt] = []
    jobs = plan_jobs(requests, folder / POOL, n=choice.best_of, layout="flat", **plan)
    for start in range(0, len(jobs), choice.best_of):
        own = jobs[start : start + choice.best_of]
        stem, home = own[0].path.stem.removesuffix(f"_{own[0].seed}"), folder / f"{own[0].entry:05d}" / "samples"
        flat, geneval = (
            [where(rank) for rank in range(1, choice.keep + 1)]
            for where in (lambda r, s=stem: folder / f"{s}_rank{r}.png", lambda r, h=home: h / f"{r - 1:05d}.png")
        )
        prompts.append(Prompt(own, geneval if layout == "geneval" else flat))
    choice.judge.check([_line(prompt.jobs[0]) for prompt in prompts])
    return prompts


def draw_choice(
    painter: Painter,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    facts: Mapping[str, Any],
    choice: Choice,
    folder: str | Path,
    *,
    batch: int,
    progress: DrawProgress | None = None,
    **options: Any,
) -> Iterator[Job]:
    """Draw and judge what is missing, and give the kept images, prompt by prompt, best first.

    Args:
        painter, sampler: what draws.
        prompts: see `plan_choice`.
        facts: what all sidecars say. A kept image that was drawn or chosen otherwise is drawn and chosen again.
        choice, folder: as in `plan_choice`.
        batch: images per call of the network, and that are judged together.
        progress: is told of every step.
        options: more of `sana.model.drawing.draw_jobs`.

    Yields:
        The job of the candidate, with the path of the kept image.

    Raises:
        ValueError: see `draw_jobs`.
    """
    if batch < 1:
        raise ValueError(f"batch_size: {batch}; expected at least 1")
    painter.perturbed_layers(sampler)  # before anything is written
    shared = json.loads(to_json(facts))
    scores, drawing = Scores(folder), digest({k: v for k, v in shared.items() if k not in LOOSE})
    done = [_kept(prompt, shared, choice) for prompt in prompts]
    if progress is not None:
        missing = sum(_missing(p.jobs, shared, batch) for p, d in zip(prompts, done, strict=True) if d is None)
        total = sum(len(prompt.jobs) for prompt in prompts)
        progress.start(total, total - missing)
    if painter.offload is not None:  # one visit of the text encoder
        ahead = dict.fromkeys(p.jobs[0].prompt for p, d in zip(prompts, done, strict=True) if d is None)
        painter.remember(list(ahead)[:REMEMBERED])
    part = None if progress is None else OneOfMany(progress)
    try:
        for prompt, known in zip(prompts, done, strict=True):
            if known is None:
                drawn: list[Candidate] = []
                for some in _cut(prompt.jobs, batch):
                    list(draw_jobs(painter, some, sampler, facts, batch=batch, progress=part, **options))
                    drawn += judge_images(choice.judge, [job.path for job in some], some, scores, drawing)
                known = _keep(prompt, drawn, scores, shared, choice)
            if not choice.keep_all:
                _delete(prompt.jobs)
            yield from known
    finally:
        if progress is not None:
            progress.close()


def judge_images(
    judge: Judge, paths: Sequence[Path], jobs: Sequence[Job], scores: Scores, drawing: str
) -> list[Candidate]:
    """Have images judged together; where one lacks a score all are asked for, because the last bits of a score may
    depend on the company."""
    images = [read_image(path, read_sidecar(path)) for path in paths]
    lines = [_line(job) for job in jobs]
    found = [
        Candidate(path.name, job.entry, job.seed, line, pixel_digest(image), drawing)
        for path, job, line, image in zip(paths, jobs, lines, images, strict=True)
    ]
    _ask(judge, images, found, scores)
    return found


def judge_pool(judge: Judge, folder: str | Path, candidates: Sequence[Sequence[Candidate]], batch: int) -> None:
    """Have another judge look at a pool whose images are all still there (``keep_all=true``).

    Args:
        judge: whose scores are added to scores.jsonl.
        folder: of the choice.
        candidates: of `sana.model.candidates.read_pool`.
        batch: images that are judged together.

    Raises:
        ValueError: an image is gone or is not the one that was scored, or a prompt that the judge does not understand.
    """
    scores = Scores(folder)
    judge.check([some[0].line for some in candidates])
    for prompt in candidates:
        for some in _cut(prompt, batch):
            paths = [Path(folder) / POOL / c.image for c in some]
            gone = [path for path in paths if not path.is_file()]
            if gone:
                raise ValueError(f"{gone[0]}: this candidate was not kept; draw with keep_all=true to judge again")
            images = [read_image(path, {"pixels": c.pixels}) for path, c in zip(paths, some, strict=True)]
            _ask(judge, images, some, scores)
        _combine(judge, prompt, scores)


def _ask(judge: Judge, images: Sequence[NDArray[np.uint8]], found: Sequence[Candidate], scores: Scores) -> None:
    lines = [candidate.line for candidate in found]
    for name, part in judge.parts.items():
        if any(scores.get(candidate, name, part.settings) is None for candidate in found):
            with _full_precision():
                scores.add(found, name, part.settings, part.score(images, lines))


@contextmanager
def _full_precision() -> Iterator[None]:
    """The precision of drawing is none of the judge's business."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _combine(judge: Judge, found: Sequence[Candidate], scores: Scores) -> NDArray[np.float64]:
    """Scores of all candidates of a prompt."""
    parts = {name: np.array([scores.get(c, name, p.settings) for c in found]) for name, p in judge.parts.items()}
    total = judge.combine(parts)
    if judge.name not in parts:
        scores.add(found, judge.name, [judge.settings, [c.pixels for c in found]], total)
    return total


def _keep(
    prompt: Prompt, found: Sequence[Candidate], scores: Scores, shared: Mapping[str, Any], choice: Choice
) -> list[Job]:
    """Write the best candidates under their ranks."""
    total, kept = _combine(choice.judge, found, scores), []
    for rank, i in enumerate(keep_best(total, choice.keep)):
        job = replace(prompt.jobs[i], path=prompt.kept[rank])
        parts = {n: scores.get(found[i], n, p.settings) for n, p in choice.judge.parts.items()}
        own = {"score": float(total[i]), "rank": rank + 1} | ({"scores": parts} if len(parts) > 1 else {})
        save_job(job, read_image(prompt.jobs[i].path), {**shared, **choice.facts, **own})
        kept.append(job)
    return kept


def _kept(prompt: Prompt, shared: Mapping[str, Any], choice: Choice) -> list[Job] | None:
    """The chosen images if all are there as they would be chosen now; which ones they are, only they say themselves."""
    jobs, own = {job.seed: job for job in prompt.jobs}, json.loads(to_json(choice.facts))
    found = []
    for rank, path in enumerate(prompt.kept, 1):
        record = read_sidecar(path) or {}
        if record.get("seed") not in jobs:
            return None
        job = replace(jobs[record["seed"]], path=path)
        said = {key: record[key] for key in ("score", "scores") if key in record}
        if not is_finished(job, {**shared, **own, "rank": rank, **said}):
            return None
        found.append(job)
    if choice.keep_all and not all(is_finished(job, shared) for job in prompt.jobs):
        return None
    return found


def _missing(jobs: Sequence[Job], shared: Mapping[str, Any], batch: int) -> int:
    """Images in batches that are not all there."""
    return sum(len(some) for some in _cut(jobs, batch) if not all(is_finished(job, shared) for job in some))


def _cut(items: Sequence[Any], batch: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), batch):
        yield items[start : start + batch]


def _line(job: Job) -> dict[str, Any]:
    return {**job.metadata, "prompt": job.prompt}


def _delete(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.path.unlink(missing_ok=True)
        job.path.with_suffix(".json").unlink(missing_ok=True)
    with suppress(OSError):  # not there, or others lie in it
        jobs[0].path.parent.rmdir()
