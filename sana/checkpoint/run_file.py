"""The network's weights in a checkpoint that a training run of this project wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sana.checkpoint.distributed import META, read_distributed
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.pickled import read_pickle, state_in
from sana.checkpoint.tensors import Tensors, from_dict, join

Weights = Literal["ema", "live"]
PREFIX = "network."


def read_run_file(path: str | Path, weights: Weights = "ema") -> tuple[Tensors, Weights, int]:
    """Weights of the trained network, which of the two sets they are, and the number of updates they have seen.

    Args:
        path: a ``.ckpt`` of `sana.callback.checkpoints`: a file, or the directory of a sharded run.
        weights: the averaged ones (the last ones where the run kept no average) or the last ones.

    Raises:
        CheckpointError: not such a file or directory, a damaged one, or one without whole averages where those are
            asked for.
    """
    folder = Path(path) if Path(path).is_dir() else None
    sharded = None if folder is None else read_distributed(folder)
    content = read_pickle(path if folder is None else folder / META)
    if "updates" not in content or (sharded is None and "state_dict" not in content):
        raise CheckpointError(f"{path}: no checkpoint of a training run (has {', '.join(sorted(content)[:5])})")
    own = state_in(content, "state_dict", path) if sharded is None else _below("state_dict.", sharded)
    state = _below(PREFIX, own)
    used: Weights = "live"
    average = _average(content, sharded, path) if weights == "ema" else None
    if average is not None:
        state, used = join(state, average), "ema"
    updates = content["updates"].get("network")
    if updates is None or not state:
        raise CheckpointError(f"{path}: trained {', '.join(content['updates'])}, not the network of a recipe")
    return state, used, int(updates)


def _below(prefix: str, tensors: Tensors) -> Tensors:
    """Those whose names begin with a prefix, without it."""
    return tensors.renamed(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)


def _average(content: Mapping[str, Any], sharded: Tensors | None, path: str | Path) -> Tensors | None:
    """The averaged parameters of the network, None where the run kept none.

    Of a sharded run they lie among the shards, or beside them if they are whole there.
    """
    found = None if sharded is None else _below("ema.network.shadow.", sharded)
    if found:
        return found
    average = content.get("ema", {}).get("network")
    if average is None:
        return None
    shadow = {name: getattr(value, "_local_tensor", value) for name, value in average["shadow"].items()}
    if any(value.shape != average["shadow"][name].shape for name, value in shadow.items()):
        raise CheckpointError(f"{path}: holds the averaged weights of one of several devices only; weights=live takes "
                              "the last ones, which are whole")  # fmt: skip
    return from_dict(shadow)
