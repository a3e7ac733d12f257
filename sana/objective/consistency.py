"""Continuous-time consistency (sCM): a field learns where the whole path of its teacher ends.

Lu and Song 2024, arXiv:2410.11081; SANA-Sprint, arXiv:2503.09641, section 3.2. The consistency function is
``f(x, tau) = cos(tau) x - sin(tau) F(x, tau)``, constant along the teacher's path ``dx / dtau = G(x, tau)``. With x
divided by sigma, the scale of the data (see `sana.flow.trig`), the published tangent is::

    g = sigma (-cos^2 (F - G) - r (cos sin x + cos sin dF/dtau)),

which for r = 1 is ``sigma cos df / dtau``; r grows from 0 to 1 over the first updates.

The semi-discrete form compares ends instead: f at tau with f a step nearer to the data, where one step along the
teacher's path leads (consistency distillation, Song et al. 2023, arXiv:2303.01469, on the circle). It needs no
derivative, and the step's length leaves an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sana.flow.path import align_time
from sana.flow.trig import trig, x0_from_field

SIGMA = 0.5
"""Scale of the data in the published losses."""


def consistency_tangent(
    field: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "b c f h w"],
    tau: Float[Tensor, "b f"],
    teacher: Float[Tensor, "b c f h w"],
    warmup: float = 1.0,
    *,
    sigma: float = SIGMA,
    floor: float = 0.1,
) -> Float[Tensor, "b c f h w"]:
    """The direction in which the student's field is moved, of length below 1 per frame; without gradients.

    Args:
        field: the student (x, tau) -> F; forward-mode derivatives must go through it.
        x: points of the circle, ``cos x0 + sin eps``.
        tau: in (0, pi/2].
        teacher: G at these points, with guidance.
        warmup: r in [0, 1].
        sigma: scale of the data.
        floor: added to the norm by which the tangent is divided (over c, h and w).
    """
    wide = align_time(tau, x)
    sine, cosine = wide.sin(), wide.cos()
    with torch.no_grad():
        # The factor cos sin stands in the directions, not outside: near pi/2 the derivative itself has no bound.
        directions = (cosine * sine * teacher, tau.cos() * tau.sin())
        student, slope = torch.func.jvp(field, (x, tau), directions)[:2]
        g = sigma * (-(cosine**2) * (student - teacher) - warmup * (cosine * sine * x + slope))
        return g / (g.square().sum(dim=(1, 3, 4), keepdim=True).sqrt() + floor)


def tangent_norm(tangent: Float[Tensor, "b c f h w"], *, floor: float = 0.1) -> Float[Tensor, "b f"]:
    """Length that a tangent of `consistency_tangent` had before it was normalised; `floor` as there."""
    length = tangent.square().sum(dim=(1, 3, 4)).sqrt()
    return floor * length / (1 - length).clamp_min(torch.finfo(length.dtype).eps)


def consistency(
    student: Float[Tensor, "b c f h w"],
    tangent: Float[Tensor, "b c f h w"],
    tau: Float[Tensor, "b f"],
    logvar: Float[Tensor, "b f"] | None = None,
    *,
    sigma: float = SIGMA,
) -> Float[Tensor, "b f"]:
    """Losses per frame, ``mean of w / exp(logvar) (F - sg(F) - g)^2 + logvar`` with ``w = 1 / (sigma tan(tau))``.

    Only its gradient means something: that of F is ``-2 w / exp(logvar) g``.

    Args:
        student: F with gradients.
        tangent: g of `consistency_tangent`.
        tau: in (0, pi/2].
        logvar: learned logarithm of each sample's variance, which evens the times out; None: 0.
        sigma: scale of the data.
    """
    weight = 1 / (sigma * tau.tan())
    error = (student - student.detach() - tangent).square().mean(dim=(1, 3, 4))
    if logvar is None:
        return weight * error
    return weight * torch.exp(-logvar) * error + logvar


@torch.no_grad()
def semi_discrete_end(
    field: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "b c f h w"],
    tau: Float[Tensor, "b f"],
    teacher: Float[Tensor, "b c f h w"],
    step: float,
) -> Float[Tensor, "b c f h w"]:
    """Where the student ends from a step nearer to the data; from the data's side of the last step, the data that the
    teacher predicts.

    Args:
        field, x, tau, teacher: as in `consistency_tangent`; a derivative is not taken.
        step: angle, in (0, pi/2); the step is exact where the teacher's prediction of data and noise is constant.
    """
    wide = align_time(tau, x)
    x0, eps = x0_from_field(x, tau, teacher), wide.sin() * x + wide.cos() * teacher
    nearer = (tau - step).clamp_min(0)
    there = trig(x0, eps, nearer)
    return x0_from_field(there, nearer, field(there, nearer))


def semi_discrete(
    end: Float[Tensor, "b c f h w"],
    target: Float[Tensor, "b c f h w"],
    logvar: Float[Tensor, "b f"] | None = None,
    *,
    floor: float = 0.00054,
) -> Float[Tensor, "b f"]:
    """Losses per frame, ``2 (|f - f'| - c) / n`` with c added to the length in quadrature: times differ in length, and
    all count alike, as they do by the continuous form, whose tangents are divided by theirs. Song and Dhariwal 2023,
    arXiv:2310.14189, equation 7 (pseudo-Huber).

    Args:
        end: ``cos x - sin F`` with gradients, n numbers per frame.
        target: of `semi_discrete_end`.
        logvar: learned logarithm of each sample's variance; None: 0.
        floor: c for a frame of one number; it grows with the root of n.
    """
    n = end[0, :, 0].numel()
    c = floor * math.sqrt(n)
    length = ((end - target).square().sum(dim=(1, 3, 4)) + c**2).sqrt() - c
    error = 2 / n * length
    return error if logvar is None else error * torch.exp(-logvar) + logvar
