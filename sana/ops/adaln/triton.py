"""adaLN on GPUs: kernels over rows (tokens), and what autograd and torch.compile have to know of them.

A program holds a whole row in registers, in a block of the next power of two, masked. Backward, it walks over a chunk
of the tokens of one frame and keeps what they add to the gradients of shift and scale (or gate); the chunks' sums are
added by a second, ordered reduction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.ops.ahead import KernelCase
from sana.ops.buffer import new_empty
from sana.ops.direct import fresh
from sana.ops.rounding import rounded

_PROGRAMS = 528  # four for each multiprocessor of an H200
_ROWS = 4  # tokens that a program of the forward kernels takes where there are plenty


@triton.jit
def norm_rows(
    x,
    y,
    shift,
    scale,
    out,
    total,
    mean,
    rstd,
    n,
    d,
    frame,
    frames,
    x_b,
    x_n,
    y_b,
    y_n,
    shift_b,
    shift_f,
    scale_b,
    scale_f,
    eps,
    RESIDUAL: tl.constexpr,
    STATISTICS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = LN(x [+ y]) (1 + scale) + shift for ROWS tokens of one frame; with RESIDUAL also total = x + y."""
    OUT: tl.constexpr = out.dtype.element_ty
    column = tl.arange(0, BLOCK)
    live = column < d
    groups = tl.cdiv(frame, ROWS)
    pid = tl.program_id(0)
    f = (pid // groups) % frames
    b = (pid // groups // frames).to(tl.int64)
    a = 1.0 + tl.load(scale + b * scale_b + f * scale_f + column, mask=live, other=0.0).to(tl.float32)
    c = tl.load(shift + b * shift_b + f * shift_f + column, mask=live, other=0.0).to(tl.float32)
    start = (pid % groups) * ROWS
    for i in range(start, tl.minimum(start + ROWS, frame)):
        token = (f * frame + i).to(tl.int64)
        row = b * n + token
        z = tl.load(x + b * x_b + token * x_n + column, mask=live, other=0.0).to(tl.float32)
        if RESIDUAL:
            TOTAL: tl.constexpr = total.dtype.element_ty
            z += tl.load(y + b * y_b + token * y_n + column, mask=live, other=0.0).to(tl.float32)
            kept = rounded(z, TOTAL)
            tl.store(total + row * d + column, kept, mask=live)
            z = kept.to(tl.float32)  # what the backward pass will see
        mu = tl.sum(z, 0) / d
        z = tl.where(live, z - mu, 0.0)
        r = 1.0 / tl.sqrt(tl.sum(z * z, 0) / d + eps)
        tl.store(out + row * d + column, rounded(z * r * a + c, OUT), mask=live)
        if STATISTICS:
            tl.store(mean + row, mu)
            tl.store(rstd + row, r)


@triton.jit
def norm_rows_back(
    grad,
    extra,
    x,
    scale,
    mean,
    rstd,
    dx,
    partial,
    n,
    d,
    frame,
    frames,
    chunk,
    grad_b,
    grad_n,
    extra_b,
    extra_n,
    x_b,
    x_n,
    scale_b,
    scale_f,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of `chunk` tokens of one frame, with RESIDUAL plus extra; partial (b, f, chunks, 2, d): dshift and dscale."""
    DX: tl.constexpr = dx.dtype.element_ty
    column = tl.arange(0, BLOCK)
    live = column < d
    chunks = tl.cdiv(frame, chunk)
    pid = tl.program_id(0)
    f = (pid // chunks) % frames
    b = (pid // chunks // frames).to(tl.int64)
    a = 1.0 + tl.load(scale + b * scale_b + f * scale_f + column, mask=live, other=0.0).to(tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    dscale = tl.zeros((BLOCK,), tl.float32)
    start = (pid % chunks) * chunk
    for i in range(start, tl.minimum(start + chunk, frame)):
        token = (f * frame + i).to(tl.int64)
        row = b * n + token
        g = tl.load(grad + b * grad_b + token * grad_n + column, mask=live, other=0.0).to(tl.float32)
        z = tl.load(x + b * x_b + token * x_n + column, mask=live, other=0.0).to(tl.float32)
        r = tl.load(rstd + row)
        z = tl.where(live, (z - tl.load(mean + row)) * r, 0.0)
        dshift += g
        dscale += g * z
        g *= a
        back = r * (g - tl.sum(g, 0) / d - z * (tl.sum(g * z, 0) / d))
        if RESIDUAL:
            back += tl.load(extra + b * extra_b + token * extra_n + column, mask=live, other=0.0).to(tl.float32)
        tl.store(dx + row * d + column, rounded(back, DX), mask=live)
    place = partial + pid.to(tl.int64) * 2 * d + column
    tl.store(place, dshift, mask=live)
    tl.store(place + d, dscale, mask=live)


@triton.jit
def gate_rows(
    x,
    gate,
    y,
    out,
    n,
    d,
    frame,
    frames,
    x_b,
    x_n,
    gate_b,
    gate_f,
    y_b,
    y_n,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = x + gate y for ROWS tokens of one frame."""
    OUT: tl.constexpr = out.dtype.element_ty
    column = tl.arange(0, BLOCK)
    live = column < d
    groups = tl.cdiv(frame, ROWS)
    pid = tl.program_id(0)
    f = (pid // groups) % frames
    b = (pid // groups // frames).to(tl.int64)
    a = tl.load(gate + b * gate_b + f * gate_f + column, mask=live, other=0.0).to(tl.float32)
    start = (pid % groups) * ROWS
    for i in range(start, tl.minimum(start + ROWS, frame)):
        token = (f * frame + i).to(tl.int64)
        s = tl.load(x + b * x_b + token * x_n + column, mask=live, other=0.0).to(tl.float32)
        t = tl.load(y + b * y_b + token * y_n + column, mask=live, other=0.0).to(tl.float32)
        tl.store(out + (b * n + token) * d + column, rounded(s + a * t, OUT), mask=live)


@triton.jit
def gate_rows_back(
    grad,
    gate,
    y,
    dy,
    partial,
    n,
    d,
    frame,
    frames,
    chunk,
    grad_b,
    grad_n,
    gate_b,
    gate_f,
    y_b,
    y_n,
    BLOCK: tl.constexpr,
):
    """dy = gate grad for `chunk` tokens of one frame; partial (b, f, chunks, d): the sums of grad y."""
    DY: tl.constexpr = dy.dtype.element_ty
    column = tl.arange(0, BLOCK)
    live = column < d
    chunks = tl.cdiv(frame, chunk)
    pid = tl.program_id(0)
    f = (pid // chunks) % frames
    b = (pid // chunks // frames).to(tl.int64)
    a = tl.load(gate + b * gate_b + f * gate_f + column, mask=live, other=0.0).to(tl.float32)
    dgate = tl.zeros((BLOCK,), tl.float32)
    start = (pid % chunks) * chunk
    for i in range(start, tl.minimum(start + chunk, frame)):
        token = (f * frame + i).to(tl.int64)
        g = tl.load(grad + b * grad_b + token * grad_n + column, mask=live, other=0.0).to(tl.float32)
        t = tl.load(y + b * y_b + token * y_n + column, mask=live, other=0.0).to(tl.float32)
        dgate += g * t
        tl.store(dy + (b * n + token) * d + column, rounded(a * g, DY), mask=live)
    tl.store(partial + pid.to(tl.int64) * d + column, dgate, mask=live)


def _block(d: int) -> tuple[int, int]:
    """Power of two that holds a row, and warps: 16 elements a thread at most in the usual widths."""
    block = max(triton.next_power_of_2(d), 32)
    return block, min(max(block // 512, 1), 16)


def _rows(tokens: int) -> int:
    return _ROWS if tokens >= 2 * _ROWS * _PROGRAMS else 1


def _chunk(frame: int, others: int) -> int:
    """Tokens that a program of the backward kernels sums: few enough to fill the card, else up to 64."""
    chunk = 8
    while chunk < 64 and others * triton.cdiv(frame, 2 * chunk) >= _PROGRAMS:
        chunk *= 2
    return min(chunk, frame)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(x: Tensor, rows: Tensor) -> tuple[int, int, int, int]:
    """n, d, tokens per frame, frames.

    Raises:
        ValueError: the frames do not divide the tokens, or the rows are of another batch or width.
    """
    (b, n, d), (b2, frames, d2) = x.shape, rows.shape
    if b != b2 or d != d2 or frames < 1 or n % frames:
        raise ValueError(f"adaLN: tokens {tuple(x.shape)} cannot take shift, scale or gate {tuple(rows.shape)}; "
                         "expected (b, n, d) and (b, f, d) with n a multiple of f")  # fmt: skip
    return n, d, n // frames, frames


def launch_norm(
    x: Tensor, y: Tensor | None, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, statistics: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LN(x + y) modulated, of type dtype; x + y (x itself without y); mean and 1 / sqrt(variance + eps), (b n) each.

    Without `statistics` the latter two are empty.
    """
    n, d, frame, frames = _sizes(x, shift)
    x, shift, scale = _dense(x), _dense(shift), _dense(scale)
    other = x if y is None else _dense(y)
    b = x.shape[0]
    out = new_empty(x, (b, n, d), dtype)
    total = x if y is None else new_empty(x, (b, n, d), torch.promote_types(x.dtype, y.dtype))
    mean, rstd = (new_empty(x, (b * n if statistics else 0,), torch.float32) for _ in range(2))
    block, warps = _block(d)
    rows = _rows(b * n)
    if out.numel():
        norm_rows[(b * frames * triton.cdiv(frame, rows),)](
            x, other, shift, scale, out, total, mean, rstd, n, d, frame, frames, x.stride(0), x.stride(1),
            other.stride(0), other.stride(1), shift.stride(0), shift.stride(1), scale.stride(0), scale.stride(1), eps,
            RESIDUAL=y is not None, STATISTICS=statistics, ROWS=rows, BLOCK=block, num_warps=warps, num_stages=1,
        )  # fmt: skip
    return out, total, mean, rstd


def launch_norm_back(
    grad: Tensor, extra: Tensor | None, x: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (with `extra` added), shift and scale."""
    n, d, frame, frames = _sizes(x, scale)
    grad, x, scale = _dense(grad), _dense(x), _dense(scale)
    more = grad if extra is None else _dense(extra)
    b = x.shape[0]
    dx = new_empty(x, (b, n, d))
    chunk = _chunk(frame, b * frames)
    chunks = triton.cdiv(frame, chunk) if chunk else 0
    partial = new_empty(x, (b, frames, chunks, 2, d), torch.float32)
    block, warps = _block(d)
    if dx.numel():
        norm_rows_back[(b * frames * chunks,)](
            grad, more, x, scale, mean, rstd, dx, partial, n, d, frame, frames, chunk, grad.stride(0), grad.stride(1),
            more.stride(0), more.stride(1), x.stride(0), x.stride(1), scale.stride(0), scale.stride(1),
            RESIDUAL=extra is not None, BLOCK=block, num_warps=warps, num_stages=1,
        )  # fmt: skip
    dshift, dscale = partial.sum(2).unbind(2)
    return dx, fresh(dshift, shift), fresh(dscale, scale)


def launch_gate(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y, of the type that the three promote to."""
    n, d, frame, frames = _sizes(x, gate)
    x, gate, y = _dense(x), _dense(gate), _dense(y)
    b = x.shape[0]
    out = new_empty(x, (b, n, d), _promoted(x, gate, y))
    block, warps = _block(d)
    rows = _rows(b * n)
    if out.numel():
        gate_rows[(b * frames * triton.cdiv(frame, rows),)](
            x, gate, y, out, n, d, frame, frames, x.stride(0), x.stride(1), gate.stride(0), gate.stride(1),
            y.stride(0), y.stride(1), ROWS=rows, BLOCK=block, num_warps=warps, num_stages=1,
        )  # fmt: skip
    return out


def launch_gate_back(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y and gate."""
    n, d, frame, frames = _sizes(y, gate)
    grad, dense, y = _dense(grad), _dense(gate), _dense(y)
    b = y.shape[0]
    dy = new_empty(y, (b, n, d))
    chunk = _chunk(frame, b * frames)
    chunks = triton.cdiv(frame, chunk) if chunk else 0
    partial = new_empty(y, (b, frames, chunks, d), torch.float32)
    block, warps = _block(d)
    if dy.numel():
        gate_rows_back[(b * frames * chunks,)](
            grad, dense, y, dy, partial, n, d, frame, frames, chunk, grad.stride(0), grad.stride(1), dense.stride(0),
            dense.stride(1), y.stride(0), y.stride(1), BLOCK=block, num_warps=warps, num_stages=1,
        )  # fmt: skip
    return dy, fresh(partial.sum(2), gate)


def _promoted(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


@torch.library.custom_op("sana::modulated_layer_norm", mutates_args=())
def modulated_layer_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`launch_norm` without y: normed tokens, mean, rstd."""
    out, _, mean, rstd = launch_norm(x, None, shift, scale, eps, dtype, statistics=True)
    return out, mean, rstd


@modulated_layer_norm.register_fake
def _(x, shift, scale, eps, dtype):
    rows = x.new_empty(x.shape[0] * x.shape[1], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), rows, torch.empty_like(rows)


@torch.library.custom_op("sana::residual_modulated_layer_norm", mutates_args=())
def residual_modulated_layer_norm(
    x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`launch_norm`: normed tokens, the sum, mean, rstd."""
    return launch_norm(x, y, shift, scale, eps, dtype, statistics=True)


@residual_modulated_layer_norm.register_fake
def _(x, y, shift, scale, eps, dtype):
    rows = x.new_empty(x.shape[0] * x.shape[1], dtype=torch.float32)
    total = x.new_empty(x.shape, dtype=_promoted(x, y))
    return x.new_empty(x.shape, dtype=dtype), total, rows, torch.empty_like(rows)


@torch.library.custom_op("sana::modulated_layer_norm_backward", mutates_args=())
def modulated_layer_norm_backward(
    grad: Tensor, extra: Tensor | None, x: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`launch_norm_back`."""
    return launch_norm_back(grad, extra, x, shift, scale, mean, rstd)


@modulated_layer_norm_backward.register_fake
def _(grad, extra, x, shift, scale, mean, rstd):
    return x.new_empty(x.shape), shift.new_empty(shift.shape), scale.new_empty(scale.shape)


@torch.library.custom_op("sana::gated_residual", mutates_args=())
def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """`launch_gate`."""
    return launch_gate(x, gate, y)


@gated_residual.register_fake
def _(x, gate, y):
    return x.new_empty(x.shape, dtype=_promoted(x, gate, y))


@torch.library.custom_op("sana::gated_residual_backward", mutates_args=())
def gated_residual_backward(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`launch_gate_back`."""
    return launch_gate_back(grad, gate, y)


@gated_residual_backward.register_fake
def _(grad, gate, y):
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _save_norm(ctx, inputs, output) -> None:
    x, shift, scale = inputs[:3]
    ctx.save_for_backward(x, shift, scale, *output[1:])


def _norm_back(ctx, grad, *_):
    return *modulated_layer_norm_backward(grad, None, *ctx.saved_tensors), None, None


def _save_residual(ctx, inputs, output) -> None:
    x, y, shift, scale = inputs[:4]
    ctx.types = x.dtype, y.dtype
    ctx.save_for_backward(output[1], shift, scale, *output[2:])


def _residual_back(ctx, grad, extra, *_):
    total, dshift, dscale = modulated_layer_norm_backward(grad, extra, *ctx.saved_tensors)
    dx, dy = (total.to(dtype) for dtype in ctx.types)
    return dx, dy, dshift, dscale, None, None


def _save_gate(ctx, inputs, output) -> None:
    x, gate, y = inputs
    ctx.type = x.dtype
    ctx.save_for_backward(gate, y)


def _gate_back(ctx, grad):
    dy, dgate = gated_residual_backward(grad, *ctx.saved_tensors)
    return grad.to(ctx.type), dgate, dy


modulated_layer_norm.register_autograd(_norm_back, setup_context=_save_norm)
residual_modulated_layer_norm.register_autograd(_residual_back, setup_context=_save_residual)
gated_residual.register_autograd(_gate_back, setup_context=_save_gate)


def _cases() -> list[KernelCase]:
    """Widths of the tiny, 0.6B and 1.6B networks, in the types that they come in."""
    cases = []
    names = "x_b x_n y_b y_n shift_b shift_f scale_b scale_f gate_b gate_f grad_b grad_n extra_b extra_n d".split()
    sizes = {name: "i32:16" for name in names}
    sizes |= {"n": "i32", "frame": "i32", "frames": "i32", "chunk": "i32", "eps": "fp32"}
    tokens = "x y out total grad extra dx dy".split()
    vectors = "shift scale gate".split()
    for kind, vector in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32"), ("fp16", "fp16")):
        types = sizes | {name: f"*{kind}:16" for name in tokens} | {name: f"*{vector}:16" for name in vectors}
        types |= {name: "*fp32:16" for name in ("mean", "rstd", "partial")}
        for d in (160, 1152, 2240):
            block, warps = _block(d)
            name = f"{kind}-{vector}-{d}"
            for more in (False, True):
                flags = {"RESIDUAL": more, "BLOCK": block}
                forward = flags | {"STATISTICS": True, "ROWS": _ROWS}
                plus = "-residual" if more else ""
                cases.append(KernelCase(f"adaln{plus}-{name}", norm_rows, types, forward, warps, 1, 128))
                cases.append(KernelCase(f"adaln-back{plus}-{name}", norm_rows_back, types, flags, warps, 1, 168))
            gate = {"ROWS": _ROWS, "BLOCK": block}
            cases.append(KernelCase(f"adaln-gate-{name}", gate_rows, types, gate, warps, 1, 128))
            cases.append(KernelCase(f"adaln-gate-back-{name}", gate_rows_back, types, {"BLOCK": block}, warps, 1, 128))
    return cases


KERNELS = _cases()
