"""What recipes share that learn images under captions: encoders, latents, features of captions, and dropping them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sana.data.caching import Encoding
from sana.model.base import Optimisation, Recipe
from sana.model.encoding import encode_captions, encode_latents
from sana.model.frozen import Frozen
from sana.ops.random import uniform
from sana.types import Batch, Condition


class TextToImage(Recipe):
    """A recipe whose `network` draws images of captions.

    Args:
        plans: of each trained module; "network" is the first.
        network: forward(x (b, c, 1, h, w), t (b, 1), condition) -> velocity like x.
        frozen: holds "autoencoder" and "text_encoder".
        caption_dropout, null_mask: see `sana.model.image.ImageModule`.
        seed: key of all randomness, with each sample's position in the stream.
        compile: compile each block of the network.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        plans: Mapping[str, Optimisation],
        network: nn.Module,
        frozen: Frozen,
        *,
        caption_dropout: float,
        null_mask: Literal["own", "caption"],
        seed: int,
        compile: bool,
    ) -> None:
        super().__init__(plans, seed=seed)
        if not 0.0 <= caption_dropout <= 1.0:
            raise ValueError(f"caption_dropout must be in [0, 1], got {caption_dropout}")
        if null_mask not in ("own", "caption"):
            raise ValueError(f"null_mask must be 'own' or 'caption', got {null_mask!r}")
        self.network = network
        self.frozen = frozen
        self.caption_dropout = caption_dropout
        self.null_mask = null_mask
        if compile:
            compile_blocks(network)

    def latents(self, batch: Batch) -> Tensor:
        """Scaled latents (b, c, 1, h, w) of a batch, encoded now unless the batch brings them."""
        if batch.latent is not None:
            return batch.latent.float().unsqueeze(2)
        assert batch.image is not None
        with torch.no_grad(), self.frozen.working("autoencoder", self.device) as (autoencoder, place):
            return autoencoder.encode(batch.image.to(place)).to(self.device).float().unsqueeze(2)

    def encodings(self) -> dict[str, Encoding]:
        """How images become latents and captions become features, for caches: "latents" and "text"."""
        here = self.device if self.frozen.place == "device" else torch.device("cpu")
        return {
            "latents": self._at_work("autoencoder", encode_latents(self.frozen.autoencoder, here)),
            "text": self._at_work("text_encoder", encode_captions(self.frozen.text_encoder)),
        }

    def _at_work(self, name: str, encoding: Encoding) -> Encoding:
        """The encoding by a part that comes to its device for each call, where it does."""
        if self.frozen.place != "offload":
            return encoding

        def encode(given: Any) -> Any:
            with torch.no_grad(), self.frozen.working(name, self.device) as (_, place):
                return encoding.encode(given.to(place) if isinstance(given, Tensor) else given)

        return encoding._replace(encode=encode)

    def condition(self, batch: Batch) -> Condition:
        """Features of the captions, with caption dropout by position."""
        if batch.text is None:
            condition = self.encode_text(batch.caption)
        else:
            condition = Condition(text=batch.text, mask=batch.text_mask)
        if self.caption_dropout == 0.0:
            return condition
        drop = uniform(self.seed, batch.index, "caption dropout") < self.caption_dropout
        null = self.null_like(condition)
        text = torch.where(drop[:, None, None], null.text, condition.text)
        mask = condition.mask
        if mask is not None and null.mask is not None:
            mask = torch.where(drop[:, None], null.mask, mask)
        return Condition(text=text, mask=mask)

    def encode_text(self, captions: list[str]) -> Condition:
        """Features of captions from the frozen text encoder."""
        with torch.no_grad(), self.frozen.working("text_encoder", self.device) as (encoder, _):
            return _to(encoder.encode(captions), self.device)

    def null_like(self, condition: Condition) -> Condition:
        """The null embedding for every sample of `condition`, cut or padded to its length, with the mask that
        `null_mask` asks for."""
        b, l, _ = condition.text.shape
        with torch.no_grad(), self.frozen.working("text_encoder", self.device) as (encoder, _):
            null = _to(encoder.null(b), condition.text.device)
        text, mask = _fit(null.text, l), None if null.mask is None else _fit(null.mask, l)
        if self.null_mask == "caption":
            mask = condition.mask
        return Condition(text=text.to(condition.text.dtype), mask=mask)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the tensors of a `Batch`."""
        return batch.to(device)


def _to(condition: Condition, device: torch.device) -> Condition:
    mask = None if condition.mask is None else condition.mask.to(device)
    return Condition(text=condition.text.to(device), mask=mask)


def _fit(rows: Tensor, length: int) -> Tensor:
    """Cut or zero-pad dimension 1 of (b, l, ...) to `length`; zero means False in a mask."""
    if rows.shape[1] >= length:
        return rows[:, :length]
    pad = rows.new_zeros(rows.shape[0], length - rows.shape[1], *rows.shape[2:])
    return torch.cat([rows, pad], dim=1)


def compile_blocks(network: nn.Module) -> None:
    """Compile each block on its own: they share one graph."""
    for block in network.blocks:  # type: ignore[union-attr]
        block.compile()
