"""Products in FP8 while training: values and gradients by loops in float64, parameters untouched."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchao")

from sana.quant.fp8_train import fp8_train
from sana.quant.report import report_of


def rounded(x: float, mantissa: int, lowest: int, largest: float) -> float:
    """The nearest 8-bit float, ties to even."""
    if x == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(x))), lowest) - mantissa)
    return math.copysign(min(round(abs(x) / step) * step, largest), x)


def fp8(x: np.ndarray, kind: str) -> np.ndarray:
    """Rounded with one scale, largest |x| at the largest number of the format."""
    mantissa, lowest, largest = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}[kind]
    scale = float(np.float32(largest / np.abs(x).max()))
    return np.vectorize(lambda v: rounded(float(np.float32(v * scale)), mantissa, lowest, largest) / scale)(x)


@pytest.mark.parametrize(("seed", "tokens"), [(0, 16), (1, 21)])
def test_values_and_gradients_equal_loops(seed: int, tokens: int) -> None:
    torch.manual_seed(seed)
    linear, x = nn.Linear(32, 48), torch.randn(tokens, 32, requires_grad=True)
    layer = fp8_train(linear, emulate=True)
    upstream = torch.randn(tokens, 48)
    y = layer(x)
    (y * upstream).sum().backward()
    w8, x8 = fp8(linear.weight.detach().double().numpy(), "e4m3"), fp8(x.detach().double().numpy(), "e4m3")
    g8 = fp8(upstream.double().numpy(), "e5m2")
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(y.detach().numpy(), x8 @ w8.T + linear.bias.detach().numpy(), **close)
    np.testing.assert_allclose(x.grad.numpy(), g8 @ w8, **close)
    np.testing.assert_allclose(layer.weight.grad.numpy(), g8.T @ x8, **close)
    np.testing.assert_allclose(layer.bias.grad.numpy(), upstream.sum(0).numpy(), **close)


def test_parameters_are_the_same_objects_under_the_same_names() -> None:
    network = nn.ModuleDict({"a": nn.Linear(16, 32), "odd": nn.Linear(16, 10), "left": nn.Linear(32, 16)})
    before = dict(network.named_parameters())
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fp8_train(network, exclude="left")
    after = dict(network.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in state.items())
    report = report_of(network)
    assert report.converted == {"a": 0.0}
    assert report.skipped == {"odd": "16 x 10 are not both multiples of 16", "left": "excluded by 'left'"}
    assert report.bytes_after == report.bytes_before
    assert report.arithmetic.startswith("emulated") != torch.cuda.is_available()


def test_a_regression_is_learnt_as_in_full_precision() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 32)
    target = torch.tanh(x @ torch.randn(32, 16) / 6)
    losses = []
    for convert in (False, True):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 16))
        if convert:
            fp8_train(network, emulate=True)
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        for _ in range(200):
            loss = (network(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    start = float(target.square().mean())
    assert losses[0] < 0.15 * start
    assert losses[1] < 0.2 * start


def test_forward_mode_is_refused() -> None:
    """A consistency loss would otherwise learn from a tangent of zero."""
    layer, x = fp8_train(nn.Linear(16, 16), emulate=True), torch.randn(16, 16)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(layer, (x,), (x,))
