"""Drawing: ``python sample.py ckpt=<run or checkpoint> prompt="a red circle" n=8``; ``--help`` lists the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sana.run.launch import launch

if TYPE_CHECKING:
    from sana.run.compose import Composed

REQUEST = ("n", "seed", "negative", "height", "width", "size", "bins", "layout")


def sample(composed: Composed) -> None:
    """Load, draw what is missing, choose if there is a judge, and write one PNG and one JSON per image."""
    from sana.run.choice import check_choice
    from sana.run.dtype import check_dtypes
    from sana.run.error import ConfigError
    from sana.run.prompts import read_prompts

    config, settings = composed.config, composed.resolved
    keep, requests, dtype = check_choice(settings), read_prompts(settings["prompt"]), config.dtype
    check_dtypes(config.precision, dtype.autoencoder, dtype.text)

    from sana.model.best_of import Choice
    from sana.model.draw_progress import DrawProgress
    from sana.model.draw_requests import draw_requests
    from sana.model.load import load_weights
    from sana.model.placing import cast_parts, place_painter
    from sana.model.quantise import quantise
    from sana.run.build import build
    from sana.run.restore import restore

    choice = keep and Choice(build(config.judge, "judge"), config.best_of, keep, config.keep_all)
    sampler, restored = build(config.sampler, "sampler"), restore(composed)
    module, folder = restored.module, Path(config.out or restored.run / "drawn")
    try:
        load_weights(module, restored.checkpoint, config.weights, config.allow_missing, config.allow_extra)
        cast_parts(module, config.precision, dtype.autoencoder, dtype.text)
        quantise(composed, restored)
        speed = {"bf16": restored.bf16, "graphs": config.graphs, "compile": config.compile}
        painter = place_painter(module, restored.device, config.offload, dtype.autoencoder, **speed)
        plan = {"multiple": painter.multiple} | {key: settings[key] for key in REQUEST}
        mask = config.negative_mask or restored.training.model.get("null_mask")
        facts = restored.facts(composed) | {"negative_mask": mask, "dtype": settings["dtype"]}
        facts |= {"precision": config.precision} if config.precision == "bf16-true" else {}
        options = {"batch": config.batch_size, "negative_mask": mask, "progress": DrawProgress(), "grid": config.grid}
        options |= {"choice": choice, "preview": (folder / ".preview.png", config.preview) if config.preview else None}
        with restored.autocast():
            for path in draw_requests(painter, requests, folder, plan, sampler, facts, **options):
                print(path, flush=True)
    except ValueError as error:  # what only the weights or the prompts could tell
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    raise SystemExit(launch("sample", sample))
