"""The decoder's small steps on GPUs; maps are rows of channels, (b, h, w, c)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.ops.ahead import KernelCase
from sana.ops.buffer import new_empty
from sana.ops.rounding import dot, rounded

SIZE, WARPS = 2048, 4  # numbers per program of the kernels that only move and add


def _tile(dtype: torch.dtype) -> dict[str, int]:
    """Of `few`: products of fp32 without TF32 are done one by one, in registers."""
    return {"PIXELS": 32, "CHANNELS": 32} if dtype == torch.float32 else {"PIXELS": 128, "CHANNELS": 64}


@triton.jit
def add_and_silu(x, bias, y, count, c, SIZE: tl.constexpr):
    """y = silu(x + bias) over `count` numbers in rows of c."""
    TYPE: tl.constexpr = y.dtype.element_ty
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = place < count
    own = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    own += tl.load(bias + place % c, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, rounded(own / (1.0 + tl.exp(-own)), TYPE), mask=mask)


@triton.jit
def add_taps(weight, y, count, c, SIZE: tl.constexpr):
    """y (4, d, 2, 2, c): the sums of weight (d, 3, 3, c) for even and odd rows and columns; count: 4 d c."""
    TYPE: tl.constexpr = y.dtype.element_ty
    parity = tl.program_id(1)
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = place < count
    channel, tap = place % c, place // c % 4
    source = weight + (place // c // 4) * 9 * c + channel
    total = tl.zeros((SIZE,), tl.float32)
    for k in tl.static_range(9):  # pyright: ignore[reportGeneralTypeIssues] # the first of three rows is alone for even outputs, the last for odd ones
        row, column = (k // 3 + 1 - parity // 2) // 2, (k % 3 + 1 - parity % 2) // 2
        own = mask & (tap == 2 * row + column)
        total += tl.load(source + k * c, mask=own, other=0.0).to(tl.float32)
    tl.store(y + parity.to(tl.int64) * count + place, rounded(total, TYPE), mask=mask)


@triton.jit
def interleave(
    p0, p1, p2, p3, x, bias, y, count, h, w, c, d, SHORTCUT: tl.constexpr, REPEAT: tl.constexpr, SIZE: tl.constexpr
):
    """y (b, 2 h, 2 w, d) of four parts (b, h + 1, w + 1, d); a program has SIZE numbers of one part's place in y.

    Args:
        count: b h w d, numbers of y that come of one part.
        REPEAT: times that a channel of x stands in a row, 4 d / c.
    """
    TYPE: tl.constexpr = y.dtype.element_ty
    k = tl.program_id(1)
    i, j = k // 2, k % 2
    part = tl.where(k == 0, p0, tl.where(k == 1, p1, tl.where(k == 2, p2, p3)))
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = place < count
    channel, pixel = place % d, place // d
    column, row = pixel % w, pixel // w
    line, image = row % h, row // h
    at = ((image * (h + 1) + line + i) * (w + 1) + column + j) * d + channel
    own = tl.load(part + at, mask=mask, other=0.0).to(tl.float32)
    own += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    if SHORTCUT:
        own += tl.load(x + pixel * c + (4 * channel + k) // REPEAT, mask=mask, other=0.0).to(tl.float32)
    at = ((image * 2 * h + 2 * line + i) * 2 * w + 2 * column + j) * d + channel
    tl.store(y + at, rounded(own, TYPE), mask=mask)


@triton.jit
def few(
    x, weight, bias, y, h, w, c, d,
    FEW: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y (b, h, w, d) = 3x3 convolution of x (b, h, w, c); a program has PIXELS places of one row.

    Args:
        weight: (3, 3, c, FEW) contiguous, zero beyond d.
    """
    TYPE: tl.constexpr = y.dtype.element_ty
    strips = tl.cdiv(w, PIXELS)
    pid = tl.program_id(0)
    column = (pid % strips) * PIXELS + tl.arange(0, PIXELS)
    row = (pid // strips) % h
    image = (pid // strips // h).to(tl.int64)
    out = tl.arange(0, FEW)
    acc = tl.zeros([PIXELS, FEW], tl.float32)
    for tap in range(9):
        line, place = row + tap // 3 - 1, column + tap % 3 - 1
        inside = tl.where((line >= 0) & (line < h) & (place >= 0) & (place < w), c, 0)  # channels to read
        source = x + ((image * h + line) * w + place)[:, None] * c
        for first in range(0, c, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            a = tl.load(source + channel[None, :], mask=channel[None, :] < inside[:, None], other=0.0)
            taps = weight + (tap * c + channel)[:, None] * FEW + out[None, :]
            acc = dot(a, tl.load(taps, mask=channel[:, None] < c + 0 * out[None, :], other=0.0), acc)
    acc += tl.load(bias + out, mask=out < d, other=0.0).to(tl.float32)[None, :]
    at = y + ((image * h + row) * w + column)[:, None] * d + out[None, :]
    tl.store(at, rounded(acc, TYPE), mask=(column < w)[:, None] & (out < d)[None, :])


_add_and_silu: Any = add_and_silu  # whose arguments are annotated for the compiler
_add_taps: Any = add_taps
_interleave: Any = interleave
_few: Any = few


def bias_silu(x: Tensor, bias: Tensor) -> Tensor:
    """`naive.bias_silu` of a map in channels_last."""
    b, c, h, w = x.shape
    y = new_empty(x, (b, h, w, c))
    with torch.cuda.device_of(x):
        _add_and_silu[(triton.cdiv(x.numel(), SIZE),)](
            x, bias.contiguous(), y, x.numel(), c, SIZE=SIZE, num_warps=WARPS, num_stages=1
        )
    return y.movedim(-1, 1)


def doubling_kernels(weight: Tensor) -> list[Tensor]:
    """`naive.doubling_kernels` of a weight in channels_last; they are, too."""
    d, c = weight.shape[:2]
    y = new_empty(weight, (4, d, 2, 2, c))
    with torch.cuda.device_of(weight):
        _add_taps[(triton.cdiv(4 * d * c, SIZE), 4)](weight, y, 4 * d * c, c, SIZE=SIZE, num_warps=WARPS, num_stages=1)
    return [kernel.movedim(-1, 1) for kernel in y]


def double(parts: list[Tensor], x: Tensor, bias: Tensor, shortcut: bool) -> Tensor:
    """`naive.double` of maps in channels_last."""
    (b, c, h, w), d = x.shape, parts[0].shape[1]
    y = new_empty(x, (b, 2 * h, 2 * w, d))
    count = b * h * w * d
    with torch.cuda.device_of(x):
        _interleave[(triton.cdiv(count, SIZE), 4)](
            *parts, x, bias.contiguous(), y, count, h, w, c, d,
            SHORTCUT=shortcut, REPEAT=4 * d // c if shortcut else 1, SIZE=SIZE, num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    return y.movedim(-1, 1)


def convolve_to_few(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`naive.convolve_to_few` of a map in channels_last; the result is, too."""
    (b, c, h, w), d = x.shape, weight.shape[0]
    taps = torch.nn.functional.pad(weight.permute(2, 3, 1, 0), (0, 16 - d)).contiguous()
    y = new_empty(x, (b, h, w, d))
    tile = _tile(x.dtype)
    with torch.cuda.device_of(x):
        _few[(b * h * triton.cdiv(w, tile["PIXELS"]),)](
            x, taps, bias.contiguous(), y, h, w, c, d, FEW=16, **tile, num_warps=4, num_stages=3
        )
    return y.movedim(-1, 1)


def _cases() -> list[KernelCase]:
    """The types that autoencoders are decoded in."""
    cases = []

    def case(name: str, function: Any, constants: dict[str, Any], warps: int, stages: int, budget: int) -> None:
        numbers = {"count", "h", "w", "c", "d"}
        names = [n for n in function.arg_names if n not in constants]
        odd = {"h", "w", "d"} if function is few else {"h", "w"}
        signature = {n: ("i32" if n in odd else "i32:16") if n in numbers else f"*{kind}:16" for n in names}
        cases.append(KernelCase(f"{name}-{kind}", function, signature, constants, warps, stages, budget))

    for kind in ("bf16", "fp16", "fp32"):
        case("bias_silu", add_and_silu, {"SIZE": SIZE}, WARPS, 1, 96)
        case("doubling_kernels", add_taps, {"SIZE": SIZE}, WARPS, 1, 128)
        for repeat in (2, 4):
            constants = {"SHORTCUT": True, "REPEAT": repeat, "SIZE": SIZE}
            case(f"double_{repeat}", interleave, constants, WARPS, 1, 128)
        case("few", few, {"FEW": 16, **_tile(torch.float32 if kind == "fp32" else torch.bfloat16)}, 4, 3, 200)
    return cases


KERNELS = _cases()
