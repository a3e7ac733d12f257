"""sCM against closed forms of Gaussian data, in float64; and a network that reaches the consistency function."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sana.flow.timestep import TrigLogNormal
from sana.flow.trig import trig, x0_from_field
from sana.objective.consistency import (
    SIGMA,
    consistency,
    consistency_tangent,
    semi_discrete,
    semi_discrete_end,
    tangent_norm,
)

MEAN, SPREAD = 0.4, 0.8


def parts(tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c, s = tau.cos().view(-1, 1, 1, 1, 1), tau.sin().view(-1, 1, 1, 1, 1)
    return c, s, c**2 * SPREAD**2 + s**2


def teacher(x: Tensor, tau: Tensor) -> Tensor:
    """E[-sin x0 + cos eps | x] of data N(MEAN, SPREAD^2)."""
    c, s, variance = parts(tau)
    rest = (x - c * MEAN) / variance
    return -s * (MEAN + c * SPREAD**2 * rest) + c * s * rest


def end(x: Tensor, tau: Tensor) -> Tensor:
    """Where the teacher's path through x at tau ends: deviations shrink as the spread does."""
    c, _, variance = parts(tau)
    return MEAN + SPREAD * (x - c * MEAN) / variance.sqrt()


def consistent(x: Tensor, tau: Tensor) -> Tensor:
    """The field whose consistency function is `end`."""
    c, s, _ = parts(tau)
    return (c * x - end(x, tau)) / s


def other(x: Tensor, tau: Tensor) -> Tensor:
    """A field that is neither."""
    return torch.tanh(1.3 * x) * tau.view(-1, 1, 1, 1, 1).cos() + 0.2 * x.square()


