"""Flow matching: regression of the velocity of the linear path."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Float32, Float64
from torch import Tensor

from sana.flow.path import linear, velocity_target


def flow_matching(
    network: Callable[[Tensor, Tensor], Tensor],
    x0: Float[Tensor, "b c f h w"],
    eps: Float[Tensor, "b c f h w"],
    t: Float[Tensor, "b f"],
) -> Float32[Tensor, "b f"] | Float64[Tensor, "b f"]:
    """Squared error of the velocity, ``mean over c, h, w of (network(xt, t) - (eps - x0))^2``, per frame.

    Not weighted over time, as in SANA: the distribution of t does the weighting. Condition and
    other arguments of the network are bound by the caller.

    Args:
        network: v (b, c, f, h, w) from xt of that shape and t (b, f); may return a lower precision.
        x0: data latents.
        eps: standard normal noise.
        t: time of each frame in [0, 1].

    Returns:
        Losses (b, f), float32 (float64 if x0 is); the caller weights and averages them.

    Raises:
        ValueError: the network returned another shape.
    """
    xt = linear(x0, eps, t)
    v = network(xt, t)
    if v.shape != x0.shape:
        raise ValueError(f"the network returned {tuple(v.shape)} for latents {tuple(x0.shape)}; they must agree")
    error = _at_least_float32(v) - velocity_target(_at_least_float32(x0), _at_least_float32(eps))
    return error.square().mean(dim=(1, 3, 4))


def _at_least_float32(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    return x if x.dtype.itemsize >= 4 else x.float()
