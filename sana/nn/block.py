"""One layer of a network: mix tokens, look at the caption, transform each token; and what its parts must offer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sana.nn.linear import Linear
from sana.ops.adaln.op import gated_residual, modulated_layer_norm, residual_modulated_layer_norm
from sana.types import Context, Grid, State


class Mixer(Protocol):
    """Self-attention or anything else that moves information between tokens."""

    def init_state(self, x: Tensor) -> State:
        """The state before the first chunk, for a batch like x."""
        ...

    def step(self, x: Tensor, ctx: Context, state: State) -> tuple[Tensor, State]:
        """(b, n, d) -> (b, n, d) and the state after this chunk; state None before the first."""
        ...

    def identity(self, x: Tensor) -> Tensor:
        """The same layer with identity attention."""
        ...

    def flops(self, grid: Grid, text_tokens: int) -> int:
        """Operations of one sample's forward."""
        ...


class Cross(Protocol):
    """Attention to the caption."""

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(b, l, d) -> keys and values, (b, l, d) each."""
        ...

    def __call__(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(b, n, d) -> (b, n, d)."""
        ...

    def flops(self, grid: Grid, text_tokens: int) -> int:
        """Operations of one sample's forward."""
        ...


class FeedForward(Protocol):
    """Transform of each token, perhaps with its neighbours."""

    def init_state(self, x: Tensor) -> State:
        """The state before the first chunk, for a batch like x."""
        ...

    def step(self, x: Tensor, ctx: Context, state: State) -> tuple[Tensor, State]:
        """(b, n, d) -> (b, n, d) and the state after this chunk; state None before the first."""
        ...

    def flops(self, grid: Grid, text_tokens: int) -> int:
        """Operations of one sample's forward."""
        ...


class Block(nn.Module):
    """x += g1 mixer(mod(LN x)); x += cross(x, text); x += g2 ffn(mod(LN x)), modulated per frame (adaLN-single).

    Args:
        width: d.
        mixer: factory of a `Mixer`, called with width.
        cross: factory of a `Cross`, called with width.
        ffn: factory of a `FeedForward`, called with width.
        linear: factory of the linear layers of all three; None: each part's own.
    """

    def __init__(
        self,
        width: int,
        mixer: Callable[..., Mixer],
        cross: Callable[..., Cross],
        ffn: Callable[..., FeedForward],
        linear: Linear | None = None,
    ):
        super().__init__()
        injected = {} if linear is None else {"linear": linear}
        self.table = nn.Parameter(torch.empty(6, width))
        self.mixer = mixer(width, **injected)
        self.cross = cross(width, **injected)
        self.ffn = ffn(width, **injected)

    def prepare(self, text: Float[Tensor, "b l d"]) -> Float[Tensor, "b l 2*d"]:
        """The caption's fused keys and values in this layer, for `forward`'s text_kv."""
        return torch.cat(self.cross.keys_values(text), dim=-1)

    def modulate(self, modulation: Float[Tensor, "*b 6 d"]) -> Float[Tensor, "*b 6 d"]:
        """This block's adaLN vectors: shift, scale, gate of the mixer, then of the FFN."""
        return self.table + modulation

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        ctx: Context,
        text: Float[Tensor, "b l d"] | None = None,
        text_kv: Float[Tensor, "b l 2*d"] | None = None,
        state: State = None,
        vectors: Float[Tensor, "b f 6 d"] | None = None,
        identity: bool = False,
        residual: Float[Tensor, "b n d"] | None = None,
    ) -> tuple[Float[Tensor, "b n d"], State]:
        """One layer over one chunk. It is not told which one: so one compiled graph serves all blocks of a network.

        Args:
            x: tokens.
            ctx: shared by all layers of this pass.
            text: embedded caption; its keys and values are computed here, so that activation checkpointing drops them.
            text_kv: or these, from `prepare`.
            state: what this block returned for the preceding chunk; None for the first.
            vectors: this block's adaLN vectors where they are known; None: its table is added to ctx.modulation.
            identity: self-attention returns its values (`Edits.identity_attention`).
            residual: added to the tokens after this layer (`Edits.residual`).

        Returns:
            Tokens, and (state of the mixer, state of the FFN).
        """
        mixer_state, ffn_state = (None, None) if state is None else state
        if vectors is None:
            if ctx.modulation is None:
                raise ValueError("Block: the context has no modulation, and no vectors are given")
            vectors = self.table + ctx.modulation  # not by modulate, at whose end FSDP2 gives the parameters back
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors.unbind(2)

        y = modulated_layer_norm(x, shift1, scale1)
        if identity:
            y = self.mixer.identity(y)
        else:
            y, mixer_state = self.mixer.step(y, ctx, mixer_state)
        x = gated_residual(x, gate1, y)

        if text_kv is not None:
            k, v = text_kv.chunk(2, dim=-1)
        elif text is not None:
            k, v = self.cross.keys_values(text)
        else:
            raise ValueError("Block: neither text nor text_kv is given")
        x, y = residual_modulated_layer_norm(x, self.cross(x, k, v, ctx.mask), shift2, scale2)

        y, ffn_state = self.ffn.step(y, ctx, ffn_state)
        x = gated_residual(x, gate2, y)
        if residual is not None:
            x = x + residual
        return x, (mixer_state, ffn_state)

    def flops(self, grid: Grid, text_tokens: int) -> int:
        """Floating-point operations of one sample's forward."""
        return sum(part.flops(grid, text_tokens) for part in (self.mixer, self.cross, self.ffn))
