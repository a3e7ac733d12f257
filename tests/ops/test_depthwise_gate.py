"""The middle of Mix-FFN by Triton against plain torch in float64: values, gradients, types, layouts."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sana.ops.depthwise_gate import naive, op

SHAPES = [(1, 1, 1, 1), (1, 2, 3, 5), (3, 1, 4, 2), (1, 5, 2, 16), (2, 3, 1, 33)]
SLOW = [(1, 4, 9, 8), (2, 7, 5, 70), (1, 9, 4, 24), (1, 3, 17, 3), (3, 6, 2, 65), (1, 1, 8, 130), (1, 8, 1, 12)]
"""b, h, w, c."""


@pytest.fixture(autouse=True)
def plain_convolutions_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def draw(b, h, w, c, seed=0, device="cpu", dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    sizes = (b, h * w, 2 * c), (2 * c, 1, 3, 3), (2 * c,)
    u, weight, bias = (torch.randn(size, generator=g).to(device, dtype) for size in sizes)
    return [2 * u, weight / 2, bias]


def results(f, arguments, h, w):
    """Output and gradients of u, weight and bias for a random linear function of it."""
    leaves = [x.detach().requires_grad_() for x in arguments]
    y = f(*leaves, h, w)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.device, y.dtype)
    return [y, *torch.autograd.grad((y * g).sum(), leaves)]


def exact(arguments, h, w):
    return results(naive.depthwise_gate, [x.double() for x in arguments], h, w)


def written(u, weight, bias, h, w):
    """The definition, one tap at a time."""
    b, _, channels = u.shape
    s = (u * u.sigmoid()).view(b, h, w, channels)
    total = bias.expand(b, h, w, channels).clone()
    for i in range(h):
        for j in range(w):
            for ky in range(3):
                for kx in range(3):
                    if 0 <= i + ky - 1 < h and 0 <= j + kx - 1 < w:
                        total[:, i, j] += weight[:, 0, ky, kx] * s[:, i + ky - 1, j + kx - 1]
    value, gate = total.flatten(1, 2).chunk(2, dim=-1)
    return value * gate * gate.sigmoid()


def test_the_plain_way_is_the_definition():
    arguments = draw(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(
        naive.depthwise_gate(*arguments, 3, 4), written(*arguments, 3, 4), rtol=1e-12, atol=1e-13
    )


class Layouts(TorchDispatchMode):
    """Whether the images of each convolution and of its derivative are channels-last."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, bool] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
            images = [x for x in (*args, *(out if isinstance(out, tuple) else (out,))) if torch.is_tensor(x)]
            images = [x for x in images if x.ndim == 4 and x.shape[-1] > 3]
            self.seen[func.name()] = all(x.is_contiguous(memory_format=torch.channels_last) for x in images)
        return out


def test_the_plain_convolution_is_channels_last_both_ways():
    with Layouts() as layouts:
        results(naive.depthwise_gate, draw(3, 4, 5, 10), 4, 5)
    assert layouts.seen == {"aten::convolution": True, "aten::convolution_backward": True}


