"""SVDQuant against loops in float64, the identities it rests on, and what it is for: outliers cost less than in plain
4 bits."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from sana.quant.calibrate import Activations, collect
from sana.quant.int4 import dequantise_groups, pack_codes, quantise_groups, unpack_codes
from sana.quant.low_rank import low_rank
from sana.quant.report import measure_errors, report_of
from sana.quant.svdquant import SVDQuant, SVDQuantLinear, candidates, fit

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def bf16(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).to(torch.float32).to(torch.bfloat16))


def e4m3(x: float) -> float:
    """The nearest number of e4m3 in [2^-6, 448], ties to even."""
    x = min(max(x, 2.0**-6), 448.0)
    step = 2.0 ** (math.floor(math.log2(x)) - 3)
    return min(round(x / step) * step, 448.0)


def int4(row: list[float], levels: float, group: int = 64) -> list[float]:
    out = []
    for start in range(0, len(row), group):
        part = row[start : start + group]
        scale = bf16(max(map(abs, part)) / levels) or 1.0
        out += [min(max(round(v / scale), -8), 7) * scale for v in part]
    return out


def fp4(row: list[float], over: float, block: int = 16) -> list[float]:
    out = []
    for start in range(0, len(row), block):
        part = row[start : start + block]
        scale = e4m3(max(map(abs, part)) / 6 / over) * over
        for v in part:
            size = min(abs(v) / scale, 6.0)
            out.append(math.copysign(min(E2M1, key=lambda m: abs(m - size)), v) * scale)
    return out


def product_by_loops(layer: SVDQuantLinear, x: np.ndarray) -> np.ndarray:
    """y = Q(x / s) Q(R)^T + (x D) U^T + b, element by element, from the layer's buffers."""
    smooth = layer.smooth_factor.double().numpy()
    down, up = layer.proj_down.double().numpy(), layer.proj_up.double().numpy()
    fp = layer.precision == "nvfp4"
    group = 16 if fp else 64
    scales = layer.wscales.float().numpy()
    out = np.zeros((len(x), layer.out_features))
    weight = np.zeros((layer.out_features, layer.in_features))
    for o in range(layer.out_features):
        for i in range(layer.in_features):
            byte = int(layer.qweight[o, i // 2])
            code = byte >> 4 if i % 2 else byte & 15
            value = math.copysign(E2M1[code & 7], -1 if code & 8 else 1) if fp else code - 8
            weight[o, i] = value * scales[i // group, o] * (float(layer.wtscale) if fp else 1)
    for m, row in enumerate(x):
        smoothed = [float(np.float32(v) / np.float32(s)) for v, s in zip(row, smooth, strict=True)]
        largest = max(map(abs, smoothed)) / (448 * 6)
        given = fp4(smoothed, largest) if fp else int4(smoothed, 7.0)
        small = [sum(row[i] * down[i, r] for i in range(len(row))) for r in range(down.shape[1])]
        for o in range(layer.out_features):
            total = sum(g * w for g, w in zip(given, weight[o], strict=True))
            total += sum(s * up[o, r] for r, s in enumerate(small))
            out[m, o] = total + (0.0 if layer.bias is None else float(layer.bias[o]))
    return out


def outliers(seed: int, n: int = 96, k: int = 80, m: int = 40) -> tuple[nn.Linear, torch.Tensor]:
    """Weights and activations with channels far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(k, m)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(m, k, generator=generator) / k**0.5)
        linear.weight[:, 5] *= 12
        linear.weight[7] *= 6
    x = torch.randn(n, k, generator=generator)
    x[:, [3, 20, 61]] *= 30
    return linear, x


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def fitted(linear: nn.Linear, x: torch.Tensor, rank: int = 8, precision: str = "int4") -> SVDQuantLinear:
    layer = SVDQuantLinear.from_linear(linear, rank=rank, precision=precision)
    fit(layer, linear.weight.detach(), Activations(x, x.abs().amax(0)))
    return layer


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize(("inputs", "outputs", "bias", "seed"), [(80, 7, True, 0), (33, 5, False, 1)])
def test_a_product_equals_loops(precision: str, inputs: int, outputs: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    linear, x = nn.Linear(inputs, outputs, bias=bias), torch.randn(4, inputs) * torch.rand(inputs).exp()
    layer = fitted(linear, torch.randn(20, inputs), rank=3, precision=precision)
    expected = product_by_loops(layer, x.double().numpy())
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_what_the_buffers_stand_for(precision: str) -> None:
    """Q(R) / s + U D^T is the weight up to the rounding of the rest, which is less than half a step of its group."""
    linear, x = outliers(0)
    layer = fitted(linear, x, precision=precision)
    smooth = layer.smooth_factor.double()
    branch = layer.proj_up.double() @ layer.proj_down.double().mT
    rest = (linear.weight.detach().double() - branch) * smooth
    group = 64 if precision == "int4" else 16
    error = (layer.rest().double() - rest).abs()
    steps = layer.wscales.float().mT.repeat_interleave(group, dim=1)[:, : layer.in_features].double()
    if layer.wtscale is not None:
        steps = 2 * steps * float(layer.wtscale)  # the widest gap, between 4 and 6
    assert (error <= 0.54 * steps).all()
    whole = layer.dequantise().double() - linear.weight.detach().double()
    assert (whole * smooth).abs().max() <= 0.54 * steps.max()


def test_codes_pack_and_unpack() -> None:
    codes = torch.arange(-8, 8).float().repeat(2, 4)
    assert torch.equal(unpack_codes(pack_codes(codes)), codes)


@pytest.mark.parametrize("levels", [7.0, 7.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_groups_equal_loops(levels: float, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(5, 70)
    x[2, :64] = 0
    codes, scale = quantise_groups(x, 64, levels)
    expected = [int4(row, levels) for row in x.double().tolist()]
    np.testing.assert_allclose(dequantise_groups(codes, scale)[:, :70].numpy(), expected, rtol=1e-6)
    assert (codes[:, 70:] == 0).all()


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_outliers_cost_less_than_in_plain_four_bits(precision: str, seed: int) -> None:
    linear, x = outliers(seed)
    fresh = outliers(seed + 100)[1]  # other tokens with the same outlying channels
    plain = SVDQuantLinear.from_linear(linear, rank=0, precision=precision)
    branch = SVDQuantLinear.from_linear(linear, rank=8, precision=precision)
    whole = fitted(linear, x, precision=precision)
    with torch.no_grad():
        expected = linear(fresh) - linear.bias
        errors = [relative(layer(fresh) - layer.bias, expected) for layer in (plain, branch, whole)]
    assert errors[1] < errors[0]
    assert errors[2] < 0.6 * errors[0]
    assert errors[2] < errors[1]


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_smoothing_is_chosen_where_activations_have_outliers(precision: str) -> None:
    linear, x = outliers(3)
    layer = fitted(linear, x, rank=4, precision=precision)
    smooth = layer.smooth_factor.float()
    assert smooth[[3, 20, 61]].min() > 2 * smooth.median()


def test_the_choice_is_the_best_of_all_candidates() -> None:
    """Each candidate's error by plain formulas, with what is stored and its rounding; nothing beats what was taken."""
    linear, x = outliers(4, n=30, k=66, m=9)
    weight = linear.weight.detach()
    layer = SVDQuantLinear.empty(66, 9, False, rank=2)
    errors = fit(layer, weight, Activations(x, x.abs().amax(0)), rounds=0)
    found = []
    for _, _, scale in candidates(x.abs().amax(0), weight.abs().amax(0)):
        u, s, vh = np.linalg.svd((weight * scale).double().numpy(), full_matrices=False)
        other = SVDQuantLinear.empty(66, 9, False, rank=2)
        other.fill(weight, scale, torch.tensor(u[:, :2] * s[:2]).float(), torch.tensor(vh[:2]).float())
        y = product_by_loops(other, x.double().numpy())
        full = x.double().numpy() @ weight.double().numpy().T
        found.append(((y - full) ** 2).sum() / (full**2).sum())
    assert len(found) == 39
    assert errors[0] == pytest.approx(min(found), rel=1e-3)


def test_candidates_are_powers() -> None:
    ax, aw = torch.tensor([2.0, 0.0, 9.0, 1.0]), torch.tensor([0.5, 3.0, 0.0, 1.0])
    found = list(candidates(ax, aw))
    assert [(round(a * 20), round(b * 20)) for a, b, _ in found[:5]] == [(0, 0), (1, 0), (1, 19), (2, 0), (2, 18)]
    for a, b, scale in found:
        assert scale[0] == pytest.approx(2.0**a / 0.5**b, rel=2**-8)
        assert scale[3] == 1
        assert (scale > 0).all()
        if b > 0:
            assert scale[2] == 1, "no weight: not defined"
        if a > 0:
            assert scale[1] == 1, "no activation: zero"


def test_rounds_never_end_worse_than_they_began() -> None:
    for seed in range(3):
        linear, x = outliers(seed)
        layer = SVDQuantLinear.from_linear(linear, rank=4)
        errors = fit(layer, linear.weight.detach(), Activations(x, x.abs().amax(0)))
        assert all(b < a for a, b in itertools.pairwise(errors[:-1]))
        with torch.no_grad():
            stored = relative(layer(x) - linear.bias, linear(x) - linear.bias) ** 2
        assert stored == pytest.approx(min(errors), rel=1e-3)


def test_a_matrix_of_low_rank_leaves_nothing_to_round() -> None:
    """W of rank 3 with bf16 factors and a branch of rank 3: the output is exact up to the bits of the branch."""
    torch.manual_seed(0)
    linear = nn.Linear(40, 30, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(30, 3) @ torch.randn(3, 40))
    x = torch.randn(50, 40)
    layer = fitted(linear, x, rank=3)
    with torch.no_grad():
        assert relative(layer(x), linear(x)) < 0.005  # bf16 alone: 2^-9 per factor


def test_numbers_of_the_format_stay_as_they_are() -> None:
    """Codes times a power of two, weights and tokens: no rounding anywhere without branch and smoothing."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 16, bias=False)
    codes = torch.randint(-7, 8, (16, 64)).float()
    codes[:, 0] = 7.5  # makes the scale 2^-3; itself it is rounded
    x = torch.randint(-7, 8, (9, 64)).float()
    x[:, 1], x[:, 0] = 7, 0
    with torch.no_grad():
        linear.weight.copy_(codes / 8)
    layer = SVDQuantLinear.from_linear(linear, rank=0)
    with torch.no_grad():
        assert torch.equal(layer(x / 4), linear(x / 4))


@pytest.mark.parametrize("shape", [(600, 900), (900, 600), (20, 30)])
def test_low_rank_is_the_nearest(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(*shape) + 5 * torch.randn(shape[0], 6) @ torch.randn(6, shape[1])
    up, down = low_rank(matrix, 10)
    u, s, vh = np.linalg.svd(matrix.double().numpy())
    best = math.sqrt((s[10:] ** 2).sum())
    assert np.linalg.norm((matrix - up @ down).double().numpy()) <= 1.002 * best
    again = low_rank(matrix, 10)
    assert torch.equal(up, again[0])
    assert torch.equal(down, again[1])
    del u, vh


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(70, 50), nn.Linear(50, 40, bias=False), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_a_network_is_calibrated_by_what_it_meets() -> None:
    torch.manual_seed(0)
    network, x = Network(), torch.randn(3, 200, 70)
    x[..., 4] *= 25

    before = copy.deepcopy(network)
    quantised = SVDQuant(rank=4, rows=100)(network, lambda net: [net(part) for part in x])
    report = report_of(quantised)
    assert report.kind == "svdquant_w4a4"
    assert set(report.converted) == {"first", "second"}
    assert report.skipped == {"idle": "calibration never reached it"}
    assert report.arithmetic.startswith("emulated")
    measure_errors(before, quantised, x)
    plain = copy.deepcopy(before)
    for name in ("first", "second"):
        setattr(plain, name, SVDQuantLinear.from_linear(getattr(plain, name), rank=0))
    with torch.no_grad():
        assert report.output < 0.7 * relative(plain(x), before(x))


def test_what_is_collected() -> None:
    torch.manual_seed(0)
    network, x = Network(), torch.randn(5, 7, 70)
    found = collect(network, lambda net: [net(part) for part in x], rows=1000)
    assert set(found) == {"first", "second"}
    assert torch.equal(found["first"].rows, x.flatten(0, 1))
    assert torch.equal(found["first"].largest, x.flatten(0, 1).abs().amax(0))
    few = collect(network, lambda net: net(x), rows=9)["first"]
    assert few.rows.shape == (9, 70)
    assert all((row == x.flatten(0, 1)).all(1).any() for row in few.rows)
    assert torch.equal(few.largest, found["first"].largest), "of all tokens, not of those that are kept"
    assert not network.first._forward_pre_hooks


def test_refusals() -> None:
    with pytest.raises(ValueError, match="needs calibration"):
        SVDQuant()(Network())
    with pytest.raises(ValueError, match="precision='int3' must be one of int4, nvfp4"):
        SVDQuantLinear.empty(8, 8, False, precision="int3")
    with pytest.raises(ValueError, match="rank=-1"):
        SVDQuantLinear.empty(8, 8, False, rank=-1)
    with pytest.raises(ValueError, match="first is given numbers that are not finite"):
        collect(Network(), lambda net: net(torch.full((2, 70), math.inf)))
    with pytest.raises(ValueError, match="expected at least 1"):
        collect(Network(), lambda net: net(torch.ones(2, 70)), rows=0)


def test_on_the_meta_device_nothing_is_fitted() -> None:
    with torch.device("meta"):
        network = SVDQuant()(Network())
    state = network.state_dict()
    assert all(t.is_meta for t in state.values())
    assert state["first.qweight"].shape == (50, 64)
    assert state["first.wscales"].shape == (2, 50)
    assert state["first.proj_down"].shape == (70, 32)
    assert state["first.proj_up"].shape == (50, 32)


def test_the_gradient_is_that_of_what_the_buffers_stand_for() -> None:
    linear, x = outliers(0)
    layer, x = fitted(linear, x), x[:3].clone().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantise().sum(0).expand(3, -1))
