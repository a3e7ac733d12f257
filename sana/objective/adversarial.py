"""Losses between a generator and a discriminator that gives higher logits to real samples."""

from __future__ import annotations

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
