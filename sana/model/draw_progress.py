"""Progress of drawing: images done, images per second and the time left; on standard error."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


class DrawProgress:
    """A live line on a terminal, a plain line now and then elsewhere. It counts steps, so that it moves within a batch.

    Args:
        stream: where to write; None is standard error.
        plain_every: seconds between lines where the stream is no terminal.
    """

    def __init__(self, stream: TextIO | None = None, plain_every: float = 20.0) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.plain_every = plain_every
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def start(self, total: int, there: int) -> None:
        """Begin.

        Args:
            total: images that are asked for.
            there: those of them that need no drawing.
        """
        self.total, self.there, self.drawn = total, there, 0.0
        self._begin = self._shown = time.perf_counter()
        if total > there and self.stream.isatty():
            columns = (TextColumn("drawing"), BarColumn(), TextColumn("{task.fields[line]}"))
            self._bar = Progress(*columns, console=Console(file=self.stream))
            self._bar.start()
            self._task = self._bar.add_task("drawing", total=total, completed=there, line=self.line())

    def step(self, images: int, steps: int) -> None:
        """One step of so many of a batch of so many images is done."""
        self.drawn += images / steps
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.there + self.drawn, line=self.line())
        elif now - self._shown >= self.plain_every:
            self._shown = now
            print(f"drawing: {self.line()}", file=self.stream, flush=True)

    def line(self) -> str:
        """Such as "12/40 images, 0.81 images/s, ETA 0:00:35"."""
        seconds = time.perf_counter() - self._begin
        done = min(self.total, self.there + int(self.drawn + 1e-6))
        text = f"{done}/{self.total} images"
        if not self.drawn or not seconds:
            return text
        rate = self.drawn / seconds
        left = round((self.total - self.there - self.drawn) / rate)
        speed = f"{rate:.2f} images/s" if rate >= 0.1 else f"{1 / rate:.0f} s/image"
        return f"{text}, {speed}, ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"

    def close(self) -> None:
        """End the line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class OneOfMany(DrawProgress):
    """For a drawing that is a part of a longer one: its steps count, its beginning and end do not.

    Args:
        whole: progress of the longer one.
    """

    def __init__(self, whole: DrawProgress) -> None:
        self.whole = whole

    def start(self, total: int, there: int) -> None:
        """Nothing."""

    def step(self, images: int, steps: int) -> None:
        """As `DrawProgress.step`."""
        self.whole.step(images, steps)

    def close(self) -> None:
        """Nothing."""
