"""RMSNorm by Triton against plain torch in float64: values, gradients, types, layouts, activations, residuals."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sana.ops.rms_norm import naive, op

SHAPES = [(1, 1), (3, 5, 7), (1, 9, 33), (2, 3, 4, 16), (17, 130), (2, 300), (40, 2), (1, 1, 1, 1152)]
WAYS = [  # bias, activation, residual
    (False, None, False),
    (True, "relu", False),
    (True, "silu", True),
    (False, "silu", False),
    (True, None, True),
]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def draw(shape, bias, residual, seed=0, device="cpu", dtype=torch.float32):
    """x, weight, and where asked bias and residual."""
    g = torch.Generator().manual_seed(seed)
    sizes = [shape, shape[-1:], *([shape[-1:]] if bias else []), *([shape] if residual else [])]
    return [torch.randn(size, generator=g).to(device, dtype) for size in sizes]


def named(module, bias, activation, residual):
    """The op of a module as a function of its tensors alone."""

    def f(x, weight, *more):
        b = more[0] if bias else None
        r = more[-1] if residual else None
        return module.rms_norm(x, weight, 1e-3, b, activation, r)

    return f


def results(f, arguments):
    leaves = [x.detach().requires_grad_() for x in arguments]
    y = f(*leaves)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.device, y.dtype)
    return [y, *torch.autograd.grad((y * g).sum(), leaves)]


def written(x, weight, bias, activation, residual):
    """The definition."""
    y = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight + (0 if bias is None else bias)
    y = {"relu": y.clamp(min=0), "silu": y * y.sigmoid(), None: y}[activation]
    return y if residual is None else y + residual


@pytest.mark.parametrize("way", WAYS)
def test_the_plain_way_is_the_definition(way):
    bias, activation, residual = way
    arguments = draw((2, 3, 5), bias, residual, dtype=torch.float64)
    b, r = arguments[2] if bias else None, arguments[-1] if residual else None
    want = written(*arguments[:2], b, activation, r)
    torch.testing.assert_close(named(naive, *way)(*arguments), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients(shape, way, kernel_device, nan_buffers, triton_kernels):
    arguments = draw(shape, way[0], way[2], seed=len(shape), device=kernel_device)
    want = results(named(naive, *way), [x.double() for x in arguments])
    for got, right in zip(results(named(op, *way), arguments), want, strict=True):
        assert got.shape == right.shape
        # Of one channel the norm hardly depends on x.
        assert relative(got, right) < (1e-3 if shape[-1] == 1 else 1e-5)
    with torch.no_grad():  # past the dispatcher
        assert relative(named(op, *way)(*arguments), want[0]) < 1e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_eager(way, dtype, kernel_device, triton_kernels):
    arguments = draw((30, 48), way[0], way[2], seed=3, device=kernel_device, dtype=dtype)
    want = results(named(naive, *way), [x.double() for x in arguments])
    eager = results(named(naive, *way), arguments)
    for got, plain, right in zip(results(named(op, *way), arguments), eager, want, strict=True):
        assert got.dtype == plain.dtype == dtype
        assert relative(got, right) <= 1.2 * relative(plain, right) + 1e-6


def test_types_and_layouts(kernel_device, triton_kernels):
    """Queries cut from a fused buffer, maps in channels_last, and weights in fp32 beside tokens in bf16."""
    way = (True, "silu", True)
    x, weight, bias, residual = draw((2, 5, 12), True, True, seed=2, device=kernel_device)
    want = results(named(naive, *way), [t.double() for t in (x, weight, bias, residual)])
    cut = torch.cat([x, x, x], dim=-1)[..., 12:24]
    image = residual.mT.reshape(2, 12, 1, 5).contiguous(memory_format=torch.channels_last).movedim(1, -1)[:, 0]
    for got, right in zip(results(named(op, *way), (cut, weight, bias, image)), want, strict=True):
        assert relative(got, right) < 1e-5
    got = results(named(op, *way), (x.bfloat16(), weight, bias, residual))
    plain = results(named(naive, *way), (x.bfloat16(), weight, bias, residual))
    assert [t.dtype for t in got] == [t.dtype for t in plain]
    assert all(relative(a, right) < 1e-2 for a, right in zip(got, want, strict=True))


@pytest.mark.slow
def test_many_rows(kernel_device, nan_buffers, triton_kernels, monkeypatch):
    """Programs that take several rows at once, and several such turns."""
    from sana.ops.rms_norm import triton

    monkeypatch.setattr(triton, "_PROGRAMS", 2)
    way = (True, "silu", False)
    arguments = draw((1001, 20), True, False, device=kernel_device)
    want = results(named(naive, *way), [x.double() for x in arguments])
    for got, right in zip(results(named(op, *way), arguments), want, strict=True):
        assert relative(got, right) < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_forward_derivative_equals_central_differences(way, kernel_device, triton_kernels):
    arguments, tangents = (draw((2, 3, 6), way[0], way[2], seed=seed, device=kernel_device) for seed in (4, 5))
    _, got = torch.func.jvp(named(op, *way), tuple(arguments), tuple(tangents))
    h = 1e-6
    ahead, behind = (
        named(naive, *way)(*(x.double() + s * h * dx.double() for x, dx in zip(arguments, tangents, strict=True)))
        for s in (1, -1)
    )
    assert relative(got, (ahead - behind) / (2 * h)) < 1e-5


def test_checkpointing_and_autocast_change_nothing(kernel_device, triton_kernels):
    f, arguments = named(op, True, "relu", True), draw((2, 3, 6), True, True, seed=6, device=kernel_device)
    want = results(f, arguments)
    kept = results(lambda *x: checkpoint(f, *x, use_reentrant=False), arguments)
    assert all(torch.equal(a, b) for a, b in zip(want, kept, strict=True))
    with torch.autocast(kernel_device.type, torch.bfloat16):
        assert torch.equal(f(*arguments), want[0])


def test_not_a_number_stays(kernel_device, triton_kernels):
    x = torch.tensor([[1.0, float("nan")], [1.0, 2.0]], device=kernel_device)
    for activation in (None, "relu", "silu"):
        y = op.rms_norm(x, torch.ones(2, device=kernel_device), 1e-5, None, activation)
        assert y.isnan().tolist() == [[True, True], [False, False]]


def test_no_rows(kernel_device, triton_kernels):
    x, weight = torch.zeros(0, 4, device=kernel_device), torch.ones(4, device=kernel_device)
    y, dx, dweight = results(lambda *a: op.rms_norm(*a, 1e-5), (x, weight))
    assert y.shape == dx.shape == (0, 4)
    assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.slow
def test_operator_passes_opcheck(kernel_device, triton_kernels):
    from sana.ops.rms_norm import triton

    x, weight, bias, residual = (t.requires_grad_() for t in draw((2, 4), True, True, device=kernel_device))
    torch.library.opcheck(triton.rms_norm, (x, weight, bias, residual, 1e-5, "silu"))
    torch.library.opcheck(triton.rms_norm, (x, weight, None, None, 1e-5, ""))


def test_another_activation_is_refused():
    with pytest.raises((ValueError, TypeError, Exception), match="tanh|activation"):
        op.rms_norm(torch.ones(1, 2), torch.ones(2), 1e-5, activation="tanh")
