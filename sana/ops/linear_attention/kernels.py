"""Triton kernels of ReLU linear attention; `triton.py` launches them.

With phi = ReLU, the tokens are summed to S = sum_m phi(k_m) v_m' and z = sum_m phi(k_m), and a query is answered by
y = S' phi(q) / (z . phi(q) + eps). One program serves one head of one sample. STAGE says what it does: 0 both, for
all tokens; where heads are too few to fill a card, tokens are cut into splits, one program each: 1 sums those of its
split, 2 adds up the sums of all splits (in a fixed order) and answers the queries of its own.

Inputs of 16 bits go to the tensor cores as they are, where their products are exact. What is fp32 (S, and what stands
against it in the backward pass) is multiplied as the sum of two numbers of bf16, for fp16 of TF32 three times, as one
rounding to 8 bits would show in the result. So the error is that of rounding the result.

A state is the sums of one head: DH rows of S, then z, (DH + 1, DH) in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sana.ops.rounding import dot, rounded


@triton.jit
def tile(x, start, n, stride_n, stride_d, DH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to BLOCK_N tokens from `start` on of one head, and which of them there are."""
    row, column = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_D)[None, :]
    x += tl.cast(start, tl.int64) * stride_n
    mask = start + row < n
    if DH < BLOCK_D:
        mask = mask & (column < DH)
    return x + row * stride_n + column * stride_d, mask


@triton.jit
def relu(x):
    """In fp32; not a number stays so."""
    x = x.to(tl.float32)
    return tl.where(x < 0, 0.0, x)


@triton.jit
def halves(s, TYPE: tl.constexpr):
    """Two terms whose sum is s, for `times` with inputs of TYPE; those of bf16 keep 16 of its 24 bits."""
    high, low = s, s
    if tl.bfloat16 == TYPE:
        high = rounded(s, TYPE)
        low = rounded(s - high.to(tl.float32), TYPE)
    return high, low


@triton.jit
def times(a, high, low, acc):
    """acc + a s for a of the inputs' type and the halves of an fp32 s."""
    if a.dtype == tl.bfloat16:
        acc = dot(a, low, dot(a, high, acc))
    elif a.dtype == tl.float16:
        acc = tl.dot(a.to(tl.float32), high, acc, input_precision="tf32x3")
    else:
        acc = dot(a, high, acc)
    return acc


@triton.jit
def columns(x, BLOCK_N: tl.constexpr):
    """(BLOCK_N) -> 16 equal columns, the fewest that tensor cores take."""
    return tl.broadcast_to(x[:, None], [BLOCK_N, 16])


@triton.jit
def column(x):
    """The inverse of `columns`."""
    return tl.sum(x, 1) * 0.0625


@triton.jit
def load_state(state, DH: tl.constexpr, BLOCK_D: tl.constexpr):
    """S and z of one head; zeros beyond DH."""
    i = tl.arange(0, BLOCK_D)
    mask = (i[:, None] < DH) & (i[None, :] < DH)
    s = tl.load(state + i[:, None] * DH + i[None, :], mask=mask, other=0.0)
    return s, tl.load(state + DH * DH + i, mask=i < DH, other=0.0)


