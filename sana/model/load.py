"""From a checkpoint to something that draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sana.model.generate import Painter
from sana.model.image import ImageModule
from sana.nn.inference import for_inference


def load_weights(module: ImageModule, checkpoint: str | Path, weights: Literal["ema", "live"] = "ema") -> int:
    """Put the weights of a checkpoint into a recipe built from the same configuration.

    Args:
        module: freshly built; its network is overwritten.
        checkpoint: a ``.ckpt`` that a run wrote. Read with ``weights_only=True``: no code in it is run.
        weights: the averaged ones (the last ones where the run kept no average) or the last ones.

    Returns:
        The number of updates that the weights have seen.

    Raises:
        ValueError: keys are missing or left over, with their names; or it is no checkpoint of this recipe.
    """
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if "state_dict" not in content or "updates" not in content:
        raise ValueError(f"{checkpoint}: no checkpoint of a training run (has {sorted(content)[:5]})")
    prefix = "network."
    state = {name[len(prefix) :]: value for name, value in content["state_dict"].items() if name.startswith(prefix)}
    average = content.get("ema", {}).get("network")
    if weights == "ema" and average is not None:
        state.update(average["shadow"])
    _load(module.network, state, checkpoint)
    return int(content["updates"]["network"])


def make_painter(module: ImageModule, device: str | torch.device) -> Painter:
    """A painter with the recipe's parts in eval mode on a device."""
    module.frozen.to(device)
    network = for_inference(module.network.to(device).eval().requires_grad_(False))
    return Painter(network, module.frozen.autoencoder, module.frozen.text_encoder, module.null_like)


def _load(network: nn.Module, state: dict[str, Any], source: str | Path) -> None:
    own = network.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if missing or extra or reshaped:
        parts = [("missing", missing), ("extra", extra), ("of another shape", reshaped)]
        said = "; ".join(f"{what}: {', '.join(keys[:5])} ({len(keys)})" for what, keys in parts if keys)
        raise ValueError(f"{source}: weights do not fit the network: {said}")
    network.load_state_dict(state)
