"""The one optimization path that every recipe takes.

Lightning's automatic optimization knows one loss and counts its own steps; recipes here have one to three trained
modules, alternate between them, and resume by their own counters. So all of them use manual optimization through
`Recipe.optimise`: accumulate, finite check, global-norm clip, schedule, step, EMA, in this order and nowhere else.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from sana.model.frozen import Frozen
from sana.optimizer.ema import EMA
from sana.strategy.sharding import shard
from sana.types import Batch

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
Schedule = Callable[[int], float]


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; the message names update, module, samples and the first bad parameter."""


@dataclass(frozen=True)
class Optimisation:
    """How one trained module is optimised.

    Attributes:
        optimizer: called with the parameters; its `lr` is the peak that the schedule scales.
        schedule: update number (from 0) -> factor on the learning rate.
        clip_norm: bound on the global gradient norm, or None for no clipping.
        ema_decay: decay of the exponential moving average of the weights, or None to keep none.
    """

    optimizer: OptimizerFactory
    schedule: Schedule
    clip_norm: float | None = None
    ema_decay: float | None = None


def weighted_mean(losses: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of per-sample losses (b, ...) times the samples' weights (b,), over all b samples.

    The divisor is the number of samples, not the sum of their weights: so the gradient of a global batch does not
    depend on how its bad samples fall on ranks and micro-batches.
    """
    if weight is None:
        return losses.mean()
    return (losses * weight.view(-1, *[1] * (losses.ndim - 1))).mean()


def share_of_good(batch: Batch) -> Tensor | float:
    """Mean weight of a batch's samples, for reports: a mean of weighted losses divided by it is that of the good ones.
    1 where all are bad and the mean is 0."""
    if batch.weight is None:
        return 1.0
    share = batch.weight.mean()
    return torch.where(share > 0, share, 1.0)


class Recipe(LightningModule):
    """A LightningModule whose trained modules are named and optimised on one path.

    Subclasses implement `trainables` and `training_step`, which computes losses, calls `optimise`, and ends with
    `finish_batch`. The first name of `trainables` is the primary one: its updates are Lightning's `global_step`, so
    `trainer.max_steps` counts them.

    Attributes:
        updates: optimizer updates done, by name.
        samples_seen: samples consumed over all ranks; the data order continues from here.
        report: numbers of the current step for the records; replaced at every step.
        seconds: time spent in parts of the step since the records last read it.
    """

    def __init__(self, optimisation: Mapping[str, Optimisation], *, seed: int, accumulate: int = 1) -> None:
        super().__init__()
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        self.automatic_optimization = False
        self.optimisation = dict(optimisation)
        self.seed = seed
        self.accumulate = accumulate
        self.frozen = Frozen()
        self.updates = dict.fromkeys(self.optimisation, 0)
        self.samples_seen = 0
        self.report: dict[str, Tensor | float] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.ema: dict[str, EMA] = {}
        self._restored_ema: dict[str, Any] | None = None
        self._sharded = False
        self._pending = dict.fromkeys(self.optimisation, 0)
        self._uncounted = 0
        self._samples: list[str] = []

    def trainables(self) -> dict[str, nn.Module]:
        """The trained modules by name, in the order of their optimizers; the first is the primary one."""
        raise NotImplementedError

    def configure_optimizers(self) -> list[Optimizer]:
        """One optimizer per trained module, over the parameters that require gradients."""
        optimizers = []
        for name, module in self.trainables().items():
            optimizer = self.optimisation[name].optimizer([p for p in module.parameters() if p.requires_grad])
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
            optimizers.append(optimizer)
        return optimizers

    def configure_model(self) -> None:
        """Shard the trained modules where the strategy is a device mesh (FSDP2); nothing to do elsewhere."""
        if self.device_mesh is not None and not self._sharded:
            for module in self.trainables().values():
                shard(module, self.device_mesh["data_parallel"])
            self._sharded = True

    def on_fit_start(self) -> None:
        """Place frozen parts; start the moving averages from the weights in place, or from the checkpoint's."""
        self.frozen.to(self.device)
        modules = self.trainables()
        for name, plan in self.optimisation.items():
            if plan.ema_decay is None:
                continue
            self.ema[name] = EMA(modules[name], plan.ema_decay)
            if self._restored_ema is not None:
                self.ema[name].load_state_dict(self._restored_ema[name])
        self._restored_ema = None

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the enclosed block to `seconds[part]`. On CUDA it is the time of launching."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def optimise(self, name: str, loss: Tensor) -> None:
        """Backward of a loss, and an update of one module at the end of its accumulation window.

        Args:
            name: key of `trainables`.
            loss: scalar, the mean over this micro-batch.

        Raises:
            NonFiniteError: the loss or the global gradient norm is not finite. Nothing was updated.
        """
        if not torch.isfinite(loss):
            raise NonFiniteError(self._trouble(name, "loss is not finite"))
        self.manual_backward(loss / self.accumulate)
        self._pending[name] += 1
        if self._pending[name] < self.accumulate:
            return
        self._pending[name] = 0
        plan, module = self.optimisation[name], self.trainables()[name]
        parameters = [p for p in module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not torch.isfinite(norm):
            bad = next(
                (n for n, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()),
                "?",
            )
            raise NonFiniteError(self._trouble(name, f"gradient is not finite, first in {bad}"))
        if plan.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, plan.clip_norm, norm)
        index = list(self.trainables()).index(name)
        optimizer = self._optimizer(index)
        factor = plan.schedule(self.updates[name])
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if index == 0:
            optimizer.step()
        else:  # past the wrapper, so that global_step counts the primary module alone
            optimizer.optimizer.step()
        optimizer.zero_grad()
        self.updates[name] += 1
        if name in self.ema:
            self.ema[name].update()
        prefix = "train" if index == 0 else f"train/{name}"
        self.report[f"{prefix}/grad_norm"] = norm
        self.report[f"{prefix}/lr"] = optimizer.param_groups[0]["lr"]

    @contextmanager
    def averaged(self, name: str) -> Iterator[nn.Module]:
        """The named module in eval mode with its averaged weights (its own where none are kept), for evaluation."""
        module = self.trainables()[name]
        training = module.training
        module.eval()
        try:
            if name in self.ema:
                with self.ema[name].applied():
                    yield module
            else:
                yield module
        finally:
            module.train(training)

    def _optimizer(self, index: int) -> LightningOptimizer:
        optimizers = self.optimizers()
        return optimizers[index] if isinstance(optimizers, list) else optimizers  # type: ignore[return-value]

    def _trouble(self, name: str, what: str) -> str:
        shown = ", ".join(self._samples[:8])
        return f"{what} at update {self.updates[name]} of {name}; samples {shown or 'unknown'}; nothing was updated"

    def begin_batch(self, keys: list[str]) -> None:
        """Start a step: remember the samples' names for messages and clear the report."""
        self._samples = keys
        self.report = {}

    def finish_batch(self, samples: int) -> None:
        """End a step: count the samples of all ranks, once the update that used them is done.

        A run stopped within an accumulation window thus repeats the window, whose gradients are not saved.
        """
        self._uncounted += samples * self.trainer.world_size
        if not any(self._pending.values()):
            self.samples_seen += self._uncounted
            self._uncounted = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add counters and moving averages, each under its own name."""
        checkpoint["updates"] = dict(self.updates)
        checkpoint["samples_seen"] = self.samples_seen
        checkpoint["ema"] = {name: ema.state_dict() for name, ema in self.ema.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore counters and moving averages.

        Raises:
            KeyError: the checkpoint lacks one of them, with its name.
        """
        for part in ("updates", "samples_seen", "ema"):
            if part not in checkpoint:
                raise KeyError(f"checkpoint has no {part!r}; it was not written by this recipe")
        self.updates = dict(checkpoint["updates"])
        self.samples_seen = int(checkpoint["samples_seen"])
        for name, plan in self.optimisation.items():
            if plan.ema_decay is not None and name not in checkpoint["ema"]:
                raise KeyError(f"checkpoint has no moving average of {name!r}; it has {sorted(checkpoint['ema'])}")
        self._restored_ema = checkpoint["ema"]
