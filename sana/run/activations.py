"""How much a forward pass keeps for the backward pass, counted on fake tensors that hold no data."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sana.types import Condition


@dataclass(frozen=True)
class Shape:
    """Size of a training micro-batch: b samples of (channels, 1, side, side) and l text tokens."""

    batch: int
    channels: int
    side: int
    text_tokens: int
    text_channels: int


@dataclass(frozen=True)
class Kept:
    """Bytes of one micro-batch.

    Attributes:
        forward: alive between forward and backward.
        recomputed: what a block that is recomputed adds while its backward runs.
        whole: what `forward` would be without recomputation.
    """

    forward: int
    recomputed: int
    whole: int

    @property
    def peak(self) -> int:
        """At the deepest point of the backward pass."""
        return self.forward + self.recomputed


def kept_bytes(
    network: Callable[[int, int], nn.Module], depth: int, checkpoint_every: int, shape: Shape, bf16: bool
) -> Kept:
    """Bytes of activations of one micro-batch, the network's inputs included.

    Shallow copies of the network are run to tell what a block keeps, with and without recomputation, from what the
    rest keeps.

    Args:
        network: (depth, checkpoint_every) -> such a network.
        depth: number of blocks.
        checkpoint_every: every n-th block is recomputed in the backward pass; 0: none.
        shape: of the micro-batch.
        bf16: whether autocast is on.
    """
    one, two = (_alive(network(layers, 0), shape, bf16) for layers in (1, 2))
    block, rest = two - one, 2 * one - two
    recomputed = len(range(0, depth, checkpoint_every)) if checkpoint_every else 0
    whole = rest + depth * block
    if not recomputed:
        return Kept(whole, 0, whole)
    one, two = (_alive(network(layers, 1), shape, bf16) for layers in (1, 2))
    less = two - one
    return Kept(rest + (depth - recomputed) * block + recomputed * less, max(block - less, 0), whole)


class Storages(TorchDispatchMode):
    """Within the context, remembers the memory of every tensor that an operation makes.

    Args:
        model: whose parameters and buffers are not counted, although operations make views of them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                # An address is given again once its memory is free: the newest is the one that may be alive.
                if storage._cdata not in self._own:
                    self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        """Bytes of what was made and is still there."""
        gc.collect()
        return sum(size for storage, size in self._made.values() if not storage.expired())


def _alive(model: Any, shape: Shape, bf16: bool) -> int:
    """Bytes that are there after a forward pass, but for the weights."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model = model.to_empty(device="cpu")
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    with fake, Storages(model) as storages, torch.enable_grad():
        b, side = shape.batch, shape.side
        x = torch.empty(b, shape.channels, 1, side, side)
        text = torch.empty(b, shape.text_tokens, shape.text_channels)
        mask = torch.ones(b, shape.text_tokens, dtype=torch.bool)
        with autocast:
            output = model(x, torch.empty(b, 1), Condition(text, mask))
            alive = storages.alive()  # autocast keeps its copies of the weights until it ends, and autograd longer
    del output
    return alive
