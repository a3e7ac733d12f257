"""The network's weights in a checkpoint that a training run of this project wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.pickled import read_pickle, state_in
from sana.checkpoint.tensors import Tensors, from_dict, join

Weights = Literal["ema", "live"]
PREFIX = "network."


def read_run_file(path: str | Path, weights: Weights = "ema") -> tuple[Tensors, Weights, int]:
    """Weights of the trained network, which of the two sets they are, and the number of updates they have seen.

    Args:
        path: a ``.ckpt`` of `sana.callback.checkpoints`.
        weights: the averaged ones (the last ones where the run kept no average) or the last ones.

    Raises:
        CheckpointError: not such a file, or a sharded one.
    """
    if Path(path).is_dir():
        raise CheckpointError(
            f"{path}: is sharded over {len(list(Path(path).glob('*.distcp')))} files, and a sharded checkpoint is "
            "read by the run that resumes from it; take one written on a single device"
        )
    content = read_pickle(path)
    if "state_dict" not in content or "updates" not in content:
        raise CheckpointError(f"{path}: no checkpoint of a training run (has {', '.join(sorted(content)[:5])})")
    own = state_in(content, "state_dict", path)
    state = own.renamed(lambda name: name.removeprefix(PREFIX) if name.startswith(PREFIX) else None)
    average = content.get("ema", {}).get("network")
    used: Weights = "live"
    if weights == "ema" and average is not None:
        state, used = join(state, from_dict(average["shadow"])), "ema"
    updates = content["updates"].get("network")
    if updates is None or not state:
        raise CheckpointError(f"{path}: trained {', '.join(content['updates'])}, not the network of a recipe")
    return state, used, int(updates)
