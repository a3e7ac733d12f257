"""Linear maps of the latent folded into the convolutions beside it: the same autoencoder in other coordinates.

A diffusion model wants latents whose channels have mean 0, variance 1 and no correlation, while training an
autoencoder is easiest when nothing is asked of them. So they are normalised without parameters while training, and
afterwards the normalisation becomes part of the weights.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sana.encoder.autoencoder.dc_ae import DCAE


@torch.no_grad()
def fold_shortcut(model: DCAE) -> DCAE:
    """A copy of the same function with `latent_shortcut` False: both shortcuts become taps of the 3x3 convolutions."""
    if not model.config["latent_shortcut"]:
        raise ValueError("fold_shortcut: the autoencoder has no latent shortcut")
    config = dict(model.config)
    config["latent_shortcut"] = False
    folded = DCAE(**config).to(next(model.parameters()))
    folded.load_state_dict(model.state_dict())
    wide, channels = folded.encoder.output.in_channels, model.channels
    group = wide // channels
    mean = torch.eye(channels).repeat_interleave(group, dim=1) / group
    folded.encoder.output.weight[:, :, 1, 1] += mean.to(folded.encoder.output.weight)
    repeat = torch.eye(channels).repeat_interleave(folded.decoder.input.out_channels // channels, dim=0)
    folded.decoder.input.weight[:, :, 1, 1] += repeat.to(folded.decoder.input.weight)
    return folded.train(model.training)


@torch.no_grad()
def map_encoder(model: DCAE, matrix: Float[Tensor, "c c"], shift: Float[Tensor, " c"]) -> None:
    """Changes the encoder in place such that `encode` gives matrix z + shift where it gave z."""
    conv = _convolution(model, model.encoder.output)
    matrix, shift = matrix.to(conv.weight), shift.to(conv.weight)
    assert conv.bias is not None
    conv.weight.copy_(torch.einsum("ij,jkhw->ikhw", matrix, conv.weight))
    conv.bias.copy_(matrix @ conv.bias + shift / model.scale)


@torch.no_grad()
def map_decoder(model: DCAE, matrix: Float[Tensor, "c c"]) -> None:
    """Changes the decoder in place such that `decode` of z gives what it gave for matrix z.

    There is no shift: the decoder's first convolution pads with zeros, which a shift would move.
    """
    conv = _convolution(model, model.decoder.input)
    conv.weight.copy_(torch.einsum("ojhw,ji->oihw", conv.weight, matrix.to(conv.weight)))


def moments(
    latent: Float[Tensor, "b c h w"],
) -> tuple[Float[Tensor, " c"], Float[Tensor, "c c"]]:
    """Mean and covariance of the channels over all samples and places, in float64."""
    rows = latent.double().movedim(1, -1).flatten(0, -2)
    return rows.mean(0), torch.cov(rows.T, correction=0)


def whitening(covariance: Float[Tensor, "c c"]) -> Float[Tensor, "c c"]:
    """covariance^(-1/2), symmetric: of all maps to unit covariance the one that moves the channels least.

    Raises:
        ValueError: a direction without variance.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    if values[0] <= 1e-6 * values[-1]:
        raise ValueError(f"whitening: the latents do not vary in every direction (variances {values.tolist()})")
    return vectors @ torch.diag(values.rsqrt()) @ vectors.T


def _convolution(model: DCAE, conv: nn.Module) -> nn.Conv2d:
    if model.config["latent_shortcut"]:
        raise ValueError("the latent has shortcuts beside its convolutions; use fold_shortcut first")
    assert isinstance(conv, nn.Conv2d)
    return conv
