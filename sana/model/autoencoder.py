"""Training of the autoencoder in the three phases of Chen et al. 2024 (DC-AE, arXiv 2410.10733, section 3.3).

1. Low resolution, all parameters, L1 and perceptual loss. Low resolution means crops here: they cost a fraction of
   whole images, and a convolutional code learnt on them holds for those.
2. Whole images, so that the latent learns what crops do not show. The paper trains the middle layers alone, which saves
   memory; all are trained here.
3. Crops again, a PatchGAN, and the decoder's head trained alone, so that the latent space stays what it was.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sana.encoder.autoencoder.dc_ae import DCAE
from sana.encoder.autoencoder.fold import fold_shortcut, map_decoder, map_encoder, moments, whitening
from sana.encoder.perceptual import AttributeNet
from sana.model.base import Optimisation, OptimizerFactory, Recipe, Schedule, share_of_good, weighted_mean
from sana.model.frozen import Frozen
from sana.objective.adversarial import balance, hinge_discriminator, hinge_generator
from sana.objective.reconstruction import absolute, perceptual
from sana.ops.random import normal, uniform
from sana.types import Batch


class AutoencoderModule(Recipe):
    """Trains a `DCAE` of scale 1 on images.

    While training, the latent is normalised per channel over the batch (no parameters) and disturbed by a little noise:
    the first fixes its scale, the second makes the decoder forgive a diffusion model's errors and keeps neighbouring
    latents alike. `export` folds the normalisation into the weights.

    Args:
        autoencoder: what is trained; latent shortcuts are folded into its convolutions first.
        discriminator: trained against it from `refine_from` on.
        perceptual_net: frozen net whose features measure similarity.
        optimizer, schedule, clip_norm, ema_decay: of the autoencoder, see `Optimisation`.
        discriminator_optimizer: of the discriminator; its rate is constant.
        perceptual_weight: factor of the perceptual distance beside the mean absolute difference.
        adversarial_weight: gradient of the adversarial loss at the last layer, relative to that of the other losses.
        crop: side of the crops in phases 1 and 3, in pixels; a multiple of the autoencoder's ratio.
        adapt_from, refine_from: first updates of phases 2 and 3.
        latent_noise: largest standard deviation of the noise; each sample draws its own from [0, latent_noise).
        seed: key of all randomness, with each sample's position in the stream.
    """

    def __init__(
        self,
        autoencoder: DCAE,
        discriminator: nn.Module,
        perceptual_net: AttributeNet,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        discriminator_optimizer: OptimizerFactory,
        *,
        perceptual_weight: float,
        adversarial_weight: float,
        crop: int,
        adapt_from: int,
        refine_from: int,
        latent_noise: float,
        clip_norm: float | None = 1.0,
        ema_decay: float | None = None,
        seed: int = 0,
    ) -> None:
        plans = {
            "autoencoder": Optimisation(optimizer, schedule, clip_norm, ema_decay),
            "discriminator": Optimisation(discriminator_optimizer, lambda updates: 1.0, clip_norm, None),
        }
        super().__init__(plans, seed=seed)
        if autoencoder.scale != 1.0:
            raise ValueError(f"AutoencoderModule normalises the latent: scale must be 1, got {autoencoder.scale}")
        if crop % autoencoder.ratio or not 0 <= adapt_from <= refine_from:
            raise ValueError(f"crop={crop} must be a multiple of the ratio {autoencoder.ratio}, and adapt_from="
                             f"{adapt_from} must not come after refine_from={refine_from}")  # fmt: skip
        if autoencoder.config["latent_shortcut"]:
            autoencoder = fold_shortcut(autoencoder)  # beside it the normalisation could not be folded
        self.autoencoder = autoencoder.to(memory_format=torch.channels_last)
        self.discriminator = discriminator
        self.frozen = Frozen(perceptual=perceptual_net)
        self.normalise = nn.BatchNorm2d(autoencoder.channels, affine=False, momentum=0.02)
        self.perceptual_weight, self.adversarial_weight = perceptual_weight, adversarial_weight
        self.crop, self.adapt_from, self.refine_from = crop, adapt_from, refine_from
        self.latent_noise = latent_noise

    def trainables(self) -> dict[str, nn.Module]:
        """The autoencoder, whose updates count, and the discriminator."""
        return {"autoencoder": self.autoencoder, "discriminator": self.discriminator}

    @property
    def phase(self) -> int:
        """1 (crops), 2 (whole images) or 3 (adversarial)."""
        updates = self.updates["autoencoder"]
        return 1 + (updates >= self.adapt_from) + (updates >= self.refine_from)

    def head(self) -> list[nn.Module]:
        """The parts of the decoder that the adversarial phase trains: its finest stage and what follows."""
        decoder = self.autoencoder.decoder
        finest = next(stage for stage in decoder.stages if len(stage) > 0)  # type: ignore[arg-type]
        return [finest, decoder.norm, decoder.output]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One micro-batch of reconstruction, and in the adversarial phase one of discrimination."""
        if batch.image is None:
            raise ValueError("an autoencoder is trained on images: set data.cache_latents=false")
        self.begin_batch(batch.key)
        phase = self.phase
        if phase == 3 and self.autoencoder.encoder.output.weight.requires_grad:
            self._begin_refinement()
        self.report["train/phase"] = float(phase)
        with self.timed("model"):
            image = batch.image if phase == 2 else self.crops(batch.image, batch.index)
            image = image.contiguous(memory_format=torch.channels_last)
            y = self.reconstruct(image, batch.index)
            loss = self._reconstruction_loss(image, y, batch.weight)
            self.report["train/loss"] = loss.detach() / share_of_good(batch)
            if phase == 3:
                loss = loss + self._adversarial_loss(y, loss, batch.weight)
                self.optimise("autoencoder", loss)
                verdicts = hinge_discriminator(self.discriminator(image), self.discriminator(y.detach()))
                verdict = weighted_mean(verdicts, batch.weight)
                self.report["train/discriminator/loss"] = verdict.detach()
                self.optimise("discriminator", verdict)
            else:
                self.optimise("autoencoder", loss)
        self.finish_batch(len(batch.key))

    def crops(self, image: Float[Tensor, "b 3 H W"], index: Tensor) -> Float[Tensor, "b 3 h w"]:
        """A square of every image, at the place that belongs to the sample."""
        u = uniform(self.seed, index, "crop", (2,)).cpu()
        rows, columns = ((u[:, axis] * (image.shape[2 + axis] - self.crop + 1)).long().tolist() for axis in (0, 1))
        parts = [x[:, i : i + self.crop, j : j + self.crop] for x, i, j in zip(image, rows, columns, strict=True)]
        return torch.stack(parts)

    def reconstruct(self, image: Float[Tensor, "b 3 h w"], index: Tensor) -> Float[Tensor, "b 3 h w"]:
        """Reconstructions through the normalised latent, disturbed by the noise that belongs to the samples."""
        z = self.normalise(self.autoencoder.encode(image).float())
        sigma = self.latent_noise * uniform(self.seed, index, "latent noise scale")
        z = z + sigma[:, None, None, None] * normal(self.seed, index, "latent noise", tuple(z.shape[1:]))
        return self.autoencoder.decode(z).float()

    @torch.no_grad()
    def export(self, images: Float[Tensor, "b 3 h w"], chunk: int = 64) -> DCAE:
        """A copy of the (averaged) autoencoder whose latents have mean 0 and unit covariance over the given images."""
        with self.averaged("autoencoder") as module:
            assert isinstance(module, DCAE)
            copy = DCAE(**module.config).to(images.device)
            copy.load_state_dict(module.state_dict())
        copy.eval().to(memory_format=torch.channels_last)
        mean, covariance = moments(torch.cat([copy.encode(part) for part in images.split(chunk)]))
        spread = covariance.diagonal().sqrt()  # the decoder knows latents of unit variance per channel
        white = whitening(covariance / spread.outer(spread))
        matrix = white / spread
        map_encoder(copy, matrix, -matrix @ mean)
        map_decoder(copy, torch.linalg.inv(white))
        return copy

    def on_train_start(self) -> None:
        """Go on with the phase that a checkpoint was in."""
        if self.phase == 3:
            self._begin_refinement()

    def _begin_refinement(self) -> None:
        self.autoencoder.requires_grad_(False)
        for part in self.head():
            part.requires_grad_(True)
        self.normalise.eval()  # the latent stays as it is

    def _reconstruction_loss(self, x: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
        pixels = weighted_mean(absolute(x, y), weight)
        self.report["train/absolute"] = pixels.detach()
        net = self.frozen.perceptual
        with torch.no_grad():
            target = net.features(x)
        distances = perceptual([f.float() for f in target], [f.float() for f in net.features(y)])
        features = weighted_mean(distances, weight)
        self.report["train/perceptual"] = features.detach()
        return pixels + self.perceptual_weight * features

    def _adversarial_loss(self, y: Tensor, reference: Tensor, weight: Tensor | None) -> Tensor:
        self.discriminator.requires_grad_(False)
        adversarial = weighted_mean(hinge_generator(self.discriminator(y).float()), weight)
        self.discriminator.requires_grad_(True)
        last = self.autoencoder.decoder.last_layer.weight
        factor = self.adversarial_weight * balance(reference, adversarial, last)
        self.report["train/adversarial"] = adversarial.detach()
        return factor * adversarial

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move the tensors of a `Batch`."""
        return batch.to(device)
