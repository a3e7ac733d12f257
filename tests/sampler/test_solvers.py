"""Euler and flow_dpm against closed forms, their orders of convergence, and diffusers' schedulers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import solve_ivp

from sana.flow.grid import dpm_grid, euler_grid, uniform_grid
from sana.sampler.euler import euler
from sana.sampler.flow_dpm import flow_dpm

MEAN, STD = 0.7, 0.4


def gaussian(x, t):
    """The exact velocity where data are N(MEAN, STD^2): E[eps - x0 | xt = x]."""
    t = t.reshape(-1, *(1,) * (x.ndim - 1))
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def exact_flow(x: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """Solution of dx/dt = gaussian(x, t): the standardised value is kept."""

    def std(t):
        return math.sqrt((1 - t) ** 2 * STD**2 + t**2)

    return (1 - end) * MEAN + std(end) / std(start) * (x - (1 - start) * MEAN)


def wavy(x, t):
    """A smooth non-linear field without closed form."""
    t = t.reshape(-1, *(1,) * (x.ndim - 1))
    return torch.sin(3 * x + 2 * t) + 0.5 * x * t


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solve_dpm_1(velocity, x, grid):
    return flow_dpm(velocity, x, grid, order=1)


def test_the_closed_form_solves_the_field():
    x = torch.tensor([[-1.3]], dtype=torch.float64)

    def field(t, y):
        return gaussian(torch.from_numpy(y)[None], torch.tensor([t])).numpy()[0]

    solution = solve_ivp(field, (1, 0), [-1.3], rtol=1e-10, atol=1e-12)
    assert solution.y[0, -1] == pytest.approx(exact_flow(x, 1.0, 0.0).item(), abs=1e-8)


@pytest.mark.parametrize("solver", [euler, solve_dpm_1, flow_dpm])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_single_data_point_is_reached_exactly_by_dpm_and_euler(solver, seed):
    """If all data are one point, x0 = x - t v is that point at any time, and the flow is a straight line."""
    point = noise(3, 2, 5, 7, seed=seed + 10)

    def velocity(x, t):
        return (x - point) / t.reshape(-1, 1, 1, 1)

    for steps in (1, 2, 5):
        got = solver(velocity, noise(3, 2, 5, 7, seed=seed), dpm_grid(steps, 3.0))
        torch.testing.assert_close(got, point, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (solve_dpm_1, 1), (flow_dpm, 2)])
def test_order_of_convergence_on_the_gaussian(solver, order):
    x = noise(50)[:, None]
    # Not to t = 0, where log-SNR is infinite. The last step of dpm is of first order: it is kept of size h^2.
    errors = []
    for n in (20, 40, 80, 160):
        times = torch.linspace(0.95, 0.05, n + 1, dtype=torch.float64)
        if order == 2:
            end = times[-1] - (0.9 / n) ** 2
            times = torch.cat([times, end[None]])
        got = solver(gaussian, x, times)
        errors.append((got - exact_flow(x, 0.95, times[-1].item())).abs().max().item())
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert rates[-1] == pytest.approx(order, abs=0.15), (errors, rates)


@pytest.mark.parametrize("solver", [euler, flow_dpm])
@pytest.mark.parametrize("grid", [dpm_grid, euler_grid, uniform_grid])
def test_samples_approach_the_data_distribution(solver, grid):
    x = noise(2000)[:, None]
    expected = exact_flow(x, 1.0, 0.0)
    errors = {n: (solver(gaussian, x, grid(n, 3.0)) - expected).abs().mean().item() for n in (20, 200)}
    assert errors[200] < 0.3 * errors[20]
    assert errors[20] < 0.1
    assert errors[200] < 0.01


def test_second_order_beats_first_order_at_twenty_steps():
    x = noise(2000)[:, None]
    grid = dpm_grid(20, 3.0)
    expected = exact_flow(x, grid[0].item(), 0.0)
    first, second = ((flow_dpm(gaussian, x, grid, order=k) - expected).abs().mean() for k in (1, 2))
    assert second < 0.45 * first


def diffusers_dpm(velocity, x, steps, shift, order):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        final_sigmas_type="zero",
        solver_order=order,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
    )
    scheduler.set_timesteps(steps)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        # Its timesteps are truncated integers; the field takes its exact sigma instead.
        v = velocity(x, sigma.to(x.dtype).expand(x.shape[0]))
        x = scheduler.step(v, timestep, x).prev_sample
    return x


@pytest.mark.parametrize("field", [gaussian, wavy])
@pytest.mark.parametrize(
    ("steps", "shift", "order"), [(20, 3.0, 2), (20, 6.0, 2), (7, 1.0, 2), (2, 3.0, 2), (5, 3.0, 1)]
)
def test_flow_dpm_follows_diffusers(field, steps, shift, order):
    x = noise(2, 3, 5, 7, seed=steps).float()
    got = flow_dpm(field, x, dpm_grid(steps, shift), order)
    # Its sigmas and lambdas are float32 tables, ours Python floats.
    torch.testing.assert_close(got, diffusers_dpm(field, x, steps, shift, order), rtol=0, atol=2e-5)


@pytest.mark.parametrize("field", [gaussian, wavy])
@pytest.mark.parametrize(("steps", "shift"), [(28, 3.0), (5, 6.0), (1, 1.0)])
def test_euler_follows_diffusers(field, steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    x = noise(2, 3, 5, 7, seed=steps).float()
    got = euler(field, x, euler_grid(steps, shift))
    for timestep in scheduler.timesteps:
        x = scheduler.step(field(x, timestep.expand(2) / 1000), timestep, x).prev_sample
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", [euler, flow_dpm])
def test_the_grid_may_begin_at_pure_noise_and_end_before_zero(solver):
    x = noise(50)[:, None]
    whole = solver(gaussian, x, torch.linspace(1.0, 0.0, 401, dtype=torch.float64))
    torch.testing.assert_close(whole, exact_flow(x, 1.0, 0.0), rtol=0, atol=5e-3)
    part = solver(gaussian, x, torch.linspace(1.0, 0.4, 401, dtype=torch.float64))
    torch.testing.assert_close(part, exact_flow(x, 1.0, 0.4), rtol=0, atol=5e-3)


@pytest.mark.parametrize("solver", [euler, flow_dpm])
def test_each_time_is_asked_once_in_order_for_every_sample(solver):
    grid, asked = dpm_grid(6, 3.0), []

    def velocity(x, t):
        asked.append(t)
        return gaussian(x, t)

    solver(velocity, noise(3, 4), grid)
    assert torch.equal(torch.stack(asked), grid[:-1, None].expand(6, 3))


@pytest.mark.parametrize("solver", [euler, flow_dpm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_network_does_not_spoil_the_state(solver, dtype):
    """The state stays float32 between steps: the error is that of the 16-bit velocities, not of the sums."""
    x = noise(500, seed=3)[:, None].to(dtype)
    seen = []

    def velocity(x, t):
        seen.append((x.dtype, t.dtype))
        return gaussian(x.float(), t).to(x.dtype)

    got = solver(velocity, x, dpm_grid(50, 3.0))
    assert got.dtype == dtype
    assert set(seen) == {(dtype, torch.float32)}
    reference = solver(gaussian, x.double(), dpm_grid(50, 3.0))
    assert (got.double() - reference).abs().max() < 5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("solver", [euler, flow_dpm])
@pytest.mark.parametrize(
    "times",
    [[0.5], [0.2, 0.8], [1.0, 0.5, 0.5, 0.0], [1.1, 0.0], [1.0, -0.1], [1.0, float("nan"), 0.0]],
    ids=str,
)
def test_bad_grids_are_refused(solver, times):
    with pytest.raises(ValueError, match="grid"):
        solver(gaussian, noise(2, 3), torch.tensor(times))


@pytest.mark.parametrize("grid", [dpm_grid, euler_grid])
def test_the_first_order_of_dpm_is_euler_on_the_linear_path(grid):
    x = noise(3, 2, 5, 7)
    torch.testing.assert_close(solve_dpm_1(wavy, x, grid(9, 3.0)), euler(wavy, x, grid(9, 3.0)))


def test_orders_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="order 1 or 2, got 3"):
        flow_dpm(gaussian, noise(2, 3), dpm_grid(4), order=3)
