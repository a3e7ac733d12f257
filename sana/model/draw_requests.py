"""What sample.py does with its requests: draws them, plainly or choosing the best of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sana.model.best_of import Choice, draw_choice, plan_choice
from sana.model.drawing import Job, draw_grid, draw_jobs, plan_jobs
from sana.model.generate import Painter
from sana.run.prompts import Request
from sana.sampler.guided import Sampler


def draw_requests(
    painter: Painter,
    requests: Sequence[Request],
    folder: Path,
    plan: Mapping[str, Any],
    sampler: Sampler,
    facts: Mapping[str, Any],
    choice: Choice | None = None,
    *,
    grid: bool = False,
    **options: Any,
) -> Iterator[Path]:
    """Draw what is missing, and give the path of every image, of the kept ones where there is a choice.

    Args:
        painter, sampler, facts: see `sana.model.drawing.draw_jobs`.
        requests, folder: see `sana.model.drawing.plan_jobs`.
        plan: more arguments of `plan_jobs`; its n counts without a choice only.
        choice: see `sana.model.best_of.draw_choice`; None draws plainly.
        grid: make a labelled picture of all of them too, whose path comes last.
        options: more of `draw_jobs`.

    Raises:
        ValueError: see those functions.
    """
    if choice is None:
        jobs = plan_jobs(requests, folder, **plan)
        yield from draw_jobs(painter, jobs, sampler, facts, **options)
    else:
        jobs: list[Job] = []
        prompts = plan_choice(requests, folder, choice, **{k: v for k, v in plan.items() if k != "n"})
        for job in draw_choice(painter, prompts, sampler, facts, choice, folder, **options):
            yield job.path
            jobs.append(job)
    if grid:
        yield draw_grid(folder / "grid.png", jobs)
