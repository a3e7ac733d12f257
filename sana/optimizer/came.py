"""CAME: Adafactor's factored second moment, guided by a factored measure of confidence in the update.

Luo et al. 2023, "CAME: Confidence-guided Adaptive Memory Efficient Optimization", in the form used to train
SANA: only matrices are factored, all statistics are float32, and there is no bias correction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sana.optimizer.local import local

# Elements that are updated in one go. Small tensors of one shape are stacked up to here, because a step of a
# small network is otherwise all call overhead; larger ones go alone, so that a step needs the temporaries of
# one tensor.
_STACK = 2**18


class CAME(Optimizer):
    """Adam-like steps whose memory is one float32 copy of the parameters, the momentum, and rows and columns.

    Per tensor with gradient g, in float32 (b1, b2, b3 = betas; e1, e2 = eps; means over rows and columns)::

        U = g^2 + e1
        factored:      r, c <- b2-average of the row and column means of U;   u = g / sqrt(r c / mean(r))
        not factored:  v    <- b2-average of U;                               u = g / sqrt(v)
        u <- u / max(1, rms(u) / clip)
        m <- b1-average of u
        factored:      R, C <- b3-average of the means of (u - m)^2 + e2;     d = m / sqrt(R C / mean(R))
        not factored:                                                         d = m
        w <- w - lr (weight_decay w + d)

    A tensor is factored if it has two dimensions, or four with a 1x1 kernel; depthwise kernels, vectors and
    scalars are not. Without bias correction the first update of a factored tensor has rms near 0.1 / (0.9
    sqrt(1 - b3)) = 11 and it takes some 1 / (1 - b3) updates to settle: warm the learning rate up (2000
    updates in the published recipes).

    Parameters may be sharded over their first dimension (FSDP2): sums over rows are then reduced over the
    ranks, the statistics are sharded like the parameter, and the result is that of a single process.

    Args:
        params: parameters or parameter groups.
        lr: learning rate; the published 1e-4 is for a global batch of 256 (`schedule.scale_lr`).
        betas: decay of the momentum, of the second moment and of the instability, each in [0, 1).
        eps: added to the squared gradient and to the squared deviation.
        clip: largest root mean square of the update before momentum.
        weight_decay: decoupled, multiplied by lr.

    Raises:
        ValueError: an argument is out of range, a gradient is sparse, or a parameter is sharded otherwise.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        if len(betas) != 3 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"CAME takes three betas in [0, 1), got {betas}")
        if len(eps) != 2 or not all(e > 0 for e in eps):
            raise ValueError(f"CAME takes two positive eps, got {eps}")
        if not lr >= 0 or not weight_decay >= 0 or not clip > 0:
            raise ValueError(f"CAME needs lr >= 0, weight_decay >= 0 and clip > 0, got {lr}, {weight_decay} and {clip}")
        # Plain lists survive safe loading of checkpoints and compare equal after it.
        defaults = {
            "lr": lr,
            "betas": list(betas),
            "eps": list(eps),
            "clip": clip,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in _stacks([p for p in group["params"] if p.grad is not None and p.numel() > 0]):
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update k parameters of one shape, as (k, out, in), or as (k, 1, n) if they are not factored."""
        factored = is_factored(params[0])
        beta1, beta2, beta3 = group["betas"]
        eps_second, eps_instability = group["eps"]
        states = [self._state(p) for p in params]
        reduce = _Reduce(params[0])

        def average(name: str, new: Tensor, beta: float) -> Tensor:
            """Average `new` into a statistic; returns it like `new`."""
            return average_in([local(state[name]).view(new.shape[1:]) for state in states], new, beta)

        def factors(square: Tensor, suffix: str, eps: float, beta: float) -> tuple[Tensor, Tensor]:
            """Average in the means; returns (r / mean(r))^-1/2, (k, out, 1), and c^-1/2, (k, 1, in)."""
            out = params[0].shape[0]  # of the whole tensor, not of the shard
            row = average("row" + suffix, square.mean(2).add_(eps), beta)
            column = average("column" + suffix, reduce(square.sum(1)).div_(out).add_(eps), beta)
            row_mean = reduce(row.sum(1, keepdim=True)).div_(out)
            return row.div(row_mean).rsqrt_().unsqueeze(2), column.rsqrt().unsqueeze(1)

        grads = _stack([_working(_gradient(p), factored) for p in params])
        update = grads * grads
        if factored:
            by_row, by_column = factors(update, "", eps_second, beta2)
            torch.mul(grads, by_row, out=update).mul_(by_column)
        else:
            second = average("second_moment", update.add_(eps_second), beta2)
            torch.div(grads, torch.sqrt(second, out=update), out=update)
        square_norm = reduce(torch.linalg.vector_norm(update, dim=(1, 2), keepdim=True).square_())
        largest = group["clip"] * params[0].numel() ** 0.5
        update.div_(square_norm.sqrt_().div_(largest).clamp_(min=1.0))
        direction = momentum = self._average_momentum(states, update, beta1)
        if factored:
            by_row, by_column = factors(update.sub_(momentum).square_(), "_instability", eps_instability, beta3)
            direction = torch.mul(momentum, by_row, out=update).mul_(by_column)
        for p, d in zip(params, direction, strict=True):
            weight = local(p)
            if group["weight_decay"] > 0:
                weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(d.view(weight.shape), alpha=-group["lr"])

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        """The statistics of a parameter, zero at first. Those of the rows are sharded like the parameter."""
        state = self.state[p]
        if not state:
            zeros = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)
            state.update(self._new_momentum(p, zeros))
            if is_factored(p):
                for name in ("row", "row_instability"):
                    state[name] = zeros.flatten(1).sum(1)
                for name in ("column", "column_instability"):
                    state[name] = torch.zeros(p.shape[1], dtype=torch.float32, device=p.device)
            else:
                state["second_moment"] = torch.zeros_like(zeros)
        return state

    def _new_momentum(self, p: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """How the momentum of a parameter is kept, before the first update.

        Args:
            p: the parameter.
            zeros: float32 of its shape, sharded like it.
        """
        return {"momentum": zeros}

    def _average_momentum(self, states: list[dict[str, Tensor]], update: Tensor, beta: float) -> Tensor:
        """Average updates (k, out, in) into the momentum of k parameters; returns the new momentum, which must not be
        the memory that keeps it unless nothing is written into it."""
        return average_in([local(state["momentum"]).view(update.shape[1:]) for state in states], update, beta)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states keep their type where parameters have another (torch casts them to it)."""
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for saved_id, p in zip(saved_ids, params, strict=True):
            if saved_id in state_dict["state"]:
                self.state[p] = {
                    name: value.detach().to(p.device, copy=True)
                    for name, value in state_dict["state"][saved_id].items()
                }


def average_in(kept: list[Tensor], new: Tensor, beta: float) -> Tensor:
    """Average k new tensors into k kept ones, in place; returns what is kept now, like `new`.

    Args:
        kept: k tensors.
        new: (k, ...).
        beta: weight of what is kept.
    """
    stack = _stack(kept).lerp_(new, 1 - beta)
    if len(kept) > 1:
        torch._foreach_copy_(kept, list(stack.unbind()))
    return stack


def is_factored(p: Tensor) -> bool:
    """Whether CAME keeps only row and column statistics of a tensor of this shape."""
    return p.ndim == 2 or (p.ndim == 4 and p.shape[2:] == (1, 1))


class _Reduce:
    """Sum over the ranks that hold shards of a parameter, in place; of a whole parameter, nothing."""

    def __init__(self, p: Tensor) -> None:
        self.groups = []
        if isinstance(p, DTensor):
            for dim, placement in enumerate(p.placements):
                if placement.is_shard(0):
                    self.groups.append(p.device_mesh.get_group(dim))
                elif not placement.is_replicate():
                    raise ValueError(f"CAME takes parameters sharded over dimension 0, got {p.placements}")

    def __call__(self, x: Tensor) -> Tensor:
        for group in self.groups:
            dist.all_reduce(x, group=group)
        return x


def _stacks(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one shape and kind together, up to `_STACK` elements, in an order all ranks share."""
    alike = defaultdict(list)
    for p in params:
        placement = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
        alike[p.shape, p.dtype, p.device, placement].append(p)
    for same in alike.values():
        size = max(1, _STACK // same[0].numel())
        for first in range(0, len(same), size):
            yield same[first : first + size]


def _gradient(p: Tensor) -> Tensor:
    if p.grad is None or p.grad.is_sparse:
        raise ValueError(f"CAME takes dense gradients only, got another for a parameter of shape {tuple(p.shape)}")
    return local(p.grad).to(torch.float32)


def _working(x: Tensor, factored: bool) -> Tensor:
    """(out, in) of a factored tensor, (1, n) of another."""
    return x.flatten(1) if factored else x.reshape(1, -1)


def _stack(tensors: list[Tensor]) -> Tensor:
    """One tensor more deep; a view of a single one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
