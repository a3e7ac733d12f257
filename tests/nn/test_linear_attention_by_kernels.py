"""Layers that attend by Triton kernels compute what they compute in plain torch: values, gradients, tangents."""

from __future__ import annotations

import pytest
import torch

from sana.encoder.autoencoder.blocks import MultiScaleLinearAttention
from sana.nn.linear_attention import LinearAttention
from sana.ops import choice
from sana.types import Context, Grid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _put_back():
    before = choice.chosen()
    yield
    choice.set_kernels(before)


def both(compute):
    """What `compute` gives by kernels and in plain torch."""
    results = []
    for kernels in ("triton", "naive"):
        choice.set_kernels(kernels)
        results.append(compute())
    return results


def close(ours, theirs):
    for a, c in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_of_a_block(qk_norm):
    torch.manual_seed(0)
    layer = LinearAttention(64, 32, qk_norm=qk_norm).to(DEVICE)
    x, dx = torch.randn(2, 2, 15, 64, device=DEVICE)
    ctx = Context(Grid(1, 3, 5), torch.zeros(2, 1, 6, 64, device=DEVICE))

    def compute():
        leaf = x.clone().requires_grad_()
        y = layer(leaf, ctx)
        grads = torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])
        with torch.no_grad():
            plain = layer(x, ctx)
            _, tangent = torch.func.jvp(lambda x: layer(x, ctx), (x,), (dx,))
        return [y, plain, tangent, *grads]

    close(*both(compute))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_of_the_autoencoder(memory):
    torch.manual_seed(0)
    layer = MultiScaleLinearAttention(32, 16, kernels=[5]).to(DEVICE, memory_format=memory)
    x = torch.randn(2, 32, 5, 7, device=DEVICE).to(memory_format=memory)

    def compute():
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        return [y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])]

    close(*both(compute))
