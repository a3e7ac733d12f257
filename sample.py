"""Drawing: ``python sample.py ckpt=<run or checkpoint> prompt="a red circle" n=8``; ``--help`` lists the
rest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from sana.run.launch import launch

if TYPE_CHECKING:
    from sana.run.compose import Composed


def sample(composed: Composed) -> None:
    """Load, draw, and write one PNG and one JSON per image."""
    from sana.model.load import load_weights, make_painter
    from sana.run.build import build
    from sana.run.restore import restore
    from sana.run.sidecar import save_image

    config = composed.config
    restored = restore(composed)
    allowed = list(config.allow_missing), list(config.allow_extra)
    load_weights(restored.module, restored.checkpoint, config.weights, *allowed)
    if config.quant is not None:
        restored.module.network = build(config.quant, "quant")(restored.module.network)
    painter, sampler = make_painter(restored.module, restored.device), build(config.sampler, "sampler")
    prompts, seeds = [config.prompt] * config.n, list(range(config.seed, config.seed + config.n))
    size, batch, negative = config.size, config.batch_size, config.negative
    with restored.autocast():
        images = painter.draw(prompts, seeds, sampler, size, size, batch=batch, negative=negative)
    facts = {**restored.facts(composed), "prompt": config.prompt, "negative": negative}
    folder = Path(config.out or restored.run / "drawn")
    name = re.sub(r"\W+", "_", config.prompt).strip("_")[:60] or "empty"
    for seed, image in zip(seeds, images, strict=True):
        print(save_image(folder / f"{name}_{seed}.png", image, {**facts, "seed": seed}))


if __name__ == "__main__":
    raise SystemExit(launch("sample", sample))
