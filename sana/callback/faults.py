"""What goes wrong while training: numbers that are not finite, losses that leap, steps that never end."""

from __future__ import annotations

import faulthandler
import math
import sys
from collections import deque
from typing import Any

from lightning import Callback, Trainer
from torch import Tensor

from sana.callback.checkpoints import Checkpoints
from sana.model.diagnose import NonFiniteError
from sana.model.resume import choose
from sana.model.state import restore

NEEDED = 16  # losses from which on a leap can be told from noise


class Faults(Callback):
    """Decides what becomes of a run with a fault. Without this callback a run stops at the first loss or gradient that
    is not finite, and that is all.

    Args:
        non_finite: "stop" ends the run with the update, samples, times and layer, and the batch saved; "skip" leaves
            such updates out (no parameter, average or counter moves, on any rank) and goes on with the next samples.
        rollback_after: after so many updates left out in a row, weights and optimizer go back to the newest checkpoint,
            and training goes on from there with the samples that come next.
        max_rollbacks: the run stops instead of going back more often.
        spike: a loss so many standard deviations over the mean of the last `window` ones is an alarm: a line on stderr
            and ``train/spike`` = 1 in the metrics. null for none.
        window: losses that are remembered.
        patience: seconds without a finished step after which the run is taken to hang: the stacks of all threads go to
            stderr and the process ends. null for never.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        non_finite: str = "stop",
        rollback_after: int = 10,
        max_rollbacks: int = 3,
        spike: float | None = 6.0,
        window: int = 128,
        patience: float | None = 3600.0,
    ) -> None:
        if non_finite not in ("stop", "skip"):
            raise ValueError(f"callback.faults.non_finite is 'stop' or 'skip', got {non_finite!r}")
        if rollback_after < 1 or max_rollbacks < 0 or window < NEEDED:
            raise ValueError(
                f"callback.faults: rollback_after must be at least 1, max_rollbacks at least 0, window at least "
                f"{NEEDED}, got {rollback_after}, {max_rollbacks} and {window}"
            )
        self.non_finite, self.rollback_after, self.max_rollbacks = non_finite, rollback_after, max_rollbacks
        self.spike, self.patience = spike, patience
        self.rollbacks = 0
        self._losses: deque[float] = deque(maxlen=window)
        self._waiting: tuple[int, Tensor] | None = None  # read a step later, so that the device is not waited for

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Say what is tolerated, and start the watch."""
        pl_module.tolerance = math.inf if self.non_finite == "skip" else 0
        self._watch()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the loss; go back if too many updates were left out.

        Raises:
            NonFiniteError: on all ranks, when going back does not help or is not possible.
        """
        self._watch()
        self._look(pl_module)
        worst = max(pl_module.in_a_row.values())
        if worst >= self.rollback_after and pl_module.between_updates:
            self._go_back(trainer, pl_module, worst)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """End the watch."""
        faulthandler.cancel_dump_traceback_later()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """End the watch."""
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        if self.patience is not None:
            faulthandler.dump_traceback_later(self.patience, exit=True, file=sys.__stderr__ or sys.stderr)

    def _look(self, recipe: Any) -> None:
        waiting, loss = self._waiting, recipe.report.get("train/loss")
        step = next(iter(recipe.updates.values()))
        self._waiting = (step, loss) if isinstance(loss, Tensor) else None
        if waiting is None or self.spike is None:
            return
        value = float(waiting[1])
        if not math.isfinite(value):
            return
        if len(self._losses) >= NEEDED:
            mean = sum(self._losses) / len(self._losses)
            spread = (sum((x - mean) ** 2 for x in self._losses) / len(self._losses)) ** 0.5
            if value > mean + self.spike * max(spread, 1e-12):
                recipe.report["train/spike"] = 1.0
                print(
                    f"alarm: the loss of update {waiting[0]} is {value:.4g}, {(value - mean) / max(spread, 1e-12):.1f} "
                    f"standard deviations over the mean {mean:.4g} of the last {len(self._losses)}",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
        self._losses.append(value)

    def _go_back(self, trainer: Trainer, recipe: Any, skipped: int) -> None:
        said = f"{skipped} updates in a row were not finite"
        keeper = next((c for c in trainer.callbacks if isinstance(c, Checkpoints)), None)  # type: ignore[attr-defined]
        if keeper is None or self.rollbacks == self.max_rollbacks:
            why = f"after {self.rollbacks} rollbacks" if keeper else "and there are no checkpoints to go back to"
            raise NonFiniteError(f"{said}, {why}; last samples {', '.join(recipe.samples[:8])}")
        keeper.finish()
        run = trainer.default_root_dir
        place, error = trainer.strategy.broadcast(choose(run) if trainer.is_global_zero else (None, ""))
        if place is None:
            raise NonFiniteError(f"{said}, and there is no checkpoint to go back to: {error}")
        seen, left_out = recipe.samples_seen, dict(recipe.skipped)
        line = restore(recipe, place)
        recipe.samples_seen, recipe.skipped = seen, left_out  # the data go on
        recipe.in_a_row = dict.fromkeys(recipe.in_a_row, 0)
        self.rollbacks += 1
        if trainer.is_global_zero:
            print(f"{said}: {line}; the samples go on from {seen:,}", file=sys.stderr, flush=True)
