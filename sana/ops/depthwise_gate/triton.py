"""The Mix-FFN middle on GPUs: launches of the kernels, and what autograd and torch.compile have to know of them."""

# pyright: reportCallIssue=false
# (a launch takes num_warps and num_stages beside the kernel's own arguments)

from typing import Any

import torch
import triton
from torch import Tensor

from sana.ops.ahead import KernelCase
from sana.ops.buffer import new_empty
from sana.ops.depthwise_gate.kernels import convolve_and_gate, convolve_back
from sana.ops.fresh import fresh

ROWS = 4  # of an image, which a program walks along
BLOCK = 64  # channels of a program: two for each thread of its warp
WARPS = 1
_PROGRAMS = 2048  # as many keep an H200 busy: 132 SMs, whose registers hold 12 programs each


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
    kernels: list[tuple[str, Any, dict[str, bool]]] = [
        ("", convolve_and_gate, {"BACKWARD": False}),
        ("-again", convolve_and_gate, {"BACKWARD": True}),
        ("-back", convolve_back, {}),
    ]
    for kind, by in (("bf16", ":16"), ("fp16", ":16"), ("fp32", ":16"), ("bf16", "")):
        types = sizes | dict.fromkeys(("u", "weight", "bias", "grad", "out", "du"), f"*{kind}:16")
        types |= {"c": f"i32{by}", "partial": "*fp32:16"}
        for part, function, flags in kernels:
            signature = {name: types[name] for name in function.arg_names if name in types}
            name = f"depthwise_gate{part}-{kind}{'' if by else '-odd'}"
            cases.append(KernelCase(name, function, signature, {"ROWS": ROWS, "BLOCK": BLOCK, **flags}, WARPS, 1, 200))
    return cases


KERNELS = _cases()
