"""Rounding in Triton kernels that is the same on a card and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
"""Whether kernels of this process run in the interpreter, which cuts bf16 off and multiplies its bits in tl.dot."""


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """x (fp32) in TYPE, to the nearest, ties to even."""
    if INTERPRETED and tl.bfloat16 == TYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def dot(a, b, acc):
    """acc + a b with exact products of bf16, fp16 or (without TF32) fp32, summed in fp32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
