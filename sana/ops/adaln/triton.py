"""adaLN on GPUs: launches of the kernels, and what autograd and torch.compile have to know of them."""

# pyright: reportCallIssue=false
# (a launch takes num_warps and num_stages beside the kernel's own arguments)

from typing import Any

import torch
import triton
from torch import Tensor

from sana.ops.adaln.kernels import gate_rows, gate_rows_back, norm_rows, norm_rows_back
from sana.ops.ahead import KernelCase
from sana.ops.buffer import new_empty
from sana.ops.fresh import fresh

_PROGRAMS = 528  # four for each multiprocessor of an H200
_ROWS = 4  # tokens that a program of the forward kernels takes where there are plenty


def _block(d: int, kernel: Any, dtype: torch.dtype) -> tuple[int, int]:
    """Power of two that holds a row, and warps for it: so many that no card that we compile for runs out of registers.

    A warp takes 1024 bytes of x in the norm, 1024 elements in the sum, and 256 in the backward kernels up to 8 warps.
    """
    block = max(triton.next_power_of_2(d), 32)
    if kernel is norm_rows:
        share, most = 1024 // dtype.itemsize, 16
    else:
        share, most = (1024, 16) if kernel is gate_rows else (256, 8)
    return block, min(max(block // share, 1), most)


def _rows(tokens: int) -> int:
    return _ROWS if tokens >= 2 * _ROWS * _PROGRAMS else 1


def _chunks(frame: int, others: int) -> tuple[int, int]:
    """Tokens that a program of the backward kernels sums, few enough to fill the card, else up to 64; and how many
    programs a frame takes."""
    chunk = 8
    while chunk < 64 and others * triton.cdiv(frame, 2 * chunk) >= _PROGRAMS:
        chunk *= 2
    chunk = min(chunk, frame)
    return chunk, triton.cdiv(frame, chunk) if chunk else 0


def _strides(*tensors: Tensor) -> list[int]:
    """Those of the first two dimensions, one tensor after the other."""
    return [stride for x in tensors for stride in x.stride()[:2]]


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
    block, warps = _block(d, norm_rows, x.dtype)
    rows = _rows(b * n)
    if out.numel():
        with torch.cuda.device_of(x):
            norm_rows[(b * frames * triton.cdiv(frame, rows),)](
                x, other, shift, scale, out, total, mean, rstd, n, d, frame, frames,
                *_strides(x, other, shift, scale), eps, RESIDUAL=y is not None, STATISTICS=statistics, ROWS=rows,
                BLOCK=block, num_warps=warps, num_stages=1,
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
    chunk, chunks = _chunks(frame, b * frames)
    partial = new_empty(x, (b, frames, chunks, 2, d), torch.float32)
    block, warps = _block(d, norm_rows_back, x.dtype)
    if dx.numel():
        with torch.cuda.device_of(x):
            norm_rows_back[(b * frames * chunks,)](
                grad, more, x, scale, mean, rstd, dx, partial, n, d, frame, frames, chunk,
                *_strides(grad, more, x, scale), RESIDUAL=extra is not None, BLOCK=block, num_warps=warps, num_stages=1,
            )  # fmt: skip
    dshift, dscale = partial.sum(2).unbind(2)
    return dx, fresh(dshift, shift), fresh(dscale, scale)


def launch_gate(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y, of the type that the three promote to."""
    n, d, frame, frames = _sizes(x, gate)
    x, gate, y = _dense(x), _dense(gate), _dense(y)
    b = x.shape[0]
    out = new_empty(x, (b, n, d), _promoted(x, gate, y))
    block, warps = _block(d, gate_rows, x.dtype)
    rows = _rows(b * n)
    if out.numel():
        with torch.cuda.device_of(x):
            gate_rows[(b * frames * triton.cdiv(frame, rows),)](
                x, gate, y, out, n, d, frame, frames, *_strides(x, gate, y), ROWS=rows, BLOCK=block,
                num_warps=warps, num_stages=1,
            )  # fmt: skip
    return out


def launch_gate_back(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y and gate."""
    n, d, frame, frames = _sizes(y, gate)
    grad, dense, y = _dense(grad), _dense(gate), _dense(y)
    b = y.shape[0]
    dy = new_empty(y, (b, n, d))
    chunk, chunks = _chunks(frame, b * frames)
    partial = new_empty(y, (b, frames, chunks, d), torch.float32)
    block, warps = _block(d, gate_rows_back, y.dtype)
    if dy.numel():
        with torch.cuda.device_of(y):
            gate_rows_back[(b * frames * chunks,)](
                grad, dense, y, dy, partial, n, d, frame, frames, chunk, *_strides(grad, dense, y), BLOCK=block,
                num_warps=warps, num_stages=1,
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
    sizes = [f"{name}_{axis}" for name in ("x", "y", "grad", "extra") for axis in "bn"]
    sizes += [f"{name}_{axis}" for name in ("shift", "scale", "gate") for axis in "bf"] + ["d"]
    types = dict.fromkeys(sizes, "i32:16") | {"eps": "fp32"}
    types |= dict.fromkeys(("n", "frame", "frames", "chunk"), "i32")
    types |= dict.fromkeys(("mean", "rstd", "partial"), "*fp32:16")
    for kind, vector in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32"), ("fp16", "fp16")):
        dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        types |= dict.fromkeys(("x", "y", "out", "total", "grad", "extra", "dx", "dy"), f"*{kind}:16")
        types |= dict.fromkeys(("shift", "scale", "gate"), f"*{vector}:16")
        for d in (160, 1152, 2240):
            both = [(norm_rows, "", {"STATISTICS": True, "ROWS": _ROWS}), (norm_rows_back, "-back", {})]
            kernels = [(f, part, flags | {"RESIDUAL": False}) for f, part, flags in both]
            kernels += [(f, f"-residual{part}", flags | {"RESIDUAL": True}) for f, part, flags in both]
            kernels += [(gate_rows, "-gate", {"ROWS": _ROWS}), (gate_rows_back, "-gate-back", {})]
            for function, part, flags in kernels:
                block, warps = _block(d, function, dtype)
                signature = {name: types[name] for name in function.arg_names if name in types}
                name = f"adaln{part}-{kind}-{vector}-{d}"
                cases.append(KernelCase(name, function, signature, flags | {"BLOCK": block}, warps, 1, 168))
    return cases


KERNELS = _cases()
