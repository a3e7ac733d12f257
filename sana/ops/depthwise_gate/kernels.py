"""Kernels of the Mix-FFN middle: one forward (u is read, the gated result written), two backward.

A program walks along a strip of `ROWS` image rows, column by column, for `BLOCK` value channels and the gate channels
that belong to them. A column's SiLUs are computed once and scattered into the sums of the three outputs that they
reach, so that of nine reads of each element only (ROWS + 2) / ROWS remain, and as many SiLUs: the limit of this op is
the special-function unit as much as the memory. All sums are fp32.
"""

# ruff: noqa: RUF005
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# (Triton's compiler knows sums of tuples, but no unpacking into one; static_range and tuples are the compiler's)
from __future__ import annotations

import triton
import triton.language as tl

from sana.ops.rounding import rounded


@triton.jit
def _sigmoids(a, b):
    """Both sigmoids for one reciprocal: 1 / p = q / (p q). The bound keeps the product finite."""
    p = 1.0 + tl.exp2(tl.minimum(a * -1.4426950408889634, 60.0))
    q = 1.0 + tl.exp2(tl.minimum(b * -1.4426950408889634, 60.0))
    r = 1.0 / (p * q)
    return r * q, r * p


@triton.jit
def _taps(weight, channel, live):
    """The nine weights of each channel as fp32."""
    taps = ()
    for k in tl.static_range(9):
        taps = taps + (tl.load(weight + channel * 9 + k, mask=live, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _reach(s, taps, KX: tl.constexpr, ROWS: tl.constexpr):
    """What one column of silu(u), rows -1 .. ROWS, adds to the outputs that meet it with the taps of column KX."""
    out = ()
    for r in tl.static_range(ROWS):
        out = out + (s[r] * taps[KX] + s[r + 1] * taps[3 + KX] + s[r + 2] * taps[6 + KX],)
    return out


@triton.jit
def _add(a, b, ROWS: tl.constexpr):
    out = ()
    for r in tl.static_range(ROWS):
        out = out + (a[r] + b[r],)
    return out


@triton.jit
def _repeat(a, ROWS: tl.constexpr):
    out = ()
    for _ in tl.static_range(ROWS):
        out = out + (a,)
    return out


@triton.jit
def convolve_and_gate(
    u,
    weight,
    bias,
    grad,
    out,
    h,
    w,
    c,
    stride_b,
    stride_n,
    grad_b,
    grad_n,
    segment,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One strip of rows, one segment of columns, BLOCK channels of the values and as many of the gates.

    Forward, out is the gated result (b, n, c). With BACKWARD the convolution is computed again, grad is the gradient
    of the result, and out (b, n, 2 c) the gradients of the convolution's values and gates.
    """
    TYPE: tl.constexpr = out.dtype.element_ty
    blocks = tl.cdiv(c, BLOCK)
    strips = tl.cdiv(h, ROWS)
    segments = tl.cdiv(w, segment)
    pid = tl.program_id(0)
    channel = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    live = channel < c
    item = pid // blocks
    first = (item % segments) * segment
    end = tl.minimum(first + segment, w)
    item = item // segments
    top = (item % strips) * ROWS
    image = (item // strips).to(tl.int64)
    u += image * stride_b
    grad += image * grad_b

    value_taps, gate_taps = _taps(weight, channel, live), _taps(weight, channel + c, live)
    value_bias = _repeat(tl.load(bias + channel, mask=live, other=0.0).to(tl.float32), ROWS)
    gate_bias = _repeat(tl.load(bias + c + channel, mask=live, other=0.0).to(tl.float32), ROWS)
    value0, value1, gate0, gate1 = value_bias, value_bias, gate_bias, gate_bias  # the outputs at x - 1 and at x
    for x in range(tl.maximum(first - 1, 0), end + 1):
        sv, sg = (), ()
        for i in tl.static_range(ROWS + 2):
            y = top - 1 + i
            mask = channel < tl.where((y >= 0) & (y < h) & (x < w), c, 0)
            place = u + (y * w + x).to(tl.int64) * stride_n + channel
            v = tl.load(place, mask=mask, other=0.0).to(tl.float32)  # silu(0) = 0: the padding
            g = tl.load(place + c, mask=mask, other=0.0).to(tl.float32)
            a, b = _sigmoids(v, g)
            sv, sg = sv + (v * a,), sg + (g * b,)
        value = _add(value0, _reach(sv, value_taps, 2, ROWS), ROWS)
        value0 = _add(value1, _reach(sv, value_taps, 1, ROWS), ROWS)
        value1 = _add(value_bias, _reach(sv, value_taps, 0, ROWS), ROWS)
        gate = _add(gate0, _reach(sg, gate_taps, 2, ROWS), ROWS)
        gate0 = _add(gate1, _reach(sg, gate_taps, 1, ROWS), ROWS)
        gate1 = _add(gate_bias, _reach(sg, gate_taps, 0, ROWS), ROWS)
        for half in tl.static_range(ROWS // 2):
            sigmoid = _sigmoids(gate[2 * half], gate[2 * half + 1])
            for i in tl.static_range(2):
                y = top + 2 * half + i
                v, g, a = value[2 * half + i], gate[2 * half + i], sigmoid[i]
                n = (y * w + x - 1).to(tl.int64)
                mask = channel < tl.where((y < h) & (x > first), c, 0)
                if BACKWARD:
                    dy = tl.load(grad + n * grad_n + channel, mask=mask, other=0.0).to(tl.float32)
                    place = out + (image * h * w + n) * 2 * c + channel
                    tl.store(place, rounded(dy * g * a, TYPE), mask=mask)
                    tl.store(place + c, rounded(dy * v * (a + g * a * (1.0 - a)), TYPE), mask=mask)
                else:
                    tl.store(out + (image * h * w + n) * c + channel, rounded(v * g * a, TYPE), mask=mask)


@triton.jit
def convolve_back(
    u,
    weight,
    grad,
    du,
    partial,
    h,
    w,
    c,
    images,
    stride_b,
    stride_n,
    segment,
    group,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """du = silu'(u) times the transposed convolution of grad (b, n, c), contiguous; sums for the weights and bias.

    A program takes `group` items (strips of segments of images) of BLOCK channels, one after the other, and writes what
    they add to the gradients of the nine taps and of the bias to its row of partial, (programs, 10, c).
    """
    TYPE: tl.constexpr = du.dtype.element_ty
    blocks = tl.cdiv(c, BLOCK)
    strips = tl.cdiv(h, ROWS)
    segments = tl.cdiv(w, segment)
    pid = tl.program_id(0)
    channel = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    live = channel < c
    turn = pid // blocks
    taps = _taps(weight, channel, live)
    zero = tl.zeros((BLOCK,), tl.float32)
    zeros = _repeat(zero, ROWS)
    sums = _repeat(zero, 10)
    for item in range(turn * group, tl.minimum(turn * group + group, images * strips * segments)):
        first = (item % segments) * segment
        end = tl.minimum(first + segment, w)
        top = (item // segments % strips) * ROWS
        image = (item // segments // strips).to(tl.int64)
        sum0, sum1 = zeros, zeros  # du before the factor silu', at x - 1 and at x
        s0, s1, slope0, slope1 = zeros, zeros, zeros, zeros  # silu(u) and silu'(u) there
        for x in range(first - 1, end + 1):
            s2, slope2 = (), ()
            for half in tl.static_range(ROWS // 2):
                y = top + 2 * half
                place = u + image * stride_b + (y * w + x + 1).to(tl.int64) * stride_n + channel
                mask = channel < tl.where((y < h) & (x + 1 < end), c, 0)
                a = tl.load(place, mask=mask, other=0.0).to(tl.float32)
                below = place + tl.cast(w, tl.int64) * stride_n
                mask = channel < tl.where((y + 1 < h) & (x + 1 < end), c, 0)
                b = tl.load(below, mask=mask, other=0.0).to(tl.float32)
                p, q = _sigmoids(a, b)
                s2 = s2 + (a * p, b * q)
                slope2 = slope2 + (p + a * p * (1.0 - p), q + b * q * (1.0 - q))
            d = ()
            for i in tl.static_range(ROWS + 2):
                y = top - 1 + i
                mask = channel < tl.where((y >= 0) & (y < h) & (x >= 0) & (x < w), c, 0)
                place = grad + (image * h * w + (y * w + x)) * c + channel
                d = d + (tl.load(place, mask=mask, other=0.0).to(tl.float32),)
            back0, back1, back2 = (), (), ()
            for r in tl.static_range(ROWS):
                back0 = back0 + (d[r + 2] * taps[0] + d[r + 1] * taps[3] + d[r] * taps[6],)
                back1 = back1 + (d[r + 2] * taps[1] + d[r + 1] * taps[4] + d[r] * taps[7],)
                back2 = back2 + (d[r + 2] * taps[2] + d[r + 1] * taps[5] + d[r] * taps[8],)
            done = _add(sum0, back0, ROWS)
            sum0, sum1 = _add(sum1, back1, ROWS), back2
            for r in tl.static_range(ROWS):
                place = du + (image * h * w + ((top + r) * w + x - 1)) * c + channel
                mask = channel < tl.where((top + r < h) & (x > first), c, 0)
                tl.store(place, rounded(done[r] * slope0[r], TYPE), mask=mask)
            more = ()
            for ky in tl.static_range(3):
                m0, m1, m2 = sums[3 * ky], sums[3 * ky + 1], sums[3 * ky + 2]
                for r in tl.static_range(ROWS):
                    m0 += s0[r] * d[r - ky + 2]
                    m1 += s1[r] * d[r - ky + 2]
                    m2 += s2[r] * d[r - ky + 2]
                more = more + (m0, m1, m2)
            own = zero
            for r in tl.static_range(ROWS):
                own += d[r + 1]
            sums = more + (sums[9] + tl.where((x >= first) & (x < end), own, 0.0),)
            s0, s1, slope0, slope1 = s1, s2, slope1, slope2
    for k in tl.static_range(10):
        tl.store(partial + (turn * 10 + k).to(tl.int64) * c + channel, sums[k], mask=live)
