"""Networks that teach: taken from a checkpoint, and copied into the student that starts as one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.names import list_names
from sana.model.load import fill, read_weights
from sana.network.dense_time import densify
from sana.run.build import build
from sana.run.runs import find_weights
from sana.run.saved import training

NEW = ("guidance_embed.", ".q_norm.", ".k_norm.")
"""What a network may have that the one it starts from lacks: an embedding that is zero at first, so nothing changes,
and norms of queries and keys, which a short training has to make up for."""


def teacher(ckpt: str, recipe: str | None = None, key: str = "model.teacher.ckpt") -> nn.Module:
    """The network of a checkpoint with its averaged weights, in float32.

    Args:
        ckpt: what `ckpt` of sample.py takes: a run, a file, a shipped model, an address on the hub.
        recipe: experiment of conf/ that weights without a run were trained like, where their file does not tell.
        key: of the setting, for messages.

    Raises:
        ConfigError, CheckpointError: there is none, or it does not fit.
    """
    found = find_weights(ckpt, key=key)
    network = build(training(found, recipe).config.model.network, key)
    fill(network, read_weights(found.path)[0], found.path)
    return network


@torch.no_grad()
def start_student(student: nn.Module, source: nn.Module) -> float:
    """Copy a flow network into one that may embed guidance too; so it draws the same, whatever the guidance.

    Where the two see time in different units, the student's embedding of time is fitted to the other one.

    Args:
        student: overwritten, but for what the source lacks of `NEW`.
        source: of the same architecture.

    Returns:
        What `densify` returns; 0 where the unit is the same.

    Raises:
        CheckpointError: the two are not alike, naming the tensors.
    """
    theirs: dict[str, Tensor] = source.state_dict()
    own = student.state_dict()
    missing = sorted(name for name in own.keys() - theirs.keys() if not any(part in name for part in NEW))
    extra = sorted(theirs.keys() - own.keys())
    other = sorted(name for name in own.keys() & theirs.keys() if own[name].shape != theirs[name].shape)
    if missing or extra or other:
        raise CheckpointError(
            f"the student cannot start as its teacher: missing {list_names(missing)}, left over {list_names(extra)}, "
            f"of another shape {list_names(other)}"
        )
    for name in own.keys() & theirs.keys():
        own[name].copy_(theirs[name])
    here, there = float(student.time_scale), float(source.time_scale)  # type: ignore[arg-type]
    if here == there:
        return 0.0
    return densify(source.time_embed, student.time_embed, there / here)  # type: ignore[arg-type]
