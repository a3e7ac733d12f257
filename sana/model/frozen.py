"""Parts that take part in a step but are never trained: encoders, teachers, reference policies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from sana.model.offload import Offload

Place = Literal["device", "cpu", "offload"]


class Frozen:
    """Holds frozen modules outside the owner's module tree.

    Not an `nn.Module` on purpose: what it holds is in no state dict, no EMA and no optimizer, and DDP or FSDP does not
    wrap it. Modules are put into eval mode and their gradients are switched off.

    Args:
        place: where they are: on the "device"; on the "cpu", where they also work; or on the CPU and, one at a time and
            only while it works, on the device ("offload").
        modules: by name; None is left out.

    Raises:
        ValueError: there is no such place.
    """

    def __init__(self, place: Place = "device", /, **modules: nn.Module | None) -> None:
        if place not in ("device", "cpu", "offload"):
            raise ValueError(f"frozen must be 'device', 'cpu' or 'offload', got {place!r}")
        self.place = place
        self.offload: Offload | None = None
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
        """Move every module to a device, keeping its dtype; or remember the device, where modules stay on the CPU."""
        for module in self._modules.values():
            module.to(device if self.place == "device" else "cpu")
        if self.place != "device":
            self.offload = Offload("model", device)
        return self

    @contextmanager
    def working(self, name: str, device: torch.device) -> Iterator[tuple[Any, torch.device]]:
        """A module, and where its inputs have to be, for as long as the context lasts.

        Args:
            name: of the module.
            device: that of the run.
        """
        module = self._modules[name]
        if self.place == "offload" and self.offload is not None:
            with self.offload.use(module):
                yield module, self.offload.device
        else:
            yield module, torch.device("cpu") if self.place == "cpu" else device