def points(seed: int, b: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    tau = 0.05 + torch.rand(b, 1, generator=g, dtype=torch.float64) * (math.pi / 2 - 0.05)
    return torch.randn(b, 3, 1, 2, 5, generator=g, dtype=torch.float64), tau


@pytest.mark.parametrize("seed", [0, 1])
def test_tangent_is_the_derivative_of_the_end(seed: int) -> None:
    """g before it is normalised is sigma cos df/dtau along the teacher's path, by central differences."""
    x, tau = points(seed)
    found = consistency_tangent(other, x, tau, teacher(x, tau))
    h, along, wide = 1e-5, teacher(x, tau), tau.view(-1, 1, 1, 1, 1)

    def f(d: float) -> Tensor:
        return x0_from_field(x + d * along, tau + d, other(x + d * along, tau + d))

    g = SIGMA * wide.cos() * (f(h) - f(-h)) / (2 * h)
    length = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(found, g / (length + 0.1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_moves_the_consistent_field(seed: int) -> None:
    x, tau = points(seed)
    assert consistency_tangent(consistent, x, tau, teacher(x, tau)).abs().max() < 1e-13
    assert consistency_tangent(other, x, tau, teacher(x, tau)).abs().max() > 0.01
    # Without the derivative it is regression of the teacher's field.
    start = consistency_tangent(teacher, x, tau, teacher(x, tau), warmup=0.0)
    assert start.abs().max() == 0


def test_warmup_joins_two_directions() -> None:
    x, tau = points(3)
    parts_ = [consistency_tangent(other, x, tau, teacher(x, tau), r, floor=1e12) * 1e12 for r in (0.0, 0.25, 1.0)]
    torch.testing.assert_close(parts_[1], 0.75 * parts_[0] + 0.25 * parts_[2], rtol=1e-9, atol=1e-9)


def test_frames_have_their_own_times_and_norms() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 2, 5, generator=g, dtype=torch.float64)
    tau = 0.1 + torch.rand(2, 4, generator=g, dtype=torch.float64)

    def field(x: Tensor, tau: Tensor) -> Tensor:
        return x.square() * tau[:, None, :, None, None]

    target = torch.randn(x.shape, generator=g, dtype=torch.float64)
    found = consistency_tangent(field, x, tau, target)
    for f in range(4):
        one = consistency_tangent(field, x[:, :, f : f + 1], tau[:, f : f + 1], target[:, :, f : f + 1])
        torch.testing.assert_close(found[:, :, f : f + 1], one)


def test_loss_and_gradients() -> None:
    x, tau = points(5)
    student = x.clone().requires_grad_()
    logvar = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None].requires_grad_()
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = consistency(student, tangent, tau, logvar)
    weight = 1 / (0.5 * tau.tan())
    expected = weight / logvar.exp() * tangent.square().mean(dim=(1, 3, 4)) + logvar
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    scale = (weight / logvar.detach().exp()).view(-1, 1, 1, 1, 1) / tangent[0].numel()
    torch.testing.assert_close(student.grad, -2 * scale * tangent)
    torch.testing.assert_close(logvar.grad, (1 - weight / logvar.exp() * tangent.square().mean(dim=(1, 3, 4))).detach())
    torch.testing.assert_close(consistency(student, tangent, tau), weight * tangent.square().mean(dim=(1, 3, 4)))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_step_along_the_path_misses_by_its_square(seed: int) -> None:
    """The end is the same from everywhere on a path; a step leaves the path by what is second order in its length."""
    x, tau = points(seed)
    tau = tau.clamp_min(0.5)
    misses = [
        (semi_discrete_end(consistent, x, tau, teacher(x, tau), step) - end(x, tau)).abs().flatten(1).amax(1)
        for step in (2e-2, 1e-2)
    ]
    torch.testing.assert_close(misses[0] / misses[1], torch.full((6,), 4.0, dtype=torch.float64), rtol=0.06, atol=0)


def test_the_last_step_ends_at_the_data_that_the_teacher_predicts() -> None:
    x, tau = points(2)
    found = semi_discrete_end(other, x, tau, teacher(x, tau), 1.57)
    mean = MEAN + tau.cos().view(-1, 1, 1, 1, 1) * SPREAD**2 * (x - parts(tau)[0] * MEAN) / parts(tau)[2]  # E[x0 | x]
    near = (tau <= 1.57).flatten()
    torch.testing.assert_close(found[near], mean[near])
    assert near.sum() >= 5


def test_semi_discrete_loss_and_gradients() -> None:
    x, _ = points(6)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found, logvar = x.clone().requires_grad_(), torch.linspace(-1, 2, 6, dtype=torch.float64)[:, None].requires_grad_()
    losses = semi_discrete(found, target, logvar)
    n = x[0].numel()
    lengths = np.sqrt(((x - target).numpy() ** 2).reshape(6, n).sum(1))[:, None]
    error = torch.from_numpy(2 / n * (np.hypot(lengths, 0.00054 * n**0.5) - 0.00054 * n**0.5))
    torch.testing.assert_close(losses, error / logvar.exp() + logvar)
    torch.testing.assert_close(semi_discrete(found, target), error)
    losses.sum().backward()
    unit = (x - target) / torch.from_numpy(lengths).view(-1, 1, 1, 1, 1)  # far from the target, c is nothing
    torch.testing.assert_close(found.grad, 2 / n * unit / logvar.detach().exp().view(-1, 1, 1, 1, 1), rtol=1e-5, atol=0)
    torch.testing.assert_close(logvar.grad, (1 - error / logvar.exp()).detach())


class Small(nn.Module):
    """A field of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        given = torch.stack([x.flatten(), tau.flatten().sin(), tau.flatten().cos()], dim=1)
        return self.net(given).view_as(x)


@pytest.mark.long
@pytest.mark.parametrize(("step", "within"), [(None, 0.05), (0.13, 0.1)])
def test_a_network_learns_where_paths_end(step: float | None, within: float) -> None:
    """One step from pure noise ends within 0.05 of the closed form, root mean square, 0.06 of the data's spread; twelve
    steps of the semi-discrete form add up to 0.08 (an Euler solution of the same steps misses by 0.09)."""
    torch.manual_seed(0)
    net, times = Small(), TrigLogNormal(largest=0.1)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    updates, b = 3000, 512
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for k in range(updates):
        x0, eps = MEAN + SPREAD * torch.randn(b, 1, 1, 1, 1), torch.randn(b, 1, 1, 1, 1)
        tau = times(torch.rand(b, 1)).clamp(max=math.pi / 2 - 1e-3)
        x = trig(x0, eps, tau)
        if k < 1000:  # first the teacher's field, as distillation starts from it
            loss = (net(x, tau) - teacher(x, tau)).square().mean()
        elif step is not None:
            target = semi_discrete_end(net, x, tau, teacher(x, tau), step)
            loss = semi_discrete(x0_from_field(x, tau, net(x, tau)), target).mean()
        else:
            tangent = consistency_tangent(net, x, tau, teacher(x, tau), min(1.0, (k - 1000) / 500))
            loss = consistency(net(x, tau), tangent, tau).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x, tau = torch.randn(4000, 1, 1, 1, 1), torch.full((4000, 1), math.pi / 2 - 1e-3)
    with torch.no_grad():
        one = x0_from_field(x, tau, net(x, tau))
    assert (one - end(x, tau)).square().mean().sqrt() < within
    plain = x0_from_field(x, tau, teacher(x, tau))
    assert (plain - end(x, tau)).square().mean().sqrt() > 0.5  # without distillation: the mean of the data


def test_length_of_a_tangent_is_read_off() -> None:
    x, tau = points(4)
    lengths = []
    for scale in (1e-3, 1.0, 50.0):

        def big(x: Tensor, tau: Tensor, scale: float = scale) -> Tensor:
            return scale * other(x, tau)

        raw = consistency_tangent(big, x, tau, scale * teacher(x, tau), floor=1e9) * 1e9
        lengths.append(raw.flatten(1).norm(dim=1, keepdim=True))
        found = tangent_norm(consistency_tangent(big, x, tau, scale * teacher(x, tau)))
        torch.testing.assert_close(found, lengths[-1], rtol=1e-6, atol=1e-12)
    assert lengths[-1].max() > 10
