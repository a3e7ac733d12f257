"""Which blocks of a trained network matter, measured while it draws calibration prompts (SANA-1.5, arXiv:2501.18427,
section 3.2)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sana.metric.ranks import shared, world
from sana.model.calibration import prompts_of
from sana.model.draw_progress import DrawProgress
from sana.model.evaluation import on_first_rank
from sana.model.generate import Painter
from sana.model.load import load_weights, make_painter
from sana.network.importance import BlockImportance, values_of
from sana.run.build import build
from sana.run.compose import Composed
from sana.run.environment import describe_git, fast_precision
from sana.run.error import ConfigError
from sana.run.importance import NAME, Importance, read_importance, same_settings, write_importance
from sana.run.restore import restore
from sana.run.runs import find_weights
from sana.run.saved import training
from sana.run.sidecar import file_digest
from sana.sampler.guided import Sampler, Step


def importance_of(composed: Composed) -> tuple[Importance, Path, bool]:
    """The report on a checkpoint, measured unless it is there; every process calls this.

    Args:
        composed: of conf/importance.yaml, checked.

    Returns:
        What was found, the report's place, and whether it was there already.

    Raises:
        ConfigError: no such checkpoint, or prompts that cannot be used.
    """
    config = composed.config
    found = find_weights(config.ckpt)
    trained = training(found, config.recipe)
    folder = Path(config.out or found.home / "importance")
    settings = {
        "digest": _on_first(lambda: file_digest(found.path)),
        "weights": "ema",
        "prompts": prompts_of(composed, trained.config),
        "sampler": composed.resolved["sampler"],
        "size": int(config.size),
        "seed": int(config.seed),
        "precision": fast_precision() if config.precision == "auto" else config.precision,
    }
    there = _on_first(lambda: _kept(folder, settings))
    if there is not None:
        return there, folder / NAME, True
    start = time.monotonic()
    restored = restore(composed)
    load_weights(restored.module, restored.checkpoint, "ema", config.allow_missing, config.allow_extra)
    painter, sampler = make_painter(restored.module, restored.device), build(config.sampler, "sampler")
    prompts = settings["prompts"]
    seeds = range(settings["seed"], settings["seed"] + len(prompts))
    with restored.autocast():
        progress = DrawProgress() if on_first_rank() else None
        values = measure(painter, sampler, prompts, seeds, settings["size"], config.batch_size, progress)
    commit = (describe_git()[0] or {}).get("commit")
    made = Importance(values, settings, str(found.path), round(time.monotonic() - start, 1), commit)
    _on_first(lambda: str(write_importance(folder, made)))
    return made, folder / NAME, False


def measure(
    painter: Painter,
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: int,
    batch: int,
    progress: DrawProgress | None = None,
) -> list[float]:
    """BI of each block over all steps of drawing the prompts; nothing is decoded.

    Batches are shared among the processes there are, and added up in their order: any number of processes gives the
    same numbers to the last bit.

    Args:
        painter, sampler: what draws.
        prompts, seeds: of equal length.
        size: pixels of a side.
        batch: prompts per call of the network.
        progress: is told of every step.

    Raises:
        ValueError: a batch of nothing, or a size that cannot be drawn.
    """
    if batch < 1:
        raise ValueError(f"batch_size: {batch}; expected at least 1")
    starts = range(0, len(prompts), batch)

    def piece(i: int) -> list[list[float]]:
        part = slice(starts[i], starts[i] + batch)
        count = len(prompts[part]) * world()  # the others draw as many meanwhile

        def on_step(step: Step) -> None:
            if progress is not None:
                progress.step(count, step.steps)

        with BlockImportance(painter.network) as watched:
            painter.latents(prompts[part], seeds[part], sampler, size, size, on_step=on_step)
        return watched.sums().tolist()

    if progress is not None:
        progress.start(len(prompts), 0)
    try:
        sums = shared(len(starts), piece)
    finally:
        if progress is not None:
            progress.close()
    return values_of(torch.tensor(sums, dtype=torch.float64).sum(0))


def _kept(folder: Path, settings: dict[str, Any]) -> Importance | None:
    """The report in a folder, if it is about the same."""
    if not (folder / NAME).is_file():
        return None
    try:
        there = read_importance(folder)
    except ConfigError:
        return None
    return there if same_settings(there.settings, settings) else None


def _on_first(work: Any) -> Any:
    """What `work` gives on the first process, on all."""
    answer = [work() if on_first_rank() else None]
    if world() > 1:
        dist.broadcast_object_list(answer, src=0)
    return answer[0]
