"""Mix-FFN: the gated feed-forward layer whose depthwise convolution gives SANA its sense of place."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from sana.nn.linear import Linear
from sana.ops.depthwise_gate.op import depthwise_gate
from sana.types import Context, Grid, State


class DepthwiseGate(nn.Conv2d):
    """SiLU, 3x3 depthwise convolution and gate as one module, with the parameters of that convolution.

    Args:
        hidden: c, channels of the result; the convolution has twice as many.
    """

    def __init__(self, hidden: int):
        super().__init__(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)

    def forward(self, u: Float[Tensor, "b n c2"], h: int, w: int) -> Float[Tensor, "b n c"]:
        """From images of n = h w tokens."""
        assert self.bias is not None
        return depthwise_gate(u, self.weight, self.bias, h, w)


class MixFFN(nn.Module):
    """1x1 expansion, SiLU, 3x3 depthwise convolution within each frame, gate, 1x1 projection (SANA, section 2.2).

    The 1x1 convolutions are linears over tokens; what lies between them is one op, `depthwise_gate`.

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
        self.depthwise = DepthwiseGate(hidden)
        self.point = linear(hidden, width, bias=False)

    def init_state(self, x: Float[Tensor, "b n d"]) -> State:
        """None: frames do not mix here."""
        return None

    def step(self, x: Float[Tensor, "b n d"], ctx: Context, state: State) -> tuple[Float[Tensor, "b n d"], State]:
        """`forward`; the state stays None."""
        return self.forward(x, ctx), None

    def forward(self, x: Float[Tensor, "b n d"], ctx: Context) -> Float[Tensor, "b n d"]:
        h, w = ctx.grid.h, ctx.grid.w
        u = self.inverted(x).view(-1, h * w, 2 * self.hidden)
        return self.point(self.depthwise(u, h, w).view(*x.shape[:2], self.hidden))

    def flops(self, grid: Grid, text_tokens: int) -> int:
        """Floating-point operations of one sample's forward."""
        return grid.tokens * (6 * self.hidden * self.width + 36 * self.hidden)
