"""RMSNorm with fp32 statistics."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sana.ops.rms_norm.op import rms_norm


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32, returned in the type of x.

    Args:
        width: size of the last dimension.
        eps: added to the mean square.
        initial: the value every weight starts from (SANA scales the caption by 0.01).
    """

    def __init__(self, width: int, eps: float = 1e-5, initial: float = 1.0):
        super().__init__()
        self.eps = eps
        self.initial = initial
        self.weight = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
