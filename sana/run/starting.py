"""What can be said of `init` and `start` before a run begins: without torch, so that a refusal takes a second."""

from __future__ import annotations

from typing import Any

from sana.run.compose import Composed
from sana.run.error import ConfigError
from sana.run.groups import list_options
from sana.run.importance import read_importance
from sana.run.lineage import AUTO
from sana.run.runs import find_weights

WEIGHTS = "a run, a file of weights, a diffusers folder, hf://organisation/repository or a shipped model"
MAKES = {"sana.model.start.Grow": "grown", "sana.model.start.Prune": "pruned"}


def check_start(composed: Composed) -> None:
    """Refuse a start without weights, weights that would not be used, and depths that do not fit.

    Raises:
        ConfigError: such settings; one line.
    """
    values = composed.resolved
    init, resume = values["init"], values["resume"]
    node: dict[str, Any] = values.get("start") or {}
    made = MAKES.get(str(node.get("_target_")))
    if init is not None:
        if resume not in (None, AUTO):
            raise ConfigError("init: starts a run from weights, resume goes on with one; give one of the two")
        find_weights(init, key="init")
    elif made is not None and resume in (None, AUTO):
        raise ConfigError(f"init: has to be given: the weights that are to be {made} ({WEIGHTS})")
    elif made is None and resume is None:
        unused = [key for key in ("allow_missing", "allow_extra") if node.get(key)]
        if unused:
            raise ConfigError(f"start.{unused[0]}: has no effect without init= ({composed.origin(('start',))})")
    if made is not None and (values.get("network") or {}).get("depth") is None:
        raise ConfigError("start: grows and prunes networks with a depth; this recipe has none")
    if made == "grown":
        _check_grow(composed, int(values["network"]["depth"]))
    elif made == "pruned":
        _check_prune(composed, int(values["network"]["depth"]))


def _check_grow(composed: Composed, depth: int) -> None:
    kept, growth = (composed.resolved["start"][key] for key in ("kept", "growth"))
    if not isinstance(growth, dict):
        options = ", ".join(option for option in list_options("start") if option.startswith("grow"))
        raise ConfigError(f"start.growth: {growth!r} names no growth; choose one by start=, of {options}")
    if not 1 <= kept <= depth:
        raise ConfigError(
            f"start.kept: {kept} blocks cannot stay in a network of {depth}; network.depth is what it is grown to, and "
            "start=prune makes one shallower"
        )


def _check_prune(composed: Composed, depth: int) -> None:
    node = composed.resolved["start"]
    keep, report = node["keep"], node["importance"]
    if (keep is None) == (report is None):
        what = "both are given" if keep is not None else "neither is given"
        raise ConfigError(
            f"start.importance, start.keep: {what}; give one: a report of scripts/importance.py ckpt=WEIGHTS, or the "
            "blocks that stay"
        )
    if keep is not None and len(keep) != depth:
        raise ConfigError(f"start.keep: {len(keep)} blocks are to stay, network.depth is {depth}; give as many")
    if report is not None and len(found := read_importance(report, "start.importance").values) < depth:
        raise ConfigError(f"start.importance: {report} ranks {len(found)} blocks, network.depth is {depth}")
