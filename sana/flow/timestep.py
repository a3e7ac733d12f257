"""Distributions of the training timestep, as inverse CDFs of a uniform number.

Nothing here draws: the caller passes u from `sana.ops.random` (`uniform`, or `spread` for timesteps that
cover every batch evenly), so the same sample gets the same timestep on any number of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor


@overload
def shift(t: float, s: float) -> float: ...
@overload
def shift(t: Float[Tensor, "..."], s: float) -> Float[Tensor, "..."]: ...
def shift(t: float | Float[Tensor, "..."], s: float) -> float | Float[Tensor, "..."]:
    """Move time towards noise, ``s t / (1 + (s - 1) t)`` (Esser et al. 2024, eq. 23); ``shift(., 1 / s)``
    undoes it.

    Args:
        t: times in [0, 1]; 0 and 1 stay.
        s: flow shift, > 0; 3 at 512 and 1024 pixels, 6 at 4096.

    Raises:
        ValueError: s is not positive.
    """
    if not s > 0:
        raise ValueError(f"the flow shift must be positive, got {s}")
    return s * t / (1 + (s - 1) * t)


def _check(shift: float, steps: int | None) -> None:
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"the flow shift must be positive, got {shift}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be a positive number of time levels, or None for continuous time, got {steps}")


def _place(t: Float[Tensor, "*s"], shift_by: float, steps: int | None) -> Float[Tensor, "*s"]:
    """Put t on the lattice i / steps, if there is one, then shift."""
    if steps is not None:
        t = torch.floor(t * steps).clamp(max=steps - 1) / steps
    return shift(t, shift_by)


@dataclass(frozen=True)
class LogitNormal:
    """``t = shift(sigmoid(mean + std n))`` with n standard normal (Esser et al. 2024, section 3.1).

    Attributes:
        mean, std: of the logit of t before the shift; std > 0.
        shift: flow shift.
        steps: None for continuous time. SANA's published training has 1000: t before the shift is floored
            to i / 1000, i = 0 ... 999 (its network floors 1000 t too: the network's `floor_time`).
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std of a logit-normal timestep must be positive, got {self.std}")
        _check(self.shift, self.steps)

    def __call__(self, u: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Map u in [0, 1) to t in (0, 1], or to the levels; dtype of u. u = 0 is read as 2^-25."""
        # Uniform float32 numbers are multiples of 2^-24: half a multiple keeps t off the exact end.
        n = torch.special.ndtri(u.to(torch.float64).clamp(2.0**-25, 1 - 2.0**-25))
        t = torch.sigmoid(self.mean + self.std * n)
        return _place(t, self.shift, self.steps).to(u.dtype)


@dataclass(frozen=True)
class Uniform:
    """``t = shift(u)``; attributes as in `LogitNormal`."""

    shift: float = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        _check(self.shift, self.steps)

    def __call__(self, u: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Map u in [0, 1) to t in [0, 1], dtype of u, whose rounding may reach 1."""
        return _place(u.to(torch.float64), self.shift, self.steps).to(u.dtype)


@dataclass(frozen=True)
class TrigLogNormal:
    """``tau = atan(exp(mean + std n) / sigma)``, n standard normal (SANA-Sprint): times of TrigFlow in (0, pi/2].

    Attributes:
        mean, std: of the logarithm of the noise beside data of scale sigma; published 0.2 and 1.6 for the consistency
            loss, -0.6 and 1.0 for what the discriminator sees.
        sigma: published 0.5.
        largest: probability that the time is `top` instead, one evaluation's own start; published 0.5 in the
            adversarial losses.
        top: that time.
    """

    mean: float = 0.2
    std: float = 1.6
    sigma: float = 0.5
    largest: float = 0.0
    top: float = 1.57080

    def __post_init__(self) -> None:
        if not (self.std > 0 and self.sigma > 0):
            raise ValueError(f"std and sigma must be positive, got {self.std} and {self.sigma}")
        if not 0 <= self.largest <= 1:
            raise ValueError(f"largest is a probability, got {self.largest}")

    def __call__(self, u: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Map u in [0, 1) to tau, dtype of u: the upper `largest` of the unit interval to `top`."""
        wide = u.to(torch.float64)
        rest = (wide / max(1 - self.largest, 2.0**-25)).clamp(2.0**-25, 1 - 2.0**-25)
        tau = torch.atan(torch.exp(self.mean + self.std * torch.special.ndtri(rest)) / self.sigma)
        return torch.where(wide >= 1 - self.largest, torch.full_like(tau, self.top), tau).to(u.dtype)
