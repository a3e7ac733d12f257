"""From prompts and seeds to pixels: the parts of a trained model joined for sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sana.ops.random import normal
from sana.sampler.guided import Sampler
from sana.types import Condition, Prepared

NOISE_SEED = 0  # sampling noise is keyed by each image's own seed; this is the other half of the generator's key


class Painter:
    """Draws images with a network, an autoencoder and a text encoder.

    Args:
        network: velocity field with `prepare(condition, times)` and forward(x (b, c, 1, h, w), t (b, 1), prepared).
        autoencoder: decode(latents (b, c, h, w)) -> images (b, 3, H, W) in [-1, 1]; `ratio` and `channels`.
        text_encoder: encode(list of prompts) -> Condition.
        null_like: Condition of prompts -> Condition of nothing, for guidance.
    """

    def __init__(
        self,
        network: Any,
        autoencoder: Any,
        text_encoder: Any,
        null_like: Callable[[Condition], Condition],
    ) -> None:
        self.network, self.autoencoder, self.text_encoder = network, autoencoder, text_encoder
        self.null_like = null_like

    @torch.no_grad()
    def draw(
        self,
        prompts: list[str],
        seeds: list[int],
        sampler: Sampler,
        height: int,
        width: int,
        *,
        batch: int = 64,
        negative: str = "",
    ) -> np.ndarray:
        """Images (n, height, width, 3) uint8, one per prompt and seed.

        The noise of an image depends on its seed alone, so image k is the same whatever else is drawn with it, up to
        the rounding of batched matrix products.

        Args:
            prompts, seeds: of equal length n.
            sampler: solver, grid and guidance.
            height, width: pixels, multiples of the autoencoder's ratio.
            batch: images per network call (twice that many with guidance).
            negative: prompt to steer away from; "" is the null embedding.

        Raises:
            ValueError: lengths differ, or a side is not a multiple of the ratio.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        ratio = self.autoencoder.ratio
        if height % ratio or width % ratio:
            raise ValueError(f"{height}x{width} pixels are not multiples of the autoencoder's {ratio}")
        parts = [
            self._draw(
                prompts[i : i + batch],
                seeds[i : i + batch],
                sampler,
                height // ratio,
                width // ratio,
                negative,
            )
            for i in range(0, len(prompts), batch)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, height, width, 3), np.uint8)

    def _draw(
        self, prompts: list[str], seeds: list[int], sampler: Sampler, h: int, w: int, negative: str
    ) -> np.ndarray:
        device = next(self.network.parameters()).device
        index = torch.tensor(seeds, dtype=torch.int64, device=device)
        noise = normal(NOISE_SEED, index, "sampling noise", (self.autoencoder.channels, 1, h, w))
        condition = self.text_encoder.encode(prompts)
        times = sampler.grid(sampler.steps)[:-1]  # the network is not asked at the last one
        conditional = self.network.prepare(condition, times)
        if sampler.guided:
            null = self._negative(condition, negative)
            both = self.network.prepare(_join(condition, null), times)
        else:
            both = None

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self._velocity(x, t, conditional)

        def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            assert both is not None
            joint = self._velocity(torch.cat([x, x]), torch.cat([t, t]), both)
            return joint.chunk(2)  # type: ignore[return-value]

        latent = sampler(velocity, pair, noise)
        pixels = self.autoencoder.decode(latent.squeeze(2))
        return to_pixels(pixels)

    def _velocity(self, x: Tensor, t: Tensor, prepared: Prepared) -> Tensor:
        return self.network(x, t[:, None].to(x.dtype), prepared).to(x.dtype)

    def _negative(self, condition: Condition, negative: str) -> Condition:
        if not negative:
            return self.null_like(condition)
        other = self.text_encoder.encode([negative] * condition.text.shape[0], instruct=False)
        return Condition(text=other.text, mask=other.mask)


def _join(first: Condition, second: Condition) -> Condition:
    """Stack two conditions along the batch, padding the shorter one's tokens with masked zeros."""
    length = max(first.text.shape[1], second.text.shape[1])
    text, mask = [], []
    for part in (first, second):
        b, l, _ = part.text.shape
        rows = part.mask if part.mask is not None else part.text.new_ones(b, l, dtype=torch.bool)
        text.append(nn.functional.pad(part.text, (0, 0, 0, length - l)))
        mask.append(nn.functional.pad(rows, (0, length - l), value=False))
    return Condition(text=torch.cat(text), mask=torch.cat(mask))


def to_pixels(images: Tensor) -> np.ndarray:
    """Images (b, 3, H, W) in [-1, 1] -> uint8 (b, H, W, 3), clamped and rounded."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
