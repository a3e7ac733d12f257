"""How a run is told to end before its time, and what it answers.

    SIGINT (ctrl-C)                   finish the update, save, exit 130
    SIGTERM, SIGUSR1, SIGUSR2         finish the update, save, exit 75: whoever scheduled the run should start it again
    trainer.max_time                  the same
    any of them a second time         end at once

75 is EX_TEMPFAIL of sysexits.h. Under SLURM, `sbatch --signal=USR1@300 --requeue` (or submitit, which sends SIGUSR2)
warns the run before its time is up; it then also asks for its own requeue, as SLURM does not read exit codes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE, INTERRUPTED = 75, 130
SIGNALS = {signal.SIGINT: 1, signal.SIGUSR1: 2, signal.SIGUSR2: 3, signal.SIGTERM: 4}
"""Those that end a run, and the numbers by which ranks tell each other; the greatest counts."""


class Stopped(BaseException):
    """The run was told to end when it had nothing to save yet; the message is the signal's name."""


class StopSignals:
    """Notes the first signal instead of ending the process; a second one does what it did before.

    Attributes:
        code: of the signal that came, see `SIGNALS`; 0 while none did.
    """

    def __init__(self) -> None:
        self.code = 0
        self._before: dict[int, object] = {}

    def install(self) -> None:
        """Take the signals over."""
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.code = max(self.code, SIGNALS[signal.Signals(number)])
        for known in (number, signal.SIGINT):
            if known in self._before:
                signal.signal(known, signal.default_int_handler if known == signal.SIGINT else signal.SIG_DFL)


def name_of(code: int) -> str:
    """The signal's name."""
    return next(number.name for number, own in SIGNALS.items() if own == code)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Within, a signal other than ctrl-C raises `Stopped`: there is nothing to save yet."""
    before = {}

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    for number in SIGNALS:
        if number != signal.SIGINT:
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def requeue(reason: str) -> str | None:
    """Ask SLURM to start this job again; the line to print, None where there is nothing to ask.

    Args:
        reason: a signal's name or "max_time". SLURM itself requeues what it preempts by SIGTERM.
    """
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    if job is None or reason in ("SIGTERM", "SIGINT"):
        return None
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        job = f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if not re.fullmatch(r"[0-9_]+", job):
        return f"SLURM job {job!r} is no job number; not requeued"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"SLURM job {job} could not be requeued: {error}"
    return f"SLURM job {job} " + ("requeued" if done.returncode == 0 else f"not requeued: {done.stderr.strip()}")
