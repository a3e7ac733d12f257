"""Parts of a model that visit their device only while they work, for cards that cannot hold all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Place = tuple[dict[str, Any], str]  # a module's dictionary of parameters or buffers, and a name in it


class Offload:
    """Brings weights to a device and drops them there afterwards; what stays at home is never copied back.

    Args:
        mode: "model": a part comes as a whole, one part at a time. "sequential": of what lies in its lists of layers,
            one linear layer, convolution or norm at a time: the least memory, and every forward pass waits for the bus.
        device: where the work is done.
        fetch: (tensor) -> its copy on the device.
    """

    def __init__(
        self,
        mode: Literal["model", "sequential"],
        device: torch.device | str,
        fetch: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if mode not in ("model", "sequential"):
            raise ValueError(f"offload must be 'model' or 'sequential', got {mode!r}")
        self.mode, self.device = mode, torch.device(device)
        self._fetch = fetch or (lambda tensor: tensor.to(self.device, non_blocking=True))
        self._used: set[int] = set()

    @contextmanager
    def use(self, module: nn.Module) -> Iterator[None]:
        """Inside, the module works on the device. Uses may nest; the outermost counts."""
        if id(module) in self._used:
            yield
            return
        streamed = set(_listed_leaves(module)) if self.mode == "sequential" else set()
        resident = [place for part in module.modules() if part not in streamed for place in _places(part)]
        self._used.add(id(module))
        hooks = [hook for leaf in streamed for hook in self._stream(leaf)]
        homes = self._bring(resident)
        try:
            yield
        finally:
            _return(homes)
            for hook in hooks:
                hook.remove()
            self._used.discard(id(module))

    def _stream(self, leaf: nn.Module) -> list[Any]:
        """Hooks that fetch a layer for the time of its forward pass."""
        homes: list[tuple[Place, Tensor]] = []

        def before(*_: Any) -> None:
            homes.extend(self._bring(_places(leaf)))

        def after(*_: Any) -> None:
            _return(homes)
            homes.clear()

        return [leaf.register_forward_pre_hook(before), leaf.register_forward_hook(after, always_call=True)]

    def _bring(self, places: list[Place]) -> list[tuple[Place, Tensor]]:
        """Put copies on the device in place of the tensors, which are returned; shared ones are copied once."""
        homes, copies = [], {}
        for place in places:
            holder, name = place
            tensor = holder[name]
            if isinstance(tensor, nn.Parameter):
                if id(tensor) not in copies:
                    homes.append((place, tensor.data))
                    copies[id(tensor)] = tensor
                    tensor.data = self._fetch(tensor.data)
            else:
                homes.append((place, tensor))
                holder[name] = self._fetch(tensor)
        return homes


def _return(homes: list[tuple[Place, Tensor]]) -> None:
    for (holder, name), tensor in homes:
        if isinstance(holder[name], nn.Parameter):
            holder[name].data = tensor
        else:
            holder[name] = tensor


def _places(module: nn.Module) -> list[Place]:
    """The module's own parameters and buffers, not its children's."""
    holders: tuple[dict[str, Any], dict[str, Any]] = (module._parameters, module._buffers)
    return [(holder, name) for holder in holders for name, tensor in holder.items() if tensor is not None]


def _listed_leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Modules without children below any list of modules: layers of blocks, which are many and alike."""
    for part in module.modules():
        if isinstance(part, nn.ModuleList | nn.Sequential):
            for inner in part.modules():
                if not list(inner.children()):
                    yield inner
