"""Hinge losses and the balance of gradients against closed forms."""

from __future__ import annotations

import torch

from sana.objective.adversarial import balance, hinge_discriminator, hinge_generator


def test_hinge_values() -> None:
    real = torch.tensor([[2.0, 0.5, -1.0], [1.0, 1.0, 1.0]])[:, None]
    fake = torch.tensor([[-2.0, 0.0, 3.0], [-1.0, -1.0, -1.0]])[:, None]
    # first sample: (0 + 0.5 + 2) / 3 + (0 + 1 + 4) / 3; second: both sides beyond their margins
    torch.testing.assert_close(hinge_discriminator(real, fake), torch.tensor([7.5 / 3, 0.0]))
    torch.testing.assert_close(hinge_generator(fake), torch.tensor([-1 / 3, 1.0]))


def test_hinge_gradients() -> None:
    real = torch.tensor([[0.0, 2.0]], requires_grad=True)
    fake = torch.tensor([[0.0, -2.0]], requires_grad=True)
    hinge_discriminator(real, fake).sum().backward()
    torch.testing.assert_close(real.grad, torch.tensor([[-0.5, 0.0]]))
    torch.testing.assert_close(fake.grad, torch.tensor([[0.5, 0.0]]))


def test_balance_equals_the_ratio_of_norms() -> None:
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    reference, adversarial = weight.square().sum(), 0.1 * weight.sum()  # gradients (6, 8) and (0.1, 0.1)
    factor = balance(reference, adversarial, weight)
    torch.testing.assert_close(factor, torch.tensor(10 / (0.1 * 2**0.5)))
    assert not factor.requires_grad
    (reference + factor * adversarial).backward()  # both graphs are still there
    torch.testing.assert_close(weight.grad, torch.tensor([6.0, 8.0]) + 10 / 2**0.5)


def test_balance_is_limited() -> None:
    weight = torch.ones(2, requires_grad=True)
    assert balance(weight.sum(), 0.0 * weight.sum(), weight, limit=7.0) == 7.0
