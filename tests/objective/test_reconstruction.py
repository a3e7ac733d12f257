"""Reconstruction losses against loops in float64."""

from __future__ import annotations

import pytest
import torch

from sana.objective.reconstruction import absolute, perceptual


@pytest.mark.parametrize("seed", [0, 1])
def test_absolute_by_hand(seed: int) -> None:
    torch.manual_seed(seed)
    x, y = torch.randn(3, 2, 5, 3).double(), torch.randn(3, 2, 5, 3).double().requires_grad_()
    loss = absolute(x, y)
    want = [sum(abs(float(a) - float(b)) for a, b in zip(x[i].flatten(), y[i].detach().flatten(), strict=True)) / 30
            for i in range(3)]  # fmt: skip
    torch.testing.assert_close(loss, torch.tensor(want).double())
    (gradient,) = torch.autograd.grad(loss.sum(), y)
    torch.testing.assert_close(gradient, (y - x).sign() / 30)


@pytest.mark.parametrize("seed", [0, 1])
def test_perceptual_by_hand(seed: int) -> None:
    torch.manual_seed(seed)
    x = [torch.randn(2, 4, 3, 5).double(), torch.randn(2, 6, 1, 2).double()]
    y = [torch.randn(2, 4, 3, 5).double(), torch.randn(2, 6, 1, 2).double()]
    want = torch.zeros(2).double()
    for a, b in zip(x, y, strict=True):
        for i in range(2):
            places = [(r, c) for r in range(a.shape[2]) for c in range(a.shape[3])]
            for r, c in places:
                u, v = a[i, :, r, c], b[i, :, r, c]
                u, v = u / (u @ u + 1e-6).sqrt(), v / (v @ v + 1e-6).sqrt()
                want[i] += (u - v).square().sum() / len(places) / len(x)
    torch.testing.assert_close(perceptual(x, y), want)


def test_perceptual_limits_and_gradient() -> None:
    x = [torch.randn(3, 4, 2, 2).double()]
    assert perceptual(x, x).abs().max() == 0
    torch.testing.assert_close(perceptual(x, [-x[0]]), torch.full((3,), 4.0).double(), rtol=1e-4, atol=0)
    y = torch.randn(3, 4, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: perceptual(x, [y]), (y,))
    empty = torch.zeros(1, 4, 2, 2).double().requires_grad_()
    (gradient,) = torch.autograd.grad(perceptual([x[0][:1]], [empty]).sum(), empty)
    assert gradient.isfinite().all()


def test_perceptual_refuses_unequal_layers() -> None:
    a = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="got 1 and 2"):
        perceptual([a], [a, a])
    with pytest.raises(ValueError, match="got 0 and 0"):
        perceptual([], [])
