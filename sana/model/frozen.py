"""Parts that take part in a step but are never trained: encoders, teachers, reference policies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Frozen:
    """Holds frozen modules outside the owner's module tree.

    Not an `nn.Module` on purpose: what it holds is in no state dict, no EMA and no optimizer, and DDP or FSDP does not
    wrap it. Modules are put into eval mode and their gradients are switched off.
    """

    def __init__(self, **modules: nn.Module | None) -> None:
        self._modules = {name: module for name, module in modules.items() if module is not None}
        for module in self._modules.values():
            module.eval().requires_grad_(False)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        raise AttributeError(f"no frozen module {name!r}; there are {sorted(modules)}")

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def to(self, device: torch.device | str) -> Frozen:
        """Move every module to a device, keeping its dtype."""
        for module in self._modules.values():
            module.to(device)
        return self
