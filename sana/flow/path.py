"""The linear path between data and noise, and what follows from its velocity.

``xt = (1 - t) x0 + t eps`` and ``v = d xt / dt = eps - x0`` (Liu et al. 2022, rectified flow; Lipman et al.
2022). Time may be per sample, ``(b,)``, or per frame, ``(b, f)`` beside latents ``(b, c, f, h, w)``.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def align_time(t: Float[Tensor, " b"] | Float[Tensor, "b f"], x: Float[Tensor, "b ..."]) -> Tensor:
    """Give t the axes of x, of size 1 where t is constant, so that the two broadcast.

    Args:
        t: (b,), or (b, f) where x is (b, c, f, ...) .
        x: any tensor with the batch first.

    Raises:
        ValueError: the sizes of t are neither (b,) nor (b, f) of x.
    """
    if t.ndim == 1 and t.shape[0] == x.shape[0]:
        return t.reshape(-1, *(1,) * (x.ndim - 1))
    if t.ndim == 2 and x.ndim >= 3 and t.shape == (x.shape[0], x.shape[2]):
        return t.reshape(t.shape[0], 1, t.shape[1], *(1,) * (x.ndim - 3))
    raise ValueError(f"t must be (b,) or (b, f) beside x (b, c, f, ...), got t {tuple(t.shape)}, x {tuple(x.shape)}")


def linear(x0: Float[Tensor, "b *s"], eps: Float[Tensor, "b *s"], t: Float[Tensor, "b *f"]) -> Float[Tensor, "b *s"]:
    """Point of the path, ``xt = (1 - t) x0 + t eps``. With t in float32 the result is at least float32."""
    t = align_time(t, x0)
    return (1 - t) * x0 + t * eps


def velocity_target(x0: Float[Tensor, "*s"], eps: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """``v = eps - x0``, the regression target; it does not depend on t."""
    return eps - x0


def x0_from_velocity(
    xt: Float[Tensor, "b *s"], t: Float[Tensor, "b *f"], v: Float[Tensor, "b *s"]
) -> Float[Tensor, "b *s"]:
    """Data predicted from a point and its velocity, ``x0 = xt - t v``."""
    return xt - align_time(t, xt) * v


def eps_from_velocity(
    xt: Float[Tensor, "b *s"], t: Float[Tensor, "b *f"], v: Float[Tensor, "b *s"]
) -> Float[Tensor, "b *s"]:
    """Noise predicted from a point and its velocity, ``eps = xt + (1 - t) v``."""
    return xt + (1 - align_time(t, xt)) * v
