"""Specialisations of the kernels that `scripts/compile_kernels.py` compiles ahead of time."""

from __future__ import annotations

import torch

from sana.ops.ahead import KernelCase
from sana.ops.linear_attention import kernels
from sana.ops.linear_attention.plan import plan

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
STRIDES = "b", "n", "h"  # multiples of 16 in published models; channels lie side by side


def _case(function, dh: int, dtype: torch.dtype, stage: int) -> KernelCase:
    name = function.fn.__name__
    shape = plan(name, 1, 4096, 70, dh, dtype)
    signature, constexprs = {}, {**shape.options(dh), "STAGE": stage}
    num_warps, num_stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
    if name == "forward":
        constexprs["SAVE"] = True
    for argument in function.arg_names:
        if argument in constexprs:
            continue
        if argument in ("state", "partial"):
            signature[argument] = "*fp32:16"
        elif argument in ("n", "heads"):
            signature[argument] = "i32"
        elif argument == "eps":
            signature[argument] = "fp32"
        elif argument == "per_split" or (argument[-1:] in STRIDES and len(argument) > 1):
            signature[argument] = "i32:16"
        elif argument in ("qd", "kd", "vd", "gd", "tqd", "tkd", "tvd"):
            constexprs[argument] = 1
        else:
            signature[argument] = f"*{TYPES[dtype]}:16"
    label = f"linear_attention.{name} {TYPES[dtype]} dh={dh} stage={stage}"
    return KernelCase(label, function, signature, constexprs, num_warps, num_stages)


_EVERY = (kernels.forward, kernels.backward, kernels.derivative)
KERNELS = [_case(function, 32, dtype, stage) for function in _EVERY for dtype in TYPES for stage in (0, 1, 2)]
KERNELS += [_case(function, dh, dtype, 0) for function in _EVERY for dtype in TYPES for dh in (16, 64)]
