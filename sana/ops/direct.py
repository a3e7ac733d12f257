"""When an op may call its kernel without PyTorch's dispatcher, which costs more than the small kernels take."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack


def direct(*tensors: Tensor) -> bool:
    """Whether only the numbers of these tensors matter: nobody traces, differentiates or watches.

    False under torch.compile, for subclasses of Tensor, inside torch.func transforms and dispatch modes, and where
    autograd records; then an op has to go through the dispatcher. Tangents of forward AD are not looked for.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or peek_interpreter_stack() is not None:
        return False
    records = torch.is_grad_enabled()
    return not any(type(x) not in (Tensor, nn.Parameter) or (records and x.requires_grad) for x in tensors)
