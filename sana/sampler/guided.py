"""A solver, its time grid and classifier-free guidance, joined into one choice that a config can name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sana.sampler.guidance import cfg
from sana.types import Velocity


@dataclass(frozen=True)
class Sampler:
    """How noise becomes a sample.

    Attributes:
        solver: called as ``solver(velocity, noise, grid)``.
        grid: number of steps -> decreasing times from (nearly) 1 to 0, ``steps + 1`` of them.
        steps: network evaluations (twice that many with guidance).
        guidance: scale g of ``u + g (c - u)``; 1 means the conditional velocity alone.
        interval: guidance acts where ``interval[0] <= t <= interval[1]``.
    """

    solver: Callable[[Velocity, Tensor, Tensor], Tensor]
    grid: Callable[[int], Tensor]
    steps: int = 20
    guidance: float = 4.5
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampler.steps must be at least 1, got {self.steps}")

    @property
    def guided(self) -> bool:
        """Whether the unconditional velocity is needed at all."""
        return self.guidance != 1.0

    def __call__(
        self,
        conditional: Velocity,
        pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        noise: Tensor,
    ) -> Tensor:
        """Integrate from noise (b, ...) at t = 1 to a sample like it at t = 0.

        Args:
            conditional: velocity under the prompts; used alone where guidance does not act.
            pair: (x, t) -> (conditional, unconditional) velocities, in one network call where that pays.
            noise: standard normal.
        """
        times = self.grid(self.steps).to(noise.device)
        low, high = self.interval
        velocity = cfg(pair, self.guidance, (low, high), conditional) if self.guided else conditional
        return self.solver(velocity, noise, times)
