from __future__ import annotations

import pytest
import torch

from sana.flow.path import align_time, eps_from_velocity, linear, velocity_target, x0_from_velocity


@pytest.mark.parametrize("seed", [0, 1])
def test_path_interpolates_per_frame(seed):
    g = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 2, 3, 4, 5, 7, dtype=torch.float64, generator=g)
    t = torch.rand(2, 4, dtype=torch.float64, generator=g)
    xt = linear(x0, eps, t)
    for b in range(2):
        for f in range(4):
            expected = (1 - t[b, f].item()) * x0[b, :, f] + t[b, f].item() * eps[b, :, f]
            torch.testing.assert_close(xt[b, :, f], expected)


def test_time_per_sample_equals_the_same_time_in_every_frame():
    x0, eps = torch.randn(2, 3, 2, 4, 5, 7)
    t = torch.rand(3)
    assert torch.equal(linear(x0, eps, t), linear(x0, eps, t[:, None].expand(3, 4)))
    flat = x0.flatten(1)
    assert torch.equal(linear(flat, eps.flatten(1), t), linear(x0, eps, t).flatten(1))


def test_ends_of_the_path_are_exact():
    x0, eps = torch.randn(2, 3, 2, 1, 5, 7)
    assert torch.equal(linear(x0, eps, torch.zeros(3)), x0)
    assert torch.equal(linear(x0, eps, torch.ones(3)), eps)


def test_velocity_is_the_derivative_of_the_path():
    x0, eps = torch.randn(2, 3, 5, dtype=torch.float64)
    t = torch.rand(3, dtype=torch.float64)
    _, derivative = torch.func.jvp(lambda t: linear(x0, eps, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(derivative, velocity_target(x0, eps))


@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 4, 5, 7)])
def test_data_and_noise_come_back_from_the_velocity(shape):
    x0, eps = torch.randn(2, *shape, dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    xt, v = linear(x0, eps, t), velocity_target(x0, eps)
    torch.testing.assert_close(x0_from_velocity(xt, t, v), x0)
    torch.testing.assert_close(eps_from_velocity(xt, t, v), eps)


def test_float32_time_keeps_bfloat16_latents_from_rounding():
    x0, eps = torch.randn(2, 4, 6).bfloat16()
    t = torch.full((4,), 0.999)
    xt = linear(x0, eps, t)
    assert xt.dtype == torch.float32
    torch.testing.assert_close(xt, 0.001 * x0.float() + 0.999 * eps.float())


@pytest.mark.parametrize("t", [torch.rand(2), torch.rand(3, 2), torch.rand(3, 4, 1), torch.rand(())])
def test_times_of_another_size_are_refused(t):
    with pytest.raises((ValueError, TypeError)):
        align_time(t, torch.zeros(3, 2, 4, 5, 7))


def test_the_refusal_names_both_shapes():
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(3, 2, 4, 5, 7\)"):
        align_time(torch.rand(3, 2), torch.zeros(3, 2, 4, 5, 7))
