"""Which parts of a painter work by CUDA graphs."""

from __future__ import annotations

from typing import Literal

from sana.model.generate import Painter
from sana.model.graphs import DecoderGraphs, NetworkGraphs, PromptGraphs
from sana.model.text_graphs import TextGraphs


def use_graphs(painter: Painter, graphs: Literal["auto", False]) -> Painter:
    """Let a painter draw by graphs where it can: "auto" on CUDA with everything in place, False never."""
    if graphs == "auto" and painter.offload is None and painter.device.type == "cuda":
        painter.velocity, painter.prompts = NetworkGraphs(painter.network), PromptGraphs(painter.network)
        if hasattr(painter.text_encoder, "hidden"):
            painter.rows = TextGraphs(painter.text_encoder).rows
        if hasattr(painter.autoencoder, "plan"):
            painter.pixels = DecoderGraphs(painter.autoencoder)
    return painter
