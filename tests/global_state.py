"""What a process has only once. A test leaves it as it found it: otherwise another one fails or passes for it,
depending on which ran before in the same process. The environment and the level of the log are set by entry points,
for their process; they are put back after a test that called one."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
OF_PYTEST = ("PYTEST_CURRENT_TEST", "PYTEST_VERSION")
LOGGERS = ("", "sana")


def state() -> dict[str, Any]:
    """Name of each thing -> how it is now."""
    found: dict[str, Any] = {f"handler of {number.name}": signal.getsignal(number) for number in SIGNALS}
    if found["handler of SIGINT"] == signal.SIG_IGN:  # started in the background, until something wants ctrl-C
        found["handler of SIGINT"] = signal.default_int_handler
    found["working directory"] = Path.cwd()
    found["torch: threads"] = torch.get_num_threads()
    found["torch: default dtype"] = torch.get_default_dtype()
    found["torch: gradients"] = torch.is_grad_enabled()
    found["torch: deterministic algorithms"] = torch.are_deterministic_algorithms_enabled()
    found["torch: precision of fp32 products"] = torch.get_float32_matmul_precision()
    found["torch: process group"] = torch.distributed.is_available() and torch.distributed.is_initialized()
    for name in LOGGERS:
        found[f"logging: handlers of {name or 'root'!r}"] = tuple(
            h for h in logging.getLogger(name).handlers if not type(h).__module__.startswith("_pytest")
        )
    choice = sys.modules.get("sana.ops.choice")
    found["kernels"] = "auto" if choice is None else choice.chosen()
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for each thing that differs."""
    names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
    return [f"{name}: {before.get(name)!r} before, {after.get(name)!r} after" for name in names]


@contextmanager
def as_before() -> Iterator[None]:
    """Afterwards the environment and the level of the log are those of before."""
    environment, levels = dict(os.environ), [logging.getLogger(name).level for name in LOGGERS]
    try:
        yield
    finally:
        for name in {*os.environ, *environment}.difference(OF_PYTEST):
            if name not in environment:
                del os.environ[name]
            elif os.environ.get(name) != environment[name]:
                os.environ[name] = environment[name]
        for name, level in zip(LOGGERS, levels, strict=True):
            logging.getLogger(name).setLevel(level)
