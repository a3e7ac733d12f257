"""adaLN by Triton against plain torch in float64: values, gradients, types, layouts, and what wraps around an op."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sana.ops import choice
from sana.ops.adaln import naive, op

SHAPES = [(1, 1, 1, 1), (1, 1, 7, 32), (3, 1, 5, 33), (2, 3, 2, 17), (1, 2, 3, 160), (3, 2, 5, 40), (1, 1, 25, 20)]
"""b, f, tokens per frame, d."""
NORM, GATE, BOTH = "modulated_layer_norm", "gated_residual", "residual_modulated_layer_norm"


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def draw(name, b, f, frame, d, seed=0, device="cpu", dtype=torch.float32):
    """Arguments in the order of the op; the vectors are strided views of one buffer, as a block's are."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(b, f * frame, d, generator=g) + 0.5 for _ in range(2))
    vectors = torch.randn(b, f, 6, d, generator=g).to(device, dtype)
    tokens = [t.to(device, dtype) for t in (x, y)]
    shift, scale = vectors[:, :, 1], vectors[:, :, 4]
    return {NORM: [tokens[0], shift, scale], GATE: [tokens[0], shift, tokens[1]], BOTH: [*tokens, shift, scale]}[name]


def results(f, arguments, weights=None):
    """Outputs and gradients of all arguments, for a random linear function of the outputs."""
    leaves = [x.detach().requires_grad_() for x in arguments]
    outputs = f(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(y.shape, generator=g).to(y.device, y.dtype) for y in outputs]
    total = sum((y * weight).sum() for y, weight in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(total, leaves)]


def exact(name, arguments):
    """The same by plain torch in float64."""
    return results(getattr(naive, name), [x.double() for x in arguments])


@pytest.mark.parametrize("name", [NORM, GATE, BOTH])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(name, shape, kernel_device, nan_buffers, triton_kernels):
    arguments = draw(name, *shape, seed=shape[2], device=kernel_device)
    want = exact(name, arguments)
    for got, right in zip(results(getattr(op, name), arguments), want, strict=True):
        assert got.shape == right.shape
        # Of one channel the norm is zero in truth, and of its rounding nothing should be asked relative to that.
        assert relative(got, right) < 1e-5 or (shape[3] == 1 and right.norm() < 1e-6)
    with torch.no_grad():  # past the dispatcher
        again = getattr(op, name)(*arguments)
    for got, right in zip(again if isinstance(again, tuple) else (again,), want, strict=False):
        assert relative(got, right) < 1e-5


@pytest.mark.parametrize("name", [NORM, GATE, BOTH])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_eager(name, dtype, kernel_device, triton_kernels):
    arguments = draw(name, 2, 2, 20, 64, seed=3, device=kernel_device, dtype=dtype)
    want = exact(name, arguments)
    eager = results(getattr(naive, name), arguments)
    for got, plain, right in zip(results(getattr(op, name), arguments), eager, want, strict=True):
        assert got.dtype == plain.dtype == dtype
        assert relative(got, right) <= 1.2 * relative(plain, right) + 1e-6


@pytest.mark.parametrize("name", [NORM, GATE, BOTH])
def test_mixed_types_promote_as_in_torch(name, kernel_device, triton_kernels):
    """The residual stream and branches in bf16, the modulation in fp32."""
    arguments = draw(name, 1, 2, 4, 24, device=kernel_device)
    arguments = [x.bfloat16() if x.shape[1] == 8 else x for x in arguments]
    got, plain = (results(getattr(module, name), arguments) for module in (op, naive))
    assert [x.dtype for x in got] == [x.dtype for x in plain]
    for a, right in zip(got, exact(name, arguments), strict=True):
        assert relative(a, right) < 1e-2


@pytest.mark.parametrize("name", [NORM, GATE, BOTH])
def test_strides(name, kernel_device, triton_kernels):
    """Tokens cut from a wider buffer, and transposed ones."""
    whole = draw(name, 2, 2, 3, 24, seed=1, device=kernel_device)
    wide = [torch.cat([x, x], dim=2)[..., : x.shape[2]] for x in whole]
    across = [x.mT.contiguous().mT for x in whole]
    want = exact(name, whole)
    for arguments in (wide, across):
        assert not arguments[0].is_contiguous()
        for got, right in zip(results(getattr(op, name), arguments), want, strict=True):
            assert relative(got, right) < 1e-5


