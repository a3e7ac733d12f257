"""What a machine could do at best: its measured rates, and the time that work of given size takes at them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Per pixel, DC-AE f32c32; both are counts of multiply-adds times two over the layers of the published configuration.
DECODE_FLOPS = 7.98e6
ACTIVATIONS = 40  # values per token, channel and layer that a forward reads or writes when all that can be is fused


@dataclass(frozen=True)
class Rates:
    """Attributes: flops, per second, of a large square matrix product; bytes, read and written per second by a copy."""

    flops: float
    bytes: float

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for work of so many operations and bytes."""
        return max(flops / self.flops, moved / self.bytes)


def measure_rates(device: torch.device, dtype: torch.dtype, side: int = 2048, megabytes: int = 256) -> Rates:
    """Best of five of each.

    Args:
        device, dtype: of the matrices.
        side: of the matrices.
        megabytes: that are copied; more than the caches hold.
    """
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    product = best_of(5, lambda: a @ b, device)
    copy = best_of(5, lambda: target.copy_(source), device)
    return Rates(2 * side**3 / product, 2 * source.numel() * source.element_size() / copy)


def best_of(repeats: int, run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of so many runs, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def denoiser_bytes(parameters: int, tokens: int, width: int, depth: int, batch: int, itemsize: int) -> float:
    """Least traffic of one forward: the weights once, the activations of every layer."""
    return itemsize * (parameters + ACTIVATIONS * tokens * width * depth * batch)
