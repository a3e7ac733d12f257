"""Depth growth and pruning: outputs of grown networks against their source's, tensors against the published rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sana.network.growth import (
    Constant,
    Cyclic,
    Expand,
    Interpolation,
    Progressive,
    Random,
    depth_of,
    grow_depth,
    plan_growth,
    prune_depth,
)
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.types import Condition

IDENTITIES = [Constant(), Cyclic(zero_gate=True), Expand(zero_gate=True)]


def network(depth: int, width: int = 64, heads: int = 2, seed: int = 0) -> Sana:
    torch.manual_seed(seed)
    block = partial(
        Block,
        mixer=partial(LinearAttention, head_dim=32, qk_norm=True),
        cross=partial(CrossAttention, heads=heads, qk_norm=True),
        ffn=MixFFN,
    )
    return Sana(4, width, depth, 24, [block]).eval()


def output(net: Sana, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x, text = torch.randn(3, 4, 1, 5, 7, generator=g), torch.randn(3, 6, 24, generator=g)
    with torch.no_grad():
        return net(x, torch.tensor([[0.1], [0.5], [0.999]]), Condition(text, torch.ones(3, 6, dtype=torch.bool)))


def loaded(depth: int, state: Mapping[str, Tensor]) -> Sana:
    net = network(depth, seed=9)
    net.load_state_dict(dict(state))
    return net


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("growth", IDENTITIES, ids=str)
@pytest.mark.parametrize(("kept", "depth"), [(4, 8), (3, 9), (2, 2)])
def test_identities_change_no_bit(growth: Any, kept: int, depth: int, seed: int) -> None:
    source = network(4, seed=seed)
    shorter = loaded(kept, prune_depth(source.state_dict(), range(kept)))
    grown = loaded(depth, grow_depth(source.state_dict(), kept, depth, growth, seed=seed))
    assert torch.equal(output(grown), output(shorter))
    if kept == 4:
        assert torch.equal(output(grown), output(source))


def test_new_blocks_learn_from_the_first_update() -> None:
    grown = loaded(5, grow_depth(network(4).state_dict(), 3, 5, Constant()))
    x = torch.randn(2, 4, 1, 4, 4)
    grown(x, torch.full((2, 1), 0.3), Condition(torch.randn(2, 6, 24), None)).square().mean().backward()
    for block in list(grown.blocks)[3:]:
        for branch in (block.mixer.proj, block.cross.proj, block.ffn.point):
            assert branch.weight.grad is not None
            assert branch.weight.grad.abs().max() > 0


def test_constant_draws_by_the_published_rule() -> None:
    source = network(2, width=128, heads=4).state_dict()
    new = {n.removeprefix("blocks.2."): t for n, t in grow_depth(source, 2, 3, Constant(0.5)).items() if ".2." in n}
    spread = {"ffn.depthwise.weight": 0.2, "ffn.depthwise.bias": 0.2, "table": 0.02, "mixer.qkv.weight": 0.02,
              "cross.q.weight": 0.02, "cross.kv.weight": 0.02, "ffn.inverted.weight": 0.02, "ffn.inverted.bias": 0.02,
              "mixer.proj.weight": 0.5, "cross.proj.weight": 0.5, "ffn.point.weight": 0.5}  # fmt: skip
    zeros = {"mixer.proj.bias", "cross.proj.bias", "cross.q.bias", "cross.kv.bias"}
    ones = {f"{part}.{norm}.weight" for part in ("mixer", "cross") for norm in ("q_norm", "k_norm")}
    assert spread.keys() | zeros | ones == new.keys()
    for name, std in spread.items():
        n = new[name].numel()
        assert new[name].std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * n)), name
        assert abs(new[name].mean().item()) < 4 * std / math.sqrt(n), name
    assert not any(new[name].any() for name in zeros)
    assert all((new[name] == 1).all() for name in ones)


def rising(count: int) -> dict[str, Tensor]:
    """Block i of a made-up network holds i + 1 everywhere."""
    names = (
        "table",
        "mixer.proj.weight",
        "mixer.proj.bias",
        "mixer.qkv.weight",
        "cross.proj.weight",
        "ffn.point.weight",
    )
    return {f"blocks.{i}.{name}": torch.full((2, 3), i + 1.0) for i in range(count) for name in names} | {
        "final.table": torch.full((2, 3), 7.0)
    }


def firsts(state: Mapping[str, Tensor], name: str) -> list[float]:
    return [state[f"blocks.{i}.{name}"][0, 0].item() for i in range(depth_of(state))]


def test_values_of_every_other_growth() -> None:
    qkv, proj = "mixer.qkv.weight", "mixer.proj.weight"
    grown = grow_depth(rising(5), 3, 8, Cyclic())
    assert firsts(grown, qkv) == [1, 2, 3, 1, 2, 3, 1, 2]
    gated = grow_depth(rising(3), 3, 5, Cyclic(zero_gate=True))
    assert (firsts(gated, qkv), firsts(gated, proj), firsts(gated, "table")) == (
        [1, 2, 3, 1, 2], [1, 2, 3, 0, 0], [1, 2, 3, 0, 0],
    )  # fmt: skip
    grown = grow_depth(rising(3), 3, 9, Expand())
    assert firsts(grown, qkv) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    gated = grow_depth(rising(2), 2, 4, Expand(zero_gate=True))
    assert (firsts(gated, qkv), firsts(gated, "ffn.point.weight")) == ([1, 1, 2, 2], [1, 0, 2, 0])
    grown = grow_depth(rising(3), 3, 6, Interpolation())
    assert firsts(grown, qkv) == [1, 1.5, 2, 2.5, 3, 3]
    assert firsts(grow_depth(rising(4), 2, 5, Interpolation()), qkv) == pytest.approx([1, 1.4, 1.8, 2, 2])
    assert grown["final.table"][0, 0] == 7


def test_progressive_walks_away_step_by_step() -> None:
    state = {"blocks.0.x": torch.zeros(400, 100), "blocks.1.x": torch.full((400, 100), 5.0)}
    grown = grow_depth(state, 2, 5, Progressive(0.01))
    previous = grown["blocks.1.x"]
    assert (previous == 5).all()
    for i in range(2, 5):
        step = grown[f"blocks.{i}.x"] - previous
        assert step.std().item() == pytest.approx(0.01, rel=0.02)
        previous = grown[f"blocks.{i}.x"]
    total = previous - 5
    assert total.std().item() == pytest.approx(0.01 * math.sqrt(3), rel=0.02)


def test_random_takes_the_start_of_the_network() -> None:
    source, fresh = network(3).state_dict(), network(5, seed=4).state_dict()
    grown = grow_depth(source, 2, 5, Random(), fresh=fresh)
    assert grown.keys() == fresh.keys()
    for name, tensor in grown.items():
        new = name.startswith(("blocks.2.", "blocks.3.", "blocks.4."))
        assert torch.equal(tensor, (fresh if new else source)[name])
    assert depth_of(grow_depth(source, 2, 5, Random())) == 2


def test_numbers_depend_on_seed_and_name_alone() -> None:
    state = network(2).state_dict()
    one, two = (grow_depth(state, 2, 4, Constant(), seed=s) for s in (0, 1))
    plan = plan_growth(state, 2, 4, Constant(), seed=0)
    for name in reversed(plan):
        tensor = plan[name]()
        assert tensor is not None
        assert torch.equal(tensor, one[name])
    assert not torch.equal(one["blocks.3.mixer.qkv.weight"], two["blocks.3.mixer.qkv.weight"])
    assert not torch.equal(one["blocks.3.mixer.qkv.weight"], one["blocks.2.mixer.qkv.weight"])


@pytest.mark.parametrize("growth", [*IDENTITIES, Random(), Cyclic(), Expand(), Progressive(), Interpolation()], ids=str)
def test_published_sizes_without_memory(growth: Any) -> None:
    with torch.device("meta"):
        source, target = (network(depth, width=2240, heads=20).state_dict() for depth in (20, 60))
        kept = 20 if isinstance(growth, Expand) else 18
        grown = grow_depth(source, kept, 60, growth, fresh=target)
    assert {n: (t.shape, t.dtype) for n, t in grown.items()} == {n: (t.shape, t.dtype) for n, t in target.items()}


def test_a_plan_reads_nothing() -> None:
    class Counting(dict[str, Tensor]):
        read = 0

        def __getitem__(self, name: str) -> Tensor:
            self.read += 1
            return super().__getitem__(name)

    state = Counting(network(2).state_dict())
    plan = plan_growth(state, 2, 6, Constant())
    assert len(plan) == len(network(6).state_dict())
    before = state.read  # a few, by the type checks of the tests
    assert before < 6
    plan["blocks.5.table"]()
    assert state.read == before + 1


def test_pruning_keeps_the_blocks_that_it_names() -> None:
    source = network(5)
    pruned = loaded(3, prune_depth(source.state_dict(), [0, 2, 4]))
    for place, block in enumerate((0, 2, 4)):
        for name, tensor in source.blocks[block].state_dict().items():
            assert torch.equal(pruned.blocks[place].state_dict()[name], tensor)
    grown = grow_depth(source.state_dict(), 5, 10, Expand(zero_gate=True))
    back = loaded(5, prune_depth(grown, range(0, 10, 2)))
    assert torch.equal(output(back), output(source))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s: grow_depth(s, 5, 8, Constant()), "5 blocks are to be kept, and the source has 4"),
        (lambda s: grow_depth(s, 0, 8, Constant()), "0 blocks are to be kept"),
        (lambda s: grow_depth(s, 4, 3, Constant()), "4 blocks do not fit into 3; prune_depth"),
        (lambda s: grow_depth(s, 3, 8, Expand()), "8 blocks are not a multiple of the 3 kept"),
        (lambda s: prune_depth(s, [2, 1]), r"keep \[2, 1\] must name some of blocks 0 to 3"),
        (lambda s: prune_depth(s, [1, 4]), "blocks 0 to 3"),
        (lambda s: prune_depth(s, []), "blocks 0 to 3"),
        (lambda s: prune_depth({"final.table": s["final.table"]}, [0]), "pruning"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(network(4).state_dict())
