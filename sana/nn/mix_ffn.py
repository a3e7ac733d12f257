"""Mix-FFN: the gated feed-forward layer whose depthwise convolution gives SANA its sense of place."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sana.nn.linear import Linear
from sana.types import Context, Grid, State


class MixFFN(nn.Module):
    """1x1 expansion, SiLU, 3x3 depthwise convolution within each frame, gate, 1x1 projection (SANA, section 2.2).

    The 1x1 convolutions are linears over tokens. Tokens are already channels-last images, so the depthwise
    convolution sees them as a view; on CPUs it is some twenty times slower in the channels-first layout.

    Args:
        width: d.
        ratio: the hidden width is int(ratio * width), and twice that before the gate.
        linear: factory of the linear layers.
    """

    def __init__(self, width: int, ratio: float = 2.5, linear: Linear = nn.Linear):
        super().__init__()
        hidden = int(ratio * width)
        self.width, self.hidden = width, hidden
        self.inverted = linear(width, 2 * hidden)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.point = linear(hidden, width, bias=False)

    def init_state(self, x: Float[Tensor, "b n d"]) -> State:
        """None: frames do not mix here."""
        return None

    def step(self, x: Float[Tensor, "b n d"], ctx: Context, state: State) -> tuple[Float[Tensor, "b n d"], State]:
        """`forward`; the state stays None."""
        return self.forward(x, ctx), None

    def forward(self, x: Float[Tensor, "b n d"], ctx: Context) -> Float[Tensor, "b n d"]:
        h, w = ctx.grid.h, ctx.grid.w
        image = F.silu(self.inverted(x)).view(-1, h, w, 2 * self.hidden).permute(0, 3, 1, 2)
        value, gate = self.depthwise(image).permute(0, 2, 3, 1).view(*x.shape[:2], -1).chunk(2, dim=-1)
        return self.point(value * F.silu(gate))

    def flops(self, grid: Grid, text_tokens: int) -> int:
        """Floating-point operations of one sample's forward."""
        return grid.tokens * (6 * self.hidden * self.width + 36 * self.hidden)
