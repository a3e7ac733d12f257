"""Precision and place of the parts of a model that draws."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from sana.model.generate import Painter
from sana.model.graphs import use_graphs
from sana.model.load import make_painter
from sana.model.offload import Offload
from sana.model.text_to_image import TextToImage

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def cast_parts(module: TextToImage, precision: str, autoencoder: str, text: str) -> None:
    """Give the parts their precision, before anything is moved or quantised.

    Args:
        module: whose parts are cast in place.
        precision: of the network; "bf16-true" casts its weights, all others leave them (see `sana.run.dtype`).
        autoencoder, text: "float32", "bfloat16", or "auto" to leave them as the recipe made them.
    """
    if precision == "bf16-true":
        _cast(module.network, torch.bfloat16)
    for part, dtype in ((module.frozen.autoencoder, autoencoder), (module.frozen.text_encoder, text)):
        if dtype != "auto":
            _cast(part, DTYPES[dtype])


def place_painter(
    module: TextToImage,
    device: torch.device,
    offload: Literal["none", "model", "sequential"] = "none",
    autoencoder: str = "auto",
    graphs: Literal["auto", False] = False,
) -> Painter:
    """A painter whose parts are on the device, or come to it when they work.

    Args:
        module: with its weights.
        device: where the work is done.
        offload: see `Offload`; "none": everything is on the device.
        autoencoder: its dtype; "auto": it runs under a surrounding autocast too.
        graphs: see `use_graphs`.
    """
    painter = make_painter(module, device if offload == "none" else "cpu")
    painter.offload = None if offload == "none" else Offload(offload, device)
    painter.autocast_decoder = autoencoder == "auto"
    return use_graphs(painter, graphs)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: buffers such as rotary frequencies lose their meaning in 16 bits."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
