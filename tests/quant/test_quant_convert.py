from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sana.quant.conv_linear import ConvLinear, as_linear, is_pointwise
from sana.quant.convert import NotConverted, convert
from sana.quant.int8_weight import Int8WeightLinear, int8_weight
from sana.quant.report import measure_errors, report_of


class GLUMBConv(nn.Module):
    """A Mix-FFN with 1x1 convolutions, as in networks of other origin."""

    def __init__(self) -> None:
        super().__init__()
        self.inverted = nn.Conv2d(6, 20, 1)
        self.depthwise = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.point = nn.Conv2d(10, 6, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.depthwise(torch.nn.functional.silu(self.inverted(x))).chunk(2, 1)
        return self.point(a * torch.nn.functional.silu(b))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.ffn = GLUMBConv()
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.ffn(self.first(x).movedim(-1, 1)).movedim(1, -1))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_a_pointwise_convolution_equals_its_linear(seed: int, bias: bool) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(7, 11, 1, bias=bias, padding="same" if seed else 0)
    layer = ConvLinear(as_linear(conv))
    x = torch.randn(2, 7, 3, 5)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = conv(one), layer(two)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    found.backward(upstream)
    torch.testing.assert_close(two.grad, one.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer(x[0]), conv(x[0]), rtol=1e-6, atol=1e-6)  # without a batch
    assert layer.linear.weight.data_ptr() == conv.weight.data_ptr()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 1, stride=2),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 4, 1, groups=2),
    ],
)
def test_other_convolutions_are_not_pointwise(conv: nn.Conv2d) -> None:
    assert not is_pointwise(conv)
    with pytest.raises(ValueError, match="no 1x1 convolution"):
        as_linear(conv)


def test_convolutions_are_converted_under_their_names() -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 4, 5, 5)
    before = copy.deepcopy(net)
    report = int8_weight(net, exclude="last").quantization
    assert list(report.converted) == ["first", "ffn.inverted", "ffn.point"]
    assert report.skipped == {
        "ffn.depthwise": "Conv2d with kernel (3, 3) and 20 groups is not pointwise",
        "last": "excluded by 'last'",
    }
    assert isinstance(net.ffn.inverted, ConvLinear)
    assert isinstance(net.ffn.inverted.linear, Int8WeightLinear)
    assert (net(x) - before(x)).norm() < 0.02 * before(x).norm()


def test_counts_and_bytes_are_those_of_the_module_tree() -> None:
    net = Net()
    holders = [m for m in net.modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))]
    size = sum(p.numel() * 4 for p in net.parameters())
    report = int8_weight(net).quantization
    layers = [m for m in net.modules() if isinstance(m, Int8WeightLinear)]
    assert len(report.converted) == len(layers) == 4
    assert len(report.converted) + len(report.skipped) == len(holders)
    assert report.bytes_before == size
    assert report.bytes_after == sum(t.numel() * t.element_size() for t in net.state_dict().values())
    text = str(report)
    assert text.startswith("int8_weight in 4 layers, 1 skipped")
    assert "dequantised for each product" in text


def test_a_format_may_decline_layers_with_a_reason() -> None:
    def make(name: str, linear: nn.Linear) -> Int8WeightLinear | None:
        if name == "first":
            raise NotConverted("5 inputs are too few")
        return None if name == "last" else Int8WeightLinear.from_linear(linear)

    net = convert(Net(), make, kind="some")
    assert report_of(net).skipped["first"] == "5 inputs are too few"
    assert report_of(net).skipped["last"] == "the format does not take it"
    assert type(net.first) is type(net.last) is nn.Linear


def test_nothing_is_changed_on_an_error() -> None:
    def make(name: str, linear: nn.Linear) -> Int8WeightLinear:
        if name == "last":
            raise ValueError("no")
        return Int8WeightLinear.from_linear(linear)

    net = Net()
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="no"):
        convert(net, make, kind="some")
    assert type(net.first) is nn.Linear
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())


def test_errors_of_outputs_are_those_of_a_direct_comparison() -> None:
    torch.manual_seed(0)
    before, x = Net(), torch.randn(2, 4, 5, 5)
    after = int8_weight(copy.deepcopy(before), exclude="last")
    report = measure_errors(before, after, x)
    assert report is after.quantization
    with torch.no_grad():
        y, y_ = before(x).double(), after(x).double()
        assert report.output == pytest.approx(((y_ - y).norm() / y.norm()).item(), rel=1e-9)
        h = before.first(x).movedim(-1, 1)
        a, b = before.ffn.inverted(h).double(), after.ffn.inverted(h).double()
    assert report.outputs["ffn.inverted"] == pytest.approx(((b - a).norm() / a.norm()).item(), rel=1e-9)
    assert report.outputs.keys() == report.converted.keys()
    assert f"output error {report.output:.2%}" in str(report)
    # The same by a function and by positional arguments; several calls of a layer count together.
    twice = measure_errors(before, after, lambda network: torch.cat([network(x), network(x)]))
    assert twice.output == pytest.approx(report.output, rel=1e-9)
    assert measure_errors(before, after, (x,)).outputs == report.outputs
    assert not before.first._forward_hooks


def test_errors_need_a_quantised_network_and_its_original() -> None:
    with pytest.raises(ValueError, match="was not quantised"):
        measure_errors(Net(), Net(), torch.randn(1, 1, 1, 5))
    with pytest.raises(ValueError, match="'first' is no layer of the unquantised Sequential"):
        measure_errors(nn.Sequential(), int8_weight(Net()), torch.randn(1, 1, 1, 5))


def test_casting_a_network_leaves_what_the_format_stores() -> None:
    net = int8_weight(Net())
    scale = net.first.scale.clone()
    net.bfloat16()
    assert net.first.scale.dtype == torch.float32
    assert torch.equal(net.first.scale, scale)
    assert net.first.weight.dtype == torch.int8
    assert net.ffn.depthwise.weight.dtype == torch.bfloat16
    assert net.to("meta").first.weight.is_meta


def test_forward_derivatives_are_refused() -> None:
    layer, x = int8_weight(nn.Linear(4, 3)), torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(layer, (x,), (x,))
