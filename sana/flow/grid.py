"""Time grids for sampling: steps + 1 decreasing times from noise to exactly 0, float64.

All are 1-D and ready for `sana.sampler`; the network is evaluated at all times but the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from sana.flow.timestep import shift as shift_time
from sana.flow.trig import linear_time

_FIRST = 1e-3  # the smallest time level of the 1000 on which SANA was trained


def _check(steps: int, shift: float) -> None:
    if steps < 1:
        raise ValueError(f"a sampling grid needs at least one step, got steps={steps}")
    if not shift > 0:
        raise ValueError(f"the flow shift must be positive, got {shift}")


def dpm_grid(steps: int, shift: float = 1.0) -> Float64[Tensor, " k"]:
    """Grid of SANA's Flow-DPM-Solver: ``shift(k 0.999 / steps)``, k = steps ... 0; it begins just below 1.

    Args:
        steps: number of network evaluations.
        shift: flow shift; the one of training.
    """
    _check(steps, shift)
    return shift_time(torch.linspace(1.0 - _FIRST, 0.0, steps + 1, dtype=torch.float64), shift)


def euler_grid(steps: int, shift: float = 1.0) -> Float64[Tensor, " k"]:
    """Grid of the published Flow-Euler, which shifts twice: evenly from 1 to shift(0.001), shifted again, and
    0.

    This is what diffusers' FlowMatchEulerDiscreteScheduler gives, and what the published samples were made
    with. The last step, from about shift(shift(0.001)), is tiny. `uniform_grid` shifts once. Arguments as in
    `dpm_grid`.
    """
    _check(steps, shift)
    body = torch.linspace(1.0, shift_time(_FIRST, shift), steps, dtype=torch.float64)
    return torch.cat([shift_time(body, shift), body.new_zeros(1)])


def uniform_grid(steps: int, shift: float = 1.0) -> Float64[Tensor, " k"]:
    """``shift(k / steps)``, k = steps ... 0: from exactly 1 to exactly 0. Arguments as in `dpm_grid`."""
    _check(steps, shift)
    return shift_time(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), shift)


def trig_grid(steps: int, first: float = 1.57080, middle: float | None = 1.3) -> Float64[Tensor, " k"]:
    """Grid of SANA-Sprint's sampler, times tau from `first` to 0: evenly, but for two steps by way of `middle`.

    Args:
        steps: number of network evaluations.
        first: at most pi/2, which the published 1.57080 exceeds by 4e-6.
        middle: time of the second of two steps, below `first`; None: halfway. Other numbers of steps do not use it.

    Raises:
        ValueError: steps below 1, or times that do not decrease.
    """
    _check(steps, 1.0)
    if steps == 2 and middle is not None:
        if not 0 < middle < first:
            raise ValueError(f"a grid of two steps needs 0 < middle < {first}, got {middle}")
        return torch.tensor([first, middle, 0.0], dtype=torch.float64)
    if not 0 < first <= 1.5708:
        raise ValueError(f"the first time is in (0, pi/2], got {first}")
    return torch.linspace(first, 0.0, steps + 1, dtype=torch.float64)


def few_step_grid(
    steps: int, first: float = 1.57080, middle: float | None = 1.3, times: Sequence[float] | None = None
) -> Float64[Tensor, " k"]:
    """`trig_grid` in times of the linear path, from (nearly) 1 to 0: the grid of a `FewStep` sampler.

    Args:
        steps, first, middle: as in `trig_grid`; a first time beyond pi/2, as published, is taken for pi/2.
        times: the tau of every step instead, decreasing; the end, 0, is added.

    Raises:
        ValueError: as in `trig_grid`; or `times` are not as many as steps, do not decrease, or leave (0, pi/2].
    """
    if times is None:
        tau = trig_grid(steps, first, middle)
    else:
        tau = torch.tensor([*times, 0.0], dtype=torch.float64)
        if len(times) != steps or not (tau[0] <= 1.5708 and bool((tau.diff() < 0).all())):
            raise ValueError(f"times of {steps} steps are as many decreasing numbers in (0, pi/2], got {list(times)}")
    return linear_time(tau.clamp(max=math.pi / 2))
