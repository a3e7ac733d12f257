"""The starting distribution of every parameter, by its statistics."""

from __future__ import annotations

import math
from functools import partial

import torch

from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.initialise import initialise
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN

WIDTH, TEXT, CHANNELS = 128, 96, 32


def network(**settings):
    block = partial(
        Block,
        mixer=partial(LinearAttention, qk_norm=True),
        cross=partial(CrossAttention, heads=4, qk_norm=True),
        ffn=MixFFN,
    )
    return Sana(CHANNELS, WIDTH, 2, TEXT, [block], guidance_embed=True, **settings)


def is_uniform(x, bound):
    """Within the bound, close to it, and with the variance of a uniform distribution (5 standard errors)."""
    n, x = x.numel(), x.double()
    assert x.abs().max() <= bound * (1 + 1e-6)
    assert x.abs().max() > bound * (1 - 20 / n)
    assert abs(x.var(correction=0) * 3 / bound**2 - 1) < 5 * math.sqrt(0.8 / n)


def is_normal(x, std):
    """Mean, variance and fourth moment of a normal distribution (5 standard errors)."""
    n, z = x.numel(), x.double() / std
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.pow(2).mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs(z.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)


def test_every_parameter():
    torch.manual_seed(0)
    left = dict(network().named_parameters())

    def take(name):
        return left.pop(name).detach()

    def xavier(name, fan_out, fan_in):
        weight = take(f"{name}.weight")
        assert weight.shape == (fan_out, fan_in)
        is_uniform(weight, math.sqrt(6 / (fan_in + fan_out)))

    d, hidden = WIDTH, int(2.5 * WIDTH)
    xavier("patch_embed.linear", d, CHANNELS)
    is_uniform(take("patch_embed.linear.bias"), 1 / math.sqrt(CHANNELS))
    for name in (
        "time_embed.fc1",
        "time_embed.fc2",
        "guidance_embed.fc1",
        "modulation.linear",
        "text_embed.fc1",
    ):
        is_normal(take(f"{name}.weight"), 0.02)
        assert not take(f"{name}.bias").any()
    is_normal(take("text_embed.fc2.weight"), 0.02)
    assert not take("text_embed.fc2.bias").any()
    assert not take("guidance_embed.fc2.weight").any()
    assert not take("guidance_embed.fc2.bias").any()
    assert (take("text_embed.norm.weight") == 0.01).all()
    for i in range(2):
        block = f"blocks.{i}"
        is_normal(take(f"{block}.table"), 1 / math.sqrt(d))
        xavier(f"{block}.mixer.qkv", 3 * d, d)
        xavier(f"{block}.mixer.proj", d, d)
        xavier(f"{block}.cross.q", d, d)
        xavier(f"{block}.cross.kv", 2 * d, d)
        xavier(f"{block}.cross.proj", d, d)
        for name in ("mixer.proj", "cross.q", "cross.kv", "cross.proj"):
            assert not take(f"{block}.{name}.bias").any()
        for name in ("mixer.q_norm", "mixer.k_norm", "cross.q_norm", "cross.k_norm"):
            assert (take(f"{block}.{name}.weight") == 1).all()
        is_uniform(take(f"{block}.ffn.inverted.weight"), 1 / math.sqrt(d))
        is_uniform(take(f"{block}.ffn.inverted.bias"), 1 / math.sqrt(d))
        is_uniform(take(f"{block}.ffn.depthwise.weight"), 1 / 3)
        is_uniform(take(f"{block}.ffn.depthwise.bias"), 1 / 3)
        is_uniform(take(f"{block}.ffn.point.weight"), 1 / math.sqrt(hidden))
    is_normal(take("final.table"), 1 / math.sqrt(d))
    xavier("final.linear", CHANNELS, d)
    assert not take("final.linear.bias").any()
    assert not left


def test_is_repeatable_and_needs_no_memory():
    torch.manual_seed(3)
    first = network()
    torch.manual_seed(3)
    second = network()
    with torch.no_grad():
        for p in second.parameters():
            p.fill_(float("nan"))
    torch.manual_seed(4)
    initialise(second)
    torch.manual_seed(4)
    initialise(first)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    with torch.device("meta"):
        assert all(p.is_meta for p in network().parameters())
