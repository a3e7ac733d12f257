"""What a network meets while it draws, given again to another network in its place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sana.model.generate import Painter
from sana.sampler.guided import Sampler


class Probe:
    """Draws prompts with the network it is given; (network) -> its outputs at all calls, one after the other.

    The first network draws freely, and what it is asked at is remembered. Every later one is asked at the same points
    instead of its own, so that outputs are compared one by one and no error of a step is carried into the next.
    Captions and times are embedded by the network itself.

    Args:
        painter: whose text encoder, autoencoder and device are used.
        sampler: how to draw.
        prompts, seeds: of equal length; one batch.
        size: pixels of a side.
        batch: prompts per call of the network.
    """

    def __init__(
        self, painter: Painter, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], size: int, batch: int
    ) -> None:
        self.painter, self.sampler, self.size = painter, sampler, size
        self.prompts, self.seeds, self.batch = list(prompts), list(seeds), batch
        self._points: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> Tensor:
        """Its outputs, float32."""
        known, met, outputs = self._points, [], []

        def before(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            x = known[len(met)] if known else given[0].clone()
            met.append(x)
            return x, *given[1:]

        def after(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            outputs.append(output.float())

        hooks = [network.register_forward_pre_hook(before), network.register_forward_hook(after)]
        painter = copy.copy(self.painter)
        painter.network = network
        try:
            for start in range(0, len(self.prompts), self.batch):
                part = slice(start, start + self.batch)
                painter.latents(self.prompts[part], self.seeds[part], self.sampler, self.size, self.size)
        finally:
            for hook in hooks:
                hook.remove()
        self._points = met
        return torch.cat([output.flatten() for output in outputs])
