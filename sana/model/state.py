"""All that a recipe needs to go on exactly where it was: gathered for a checkpoint, and put back.

Tensors go by name: ``model.<name>`` (parameters and buffers), ``ema.<module>.<parameter>``,
``optimizer.<module>.<parameter>/<state>``, ``rng.<rank>.<generator>``. Everything else is a number or a text and goes
into state.json. Learning rates and other settings are not saved: they follow from the configuration and the counters.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.names import list_names
from sana.checkpoint.pickled import read_pickle, state_in
from sana.checkpoint.run_folder import read_state
from sana.checkpoint.sharded import Stored, open_pieces
from sana.checkpoint.tensors import from_dict

if TYPE_CHECKING:
    from sana.model.base import Recipe

PARTS = ("model", "ema", "optimizer", "rng")


def tensors_of(recipe: Recipe) -> dict[str, Tensor]:
    """The live tensors of a recipe by name; those of FSDP2 as shards."""
    found = {f"model.{name}": value for name, value in recipe.state_dict().items()}
    for name, average in recipe.ema.items():
        found |= {f"ema.{name}.{parameter}": value for parameter, value in average.shadow.items()}
    for name, parameter, state in _states(recipe):
        for key, value in state.items():
            if isinstance(value, Tensor):
                found |= _inner(f"optimizer.{name}.{parameter}/{key}", value)
    return found


def facts_of(recipe: Recipe) -> dict[str, Any]:
    """What state.json says of a recipe."""
    numbers: dict[str, Any] = {}
    stateless = []
    for name, parameter, state in _states(recipe):
        if not state:
            stateless.append(f"{name}.{parameter}")
        for key, value in state.items():
            if not isinstance(value, Tensor):
                numbers[f"optimizer.{name}.{parameter}/{key}"] = value
    return {
        "updates": dict(recipe.updates),
        "samples_seen": recipe.samples_seen,
        "skipped": dict(recipe.skipped),
        "ema": {name: {"updates": average.updates} for name, average in recipe.ema.items()},
        "optimizer": {"numbers": numbers, "without_state": stateless},
        "precision": recipe.trainer.precision_plugin.state_dict(),
        "world_size": recipe.trainer.world_size,
        "strategy": type(recipe.trainer.strategy).__name__,
    }


def random_states(rank: int) -> dict[str, Tensor]:
    """States of this process's generators: the recipes' own randomness has none, but that of other code may."""
    _, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([*numbers, float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position, has_gauss, cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"rng.{rank}.{name}": value for name, value in states.items()}


def restore(recipe: Recipe, place: str | Path, *, partial: bool = False) -> str:
    """Put everything back from a checkpoint, whatever strategy and number of ranks wrote it.

    Args:
        recipe: set up by its trainer, on every rank.
        place: a checkpoint that is whole; also one file of an older run.
        partial: go on without what is missing, which then starts anew.

    Returns:
        A line that says what was restored.

    Raises:
        CheckpointError: a part or tensor is missing, left over, or of another shape, with its names.
    """
    place = Path(place)
    for optimizer in _optimizers(recipe):
        _make_states(optimizer)
    facts, stored = _open(recipe, place)
    without = set(facts.get("optimizer", {}).get("without_state", ()))
    for (name, parameter, _), (optimizer, p) in zip(_states(recipe), _owners(recipe), strict=True):
        if f"{name}.{parameter}" in without:
            optimizer.state.pop(p, None)
    wanted = {name: value for name, value in tensors_of(recipe).items() if value.numel()}
    numbers = facts.get("optimizer", {}).get("numbers", {})
    absent = [part for part in ("updates", "samples_seen") if part not in facts]
    absent += [f"updates of {name}" for name in recipe.updates if name not in facts.get("updates", {})]
    absent += [f"ema.{name}" for name in recipe.ema if name not in facts.get("ema", {})]
    missing = sorted(wanted.keys() - stored.boxes.keys())
    missing += sorted(
        at for name, parameter, state in _states(recipe) for key, value in state.items()
        if not isinstance(value, Tensor) and (at := f"optimizer.{name}.{parameter}/{key}") not in numbers
    )  # fmt: skip
    extra = sorted(name for name in stored.boxes.keys() - wanted.keys() if not name.startswith("rng."))
    shapes = sorted(
        f"{name} {tuple(stored.shapes[name])}, not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in stored.shapes and stored.shapes[name] != value.shape
    )
    _refuse(place, absent + missing if not partial else [], extra if not partial else [], shapes)

    there = {name: value for name, value in wanted.items() if name in stored.boxes}
    stored.load(there)
    recipe.updates |= {n: int(count) for n, count in facts.get("updates", {}).items() if n in recipe.updates}
    recipe.samples_seen = int(facts.get("samples_seen", 0))
    recipe.skipped |= {n: int(count) for n, count in facts.get("skipped", {}).items() if n in recipe.skipped}
    for name, average in recipe.ema.items():
        if name in facts.get("ema", {}):
            average.updates = int(facts["ema"][name]["updates"])
        else:
            recipe.start_average(name)
    for name, parameter, state in _states(recipe):
        for key, value in state.items():
            at = f"optimizer.{name}.{parameter}/{key}"
            if not isinstance(value, Tensor) and at in numbers:
                state[key] = numbers[at]
        if any(f"optimizer.{name}.{parameter}/{key}" in missing for key in state):
            state.clear()
    if facts.get("precision"):
        recipe.trainer.precision_plugin.load_state_dict(facts["precision"])
    rank = recipe.trainer.global_rank
    seeded = _set_random_states(rank, stored)
    _set_step(recipe)
    return _line(recipe, place, facts, there, missing, seeded)


def _refuse(place: Path, missing: list[str], extra: list[str], shapes: list[str]) -> None:
    parts = [("missing", missing), ("left over", extra), ("of another shape", shapes)]
    said = "; ".join(f"{what}: {list_names(names)} ({len(names)})" for what, names in parts if names)
    if said:
        hint = "" if shapes else "; allow_partial=true goes on without it"
        raise CheckpointError(f"{place}: does not fit this recipe: {said}{hint}")


def _line(
    recipe: Recipe, place: Path, facts: Mapping[str, Any], there: Mapping[str, Tensor], missing: list[str], seeded: bool
) -> str:
    """What was restored, in one line."""
    primary = next(iter(recipe.updates))
    said = [f"update {recipe.updates[primary]:,}", f"sample {recipe.samples_seen:,}"]
    for part, name in (("model", "model"), ("ema", "moving average"), ("optimizer", "optimizer")):
        count = sum(key.startswith(f"{part}.") for key in there)
        lacking = [key for key in missing if key.startswith(f"{part}.")]
        if count or lacking:
            said.append(f"{name} yes ({count} tensors)" if not lacking else f"{name} NOT ({list_names(lacking)})")
    said.append(f"random states {'yes' if seeded else 'anew (another number of ranks)'}")
    if facts.get("precision"):
        said.append("precision state yes")
    here, then = recipe.trainer.world_size, facts.get("world_size", 1)
    return f"resumed from {place}: " + ", ".join(said) + (f"; written by {then} ranks, read by {here}" * (here != then))


def _open(recipe: Recipe, place: Path) -> tuple[dict[str, Any], Stored]:
    """Facts and tensors of a checkpoint of this version, or of a file of an older one."""
    if place.is_dir():
        return read_state(place), open_pieces(place, PARTS)
    content = read_pickle(place)
    if "updates" not in content or "optimizer_states" not in content:
        raise CheckpointError(f"{place}: no checkpoint of a training run (has {', '.join(sorted(content)[:5])})")
    found = {f"model.{name}": value for name, value in state_in(content, "state_dict", place).items()}
    facts: dict[str, Any] = {key: content[key] for key in ("updates", "samples_seen") if key in content}
    averages = content.get("ema", {})
    facts["ema"] = {name: {"updates": average["updates"]} for name, average in averages.items()}
    for name, average in averages.items():
        found |= {f"ema.{name}.{parameter}": value for parameter, value in average["shadow"].items()}
    saved = [states["state"] for states in content["optimizer_states"]]
    numbers, without = {}, []
    names = [(name, parameter) for name, parameter, _ in _states(recipe)]
    for optimizer, states in zip(_optimizers(recipe), saved, strict=True):
        for i in range(sum(len(group["params"]) for group in optimizer.param_groups)):
            name, parameter = names.pop(0)
            if i not in states:
                without.append(f"{name}.{parameter}")
            for key, value in states.get(i, {}).items():
                (found if isinstance(value, Tensor) else numbers)[f"optimizer.{name}.{parameter}/{key}"] = value
    facts["optimizer"] = {"numbers": numbers, "without_state": without}
    return facts, Stored.whole(from_dict(found))


def _optimizers(recipe: Recipe) -> list[Optimizer]:
    found = recipe.optimizers(use_pl_optimizer=False)
    return found if isinstance(found, list) else [found]  # type: ignore[list-item, return-value]


def _owners(recipe: Recipe) -> Iterator[tuple[Optimizer, nn.Parameter]]:
    for optimizer in _optimizers(recipe):
        for group in optimizer.param_groups:
            for p in group["params"]:
                yield optimizer, p


def _states(recipe: Recipe) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(module, parameter, its optimizer state) in the order of the optimizers' parameters."""
    for (name, module), optimizer in zip(recipe.trainables().items(), _optimizers(recipe), strict=True):
        names = {id(p): parameter for parameter, p in module.named_parameters()}
        for group in optimizer.param_groups:
            for p in group["params"]:
                yield name, names[id(p)], optimizer.state.get(p, {})


