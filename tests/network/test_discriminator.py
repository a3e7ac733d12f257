"""The patch discriminator: shapes, locality, independence of the batch, and that it learns to tell."""

from __future__ import annotations

import pytest
import torch

from sana.network.discriminator import PatchDiscriminator
from sana.objective.adversarial import hinge_discriminator


def test_one_logit_per_patch() -> None:
    assert PatchDiscriminator(depth=3, width=8)(torch.rand(2, 3, 64, 40)).shape == (2, 1, 8, 5)
    assert PatchDiscriminator(in_channels=4, depth=1, width=8)(torch.rand(2, 4, 6, 6)).shape == (2, 1, 3, 3)


def test_a_sample_does_not_see_its_batch() -> None:
    torch.manual_seed(0)
    model, x = PatchDiscriminator(width=8, depth=2), torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


@pytest.mark.parametrize("seed", [0, 1])
def test_learns_to_tell_sharp_from_blurred(seed: int) -> None:
    torch.manual_seed(seed)
    model = PatchDiscriminator(width=8, depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        real = (torch.rand(16, 3, 16, 16) < 0.5).float() * 2 - 1
        fake = torch.nn.functional.avg_pool2d(real, 3, 1, 1)
        loss = hinge_discriminator(model(real), model(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


def test_refuses_bad_sizes() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        PatchDiscriminator(width=12)
    with pytest.raises(ValueError, match="at least 1"):
        PatchDiscriminator(depth=0)
