"""A stand-in for CUDA graphs, and a small network that is drawn with.

It notes the operations of one call with the very tensors that they read and wrote; replaying repeats exactly those.
Like a graph it sees no Python, no new inputs and no new addresses; an operation that waits for its result is refused.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.types import Condition

TIMES = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)


class Tape(TorchDispatchMode):
    """Notes operations with the tensors that they read and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        fresh = [x.untyped_storage().data_ptr() not in given for x in outputs]  # the others are views, or written to
        self.notes.append((func, args, kwargs, outputs, fresh))
        return result

    def replay(self) -> None:
        for func, args, kwargs, outputs, fresh in self.notes:
            results = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for place, result, new in zip(outputs, results, fresh, strict=True):
                if new:
                    place.copy_(result)


class StandIn:
    """Plays `CudaCapture`; counts what is recorded."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run):
        self.count += 1
        with Tape() as tape:
            output = run()
        for note in tape.notes:  # recording computes nothing: only replaying does
            for place, new in zip(note[3], note[4], strict=True):
                if new and place.is_floating_point():
                    place.fill_(torch.nan)
        return tape.replay, output


def network(seed=0, dtype=torch.float64, text=10, **settings) -> Sana:
    torch.manual_seed(seed)
    block = partial(
        Block, mixer=partial(LinearAttention, head_dim=8), cross=partial(CrossAttention, heads=2), ffn=MixFFN
    )
    return Sana(4, 16, 3, text, [block], text_norm=1.0, **settings).to(dtype).eval().requires_grad_(False)


def prompt(net: Sana, length: int, b=2, seed=0, times: Tensor | None = TIMES, masked=True, guidance=None):
    g = torch.Generator().manual_seed(seed)
    like = net.final.table
    text = torch.randn(b, length, 10, generator=g, dtype=torch.float64).to(like)
    mask = (torch.arange(length) < torch.tensor([[length], [length // 2 + 1]])[:b]).to(like.device)
    if guidance is not None:
        guidance = torch.full((b,), guidance, dtype=like.dtype, device=like.device)
    return net.prepare(Condition(text, mask if masked else None, guidance), times)


def latents(net: Sana, b=2, h=3, w=5, seed=0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, 4, 1, h, w, generator=g, dtype=torch.float64).to(net.final.table)


def at(x: Tensor, t: float) -> Tensor:
    return torch.full((x.shape[0], 1), t, dtype=x.dtype, device=x.device)
