"""One metric over several processes, with the number of one process to the last bit.

Work is cut into pieces that do not depend on how many processes there are (parts of the jackknife, batches); each
piece is computed whole by one process, and all pieces come together in their order. So sums are taken in the same
order everywhere, and 1, 2 and 3 ranks give the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Within the context metrics work in this process only, whatever group there is: for a rank that scores by itself
    while the others wait elsewhere."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def rank() -> int:
    """Of this process among those that share the work."""
    return dist.get_rank() if _shared() else 0


def world() -> int:
    """Number of processes that share the work."""
    return dist.get_world_size() if _shared() else 1


def barrier() -> None:
    """Wait until all processes that share the work are here."""
    if _shared():
        dist.barrier()


def shared(count: int, piece: Callable[[int], Any]) -> list[Any]:
    """``[piece(0), ..., piece(count - 1)]`` on every process, each computed by one of them.

    Args:
        count: of pieces.
        piece: gives something that can be pickled. An error in one process is raised in all.

    Raises:
        ValueError, RuntimeError: another process failed, by a ValueError or otherwise; with its message.
    """
    if world() == 1:
        return [piece(i) for i in range(count)]
    mine: list[tuple[int, Any]] = []
    kept: Exception | None = None
    try:
        mine = [(i, piece(i)) for i in range(rank(), count, world())]
    except Exception as error:
        kept = error
    trouble = None if kept is None else (isinstance(kept, ValueError), str(kept) or type(kept).__name__)
    everyone: list[Any] = [None] * world()
    dist.all_gather_object(everyone, (mine, trouble))
    if kept is not None:
        raise kept
    for r, (_, other) in enumerate(everyone):
        if other is not None:
            raise (ValueError if other[0] else RuntimeError)(f"rank {r}: {other[1]}")
    pieces = {i: value for part, _ in everyone for i, value in part}
    return [pieces[i] for i in range(count)]


def shared_features(images: Sequence[Any], features: Callable[[Any], Tensor], batch_size: int) -> Tensor:
    """Features (n, d) of all images on every process, batch by batch in their order."""
    starts = range(0, len(images), batch_size)
    parts = shared(len(starts), lambda i: features(images[starts[i] : starts[i] + batch_size]))
    return torch.cat(parts)


def _shared() -> bool:
    return not _ALONE.get() and dist.is_available() and dist.is_initialized()
