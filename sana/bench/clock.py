"""Where the time goes: calls of named stages, measured on the device that does the work."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from sana.bench.roofline import wait


class Clock:
    """Adds up the time spent in functions that were wrapped for it.

    On CUDA with events, so that nothing waits while it measures.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        """From now on `owner.name(...)` counts for a stage."""
        setattr(owner, name, self.timed(getattr(owner, name), stage))

    def timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """The function, counted for a stage."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = self._mark()
            result = function(*args, **kwargs)
            self._marks[stage].append((start, self._mark()))
            return result

        return run

    def read(self) -> dict[str, float]:
        """Seconds per stage since the last reading."""
        wait(self.device)
        seconds = {
            stage: float(sum(a.elapsed_time(b) / 1e3 if self.device.type == "cuda" else b - a for a, b in marks))
            for stage, marks in self._marks.items()
        }
        self._marks.clear()
        return seconds

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
