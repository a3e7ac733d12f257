"""Few-step sampling against diffusers' scheduler and the closed form of Gaussian data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sana.flow.grid import few_step_grid, trig_grid
from sana.flow.trig import linear_velocity
from sana.sampler.guided import FewStep
from sana.sampler.scm import few_step, scm

MEAN, SPREAD = -0.3, 1.4


def end(x: Tensor, tau: Tensor) -> Tensor:
    c, s = tau.cos().view(-1, 1, 1, 1, 1), tau.sin().view(-1, 1, 1, 1, 1)
    return MEAN + SPREAD * (x - c * MEAN) / (c**2 * SPREAD**2 + s**2).sqrt()


def consistent(x: Tensor, tau: Tensor) -> Tensor:
    return (tau.cos().view(-1, 1, 1, 1, 1) * x - end(x, tau)) / tau.sin().view(-1, 1, 1, 1, 1)


def test_grids() -> None:
    assert trig_grid(1).tolist() == [1.5708, 0]
    assert trig_grid(2).tolist() == [1.5708, 1.3, 0]
    assert trig_grid(2, middle=None).tolist() == pytest.approx([1.5708, 0.7854, 0])
    assert trig_grid(4).tolist() == pytest.approx([1.5708, 1.1781, 0.7854, 0.3927, 0])
    for wrong in ({"steps": 0}, {"steps": 2, "middle": 1.6}, {"steps": 1, "first": 1.6}):
        with pytest.raises(ValueError, match=r"steps|middle|first"):
            trig_grid(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_exact_field_gives_the_data(steps: int) -> None:
    """One step is the end of the path; with more the samples keep mean and spread of the data."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(40_000, 1, 1, 1, 1, generator=g, dtype=torch.float64)
    drawn = scm(consistent, noise, trig_grid(steps), lambda _: torch.randn(noise.shape, generator=g, dtype=noise.dtype))
    if steps == 1:
        tau = torch.full((len(noise),), 1.5708, dtype=torch.float64)
        torch.testing.assert_close(drawn, end(noise, tau))
    assert drawn.mean().item() == pytest.approx(MEAN, abs=4 * SPREAD / math.sqrt(40_000))
    assert drawn.std().item() == pytest.approx(SPREAD, rel=4 / math.sqrt(80_000))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_as_diffusers_does(steps: int) -> None:
    from diffusers.schedulers.scheduling_scm import SCMScheduler

    def field(x: Tensor, tau: Tensor) -> Tensor:
        return torch.sin(2 * x) * tau.view(-1, 1, 1, 1, 1) + 0.1

    scheduler = SCMScheduler()
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    start = torch.randn(2, 4, 1, 3, 5, generator=torch.Generator().manual_seed(1))
    state, denoised, generator = start * 0.5, start, torch.Generator().manual_seed(7)
    for tau in scheduler.timesteps[:-1]:
        output = 0.5 * field(state / 0.5, tau.expand(2))
        state, denoised = scheduler.step(output, tau, state, generator=generator, return_dict=False)
    mine = torch.Generator().manual_seed(7)
    fresh = {k: torch.randn(start.shape, generator=mine) for k in range(1, steps)}
    found = scm(field, start, trig_grid(steps), fresh.__getitem__)
    torch.testing.assert_close(found, denoised / 0.5, rtol=0, atol=2e-5)


def test_wrong_grids_are_refused() -> None:
    for times in ([1.0, 0.5], [0.5, 1.0, 0.0], [2.0, 0.0], [0.0]):
        with pytest.raises(ValueError, match="decreases from at most pi/2 to exactly 0"):
            scm(consistent, torch.zeros(1, 1, 1, 1, 1), torch.tensor(times), lambda _: torch.zeros(1))


@pytest.mark.parametrize(("steps", "first"), [(1, 1.5708), (2, 1.5708), (4, 1.5708), (5, 1.2)])
def test_on_the_linear_path_the_same(steps: int, first: float) -> None:
    g = torch.Generator().manual_seed(3)
    noise = torch.randn(5, 2, 1, 3, 4, generator=g, dtype=torch.float64)
    fresh = {k: torch.randn(noise.shape, generator=g, dtype=torch.float64) for k in range(1, steps)}
    on_circle = scm(consistent, noise, trig_grid(steps, first).clamp(max=math.pi / 2), fresh.__getitem__)
    on_line = few_step(linear_velocity(consistent), noise, few_step_grid(steps, first), fresh.__getitem__)
    torch.testing.assert_close(on_line, on_circle, rtol=0, atol=1e-12)


def test_times_of_few_steps() -> None:
    t = few_step_grid(3, times=[1.5708, 1.3, 1.1])
    expected = [1.0, *(math.sin(a) / (math.sin(a) + math.cos(a)) for a in (1.3, 1.1)), 0.0]
    assert t.tolist() == pytest.approx(expected, abs=1e-12)
    assert few_step_grid(2).tolist() == pytest.approx([1.0, expected[1], 0.0], abs=1e-12)
    for times in ([1.3], [1.3, 1.5], [1.6, 1.0]):
        with pytest.raises(ValueError, match="as many decreasing numbers"):
            few_step_grid(2, times=times)
    with pytest.raises(ValueError, match="ends at exactly 0"):
        few_step(lambda x, t: x, torch.zeros(1, 2), torch.tensor([1.0, 0.5]), lambda _: torch.zeros(1))
    with pytest.raises(ValueError, match="give fresh"):
        FewStep(few_step, few_step_grid)(lambda x, t: x, lambda x, t: (x, x), torch.zeros(1, 2))
