"""FP8 against torchao and against rounding done by hand in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sana.quant.fp8 import FP8Linear, fp8, quantise_fp8_rows


def round_e4m3(x: np.ndarray) -> np.ndarray:
    """Nearest number of e4m3, ties to even: three bits of mantissa, exponents from -6, at most 448."""
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-300))), -6)
    step = 2.0 ** (exponent - 3)
    return np.clip(np.rint(x / step) * step, -448, 448)


@pytest.mark.parametrize("seed", [0, 1])
def test_codes_are_the_nearest_numbers(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(7, 33) * torch.logspace(-4, 4, 7).unsqueeze(1)
    x[3], x[4, 1:] = 0, 1e-4
    codes, scale = quantise_fp8_rows(x)
    assert codes.dtype == torch.float8_e4m3fn
    assert scale[3] == 1
    expected = round_e4m3((x / scale).double().numpy())
    np.testing.assert_array_equal(codes.double().numpy(), expected)
    np.testing.assert_allclose(codes.double().abs().amax(1)[[0, 1, 2, 4, 5, 6]].numpy(), 448)


@pytest.mark.parametrize("seed", [0, 1])
def test_codes_and_scales_are_those_of_torchao(seed: int) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor

    torch.manual_seed(seed)
    linear = nn.Linear(65, 33)
    layer = FP8Linear.from_linear(linear)
    theirs = Float8Tensor.from_hp(linear.weight.detach(), granularity=PerRow())
    assert torch.equal(layer.weight.view(torch.uint8), theirs.qdata.view(torch.uint8))
    assert torch.equal(layer.scale, theirs.scale.view(-1, 1))
    torch.testing.assert_close(layer.dequantise(), theirs.dequantize(), rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_the_emulated_product_is_that_of_the_codes(bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(37, 11, bias=bias), torch.randn(2, 5, 37)
    layer = FP8Linear.from_linear(linear)
    codes, scale = quantise_fp8_rows(x)
    w = layer.weight.double() * layer.scale.double()
    expected = codes.double() @ w.mT * scale.double() + (linear.bias.double() if bias else 0)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outliers", [0, 3])
def test_error_of_a_layer_is_below_five_per_cent(outliers: int) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(1152, 256), torch.randn(200, 1152)
    nn.init.normal_(linear.weight)
    if outliers:
        x[:, torch.randperm(1152)[:outliers]] *= 100  # floats do not mind
    layer = FP8Linear.from_linear(linear)
    with torch.no_grad():
        expected = linear(x).double()
        error = ((layer(x).double() - expected).norm() / expected.norm()).item()
    assert 0.025 < error < 0.05


def test_the_report_says_that_it_is_emulated() -> None:
    layer = fp8(nn.Linear(16, 16))
    assert layer.quantization.arithmetic.startswith("emulated")
    assert "emulated" in str(layer.quantization)


REAL = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.skipif(not REAL, reason="needs compute capability 8.9")
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 48), (33, 37, 11), (1000, 5600, 2240)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_on_cuda_is_the_emulated_one(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = FP8Linear.from_linear(nn.Linear(k, n)), torch.randn(m, k).to(dtype)
    with torch.no_grad():
        expected = layer(x).float()
        found = layer.cuda()(x.cuda())
    assert found.dtype == dtype
    assert (found.cpu().float() - expected).norm() < 0.005 * expected.norm()  # bf16 has 8 bits
