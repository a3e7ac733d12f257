"""Drawing: ``python sample.py ckpt=<run or checkpoint> prompt="a red circle" n=8``; ``--help`` lists the
rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sana.run.launch import launch

if TYPE_CHECKING:
    from sana.run.compose import Composed

REQUEST = ("n", "seed", "negative", "height", "width", "size", "bins", "layout")


def sample(composed: Composed) -> None:
    """Load, draw what is missing, and write one PNG and one JSON per image."""
    from sana.run.dtype import check_dtypes
    from sana.run.error import ConfigError
    from sana.run.prompts import read_prompts

    config, settings = composed.config, composed.resolved
    requests, dtype = read_prompts(settings["prompt"]), config.dtype
    check_dtypes(config.precision, dtype.autoencoder, dtype.text)

    from sana.model.draw_progress import DrawProgress
    from sana.model.drawing import draw_grid, draw_jobs, plan_jobs
    from sana.model.load import load_weights
    from sana.model.placing import cast_parts, place_painter
    from sana.run.build import build
    from sana.run.restore import restore

    sampler, restored = build(config.sampler, "sampler"), restore(composed)
    module, folder = restored.module, Path(config.out or restored.run / "drawn")
    try:
        load_weights(module, restored.checkpoint, config.weights, config.allow_missing, config.allow_extra)
        cast_parts(module, config.precision, dtype.autoencoder, dtype.text)
        if config.quant is not None:
            module.network = build(config.quant, "quant")(module.network)
        painter = place_painter(module, restored.device, config.offload, dtype.autoencoder)
        jobs = plan_jobs(requests, folder, multiple=painter.multiple, **{key: settings[key] for key in REQUEST})
        mask = config.negative_mask or restored.training.model.get("null_mask")
        facts = restored.facts(composed) | {"negative_mask": mask, "dtype": settings["dtype"]}
        if config.precision == "bf16-true":
            facts["precision"] = config.precision
        preview = (folder / ".preview.png", config.preview) if config.preview else None
        options = {"batch": config.batch_size, "negative_mask": mask, "preview": preview, "progress": DrawProgress()}
        with restored.autocast():
            for path in draw_jobs(painter, jobs, sampler, facts, **options):
                print(path, flush=True)
        if config.grid:
            print(draw_grid(folder / "grid.png", jobs))
    except ValueError as error:  # what only the weights or the prompts could tell
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    raise SystemExit(launch("sample", sample))
