"""LinearAttention and CausalLinearAttention as mixers: against the written-out layer, and chunk by chunk."""

from __future__ import annotations

import pytest
import torch

from sana.nn.linear_attention import CausalLinearAttention, LinearAttention
from sana.types import Context, Grid


def context(b, grid, d):
    return Context(grid, torch.zeros(b, grid.f, 6, d, dtype=torch.float64))


def mixer(kind, width=24, head_dim=8, seed=0, **settings):
    torch.manual_seed(seed)
    layer = kind(width, head_dim, **settings).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_layer_written_out(qk_norm, seed):
    layer = mixer(LinearAttention, qk_norm=qk_norm, seed=seed)
    x = torch.randn(2, 15, 24, dtype=torch.float64)
    weight = layer.qkv.weight
    q, k, v = (x @ weight[24 * i : 24 * (i + 1)].T for i in range(3))
    if qk_norm:  # over the full width, before the split into heads
        q = q / (q.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * layer.q_norm.weight
        k = k / (k.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * layer.k_norm.weight
    out = []
    for head in range(3):
        own = slice(8 * head, 8 * head + 8)
        scores = q[..., own].relu() @ k[..., own].relu().mT
        out.append(scores / (scores.sum(-1, keepdim=True) + 1e-15) @ v[..., own])
    want = torch.cat(out, -1) @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(x, context(2, Grid(1, 3, 5), 24)), want, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(layer.identity(x), v @ layer.proj.weight.T + layer.proj.bias, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_causal_two_chunks_equal_one(cut):
    layer = mixer(CausalLinearAttention, qk_norm=True)
    x = torch.randn(2, 5 * 6, 24, dtype=torch.float64, requires_grad=True)
    whole = layer(x, context(2, Grid(5, 2, 3), 24))
    first, state = layer.step(x[:, : cut * 6], context(2, Grid(cut, 2, 3), 24), None)
    second, _ = layer.step(x[:, cut * 6 :], context(2, Grid(5 - cut, 2, 3), 24), state)
    both = torch.cat([first, second], 1)
    torch.testing.assert_close(both, whole, rtol=1e-10, atol=1e-11)
    weight = torch.randn_like(whole)
    torch.testing.assert_close(
        *(torch.autograd.grad((y * weight).sum(), x, retain_graph=True)[0] for y in (both, whole)),
        rtol=1e-9,
        atol=1e-10,
    )


def test_causal_state_has_one_size_and_starts_at_zero():
    layer = mixer(CausalLinearAttention)
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    zero = layer.init_state(x)
    assert zero.shape == (2, 3, 8, 9)
    assert not zero.any()
    assert layer.init_state(x.bfloat16()).dtype == torch.float32
    for frames in (1, 2):
        y, state = layer.step(x, context(2, Grid(frames, 12 // frames, 1), 24), zero)
        assert state.shape == zero.shape
        torch.testing.assert_close(y, layer(x, context(2, Grid(frames, 12 // frames, 1), 24)), rtol=0, atol=0)


def test_bidirectional_layer_refuses_to_continue():
    layer, ctx = mixer(LinearAttention), context(1, Grid(1, 2, 2), 24)
    x = torch.randn(1, 4, 24, dtype=torch.float64)
    y, state = layer.step(x, ctx, layer.init_state(x))
    torch.testing.assert_close(y, layer(x, ctx), rtol=0, atol=0)
    with pytest.raises(ValueError, match="LinearAttention attends in both directions"):
        layer.step(x, ctx, state)


def test_width_must_hold_whole_heads():
    with pytest.raises(ValueError, match="width 48 is not a multiple of head_dim 32"):
        LinearAttention(48)
