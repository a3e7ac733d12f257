"""DPM-Solver++ for the linear path: multistep, data prediction, midpoint form.

Lu et al. 2022, "DPM-Solver++" (2M), with ``alpha = 1 - t``, ``sigma = t``, ``lambda = log(alpha / sigma)``,
as SANA's Flow-DPM-Solver. The data prediction is taken from the velocity, ``x0 = x - t v``; the published
code goes through the noise instead, which loses all digits near t = 1 in 16 bits.
"""

from __future__ import annotations

import math
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from sana.sampler.state import check_grid, solver_dtype, time_at
from sana.types import Velocity


def flow_dpm(
    velocity: Velocity, x: Float[Tensor, "b *s"], grid: Float[Tensor, " k"], order: int = 2
) -> Float[Tensor, "b *s"]:
    """Integrate from ``grid[0]`` to ``grid[-1]``; the first and the last step are of first order.

    Args:
        velocity: called len(grid) - 1 times with x in its own dtype and t (b,) in at least float32.
        x: state at grid[0]; noise if grid[0] is (nearly) 1.
        grid: decreasing times in [0, 1], from `sana.flow.grid`; it may begin at exactly 1 and end at exactly
            0.
        order: 2, or 1, which on this path is Euler's method.

    Returns:
        State at grid[-1], the data if that is 0; dtype of x. Between steps the state is at least float32.

    Raises:
        ValueError: order is not 1 or 2, or the grid is not decreasing in [0, 1].
    """
    if order not in (1, 2):
        raise ValueError(f"flow_dpm has order 1 or 2, got {order}")
    times = check_grid(grid)
    state = x.to(solver_dtype(x))
    previous: tuple[float, Tensor] | None = None
    last = len(times) - 2
    for k, (t, following) in enumerate(pairwise(times)):
        x0 = state - t * velocity(state.to(x.dtype), time_at(t, state)).to(state.dtype)
        if order == 2 and previous is not None and k < last:
            # Extrapolate the data prediction to the middle of the step in lambda: x0 + (x0 - previous) / (2 r).
            r = (_log_snr(t) - previous[0]) / (_log_snr(following) - _log_snr(t))
            target = x0 + (0.5 / r) * (x0 - previous[1])
        else:
            target = x0
        # x' = (sigma' / sigma) x - alpha' (e^-h - 1) x0. On this path the second factor is 1 - t' / t, so
        # neither end is singular, and a step of first order is one of Euler's.
        state = target + (following / t) * (state - target)
        previous = (_log_snr(t), x0)
    return state.to(x.dtype)


def _log_snr(t: float) -> float:
    """``lambda = log((1 - t) / t)``: half the logarithm of the signal-to-noise ratio; -inf at t = 1."""
    return math.log1p(-t) - math.log(t) if t < 1 else -math.inf
