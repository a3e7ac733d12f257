"""Evaluation: ``python eval.py ckpt=<run or checkpoint> metric=[geneval_scenes,fid]``; ``--help`` lists the
rest."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sana.run.launch import launch

if TYPE_CHECKING:
    from sana.run.compose import Composed


def evaluate_run(composed: Composed) -> None:
    """Draw the prompts with a checkpoint, score the images, and write results.json, the table and the
    report."""
    from rich.console import Console

    from sana.model.evaluate import evaluate
    from sana.model.load import load_weights, make_painter
    from sana.run.build import build, build_all
    from sana.run.error import ConfigError
    from sana.run.restore import restore
    from sana.scenes import eval_prompts

    config = composed.config
    restored = restore(composed)
    data = build(restored.training.data, "data")
    metrics = {
        name: metric(reference=data.validation_images) if isinstance(metric, partial) else metric
        for name, metric in build_all(config.metric, "metric").items()
    }
    allowed = list(config.allow_missing), list(config.allow_extra)
    load_weights(restored.module, restored.checkpoint, config.weights, *allowed)
    if config.quant is not None:
        restored.module.network = build(config.quant, "quant")(restored.module.network)
    painter, sampler = make_painter(restored.module, restored.device), build(config.sampler, "sampler")

    def images(prompts: list[str], seeds: list[int]):
        with restored.autocast():
            return painter.draw(prompts, seeds, sampler, config.size, config.size, batch=config.batch_size)

    settings = restored.facts(composed)
    drawing = {
        "images_fn": images,
        "prompts": eval_prompts(config.per_task, config.seed),
        "held_out": eval_prompts(config.held_out, config.seed, held_out=True),
        "settings": settings,
        "samples": config.samples,
        "seed": config.seed,
        "batch_size": config.batch_size,
    }
    folder = Path(config.out or restored.run / "eval" / restored.checkpoint.stem)
    try:
        evaluate(folder, metrics, run_dir=restored.run, commit=settings["commit"], drawing=drawing, console=Console())
    except ValueError as error:  # too few images for a metric, or a folder drawn with other settings
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    raise SystemExit(launch("eval", evaluate_run))
