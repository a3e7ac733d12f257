"""What the solvers share: the check of a grid, the precision of the state, the time as a network takes it."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor


def check_grid(grid: Float[Tensor, " k"]) -> list[float]:
    """The times of a grid as Python floats, so that step sizes are computed in float64.

    Raises:
        ValueError: the grid is not 1-D, strictly decreasing, in [0, 1], with at least two times.
    """
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"a sampling grid is 1-D with at least two times, got shape {tuple(grid.shape)}")
    times = [float(t) for t in grid.tolist()]
    if not (times[0] <= 1 and times[-1] >= 0 and all(a > b for a, b in pairwise(times))):
        raise ValueError(f"a sampling grid decreases strictly within [0, 1], got {times}")
    return times


def solver_dtype(x: Tensor) -> torch.dtype:
    """At least float32: steps near t = 1 are below the resolution of 16-bit floats."""
    return torch.promote_types(x.dtype, torch.float32)


def time_at(t: float, state: Float[Tensor, "b *s"]) -> Float[Tensor, " b"]:
    """t for every sample of the state, in the state's dtype and on its device."""
    return torch.full((state.shape[0],), t, dtype=state.dtype, device=state.device)
