"""Launches of the kernels of ReLU linear attention, and what torch.compile and autograd see of them."""

from __future__ import annotations

import torch
from torch import Tensor

from sana.ops import buffer
from sana.ops.linear_attention import kernels
from sana.ops.linear_attention.cases import KERNELS as KERNELS
from sana.ops.linear_attention.naive import unpack
from sana.ops.linear_attention.plan import plan


def _state(like: Tensor, *sizes: int) -> Tensor:
    """States of (*sizes) heads, see `kernels`."""
    dh = like.shape[-1]
    return buffer.new_empty(like, (*sizes, dh + 1, dh), torch.float32)


def launch(q: Tensor, k: Tensor, v: Tensor, eps: float, save: bool) -> tuple[Tensor, Tensor | None]:
    """The answers (b, n, heads, dh) and, where asked to save, the state (b, heads, dh + 1, dh) for the backward."""
    b, n, heads, dh = q.shape
    shape = plan("forward", b, n, heads, dh, q.dtype)
    y = buffer.new_empty(v, v.shape)
    state = _state(v, b, heads) if save else None
    partial = _state(v, shape.splits, b, heads) if shape.splits > 1 else y
    with torch.cuda.device_of(q):
        for stage in shape.stages:
            kernels.forward[(b * heads, shape.splits)](
                q, k, v, y, y if state is None else state, partial, n, heads, shape.per_split, eps,
                *q.stride(), *k.stride(), *v.stride(), STAGE=stage, SAVE=save, **shape.options(dh),
            )  # fmt: skip
    return y, state


def launch_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, eps: float, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Write the gradients of q, k and v, whose strides by sample and token are the same."""
    b, n, heads, dh = q.shape
    shape = plan("backward", b, n, heads, dh, q.dtype)
    partial = _state(v, shape.splits, b, heads) if shape.splits > 1 else state
    strides = [stride for x in (q, k, v, g) for stride in x.stride()]
    with torch.cuda.device_of(q):
        for stage in shape.stages:
            kernels.backward[(b * heads, shape.splits)](
                q, k, v, g, *grads, state, partial, n, heads, shape.per_split, eps,
                *strides, *grads[0].stride()[:2], STAGE=stage, **shape.options(dh),
            )  # fmt: skip


def launch_jvp(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The answers and their derivative in the direction (dq, dk, dv), (b, n, heads, dh) each."""
    b, n, heads, dh = q.shape
    shape = plan("derivative", b, n, heads, dh, q.dtype)
    y, dy = buffer.new_empty(v, v.shape), buffer.new_empty(v, v.shape)
    partial = _state(v, shape.splits, b, heads, 2) if shape.splits > 1 else y
    strides = [stride for x in (q, k, v, dq, dk, dv) for stride in x.stride()]
    with torch.cuda.device_of(q):
        for stage in shape.stages:
            kernels.derivative[(b * heads, shape.splits)](
                q, k, v, dq, dk, dv, y, dy, partial, n, heads, shape.per_split, eps, *strides,
                STAGE=stage, **shape.options(dh),
            )  # fmt: skip
    return y, dy


@torch.library.custom_op("sana::relu_linear_attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Answers and state of `launch`, for q, k and v of one type."""
    y, state = launch(q, k, v, eps, save=True)
    assert state is not None
    return y, state


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    b, _, heads, dh = q.shape
    return v.new_empty(v.shape), v.new_empty((b, heads, dh + 1, dh), dtype=torch.float32)


@torch.library.custom_op("sana::relu_linear_attention_backward", mutates_args=())
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    dq, dk, dv = (buffer.new_empty(x, x.shape) for x in (q, k, v))
    launch_backward(q, k, v, g, state, eps, (dq, dk, dv))
    return dq, dk, dv


@attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, g: Tensor | None, _) -> tuple:
    if g is None:
        return None, None, None, None
    q, k, v, state = ctx.saved_tensors
    return *attention_backward(q, k, v, g, state, ctx.eps), None


attention.register_autograd(_gradients, setup_context=_remember)


@torch.library.custom_op("sana::relu_linear_attention_packed", mutates_args=())
def packed(qkv: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    """`attention` of the three thirds of (b, n, 3 d); the answers are (b, n, d)."""
    y, state = launch(*unpack(qkv, heads), eps, save=True)
    assert state is not None
    return y.flatten(2), state


@packed.register_fake
def _(qkv: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    (b, n, width), dh = qkv.shape, qkv.shape[2] // 3 // heads
    return qkv.new_empty((b, n, width // 3)), qkv.new_empty((b, heads, dh + 1, dh), dtype=torch.float32)


@torch.library.custom_op("sana::relu_linear_attention_packed_backward", mutates_args=())
def packed_backward(qkv: Tensor, g: Tensor, state: Tensor, heads: int, eps: float) -> Tensor:
    """The gradient of qkv, contiguous: its thirds are written where they belong."""
    grad = buffer.new_empty(qkv, qkv.shape)
    slope = g.unflatten(2, (heads, -1))
    launch_backward(*unpack(qkv, heads), slope, state, eps, unpack(grad, heads))
    return grad


@packed_backward.register_fake
def _(qkv: Tensor, g: Tensor, state: Tensor, heads: int, eps: float) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _remember_packed(ctx, inputs, output) -> None:
    qkv, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(qkv, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients_packed(ctx, g: Tensor | None, _) -> tuple:
    if g is None:
        return None, None, None
    qkv, state = ctx.saved_tensors
    return packed_backward(qkv, g, state, ctx.heads, ctx.eps), None, None


packed.register_autograd(_gradients_packed, setup_context=_remember_packed)


@torch.library.custom_op("sana::relu_linear_attention_jvp", mutates_args=())
def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`launch_jvp`; no derivative of it is known."""
    return launch_jvp(q, k, v, dq, dk, dv, eps)


@attention_jvp.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), v.new_empty(v.shape)
