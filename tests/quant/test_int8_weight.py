from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sana.quant.int8_weight import Int8WeightLinear, int8_weight


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 18, bias=False)
        self.ffn = nn.Sequential(nn.Linear(6, 10), nn.SiLU(), nn.Linear(10, 6))
        self.depthwise = nn.Conv1d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.ffn(q * k.sigmoid() + v) + self.depthwise(x.mT).mT


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


LINEARS = [f"blocks.{i}.{name}" for i in range(2) for name in ("qkv", "ffn.0", "ffn.2")] + ["head"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_layer_equals_its_definition_in_numpy(seed, bias):
    torch.manual_seed(seed)
    linear = nn.Linear(13, 7, bias=bias)
    with torch.no_grad():
        linear.weight[2] = 0
        linear.weight[3] *= 1e-20
    w = linear.weight.detach().numpy().astype(np.float64)
    scale = np.abs(w).max(1, keepdims=True) / 127.5
    scale[scale == 0] = 1
    q = np.rint(w / scale).clip(-128, 127)
    layer = Int8WeightLinear.from_linear(linear)
    assert layer.weight.dtype == torch.int8
    assert (layer.weight.numpy() == q).mean() > 0.98  # ties may round differently in float32
    assert np.abs(layer.weight.numpy() - q).max() <= 1
    np.testing.assert_allclose(layer.scale.numpy(), scale, rtol=1e-6)
    x = torch.randn(3, 5, 13, requires_grad=True)
    expected = x.detach().numpy() @ (layer.weight.numpy() * scale).T + (linear.bias.detach().numpy() if bias else 0)
    y = layer(x)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    y.sum().backward()
    np.testing.assert_allclose(
        x.grad.numpy(), np.broadcast_to((layer.weight.numpy() * scale).sum(0), x.shape), rtol=1e-5, atol=1e-6
    )


def test_each_weight_is_within_half_a_step():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    layer = Int8WeightLinear.from_linear(linear)
    error = (layer.weight * layer.scale - linear.weight).abs()
    assert (error <= 0.5001 * layer.scale).all()


def test_all_linear_layers_are_converted_and_the_output_hardly_changes():
    torch.manual_seed(0)
    network, x = Network(), torch.randn(2, 11, 6)
    before = network(x)
    quantised = int8_weight(network)
    report = quantised.quantization
    assert quantised is network
    assert list(report.converted) == LINEARS
    assert set(report.skipped) == {"blocks.0.depthwise", "blocks.1.depthwise"}
    assert all("Conv1d" in reason for reason in report.skipped.values())
    assert not any(type(m) is nn.Linear for m in network.modules())
    error = (quantised(x) - before).norm() / before.norm()
    assert 1e-4 < error < 2e-2
    assert all(1e-4 < e < 1e-2 for e in report.converted.values())


def test_reported_error_and_bytes_are_right():
    torch.manual_seed(0)
    linear = nn.Linear(40, 20)
    weight = linear.weight.detach().clone()
    layer = int8_weight(linear)
    report = layer.quantization
    assert isinstance(layer, Int8WeightLinear)
    error = (layer.weight * layer.scale - weight).norm() / weight.norm()
    assert report.converted[""] == pytest.approx(error.item(), rel=1e-4)
    # Rounding is uniform noise of a step scale / sqrt(12).
    assert report.converted[""] == pytest.approx(
        (layer.scale.square().mean() / 12).sqrt().item() / weight.square().mean().sqrt().item(), rel=0.1
    )
    assert report.bytes_before == 4 * (40 * 20 + 20)
    assert report.bytes_after == 40 * 20 + 4 * 20 + 4 * 20
    assert "skipped" in str(report)


def test_patterns_choose_layers_and_reasons_are_given():
    network = int8_weight(Network(), include=["blocks.*"], exclude="*.ffn.2")
    assert list(network.quantization.converted) == [f"blocks.{i}.{n}" for i in range(2) for n in ("qkv", "ffn.0")]
    assert network.quantization.skipped["head"] == "not included by 'blocks.*'"
    assert network.quantization.skipped["blocks.1.ffn.2"] == "excluded by '*.ffn.2'"
    assert type(network.head) is nn.Linear
    assert type(network.blocks[1].ffn[2]) is nn.Linear


def test_shared_weights_stay_shared():
    network = Network()
    network.head.weight = nn.Parameter(torch.randn(10, 6))
    network.blocks[0].ffn[0].weight = network.head.weight
    report = int8_weight(network).quantization
    assert report.skipped["head"] == "its weight is shared with blocks.0.ffn.0"
    assert report.skipped["blocks.0.ffn.0"] == "its weight is shared with head"
    twice = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    twice.append(twice[0])
    int8_weight(twice)
    assert isinstance(twice[0], Int8WeightLinear)
    assert twice[2] is twice[0]


def test_layers_that_use_their_weight_otherwise_are_left_alone():
    network = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    report = int8_weight(network).quantization
    assert list(report.converted) == ["1"]
    assert "not a plain" in report.skipped["0.out_proj"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(300, 20)
    x = torch.randn(4, 300)
    expected = linear(x)
    got = int8_weight(linear.to(dtype))(x.to(dtype))
    assert got.dtype == dtype
    assert ((got.float() - expected).norm() / expected.norm()) < 1.5e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert int8_weight(nn.Linear(4, 3))(torch.randn(2, 4)).dtype == torch.bfloat16


def test_quantised_weights_are_saved_and_loaded(tmp_path):
    network, x = int8_weight(Network()), torch.randn(2, 5, 6)
    torch.save(network.state_dict(), tmp_path / "q.pt")
    other = int8_weight(Network())
    other.load_state_dict(torch.load(tmp_path / "q.pt", weights_only=True))
    assert torch.equal(network(x), other(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "block.*"}, "block"),
        ({"exclude": ["head", "tail"]}, "tail"),
        ({"exclude": "*"}, "no layer to convert"),
    ],
)
def test_choices_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        int8_weight(Network(), **options)


def test_broken_weights_are_refused_by_name():
    network = Network()
    network.blocks[1].qkv.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.qkv"):
        int8_weight(network)
    assert type(network.head) is nn.Linear  # and nothing was changed
