"""How much a forward pass saves for the backward pass, counted on fake tensors that hold no data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sana.types import Condition


@dataclass(frozen=True)
class Shape:
    """Size of a training micro-batch: b samples of (channels, 1, side, side) and l text tokens."""

    batch: int
    channels: int
    side: int
    text_tokens: int
    text_channels: int


def saved_bytes(
    network: Callable[[int], nn.Module], depth: int, checkpoint_every: int, shape: Shape, bf16: bool
) -> int:
    """Bytes of activations that live between forward and backward of one micro-batch.

    Two shallow copies of the network are run to tell what one block saves from what the rest does; a
    recomputed block keeps its input only, and one of them is whole at a time.

    Args:
        network: depth -> network of that depth without recomputation.
        depth: number of blocks.
        checkpoint_every: every n-th block is recomputed in the backward pass; 0: none.
        shape: of the micro-batch.
        bf16: whether autocast is on.
    """
    one, two = (_count(network, layers, shape, bf16) for layers in (1, 2))
    block, rest = two.saved - one.saved, 2 * one.saved - two.saved
    recomputed = len(range(0, depth, checkpoint_every)) if checkpoint_every else 0
    kept = rest + (depth - recomputed) * block + recomputed * one.tokens
    return kept + (block if recomputed else 0)


@dataclass(frozen=True)
class _Count:
    saved: int  # bytes in all
    tokens: int  # bytes of the tokens between two blocks


def _count(network: Callable[[int], nn.Module], depth: int, shape: Shape, bf16: bool) -> _Count:
    sizes: dict[int, int] = {}
    between: list[int] = []
    storages: list[Any] = []  # kept alive, so that no address is counted twice

    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        model: Any = network(depth)
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own and storage._cdata not in sizes:
                storages.append(storage)
                sizes[storage._cdata] = storage.nbytes()
            return tensor

        def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            between.append(arguments[0].numel() * arguments[0].element_size())

        model.blocks[0].register_forward_pre_hook(note)
        b, side = shape.batch, shape.side
        x = torch.empty(b, shape.channels, 1, side, side)
        text = torch.empty(b, shape.text_tokens, shape.text_channels)
        mask = torch.ones(b, shape.text_tokens, dtype=torch.bool)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            output = model(x, torch.empty(b, 1), Condition(text, mask))
        del output
    return _Count(sum(sizes.values()), between[0])
