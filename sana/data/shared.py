"""Memory for batches that the trainer's process and the workers of its loader share, used again and again.

Fresh memory costs more than it seems: the kernel clears every page and maps it in two processes, for a batch of 64
pictures of 256 pixels several milliseconds, which is as much as decoding a few of them. Here a batch is written where
the trainer reads it, and its memory is free again once no tensor looks at it any more.
"""

from __future__ import annotations

import mmap
import os
import weakref
from itertools import count
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TOKENS = count()
_KNOWN: weakref.WeakValueDictionary[tuple[int, int], Buffers] = weakref.WeakValueDictionary()


class Buffers:
    """A number of equally large buffers, lent out by the process that makes them.

    Args:
        number: of buffers; their memory is taken when it is first written to.
        size: bytes of each, positive.

    Raises:
        OSError: the system has no such memory.
    """

    def __init__(self, number: int, size: int) -> None:
        handle = os.memfd_create("batches")  # no file below /dev/shm, which containers keep small
        os.ftruncate(handle, number * size)
        self._own(handle, number, size, (os.getpid(), next(_TOKENS)))
        self._free = list(range(number))

    def _own(self, handle: int, number: int, size: int, token: tuple[int, int]) -> None:
        self.handle, self.number, self.size, self.token = handle, number, size, token
        self._map = mmap.mmap(handle, number * size)
        self._free: list[int] = []
        _KNOWN[token] = self
        weakref.finalize(self, os.close, handle)

    def take(self) -> int | None:
        """The number of a free buffer, which whoever gets it must `lend` or `give_back`; None: all are in use."""
        return self._free.pop() if self._free else None

    def give_back(self, number: int) -> None:
        """A buffer is free."""
        self._free.append(number)

    def room(self, number: int) -> Tensor:
        """The bytes of a buffer, (size,) uint8, to be written to."""
        return torch.from_numpy(self._bytes(number))

    def lend(self, number: int) -> Tensor:
        """As `room`; the buffer is free again when no tensor has its memory any more."""
        array = self._bytes(number)
        weakref.finalize(array, self._free.append, number).atexit = False  # type: ignore[misc]
        return torch.from_numpy(array)

    def _bytes(self, number: int) -> np.ndarray:
        return np.frombuffer(self._map, np.uint8, self.size, number * self.size)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attached, (DupFd(self.handle), self.number, self.size, self.token)


class Sent:
    """An object with one tensor in a buffer, on its way from a worker: it arrives as the object itself.

    Args:
        buffers: one of them was given to fill.
        number: of that buffer.
        thing: a dataclass or the like, with the tensor as attribute `name`; if the tensor lies elsewhere, it is sent as
            any other, and the buffer is free.
        name: of the attribute.
    """

    def __init__(self, buffers: Buffers, number: int, thing: Any, name: str) -> None:
        self.buffers, self.number, self.thing, self.name = buffers, number, thing, name

    def __reduce__(self) -> tuple[Any, ...]:
        tensor: Tensor = getattr(self.thing, self.name)
        if tensor.data_ptr() != self.buffers.room(self.number).data_ptr():
            return _arrived, (self.buffers.token, self.number, self.thing)
        setattr(self.thing, self.name, None)
        how = (tensor.dtype, tuple(tensor.shape), tensor.stride())
        return _arrived, (self.buffers.token, self.number, self.thing, self.name, *how)


def _attached(handle: Any, number: int, size: int, token: tuple[int, int]) -> Buffers:
    buffers = Buffers.__new__(Buffers)
    buffers._own(handle.detach(), number, size, token)
    return buffers


def _arrived(token: tuple[int, int], number: int, thing: Any, name: str = "", *how: Any) -> Any:
    if name:
        dtype, shape, stride = how
        room = _KNOWN[token].lend(number)
        values = room[: room.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        setattr(thing, name, values.as_strided(shape, stride))
    else:
        _KNOWN[token].give_back(number)
    return thing
