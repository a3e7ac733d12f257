"""What an op has to know of the call: whether somebody differentiates, traces or watches it, and what it may return."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def takes_forward_derivative() -> bool:
    """Whether forward-mode derivatives are being taken, which custom ops would answer with a silent zero.

    Also true under any other transform of torch.func, whose rules custom ops do not have.
    """
    return forward_ad._current_level >= 0 or (
        not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None
    )


def launches_directly(*tensors: Tensor | None) -> bool:
    """Whether kernels may be launched past the dispatcher: plain tensors, no gradient, nobody traces or watches.

    The dispatcher's way costs tens of microseconds on the CPU, as much as a kernel for one small image.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    grad = torch.is_grad_enabled()
    return all(x is None or (type(x) in _PLAIN and not (grad and x.requires_grad)) for x in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)


def fresh(x: Tensor, like: Tensor) -> Tensor:
    """The numbers of x in a new contiguous tensor of the shape and type of `like`: custom ops may not return views."""
    return x.reshape(like.shape).to(like.dtype, copy=True, memory_format=torch.contiguous_format)


def direct(*tensors: Tensor) -> bool:
    """As `launches_directly`; false inside torch.func transforms too."""
    return torch._C._functorch.peek_interpreter_stack() is None and launches_directly(*tensors)
