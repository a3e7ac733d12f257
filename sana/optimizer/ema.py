"""Exponential moving average of a module's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sana.optimizer.local import local


class EMA:
    """``shadow <- d shadow + (1 - d) parameter`` after each update, in float32 or better.

    The decay warms up, ``d = min(decay, (1 + n) / (10 + n))`` at update n = 1, 2, ..., so that the average
    forgets the initial weights; without warm-up it is `decay` from the first. Only parameters that require a
    gradient are averaged: the others do not change, nor are buffers followed. Sharded parameters have sharded
    shadows, so nothing is gathered; make the EMA after sharding.

    Args:
        module: whose parameters are followed; it is not copied or owned.
        decay: in [0, 1); the average looks back over some 1 / (1 - decay) updates.
        warmup: whether the decay warms up.

    Raises:
        ValueError: decay is outside [0, 1), or the module has nothing to train.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of an EMA is in [0, 1), got {decay}")
        self.module = module
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.shadow = {name: _widened(p) for name, p in self._followed()}
        if not self.shadow:
            raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient; nothing to average")
        self._applied = False

    def _followed(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _parameters(self) -> list[Tensor]:
        """The live parameters in the order of the shadow, as shards where the module is sharded."""
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                # After a forward without backward FSDP2 keeps its root gathered: the gathered copy would be
                # found instead of the shard, and would be stale after a swap.
                part.reshard()
        live = dict(self.module.named_parameters())
        missing = [name for name in self.shadow if name not in live]
        if missing:
            raise ValueError(f"the module no longer has the averaged parameter {missing[0]} ({len(missing)} in all)")
        return [live[name] for name in self.shadow]

    def current_decay(self) -> float:
        """Decay of the next update."""
        n = self.updates + 1
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters in; call it after each optimizer step.

        Raises:
            RuntimeError: called within `applied`, when the parameters are the average itself.
        """
        if self._applied:
            raise RuntimeError("EMA.update within EMA.applied would average the average; leave the context first")
        weight = 1 - self.current_decay()
        shadow = [local(s) for s in self.shadow.values()]
        live = [local(p).to(s.dtype) for p, s in zip(self._parameters(), shadow, strict=True)]
        torch._foreach_lerp_(shadow, live, weight)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the module computes with the average (rounded to its dtype), then as before.

        Raises:
            RuntimeError: the contexts are nested.
        """
        if self._applied:
            raise RuntimeError("EMA.applied is already in effect; it does not nest")
        with torch.no_grad():
            live = [local(p) for p in self._parameters()]
            kept = [p.clone() for p in live]
            torch._foreach_copy_(live, [local(s) for s in self.shadow.values()])
        self._applied = True
        try:
            yield
        finally:
            self._parameters()  # drops what a forward within the context has gathered
            with torch.no_grad():
                torch._foreach_copy_(live, kept)
            self._applied = False

    def state_dict(self) -> dict[str, Any]:
        """``{"updates": int, "shadow": {name: tensor}}``; the tensors are the live ones, not copies."""
        return {"updates": self.updates, "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly from `state_dict`.

        Raises:
            ValueError: a parameter is missing, extra, or of another shape; the message names the first.
        """
        theirs = state["shadow"]
        for name in [*self.shadow, *theirs]:
            if name not in theirs:
                raise ValueError(f"the EMA state lacks the parameter {name}")
            if name not in self.shadow:
                raise ValueError(f"the EMA state has {name}, which the module does not train")
            if theirs[name].shape != self.shadow[name].shape:
                raise ValueError(
                    f"the EMA state has {name} of shape {tuple(theirs[name].shape)}, "
                    f"the module {tuple(self.shadow[name].shape)}"
                )
        for name, value in self.shadow.items():
            value.copy_(theirs[name])
        self.updates = int(state["updates"])


def _widened(p: Tensor) -> Tensor:
    return p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
