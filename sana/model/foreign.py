"""Parts of a published pipeline, built from its own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sana.checkpoint.dc_ae import open_dc_ae
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.tensors import Tensors
from sana.encoder.autoencoder.dc_ae import DCAE
from sana.model.load import fill
from sana.run.compose import compose
from sana.run.groups import list_options


def autoencoder(folder: str) -> DCAE:
    """The DC-AE in a folder that diffusers wrote (vae/ of a pipeline), in float32.

    Args:
        folder: with config.json and its safetensors.

    Raises:
        CheckpointError: another autoencoder, or weights that do not fit its configuration.
    """
    state, config = open_dc_ae(folder)
    if config is None:
        raise CheckpointError(f"{folder}: says nothing of the autoencoder's scale; give a folder of diffusers")
    with torch.device("meta"):
        model = DCAE(**config)
    fill(model, state, folder)
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def autoencoder_config(tensors: Tensors, source: str | Path) -> dict[str, Any]:
    """Arguments of `DCAE` for original weights: those of the preset in conf/encoder/autoencoder whose names and shapes
    are the same.

    Raises:
        CheckpointError: none is, or several are.
    """
    found, shapes = {}, {name: tensor.shape for name, tensor in tensors.like.items()}
    for preset in list_options("encoder/autoencoder"):
        node = compose("train", [f"encoder/autoencoder={preset}"]).resolved["encoder"]["autoencoder"]
        if node["_target_"] != "sana.encoder.autoencoder.dc_ae.DCAE":
            continue
        with torch.device("meta"):
            model = DCAE(**{key: value for key, value in node.items() if key not in ("_target_", "weights")})
        if shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}:
            found[preset] = model.config
    if len(found) != 1:
        raise CheckpointError(
            f"{source}: fits {', '.join(found) or 'no preset'} of conf/encoder/autoencoder, and its scale is in no "
            "tensor; convert a diffusers folder instead, whose config.json has it"
        )
    return next(iter(found.values()))
