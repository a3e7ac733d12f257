"""Euler's method for the probability-flow ODE ``dx / dt = v(x, t)``."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from sana.sampler.state import check_grid, solver_dtype, time_at
from sana.types import Velocity


def euler(velocity: Velocity, x: Float[Tensor, "b *s"], grid: Float[Tensor, " k"]) -> Float[Tensor, "b *s"]:
    """Integrate from ``grid[0]`` to ``grid[-1]`` with ``x <- x + (t' - t) v(x, t)``; first order.

    Args:
        velocity: called len(grid) - 1 times with x in its own dtype and t (b,) in at least float32.
        x: state at grid[0]; noise if grid[0] is (nearly) 1.
        grid: decreasing times in [0, 1], from `sana.flow.grid`.

    Returns:
        State at grid[-1], the data if that is 0; dtype of x. Between steps the state is at least float32.

    Raises:
        ValueError: the grid is not 1-D, decreasing, in [0, 1], with at least two times.
    """
    times = check_grid(grid)
    state = x.to(solver_dtype(x))
    for t, following in pairwise(times):
        v = velocity(state.to(x.dtype), time_at(t, state)).to(state.dtype)
        state = state + (following - t) * v
    return state.to(x.dtype)
