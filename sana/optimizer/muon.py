"""Muon: momentum whose matrices are orthogonalised, with AdamW for everything that is not a matrix.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the scale of the update is that of
Liu et al. 2025 (arXiv 2502.16982), which lets matrices and the rest share one learning rate of AdamW's size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

# The odd quintic a x + b x^3 + c x^5 whose iteration takes singular values in (0, 1] to about [0.7, 1.2] fastest.
_QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """One optimizer for all parameters of a network.

    Matrices (two dimensions, both at least `least_side`), with gradient g::

        m <- momentum m + (1 - momentum) g;   u = (1 - momentum) g + momentum m
        w <- w - lr (weight_decay w + 0.2 sqrt(max(rows, columns)) orthogonalise(u))

    so that an update has a root mean square of about 0.2, like one of AdamW. All other tensors (vectors, tables,
    convolution kernels, thin projections from and to the latent) take AdamW's step with bias correction.

    Args:
        params: parameters or parameter groups.
        lr: learning rate of both kinds.
        momentum: of matrices, in [0, 1).
        betas, eps: of AdamW for the rest.
        weight_decay: decoupled, multiplied by lr.
        steps: Newton-Schulz iterations.
        least_side: smallest side of what counts as a matrix.

    Raises:
        ValueError: an argument is out of range, or a matrix is sharded (orthogonalisation needs it whole).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        steps: int = 5,
        least_side: int = 32,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or not all(0 <= b < 1 for b in betas) or steps < 1 or weight_decay < 0:
            raise ValueError(
                f"Muon: lr {lr}, momentum {momentum}, betas {betas}, steps {steps}, weight_decay {weight_decay}: "
                "rates must not be negative, momentum and betas must be in [0, 1), steps at least 1"
            )
        defaults = dict(
            lr=lr, momentum=momentum, betas=tuple(betas), eps=eps, weight_decay=weight_decay, steps=steps,
            least_side=least_side,
        )  # fmt: skip
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            matrices: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            rest: list[Tensor] = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.ndim == 2 and min(p.shape) >= group["least_side"]:
                    if isinstance(p, DTensor):
                        raise ValueError("Muon: matrices sharded by FSDP cannot be orthogonalised; use came or adamw")
                    matrices[p.shape, p.dtype, p.device].append(p)
                else:
                    rest.append(p)
            for same in matrices.values():
                self._orthogonal(same, group)
            if rest:
                self._adamw(rest, group)
        return loss

    def _orthogonal(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Step of matrices of one shape, stacked: small networks are otherwise all call overhead."""
        momentum, lr = group["momentum"], group["lr"]
        grads = [p.grad.float() for p in params if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p, dtype=torch.float32)
        buffers = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = orthogonalise(torch.stack(torch._foreach_lerp(grads, buffers, momentum)), group["steps"])
        scale = 0.2 * math.sqrt(max(params[0].shape)) * lr
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, [u.to(params[0].dtype) for u in updates.unbind()], alpha=-scale)

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        b1, b2 = group["betas"]
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = 0
                self.state[p]["first"] = torch.zeros_like(p, dtype=torch.float32)
                self.state[p]["second"] = torch.zeros_like(p, dtype=torch.float32)
        states = [self.state[p] for p in params]
        grads = [p.grad.float() for p in params if p.grad is not None]
        first, second = [s["first"] for s in states], [s["second"] for s in states]
        torch._foreach_lerp_(first, grads, 1 - b1)
        torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, grads, grads, 1 - b2)
        for state in states:
            state["step"] += 1
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, [math.sqrt(1 - b2 ** s["step"]) for s in states])
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(first, roots)
        torch._foreach_div_(updates, [1 - b1 ** s["step"] for s in states])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        updates = [u.to(p.dtype) for u, p in zip(updates, params, strict=True)]
        torch._foreach_add_(params, updates, alpha=-group["lr"])


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: singular values end in about [0.7, 1.2].

    Args:
        matrices: (k, rows, columns).
        steps: Newton-Schulz iterations, computed in bfloat16.

    Returns:
        bfloat16 of the same shape. A zero matrix stays zero.
    """
    a, b, c = _QUINTIC
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.float().norm(dim=(1, 2), keepdim=True).clamp(min=1e-7).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
