"""RMSNorm over the last dimension: by Triton where `sana.ops.choice` says so, else in plain torch."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sana.ops import forward_ad
from sana.ops.choice import use_triton
from sana.ops.direct import direct
from sana.ops.rms_norm import naive
from sana.ops.rms_norm.naive import Activation


def rms_norm(
    x: Float[Tensor, "... d"],
    weight: Float[Tensor, " d"],
    eps: float,
    bias: Float[Tensor, " d"] | None = None,
    activation: Activation = None,
    residual: Float[Tensor, "... d"] | None = None,
) -> Float[Tensor, "... d"]:
    """residual + act(x / sqrt(mean(x^2) + eps) * weight + bias), of the type of x (promoted to that of residual).

    Maps (b, c, h, w) in channels_last are such rows by movedim(1, -1). With Triton everything between reading and
    writing is fp32, and x and one number per row are kept for the backward pass. A forward derivative is taken of the
    plain way.

    Args:
        x: rows.
        weight: gain of each column.
        eps: added to the mean square.
        bias: added after the gain.
        activation: applied before the residual is added.
        residual: of the shape of x.

    Raises:
        ValueError: any other activation.
    """
    if activation not in (None, *naive.ACTIVATIONS):
        raise ValueError(f"rms_norm: activation {activation!r}; expected None, {', '.join(naive.ACTIVATIONS)}")
    if forward_ad.taken() or not use_triton(x, weight, bias, residual):
        return naive.rms_norm(x, weight, eps, bias, activation, residual)
    from sana.ops.rms_norm import triton

    if direct(*(t for t in (x, weight, bias, residual) if t is not None)):
        return triton.launch(x, weight, bias, residual, eps, activation)[0]
    return triton.rms_norm(x, weight, bias, residual, eps, activation or "")[0]
