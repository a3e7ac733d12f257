"""TrigFlow against closed forms: Gaussian data, whose fields are known on both paths; all in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sana.flow.path import linear, velocity_target
from sana.flow.trig import linear_time, linear_velocity, trig, trig_field, trig_time, x0_from_field

MEAN, SPREAD = 0.7, 1.8  # of every number of the data


def posterior(x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """E[x0 | x] and E[eps | x] where x = alpha x0 + sigma eps."""
    rest = (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)
    return MEAN + alpha * SPREAD**2 * rest, sigma * rest


def velocity(x: Tensor, t: Tensor) -> Tensor:
    t = t.view(-1, 1, 1)
    x0, eps = posterior(x, 1 - t, t)
    return eps - x0


def field(x: Tensor, tau: Tensor) -> Tensor:
    c, s = tau.cos().view(-1, 1, 1), tau.sin().view(-1, 1, 1)
    x0, eps = posterior(x, c, s)
    return -s * x0 + c * eps


@pytest.fixture(params=[0, 1])
def points(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(request.param)
    tau = torch.rand(7, generator=g, dtype=torch.float64) * math.pi / 2
    tau[0], tau[1] = 0.0, math.pi / 2
    return torch.randn(7, 3, 5, generator=g, dtype=torch.float64) * 2, tau


def test_times_go_both_ways() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    tau = trig_time(t)
    assert (tau[0], tau[50], tau[100]) == (0, pytest.approx(math.pi / 4, abs=1e-15), pytest.approx(math.pi / 2))
    torch.testing.assert_close(linear_time(tau), t, rtol=0, atol=1e-15)
    torch.testing.assert_close(tau, torch.tensor([math.atan2(x, 1 - x) for x in t.tolist()], dtype=torch.float64))


def test_a_teacher_becomes_a_field_exactly(points: tuple[Tensor, Tensor]) -> None:
    x, tau = points
    torch.testing.assert_close(trig_field(velocity)(x, tau), field(x, tau), rtol=0, atol=1e-13)
    x0, _ = posterior(x, tau.cos().view(-1, 1, 1), tau.sin().view(-1, 1, 1))
    torch.testing.assert_close(x0_from_field(x, tau, trig_field(velocity)(x, tau)), x0, rtol=0, atol=1e-13)


def test_and_back(points: tuple[Tensor, Tensor]) -> None:
    x, tau = points
    t = linear_time(tau)
    torch.testing.assert_close(linear_velocity(field)(x, t), velocity(x, t), rtol=0, atol=1e-13)
    torch.testing.assert_close(linear_velocity(trig_field(velocity))(x, t), velocity(x, t), rtol=0, atol=1e-13)


def test_both_paths_are_one_up_to_scale(points: tuple[Tensor, Tensor]) -> None:
    x0, tau = points
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    on_circle, t = trig(x0, eps, tau), linear_time(tau)
    scale = 1 / (tau.cos() + tau.sin()).view(-1, 1, 1)
    torch.testing.assert_close(on_circle * scale, linear(x0, eps, t), rtol=0, atol=1e-14)
    # The field of one pair is its derivative on the circle.
    derivative = torch.func.jvp(lambda at: trig(x0, eps, at), (tau,), (torch.ones_like(tau),))[1]
    pair = trig_field(lambda *_: velocity_target(x0, eps))(on_circle, tau)
    torch.testing.assert_close(pair, derivative, rtol=0, atol=1e-14)


def test_the_whole_derivative_along_the_path(points: tuple[Tensor, Tensor]) -> None:
    """d F / d tau by forward mode through the change of variables, against central differences of the closed form."""
    x, tau = points[0][2:], points[1][2:]
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    _, found = torch.func.jvp(trig_field(velocity), (x, tau), (step, torch.ones_like(tau)))
    h = 3e-6
    expected = (field(x + h * step, tau + h) - field(x - h * step, tau - h)) / (2 * h)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_time_per_frame() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, 6, generator=g, dtype=torch.float64)
    tau = torch.rand(2, 4, generator=g, dtype=torch.float64)

    def of_frames(x: Tensor, t: Tensor) -> Tensor:
        return x * 2 + t.view(2, 1, 4, 1, 1)

    found = trig_field(of_frames)(x, tau)
    for b in range(2):
        for f in range(4):
            at = tau[b, f]
            scale = 1 / (at.cos() + at.sin())
            one = ((at.cos() - at.sin()) * x[b, :, f] + (x[b, :, f] * scale * 2 + at.sin() * scale)) * scale
            torch.testing.assert_close(found[b, :, f], one, rtol=0, atol=1e-14)
