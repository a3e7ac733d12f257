"""Deeper and shallower networks from the weights of a trained one: functions on states, without the network itself.

SANA-1.5, arXiv:2501.18427, section 3.1 (growth) and 3.2 (pruning). A state is names -> tensors with the blocks under
``blocks.<i>.``; all else goes over as it is.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
BRANCHES = ("mixer.proj.weight", "cross.proj.weight", "ffn.point.weight")
"""The last matrix of each of a block's three branches: where all are zero (and their biases), the block is identity."""
ZERO_BIASES = ("mixer.proj.bias", "cross.proj.bias", "cross.q.bias", "cross.kv.bias")
GATED = ("table", "mixer.proj.", "cross.proj.", "ffn.point.")
"""What a zero gate sets to zero."""


@dataclass(frozen=True)
class Source:
    """What a growth makes new blocks of.

    Attributes:
        kept: S, how many blocks of the source are used: the first ones.
        depth: T, blocks of the grown network.
        get: (block, name within it) -> tensor of the source; blocks 0 to S - 1.
        normal: (block, name within it, like) -> standard normal numbers, the same whoever asks.
    """

    kept: int
    depth: int
    get: Callable[[int, str], Tensor]
    normal: Callable[[int, str, Tensor], Tensor]


class Growth(ABC):
    """How the blocks of the grown network come about.

    Attributes:
        fresh: whether some tensors are left to the network's own start.
    """

    fresh: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, block: int, name: str, source: Source) -> Tensor | None:
        """Tensor `name` of block `block`; None leaves the network's own start."""

    def check(self, kept: int, depth: int) -> None:
        """Raise ValueError where the depths do not fit this growth; any do, unless a growth says otherwise."""
        return

    def is_new(self, block: int, kept: int, depth: int) -> bool:
        """Whether a block of the grown network is none of the source's own; those follow the kept ones, unless a
        growth says otherwise."""
        return block >= kept


@dataclass(frozen=True)
class Constant(Growth):
    """Kept blocks stay, new ones follow and begin as identities: the paper's Partial Preservation Init.

    Of a new block the last matrix of each branch is ``scale`` times normal numbers (0: the block adds exactly nothing),
    weights of q/k norms are one, biases zero, the depthwise convolution 0.2 and everything else 0.02 times normal.

    Attributes:
        scale: of the last matrices. Published 0.
    """

    scale: float = 0.0

    def __call__(self, block: int, name: str, source: Source) -> Tensor | None:
        like = source.get(min(block, source.kept - 1), name)
        if block < source.kept:
            return like
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            return torch.ones_like(like)
        if name in ZERO_BIASES or (name in BRANCHES and self.scale == 0):
            return torch.zeros_like(like)
        std = self.scale if name in BRANCHES else 0.2 if name.startswith("ffn.depthwise.") else 0.02
        return source.normal(block, name, like) * std


@dataclass(frozen=True)
class Random(Growth):
    """Kept blocks stay, new ones follow and start as those of an untrained network."""

    fresh: ClassVar[bool] = True

    def __call__(self, block: int, name: str, source: Source) -> Tensor | None:
        return source.get(block, name) if block < source.kept else None


@dataclass(frozen=True)
class Cyclic(Growth):
    """Block i is source block i mod S.

    Attributes:
        zero_gate: the copies add exactly nothing.
    """

    zero_gate: bool = False

    def __call__(self, block: int, name: str, source: Source) -> Tensor | None:
        tensor = source.get(block % source.kept, name)
        return _gated(name, tensor) if self.zero_gate and block >= source.kept else tensor