def _make_states(optimizer: Optimizer) -> None:
    """Let an optimizer make its states, in their types and shards, by a step of rate zero without gradient."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0  # stays a tensor where it is one
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient


def _inner(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor by name; of a subclass made of plain tensors (8-bit states) those."""
    if isinstance(value, DTensor) or not is_traceable_wrapper_subclass(value):
        return {name: value}
    return {f"{name}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}  # type: ignore[attr-defined]


def _set_random_states(rank: int, stored: Stored) -> bool:
    """Whether those of this rank were there."""
    own = {
        name.rsplit(".", 1)[1]: boxes[0][3]().clone()
        for name, boxes in stored.boxes.items()
        if name.startswith(f"rng.{rank}.")
    }
    if "torch" in own:
        torch.set_rng_state(own["torch"])
    if "python" in own:
        *numbers, gauss = own["python"].tolist()
        random.setstate((3, tuple(int(n) for n in numbers), None if gauss != gauss else gauss))
    if "numpy" in own:
        *keys, position, has_gauss, cached = own["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(keys, np.uint32), int(position), int(has_gauss), cached))
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
    return "torch" in own


def _set_step(recipe: Recipe) -> None:
    """Lightning's count of updates, which `trainer.max_steps` is compared with."""
    progress = recipe.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
    progress.ready = progress.completed = recipe.updates[next(iter(recipe.updates))]
