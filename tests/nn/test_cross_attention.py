"""CrossAttention against the written-out softmax: masks, q/k norm, gradients, forward derivative."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad

from sana.nn.cross_attention import CrossAttention, attention_bias, needed_mask, shared_bias, softmax_attention
from sana.types import Grid


def layer(width=12, heads=3, seed=0, **settings):
    torch.manual_seed(seed)
    cross = CrossAttention(width, heads, **settings).double()
    with torch.no_grad():
        for p in cross.parameters():
            p.normal_()
    return cross


def written_out(cross, x, text, mask, eps=1e-6):
    d, heads = cross.width, cross.heads
    q = x @ cross.q.weight.T + cross.q.bias
    kv = text @ cross.kv.weight.T + cross.kv.bias
    k, v = kv[..., :d], kv[..., d:]
    if hasattr(cross.q_norm, "weight"):
        q = q / (q.pow(2).mean(-1, keepdim=True) + eps).sqrt() * cross.q_norm.weight
        k = k / (k.pow(2).mean(-1, keepdim=True) + eps).sqrt() * cross.k_norm.weight
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        allowed = slice(None) if mask is None else mask[b]
        for h in range(heads):
            own = slice(h * d // heads, (h + 1) * d // heads)
            scores = q[b][:, own] @ k[b][allowed][:, own].T / math.sqrt(d // heads)
            out[b][:, own] = scores.exp() / scores.exp().sum(-1, keepdim=True) @ v[b][allowed][:, own]
    return out @ cross.proj.weight.T + cross.proj.bias


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_layer_written_out(qk_norm, masked, seed):
    cross = layer(seed=seed, qk_norm=qk_norm)
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    text = torch.randn(3, 5, 12, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]]).bool() if masked else None
    got = cross(x, *cross.keys_values(text), mask)
    torch.testing.assert_close(got, written_out(cross, x, text, mask), rtol=1e-9, atol=1e-10)


def test_masked_tokens_have_no_influence_and_no_gradient():
    cross = layer()
    x = torch.randn(1, 4, 12, dtype=torch.float64)
    text = torch.randn(1, 5, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True, False]])
    out = cross(x, *cross.keys_values(text), mask)
    (grad,) = torch.autograd.grad(out.square().sum(), text)
    assert torch.equal(grad[0, [2, 4]], torch.zeros(2, 12, dtype=torch.float64))
    assert (grad[0, [0, 1, 3]].abs().amin(-1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fully_masked_caption_gives_no_nan(dtype):
    q, k, v = (torch.randn(1, 2, n, 4, dtype=dtype) for n in (3, 5, 5))
    out = softmax_attention(q, k, v, torch.zeros(1, 5, dtype=torch.bool))
    torch.testing.assert_close(out, softmax_attention(q, k, v, None), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("length", [5, 16, 33])
def test_a_bias_made_before_gives_the_same_bits_as_its_mask(length, dtype, grad):
    q, k, v = (torch.randn(3, 2, n, 4, dtype=dtype) for n in (3, length, length))
    mask = torch.arange(length) < torch.tensor([[1], [length], [0]])
    with torch.set_grad_enabled(grad):
        bias = shared_bias(mask, dtype)
        assert bias.dtype == (torch.bool if grad else dtype)  # with gradients the scores would be in fp32
        assert torch.equal(softmax_attention(q, k, v, bias), softmax_attention(q, k, v, mask))
    made = attention_bias(mask, dtype)
    assert torch.equal(made, torch.where(mask, 0.0, -1e4).to(dtype))
    assert made.stride()[0] % 16 == 0
    assert torch.equal(attention_bias(made, torch.float32), made.float())


def test_the_shared_bias_has_the_type_that_autocast_gives_the_scores():
    mask = torch.tensor([[True, False]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert shared_bias(mask, torch.float32).dtype == torch.bfloat16
    assert shared_bias(None, torch.float32) is None


def test_off_gpus_every_mask_is_needed():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert needed_mask(mask) is mask
    assert needed_mask(None) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpus_need_no_mask_that_allows_everything():
    mask = torch.ones(2, 3, dtype=torch.bool, device="cuda")
    assert needed_mask(mask) is None
    mask[1, 2] = False
    assert needed_mask(mask) is mask


@pytest.mark.parametrize("masked", [False, True])
def test_forward_derivative_equals_central_differences(masked):
    arguments = tuple(torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (6, 5, 5))
    tangents = tuple(torch.randn_like(x) for x in arguments)
    mask = torch.arange(5) < torch.tensor([[2], [5]]) if masked else None

    def attend(q, k, v):
        return softmax_attention(q, k, v, mask)

    out, tangent = torch.func.jvp(attend, arguments, tangents)
    torch.testing.assert_close(out, attend(*arguments), rtol=1e-12, atol=1e-13)
    h = 1e-6
    ahead = attend(*(x + h * dx for x, dx in zip(arguments, tangents, strict=True)))
    behind = attend(*(x - h * dx for x, dx in zip(arguments, tangents, strict=True)))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=1e-7, atol=1e-8)


def test_forward_derivatives_are_noticed():
    """On GPUs the choice of kernel rests on this private level of torch's."""
    seen = []

    def watch(x):
        seen.append(forward_ad._current_level)
        return x

    watch(torch.ones(1))
    torch.func.jvp(watch, (torch.ones(1),), (torch.ones(1),))
    with forward_ad.dual_level():
        watch(torch.ones(1))
    assert seen[0] < 0 <= min(seen[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_kernel_equals_the_products():
    q, k, v = (torch.randn(2, 3, n, 16, device="cuda") for n in (65, 7, 7))
    mask = torch.arange(7) < torch.tensor([[2], [7]])
    want = softmax_attention(q.cpu(), k.cpu(), v.cpu(), mask)
    torch.testing.assert_close(softmax_attention(q, k, v, mask.cuda()).cpu(), want, rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(lambda q: softmax_attention(q, k, v, mask.cuda()), (q,), (torch.ones_like(q),))
    assert tangent.isfinite().all()


def test_flops():
    assert layer().flops(Grid(1, 2, 3), 5) == 2 * (2 * 6 * 12 * 12 + 2 * 6 * 5 * 12 + 5 * 12 * 24)


def test_width_must_hold_whole_heads():
    with pytest.raises(ValueError, match="width 12 is not a multiple of heads 5"):
        CrossAttention(12, 5)
