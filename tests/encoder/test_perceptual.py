"""The attribute net learns, and does so reproducibly."""

from __future__ import annotations

import pytest
import torch

from sana.encoder.perceptual import AttributeNet, train_attributes


def batches(steps: int, seed: int):
    """Bright left half, bright right half: two attributes that a mean cannot see but a convolution can."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        target = (torch.rand(16, 2, generator=generator) < 0.5).float()
        image = torch.rand(16, 3, 16, 16, generator=generator) * 0.2 - 1
        image[:, 0] += target[:, 0, None, None]
        image[:, 2] += target[:, 1, None, None]
        yield image, target


@pytest.mark.parametrize("seed", [0, 1])
def test_learns_and_repeats(seed: int) -> None:
    losses = []
    for _ in range(2):
        torch.manual_seed(seed)
        net = AttributeNet(2, widths=(8, 8))
        losses.append(train_attributes(net, batches(40, seed), lr=1e-2))
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.3 < losses[0][0]
    assert not net.training
    ((image, target),) = batches(1, seed + 10)
    assert ((net(image) > 0) == target.bool()).float().mean() > 0.95


def test_features_by_stage() -> None:
    net = AttributeNet(3, widths=(4, 8, 12))
    maps = net.features(torch.rand(2, 3, 32, 24))
    assert [tuple(m.shape) for m in maps] == [(2, 4, 16, 12), (2, 8, 8, 6), (2, 12, 4, 3)]
    assert net(torch.rand(2, 3, 32, 24)).shape == (2, 3)
