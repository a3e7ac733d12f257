"""How a run begins with the weights that ``init`` names: as they are, grown deeper, or pruned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.names import list_names
from sana.checkpoint.tensors import Tensors
from sana.model.base import Recipe
from sana.model.load import fill, named, read_weights
from sana.model.teacher import start_student, teacher
from sana.model.text_to_image import TextToImage
from sana.network.growth import BLOCK, Growth, depth_of, plan_growth, plan_pruning
from sana.network.importance import most_important
from sana.ops.choice import set_kernels
from sana.quant.report import report_of
from sana.run.build import build
from sana.run.error import ConfigError
from sana.run.importance import read_importance
from sana.run.records import is_first_rank
from sana.run.restore import empty_network
from sana.run.runs import find_weights
from sana.run.sidecar import file_digest

NORMS = ("mixer.q_norm.weight", "mixer.k_norm.weight", "cross.q_norm.weight", "cross.k_norm.weight")


class Taken(NamedTuple):
    """What a start makes of weights.

    Attributes:
        state: for the network, tensor by tensor when asked for.
        facts: what was done, for the run's records.
        fresh: names that are left to the network's own start.
    """

    state: Tensors
    facts: dict[str, Any]
    fresh: tuple[str, ...] = ()


class Start(ABC):
    """What is made of the weights.

    Attributes:
        allow_missing: names, or patterns such as "*_norm.weight", that they may lack; what the network was built with
            stays.
        allow_extra: names or patterns that they may have over.
    """

    allow_missing: Sequence[str]
    allow_extra: Sequence[str]

    @abstractmethod
    def take(self, state: Tensors, source: Path, depth: int) -> Taken:
        """Make a network's state of so many blocks.

        Args:
            state: of the source, by this project's names.
            source: where it lies.
            depth: blocks of the network.

        Raises:
            ValueError: depths that do not fit.
        """

    @property
    def whole(self) -> bool:
        """Whether every tensor comes from the weights, so that the network needs no start of its own."""
        return not self.allow_missing

    def rates(self, network: nn.Module) -> dict[str, float]:
        """Factors on the learning rate by parameter; 1 for those that are not named."""
        return {}


@dataclass(frozen=True)
class AsIs(Start):
    """Into a network of the same shape."""

    allow_missing: Sequence[str] = ()
    allow_extra: Sequence[str] = ()

    def take(self, state: Tensors, source: Path, depth: int) -> Taken:
        return Taken(state, {"how": "as is"})


@dataclass(frozen=True)
class Grow(Start):
    """Into a deeper network; see `sana.network.growth`.

    Attributes:
        kept: how many blocks of the source are used, the first ones.
        growth: how the blocks of the grown network come about.
        seed: of the new numbers.
        new_lr: factor on the learning rate of new blocks; also where a run is resumed.
        allow_missing, allow_extra: see `Start`, by names of the grown network.
    """

    kept: int
    growth: Growth
    seed: int = 0
    new_lr: float = 1.0
    allow_missing: Sequence[str] = ()
    allow_extra: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.new_lr > 0:
            raise ValueError(f"start.new_lr: {self.new_lr}; a factor on the learning rate is positive")

    @property
    def whole(self) -> bool:
        return not self.allow_missing and not self.growth.fresh

    def take(self, state: Tensors, source: Path, depth: int) -> Taken:
        state = state.cast(torch.float32)  # sums and new numbers are not rounded to the types of a file
        like = {n: make() for n, make in plan_growth(state.like, self.kept, depth, self.growth, self.seed).items()}
        plan = plan_growth(state, self.kept, depth, self.growth, self.seed)

        def make(name: str) -> torch.Tensor:
            tensor = plan[name]()
            assert tensor is not None
            return tensor

        there = {name: tensor for name, tensor in like.items() if tensor is not None}
        facts = {
            "how": "grown", "kept": self.kept, "depth": depth, "growth": repr(self.growth), "seed": self.seed,
            "new_blocks": self._new(depth), "new_lr": self.new_lr,
        }  # fmt: skip
        return Taken(Tensors(there, make), facts, tuple(name for name, tensor in like.items() if tensor is None))

    def rates(self, network: nn.Module) -> dict[str, float]:
        names = [name for name, _ in network.named_parameters()]
        new = set(self._new(depth_of(names)))
        if self.new_lr == 1.0:
            return {}
        found = {name: BLOCK.fullmatch(name) for name in names}
        return {name: self.new_lr for name, at in found.items() if at is not None and int(at[1]) in new}

    def _new(self, depth: int) -> list[int]:
        self.growth.check(self.kept, depth)
        return [block for block in range(depth) if self.growth.is_new(block, self.kept, depth)]


@dataclass(frozen=True)
class Prune(Start):
    """Into a shallower network, of some of the source's blocks.

    Attributes:
        keep: which, counted from 0, ascending.
        importance: or a report of scripts/importance.py on the same weights: the most important stay.
        allow_missing, allow_extra: see `Start`, by names of the pruned network.

    Raises:
        ValueError: both of keep and importance are given, or neither.
    """

    keep: Sequence[int] | None = None
    importance: str | None = None
    allow_missing: Sequence[str] = ()
    allow_extra: Sequence[str] = ()

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.importance is None):
            raise ValueError("start: pruning needs one of keep and importance")

    def take(self, state: Tensors, source: Path, depth: int) -> Taken:
        count, facts = depth_of(state), {}
        if self.keep is not None:
            keep = list(self.keep)
        else:
            report = read_importance(str(self.importance), "start.importance")
            if len(report.values) != count:
                raise ValueError(f"{self.importance} ranks {len(report.values)} blocks, {source} has {count}")
            if is_first_rank() and (own := file_digest(source)) != report.digest:
                raise ValueError(
                    f"{self.importance} is about other weights ({report.checkpoint}, digest {report.digest}) than "
                    f"init={source} (digest {own}); run scripts/importance.py on these"
                )
            keep, facts = most_important(report.values, depth), {"importance": self.importance, "digest": report.digest}
        names = plan_pruning(state, keep)
        pruned = Tensors({new: state.like[old] for new, old in names.items()}, lambda new: state[names[new]])
        return Taken(pruned, {"how": "pruned", "keep": keep, "depth": depth, **facts})


def start_model(config: Any, resume: Path | None) -> tuple[Recipe, dict[str, Any]]:
    """Build the recipe of a training configuration, with its choice of kernels and the weights that it starts from.

    The network is made without memory where every tensor comes from the weights, and filled tensor by tensor.

    Args:
        config: of a run, checked.
        resume: what the run goes on from, whose weights come later; None for a new start.

    Returns:
        The recipe, and what was done for the records, under "start"; {} where no weights were taken.

    Raises:
        ConfigError, CheckpointError: there are none, or they do not fit; one line.
    """
    set_kernels(config.get("kernels", "auto"))
    start: Start = build(config.get("start"), "start") or AsIs()
    init = config.init if resume is None else None
    empty = empty_network(config.model) if init is not None and start.whole else None
    if empty is not None and _sees_t(empty):  # what follows from the weights by a fit needs memory
        empty = None
    model = build(config.model, "model", **({} if empty is None else {"network": empty}))
    try:
        if hasattr(model, "network"):
            model.rates = {"network": start.rates(model.network)}
        facts = {} if init is None else {"start": start_from(model, init, start)}
        if facts and is_first_rank():
            print(told(facts["start"]), flush=True)
        if config.get("quant") is not None:  # of products alone: the weights above stay what they are
            model.network = build(config.quant, "quant")(model.network)
            if is_first_rank():
                print(report_of(model.network).summary(), flush=True)
        return model, facts
    except CheckpointError:
        raise
    except ValueError as error:
        raise ConfigError(f"start: {error}") from error


def start_from(module: TextToImage, name: str, start: Start) -> dict[str, Any]:
    """Give a recipe that starts anew what `start` makes of the weights that `init` names, averaged ones where there are
    any.

    Args:
        module: its network is overwritten; it may be on the meta device.
        name: see `sana.run.runs.find_weights`.
        start: what is made of them.

    Returns:
        What was done, for the records.

    Raises:
        ConfigError, CheckpointError: there are none, or they do not fit; see `sana.model.load.load_weights`.
        ValueError: depths that do not fit.
    """
    path = find_weights(name, key="init").path
    state, updates = read_weights(path)
    if isinstance(start, AsIs) and _sees_t(module.network):
        error = start_student(module.network, teacher(name, key="init"))
        how = "as is, but for the embedding of time, fitted to t itself" if error else "as is"
        facts = {"source": str(path.resolve()), "source_depth": depth_of(state), "source_updates": updates, "how": how}
        return facts | ({"time_fit_error": error} if error else {})
    depth = len(module.network.blocks)  # type: ignore[arg-type]
    taken = start.take(state, path, depth)
    own = module.network.state_dict()
    lacking = sorted(own.keys() - taken.state.keys() - set(taken.fresh))
    lacking = [key for key in lacking if not named(key, start.allow_missing)]
    if lacking and all(key.endswith(NORMS) for key in lacking):
        raise CheckpointError(
            f"{path}: has no q/k norms, as SANA 1.0, and the network has them: {list_names(lacking, 4)}. Take weights "
            "of SANA-1.5, build the network without (block.mixer.qk_norm=false block.cross.qk_norm=false), or start "
            "them at one: start.allow_missing=[*_norm.weight]"
        )
    fill(module.network, taken.state, path, (*start.allow_missing, *taken.fresh), start.allow_extra)
    left = sorted(own.keys() - taken.state.keys())
    facts = {"source": str(path.resolve()), "source_depth": depth_of(state), "source_updates": updates, **taken.facts}
    if left:
        facts["own_start"] = left
    return facts


def _sees_t(network: nn.Module) -> bool:
    """Whether a network embeds t in [0, 1] itself, as students and their teachers do, and not 1000 t."""
    return getattr(network, "time_scale", 1000.0) <= 1


def told(facts: dict[str, Any]) -> str:
    """What was done, in one line."""
    line = f"weights of {facts['source']}"
    if facts["source_updates"] is not None:
        line += f" after {facts['source_updates']:,} updates"
    if facts["how"] == "grown":
        kept, new = facts["kept"], len(facts["new_blocks"])
        line += f", grown from {kept} of {facts['source_depth']} blocks to {facts['depth']}: {new} new, "
        line += facts["growth"] + (f", at {facts['new_lr']:g} times the rate" if facts["new_lr"] != 1 else "")
    elif facts["how"] == "pruned":
        line += f", pruned from {facts['source_depth']} blocks to {', '.join(map(str, facts['keep']))}"
    if facts.get("own_start"):
        line += f"; {len(facts['own_start'])} tensors keep the network's own start"
    return line
