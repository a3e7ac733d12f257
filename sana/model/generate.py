"""From prompts and seeds to pixels: the parts of a trained model joined for sampling."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sana.model.offload import Offload
from sana.nn.cross_attention import needed_mask
from sana.ops.random import normal
from sana.ops.resize import resize_and_crop
from sana.sampler.guided import OnStep, Sampler
from sana.types import Condition, Edits, Prepared

NOISE_SEED = 0  # sampling noise is keyed by each image's own seed; this is the other half of the generator's key
REMEMBERED = 1024  # prompts whose features a painter keeps

PAG_LAYER = {20: 8, 28: 14}
"""Depth -> layer that the published configurations perturb: 1.6B, and 0.6B (where it is the default of them all)."""


class Painter:
    """Draws images with a network, an autoencoder and a text encoder.

    Args:
        network: velocity field with `prepare` and forward(x (b, c, 1, h, w), t (b, 1), prepared, edits).
        autoencoder: decode(latents (b, c, h, w)) -> images (b, 3, H, W) in [-1, 1]; `ratio` and `channels`.
        text_encoder: `rows` and `padded` of `sana.encoder.text.gemma.GemmaEncoder`.
        null_like: Condition of prompts -> Condition of nothing, for guidance; the same features for every prompt.
        offload: brings each part to its device while it is used; None: all parts are where they work.
        autocast_decoder: whether a surrounding autocast also holds for the autoencoder.

    Attributes:
        rows: called instead of the text encoder's `rows`, such as those of `sana.model.text_graphs.TextGraphs`; None:
            those.
        prompts: called for keys and values of captions, such as `sana.model.graphs.PromptGraphs`; None: the network.
        velocity: called instead of the network, such as `sana.model.graphs.NetworkGraphs`; None: the network.
        pixels: called instead of the autoencoder's `decode`; None: that.
    """

    def __init__(
        self,
        network: Any,
        autoencoder: Any,
        text_encoder: Any,
        null_like: Callable[[Condition], Condition],
        offload: Offload | None = None,
        autocast_decoder: bool = True,
    ) -> None:
        self.network, self.autoencoder, self.text_encoder = network, autoencoder, text_encoder
        self.null_like, self.offload, self.autocast_decoder = null_like, offload, autocast_decoder
        self.rows: Callable[..., list[Tensor]] | None = None
        self.prompts: Callable[[Tensor], tuple[Tensor, ...]] | None = None
        self.velocity: Callable[..., Tensor] | None = None
        self.pixels: Callable[[Tensor], Tensor] | None = None
        self._rows: OrderedDict[str, Tensor] = OrderedDict()
        self._padded: dict[str, Condition] = {}

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return next(self.network.parameters()).device if self.offload is None else self.offload.device

    @property
    def multiple(self) -> int:
        """Pixels per side of a token: sizes are multiples of it."""
        return self.autoencoder.ratio * getattr(self.network, "patch", 1)

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampler: Sampler,
        height: int,
        width: int,
        *,
        batch: int = 64,
        negative: str = "",
        negative_mask: Literal["own", "caption"] | None = None,
        crop: tuple[int, int] | None = None,
        on_step: OnStep | None = None,
    ) -> np.ndarray:
        """Images (n, height, width, 3) uint8, one per prompt and seed.

        The noise of an image depends on its seed alone and the features of a prompt on the prompt alone, so image k is
        the same whatever else is drawn with it, up to the rounding of batched matrix products.

        Args:
            prompts, seeds: of equal length n.
            sampler: solver, grid and guidance.
            height, width: pixels, multiples of the autoencoder's ratio.
            batch: images per network call (twice that many with guidance).
            negative: prompt to steer away from; "" is the null embedding.
            negative_mask: which rows of the negative prompt count: its "own" tokens (diffusers), or as many as the
                "caption" has, be they padding (published training and scripts). None: "own" for a prompt, and what
                `null_like` gives for "".
            crop: (height, width) that the decoded images are resized to cover and cropped to; None: as drawn.
            on_step: called at every step of every batch.

        Raises:
            ValueError: lengths differ, or a side is not a multiple of the ratio.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        parts = []
        for i in range(0, len(prompts), batch):
            one = slice(i, i + batch)
            latents = self.latents(
                prompts[one],
                seeds[one],
                sampler,
                height,
                width,
                negative=negative,
                negative_mask=negative_mask,
                on_step=on_step,
            )
            parts.append(self.decode(latents, crop))
        return np.concatenate(parts) if parts else np.zeros((0, *(crop or (height, width)), 3), np.uint8)

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampler: Sampler,
        height: int,
        width: int,
        *,
        negative: str = "",
        negative_mask: Literal["own", "caption"] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Scaled latents (n, c, 1, h, w), float32, of one batch; arguments and errors as in `draw`."""
        ratio = self.autoencoder.ratio
        if height % ratio or width % ratio:
            raise ValueError(f"{height}x{width} pixels are not multiples of the autoencoder's {ratio}")
        unique = list(dict.fromkeys(prompts))
        places = {prompt: i for i, prompt in enumerate(unique)}
        which = torch.tensor([places[prompt] for prompt in prompts])
        self.remember(unique)
        condition = self._condition(unique)
        null = self._null(condition, negative, negative_mask) if self._pairs(sampler) else None
        with self._using(self.network), _times(self.network, sampler.floor):
            return self._sample(condition, null, which, seeds, sampler, (height // ratio, width // ratio), on_step)

    @torch.no_grad()
    def decode(self, latents: Tensor, crop: tuple[int, int] | None = None) -> np.ndarray:
        """Latents (n, c, 1, h, w) -> images (n, H, W, 3) uint8; `crop` as in `draw`."""
        dtype = next((p.dtype for p in self.autoencoder.parameters()), latents.dtype)
        context = nullcontext() if self.autocast_decoder else torch.autocast(latents.device.type, enabled=False)
        with self._using(self.autoencoder), context:
            pixels = (self.pixels or self.autoencoder.decode)(latents.squeeze(2).to(dtype)).float()
        return to_pixels(pixels if crop is None else resize_and_crop(pixels, *crop))

    @torch.no_grad()
    def remember(self, prompts: Sequence[str]) -> None:
        """Compute the features of prompts that are not known yet, so that one visit of the text encoder serves many
        batches; those of the last `REMEMBERED` prompts are kept."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._rows]
        if missing:
            with self._using(self.text_encoder):
                rows = (self.rows or self.text_encoder.rows)(missing)
            if self.offload is not None:  # the device has better use for its memory
                rows = [row.cpu() for row in rows]
            self._rows.update(zip(missing, rows, strict=True))
        for prompt in prompts:
            self._rows.move_to_end(prompt)
        while len(self._rows) > max(REMEMBERED, len(set(prompts))):
            self._rows.popitem(last=False)

    def _condition(self, prompts: list[str]) -> Condition:
        """Features of distinct prompts, cut to the longest of them."""
        rows = [self._rows[prompt] for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        text = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return Condition(text.to(self.device), mask.to(self.device))

    def _null(self, condition: Condition, negative: str, mode: Literal["own", "caption"] | None) -> Condition:
        """What to steer away from: text (1, l, c) for all prompts, and a mask for each."""
        assert condition.mask is not None
        if not negative and mode is None:
            with self._using(self.text_encoder):
                null = self.null_like(condition)
            return Condition(null.text[:1], null.mask)
        if negative not in self._padded:
            with self._using(self.text_encoder):
                self._padded = {negative: self.text_encoder.padded(negative)}
        other = self._padded[negative]
        assert other.mask is not None
        text, mask = other.text.to(self.device), other.mask.to(self.device)
        if mode == "caption":
            return Condition(text[:, : condition.text.shape[1]], condition.mask)
        length = int(mask.sum())
        return Condition(text[:, :length], mask[:, :length].expand(len(condition.mask), -1))

    def _pairs(self, sampler: Sampler) -> bool:
        return sampler.guided and not self._embeds_guidance

    @property
    def _embeds_guidance(self) -> bool:
        """Such a network takes the scale as an input instead of a second evaluation."""
        return getattr(self.network, "guidance_embed", None) is not None

    def _sample(
        self,
        condition: Condition,
        null: Condition | None,
        which: Tensor,
        seeds: Sequence[int],
        sampler: Sampler,
        grid: tuple[int, int],
        on_step: OnStep | None,
    ) -> Tensor:
        """Integrate; condition holds distinct prompts, `which` says whose image each is."""
        which, guidance = which.to(self.device), None
        if self._embeds_guidance:
            guidance = torch.full((len(which),), sampler.guidance, device=self.device)
            sampler = replace(sampler, guidance=1.0)
        text, masks = [condition.text], [condition.mask]
        if null is not None:
            text.append(null.text)
            masks.append(null.mask)
        length = max(part.shape[1] for part in text)
        every = torch.cat([_pad(part, length) for part in text])
        # Keys and values once per distinct prompt; for nothing, which all images share, once in all.
        kv = self.network.prepare(Condition(every)).text_kv if self.prompts is None else self.prompts(every)
        rows = which if null is None else torch.cat([which, torch.full_like(which, len(condition.text))])
        kv = _select(kv, rows)
        mask = [None if m is None else _pad(m, length)[which] for m in masks]
        joint = None if any(m is None for m in mask) else needed_mask(torch.cat(mask))  # type: ignore[arg-type]
        times = self.network.prepare_times(sampler.grid(sampler.steps)[:-1], guidance)  # all that it is asked at
        both = Prepared(kv, joint, times=times)
        alone = Prepared(tuple(layer[: len(which)] for layer in kv), needed_mask(mask[0]), guidance, times)
        edits = Edits(identity_attention=frozenset(self.perturbed_layers(sampler)))

        def conditional(x: Tensor, t: Tensor) -> Tensor:
            return self._velocity(x, t, alone)

        def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return self._velocity(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)  # type: ignore[return-value]

        def perturbed(x: Tensor, t: Tensor) -> Tensor:
            return self._velocity(x, t, alone, edits)

        # Drawn on the CPU: the same noise whatever the device.
        shape, index = (self.autoencoder.channels, 1, *grid), torch.tensor(list(seeds), dtype=torch.int64)
        noise = normal(NOISE_SEED, index, "sampling noise", shape).to(self.device)

        def fresh(step: int) -> Tensor:
            return normal(NOISE_SEED, index, f"sampling noise {step}", shape).to(self.device)

        return sampler(conditional, pair, noise, perturbed, on_step, fresh)

    def _velocity(self, x: Tensor, t: Tensor, prepared: Prepared, edits: Edits | None = None) -> Tensor:
        time = t[:, None].to(x.dtype)
        network = self.velocity or self.network
        v = network(x, time, prepared) if edits is None else network(x, time, prepared, edits)
        return v.to(x.dtype)

    def perturbed_layers(self, sampler: Sampler) -> Sequence[int]:
        """Layers that a sampler perturbs in this network; none without perturbed-attention guidance.

        Raises:
            ValueError: the network has no such layer.
        """
        if not sampler.perturbed:
            return ()
        depth = len(self.network.blocks)
        layers = pag_layers(depth) if sampler.pag_layers is None else sampler.pag_layers
        wrong = [layer for layer in layers if not 0 <= layer < depth]
        if wrong:
            raise ValueError(f"sampler.pag_layers: {wrong}, but the network has layers 0 to {depth - 1}")
        return layers

    def _using(self, part: Any) -> AbstractContextManager[None]:
        return nullcontext() if self.offload is None else self.offload.use(part)


def pag_layers(depth: int) -> tuple[int]:
    """The layer to perturb in a network of so many: the published one of that depth, else the one two fifths down."""
    return (PAG_LAYER.get(depth, 2 * depth // 5),)


def to_pixels(images: Tensor) -> np.ndarray:
    """Images (b, 3, H, W) in [-1, 1] -> uint8 (b, H, W, 3), clamped and rounded."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@contextmanager
def _times(network: Any, floor: bool | None) -> Iterator[None]:
    """The network with its times rounded down, or not, whatever it was trained with; None leaves it as it is."""
    before = getattr(network, "floor_time", None)
    if floor is None or before is None or floor == before:
        yield
        return
    if floor and network.time_scale <= 1:
        raise ValueError(f"sampler.floor: the network sees t * {network.time_scale}; rounded down, no time is left")
    network.floor_time = floor
    try:
        yield
    finally:
        network.floor_time = before


def _select(kv: Sequence[Tensor], index: Tensor) -> tuple[Tensor, ...]:
    """Rows of each layer's keys and values; the tensors themselves where that is all rows in order."""
    if torch.equal(index.cpu(), torch.arange(len(kv[0]))):
        return tuple(kv)
    return tuple(layer[index] for layer in kv)


def _pad(rows: Tensor, length: int) -> Tensor:
    """Zero-pad dimension 1 of (b, l, ...) to `length`; zero means False in a mask."""
    if rows.shape[1] == length:
        return rows
    return torch.cat([rows, rows.new_zeros(rows.shape[0], length - rows.shape[1], *rows.shape[2:])], dim=1)