@dataclass(frozen=True)
class Expand(Growth):
    """Each source block is followed by its copies: T is a multiple of S.

    Attributes:
        zero_gate: the copies add exactly nothing.
    """

    zero_gate: bool = False

    def __call__(self, block: int, name: str, source: Source) -> Tensor | None:
        ratio = source.depth // source.kept
        tensor = source.get(block // ratio, name)
        return _gated(name, tensor) if self.zero_gate and block % ratio else tensor

    def check(self, kept: int, depth: int) -> None:
        """The depth must be a multiple of the kept blocks."""
        if depth % kept:
            raise ValueError(
                f"growth: {depth} blocks are not a multiple of the {kept} kept ones, as block expansion needs"
            )

    def is_new(self, block: int, kept: int, depth: int) -> bool:
        """The first of each source block's copies is that block."""
        return block % (depth // kept) != 0


@dataclass(frozen=True)
class Progressive(Growth):
    """Kept blocks stay; each new one is the one before it plus noise, so that the last is farthest from the source.

    Attributes:
        noise: standard deviation of what a block adds. Published 0.01.
    """

    noise: float = 0.01

    def __call__(self, block: int, name: str, source: Source) -> Tensor | None:
        tensor = source.get(min(block, source.kept - 1), name)
        for i in range(source.kept, block + 1):
            tensor = tensor + self.noise * source.normal(i, name, tensor)
        return tensor


@dataclass(frozen=True)
class Interpolation(Growth):
    """Block i lies at place i S / T of the source: between its blocks ``floor(i S / T)`` and the next, linearly."""

    def __call__(self, block: int, name: str, source: Source) -> Tensor | None:
        low, rest = divmod(block * source.kept, source.depth)
        tensor = source.get(low, name)
        if not rest or low + 1 == source.kept:
            return tensor
        wide = torch.promote_types(tensor.dtype, torch.float32)
        between = torch.lerp(tensor.to(wide), source.get(low + 1, name).to(wide), rest / source.depth)
        return between.to(tensor.dtype)

    def is_new(self, block: int, kept: int, depth: int) -> bool:
        """Those at whole places are the source's; of those after the last source block, which are copies of it, the
        first is."""
        return block * kept % depth != 0


def plan_growth(
    state: Mapping[str, Tensor], kept: int, depth: int, growth: Growth, seed: int = 0
) -> dict[str, Callable[[], Tensor | None]]:
    """Names of a grown state, each with what makes its tensor; nothing is computed or read before it is called.

    Args:
        state: of the source, by this project's names; it may be a mapping that reads from a file.
        kept: S, how many of its blocks are used, the first ones. Published: 18 of 20, as new blocks after the last two
            stay near the identity.
        depth: T >= S.
        growth: one of this module's classes.
        seed: of the new numbers, which depend on it and the tensor's name alone.

    Raises:
        ValueError: the source has fewer blocks than are to be kept, or depths that do not fit.
    """
    count = depth_of(state)
    if not 1 <= kept <= count:
        raise ValueError(f"growth: {kept} blocks are to be kept, and the source has {count}")
    if depth < kept:
        raise ValueError(f"growth: {kept} blocks do not fit into {depth}; prune_depth makes a network shallower")
    growth.check(kept, depth)
    source = Source(kept, depth, lambda i, name: state[f"blocks.{i}.{name}"], _Normal(seed))
    names = [found[2] for name in state if (found := BLOCK.fullmatch(name)) and int(found[1]) == 0]
    plan: dict[str, Callable[[], Tensor | None]] = {
        name: lambda name=name: state[name] for name in state if not BLOCK.fullmatch(name)
    }
    for i in range(depth):
        for name in names:
            plan[f"blocks.{i}.{name}"] = lambda i=i, name=name: growth(i, name, source)
    return plan


def grow_depth(
    state: Mapping[str, Tensor],
    kept: int,
    depth: int,
    growth: Growth,
    *,
    fresh: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The state of a network of `depth` blocks from that of a shallower one.

    Tensors that go over unchanged are the source's own, also where a block is used twice.

    Args:
        state, kept, depth, growth, seed: see `plan_growth`.
        fresh: state of an untrained network of that depth, for what the growth leaves to its start (`Random`); without
            it such tensors are missing from the result.

    Raises:
        ValueError: see `plan_growth`.
    """
    grown: dict[str, Tensor] = {}
    for name, make in plan_growth(state, kept, depth, growth, seed).items():
        tensor = make()
        if tensor is None and fresh is not None:
            tensor = fresh[name]
        if tensor is not None:
            grown[name] = tensor
    return grown


def plan_pruning(names: Iterable[str], keep: Sequence[int]) -> dict[str, str]:
    """Names of a pruned state, each with the source's name of the same tensor.

    Args:
        names: of the source's state.
        keep: the blocks that stay, counted from 0, ascending; they keep their order.

    Raises:
        ValueError: no blocks, one that the state lacks, or not ascending.
    """
    names = list(names)
    count = depth_of(names)
    if not keep or list(keep) != sorted(set(keep)) or not 0 <= keep[0] <= keep[-1] < count:
        raise ValueError(f"pruning: keep {list(keep)} must name some of blocks 0 to {count - 1}, each once, ascending")
    places = {block: place for place, block in enumerate(keep)}
    plan = {}
    for name in names:
        found = BLOCK.fullmatch(name)
        if found is None:
            plan[name] = name
        elif int(found[1]) in places:
            plan[f"blocks.{places[int(found[1])]}.{found[2]}"] = name
    return plan


def prune_depth(state: Mapping[str, Tensor], keep: Sequence[int]) -> dict[str, Tensor]:
    """The state of a network that has only the blocks `keep` (counted from 0, ascending), in their order.

    Raises:
        ValueError: see `plan_pruning`.
    """
    return {name: state[old] for name, old in plan_pruning(state, keep).items()}


def depth_of(names: Iterable[str]) -> int:
    """Number of blocks of a state, by its names; 0 without any."""
    return 1 + max((int(found[1]) for name in names if (found := BLOCK.fullmatch(name))), default=-1)


def _gated(name: str, tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if name.startswith(GATED) else tensor


class _Normal:
    """Standard normal numbers that depend on the seed and the tensor's name, not on who asked before."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, block: int, name: str, like: Tensor) -> Tensor:
        if like.is_meta:
            return torch.empty_like(like)
        digest = hashlib.sha256(f"{self.seed}/{block}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randn(like.shape, generator=generator).to(like)
