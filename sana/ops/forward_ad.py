"""What an op has to know of forward-mode derivatives, which pass through a custom op as silent zeros."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad


def taken() -> bool:
    """Whether a forward derivative is being taken, by torch.func.jvp or in a dual level."""
    return forward_ad._current_level >= 0


def unpack(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor] | None]:
    """Values and tangents; None where none of them has one, and zeros without memory where some have."""
    duals = [forward_ad.unpack_dual(x) for x in tensors]
    values = [dual.primal for dual in duals]
    if all(dual.tangent is None for dual in duals):
        return values, None
    return values, [
        value.new_zeros(()).expand(value.shape) if dual.tangent is None else dual.tangent
        for value, dual in zip(values, duals, strict=True)
    ]


def alone(*tensors: Tensor) -> bool:
    """Whether no other derivative is asked for: one forward level, none backward, and not under torch.compile.

    Then an op may compute with what `unpack` gave, and give back `forward_ad.make_dual` of the results.

    Args:
        tensors: values and tangents.
    """
    if torch.compiler.is_compiling() or eager_transforms.JVP_NESTING > 1:
        return False
    return not (torch.is_grad_enabled() and any(_recorded(x) for x in tensors))


def _recorded(x: Tensor) -> bool:
    """Whether autograd records this tensor, or one that transforms of torch.func wrapped in it."""
    while not x.requires_grad and is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x.requires_grad
