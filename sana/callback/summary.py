"""What a run trains with, said once at its start, and whether all its ranks agree on it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning import Callback, Trainer

from sana.model.base import Recipe


class DifferentRanksError(RuntimeError):
    """Ranks of one run were started with different settings; the message names the first difference."""


class Summary(Callback):
    """Prints optimizer and learning rate of each trained module, of all ranks, and what saves memory; stops a run whose
    ranks differ.

    A launcher that gives ranks settings of their own (a sweep that its workers see too) trains garbage without any
    other sign of it.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Compare the settings of all ranks.

        Raises:
            DifferentRanksError: a rank has another seed or other settings of an optimizer.
        """
        own = _settings(pl_module, trainer)
        everyone = [own]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            everyone = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, own)
        for rank, other in enumerate(everyone):
            for key, value in everyone[0].items():
                if other.get(key) != value:
                    raise DifferentRanksError(f"rank {rank} has {key} {other.get(key)}, rank 0 has {value}")
        if trainer.is_global_zero:
            for name in pl_module.trainables():
                rates = ", ".join(f"{other[f'{name}.lr']:.6g}" for other in everyone)
                ranks = f" on {len(everyone)} ranks" if len(everyone) > 1 else ""
                groups = "".join(f"; {n} tensors at {lr:.6g}" for n, lr in own.get(f"{name}.groups", ()))
                print(f"{name}: {own[f'{name}.optimizer']}, lr {rates}{ranks}{groups}", flush=True)
            for line in _active(pl_module):
                print(line, flush=True)


def _active(recipe: Recipe) -> list[str]:
    """What saves memory or time in this run, found on the parts themselves."""
    lines = []
    for name, module in recipe.trainables().items():
        blocks = list(getattr(module, "blocks", []))
        compiled = sum(getattr(block, "_compiled_call_impl", None) is not None for block in blocks)
        every = getattr(module, "checkpoint_every", 0)
        recomputed = len(range(0, len(blocks), every)) if every else 0
        if compiled:
            lines.append(f"{name}: {compiled} of {len(blocks)} blocks are compiled")
        if recomputed:
            lines.append(
                f"{name}: {recomputed} of {len(blocks)} blocks are recomputed, keeping {module.checkpoint_keep}"
            )
    if recipe.frozen.place != "device":
        lines.append(f"frozen parts ({', '.join(recipe.frozen)}): {recipe.frozen.place}")
    return lines


def _settings(recipe: Recipe, trainer: Trainer) -> dict[str, Any]:
    """Numbers and texts that all ranks must share."""
    found: dict[str, Any] = {"seed": recipe.seed}
    for name, optimizer in zip(recipe.trainables(), trainer.optimizers, strict=True):
        group = optimizer.param_groups[0]
        found[f"{name}.optimizer"] = type(optimizer).__name__
        found[f"{name}.lr"] = float(group["initial_lr"])
        others = [(len(other["params"]), float(other["initial_lr"])) for other in optimizer.param_groups[1:]]
        if others:
            found[f"{name}.groups"] = others
        plain = {key: value for key, value in group.items() if isinstance(value, int | float | str | bool)}
        found.update({f"{name}.{key}": value for key, value in plain.items() if key not in ("lr", "initial_lr")})
    return found
