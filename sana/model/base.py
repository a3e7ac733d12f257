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
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sana.checkpoint.error import CheckpointError
from sana.model.diagnose import diagnose
from sana.model.frozen import Frozen
from sana.model.resume import choose
from sana.model.state import restore
from sana.optimizer.ema import EMA
from sana.optimizer.local import local
from sana.types import Batch

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Optimisation:
    """How one trained module is optimised.

    Attributes:
        optimizer: called with the parameters, or with groups of them; its `lr` is the peak that the schedule scales.
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
        skipped: updates left out because a number was not finite, by name.
        in_a_row: of those, how many were the last ones.
        tolerance: how many in a row are left out before the run stops; 0 stops at the first.
        resume: a checkpoint or a run to go on from; `allow_partial` goes on without what it lacks.
        restored: what was taken from there, in one line; None for a new run.
        stopped: why the run ends before its time ("SIGTERM", "max_time"); None while it goes on.
        flops: operations of forward and backward so far on this rank, recomputation left out; 0 where not counted.
        noted: per-sample values of the current step ("t", "loss": (b, ...)), for messages.
        report: numbers of the current step for the records; replaced at every step.
        rates: by module, factors on the learning rate of parameters; 1 for those that are not named. Each factor is a
            group of the optimizer, that of 1 the first.
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
        self.skipped = dict.fromkeys(self.optimisation, 0)
        self.in_a_row = dict.fromkeys(self.optimisation, 0)
        self.tolerance: float = 0
        self.resume: str | Path | None = None
        self.allow_partial = False
        self.restored: str | None = None
        self.stopped: str | None = None
        self.flops = 0.0
        self.noted: dict[str, Tensor] = {}
        self.report: dict[str, Tensor | float] = {}
        self.rates: dict[str, Mapping[str, float]] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.ema: dict[str, EMA] = {}
        self.samples: list[str] = []
        self.window: list[Any] = []  # micro-batches since the last update
        self.replaying = False  # a failed step is run again to see where it failed
        self._sharded = False
        self._pending = dict.fromkeys(self.optimisation, 0)
        self._uncounted = 0

    def trainables(self) -> dict[str, nn.Module]:
        """The trained modules by name, in the order of their optimizers; the first is the primary one."""
        raise NotImplementedError

    def configure_optimizers(self) -> list[Optimizer]:
        """One optimizer per trained module, over the parameters that require gradients."""
        optimizers = []
        for name, module in self.trainables().items():
            groups = self._groups(name, module)
            optimizer = self.optimisation[name].optimizer(
                groups[1.0] if list(groups) == [1.0] else [{"params": some} for some in groups.values()]
            )
            for factor, group in zip(groups, optimizer.param_groups, strict=True):
                group["lr"] = group["lr"] * factor
                group["initial_lr"], group["factor"] = group["lr"], factor
            optimizers.append(optimizer)
        return optimizers

    def _groups(self, name: str, module: nn.Module) -> dict[float, list[nn.Parameter]]:
        """The trained parameters of a module by the factor on their rate, 1 first."""
        rates, groups = self.rates.get(name, {}), {}
        for parameter, p in module.named_parameters():
            if p.requires_grad:
                groups.setdefault(float(rates.get(parameter, 1.0)), []).append(p)
        return dict(sorted(groups.items(), key=lambda item: (item[0] != 1.0, item[0])))

    def configure_model(self) -> None:
        """Shard the trained modules where the strategy is a device mesh (FSDP2); nothing to do elsewhere."""
        if self.device_mesh is not None and not self._sharded:
            for module in self.trainables().values():
                self.trainer.strategy.shard(module)  # type: ignore[attr-defined]
            self._sharded = True

    def on_fit_start(self) -> None:
        """Place frozen parts, start the moving averages, and go on from a checkpoint if one is given.

        Raises:
            CheckpointError: there is none, or it does not fit; on all ranks.
        """
        self.frozen.to(self.device)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and hasattr(data, "accumulation"):
            self.accumulate = data.accumulation(self.trainer.world_size)
        for name in self.optimisation:
            self.start_average(name)
        if self.resume is not None:
            place, error = self.trainer.strategy.broadcast(
                choose(self.resume) if self.trainer.is_global_zero else (None, None)
            )
            if place is None:
                raise CheckpointError(error)
            self.restored = restore(self, place, partial=self.allow_partial)
            if self.trainer.is_global_zero:
                print(self.restored, flush=True)

    def start_average(self, name: str) -> None:
        """Start the moving average of a module from its weights, if it has one."""
        plan = self.optimisation[name]
        if plan.ema_decay is not None:
            self.ema[name] = EMA(self.trainables()[name], plan.ema_decay)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keep the micro-batches of an update, for the message if it fails."""
        self.window.append(batch)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the enclosed block to `seconds[part]`. On CUDA it is the time of launching."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def optimise(self, name: str, loss: Tensor, *others: str) -> None:
        """Backward of a loss, and an update of one module at the end of its accumulation window.

        All ranks decide alike: a loss that is not finite on one of them makes the gradients so on all.

        Args:
            name: key of `trainables`.
            loss: scalar, the mean over this micro-batch.
            others: modules that this loss updates too, each with its own norm and rate; they share every window.

        Raises:
            NonFiniteError: a loss or the global gradient norm is not finite, and no more of that is tolerated. Nothing
                was updated.
        """
        if self.replaying:
            self.noted[f"{name} loss"] = loss.detach()
            return
        spoil = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        self.manual_backward(loss * spoil / self.accumulate)
        for each in (name, *others):
            self._pending[each] = (self._pending[each] + 1) % self.accumulate
        if not self._pending[name]:
            for each in (name, *others):
                self._update(each)

    def _update(self, name: str) -> None:
        """Clip, schedule, step and average one module, unless its gradients are not finite."""
        plan, module = self.optimisation[name], self.trainables()[name]
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        index = list(self.trainables()).index(name)
        optimizer = self._optimizer(index)
        if not torch.isfinite(norm):
            self._leave_out(name, optimizer)
            return
        if plan.clip_norm is not None:
            factor = torch.clamp(plan.clip_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_([local(g) for g in gradients], factor)
        rate = plan.schedule(self.updates[name])
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        if index == 0:
            optimizer.step()
        else:  # past the wrapper, so that global_step counts the primary module alone
            optimizer.optimizer.step()
        optimizer.zero_grad()
        self.updates[name] += 1
        self.in_a_row[name] = 0
        if name in self.ema:
            self.ema[name].update()
        prefix = "train" if index == 0 else f"train/{name}"
        self.report[f"{prefix}/grad_norm"] = norm
        for group in optimizer.param_groups:
            own = "" if group is optimizer.param_groups[0] else f"_x{group['factor']:g}"
            self.report[f"{prefix}/lr{own}"] = group["lr"]
        if self.skipped[name]:
            self.report[f"{prefix}/skipped"] = float(self.skipped[name])

    def _leave_out(self, name: str, optimizer: LightningOptimizer) -> None:
        """Drop gradients that are not finite, or stop."""
        if self.in_a_row[name] >= self.tolerance:
            error = diagnose(self, name)
            optimizer.zero_grad()
            raise error
        optimizer.zero_grad()
        self.skipped[name] += 1
        self.in_a_row[name] += 1

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

    def begin_batch(self, keys: list[str]) -> None:
        """Start a step: remember the samples' names for messages and clear the report."""
        self.samples = keys
        self.report, self.noted = {}, {}

    def finish_batch(self, samples: int) -> None:
        """End a step: count the samples of all ranks, once the update that used them is done.

        A run stopped within an accumulation window thus repeats the window, whose gradients are not saved.
        """
        if self.replaying:
            return
        self._uncounted += samples * self.trainer.world_size
        if self.between_updates:
            self.samples_seen += self._uncounted
            self._uncounted = 0
            self.window = []

    @property
    def between_updates(self) -> bool:
        """Whether no accumulation window is open, so that the state is one that can be saved."""
        return not any(self._pending.values())
