"""The network's weights in a checkpoint that a training run of this project wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.pickled import read_pickle, state_in
from sana.checkpoint.run_folder import read_state, verify
from sana.checkpoint.sharded import open_pieces
from sana.checkpoint.tensors import Tensors, from_dict, join

Weights = Literal["ema", "live"]
PREFIX = "network."


def read_run_file(path: str | Path, weights: Weights = "ema") -> tuple[Tensors, Weights, int]:
    """Weights of the trained network, which of the two sets they are, and the number of updates they have seen.

    Args:
        path: a ``.ckpt`` folder of `sana.callback.checkpoints`, by any strategy and number of ranks, or a file of an
            older version.
        weights: the averaged ones (the last ones where the run kept no average) or the last ones.

    Raises:
        CheckpointError: it is none, or damaged, with the file's name.
    """
    own, averages, counts = _open_folder(Path(path)) if Path(path).is_dir() else _open_file(path)
    state = own.renamed(lambda name: name.removeprefix(PREFIX) if name.startswith(PREFIX) else None)
    average = averages.get("network")
    used: Weights = "live"
    if weights == "ema" and average is not None:
        state, used = join(state, average), "ema"
    updates = counts.get("network")
    if updates is None or not state:
        raise CheckpointError(f"{path}: trained {', '.join(counts)}, not the network of a recipe")
    return state, used, int(updates)


def _open_folder(path: Path) -> tuple[Tensors, dict[str, Tensors], dict[str, int]]:
    """Parameters and buffers, averages by module, and updates by module of a checkpoint, put together from the pieces
    of all ranks."""
    verify(path, ("model", "ema", "state"))
    counts = read_state(path)["updates"]
    stored = open_pieces(path, ("model", "ema")).tensors()
    own = stored.renamed(lambda name: name.removeprefix("model.") if name.startswith("model.") else None)
    averages = {}
    for module in counts:
        start = f"ema.{module}."
        average = stored.renamed(lambda name, start=start: name.removeprefix(start) if name.startswith(start) else None)
        if average:
            averages[module] = average
    return own, averages, counts


def _open_file(path: str | Path) -> tuple[Tensors, dict[str, Tensors], dict[str, int]]:
    """The same of a file that an older version wrote."""
    content = read_pickle(path)
    if "state_dict" not in content or "updates" not in content:
        raise CheckpointError(f"{path}: no checkpoint of a training run (has {', '.join(sorted(content)[:5])})")
    averages = {name: from_dict(average["shadow"]) for name, average in content.get("ema", {}).items()}
    return state_in(content, "state_dict", path), averages, content["updates"]
