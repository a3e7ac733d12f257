"""Linear layers for inference: the same numbers as nn.Linear, the same parameters, and nothing else changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sana.nn.inference import InferenceLinear, for_inference
from sana.processor import fast_in_bf16


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "seed"), [((2, 7, 33), 0), ((1, 1, 33), 1), ((5, 33), 2)])
def test_product_against_float64(shape, bias, seed):
    torch.manual_seed(seed)
    layer = nn.Sequential(nn.Linear(33, 19, bias=bias))
    x = torch.randn(shape)
    want = copy.deepcopy(layer).double()(x.double())
    fast = for_inference(layer)
    assert type(fast[0]) is InferenceLinear
    with torch.no_grad():
        got = fast(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_products_in_bf16_are_as_exact_whichever_way_they_are_taken(fast, bias, monkeypatch):
    monkeypatch.setattr("sana.nn.inference.fast_in_bf16", lambda: fast)
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(257, 31, bias=bias)).bfloat16()
    x = torch.randn(2, 9, 257).bfloat16()
    want = copy.deepcopy(plain).double()(x.double())
    with torch.no_grad():
        theirs, ours = plain(x), for_inference(copy.deepcopy(plain))(x)
    assert ours.dtype == torch.bfloat16
    error, bar = ((y.double() - want).norm() / want.norm() for y in (ours, theirs))
    assert error <= 1.05 * bar
    assert error < 3e-3, "rounding of the result to eight bits"


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("GenuineIntel", "avx2 avx512_bf16", False),
        ("GenuineIntel", "avx512_bf16 amx_tile amx_bf16", True),
        ("AuthenticAMD", "avx512_bf16", True),
        ("AuthenticAMD", "avx2", False),
        ("", "asimd bf16", True),
    ],
)
def test_processors_that_are_fast_in_bf16(vendor, flags, fast, monkeypatch):
    monkeypatch.setattr("sana.processor.cpu_facts", lambda: {"vendor_id": vendor, "flags": flags})
    assert fast_in_bf16.__wrapped__() is fast


def test_parts_of_a_larger_tensor_are_read_in_place():
    torch.manual_seed(0)
    layer, wide = for_inference(nn.Sequential(nn.Linear(8, 5))), torch.randn(3, 4, 24)
    for x in (wide[..., 8:16], wide[:, 1:3, :8], wide.transpose(0, 1)[..., :8]):
        with torch.no_grad():
            torch.testing.assert_close(layer(x), nn.functional.linear(x, layer[0].weight, layer[0].bias))


def test_parameters_and_names_stay():
    class Adapted(nn.Linear):
        pass

    network = nn.ModuleDict(
        {"a": nn.Linear(3, 4), "b": nn.Sequential(nn.Linear(4, 2), Adapted(2, 2)), "c": nn.Conv1d(2, 2, 1)}
    )
    before = dict(network.named_parameters())
    network.eval()
    assert for_inference(network) is network
    after = dict(network.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert type(network["b"][1]) is Adapted
    assert not network["a"].training
    for_inference(network)  # a second time changes nothing
    assert dict(network.named_parameters()).keys() == before.keys()


def test_gradients_and_forward_derivatives_are_those_of_linear():
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(6, 4))
    fast = for_inference(copy.deepcopy(plain))
    x = torch.randn(3, 6, requires_grad=True)
    for a, b in zip(
        *(torch.autograd.grad(n(x).square().sum(), [x, *n.parameters()]) for n in (plain, fast)), strict=True
    ):
        assert torch.equal(a, b)
    dx = torch.randn(3, 6)
    with torch.no_grad():
        _, want = torch.func.jvp(plain, (x.detach(),), (dx,))
        _, got = torch.func.jvp(fast, (x.detach(),), (dx,))
    assert torch.equal(got, want)
    assert got.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_and_autocast_are_those_of_linear(dtype):
    torch.manual_seed(2)
    plain = nn.Sequential(nn.Linear(6, 4)).to(dtype)
    fast, x = for_inference(copy.deepcopy(plain)), torch.randn(2, 6, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert fast.float()(x.float()).dtype == torch.bfloat16
