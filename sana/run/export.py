"""One file from a run: its weights and how to build what they belong to."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import OmegaConf

from sana.checkpoint.record import Record
from sana.checkpoint.run_file import Weights, read_run_file
from sana.checkpoint.write import Progress, write_consolidated
from sana.run.compose import masked_environment
from sana.run.recipe import recipe_of, training_of
from sana.run.runs import find_checkpoint, read_overrides
from sana.run.saved import load_saved


def export_run(
    run: str | Path,
    path: str | Path,
    weights: Weights = "ema",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Record:
    """Write the network of a run as a consolidated file, which `ckpt=` takes like the run itself.

    Args:
        run: its directory (the newest checkpoint is taken) or one of its checkpoints.
        path: the file to write; new.
        weights: the averaged ones (the last ones where the run kept no average) or the last ones.
        dtype: of the floating-point tensors; None leaves them as they are, which is exact. Rounding to bfloat16
            halves the file and changes images slightly.
        progress: called with the bytes of every tensor written.

    Returns:
        What the header says.

    Raises:
        ConfigError: no such run or checkpoint, or a recipe that others could not build.
        CheckpointError: the checkpoint is damaged or `path` exists.
    """
    checkpoint, home = find_checkpoint(run, key="run")
    saved = load_saved(home).config
    with masked_environment():
        config = OmegaConf.to_container(saved, resolve=True)
    assert isinstance(config, dict)
    tensors, used, updates = read_run_file(checkpoint, weights)
    recipe = recipe_of({str(key): value for key, value in config.items()}, read_overrides(home))
    shift = (recipe.get("timestep") or {}).get("shift")
    record = Record(recipe, {"flow_shift": shift, "size": recipe["size"]}, used, updates)
    training_of(record, Path(path))  # what is written can be read
    write_consolidated(path, tensors.cast(dtype), record, progress)
    return record
