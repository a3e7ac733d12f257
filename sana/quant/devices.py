"""What a device multiplies in its own arithmetic."""

from __future__ import annotations

import torch


def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability; (0, 0) of everything else, AMD's cards included."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)
