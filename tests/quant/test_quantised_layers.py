"""What every format promises: states that load, dtypes, gradients, sizes that do not fit, and one walk."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.quant.fp8 import FP8Linear, fp8
from sana.quant.int8 import Int8Linear, int8
from sana.quant.int8_weight import Int8WeightLinear, int8_weight
from sana.quant.layer import QuantisedLinear
from sana.quant.nvfp4 import NVFP4Linear, nvfp4
from sana.quant.report import measure_errors
from sana.quant.w4a16 import W4A16Linear, w4a16
from sana.types import Condition

LAYERS = {
    "int8_weight": (Int8WeightLinear, {}, 0.02),
    "int8": (Int8Linear, {"rotate": 0}, 0.03),
    "fp8": (FP8Linear, {}, 0.06),
    "nvfp4": (NVFP4Linear, {"activations": True, "search": False}, 0.17),
    "nvfp4_search": (NVFP4Linear, {"activations": True, "search": True}, 0.15),
    "nvfp4_weight": (NVFP4Linear, {"activations": False, "search": False}, 0.13),
    "w4a16": (W4A16Linear, {"group": 16}, 0.13),
}
FORMATS = {"int8_weight": int8_weight, "int8": int8, "fp8": fp8, "nvfp4": nvfp4, "w4a16": w4a16}


@pytest.fixture(params=LAYERS)
def kind(request: pytest.FixtureRequest) -> tuple[type[QuantisedLinear], dict, float]:
    return LAYERS[request.param]


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (37, 11), (1, 1), (129, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_states_are_plain_and_load_again(kind, inputs: int, outputs: int, bias: bool, tmp_path) -> None:
    cls, options, most = kind
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, outputs, bias=bias), torch.randn(5, inputs)
    layer = cls.from_linear(linear, **options)
    plain = {torch.uint8, torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32}
    assert all(type(value) is torch.Tensor and value.dtype in plain for value in layer.state_dict().values())
    assert not list(layer.parameters())
    assert layer.settings() == json.loads(json.dumps(options)) == options
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    with torch.no_grad():
        expected = layer(x)
        other = cls.empty(inputs, outputs, bias, **layer.settings())
        other.load_state_dict(state)
        assert torch.equal(other(x), expected)
        meta = cls.empty(inputs, outputs, bias, "meta", **layer.settings())
        assert all(buffer.is_meta for buffer in meta.buffers())
        meta.load_state_dict(state, assign=True)
        assert torch.equal(meta(x), expected)
        with torch.device("meta"):
            assert all(buffer.is_meta for buffer in cls.empty(inputs, outputs, bias).buffers())
        if inputs > 1:
            assert (expected - linear(x)).norm() < 1.5 * most * linear(x).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_outputs_have_the_dtype_of_inputs(kind, dtype: torch.dtype) -> None:
    cls, options, most = kind
    torch.manual_seed(0)
    linear, x = nn.Linear(300, 20), torch.randn(4, 300)
    expected = linear(x)
    got = cls.from_linear(linear.to(dtype), **options)(x.to(dtype))
    assert got.dtype == dtype
    assert (got.float() - expected).norm() < most * expected.norm()


def test_autocast_casts_as_it_does_plain_layers(kind) -> None:
    cls, options, _ = kind
    layer, x = cls.from_linear(nn.Linear(32, 20), **options), torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()))
        assert layer(x).dtype == torch.bfloat16
        assert layer(x.double()).dtype == torch.float64


def test_shapes_of_batches_do_not_matter(kind) -> None:
    cls, options, _ = kind
    layer, x = cls.from_linear(nn.Linear(32, 20), **options), torch.randn(2, 3, 4, 32)
    torch.testing.assert_close(layer(x).flatten(0, 2), layer(x.flatten(0, 2)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer(x[0, 0, 0]), layer(x)[0, 0, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer(x.movedim(1, 2)), layer(x).movedim(1, 2), rtol=1e-6, atol=1e-6)
    assert layer(x[:0]).shape == (0, 3, 4, 20)


def test_gradients_of_inputs_are_those_of_the_dequantised_weight(kind) -> None:
    cls, options, _ = kind
    torch.manual_seed(0)
    layer, x = cls.from_linear(nn.Linear(37, 11), **options), torch.randn(2, 5, 37, requires_grad=True)
    upstream = torch.randn(2, 5, 11)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.dequantise(), rtol=1e-5, atol=1e-5)


def test_layers_compile_whole(kind) -> None:
    cls, options, _ = kind
    torch.manual_seed(0)
    layer, x = cls.from_linear(nn.Linear(40, 24), **options), torch.randn(20, 40)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


def test_casts_leave_the_stored_dtypes(kind) -> None:
    cls, options, _ = kind
    layer, x = cls.from_linear(nn.Linear(32, 20), **options), torch.randn(4, 32)
    before = {name: buffer.dtype for name, buffer in layer.named_buffers()}
    expected = layer(x)
    layer.half()
    assert {name: buffer.dtype for name, buffer in layer.named_buffers()} == before
    assert torch.equal(layer(x), expected)


def test_zeros_stay_zero(kind) -> None:
    cls, options, _ = kind
    linear = nn.Linear(32, 20)
    nn.init.zeros_(linear.weight)
    layer = cls.from_linear(linear, **options)
    assert torch.equal(layer(torch.randn(3, 32)), linear.bias.expand(3, -1))
    assert torch.equal(
        cls.from_linear(nn.Linear(32, 20, bias=False), **options)(torch.zeros(3, 32)), torch.zeros(3, 20)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_broken_activations_are_not_hidden(kind, bad: float) -> None:
    cls, options, _ = kind
    torch.manual_seed(0)
    layer, x = cls.from_linear(nn.Linear(40, 24), **options), torch.randn(5, 40)
    expected = layer(x)
    x[2, 7] = bad
    found = layer(x)
    assert not found[2].isfinite().any()
    assert torch.equal(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_very_small_and_very_large_weights(kind, size: float) -> None:
    cls, options, most = kind
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 20, bias=False), torch.randn(4, 64)
    with torch.no_grad():
        linear.weight *= size
        expected = linear(x).double()
        found = cls.from_linear(linear, **options)(x).double()
    assert (found - expected).norm() < most * expected.norm()


def network(seed: int = 0) -> Sana:
    torch.manual_seed(seed)
    block = partial(
        Block,
        mixer=partial(LinearAttention, head_dim=8, qk_norm=True),
        cross=partial(CrossAttention, heads=2, qk_norm=True),
        ffn=MixFFN,
    )
    net = Sana(4, 32, 3, 24, [block], text_norm=1.0).eval()
    for parameter in net.parameters():  # at the start some branches are zero
        nn.init.normal_(parameter, std=0.2)
    return net


@pytest.mark.parametrize("name", FORMATS)
def test_whole_networks(name: str) -> None:
    most = LAYERS[name][2]
    before, after = network(), FORMATS[name](network(), exclude=["*_embed.*", "modulation.*", "final.*", "*.cross.kv"])
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 1, 6, 5, generator=g), torch.randn(2, 7, 24, generator=g)
    condition = Condition(text, torch.ones(2, 7, dtype=torch.bool))
    report = measure_errors(before, after, (x, torch.full((2, 1), 0.5), condition))
    layers = {name: m for name, m in after.named_modules() if isinstance(m, QuantisedLinear)}
    assert list(report.converted) == list(layers)
    assert len(layers) == 3 * 6
    assert {k.rsplit(".", 1)[-1] for k in layers} == {"qkv", "proj", "q", "inverted", "point"}
    plain = [n for n, m in after.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    assert set(plain) <= set(report.skipped)
    assert all(0 < error < most for error in report.converted.values())
    assert report.outputs.keys() == layers.keys()
    assert all(0 < error < 2 * most for error in report.outputs.values())
    assert report.output is not None
    assert 0 < report.output < 8 * most
    assert report.bytes_after < report.bytes_before


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_refused(name: str, bad: float) -> None:
    net = network()
    with torch.no_grad():
        net.blocks[1].ffn.point.weight[3, 2] = bad
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.point is not finite"):
        FORMATS[name](net)
    assert type(net.blocks[0].ffn.point) is nn.Linear
