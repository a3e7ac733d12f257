"""MixFFN against the same layer written with convolutions over channels-first images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sana.nn.mix_ffn import MixFFN
from sana.types import Context, Grid


@pytest.mark.parametrize("grid", [Grid(1, 5, 7), Grid(3, 3, 2), Grid(1, 1, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_convolutions_with_gradients(grid, seed):
    torch.manual_seed(seed)
    ffn, b, d = MixFFN(6, ratio=2.4).double(), 2, 6
    assert ffn.hidden == 14
    x = torch.randn(b, grid.tokens, d, dtype=torch.float64, requires_grad=True)
    image = x.reshape(b * grid.f, grid.h, grid.w, d).permute(0, 3, 1, 2).contiguous()
    hidden = F.silu(F.conv2d(image, ffn.inverted.weight[:, :, None, None], ffn.inverted.bias))
    hidden = F.conv2d(hidden, ffn.depthwise.weight, ffn.depthwise.bias, padding=1, groups=28)
    value, gate = hidden.chunk(2, 1)
    want = F.conv2d(value * F.silu(gate), ffn.point.weight[:, :, None, None])
    want = want.permute(0, 2, 3, 1).reshape(b, grid.tokens, d)
    got = ffn(x, Context(grid, torch.zeros(b, grid.f, 6, d)))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    weight, leaves = torch.randn_like(want), [x, *ffn.parameters()]
    for a, c in zip(
        torch.autograd.grad((got * weight).sum(), leaves),
        torch.autograd.grad((want * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-11)


def test_step_is_forward_without_state():
    ffn, ctx = MixFFN(8), Context(Grid(1, 2, 3), torch.zeros(1, 1, 6, 8))
    x = torch.randn(1, 6, 8)
    y, state = ffn.step(x, ctx, ffn.init_state(x))
    assert state is None
    assert torch.equal(y, ffn(x, ctx))
