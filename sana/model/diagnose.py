"""Where a number that is not finite came from: the failed step is run again, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sana.optimizer.local import local
from sana.run.error import RunError

if TYPE_CHECKING:
    from sana.model.base import Recipe

SHOWN = 8  # samples in a message


class NonFiniteError(RunError):
    """A loss or gradient was not finite; says at which update, on which samples and times, and in which layer first."""


def diagnose(recipe: Recipe, name: str) -> NonFiniteError:
    """Find out why the gradients of a module are not finite, on all ranks together, and save the batch.

    Args:
        recipe: within its step, with the gradients still in place.
        name: of the module.

    Returns:
        What to raise. The micro-batches lie in the run's directory as ``nonfinite_<update>_rank<r>.pt``.
    """
    module = recipe.trainables()[name]
    spoilt = [n for n, p in module.named_parameters() if p.grad is not None and not local(p.grad).isfinite().all()]
    samples, whole = recipe.samples, recipe.report
    findings = [_look_at(recipe, batch) for batch in recipe.window]
    recipe.samples, recipe.report = samples, whole
    layer, keys, times = next((f for f in findings if f[0] is not None), (None, samples[:SHOWN], []))
    path = _save(recipe, name)
    said = _gather((layer, keys, times, spoilt, path), recipe.trainer.world_size)
    layer, keys, times, _, path = next((f for f in said if f[0] is not None), said[0])
    if layer is None:
        everywhere = [n for n, _ in module.named_parameters() if any(n in own for _, _, _, own, _ in said)]
        what = f"gradient is not finite, first in {everywhere[-1] if everywhere else '?'}"
    else:
        what = "loss is not finite"
    parts = [f"{what} at update {recipe.updates[name]} of {name}", f"samples {', '.join(keys) or 'unknown'}"]
    if times:
        parts.append(f"t {', '.join(f'{t:.4g}' for t in times)}")
    if layer is not None:
        parts.append(f"first bad layer {layer}")
    return NonFiniteError("; ".join([*parts, f"batch in {path}", "nothing was updated"]))


def _look_at(recipe: Recipe, batch: Any) -> tuple[str | None, list[str], list[float]]:
    """(first layer whose output is not finite, or "none: the loss itself"; samples; times) of a micro-batch; the layer
    is None where all is finite."""
    found: list[str] = []

    def watch(layer: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append(f"{layer} ({type(module).__name__})" + ("" if _finite(inputs) else ", by its input"))

        return module.register_forward_hook(hook)

    hooks = [watch(f"{n}.{m}" if m else n, part)
             for n, module in recipe.trainables().items() for m, part in module.named_modules()]  # fmt: skip
    try:
        with _replaying(recipe), recipe.trainer.precision_plugin.forward_context():
            recipe.training_step(batch, 0)
    finally:
        for handle in hooks:
            handle.remove()
    noted = recipe.noted
    losses = [value for key, value in noted.items() if key.endswith(" loss")]
    if not found and all(bool(value.isfinite()) for value in losses):
        return None, [], []
    bad = range(len(recipe.samples))
    if "loss" in noted:
        each = noted["loss"].reshape(len(recipe.samples), -1).isfinite().all(1).tolist()
        bad = [k for k, fine in enumerate(each) if not fine] or bad
    chosen = list(bad)[:SHOWN]
    times = [float(noted["t"][k].flatten()[0]) for k in chosen] if "t" in noted else []
    return found[0] if found else "none: the loss itself", [recipe.samples[k] for k in chosen], times


@contextmanager
def _replaying(recipe: Recipe) -> Iterator[None]:
    """Steps that count nothing and leave buffers as they were."""
    buffers = {name: buffer.clone() for name, buffer in recipe.named_buffers()}
    recipe.replaying = True
    try:
        yield
    finally:
        recipe.replaying = False
        for name, buffer in recipe.named_buffers():
            buffer.copy_(buffers[name])


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(local(value).isfinite().all())
    if isinstance(value, tuple | list):
        return all(map(_finite, value))
    return True


def _save(recipe: Recipe, name: str) -> str:
    """Save the micro-batches of this rank; where."""
    batches = [{k: v for k, v in vars(b).items() if k != "bad"} if is_dataclass(b) else b for b in recipe.window]
    file = f"nonfinite_{recipe.updates[name]:08d}_rank{recipe.trainer.global_rank}.pt"
    path = Path(recipe.trainer.default_root_dir) / file
    try:
        torch.save({"batches": batches, "noted": recipe.noted}, path)
    except OSError as error:
        return f"{path} (not saved: {error.strerror})"
    return str(path)


def _gather(value: Any, world: int) -> list[Any]:
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values
