"""Where kernels get the memory that they write: one place, so that tests can see what was left unwritten."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_allocate = torch.empty  # tests put NaN into what it returns


def new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of unknown content on the device of `like`, and of its type unless told otherwise."""
    return _allocate(tuple(shape), dtype=like.dtype if dtype is None else dtype, device=like.device)