def test_many_tokens_take_several_rows_a_program(kernel_device, triton_kernels, monkeypatch):
    from sana.ops.adaln import triton

    monkeypatch.setattr(triton, "_PROGRAMS", 2)
    for name in (NORM, GATE, BOTH):
        arguments = draw(name, 1, 2, 21, 16, seed=2, device=kernel_device)
        for got, right in zip(results(getattr(op, name), arguments), exact(name, arguments), strict=True):
            assert relative(got, right) < 1e-5


def test_only_one_output_of_two_is_used(kernel_device, triton_kernels):
    arguments = draw(BOTH, 1, 1, 5, 12, device=kernel_device)
    for i in (0, 1):
        got = results(lambda *x, i=i: op.residual_modulated_layer_norm(*x)[i], arguments[:2] + arguments[2:])[1:3]
        want = results(
            lambda *x, i=i: naive.residual_modulated_layer_norm(*x)[i] + 0 * sum(v.sum() for v in x),
            [x.double() for x in arguments],
        )[1:3]
        for a, b in zip(got, want, strict=True):
            assert relative(a, b) < 1e-5


@pytest.mark.parametrize("name", [NORM, GATE, BOTH])
def test_forward_derivative_equals_central_differences(name, kernel_device, triton_kernels):
    arguments = draw(name, 1, 2, 3, 10, seed=4, device=kernel_device)
    tangents = draw(name, 1, 2, 3, 10, seed=5, device=kernel_device)
    _, got = torch.func.jvp(getattr(op, name), tuple(arguments), tuple(tangents))
    h = 1e-6
    ahead, behind = (
        getattr(naive, name)(*(x.double() + s * h * dx.double() for x, dx in zip(arguments, tangents, strict=True)))
        for s in (1, -1)
    )
    if name != BOTH:
        got, ahead, behind = [got], [ahead], [behind]
    for a, p, q in zip(got, ahead, behind, strict=True):
        assert relative(a, (p - q) / (2 * h)) < 1e-5


@pytest.mark.parametrize("name", [NORM, GATE, BOTH])
def test_checkpointing_changes_nothing_and_autocast_the_type(name, kernel_device, triton_kernels):
    arguments = draw(name, 1, 2, 4, 12, seed=6, device=kernel_device)
    f = getattr(op, name)
    want = results(f, arguments)
    kept = results(lambda *x: checkpoint(f, *x, use_reentrant=False), arguments)
    assert all(torch.equal(a, b) for a, b in zip(want, kept, strict=True))
    with torch.autocast(kernel_device.type, torch.bfloat16):
        cast = f(*arguments)
    *total, normed = cast if name == BOTH else (cast,)
    assert normed.dtype == (torch.float32 if name == GATE else torch.bfloat16)  # linears read it, and cast it anyway
    assert relative(normed, want[len(total)]) < 1e-2
    assert all(t.dtype == torch.float32 for t in total)


@pytest.mark.slow
def test_operators_pass_opcheck(kernel_device, triton_kernels):
    from sana.ops.adaln import triton

    def leaves(name):
        return [x.detach().requires_grad_() for x in draw(name, 1, 2, 2, 8, device=kernel_device)]

    for operator, arguments in [
        (triton.modulated_layer_norm, (*leaves(NORM), 1e-6, torch.float32)),
        (triton.gated_residual, tuple(leaves(GATE))),
        (triton.residual_modulated_layer_norm, (*leaves(BOTH), 1e-6, torch.float32)),
    ]:
        torch.library.opcheck(operator, arguments)


def test_sizes_that_do_not_fit_are_named(kernel_device, triton_kernels):
    x, rows = torch.zeros(1, 5, 4, device=kernel_device), torch.zeros(1, 2, 4, device=kernel_device)
    with pytest.raises(ValueError, match="n a multiple of f"):
        op.gated_residual(x, rows, x)


def test_sums_are_the_same_twice(kernel_device, triton_kernels):
    arguments = draw(BOTH, 1, 1, 20, 24, device=kernel_device)
    first, second = (results(op.residual_modulated_layer_norm, arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(first, second))


def test_float64_is_refused_when_kernels_are_demanded_and_plain_otherwise(kernel_device, triton_kernels):
    x, rows = torch.randn(1, 4, 6, dtype=torch.float64), torch.randn(1, 1, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        op.modulated_layer_norm(x, rows, rows)
    choice.set_kernels("auto")
    assert torch.equal(op.modulated_layer_norm(x, rows, rows), naive.modulated_layer_norm(x, rows, rows))
