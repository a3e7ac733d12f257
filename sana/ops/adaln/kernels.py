"""Kernels of adaLN over rows (tokens).

A program holds a whole row in registers, in a block of the next power of two, masked. Backward, it walks over a chunk
of the tokens of one frame and keeps what they add to the gradients of shift and scale (or gate); the chunks' sums are
added by a second, ordered reduction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sana.ops.rounding import rounded


@triton.jit
def tokens_of_program(frame, frames, share):
    """Sample, frame, and the tokens [first, last) of that frame, at most `share`, which this program has."""
    shares = tl.cdiv(frame, share)
    pid = tl.program_id(0)
    first = (pid % shares) * share
    return (pid // shares // frames).to(tl.int64), (pid // shares) % frames, first, tl.minimum(first + share, frame)


@triton.jit
def load(at, live):
    """A row in fp32, zeros where nothing is."""
    return tl.load(at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def norm_rows(
    x, y, shift, scale, out, total, mean, rstd, n, d, frame, frames,
    x_b, x_n, y_b, y_n, shift_b, shift_f, scale_b, scale_f, eps,
    RESIDUAL: tl.constexpr, STATISTICS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = LN(x [+ y]) (1 + scale) + shift for ROWS tokens of one frame; with RESIDUAL also total = x + y."""
    OUT: tl.constexpr = out.dtype.element_ty
    column = tl.arange(0, BLOCK)
    live = column < d
    b, f, first, last = tokens_of_program(frame, frames, ROWS)
    a = 1.0 + load(scale + b * scale_b + f * scale_f + column, live)
    c = load(shift + b * shift_b + f * shift_f + column, live)
    for i in range(first, last):
        token = (f * frame + i).to(tl.int64)
        row = b * n + token
        z = load(x + b * x_b + token * x_n + column, live)
        if RESIDUAL:
            TOTAL: tl.constexpr = total.dtype.element_ty
            z += load(y + b * y_b + token * y_n + column, live)
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
    grad, extra, x, scale, mean, rstd, dx, partial, n, d, frame, frames, chunk,
    grad_b, grad_n, extra_b, extra_n, x_b, x_n, scale_b, scale_f,
    RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of `chunk` tokens of one frame, with RESIDUAL plus extra; partial (b, f, chunks, 2, d): dshift and dscale."""
    DX: tl.constexpr = dx.dtype.element_ty
    column = tl.arange(0, BLOCK)
    live = column < d
    b, f, first, last = tokens_of_program(frame, frames, chunk)
    a = 1.0 + load(scale + b * scale_b + f * scale_f + column, live)
    dshift = tl.zeros((BLOCK,), tl.float32)
    dscale = tl.zeros((BLOCK,), tl.float32)
    for i in range(first, last):
        token = (f * frame + i).to(tl.int64)
        row = b * n + token
        g = load(grad + b * grad_b + token * grad_n + column, live)
        z = load(x + b * x_b + token * x_n + column, live)
        r = tl.load(rstd + row)
        z = tl.where(live, (z - tl.load(mean + row)) * r, 0.0)
        dshift += g
        dscale += g * z
        g *= a
        back = r * (g - tl.sum(g, 0) / d - z * (tl.sum(g * z, 0) / d))
        if RESIDUAL:
            back += load(extra + b * extra_b + token * extra_n + column, live)
        tl.store(dx + row * d + column, rounded(back, DX), mask=live)
    place = partial + tl.program_id(0).to(tl.int64) * 2 * d + column
    tl.store(place, dshift, mask=live)
    tl.store(place + d, dscale, mask=live)


@triton.jit
def gate_rows(
    x, gate, y, out, n, d, frame, frames,
    x_b, x_n, gate_b, gate_f, y_b, y_n,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x + gate y for ROWS tokens of one frame."""
    OUT: tl.constexpr = out.dtype.element_ty
    column = tl.arange(0, BLOCK)
    live = column < d
    b, f, first, last = tokens_of_program(frame, frames, ROWS)
    a = load(gate + b * gate_b + f * gate_f + column, live)
    for i in range(first, last):
        token = (f * frame + i).to(tl.int64)
        s = load(x + b * x_b + token * x_n + column, live)
        t = load(y + b * y_b + token * y_n + column, live)
        tl.store(out + (b * n + token) * d + column, rounded(s + a * t, OUT), mask=live)


@triton.jit
def gate_rows_back(
    grad, gate, y, dy, partial, n, d, frame, frames, chunk,
    grad_b, grad_n, gate_b, gate_f, y_b, y_n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dy = gate grad for `chunk` tokens of one frame; partial (b, f, chunks, d): the sums of grad y."""
    DY: tl.constexpr = dy.dtype.element_ty
    column = tl.arange(0, BLOCK)
    live = column < d
    b, f, first, last = tokens_of_program(frame, frames, chunk)
    a = load(gate + b * gate_b + f * gate_f + column, live)
    dgate = tl.zeros((BLOCK,), tl.float32)
    for i in range(first, last):
        token = (f * frame + i).to(tl.int64)
        g = load(grad + b * grad_b + token * grad_n + column, live)
        t = load(y + b * y_b + token * y_n + column, live)
        dgate += g * t
        tl.store(dy + (b * n + token) * d + column, rounded(a * g, DY), mask=live)
    tl.store(partial + tl.program_id(0).to(tl.int64) * d + column, dgate, mask=live)
