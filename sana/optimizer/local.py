"""The part of a tensor that this process holds."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(x: Tensor) -> Tensor:
    """The local shard of a DTensor, sharing its memory where gradients are off; any other tensor as it is.

    Optimizers work on shards because arithmetic over DTensors costs far more per call, and several of the
    foreach functions do not exist for them.
    """
    return x.to_local() if isinstance(x, DTensor) else x
