"""TrigFlow, and the exact change of variables between it and the linear path.

On the circle data and noise are mixed as ``x_tau = sigma (cos(tau) x0 + sin(tau) eps)``, tau in [0, pi/2] (Lu and Song
2024, arXiv:2410.11081). Here x is what that is without sigma, the scale of the data: ``x = cos x0 + sin eps``, and a
network's field is ``F(x, tau) = E[-sin x0 + cos eps | x]``, so that ``d x / d tau = F`` on the path. A network trained
on the linear path gives F without being trained again (SANA-Sprint, arXiv:2503.09641, section 3.1):
``x_linear = x / (cos + sin)``, ``t = sin / (cos + sin)`` and ``F = ((cos - sin) x + v) / (cos + sin)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sana.flow.path import align_time


def trig_time(t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """tau in [0, pi/2] of a time t in [0, 1] of the linear path: equal shares of data and noise."""
    return torch.atan2(t, 1 - t)


def linear_time(tau: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """t in [0, 1] of a time tau in [0, pi/2], ``sin / (cos + sin)``."""
    sine, cosine = tau.sin(), tau.cos()
    return sine / (cosine + sine)


def trig(x0: Float[Tensor, "b *s"], eps: Float[Tensor, "b *s"], tau: Float[Tensor, "b *f"]) -> Float[Tensor, "b *s"]:
    """Point of the circle divided by sigma, ``cos x0 + sin eps``; x0 are latents, not sigma times latents."""
    tau = align_time(tau, x0)
    return tau.cos() * x0 + tau.sin() * eps


def trig_field(
    velocity: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Float[Tensor, "b *s"], Float[Tensor, "b *f"]], Float[Tensor, "b *s"]]:
    """The field F(x, tau) of a velocity v(x_linear, t) of the linear path. Forward-mode derivatives go through it."""

    def field(x: Tensor, tau: Tensor) -> Tensor:
        wide = align_time(tau, x)
        sine, cosine = wide.sin(), wide.cos()
        scale = 1 / (cosine + sine)
        return ((cosine - sine) * x + velocity(x * scale, linear_time(tau))) * scale

    return field


def linear_velocity(
    field: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Float[Tensor, "b *s"], Float[Tensor, "b *f"]], Float[Tensor, "b *s"]]:
    """The velocity v(x_linear, t) of a field F(x, tau): the other way of `trig_field`."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        wide = align_time(t, x)
        length = (wide.square() + (1 - wide).square()).sqrt()  # 1 / (cos + sin)
        on_circle = x / length
        return (field(on_circle, trig_time(t)) - (1 - 2 * wide) * on_circle) / length

    return velocity


def x0_from_field(
    x: Float[Tensor, "b *s"], tau: Float[Tensor, "b *f"], field: Float[Tensor, "b *s"]
) -> Float[Tensor, "b *s"]:
    """Data predicted from a point of the circle and its field, ``cos x - sin F``."""
    tau = align_time(tau, x)
    return tau.cos() * x - tau.sin() * field
