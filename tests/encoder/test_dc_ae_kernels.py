"""The autoencoder's blocks in channels_last by Triton against the same blocks in plain torch, and against channels
first, which no kernel reads."""

from __future__ import annotations

import pytest
import torch

from sana.encoder.autoencoder.blocks import GatedConv, ResBlock, RMSNorm2d
from sana.ops import choice


@pytest.fixture
def triton_kernels(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # in the convolutions around the kernels
    before = choice.chosen()
    choice.set_kernels("triton")
    yield
    choice.set_kernels(before)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def build(block, seed=0):
    """A block with no parameter at a special value, and a map."""
    torch.manual_seed(seed)
    block = block.to(device())
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.4)
    return block, torch.randn(2, 6, 3, 2, device=device())


def results(block, x):
    x = x.detach().requires_grad_()
    y = block(x)
    weight = torch.arange(y.numel(), device=y.device, dtype=y.dtype).view(y.shape).cos()
    return [y, *torch.autograd.grad((y * weight).sum(), [x, *block.parameters()])]


@pytest.mark.slow
@pytest.mark.parametrize("block", [RMSNorm2d(6), ResBlock(6), GatedConv(6, ratio=2)], ids=lambda b: type(b).__name__)
def test_channels_last_by_kernels(block, triton_kernels):
    block, x = build(block)
    last = x.contiguous(memory_format=torch.channels_last)
    got = results(block, last)
    choice.set_kernels("naive")
    want = results(block.double(), x.double())
    block.float()
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_channels_first_is_plain_torch(triton_kernels):
    block, x = build(GatedConv(6, ratio=2))
    got = results(block, x)  # with kernels demanded
    choice.set_kernels("naive")
    assert all(torch.equal(a, b) for a, b in zip(got, results(block, x), strict=True))


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_norm_with_activation_and_residual_is_their_sequence(activation, layout):
    block, x = build(RMSNorm2d(6))
    x = x.contiguous(memory_format=layout)
    wide = x.double().movedim(1, -1)
    y = wide / (wide.square().mean(-1, keepdim=True) + block.eps).sqrt() * block.weight + block.bias
    y = {"relu": y.clamp(min=0), "silu": y * y.sigmoid(), None: y}[activation].movedim(-1, 1) + x
    got = block(x, activation, x)
    torch.testing.assert_close(got.double(), y, rtol=1e-5, atol=1e-6)
    assert got.stride() == x.stride()
