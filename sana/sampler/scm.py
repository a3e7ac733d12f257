"""Sampling a consistency model in one to four steps: to the data, back to less noise, and again.

SANA-Sprint, arXiv:2503.09641; Lu and Song 2024, arXiv:2410.11081.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from sana.flow.path import linear
from sana.flow.trig import trig, x0_from_field
from sana.sampler.state import check_grid, solver_dtype, time_at
from sana.types import Velocity

_TOP = math.pi / 2 + 1e-4  # the published first time, 1.57080, lies just beyond pi/2


def scm(
    field: Callable[[Tensor, Tensor], Tensor],
    noise: Float[Tensor, "b *s"],
    grid: Float[Tensor, " k"],
    fresh: Callable[[int], Tensor],
) -> Float[Tensor, "b *s"]:
    """Data from noise: at each time the end of the path, then fresh noise up to the next time.

    Args:
        field: F(x, tau), asked once per step with x in noise's dtype and tau (b,) in at least float32.
        noise: standard normal.
        grid: decreasing times tau from `sana.flow.grid.trig_grid`; the last is 0.
        fresh: step (from 1) -> standard normal noise like `noise` that enters before it.

    Returns:
        Samples like `noise`, at the scale of the latents.

    Raises:
        ValueError: the grid does not decrease from at most pi/2 to 0.
    """
    times = [float(t) for t in grid.tolist()]
    if len(times) < 2 or not (times[0] <= _TOP and times[-1] == 0 and all(a > b for a, b in pairwise(times))):
        raise ValueError(f"a grid of scm decreases from at most pi/2 to exactly 0, got {times}")
    state = noise.to(solver_dtype(noise))
    for step, (tau, following) in enumerate(pairwise(times)):
        at = time_at(tau, state)
        x0 = x0_from_field(state, at, field(state.to(noise.dtype), at).to(state.dtype))
        state = trig(x0, fresh(step + 1).to(state), time_at(following, state)) if following > 0 else x0
    return state.to(noise.dtype)


def few_step(
    velocity: Velocity,
    noise: Float[Tensor, "b *s"],
    grid: Float[Tensor, " k"],
    fresh: Callable[[int], Tensor],
) -> Float[Tensor, "b *s"]:
    """`scm` in terms of the linear path, where the data predicted at (x, t) are ``x - t v`` and the next point is
    ``(1 - t) x0 + t eps``: the same samples, from a network as it is.

    Args:
        velocity: asked once per step with x in noise's dtype and t (b,) in at least float32.
        noise: standard normal; the state at grid[0] once it has the length of the linear path's points.
        grid: decreasing times in [0, 1] from `sana.flow.grid.few_step_grid`.
        fresh: as in `scm`.

    Raises:
        ValueError: the grid does not decrease within [0, 1], or does not end at 0.
    """
    times = check_grid(grid)
    if times[-1] != 0:
        raise ValueError(f"a few-step grid ends at exactly 0, got {times}")
    state = noise.to(solver_dtype(noise)) * math.hypot(times[0], 1 - times[0])
    for step, (t, following) in enumerate(pairwise(times)):
        x0 = state - t * velocity(state.to(noise.dtype), time_at(t, state)).to(state.dtype)
        state = linear(x0, fresh(step + 1).to(state), time_at(following, state)) if following > 0 else x0
    return state.to(noise.dtype)