@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(shape, marks=pytest.mark.slow) for shape in SLOW)])
def test_values_and_gradients(shape, kernel_device, nan_buffers, triton_kernels):
    h, w = shape[1:3]
    arguments = draw(*shape, seed=h + w, device=kernel_device)
    want = exact(arguments, h, w)
    for got, right in zip(results(op.depthwise_gate, arguments, h, w), want, strict=True):
        assert got.shape == right.shape
        assert relative(got, right) < 1e-5
    with torch.no_grad():  # past the dispatcher
        assert relative(op.depthwise_gate(*arguments, h, w), want[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision_is_as_good_as_eager(dtype, kernel_device, triton_kernels):
    arguments = draw(1, 4, 5, 60, seed=3, device=kernel_device, dtype=dtype)
    want = exact(arguments, 4, 5)
    eager = results(naive.depthwise_gate, arguments, 4, 5)
    for got, plain, right in zip(results(op.depthwise_gate, arguments, 4, 5), eager, want, strict=True):
        assert got.dtype == plain.dtype == dtype
        assert relative(got, right) <= 1.2 * relative(plain, right) + 1e-6


@pytest.mark.slow
@pytest.mark.long
def test_programs_share_columns_and_take_several_strips(kernel_device, nan_buffers, triton_kernels, monkeypatch):
    from sana.ops.depthwise_gate import triton

    arguments = draw(2, 5, 19, 6, seed=2, device=kernel_device)
    want = exact(arguments, 5, 19)
    assert triton._segment(19, 4) < 19
    got = results(op.depthwise_gate, arguments, 5, 19)
    monkeypatch.setattr(triton, "_PROGRAMS", 1)  # whole rows, and all strips but two by one program
    again = results(op.depthwise_gate, arguments, 5, 19)
    for a, b, right in zip(got, again, want, strict=True):
        assert relative(a, right) < 1e-5
        assert relative(b, right) < 1e-5


def test_tokens_of_a_wider_buffer_and_weights_of_another_type(kernel_device, triton_kernels):
    u, weight, bias = draw(2, 2, 3, 6, seed=1, device=kernel_device)
    want = exact((u, weight, bias), 2, 3)
    wide = torch.cat([u, u], dim=2)[..., :12]
    for got, right in zip(results(op.depthwise_gate, (wide, weight, bias), 2, 3), want, strict=True):
        assert relative(got, right) < 1e-5
    got = results(op.depthwise_gate, (u.bfloat16(), weight, bias), 2, 3)
    assert [x.dtype for x in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert all(relative(a, right) < 1e-2 for a, right in zip(got, want, strict=True))


def test_far_inputs_stay_finite(kernel_device, triton_kernels):
    """Two sigmoids share one reciprocal, of a product that must not overflow."""
    u = torch.tensor([-1e4, -90.0, -41.0, 0.0, 88.0, 1e4], device=kernel_device).view(1, 3, 2)
    weight, bias = torch.ones(2, 1, 3, 3, device=kernel_device), torch.zeros(2, device=kernel_device)
    for got, right in zip(
        results(op.depthwise_gate, (u, weight, bias), 1, 3), exact((u, weight, bias), 1, 3), strict=True
    ):
        assert relative(got, right) < 1e-5


def test_forward_derivative_equals_central_differences(kernel_device, triton_kernels):
    arguments, tangents = (draw(1, 2, 3, 4, seed=seed, device=kernel_device) for seed in (4, 5))
    _, got = torch.func.jvp(lambda *x: op.depthwise_gate(*x, 2, 3), tuple(arguments), tuple(tangents))
    h = 1e-6
    ahead, behind = (
        written(*(x.double() + s * h * dx.double() for x, dx in zip(arguments, tangents, strict=True)), 2, 3)
        for s in (1, -1)
    )
    assert relative(got, (ahead - behind) / (2 * h)) < 1e-5


def test_checkpointing_and_autocast_change_nothing(kernel_device, triton_kernels):
    arguments = draw(1, 2, 2, 4, seed=6, device=kernel_device)
    want = results(op.depthwise_gate, arguments, 2, 2)
    kept = results(lambda *x: checkpoint(op.depthwise_gate, *x, use_reentrant=False), arguments, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(want, kept, strict=True))
    with torch.autocast(kernel_device.type, torch.bfloat16):
        assert torch.equal(op.depthwise_gate(*arguments, 2, 2), want[0])


def test_only_the_arguments_are_kept_for_the_backward_pass(kernel_device, triton_kernels):
    kept = []
    arguments = [x.requires_grad_() for x in draw(1, 2, 2, 4, device=kernel_device)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        op.depthwise_gate(*arguments, 2, 2)
    assert set(kept) <= {x.data_ptr() for x in arguments}


@pytest.mark.slow
def test_operator_passes_opcheck(kernel_device, triton_kernels):
    from sana.ops.depthwise_gate import triton

    arguments = [x.requires_grad_() for x in draw(1, 2, 1, 3, device=kernel_device)]
    torch.library.opcheck(triton.depthwise_gate, (*arguments, 2, 1))
