"""ReLU linear self-attention as a mixer of tokens: over a whole image, or causal over the frames of a stream."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sana.nn.linear import Linear
from sana.nn.norm import RMSNorm
from sana.ops.linear_attention.naive import causal_relu_linear_attention
from sana.ops.linear_attention.op import relu_linear_attention, relu_linear_attention_packed
from sana.types import Context, Grid, State


class LinearAttention(nn.Module):
    """Bidirectional ReLU linear attention over all tokens (SANA; with q/k norm SANA-1.5, arXiv 2501.18427).

    Args:
        width: d, channels of the tokens; a multiple of head_dim.
        head_dim: channels per head.
        qk_norm: RMSNorm of q and of k over the full width, before heads are split and before the ReLU.
        eps: added to the denominator of the attention (published blocks 1e-8, diffusers 1e-15).
        norm_eps: eps of the q/k norms.
        linear: factory of the linear layers.

    Raises:
        ValueError: when width is no multiple of head_dim.
    """

    def __init__(
        self,
        width: int,
        head_dim: int = 32,
        qk_norm: bool = False,
        eps: float = 1e-15,
        norm_eps: float = 1e-5,
        linear: Linear = nn.Linear,
    ):
        super().__init__()
        if width % head_dim:
            raise ValueError(f"LinearAttention: width {width} is not a multiple of head_dim {head_dim}")
        self.width, self.head_dim, self.eps = width, head_dim, eps
        self.qkv = linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, norm_eps) if qk_norm else nn.Identity()
        self.proj = linear(width, width)

    def init_state(self, x: Float[Tensor, "b n d"]) -> State:
        """None: nothing precedes the only chunk that this mixer can see."""
        return None

    def step(self, x: Float[Tensor, "b n d"], ctx: Context, state: State) -> tuple[Float[Tensor, "b n d"], State]:
        """All tokens attend to all tokens. The returned state is the empty tuple: it marks that the stream has ended.

        Raises:
            ValueError: when a state is given, as earlier chunks can no longer see this one.
        """
        if state is not None:
            raise ValueError(
                f"{type(self).__name__} attends in both directions of time and cannot continue a stream; "
                "give all frames at once, or build the blocks with CausalLinearAttention"
            )
        if isinstance(self.q_norm, nn.Identity):  # queries, keys and values stay in one buffer, gradients as well
            heads = self.width // self.head_dim
            return self.proj(relu_linear_attention_packed(self.qkv(x), heads, self.eps)), ()
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self._qkv(x))
        return self.proj(relu_linear_attention(q, k, v, self.eps).flatten(2)), ()

    def forward(self, x: Float[Tensor, "b n d"], ctx: Context) -> Float[Tensor, "b n d"]:
        """`step` on a stream of one chunk."""
        return self.step(x, ctx, None)[0]

    def identity(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Attention whose weights are the identity: each token keeps its own value (perturbed-attention guidance)."""
        return self.proj(self._qkv(x)[2])

    def flops(self, grid: Grid, text_tokens: int) -> int:
        """Floating-point operations of one sample's forward: the two projections and the two sums of the attention."""
        n, d = grid.tokens, self.width
        return 8 * n * d * d + 4 * n * d * min(n, self.head_dim + 1)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.q_norm(q), self.k_norm(k), v


class CausalLinearAttention(LinearAttention):
    """ReLU linear attention in which a frame sees itself and every earlier frame, in constant memory per stream.

    Same parameters as `LinearAttention`, and the same function of a single frame.
    """

    def init_state(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b heads dh dh_1"]:
        """Zeros: the sums over no tokens, in fp32 (float64 for float64 tokens)."""
        heads, dtype = self.width // self.head_dim, torch.promote_types(x.dtype, torch.float32)
        return x.new_zeros(x.shape[0], heads, self.head_dim, self.head_dim + 1, dtype=dtype)

    def step(self, x: Float[Tensor, "b n d"], ctx: Context, state: State) -> tuple[Float[Tensor, "b n d"], State]:
        """Attend within the chunk's frames and to the frames summed in state (None before the first chunk)."""
        if state is None:
            state = self.init_state(x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).unflatten(1, (ctx.grid.f, -1)) for part in self._qkv(x))
        y, state = causal_relu_linear_attention(q, k, v, state, self.eps)
        return self.proj(y.flatten(3).flatten(1, 2)), state

    def flops(self, grid: Grid, text_tokens: int) -> int:
        n, d = grid.tokens, self.width
        return 8 * n * d * d + 4 * n * d * (self.head_dim + 1)
