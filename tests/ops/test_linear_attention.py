"""ReLU linear attention against loops in float64: values, gradients, forward derivatives, precision, frames."""

from __future__ import annotations

import pytest
import torch

from sana.ops.linear_attention.naive import causal_relu_linear_attention, relu_linear_attention

SIZES = [
    (1, 1, 1, 4),
    (2, 5, 3, 8),
    (1, 7, 2, 7),
    (2, 33, 3, 8),
    (1, 12, 1, 11),
]  # b, n, heads, dh: n around dh


def draw(b, n, heads, dh, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, n, heads, dh, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]


def loop(q, k, v, eps, sees=lambda n, m: True):
    """The definition, one token at a time."""
    out = []
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            for h in range(q.shape[2]):
                numerator, denominator = torch.zeros(q.shape[3], dtype=q.dtype), 0
                for m in range(q.shape[1]):
                    if sees(n, m):
                        weight = (q[b, n, h].clamp(min=0) * k[b, m, h].clamp(min=0)).sum()
                        numerator = numerator + weight * v[b, m, h]
                        denominator = denominator + weight
                out.append(numerator / (denominator + eps))
    return torch.stack(out).view(q.shape)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eps", [1e-15, 1e-2])
def test_values_and_gradients_equal_the_loop(size, eps):
    qkv = [x.requires_grad_() for x in draw(*size, seed=size[1])]
    got, want = relu_linear_attention(*qkv, eps=eps), loop(*qkv, eps=eps)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    weight = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), qkv),
        torch.autograd.grad((want * weight).sum(), qkv),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("size", SIZES)
def test_forward_derivative_equals_central_differences(size):
    qkv, tangents = draw(*size, seed=1), draw(*size, seed=2)
    _, got = torch.func.jvp(relu_linear_attention, tuple(qkv), tuple(tangents))
    h = 1e-7
    ahead = relu_linear_attention(*(x + h * dx for x, dx in zip(qkv, tangents, strict=True)))
    behind = relu_linear_attention(*(x - h * dx for x, dx in zip(qkv, tangents, strict=True)))
    torch.testing.assert_close(got, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-6)


def test_a_query_without_positive_features_gives_zero_and_finite_gradients():
    q, k, v = draw(1, 9, 2, 4, dtype=torch.float32)
    q[:, 3] = -q[:, 3].abs()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = relu_linear_attention(*leaves)
    assert torch.equal(out[:, 3], torch.zeros(1, 2, 4))
    for grad in torch.autograd.grad(out.square().sum(), leaves):
        assert grad.isfinite().all()


@pytest.mark.parametrize("n", [5, 257])
@pytest.mark.parametrize("autocast", [False, True])
def test_sums_are_fp32_for_bf16_inputs(n, autocast):
    """Only the rounding of inputs and result may show; 257 tokens summed in bf16 would be off by far more."""
    qkv = draw(2, n, 3, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = relu_linear_attention(*qkv)
    want = relu_linear_attention(*(x.double() for x in qkv))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("frames", "n"), [(1, 3), (3, 5), (4, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_causal_equals_the_masked_loop(frames, n, seed):
    b, heads, dh = 2, 2, 3
    flat = [x.requires_grad_() for x in draw(b, frames * n, heads, dh, seed)]
    want = loop(*flat, eps=1e-15, sees=lambda i, j: j // n <= i // n)
    zero = torch.zeros(b, heads, dh, dh + 1, dtype=torch.float64)
    got, _ = causal_relu_linear_attention(*(x.unflatten(1, (frames, n)) for x in flat), zero)
    torch.testing.assert_close(got.flatten(1, 2), want, rtol=1e-11, atol=1e-13)
    weight = torch.randn_like(want)
    ours = torch.autograd.grad((got.flatten(1, 2) * weight).sum(), flat)
    theirs = torch.autograd.grad((want * weight).sum(), flat)
    for a, c in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-11)


def test_causal_state_is_the_sum_over_tokens_and_continues():
    b, frames, n, heads, dh = 2, 5, 3, 2, 4
    q, k, v = (x.unflatten(1, (frames, n)) for x in draw(b, frames * n, heads, dh))
    zero = torch.zeros(b, heads, dh, dh + 1, dtype=torch.float64)
    whole, last = causal_relu_linear_attention(q, k, v, zero)
    padded = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    torch.testing.assert_close(last, torch.einsum("bfnhd,bfnhe->bhde", k.relu(), padded))
    first, state = causal_relu_linear_attention(q[:, :2], k[:, :2], v[:, :2], zero)
    second, state = causal_relu_linear_attention(q[:, 2:], k[:, 2:], v[:, 2:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-14)


def test_causal_state_stays_fp32_for_bf16_inputs():
    q, k, v = (x.unflatten(1, (4, 50)) for x in draw(1, 200, 2, 8, dtype=torch.bfloat16))
    zero = torch.zeros(1, 2, 8, 9)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = causal_relu_linear_attention(q, k, v, zero)
    want, want_state = causal_relu_linear_attention(q.double(), k.double(), v.double(), zero.double())
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.double(), want, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(state.double(), want_state, rtol=1e-6, atol=1e-6)