@triton.jit
def store_state(state, s, z, DH: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `load_state`."""
    i = tl.arange(0, BLOCK_D)
    tl.store(state + i[:, None] * DH + i[None, :], s, mask=(i[:, None] < DH) & (i[None, :] < DH))
    tl.store(state + DH * DH + i, z, mask=i < DH)


@triton.jit
def add_states(state, stride, count, DH: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum of `count` states that lie `stride` numbers apart, from the first to the last."""
    s, z = load_state(state, DH, BLOCK_D)
    for i in range(1, count):
        more_s, more_z = load_state(state + tl.cast(i, tl.int64) * stride, DH, BLOCK_D)
        s, z = s + more_s, z + more_z
    return s, z


@triton.jit
def forward(
    q, k, v, y, state, partial, n, heads, per_split, eps,
    qb, qn, qh, qd, kb, kn, kh, kd, vb, vn, vh, vd,
    DH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """y (b, n, heads, DH) contiguous, and with SAVE the state of every head.

    Args:
        state: (b heads) states.
        partial: (splits, b heads) states, between stages 1 and 2.
        per_split: tokens of one split.
        qb, qn, qh, qd: strides of q by sample, token, head and channel; those of k and v likewise.
    """
    TYPE: tl.constexpr = q.dtype.element_ty
    SIZE: tl.constexpr = (DH + 1) * DH
    pid, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = pid // heads, pid % heads
    first = split * per_split
    last = tl.minimum(first + per_split, n)
    if STAGE == 2:
        s, z = add_states(partial + pid * SIZE, tl.num_programs(0) * SIZE, tl.num_programs(1), DH, BLOCK_D)
    else:
        k += b * kb + h * kh
        v += b * vb + h * vh
        s, zs = tl.zeros([BLOCK_D, BLOCK_D], tl.float32), tl.zeros([BLOCK_D, 16], tl.float32)
        for start in tl.range(first, last, BLOCK_N, num_stages=3):
            at, mask = tile(k, start, n, kn, kd, DH, BLOCK_N, BLOCK_D)
            key = tl.trans(relu(tl.load(at, mask=mask, other=0.0)).to(TYPE))
            at, mask = tile(v, start, n, vn, vd, DH, BLOCK_N, BLOCK_D)
            s = dot(key, tl.load(at, mask=mask, other=0.0), s)
            zs = dot(key, tl.full([BLOCK_N, 16], 1.0, TYPE), zs)
        z = column(zs)
    if STAGE == 1:
        store_state(partial + (split * tl.num_programs(0) + pid) * SIZE, s, z, DH, BLOCK_D)
    else:
        if SAVE:
            if split == 0:
                store_state(state + pid * SIZE, s, z, DH, BLOCK_D)
        q += b * qb + h * qh
        y += b * n * heads * DH + h * DH
        high, low = halves(s, TYPE)
        for start in tl.range(first, last, BLOCK_N, num_stages=3):
            at, mask = tile(q, start, n, qn, qd, DH, BLOCK_N, BLOCK_D)
            query = relu(tl.load(at, mask=mask, other=0.0))
            numerator = times(query.to(TYPE), high, low, tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
            scale = 1.0 / (tl.sum(query * z[None, :], 1) + eps)
            at, mask = tile(y, start, n, heads * DH, 1, DH, BLOCK_N, BLOCK_D)
            tl.store(at, rounded(numerator * scale[:, None], y.dtype.element_ty), mask=mask)


@triton.jit
def backward(
    q, k, v, g, dq, dk, dv, state, partial, n, heads, per_split, eps,
    qb, qn, qh, qd, kb, kn, kh, kd, vb, vn, vh, vd, gb, gn, gh, gd, db, dn,
    DH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and v from g, that of y; the part of `forward` that is cheap is done again.

    With r = 1 / (z . phi(q) + eps) and t = -r (g . y) = -r^2 phi(q) . S g, per query: phi(q) has the gradient
    r S g + t z, S the sum of r phi(q) g', and z that of t phi(q). From those, phi(k) has dS v + dz, and v dS' phi(k).

    Args:
        state: of every head, as `forward` saved it.
        partial: (splits, b heads) states: dS and dz, between stages 1 and 2.
        db, dn: strides of dq, dk and dv by sample and token; heads and channels lie side by side.
    """
    TYPE: tl.constexpr = q.dtype.element_ty
    SIZE: tl.constexpr = (DH + 1) * DH
    pid, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = pid // heads, pid % heads
    first = split * per_split
    last = tl.minimum(first + per_split, n)
    if STAGE == 2:
        s, z = add_states(partial + pid * SIZE, tl.num_programs(0) * SIZE, tl.num_programs(1), DH, BLOCK_D)
    else:
        q += b * qb + h * qh
        g += b * gb + h * gh
        dq += b * db + h * DH
        seen, seen_z = load_state(state + pid * SIZE, DH, BLOCK_D)
        high, low = halves(tl.trans(seen), TYPE)
        s, zs = tl.zeros([BLOCK_D, BLOCK_D], tl.float32), tl.zeros([BLOCK_D, 16], tl.float32)
        at, mask = tile(q, first, last, qn, qd, DH, BLOCK_N, BLOCK_D)
        next_query = tl.load(at, mask=mask, other=0.0)
        at, mask = tile(g, first, last, gn, gd, DH, BLOCK_N, BLOCK_D)
        next_slope = tl.load(at, mask=mask, other=0.0)
        for start in range(first, last, BLOCK_N):
            query, slope = relu(next_query), next_slope
            # Fetched ahead by hand: the compiler does not, where a tile is used in several layouts.
            at, mask = tile(q, start + BLOCK_N, last, qn, qd, DH, BLOCK_N, BLOCK_D)
            next_query = tl.load(at, mask=mask, other=0.0)
            at, mask = tile(g, start + BLOCK_N, last, gn, gd, DH, BLOCK_N, BLOCK_D)
            next_slope = tl.load(at, mask=mask, other=0.0)
            scale = 1.0 / (tl.sum(query * seen_z[None, :], 1) + eps)
            scale = tl.where(start + tl.arange(0, BLOCK_N) < n, scale, 0.0)  # of no token, 1 / eps
            change = times(slope, high, low, tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
            turn = -scale * scale * tl.sum(query * change, 1)
            change = scale[:, None] * change + turn[:, None] * seen_z[None, :]
            at, mask = tile(dq, start, n, dn, 1, DH, BLOCK_N, BLOCK_D)
            tl.store(at, rounded(tl.where(query == 0, 0.0, change), dq.dtype.element_ty), mask=mask)
            query = tl.trans(query.to(TYPE))
            more_high, more_low = halves(slope.to(tl.float32) * scale[:, None], TYPE)
            s = times(query, more_high, more_low, s)
            more_high, more_low = halves(columns(turn, BLOCK_N), TYPE)
            zs = times(query, more_high, more_low, zs)
        z = column(zs)
    if STAGE == 1:
        store_state(partial + (split * tl.num_programs(0) + pid) * SIZE, s, z, DH, BLOCK_D)
    else:
        k += b * kb + h * kh
        v += b * vb + h * vh
        dk += b * db + h * DH
        dv += b * db + h * DH
        high, low = halves(s, TYPE)
        turned_high, turned_low = tl.trans(high), tl.trans(low)
        for start in tl.range(first, last, BLOCK_N, num_stages=3):
            at, mask = tile(k, start, n, kn, kd, DH, BLOCK_N, BLOCK_D)
            key = relu(tl.load(at, mask=mask, other=0.0))
            at, mask = tile(v, start, n, vn, vd, DH, BLOCK_N, BLOCK_D)
            value = tl.load(at, mask=mask, other=0.0)
            change = times(value, turned_high, turned_low, tl.zeros([BLOCK_N, BLOCK_D], tl.float32)) + z[None, :]
            at, mask = tile(dk, start, n, dn, 1, DH, BLOCK_N, BLOCK_D)
            tl.store(at, rounded(tl.where(key == 0, 0.0, change), dk.dtype.element_ty), mask=mask)
            change = times(key.to(TYPE), high, low, tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
            at, mask = tile(dv, start, n, dn, 1, DH, BLOCK_N, BLOCK_D)
            tl.store(at, rounded(change, dv.dtype.element_ty), mask=mask)


@triton.jit
def derivative(
    q, k, v, tq, tk, tv, y, ty, partial, n, heads, per_split, eps,
    qb, qn, qh, qd, kb, kn, kh, kd, vb, vn, vh, vd,
    tqb, tqn, tqh, tqd, tkb, tkn, tkh, tkd, tvb, tvn, tvh, tvd,
    DH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    """y as `forward` makes it, and its tangent from those of q, k and v.

    Args:
        tq, tk, tv: tangents.
        y, ty: (b, n, heads, DH) contiguous.
        partial: (splits, b heads, 2): states and their tangents, between stages 1 and 2.
        qb, ..., tvd: strides as in `forward`.
    """
    TYPE: tl.constexpr = q.dtype.element_ty
    SIZE: tl.constexpr = (DH + 1) * DH
    pid, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = pid // heads, pid % heads
    first = split * per_split
    last = tl.minimum(first + per_split, n)
    if STAGE == 2:
        stride = 2 * SIZE * tl.num_programs(0)
        s, z = add_states(partial + 2 * pid * SIZE, stride, tl.num_programs(1), DH, BLOCK_D)
        ts, tz = add_states(partial + (2 * pid + 1) * SIZE, stride, tl.num_programs(1), DH, BLOCK_D)
    else:
        k += b * kb + h * kh
        v += b * vb + h * vh
        tk += b * tkb + h * tkh
        tv += b * tvb + h * tvh
        s, zs = tl.zeros([BLOCK_D, BLOCK_D], tl.float32), tl.zeros([BLOCK_D, 16], tl.float32)
        ts, tzs = tl.zeros([BLOCK_D, BLOCK_D], tl.float32), tl.zeros([BLOCK_D, 16], tl.float32)
        ones = tl.full([BLOCK_N, 16], 1.0, TYPE)
        for start in tl.range(first, last, BLOCK_N, num_stages=3):
            at, mask = tile(k, start, n, kn, kd, DH, BLOCK_N, BLOCK_D)
            key = relu(tl.load(at, mask=mask, other=0.0))
            at, mask = tile(tk, start, n, tkn, tkd, DH, BLOCK_N, BLOCK_D)
            turn = tl.where(key == 0, 0.0, tl.load(at, mask=mask, other=0.0).to(tl.float32))
            at, mask = tile(v, start, n, vn, vd, DH, BLOCK_N, BLOCK_D)
            value = tl.load(at, mask=mask, other=0.0)
            at, mask = tile(tv, start, n, tvn, tvd, DH, BLOCK_N, BLOCK_D)
            key, turn = tl.trans(key.to(TYPE)), tl.trans(turn.to(TYPE))
            s, zs = dot(key, value, s), dot(key, ones, zs)
            ts, tzs = dot(turn, value, ts), dot(turn, ones, tzs)
            ts = dot(key, tl.load(at, mask=mask, other=0.0), ts)
        z, tz = column(zs), column(tzs)
    if STAGE == 1:
        at = partial + 2 * (split * tl.num_programs(0) + pid) * SIZE
        store_state(at, s, z, DH, BLOCK_D)
        store_state(at + SIZE, ts, tz, DH, BLOCK_D)
    else:
        q += b * qb + h * qh
        tq += b * tqb + h * tqh
        y += b * n * heads * DH + h * DH
        ty += b * n * heads * DH + h * DH
        high, low = halves(s, TYPE)
        turned_high, turned_low = halves(ts, TYPE)
        for start in tl.range(first, last, BLOCK_N, num_stages=3):
            at, mask = tile(q, start, n, qn, qd, DH, BLOCK_N, BLOCK_D)
            query = relu(tl.load(at, mask=mask, other=0.0))
            at, mask = tile(tq, start, n, tqn, tqd, DH, BLOCK_N, BLOCK_D)
            turn = tl.where(query == 0, 0.0, tl.load(at, mask=mask, other=0.0).to(tl.float32))
            nothing = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            scale = 1.0 / (tl.sum(query * z[None, :], 1) + eps)
            answer = times(query.to(TYPE), high, low, nothing) * scale[:, None]
            change = times(query.to(TYPE), turned_high, turned_low, nothing)
            change = times(turn.to(TYPE), high, low, change)
            change -= answer * tl.sum(turn * z[None, :] + query * tz[None, :], 1)[:, None]
            at, mask = tile(y, start, n, heads * DH, 1, DH, BLOCK_N, BLOCK_D)
            tl.store(at, rounded(answer, y.dtype.element_ty), mask=mask)
            at, mask = tile(ty, start, n, heads * DH, 1, DH, BLOCK_N, BLOCK_D)
            tl.store(at, rounded(change * scale[:, None], ty.dtype.element_ty), mask=mask)
