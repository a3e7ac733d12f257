"""Text-to-image by regression of a velocity: SANA, SANA-1.5 and whatever else learns from one pure loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from sana.model.base import Optimisation, OptimizerFactory, Schedule, share_of_good, weighted_mean
from sana.model.frozen import Frozen, Place
from sana.model.text_to_image import TextToImage
from sana.ops.random import normal, spread
from sana.types import Batch, Condition, Grid


class ImageModule(TextToImage):
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
        super().__init__(
            {"network": plan},
            network,
            Frozen(frozen, autoencoder=autoencoder, text_encoder=text_encoder),
            caption_dropout=caption_dropout,
            null_mask=null_mask,
            seed=seed,
            compile=compile,
        )
        self.objective = objective
        self.timestep = timestep

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
