from __future__ import annotations

import pytest
import torch

from sana.objective.flow_matching import flow_matching


@pytest.mark.parametrize("seed", [0, 1])
def test_loss_equals_a_loop_in_float64(seed):
    g = torch.Generator().manual_seed(seed)
    x0, eps, weight = torch.randn(3, 2, 3, 4, 5, 7, dtype=torch.float64, generator=g)
    t = torch.rand(2, 4, dtype=torch.float64, generator=g)

    def network(x, t):
        return weight * x + t[:, None, :, None, None]

    loss = flow_matching(network, x0, eps, t)
    assert loss.shape == (2, 4)
    assert loss.dtype == torch.float64
    for b in range(2):
        for f in range(4):
            time = t[b, f].item()
            xt = (1 - time) * x0[b, :, f] + time * eps[b, :, f]
            error = weight[b, :, f] * xt + time - eps[b, :, f] + x0[b, :, f]
            assert loss[b, f].item() == pytest.approx((error**2).sum().item() / (3 * 5 * 7), rel=1e-12)


def test_gradient_of_the_velocity_is_the_scaled_error():
    x0, eps = torch.randn(2, 2, 3, 1, 5, 7, dtype=torch.float64)
    v = torch.randn(2, 3, 1, 5, 7, dtype=torch.float64, requires_grad=True)
    flow_matching(lambda x, t: v, x0, eps, torch.rand(2, 1, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(v.grad, 2 * (v.detach() - eps + x0) / (3 * 5 * 7))


def test_the_true_velocity_has_no_loss():
    x0, eps = torch.randn(2, 2, 3, 1, 5, 7)
    assert (flow_matching(lambda x, t: eps - x0, x0, eps, torch.rand(2, 1)) == 0).all()


def test_expected_loss_of_the_optimal_network_is_the_conditional_variance():
    """Data N(0, s^2): E[v | xt] is linear, and the loss left is Var(v | xt) = s^2 / ((1 - t)^2 s^2 + t^2)."""
    s, n = 0.7, 200_000
    g = torch.Generator().manual_seed(0)
    x0 = s * torch.randn(3, 1, 1, 1, n, generator=g, dtype=torch.float64)
    eps = torch.randn(3, 1, 1, 1, n, generator=g, dtype=torch.float64)
    t = torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64)
    variance = (1 - t) ** 2 * s**2 + t**2

    def network(x, t):
        return x * ((t - (1 - t) * s**2) / variance)[:, None, :, None, None]

    expected = s**2 / variance
    torch.testing.assert_close(flow_matching(network, x0, eps, t), expected, rtol=0.02, atol=0)


def test_a_low_precision_network_still_gets_a_float32_loss():
    x0, eps = torch.randn(2, 2, 3, 1, 5, 7)
    t = torch.rand(2, 1)
    low = flow_matching(lambda x, t: (0.5 * x).bfloat16(), x0, eps, t)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, flow_matching(lambda x, t: 0.5 * x, x0, eps, t), rtol=1e-2, atol=0)
    assert flow_matching(lambda x, t: x, x0.bfloat16(), eps.bfloat16(), t).dtype == torch.float32


def test_a_velocity_of_another_shape_is_refused_instead_of_broadcast():
    x0 = torch.randn(2, 3, 1, 5, 7)
    with pytest.raises(ValueError, match=r"\(2, 1, 1, 5, 7\).*\(2, 3, 1, 5, 7\)"):
        flow_matching(lambda x, t: x[:, :1], x0, x0, torch.rand(2, 1))
