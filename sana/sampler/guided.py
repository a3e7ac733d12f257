"""A solver, its time grid and guidance, joined into one choice that a config can name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sana.sampler.guidance import cfg, pag
from sana.types import Velocity


class Step(NamedTuple):
    """What a callback sees of a step.

    Attributes:
        index: of the step, counted from 0.
        steps: how many there are.
        t: its time, from (nearly) 1 down.
        x0: (b, ...) the sample as predicted at this step, ``x - t v`` with the guided velocity; float32.
    """

    index: int
    steps: int
    t: float
    x0: Tensor


OnStep = Callable[[Step], None]
Fresh = Callable[[int], Tensor]
"""Step (from 1) -> standard normal noise like the first, for samplers that add some before that step."""


@dataclass(frozen=True)
class Sampler:
    """How noise becomes a sample.

    Attributes:
        solver: called as ``solver(velocity, noise, grid)``; it asks for the velocity once per step.
        grid: number of steps -> decreasing times from (nearly) 1 to 0, ``steps + 1`` of them.
        steps: network evaluations (twice that many with guidance, three times with both kinds).
        guidance: scale g of ``u + g (c - u)``; 1 means the conditional velocity alone.
        interval: guidance of both kinds acts where ``interval[0] <= t <= interval[1]``.
        pag_scale: scale of perturbed-attention guidance; 0 is none. The published app has 2 to 3.
        pag_layers: layers whose self-attention is perturbed; None takes that of the network's size, see
            `sana.model.generate.pag_layers`.
        floor: round t * 1000 down to an integer (True: as in the published sampling with Flow-DPM) or not (False: as
            diffusers' Euler); None: as the network was trained.
    """

    solver: Callable[..., Tensor]
    grid: Callable[[int], Tensor]
    steps: int = 20
    guidance: float = 4.5
    interval: tuple[float, float] = (0.0, 1.0)
    pag_scale: float = 0.0
    pag_layers: list[int] | None = None
    floor: bool | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampler.steps must be at least 1, got {self.steps}")
        if self.pag_scale < 0:
            raise ValueError(f"sampler.pag_scale must be 0 (none) or positive, got {self.pag_scale}")
        if self.pag_layers is not None and not self.pag_layers:
            raise ValueError("sampler.pag_layers names no layer; sampler.pag_scale=0 switches the guidance off")

    @property
    def guided(self) -> bool:
        """Whether the unconditional velocity is needed at all."""
        return self.guidance != 1.0

    @property
    def perturbed(self) -> bool:
        """Whether the velocity with perturbed attention is needed."""
        return self.pag_scale != 0.0

    def __call__(
        self,
        conditional: Velocity,
        pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        noise: Tensor,
        perturbed: Velocity | None = None,
        on_step: OnStep | None = None,
        fresh: Fresh | None = None,
    ) -> Tensor:
        """Integrate from noise (b, ...) at t = 1 to a sample like it at t = 0, in at least float32.

        Args:
            conditional: velocity under the prompts; used alone where guidance does not act.
            pair: (x, t) -> (conditional, unconditional) velocities, in one network call where that pays.
            noise: standard normal.
            perturbed: conditional velocity with perturbed attention; needed if `self.perturbed`.
            on_step: called after the velocity of each step.
            fresh: more noise; an integration along the path needs none.

        Raises:
            ValueError: perturbed-attention guidance without the perturbed velocity; a `FewStep` without fresh noise.
        """
        velocity, grid = self._guide(conditional, pair, perturbed), self.grid(self.steps)
        if on_step is not None:
            velocity = _watched(velocity, grid.tolist(), on_step)
        return self._solve(velocity, noise.to(torch.promote_types(noise.dtype, torch.float32)), grid, fresh)

    def _solve(self, velocity: Velocity, noise: Tensor, grid: Tensor, fresh: Fresh | None) -> Tensor:
        return self.solver(velocity, noise, grid)

    def _guide(
        self,
        conditional: Velocity,
        pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        perturbed: Velocity | None,
    ) -> Velocity:
        low, high = self.interval
        if not self.perturbed:
            return cfg(pair, self.guidance, (low, high), conditional) if self.guided else conditional
        if perturbed is None:
            raise ValueError(f"sampler.pag_scale is {self.pag_scale}, but no perturbed velocity is given")

        def triple(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
            c, u = pair(x, t) if self.guided else (conditional(x, t), None)
            return c, u, perturbed(x, t)

        return pag(triple, self.guidance, self.pag_scale, (low, high), conditional)


@dataclass(frozen=True)
class FewStep(Sampler):
    """A sampler that goes to the data at every step and back to less noise with fresh noise.

    Attributes:
        solver: called as ``solver(velocity, noise, grid, fresh)``, such as `sana.sampler.scm.few_step`.
        others: as in `Sampler`.
    """

    def _solve(self, velocity: Velocity, noise: Tensor, grid: Tensor, fresh: Fresh | None) -> Tensor:
        if fresh is None:
            raise ValueError("a few-step sampler adds noise at every step but the first; give fresh")
        return self.solver(velocity, noise, grid, fresh)


def _watched(velocity: Velocity, times: list[float], on_step: OnStep) -> Velocity:
    """The velocity, reporting each call; times from the grid, because reading them from a device would wait for it."""
    count = 0

    def watched(x: Tensor, t: Tensor) -> Tensor:
        nonlocal count
        v = velocity(x, t)
        on_step(Step(count, len(times) - 1, times[count], x.float() - times[count] * v.float()))
        count += 1
        return v

    return watched
