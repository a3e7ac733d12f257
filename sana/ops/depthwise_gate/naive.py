"""SiLU, 3x3 depthwise convolution and gate in plain torch: the middle of Mix-FFN (SANA, arXiv 2410.10629, sec. 2.2)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def depthwise_gate(
    u: Float[Tensor, "b n c2"], weight: Float[Tensor, "c2 1 3 3"], bias: Float[Tensor, " c2"], h: int, w: int
) -> Float[Tensor, "b n c"]:
    """value * silu(gate) with (value, gate) = conv(silu(u)) + bias, zeros around each h x w image; n = h w, c2 = 2 c.

    Tokens are channels-last images already, so the convolution sees them as a view; on CPUs it is some twenty times
    slower in the channels-first layout.
    """
    image = F.silu(u).view(-1, h, w, u.shape[-1]).permute(0, 3, 1, 2)
    mixed = F.conv2d(image, weight, bias, padding=1, groups=u.shape[-1])
    value, gate = mixed.permute(0, 2, 3, 1).view(u.shape).chunk(2, dim=-1)
    return value * F.silu(gate)
