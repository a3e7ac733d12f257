"""Precision and place of the parts of a model that draws."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from sana.model.compile_gate import use_compiled
from sana.model.generate import Painter
from sana.model.load import make_painter
from sana.model.offload import Offload
from sana.model.text_to_image import TextToImage
from sana.model.use_graphs import use_graphs
from sana.nn.inference import cast_once

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
    *,
    bf16: bool = False,
    graphs: Literal["auto", False] = False,
    compile: Literal[False, True, "auto"] = False,
) -> Painter:
    """A painter whose parts are on the device, or come to it when they work.

    Args:
        module: with its weights.
        device: where the work is done.
        offload: see `Offload`; "none": everything is on the device.
        autoencoder: its dtype; "auto": it runs under a surrounding autocast too.
        bf16: work is done under autocast to bf16, so what it would cast at every call is cast once, before it is moved.
        graphs: see `use_graphs`.
        compile: see `use_compiled`.

    Raises:
        ValueError: compile with offload.
    """
    if bf16:
        cast_once(module.network, module.frozen.autoencoder if autoencoder == "auto" else None)
    painter = make_painter(module, device if offload == "none" else "cpu")
    painter.offload = None if offload == "none" else Offload(offload, device)
    painter.autocast_decoder = autoencoder == "auto"
    return use_compiled(use_graphs(painter, graphs), compile)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: buffers such as rotary frequencies lose their meaning in 16 bits."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
