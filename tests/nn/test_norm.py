"""RMSNorm and the modulated LayerNorm against their formulae in float64."""

from __future__ import annotations

import pytest
import torch

from sana.nn.norm import RMSNorm
from sana.ops.adaln.op import gated_residual, modulated_layer_norm


@pytest.mark.parametrize("seed", [0, 1])
def test_rms_norm_values_gradients_and_forward_derivative(seed):
    torch.manual_seed(seed)
    norm, x = RMSNorm(7, eps=1e-3).double(), torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    torch.nn.init.normal_(norm.weight)

    def written(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight

    torch.testing.assert_close(norm(x), written(x), rtol=1e-12, atol=1e-13)
    weight = torch.randn(2, 5, 7, dtype=torch.float64)
    for leaf in (x, norm.weight):
        torch.testing.assert_close(
            *(torch.autograd.grad((y * weight).sum(), leaf)[0] for y in (norm(x), written(x))),
            rtol=1e-10,
            atol=1e-11,
        )
    tangents = [torch.func.jvp(f, (x.detach(),), (weight,))[1] for f in (norm, written)]
    torch.testing.assert_close(*tangents, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("autocast", [False, True])
def test_rms_norm_statistics_are_fp32_for_bf16(autocast):
    norm = RMSNorm(1000, eps=0.0)
    x = torch.full((1, 1000), 300.0, dtype=torch.bfloat16)
    x[0, ::2] = 1.0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    want = x.double() / x.double().pow(2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=0)
    assert norm.to(torch.bfloat16)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("frames", [1, 3])
def test_modulation_is_per_frame(frames):
    torch.manual_seed(frames)
    b, n, d = 2, 5, 6
    x = torch.randn(b, frames * n, d, dtype=torch.float64, requires_grad=True)
    shift, scale = (torch.randn(b, frames, d, dtype=torch.float64, requires_grad=True) for _ in range(2))
    rows = []
    for i in range(frames * n):
        token = x[:, i]
        normed = (token - token.mean(-1, keepdim=True)) / (token.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        rows.append(normed * (1 + scale[:, i // n]) + shift[:, i // n])
    want, got = torch.stack(rows, 1), modulated_layer_norm(x, shift, scale)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    weight = torch.randn_like(want)
    leaves = [x, shift, scale]
    for a, c in zip(
        torch.autograd.grad((got * weight).sum(), leaves),
        torch.autograd.grad((want * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-10)


def test_gate_is_per_frame():
    x, y = torch.randn(2, 2, 6, 4).double().unbind(0)
    gate = torch.randn(2, 3, 4).double()
    want = x + gate.repeat_interleave(2, dim=1) * y
    torch.testing.assert_close(gated_residual(x, gate, y), want, rtol=1e-12, atol=1e-14)
