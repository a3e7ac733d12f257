"""What a step of sampling launches: operations per layer and around them, counted, so that none creeps in."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.inference import LINEAR, cast_products
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.types import Condition, Prepared

FREE = {"promote_types", "view", "_unsafe_view", "unbind", "split", "split_with_sizes", "select", "slice", "t", "alias"}
FREE |= {"transpose", "permute", "unsqueeze", "squeeze", "expand", "detach", "as_strided", "empty", "empty_like"}


class Launches(TorchDispatchMode):
    """Counts the operations that would launch a kernel: all but views and bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def network(depth: int, dtype=torch.bfloat16, qk_norm=False) -> Sana:
    torch.manual_seed(0)
    block = partial(
        Block,
        mixer=partial(LinearAttention, qk_norm=qk_norm),
        cross=partial(CrossAttention, heads=4, qk_norm=qk_norm),
        ffn=MixFFN,
    )
    return Sana(8, 64, depth, 16, [block]).to(dtype).eval().requires_grad_(False)


def prepared(net: Sana, masked=True) -> Prepared:
    mask = torch.arange(7) < torch.tensor([[7], [4]]) if masked else None
    text = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)).to(net.final.table.dtype)
    return net.prepare(Condition(text, mask), torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64))


def latents() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 8, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.full((2, 1), 0.5)


@torch.no_grad()
def launches(depth: int, masked=True, **settings) -> Counter[str]:
    net = network(depth, **settings)
    text = prepared(net, masked)
    with Launches() as seen:
        net(*latents(), text)
    return seen.counts


@pytest.mark.parametrize(("qk_norm", "most"), [(False, 34), (True, 58)])
def test_a_layer_launches_no_more_than_this(qk_norm, most):
    """Plain torch; kernels that join operations launch fewer. Nothing in a layer depends on the mask's form."""
    layer = launches(3, qk_norm=qk_norm) - launches(2, qk_norm=qk_norm)
    assert sum(layer.values()) <= most, layer
    assert not layer.keys() & {"masked_fill_", "bitwise_not", "zeros", "clone", "cat", "index", "_local_scalar_dense"}
    bare = launches(3, masked=False, qk_norm=qk_norm) - launches(2, masked=False, qk_norm=qk_norm)
    assert bare == layer


def test_around_the_layers_no_more_than_this():
    """Tokens from latents, the row of the known time, the caption's bias, and latents from tokens."""
    one, two = launches(1), launches(2)
    around = one - (two - one)
    assert sum(around.values()) <= 20, around
    assert (around["masked_fill_"], launches(1, masked=False)["masked_fill_"]) == (1, 0)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_weights_cast_before_give_the_bits_of_autocast(qk_norm):
    net = network(2, torch.float32, qk_norm)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        text = prepared(net)
        with Launches() as before:
            want = net(*latents(), text)
        cast_products(net.blocks, LINEAR, torch.bfloat16)
        text = prepared(net)
        with Launches() as after:
            got = net(*latents(), text)
    assert torch.equal(got, want)
    saved = before.counts - after.counts
    assert saved == Counter({"_to_copy": 2 * (6 + 4)})  # per layer six matrices and four biases
    assert net.modulation.linear.weight.dtype == torch.float32  # it works outside autocast
    assert net.blocks[0].ffn.depthwise.weight.dtype == torch.float32
