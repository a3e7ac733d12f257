"""Guidance: velocities made of several evaluations of a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sana.flow.path import align_time
from sana.types import Velocity


def cfg(
    velocity_pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    conditional: Velocity | None = None,
) -> Velocity:
    """Classifier-free guidance, ``v = u + scale (c - u)`` (Ho and Salimans 2022), within an interval of time.

    Guiding the velocity equals guiding the predicted noise or data, because both are linear in it.

    Args:
        velocity_pair: (conditional c, unconditional u) at x and t, for example from one doubled batch.
        scale: 1 is the conditional velocity, 4.5 is SANA's default.
        interval: guide where a <= t <= b (Kynkaanniemi et al. 2024) and use c elsewhere.
        conditional: c alone, called instead of the pair where no sample needs guidance: at half the cost.
            Needed only with a narrower interval or scale 1.

    Raises:
        ValueError: the interval is not 0 <= a <= b <= 1.
    """

    def guided(x: Float[Tensor, "b *s"], t: Float[Tensor, " b"]) -> tuple[Tensor, Tensor]:
        c, u = velocity_pair(x, t)
        return c, u + scale * (c - u)

    return _within(interval, guided, conditional, never=scale == 1)


def pag(
    velocity_triple: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None, Tensor]],
    scale: float,
    pag_scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    conditional: Velocity | None = None,
) -> Velocity:
    """Perturbed-attention beside classifier-free guidance, ``v = u + scale (c - u) + pag_scale (c - p)``.

    Ahn et al. 2024; p is the conditional velocity with identity attention in some layers (`Edits`). The published
    scripts act only where pag_scale is above 1 and ignore the interval; here any scale and any interval count.

    Args:
        velocity_triple: (conditional c, unconditional u, perturbed p) at x and t; u may be None if scale is
            1.
        scale: of classifier-free guidance; 1 is none.
        pag_scale: of the perturbed branch; 0 is none.
        interval, conditional: as in `cfg`.

    Raises:
        ValueError: the interval is not 0 <= a <= b <= 1, or u is None and scale not 1.
    """

    def guided(x: Float[Tensor, "b *s"], t: Float[Tensor, " b"]) -> tuple[Tensor, Tensor]:
        c, u, perturbed = velocity_triple(x, t)
        if scale == 1:
            return c, c + pag_scale * (c - perturbed)
        if u is None:
            raise ValueError(f"guidance of scale {scale} needs the unconditional velocity, got None")
        return c, u + scale * (c - u) + pag_scale * (c - perturbed)

    return _within(interval, guided, conditional, never=scale == 1 and pag_scale == 0)


def _within(
    interval: tuple[float, float],
    guided: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    conditional: Velocity | None,
    never: bool,
) -> Velocity:
    """The guided velocity inside an interval of time, the conditional one outside; guided gives (conditional, guided)
    and is not called where `conditional` will do."""
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"the guidance interval must be 0 <= a <= b <= 1, got {interval}")
    always = low == 0 and high == 1

    def velocity(x: Float[Tensor, "b *s"], t: Float[Tensor, " b"]) -> Float[Tensor, "b *s"]:
        time = align_time(t, x)
        inside = (time >= low) & (time <= high)
        if conditional is not None and (never or not (always or bool(inside.any()))):
            return conditional(x, t)
        c, v = guided(x, t)
        return v if always else torch.where(inside, v, c)

    return velocity
