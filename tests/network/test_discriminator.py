"""The patch discriminator: shapes, locality, independence of the batch, and that it learns to tell. The heads on
features against torch's own spectral norm, circular convolution and batch norm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm

from sana.network.discriminator import FeatureDiscriminator, Head, LocalNorm, PatchDiscriminator, SpectralConv
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


def published_head(head: Head, x: torch.Tensor) -> torch.Tensor:
    """The head as the published one is written, with torch's own spectral norm, circular padding and batch norm."""

    def conv(layer: SpectralConv) -> nn.Module:
        outputs, inputs, kernel = layer.weight.shape
        theirs = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2, padding_mode="circular").double()
        theirs.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        theirs = spectral_norm(theirs, n_power_iterations=1, eps=1e-12)
        theirs.weight_u.copy_(layer.left)
        return theirs

    def norm(layer: LocalNorm, y: torch.Tensor) -> torch.Tensor:
        parts = y.tensor_split(-(-len(y) // 8))
        own = (None, None, layer.weight, layer.bias, True, 0, 1e-5)
        return torch.cat([nn.functional.batch_norm(part, *own) for part in parts])

    y = nn.functional.leaky_relu(norm(head.point_norm, conv(head.point)(x)), 0.2)
    z = nn.functional.leaky_relu(norm(head.along_norm, conv(head.along)(y)), 0.2)
    return conv(head.out)((y + z) / 2**0.5)


@pytest.mark.parametrize(("b", "n"), [(3, 16), (9, 11), (16, 10)])
def test_heads_are_the_published_ones(b: int, n: int) -> None:
    torch.manual_seed(b)
    head = Head(6, 9, 8).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(b, 6, n, dtype=torch.float64, requires_grad=True)
    twin = copy.deepcopy(head)
    found = head(x)
    expected = published_head(twin, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


def test_the_largest_singular_value_is_found() -> None:
    torch.manual_seed(0)
    layer = SpectralConv(7, 5, 3).double()
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    for _ in range(200):
        layer(x)
    largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
    plain = nn.functional.conv1d(x[..., [3, 0, 1, 2, 3, 0]], layer.weight / largest, layer.bias)
    torch.testing.assert_close(layer(x), plain, rtol=0, atol=1e-10)
    before = layer.left.clone()
    layer.eval()(x)
    assert torch.equal(layer.left, before)


def test_feature_heads_and_their_errors() -> None:
    heads = FeatureDiscriminator(6, [0, 2])
    features = {i: torch.randn(4, 3, 6) for i in (0, 1, 2)}  # fewer tokens than the kernel covers
    logits = heads(features)
    assert logits.shape == (4, 6)
    torch.testing.assert_close(logits[:, 3:], heads.eval().heads[1](features[2].mT).flatten(1), rtol=0, atol=0.2)
    for wrong in ({"layers": []}, {"layers": [1, 1]}, {"layers": [0], "kernel": 4}, {"layers": [0], "group": 0}):
        with pytest.raises(ValueError, match="FeatureDiscriminator"):
            FeatureDiscriminator(6, **wrong)
