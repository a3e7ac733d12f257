"""What eval.py is made of: the metrics of a configuration, what they compare with, and how a checkpoint draws."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sana.metric.pictures import Pictures
from sana.metric.ranks import rank
from sana.model.found import Lines
from sana.model.load import load_weights
from sana.model.placing import place_painter
from sana.model.quantise import quantise
from sana.run.build import build, build_all
from sana.run.compose import Composed
from sana.run.error import ConfigError
from sana.run.restore import Restored
from sana.scenes import eval_prompts


@contextmanager
def join_ranks() -> Iterator[None]:
    """Join the other processes that torchrun has started, if it has; they share drawing and scoring."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("gloo")  # what is exchanged lies in main memory
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_first_rank() -> bool:
    """Whether this process speaks for all."""
    return rank() == 0


def metrics_of(composed: Composed, restored: Restored | None = None) -> dict[str, Any]:
    """The chosen metrics, with the real images that they compare with.

    Args:
        composed: of eval.py.
        restored: the run whose validation images are the real ones where `reference` is not given; None without one.

    Raises:
        ConfigError: weights that are not here; nothing to compare with; settings that no metric uses.
    """
    config = composed.config
    metrics = build_all(config.metric, "metric")
    comparing = [n for n, m in metrics.items() if isinstance(m, partial) or hasattr(m, "reference")]
    unused = {"reference": not comparing, "features": "${features}" not in str(composed.raw["metric"])}
    for key, idle in unused.items():
        if idle and config[key] is not None:
            raise ConfigError(f"{key}: {config[key]} is used by none of {', '.join(metrics)}; leave it out")
    if not comparing:
        return metrics
    real: Any = config.reference
    if real is None and restored is not None:
        real = build(restored.training.data, "data").validation_images
    if real is None:
        raise ConfigError(f"reference: {comparing[0]} needs real images; give reference=FOLDER, shards or a .npz file")
    for name in comparing:
        metric = metrics[name]
        if isinstance(metric, partial):
            metrics[name] = metric(reference=real if callable(real) else lambda: _batches(Pictures(real)))
        elif metric.reference is None:
            metric.reference = real
    return metrics


def _batches(pictures: Pictures, batch: int = 256) -> Iterator[np.ndarray]:
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        if len({x.shape for x in part}) > 1:
            raise ValueError(f"reference: {pictures.place} has images of several sizes; this metric needs one size")
        yield np.stack(part)


def drawing_of(composed: Composed, restored: Restored, lines: Lines | None) -> dict[str, Any]:
    """Arguments of `sana.model.evaluate.draw_folder` for a checkpoint.

    Args:
        composed: of eval.py.
        restored: the recipe, whose weights are loaded here.
        lines: prompts to draw; None: those of the scenes world.
    """
    config = composed.config
    allowed = list(config.allow_missing), list(config.allow_extra)
    load_weights(restored.module, restored.checkpoint, config.weights, *allowed)
    quantise(composed, restored)
    speed: dict[str, Any] = {"bf16": restored.bf16, "graphs": config.graphs, "compile": config.compile}
    painter = place_painter(restored.module, restored.device, **speed)
    sampler = build(config.sampler, "sampler")

    def images(prompts: list[str], seeds: list[int]) -> np.ndarray:
        with restored.autocast():
            return painter.draw(prompts, seeds, sampler, config.size, config.size, batch=config.batch_size)

    if lines is None:
        prompts, held_out = (
            eval_prompts(config.per_task, config.seed),
            eval_prompts(config.held_out, config.seed, held_out=True),
        )
    else:
        prompts, held_out = list(lines.values() if isinstance(lines, dict) else lines), []
    return {
        "images_fn": images,
        "prompts": prompts,
        "held_out": held_out,
        "settings": restored.facts(composed),
        "samples": config.samples,
        "seed": config.seed,
        "batch_size": config.batch_size,
    }
