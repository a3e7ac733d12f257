"""Frozen encoders as caches need them: a function, and a digest of everything that its results depend on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from sana.data.caching import Encoding


def encode_latents(autoencoder: Any, device: torch.device | str) -> Encoding:
    """Images (b, 3, H, W) in [-1, 1] -> scaled latents (b, c, h, w), by an autoencoder that lies on a device."""

    def encode(images: Tensor) -> Tensor:
        with torch.no_grad():
            return autoencoder.encode(images.to(device))

    return Encoding(encode, type(autoencoder).__name__, digest(autoencoder))


def encode_captions(encoder: Any) -> Encoding:
    """Captions -> features of each one's own tokens, (l, c)."""
    template = {name: getattr(encoder, name, None) for name in ("instruction", "max_tokens", "lowercase", "strip")}
    return Encoding(encoder.rows, type(encoder).__name__, digest(encoder), json.dumps(template, sort_keys=True))


def digest(module: nn.Module) -> str:
    """SHA-256 of a module's structure and weights."""
    found = hashlib.sha256(str(module).encode())
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode() + str(value.dtype).encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
