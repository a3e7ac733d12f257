"""The kernels around a decoder's convolutions against plain torch in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sana.encoder.autoencoder.blocks import ResBlock, Upsample
from sana.encoder.autoencoder.dc_ae import DCAE
from sana.ops.choice import set_kernels
from sana.ops.decoding import naive, op

LIMIT = {torch.float32: 1e-5, torch.bfloat16: None, torch.float16: None}


def make(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def close(got: Tensor, want: Tensor, plain: Tensor, dtype: torch.dtype, times: float = 1.2) -> None:
    """Within 1e-5 in fp32, and within `times` the error of plain torch in half precision."""
    assert got.dtype == dtype
    error, usual = ((y.double() - want).norm() / want.norm() for y in (got, plain))
    assert error <= (1e-5 if dtype == torch.float32 else times * usual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8, 3, 5), (3, 17, 4, 1), (2, 130, 9, 7)])
def test_bias_and_silu(shape, dtype, kernel_device, nan_buffers, triton_kernels):
    x, bias = make(shape, dtype, kernel_device, 0), make(shape[1:2], dtype, kernel_device, 1)
    assert op.kernels_for(x, bias)
    got = op.bias_silu(x, bias)
    assert len(nan_buffers) == 1
    close(got, naive.bias_silu(x.double(), bias.double()), naive.bias_silu(x, bias), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (8, 40, 3, 3), (33, 16, 3, 3)])
def test_kernels_of_a_doubled_map(shape, dtype, kernel_device, nan_buffers, triton_kernels):
    weight = make(shape, dtype, kernel_device, 2)
    got, plain = op.doubling_kernels(weight), naive.doubling_kernels(weight)
    for one, want, usual in zip(got, naive.doubling_kernels(weight.double()), plain, strict=True):
        assert one.is_contiguous(memory_format=torch.channels_last)
        close(one, want, usual, dtype)
    assert len(nan_buffers) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "c", "d", "h", "w"), [(1, 4, 4, 3, 5), (2, 8, 4, 1, 7), (3, 6, 12, 4, 2), (1, 16, 8, 9, 9)]
)
@pytest.mark.parametrize("shortcut", [True, False])
def test_doubling_is_convolving_the_repeated_map(
    b, c, d, h, w, shortcut, dtype, kernel_device, nan_buffers, triton_kernels
):
    torch.manual_seed(b)
    layer = Upsample(c, d, shuffle=False, shortcut=shortcut).to(kernel_device, dtype)
    layer = layer.to(memory_format=torch.channels_last)
    x = make((b, c, h, w), dtype, kernel_device, 3)
    exact = copy.deepcopy(layer).double()
    wide = x.double()
    want = exact.conv(F.interpolate(wide, scale_factor=2.0, mode="nearest"))
    plain = layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    if shortcut:
        added = [F.pixel_shuffle(y.repeat_interleave(4 * d // c, dim=1), 2) for y in (wide, x)]
        want, plain = want + added[0], plain + added[1]
    with torch.no_grad():
        assert op.kernels_for(x, layer.conv.weight, layer.conv.bias)
        got = layer(x)
    assert len(nan_buffers) in (1, 2), "the result, and on a GPU the kernels' weights"
    close(got, want, plain, dtype, 2.5)  # sums of weights and the parts are rounded to bf16 too, as much as the result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("b", "c", "d", "h", "w"), [(1, 4, 4, 3, 5), (2, 8, 4, 1, 7), (3, 6, 12, 4, 2), (1, 4, 1, 1, 1)]
)
@pytest.mark.parametrize("shortcut", [True, False])
def test_parts_of_a_doubled_map_are_joined(b, c, d, h, w, shortcut, dtype, kernel_device, nan_buffers, triton_kernels):
    """Called by itself: on a CPU, convolutions add the bias, and the layer does without this kernel."""
    parts = [make((b, d, h + 1, w + 1), dtype, kernel_device, seed) for seed in range(4)]
    x, bias = make((b, c, h, w), dtype, kernel_device, 4), make((d,), dtype, kernel_device, 5)
    got = op.double(parts, x, bias, shortcut)
    assert len(nan_buffers) == 1
    want = naive.double([part.double() for part in parts], x.double(), bias.double(), shortcut)
    close(got, want, naive.double(parts, x, bias, shortcut), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("b", "c", "d", "h", "w"), [(1, 8, 3, 4, 5), (2, 70, 1, 1, 130), (3, 128, 16, 3, 2)])
def test_convolution_to_few_channels(b, c, d, h, w, dtype, kernel_device, nan_buffers, triton_kernels):
    x, bias = make((b, c, h, w), dtype, kernel_device, 4), make((d,), dtype, kernel_device, 5)
    weight = make((d, c, 3, 3), dtype, kernel_device, 6) / c**0.5
    got = op.convolve_to_few(x, weight, bias)
    assert len(nan_buffers) == 1
    want = naive.convolve_to_few(x.double(), weight.double(), bias.double())
    close(got, want, naive.convolve_to_few(x, weight, bias), dtype)


def test_what_is_differentiated_or_lies_otherwise_is_plain(kernel_device, nan_buffers, triton_kernels):
    block = ResBlock(8).to(kernel_device)
    x = torch.randn(1, 8, 4, 4, device=kernel_device)
    assert not op.kernels_for(x, block.conv1.weight, block.conv1.bias), "not in channels_last"
    x = x.contiguous(memory_format=torch.channels_last)
    assert not op.kernels_for(x, block.conv1.weight, block.conv1.bias), "gradients are recorded"
    with torch.no_grad():
        assert op.kernels_for(x, block.conv1.weight, block.conv1.bias)
        assert not op.kernels_for(x.bfloat16(), block.conv1.weight), "of two types"
        torch.func.jvp(lambda y: (op.kernels_for(y) and pytest.fail("a derivative is taken"), y)[1], (x,), (x,))


def test_a_decoder_with_kernels(kernel_device):
    torch.manual_seed(7)
    model = DCAE(
        channels=4, encoder_widths=(8, 16, 32), encoder_depths=(1, 1, 1), encoder_attention=(False, False, True),
        decoder_widths=(8, 16, 32), decoder_depths=(1, 1, 1), decoder_attention=(False, False, True), head_dim=16,
    ).eval().requires_grad_(False)  # fmt: skip
    z = torch.randn(1, 4, 3, 5)
    want = copy.deepcopy(model).double().decode(z.double())
    model, z = model.to(kernel_device), z.to(kernel_device)
    try:
        set_kernels("triton")
        with torch.no_grad():
            got = model.decode(z)
    finally:
        set_kernels("auto")
    assert ((got.cpu().double() - want).norm() / want.norm()).item() < 1e-5
