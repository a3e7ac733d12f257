"""RMSNorm on GPUs: kernels over rows, and what autograd and torch.compile have to know of them.

A program holds some whole rows in registers, in a block of the next power of two, masked. Backward, it walks over a run
of rows and keeps what they add to the gradients of gain and bias; the programs' sums are added by a second, ordered
reduction.
"""

# pyright: reportCallIssue=false
# (a launch takes num_warps and num_stages beside the kernel's own arguments)

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.ops.ahead import KernelCase
from sana.ops.buffer import new_empty
from sana.ops.fresh import fresh
from sana.ops.rounding import rounded

_TILE = 4096, 1024  # elements that a program of the forward kernel holds where rows are short, and each of its warps
_BACK_TILE = 2048, 256
_PROGRAMS = 528  # four for each multiprocessor of an H200


@triton.jit
def norm_rows(
    x,
    weight,
    bias,
    residual,
    out,
    rstd,
    rows,
    d,
    stride,
    residual_stride,
    eps,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STATISTICS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = residual + act(x / rms(x) * weight + bias) for ROWS rows."""
    OUT: tl.constexpr = out.dtype.element_ty
    column = tl.arange(0, BLOCK)[None, :]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    live = (row < rows) & (column < d)
    z = tl.load(x + row * stride + column, mask=live, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(z * z, 1, keep_dims=True) / d + eps)
    y = z * r * tl.load(weight + column, mask=column < d, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + column, mask=column < d, other=0.0).to(tl.float32)
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # NaN stays
    if ACTIVATION == "silu":
        y = y / (1.0 + tl.exp2(y * -1.4426950408889634))
    if RESIDUAL:
        y += tl.load(residual + row * residual_stride + column, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * d + column, rounded(y, OUT), mask=live)
    if STATISTICS:
        tl.store(rstd + row, r, mask=row < rows)


@triton.jit
def norm_rows_back(
    grad,
    x,
    weight,
    bias,
    rstd,
    dx,
    partial,
    rows,
    d,
    run,
    grad_stride,
    stride,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of `run` rows (a multiple of ROWS); partial (programs, 2, d): their sums for weight and, with BIAS, bias."""
    DX: tl.constexpr = dx.dtype.element_ty
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < d
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    offset = tl.zeros((1, BLOCK), tl.float32)
    if BIAS:
        offset = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    pid = tl.program_id(0).to(tl.int64)
    for start in range(0, run, ROWS):
        row = pid * run + start + tl.arange(0, ROWS)[:, None]
        live = (row < rows) & inside
        g = tl.load(grad + row * grad_stride + column, mask=live, other=0.0).to(tl.float32)
        z = tl.load(x + row * stride + column, mask=live, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        z *= r
        if ACTIVATION == "relu":
            g = tl.where(z * gain + offset > 0, g, 0.0)
        if ACTIVATION == "silu":
            y = z * gain + offset
            s = 1.0 / (1.0 + tl.exp2(y * -1.4426950408889634))
            g *= s + y * s * (1.0 - s)
        dweight += g * z
        if BIAS:
            dbias += g
        g *= gain
        back = r * (g - z * (tl.sum(g * z, 1, keep_dims=True) / d))
        tl.store(dx + row * d + column, rounded(back, DX), mask=live)
    place = partial + pid * (2 if BIAS else 1) * d + column
    tl.store(place, tl.sum(dweight, 0, keep_dims=True), mask=inside)
    if BIAS:
        tl.store(place + d, tl.sum(dbias, 0, keep_dims=True), mask=inside)


def _block(d: int, tile: int, share: int, count: int | None = None) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and warps for it; fewer rows where `count` rows would not fill the card.

    Args:
        d: columns.
        tile: elements that the tile has where rows are short.
        share: elements of a warp.
        count: rows of all programs.
    """
    block = max(triton.next_power_of_2(d), 16)
    rows = max(tile // block, 1)
    while count is not None and rows > 1 and triton.cdiv(count, rows) < _PROGRAMS:
        rows //= 2
    return rows, block, min(max(rows * block // share, 1), 16)


def _rows(x: Tensor) -> Tensor:
    """(..., d) -> (rows, d): a view where one stride leads from row to row, else a copy."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor]:
    """The result, and 1 / rms of each row; without `statistics` the latter is empty."""
    flat, d = _rows(x), x.shape[-1]
    count = flat.shape[0]
    added = flat if residual is None else _rows(residual)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = new_empty(x, x.shape, dtype)
    rstd = new_empty(x, (count if statistics else 0,), torch.float32)
    rows, block, warps = _block(d, *_TILE, count)
    if out.numel():
        with torch.cuda.device_of(x):
            norm_rows[(triton.cdiv(count, rows),)](
                flat, weight, weight if bias is None else bias, added, out, rstd, count, d, flat.stride(0),
                added.stride(0), eps, BIAS=bias is not None, ACTIVATION=activation or "", RESIDUAL=residual is not None,
                STATISTICS=statistics, ROWS=rows, BLOCK=block, num_warps=warps, num_stages=1,
            )  # fmt: skip
    return out, rstd


def launch_back(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rstd: Tensor, activation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias (empty without one)."""
    flat, grad, d = _rows(x), _rows(grad), x.shape[-1]
    count = flat.shape[0]
    dx = new_empty(x, x.shape)
    rows, block, warps = _block(d, *_BACK_TILE, count)
    run = rows * max(1, min(triton.cdiv(count, rows * _PROGRAMS), triton.cdiv(64, rows)))
    programs = triton.cdiv(count, run)
    partial = new_empty(x, (programs, 2 if bias is not None else 1, d), torch.float32)
    if dx.numel():
        with torch.cuda.device_of(x):
            norm_rows_back[(programs,)](
                grad, flat, weight, weight if bias is None else bias, rstd, dx, partial, count, d, run, grad.stride(0),
                flat.stride(0), BIAS=bias is not None, ACTIVATION=activation or "", ROWS=rows, BLOCK=block,
                num_warps=warps, num_stages=1,
            )  # fmt: skip
    sums = partial.sum(0)
    return dx, fresh(sums[0], weight), new_empty(x, (0,)) if bias is None else fresh(sums[1], bias)


@torch.library.custom_op("sana::rms_norm", mutates_args=())
def rms_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor]:
    """`launch`, with statistics."""
    return launch(x, weight, bias, residual, eps, activation, statistics=True)


@rms_norm.register_fake
def _(x, weight, bias, residual, eps, activation):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("sana::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rstd: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`launch_back`."""
    return launch_back(grad, x, weight, bias, rstd, activation)


@rms_norm_backward.register_fake
def _(grad, x, weight, bias, rstd, activation):
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _save(ctx, inputs, output) -> None:
    x, weight, bias, residual, _, ctx.activation = inputs
    ctx.residual = None if residual is None else residual.dtype
    ctx.save_for_backward(x, weight, bias, output[1])


def _differentiate(ctx, grad, _):
    x, weight, bias, rstd = ctx.saved_tensors
    dx, dweight, dbias = rms_norm_backward(grad, x, weight, bias, rstd, ctx.activation)
    added = None if ctx.residual is None else grad.to(ctx.residual)
    return dx, dweight, None if bias is None else dbias, added, None, None


rms_norm.register_autograd(_differentiate, setup_context=_save)


def _cases() -> list[KernelCase]:
    """Widths of autoencoders, q/k norms and captions, in the types and alignments that they come in."""
    cases = []
    types = dict.fromkeys(("d", "stride", "residual_stride", "grad_stride", "run"), "i32:16")
    types |= {"rstd": "*fp32:16", "partial": "*fp32:16", "rows": "i32", "eps": "fp32"}
    for kind, by in (("bf16", ":16"), ("fp16", ":16"), ("fp32", ":16"), ("bf16", "")):
        types |= dict.fromkeys(("x", "weight", "bias", "residual", "out", "grad", "dx"), f"*{kind}{by}")
        for d, full in ((128, True), (1024, True), (2240, False)):
            more = {"RESIDUAL": full, "STATISTICS": True}
            for function, part, tile, flags in (
                (norm_rows, "", _TILE, more),
                (norm_rows_back, "-back", _BACK_TILE, {}),
            ):
                rows, block, warps = _block(d, *tile)
                signature = {name: types[name] for name in function.arg_names if name in types}
                flags = flags | {"BIAS": full, "ACTIVATION": "silu" if full else "", "ROWS": rows, "BLOCK": block}
                name = f"rms_norm{part}-{kind}-{d}{'' if by else '-odd'}"
                cases.append(KernelCase(name, function, signature, flags, warps, 1, 168))
    return cases


KERNELS = _cases()
