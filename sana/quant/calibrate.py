"""What layers are given while a network works, for formats that are fitted to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sana.quant.conv_linear import is_pointwise

Run = Callable[[nn.Module], Any]
"""Makes a network work on what it is to be calibrated with; what it returns is not looked at."""

PER_CALL = 64  # tokens kept of each call of a layer


@dataclass
class Activations:
    """Inputs of a layer over all its calls.

    Attributes:
        rows: (n, k) float32, tokens drawn evenly over the calls.
        largest: (k,) float32, max |x| of each channel over all tokens, kept or not.
    """

    rows: Tensor
    largest: Tensor


@dataclass
class _Seen:
    kept: list[Tensor] = field(default_factory=list)
    largest: Tensor | None = None


@torch.no_grad()
def collect(network: nn.Module, run: Run, rows: int = 1024, seed: int = 0) -> dict[str, Activations]:
    """Inputs of every linear layer and 1x1 convolution that a run reaches, by name.

    Args:
        network: as it is; nothing of it changes. It may be of fake tensors, to plan memory: what is found then has
            shapes alone, and nothing is looked at for being finite.
        run: (network) -> anything.
        rows: at most so many tokens are kept of each layer.
        seed: of the choice of tokens, which depends on nothing else.

    Raises:
        ValueError: numbers that are not finite; the message has the layer.
    """
    if rows < 1:
        raise ValueError(f"rows: {rows} tokens per layer; expected at least 1")
    seen: dict[str, _Seen] = {}

    def watch(name: str, conv: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            x = given[0].detach()
            x = (x.movedim(-3, -1) if conv else x).flatten(0, -2).float()
            found = seen.setdefault(name, _Seen())
            largest = x.abs().amax(dim=0)
            if not isinstance(largest, FakeTensor) and not largest.isfinite().all():
                raise ValueError(f"calibration: {name} is given numbers that are not finite")
            found.largest = largest if found.largest is None else torch.maximum(found.largest, largest)
            found.kept.append(_some(x, PER_CALL, seed + len(found.kept)))

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name, isinstance(module, nn.Conv2d)))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or is_pointwise(module)
    ]
    try:
        run(network)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name in list(seen):
        layer = seen.pop(name)  # so that what is dropped of a layer is gone before the next
        assert layer.largest is not None
        found[name] = Activations(_some(torch.cat(layer.kept), rows, seed), layer.largest)
    return found


def _some(x: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` rows, in order; the same ones on every device."""
    if len(x) <= count:
        return x
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return x[chosen.to(x.device)]
