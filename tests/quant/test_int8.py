"""W8A8 against its definition in float64, and against torchao."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sana.quant import int8 as module
from sana.quant.int8 import Int8Linear, int8, int_mm
from sana.quant.rows import quantise_rows


class Seen(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def rows_in_numpy(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(x).max(1, keepdims=True) / 127.5
    scale[scale == 0] = 1
    return np.clip(np.rint(x / scale), -128, 127), scale


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_layer_equals_its_definition_in_float64(seed: int, bias: bool) -> None:
    torch.manual_seed(seed)
    linear, x = nn.Linear(37, 11, bias=bias), torch.randn(2, 5, 37)
    x[0, 1] = 0
    layer = Int8Linear.from_linear(linear)
    codes, scale = quantise_rows(x.flatten(0, 1))
    exact_codes, exact_scale = rows_in_numpy(x.flatten(0, 1).double().numpy())
    assert np.abs(codes.numpy() - exact_codes).max() <= 1  # ties may fall otherwise in float32
    assert (codes.numpy() == exact_codes).mean() > 0.99
    np.testing.assert_allclose(scale.numpy(), exact_scale, rtol=1e-6)
    sums = codes.double().numpy() @ layer.weight.double().numpy().T
    expected = sums * scale.numpy() * layer.scale.numpy().T + (linear.bias.detach().numpy() if bias else 0)
    np.testing.assert_allclose(layer(x).flatten(0, 1).numpy(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_codes_and_scales_are_those_of_torchao(seed: int) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    torch.manual_seed(seed)
    x = torch.randn(33, 65) * torch.logspace(-3, 3, 33).unsqueeze(1)
    codes, scale = quantise_rows(x)
    theirs = Int8Tensor.from_hp(x, PerRow())
    assert torch.equal(codes, theirs.qdata)
    assert torch.equal(scale, theirs.scale)


def test_outputs_are_those_of_torchao() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(3, 20, 64)
    layer = Int8Linear.from_linear(linear)
    theirs = nn.Sequential(linear)
    quantize_(theirs, Int8DynamicActivationInt8WeightConfig())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-5)


@given(st.integers(0, 40), st.integers(1, 70), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_integer_products_are_exact_at_any_size(m: int, k: int, n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=g)
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g)
    assert torch.equal(int_mm(x, w).double(), x.double() @ w.double().mT)
    assert torch.equal(module._in_float(x, w).double(), x.double() @ w.double().mT)


def test_the_largest_products_of_long_rows_are_exact() -> None:
    x, w = torch.full((20, 5601), -128, dtype=torch.int8), torch.full((24, 5601), 127, dtype=torch.int8)
    assert (int_mm(x, w) == -128 * 127 * 5601).all()
    assert (module._in_float(x, w) == -128 * 127 * 5601).all()


def test_processors_whose_products_saturate_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.full((1, 8), 127, dtype=torch.int8)
    assert int_mm(x, x).item() == 8 * 127**2
    real = torch._int_mm
    # As oneDNN sums on AVX2: one code offset to unsigned, pairs of products saturated to 16 bits.
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: real(x, w).clamp(-40000, 40000))
    module._try_products.cache_clear()
    try:
        assert not module._exact_on_cpu()
        assert Int8Linear.arithmetic(torch.device("cpu")).startswith("emulated")
        x, w = torch.full((3, 9), 127, dtype=torch.int8), torch.full((2, 9), -128, dtype=torch.int8)
        assert (int_mm(x, w) == -127 * 128 * 9).all()
    finally:
        module._try_products.cache_clear()


@pytest.mark.skipif(not module._exact_on_cpu(), reason="this processor has no exact int8 products")
def test_integer_products_run() -> None:
    layer, x = int8(nn.Linear(64, 48)), torch.randn(20, 64)
    with torch.no_grad(), Seen() as seen:
        layer(x)
    assert seen.names.count("aten::_int_mm") == 1
    assert not {"aten::mm", "aten::addmm"} & set(seen.names)
    assert layer.quantization.arithmetic == "int8 products on cpu"


@pytest.mark.parametrize(("outlier", "most"), [(1, 0.012), (5, 0.02), (10, 0.032)])
def test_error_of_a_layer(outlier: float, most: float) -> None:
    """Below 2 % with Gaussian numbers, and with three channels of activations that are five times as large. Outliers of
    ten times cost 3 %: they widen the steps of all other channels. Rotated, they cost below 2 % (see below)."""
    torch.manual_seed(0)
    linear, x = nn.Linear(1152, 256), torch.randn(200, 1152)
    nn.init.normal_(linear.weight)
    x[:, torch.randperm(1152)[:3]] *= outlier
    layer = Int8Linear.from_linear(linear)
    with torch.no_grad():
        expected = linear(x).double()
        error = ((layer(x).double() - expected).norm() / expected.norm()).item()
    # Steps of two independent roundings: each row's scale / sqrt(12), relative to the row's size.
    steps = [rounding(x), rounding(linear.weight.detach())]
    predicted = sum(s**2 for s in steps) ** 0.5
    assert error < most
    assert error == pytest.approx(predicted, rel=0.1)


def rounding(x: torch.Tensor) -> float:
    """Relative error of rounding rows with steps of max / 127.5."""
    step = x.abs().amax(1) / 127.5
    return (step.square().sum() * x.shape[1] / 12 / x.square().sum()).sqrt().item()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("outlier", "rotate"), [(1, 16), (10, 16), (10, 64), (50, 64)])
def test_rotated_layers_are_below_two_per_cent_with_outliers(outlier: float, rotate: int, seed: int) -> None:
    """Against numpy in float64, rotations by scipy's matrix."""
    torch.manual_seed(seed)
    linear, x = nn.Linear(1152, 256, bias=False), torch.randn(200, 1152)
    nn.init.normal_(linear.weight)
    x[:, torch.randperm(1152)[:3]] *= outlier
    layer = Int8Linear.from_linear(linear, rotate=rotate)
    with torch.no_grad():
        found = layer(x).double().numpy()
    h = np.kron(np.eye(1152 // rotate), hadamard(rotate) / rotate**0.5)
    (w, w_scale), (t, t_scale) = (rows_in_numpy(y.detach().double().numpy() @ h) for y in (linear.weight, x))
    same = layer.weight.numpy() == w
    assert same.mean() > 0.999  # ties may fall otherwise in float32
    exact = x.double().numpy() @ linear.weight.detach().double().numpy().T
    emulated = (t @ w.T) * t_scale * w_scale.T
    assert np.linalg.norm(found - emulated) < 2e-3 * np.linalg.norm(exact)
    assert np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)
    full = layer.dequantise().double().numpy()
    np.testing.assert_allclose(full, (layer.weight.numpy() * layer.scale.double().numpy()) @ h, atol=1e-5)


def test_a_rotation_takes_the_block_that_divides() -> None:
    for inputs, block in ((64, 16), (40, 8), (37, 1)):
        layer = Int8Linear.from_linear(nn.Linear(inputs, 11), rotate=16)
        assert layer.settings() == {"rotate": block}
        again = Int8Linear.empty(inputs, 11, True, **layer.settings())
        again.load_state_dict(layer.state_dict())
        x = torch.randn(3, inputs, requires_grad=True)
        assert torch.equal(again(x), layer(x))
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.ones(3, 11) @ layer.dequantise())
    linear, x = nn.Linear(37, 11), torch.randn(3, 37)
    with torch.no_grad():
        assert torch.equal(Int8Linear.from_linear(linear, rotate=16)(x), Int8Linear.from_linear(linear)(x))
    layer, x = Int8Linear.from_linear(nn.Linear(64, 24), rotate=16), torch.randn(20, 64)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    for wrong in (12, -16):
        with pytest.raises(ValueError, match=r"must be 0 .* or a power of two"):
            int8(nn.Linear(64, 8), rotate=wrong)


@pytest.mark.skipif(not module._exact_on_cpu(), reason="this processor has no exact int8 products")
def test_rotated_layers_multiply_in_int8() -> None:
    layer, x = int8(nn.Linear(64, 48), rotate=16), torch.randn(20, 64)
    with torch.no_grad(), Seen() as seen:
        layer(x)
    assert seen.names.count("aten::_int_mm") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("m", [1, 16, 17, 33, 1000])
@pytest.mark.parametrize(("k", "n"), [(64, 48), (37, 11), (5600, 2240)])
def test_products_on_cuda_are_exact(m: int, k: int, n: int) -> None:
    g = torch.Generator().manual_seed(m)
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=g)
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g)
    assert torch.equal(int_mm(x.cuda(), w.cuda()).cpu().double(), x.double() @ w.double().mT)
