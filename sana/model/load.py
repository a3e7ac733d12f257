"""From a checkpoint to something that draws."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sana.checkpoint.record import EXTRA, parse_record
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.run_file import Weights, read_run_file
from sana.checkpoint.tensors import Tensors, check_finite, read_safetensors
from sana.model.generate import Painter
from sana.model.image import ImageModule


def load_weights(module: ImageModule, checkpoint: str | Path, weights: Weights = "ema") -> int | None:
    """Put the weights of a checkpoint into a recipe built from the same configuration.

    Args:
        module: freshly built; its network is overwritten.
        checkpoint: a ``.ckpt`` that a run wrote, or a consolidated ``.safetensors``. No code in it is run.
        weights: of a ``.ckpt``: the averaged ones (the last ones where the run kept no average) or the last ones. A
            consolidated file holds one set.

    Returns:
        The number of updates that the weights have seen, None where nobody wrote it down.

    Raises:
        CheckpointError: keys are missing, left over or of another shape, with their names; numbers that are not
            finite; or it is no checkpoint of this recipe.
    """
    if Path(checkpoint).suffix == ".safetensors":
        stored, metadata = read_safetensors(checkpoint)
        record = parse_record(metadata, checkpoint)
        state = stored.renamed(lambda name: None if name.startswith(EXTRA) else name)
        updates = None if record is None else record.updates
    else:
        state, _, updates = read_run_file(checkpoint, weights)
    _load(module.network, state, checkpoint)
    return updates


def make_painter(module: ImageModule, device: str | torch.device) -> Painter:
    """A painter with the recipe's parts in eval mode on a device."""
    module.frozen.to(device)
    network = module.network.to(device).eval().requires_grad_(False)
    return Painter(network, module.frozen.autoencoder, module.frozen.text_encoder, module.null_like)


def _load(network: nn.Module, state: Tensors, source: str | Path) -> None:
    """Copy every tensor into the network, in the network's types, one at a time."""
    own = network.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = sorted(k for k in own.keys() & state.keys() if own[k].shape != state.like[k].shape)
    if missing or extra or reshaped:
        parts = [("missing", missing), ("extra", extra), ("of another shape", reshaped)]
        said = "; ".join(f"{what}: {', '.join(keys[:5])} ({len(keys)})" for what, keys in parts if keys)
        raise CheckpointError(f"{source}: weights do not fit the network: {said}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(check_finite(name, state[name], source))
