"""Learning-rate factors as functions of the number of updates made so far, and the batch-size rule.

A schedule is built once, ``factor = constant(warmup=2000)``, and asked before each update: ``lr = base *
factor(n)`` with n = 0 before the first. It holds no state, so that a resumed run only needs its own update
counter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(warmup: int = 0) -> Schedule:
    """Linear warm-up, ``(n + 1) / warmup``, then 1. The first update is not wasted on a rate of zero.

    Args:
        warmup: updates until the full rate; 0 is none. The published recipes have 2000.

    Raises:
        ValueError: warmup is negative.
    """
    if warmup < 0:
        raise ValueError(f"warmup is a number of updates >= 0, got {warmup}")

    def factor(updates: int) -> float:
        return min(1.0, (updates + 1) / warmup) if warmup else 1.0

    return factor


def cosine(warmup: int, total: int, final: float = 0.0) -> Schedule:
    """Linear warm-up as in `constant`, then half a cosine from 1 at n = warmup to `final` at n = total, then
    `final`. A run that ends within its warm-up only rises.

    Args:
        warmup: updates until the full rate.
        total: update at which the decay ends.
        final: factor at the end, in [0, 1].

    Raises:
        ValueError: total is not positive, warmup is negative, or final is outside [0, 1].
    """
    if total < 1:
        raise ValueError(f"a cosine schedule needs a number of updates above 0, got total={total}")
    if not 0 <= final <= 1:
        raise ValueError(f"the final factor of a cosine schedule is in [0, 1], got {final}")
    rise = constant(warmup)

    def factor(updates: int) -> float:
        if updates < warmup:
            return rise(updates)
        progress = min(1.0, (updates - warmup) / (total - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def scale_lr(lr: float, batch: int, base: int = 256, rule: str | None = "sqrt") -> float:
    """The learning rate at a global batch, from the rate stated at the batch `base`.

    Args:
        lr: rate at the batch `base`.
        batch: samples per update: per device x devices x accumulation.
        base: 256 in the published recipes.
        rule: "sqrt" multiplies by sqrt(batch / base) (published), "linear" by batch / base, None leaves lr.

    Raises:
        ValueError: an unknown rule, or batch or base not positive.
    """
    if batch < 1 or base < 1:
        raise ValueError(f"batch sizes are positive, got batch={batch}, base={base}")
    if rule is None:
        return lr
    if rule == "sqrt":
        return lr * math.sqrt(batch / base)
    if rule == "linear":
        return lr * batch / base
    raise ValueError(f'the learning-rate rule is "sqrt", "linear" or None, got {rule!r}')
