"""Numbers of a run that should stay below a bound, such as the norms of gradients and of consistency tangents."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lightning import Callback, Trainer


class Alarms(Callback):
    """A line on stderr whenever a number of the report is over its bound or not finite; training goes on.

    Args:
        limits: name of a reported number -> the largest value without alarm, such as {train/grad_norm: 1000}.

    Raises:
        ValueError: no limit, or one that is not positive.
    """

    def __init__(self, limits: Mapping[str, float]) -> None:
        if not limits or min(limits.values()) <= 0:
            raise ValueError(f"callback.alarms.limits: positive bounds by name, at least one; got {dict(limits)}")
        self.limits = dict(limits)
        self.count = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare."""
        for name, limit in self.limits.items():
            value = pl_module.report.get(name)
            if value is None or float(value) <= limit:
                continue
            self.count += 1
            pl_module.report["train/alarms"] = float(self.count)
            if trainer.is_global_zero:
                print(
                    f"alarm: {name} of update {trainer.global_step} is {float(value):.4g}, over {limit:g}",
                    file=sys.stderr,
                    flush=True,
                )
