"""Losses between a generator and a discriminator that gives higher logits to real samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def hinge_discriminator(real: Float[Tensor, "b ..."], fake: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """mean(max(0, 1 - real)) + mean(max(0, 1 + fake)) per sample (Lim and Ye 2017, arXiv 1705.02894).

    Args:
        real, fake: logits of real and of generated samples; the means run over all axes but the first.
    """
    return (1 - real).relu().flatten(1).mean(1) + (1 + fake).relu().flatten(1).mean(1)


def hinge_generator(fake: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """-mean(fake) per sample: the generator's side of the hinge loss."""
    return -fake.flatten(1).mean(1)


def r1(logits: Float[Tensor, "b k"], features: Sequence[Float[Tensor, "b n d"]]) -> Float[Tensor, " b"]:
    """Squared gradient of the summed logits by the features of real samples, mean over the features' layers, per sample
    (Mescheder et al. 2018, arXiv:1801.04406, on features instead of pixels as in LADD, arXiv:2403.12015).

    Args:
        logits: of real samples, computed from `features`.
        features: those that the discriminator saw, which require gradients.
    """
    gradients = torch.autograd.grad(logits.sum(), list(features), create_graph=True)
    return torch.stack([g.flatten(1).square().sum(1) for g in gradients]).mean(0)


def roll_within(x: Float[Tensor, "b ..."], group: int) -> Float[Tensor, "b ..."]:
    """Samples moved on by one within groups of neighbours, so that each meets another one's caption.

    Groups and not the batch, so that who meets whom does not depend on how a batch is spread over ranks.

    Args:
        x: of at least two samples.
        group: samples of a group at most; the batch is cut into equal groups.

    Raises:
        ValueError: a group of one, which would meet itself.
    """
    parts = x.tensor_split(-(-len(x) // group))
    if min(map(len, parts)) < 2:
        raise ValueError(f"mismatched pairs need two samples in every group, got {len(x)} in groups of at most {group}")
    return torch.cat([part.roll(1, dims=0) for part in parts])


def balance(
    reference: Float[Tensor, ""], adversarial: Float[Tensor, ""], weight: Tensor, limit: float = 1e4
) -> Float[Tensor, ""]:
    """Factor that gives the adversarial loss the same gradient norm as the reference loss at one parameter.

    Esser et al. 2021 (VQGAN, arXiv 2012.09841, equation 7). Both graphs are kept, so the losses can still be
    differentiated; the result carries no gradient.

    Args:
        reference, adversarial: scalar losses that depend on `weight`.
        weight: the parameter at which the norms are compared, usually the last layer's.
        limit: upper bound of the factor, reached where the adversarial gradient vanishes.
    """
    (a,) = torch.autograd.grad(reference, weight, retain_graph=True)
    (b,) = torch.autograd.grad(adversarial, weight, retain_graph=True)
    return (a.norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny)).clamp_max(limit).detach()
