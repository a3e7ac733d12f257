"""Hinge losses and the balance of gradients against closed forms."""

from __future__ import annotations

import pytest
import torch

from sana.objective.adversarial import balance, hinge_discriminator, hinge_generator, r1, roll_within


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


@pytest.mark.parametrize("seed", [0, 1])
def test_r1_of_quadratic_logits(seed: int) -> None:
    """logits = sum of a f^2 / 2 per layer: the gradient is a f."""
    g = torch.Generator().manual_seed(seed)
    features = [torch.randn(3, 5, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    logits = torch.stack([(a * f.square() / 2).sum((1, 2)) for f in features], dim=1)
    penalty = r1(logits, features)
    expected = sum((a.detach() * f.detach()).square().sum((1, 2)) for f in features) / 2
    torch.testing.assert_close(penalty, expected)
    penalty.sum().backward()
    torch.testing.assert_close(a.grad, 2 * expected.sum() / a.detach())


def test_samples_meet_neighbours_captions() -> None:
    x = torch.arange(10.0)
    assert roll_within(x, 8).tolist() == [4, 0, 1, 2, 3, 9, 5, 6, 7, 8]
    assert roll_within(x[:5], 8).tolist() == [4, 0, 1, 2, 3]
    # Over two ranks the same pairs.
    assert torch.cat([roll_within(part, 8) for part in x.chunk(2)]).tolist() == roll_within(x, 8).tolist()
    for wrong in (x[:1], x[:9]):
        with pytest.raises(ValueError, match="two samples in every group"):
            roll_within(wrong, 1)
