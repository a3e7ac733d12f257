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
from sana.nn.inference import LINEAR, cast_products

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
        bf16, graphs, compile: see `hasten`.

    Raises:
        ValueError: compile with offload.
    """
    painter = make_painter(module, device if offload == "none" else "cpu")
    painter.offload = None if offload == "none" else Offload(offload, device)
    painter.autocast_decoder = autoencoder == "auto"
    return hasten(painter, bf16=bf16, graphs=graphs, compile=compile)


def hasten(
    painter: Painter, *, bf16: bool, graphs: Literal["auto", False], compile: Literal[False, True, "auto"]
) -> Painter:
    """Let a painter draw the same images in less time.

    Args:
        painter: with its parts in their final types and places; changed in place.
        bf16: it draws under autocast to bf16, so the weights of blocks and decoder are cast once, not at every call.
        graphs: see `use_graphs`.
        compile: see `use_compiled`.

    Raises:
        ValueError: compile with offload.
    """
    if bf16:
        cast_products(painter.network.blocks, LINEAR, torch.bfloat16)
        if painter.autocast_decoder and isinstance(decoder := getattr(painter.autoencoder, "decoder", None), nn.Module):
            cast_products(decoder, (nn.Conv2d,), torch.bfloat16)
    return use_compiled(use_graphs(painter, graphs), compile)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: buffers such as rotary frequencies lose their meaning in 16 bits."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
