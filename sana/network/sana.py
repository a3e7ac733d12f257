"""SANA's trunk: a velocity field over latents, made of linear-attention blocks (arXiv 2410.10629, 2501.18427)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sana.nn.block import Block
from sana.nn.cross_attention import needed_mask, shared_bias
from sana.nn.embed import FinalLayer, GuidanceEmbedding, Modulation, PatchEmbed, TextEmbedding, TimeEmbedding
from sana.nn.initialise import initialise
from sana.nn.linear import Linear
from sana.types import Condition, Context, Edits, Grid, Prepared, State, Times

NO_EDITS = Edits()
# What is dear to compute again: matrix products and convolutions.
PRODUCTS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu",
                 "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention")
)  # fmt: skip


def keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Selective activation checkpointing: keep results of `PRODUCTS`, compute everything else again."""
    return CheckpointPolicy.MUST_SAVE if op in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


class Sana(nn.Module):
    """v = network(x, t, cond), with t per frame; images have one frame.

    Args:
        in_channels: c of the latent, of input and output.
        width: d.
        depth: number of blocks.
        text_channels: channels of the caption features.
        blocks: factories of `Block`, called with width; cycled over the depth, so a list of four puts its last in
            every fourth layer.
        patch: latent pixels per token side.
        text_norm: initial weight of the caption's RMSNorm; None: no norm.
        time_scale: the network sees t * time_scale. SANA 1000; Sprint 1, which keeps d/dt small.
        floor_time: round t * time_scale down to an integer, as published SANA did in training and sampling.
        guidance_embed: embed the guidance scale too (Sprint); then every condition must carry one.
        position: factory of a table added to the tokens, called with width, such as `SinCos2d`; None: no table, place
            comes from the zero padding of Mix-FFN.
        checkpoint_every: recompute the activations of every n-th block in the backward pass; 0: of none.
        checkpoint_keep: what such a block keeps: "input", the least memory for a third more work; or "products", the
            results of matrix products too, so that only cheap operations are done again.
        linear: factory of every linear layer; None: nn.Linear in the trunk, in the blocks what they name.

    Raises:
        ValueError: on settings or inputs that do not fit together.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        depth: int,
        text_channels: int,
        blocks: Sequence[Callable[..., Block]],
        patch: int = 1,
        text_norm: float | None = 0.01,
        time_scale: float = 1000.0,
        floor_time: bool = False,
        guidance_embed: bool = False,
        position: Callable[..., nn.Module] | None = None,
        checkpoint_every: int = 0,
        checkpoint_keep: Literal["input", "products"] = "input",
        linear: Linear | None = None,
    ):
        super().__init__()
        if depth < 1 or not blocks:
            raise ValueError(f"Sana: depth {depth} with {len(blocks)} block factories; give at least one of each")
        if checkpoint_every < 0:
            raise ValueError(f"Sana: checkpoint_every must be 0 (never) or positive, not {checkpoint_every}")
        if checkpoint_keep not in ("input", "products"):
            raise ValueError(f"Sana: checkpoint_keep must be 'input' or 'products', not {checkpoint_keep!r}")
        if floor_time and time_scale <= 1:
            raise ValueError(f"Sana: floor_time with time_scale {time_scale} would leave no time; it needs 1000")
        own = linear or nn.Linear
        injected = {} if linear is None else {"linear": linear}
        self.in_channels, self.width, self.text_channels, self.patch = (
            in_channels,
            width,
            text_channels,
            patch,
        )
        self.time_scale, self.floor_time = time_scale, floor_time
        self.checkpoint_every, self.checkpoint_keep = checkpoint_every, checkpoint_keep

        self.patch_embed = PatchEmbed(in_channels, width, patch, linear=own)
        self.position = None if position is None else position(width)
        self.time_embed = TimeEmbedding(width, linear=own)
        self.guidance_embed = GuidanceEmbedding(width, linear=own) if guidance_embed else None
        self.modulation = Modulation(width, linear=own)
        self.text_embed = TextEmbedding(text_channels, width, text_norm, linear=own)
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            blocks[i % len(blocks)](width, **injected) for i in range(depth)
        )
        self.final = FinalLayer(width, in_channels, patch, linear=own)
        initialise(self)

    def prepare(self, cond: Condition, times: Float[Tensor, " s"] | None = None) -> Prepared:
        """What the blocks need of the caption, computed once per prompt and reused over all steps.

        Args:
            cond: the caption.
            times: those of all steps, where they are known: then what the blocks need of them is computed here too,
                and `forward` takes the result at these times only.
        """
        text = self._embed_text(cond)
        known = None if times is None else self.prepare_times(times, cond.guidance)
        mask = needed_mask(cond.mask)
        return Prepared(tuple(block.prepare(text) for block in self.blocks), mask, cond.guidance, known)

    def prepare_times(self, times: Float[Tensor, " s"], guidance: Float[Tensor, " b"] | None = None) -> Times:
        """What the blocks need of the times of all steps, as `Prepared.times`; guidance as in `Condition`."""
        dtype, device = self.final.table.dtype, self.final.table.device
        t = times.to(torch.promote_types(dtype, torch.float32)).to(device)  # grids are float64, which MPS lacks
        embedding = self._embed_time(t.expand(1 if guidance is None else guidance.shape[0], -1), guidance, dtype)
        modulation = self.modulation(embedding)
        return Times(t, embedding, torch.stack([block.modulate(modulation) for block in self.blocks], dim=2))

    def forward(
        self,
        x: Float[Tensor, "b c f h w"],
        t: Float[Tensor, "b f"],
        cond: Condition | Prepared,
        edits: Edits = NO_EDITS,
    ) -> Float[Tensor, "b c f h w"]:
        """Velocity of the latents x at the times t, in the type of x.

        Args:
            x: noisy latents; h and w multiples of patch.
            t: in [0, 1] per frame, 0 data, 1 noise; keep it in fp32.
            cond: a `Condition`, or what `prepare` made of it.
            edits: interventions on single layers.
        """
        return self.stream(x, t, cond, None, edits)[0]

    def stream(
        self,
        x: Float[Tensor, "b c f h w"],
        t: Float[Tensor, "b f"],
        cond: Condition | Prepared,
        state: State,
        edits: Edits = NO_EDITS,
    ) -> tuple[Float[Tensor, "b c f h w"], State]:
        """`forward` of one chunk of frames that follows those summed in state (None: it is the first chunk).

        Returns the chunk's velocity and the state for the next chunk; the state given is left as it was, so a chunk
        may be denoised in many steps from one state. Raises ValueError if a block cannot continue a stream.
        """
        tokens, time, ctx = self._enter(x, t, cond, edits)
        text, states = cond if isinstance(cond, Prepared) else self._embed_text(cond), []
        for i in range(len(self.blocks)):
            tokens, block_state = self._layer(i, tokens, ctx, text, state)
            states.append(block_state)
        return self.final(tokens, time, ctx.grid).to(x.dtype), tuple(states)

    def features(
        self,
        x: Float[Tensor, "b c f h w"],
        t: Float[Tensor, "b f"],
        cond: Condition | Prepared,
        layers: Collection[int],
    ) -> dict[int, Float[Tensor, "b n d"]]:
        """Tokens after each of the blocks `layers` (counted from 0); blocks after the last of them are not run."""
        if not layers:
            raise ValueError("features: no layers asked for")
        self._check_layers(layers, "features")
        tokens, _, ctx = self._enter(x, t, cond, NO_EDITS)
        text, found = cond if isinstance(cond, Prepared) else self._embed_text(cond), {}
        for i in range(max(layers) + 1):
            tokens, _ = self._layer(i, tokens, ctx, text, None)
            if i in layers:
                found[i] = tokens
        return found

    def flops(self, grid: Grid, text_tokens: int) -> int:
        """Floating-point operations of one sample's forward (a multiply-add counts two), backward excluded.

        Matrix products and convolutions, as FlopCounterMode counts them; training costs three times as much.
        """
        n, width = grid.tokens, self.width
        embeds = 1 if self.guidance_embed is None else 2
        edges = 4 * n * self.in_channels * self.patch**2 * width
        time = 2 * grid.f * (embeds * (self.time_embed.frequencies * width + width**2) + 6 * width**2)
        text = 2 * text_tokens * (self.text_channels * width + width**2)
        return edges + time + text + sum(block.flops(grid, text_tokens) for block in self.blocks)

    def _enter(
        self, x: Tensor, t: Tensor, cond: Condition | Prepared, edits: Edits
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b f d"], Context]:
        """Tokens, time embedding and what the blocks share."""
        b, c, f, h, w = x.shape
        p = self.patch
        if c != self.in_channels or h % p or w % p:
            raise ValueError(
                f"Sana: x (b, c, f, h, w) is {tuple(x.shape)}; it takes c = {self.in_channels}, h, w divisible by {p}"
            )
        if t.shape != (b, f):
            raise ValueError(f"Sana: t is {tuple(t.shape)}; it needs one time per sample and frame, {(b, f)}")
        self._check_layers(edits.identity_attention, "edits.identity_attention")
        self._check_layers(edits.residual, "edits.residual")

        dtype = self.final.table.dtype
        grid = Grid(f, h // p, w // p)
        tokens = self.patch_embed(x.to(dtype))
        if self.position is not None:
            place = self.position(grid, x.device, tokens.dtype)
            tokens = (tokens.unflatten(1, (f, -1)) + place).flatten(1, 2)
        mask = shared_bias(cond.mask, dtype)
        if isinstance(cond, Prepared) and cond.times is not None:
            time, vectors = self._known_times(t, cond.times)
            return tokens, time, Context(grid, None, mask, edits, vectors)
        time = self._embed_time(t, cond.guidance, dtype)
        return tokens, time, Context(grid, self.modulation(time), mask, edits)

    def _known_times(self, t: Tensor, known: Times) -> tuple[Float[Tensor, "b f d"], Float[Tensor, "b f layers 6 d"]]:
        """Rows of what `prepare_times` made; found without waiting for the device."""
        hit = known.t.to(t.dtype) == t.unsqueeze(-1)
        found, step = hit.view(torch.uint8).max(-1)
        if t.device.type in ("cpu", "cuda", "meta"):  # elsewhere torch may lack this operator
            torch._assert_async(found.all(), "Sana: a time is not among those that `prepare` was given")
        sample = torch.arange(t.shape[0], device=t.device).unsqueeze(1) if known.embedding.shape[0] > 1 else 0
        return known.embedding[sample, step], known.vectors[sample, step]

    def _embed_time(self, t: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Float[Tensor, "b f d"]:
        time = t.to(torch.promote_types(t.dtype, torch.float32)) * self.time_scale
        if self.floor_time:
            time = (time + 2**-10).floor()  # so that fp32's 0.019 * 1000 is 19, not 18.999998
        embedded = self.time_embed(time, dtype)
        if self.guidance_embed is not None:
            if guidance is None:
                raise ValueError(
                    "Sana: guidance_embed is on, but the condition has no guidance; give Condition.guidance (b,)"
                )
            return embedded + self.guidance_embed(guidance, dtype).unsqueeze(1)
        if guidance is not None:
            raise ValueError("Sana: the condition has a guidance, but the network was built with guidance_embed=False")
        return embedded

    def _embed_text(self, cond: Condition) -> Float[Tensor, "b l d"]:
        if cond.text.shape[-1] != self.text_channels:
            raise ValueError(
                f"Sana: caption features have {cond.text.shape[-1]} channels; the network takes {self.text_channels}"
            )
        return self.text_embed(cond.text.to(self.final.table.dtype))

    def _layer(
        self, i: int, tokens: Tensor, ctx: Context, text: Tensor | Prepared, state: State
    ) -> tuple[Float[Tensor, "b n d"], State]:
        """Tokens and state after block i."""
        raw, kv = (None, text.text_kv[i]) if isinstance(text, Prepared) else (text, None)
        vectors = None if ctx.vectors is None else ctx.vectors[:, :, i]
        edits = (i in ctx.edits.identity_attention, ctx.edits.residual.get(i))
        arguments = (tokens, ctx, raw, kv, None if state is None else state[i], vectors, *edits)
        if self.checkpoint_every and i % self.checkpoint_every == 0 and torch.is_grad_enabled():
            more: dict[str, Any] = {}
            if self.checkpoint_keep == "products":
                more["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products)
            return checkpoint(self.blocks[i], *arguments, use_reentrant=False, **more)
        return self.blocks[i](*arguments)

    def _check_layers(self, layers: Collection[int], what: str) -> None:
        wrong = sorted(i for i in layers if not 0 <= i < len(self.blocks))
        if wrong:
            raise ValueError(f"Sana: {what} names layers {wrong}; the network has layers 0 to {len(self.blocks) - 1}")
