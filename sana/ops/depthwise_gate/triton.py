"""The Mix-FFN middle on GPUs: one kernel forward (u is read, the gated result written), two backward.

A program walks along a strip of `ROWS` image rows, column by column, for `BLOCK` value channels and the gate channels
that belong to them. A column's SiLUs are computed once and scattered into the sums of the three outputs that they
reach, so that of nine reads of each element only (ROWS + 2) / ROWS remain, and as many SiLUs: the limit of this op is
the special-function unit as much as the memory. All sums are fp32.
"""

# ruff: noqa: RUF005
# Triton's compiler knows sums of tuples, but no unpacking into one.
import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.ops.ahead import KernelCase
from sana.ops.buffer import new_empty
from sana.ops.fresh import fresh
from sana.ops.rounding import rounded

ROWS = 4
BLOCK = 64
WARPS = 1
_PROGRAMS = 2048  # as many keep an H200 busy: 132 SMs, whose registers hold 12 programs each


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


def _segment(columns: int, others: int) -> int:
    """Columns that a program walks: all of them, or fewer (at the price of two more each) until the card is busy."""
    segment = columns
    while segment > 8 and others * triton.cdiv(columns, segment) < _PROGRAMS:
        segment = triton.cdiv(segment, 2)
    return segment


def launch_forward(u: Tensor, weight: Tensor, bias: Tensor, h: int, w: int) -> Tensor:
    """(b, n, c) from u (b, n, 2 c), whose last dimension is contiguous."""
    images, n, channels = u.shape
    c = channels // 2
    u, weight = _dense(u), weight.contiguous()
    out = new_empty(u, (images, n, c))
    others = triton.cdiv(c, BLOCK) * images * triton.cdiv(h, ROWS)
    segment = _segment(w, others)
    if out.numel():
        with torch.cuda.device_of(u):
            convolve_and_gate[(others * triton.cdiv(w, segment),)](
                u, weight, bias.contiguous(), u, out, h, w, c, u.stride(0), u.stride(1), 0, 0, segment,
                BACKWARD=False, ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS, num_stages=1,
            )  # fmt: skip
    return out


def launch_backward(
    grad: Tensor, u: Tensor, weight: Tensor, bias: Tensor, h: int, w: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u, weight and bias; the sums of the latter two are taken in a fixed order."""
    images, n, channels = u.shape
    c = channels // 2
    u, grad, taps = _dense(u), _dense(grad), weight.contiguous()
    mixed = new_empty(u, (images, n, channels))
    du = new_empty(u, (images, n, channels))
    strips = images * triton.cdiv(h, ROWS)
    if not du.numel():
        return du, torch.zeros_like(weight), torch.zeros_like(bias)
    blocks = triton.cdiv(c, BLOCK)
    segment = _segment(w, blocks * strips)
    with torch.cuda.device_of(u):
        convolve_and_gate[(blocks * strips * triton.cdiv(w, segment),)](
            u, taps, bias.contiguous(), grad, mixed, h, w, c, u.stride(0), u.stride(1), grad.stride(0), grad.stride(1),
            segment, BACKWARD=True, ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    blocks = triton.cdiv(channels, BLOCK)
    segment = _segment(w, blocks * strips)
    items = strips * triton.cdiv(w, segment)
    group = max(1, blocks * items // (2 * _PROGRAMS))
    turns = triton.cdiv(items, group)
    partial = new_empty(u, (turns, 10, channels), torch.float32)
    with torch.cuda.device_of(u):
        convolve_back[(blocks * turns,)](
            u, taps, mixed, du, partial, h, w, channels, images, u.stride(0), u.stride(1), segment, group,
            ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    sums = partial.sum(0)
    return du, fresh(sums[:9].mT, weight), fresh(sums[9], bias)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("sana::depthwise_gate", mutates_args=())
def depthwise_gate(u: Tensor, weight: Tensor, bias: Tensor, h: int, w: int) -> Tensor:
    """`naive.depthwise_gate` by `launch_forward`, known to autograd and torch.compile."""
    return launch_forward(u, weight, bias, h, w)


@depthwise_gate.register_fake
def _(u: Tensor, weight: Tensor, bias: Tensor, h: int, w: int) -> Tensor:
    return u.new_empty(u.shape[0], u.shape[1], u.shape[2] // 2)


@torch.library.custom_op("sana::depthwise_gate_backward", mutates_args=())
def depthwise_gate_backward(
    grad: Tensor, u: Tensor, weight: Tensor, bias: Tensor, h: int, w: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`launch_backward`, known to torch.compile."""
    return launch_backward(grad, u, weight, bias, h, w)


@depthwise_gate_backward.register_fake
def _(grad: Tensor, u: Tensor, weight: Tensor, bias: Tensor, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    return u.new_empty(u.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx, inputs, output) -> None:
    u, weight, bias, ctx.h, ctx.w = inputs
    ctx.save_for_backward(u, weight, bias)


def _differentiate(ctx, grad: Tensor):
    u, weight, bias = ctx.saved_tensors
    return *depthwise_gate_backward(grad, u, weight, bias, ctx.h, ctx.w), None, None


depthwise_gate.register_autograd(_differentiate, setup_context=_save)


def _cases() -> list[KernelCase]:
    """The types and alignments that the networks ask for."""
    cases = []
    sizes = dict.fromkeys(("h", "w", "stride_b", "stride_n", "grad_b", "grad_n"), "i32:16")
    sizes |= dict.fromkeys(("segment", "images", "group"), "i32")
    kernels = [("", convolve_and_gate, {"BACKWARD": False}), ("-again", convolve_and_gate, {"BACKWARD": True})]
    kernels.append(("-back", convolve_back, {}))
    for kind, by in (("bf16", ":16"), ("fp16", ":16"), ("fp32", ":16"), ("bf16", "")):
        types = sizes | dict.fromkeys(("u", "weight", "bias", "grad", "out", "du"), f"*{kind}:16")
        types |= {"c": f"i32{by}", "partial": "*fp32:16"}
        for part, function, flags in kernels:
            signature = {name: types[name] for name in function.arg_names if name in types}
            name = f"depthwise_gate{part}-{kind}{'' if by else '-odd'}"
            cases.append(KernelCase(name, function, signature, {"ROWS": ROWS, "BLOCK": BLOCK, **flags}, WARPS, 1, 200))
    return cases


KERNELS = _cases()
