"""Text-to-image by regression of a velocity: SANA, SANA-1.5 and whatever else learns from one pure loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sana.data.caching import Encoding
from sana.model.base import Optimisation, OptimizerFactory, Recipe, Schedule, share_of_good, weighted_mean
from sana.model.encoding import encode_captions, encode_latents
from sana.model.frozen import Frozen, Place
from sana.ops.random import normal, spread, uniform
from sana.types import Batch, Condition, Grid


class ImageModule(Recipe):
    """Trains `network` as the velocity field of images under captions.

    Args:
        network: forward(x (b, c, 1, h, w), t (b, 1), condition) -> velocity like x.
        autoencoder: frozen; encode(images (b, 3, H, W) in [-1, 1]) -> scaled latents (b, c, h, w), and decode.
        text_encoder: frozen; encode(list of captions) -> Condition, null(b) -> Condition.
        objective: (velocity function, x0, eps, t) -> losses per sample and frame (b, 1).
        timestep: maps uniform numbers (b,) in [0, 1) to times (b,) in [0, 1]; the numbers of a batch are evenly spread.
        optimizer, schedule, clip_norm, ema_decay: see `Optimisation`.
        caption_dropout: probability that a caption is replaced by the null embedding.
        null_mask: what a dropped caption attends to: "own" (the null prompt's own tokens) or "caption" (the rows that
            the real caption had; what the published models were trained with).
        seed: key of all randomness, with each sample's position in the stream.
        compile: compile each block of the network (needs a C++ compiler on CPU).
        frozen: where the encoders are, see `Frozen`: on the "device", on the "cpu", or "offload": there only while they
            work.
    """

    def __init__(
        self,
        network: nn.Module,
        autoencoder: nn.Module,
        text_encoder: nn.Module,
        objective: Callable[..., Tensor],
        timestep: Callable[[Tensor], Tensor],
        optimizer: OptimizerFactory,
        schedule: Schedule,
        *,
        clip_norm: float | None = 0.1,
        ema_decay: float | None = None,
        caption_dropout: float = 0.1,
        null_mask: Literal["own", "caption"] = "own",
        seed: int = 0,
        compile: bool = False,
        frozen: Place = "device",
    ) -> None:
        plan = Optimisation(optimizer, schedule, clip_norm, ema_decay)
        super().__init__({"network": plan}, seed=seed)
        if not 0.0 <= caption_dropout <= 1.0:
            raise ValueError(f"caption_dropout must be in [0, 1], got {caption_dropout}")
        if null_mask not in ("own", "caption"):
            raise ValueError(f"null_mask must be 'own' or 'caption', got {null_mask!r}")
        self.network = network
        self.frozen = Frozen(frozen, autoencoder=autoencoder, text_encoder=text_encoder)
        self.objective = objective
        self.timestep = timestep
        self.caption_dropout = caption_dropout
        self.null_mask = null_mask
        if compile:
            for block in network.blocks:  # type: ignore[union-attr]
                block.compile()

    def trainables(self) -> dict[str, nn.Module]:
        """The network alone."""
        return {"network": self.network}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One micro-batch of flow matching; see `flow_loss`."""
        self.begin_batch(batch.key)
        with self.timed("text"):
            condition = self.condition(batch)
        with self.timed("autoencoder"):
            x0 = self.latents(batch)
        with self.timed("model"):
            t = self.times(batch.index)
            losses = self.flow_loss(self.network, x0, condition, batch.index, t)
            self.noted = {"t": t, "loss": losses.detach()}
            loss = weighted_mean(losses, batch.weight)
            self.flops += self._flops_of(x0, condition)
            self.report["train/loss"] = loss.detach() / share_of_good(batch)
            self.optimise("network", loss)
        self.finish_batch(len(batch.caption))

    def _flops_of(self, x0: Tensor, condition: Condition) -> float:
        """Operations of forward and backward of a micro-batch; 0 for networks that do not count theirs."""
        count = getattr(self.network, "flops", None)
        if count is None or self.replaying:
            return 0.0
        b, _, f, h, w = x0.shape
        patch = int(getattr(self.network, "patch", 1))
        return 3.0 * b * count(Grid(f, h // patch, w // patch), condition.text.shape[1])

    def times(self, index: Tensor) -> Tensor:
        """The times (b,) of the samples at these positions."""
        return self.timestep(spread(self.seed, index, "timestep"))

    def flow_loss(
        self, network: nn.Module, x0: Tensor, condition: Condition, index: Tensor, t: Tensor | None = None
    ) -> Tensor:
        """Losses (b, 1) at the times and noises that belong to the samples' positions in the stream.

        Args:
            network: the trained network or its average.
            x0: (b, c, 1, h, w) scaled latents.
            condition: captions' features.
            index: (b,) positions.
            t: (b,) other times.
        """
        if t is None:
            t = self.times(index)
        eps = normal(self.seed, index, "noise", tuple(x0.shape[1:]))
        return self.objective(lambda xt, time: network(xt, time, condition), x0, eps, t[:, None].to(x0.dtype))

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

    @torch.no_grad()
    def validation_losses(self, network: nn.Module, batch: Batch, bins: int, per_bin: int = 1) -> Tensor:
        """Mean loss in each of `bins` equal ranges of t, at fixed noise and fixed captions: (bins,).

        Every sample is evaluated in every bin at `per_bin` evenly spaced times, so that the numbers of two runs or two
        steps differ by the network alone.
        """
        x0, condition = self.latents(batch), self.encode_text(batch.caption)
        result = []
        for k in range(bins):
            losses = []
            for j in range(per_bin):
                t = x0.new_full((len(batch.caption),), (k + (j + 0.5) / per_bin) / bins)
                losses.append(self.flow_loss(network, x0, condition, batch.index, t).mean())
            result.append(torch.stack(losses).mean())
        return torch.stack(result)

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
