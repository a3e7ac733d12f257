"""How a row is measured: sides in turns, on the device's own clock, until a deadline; what fails says so and goes."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sana.bench.counts import Kernel, floor, predicted
from sana.bench.roofline import wait
from sana.bench.rows import Book, Row

REPEATS = 9
GRACE = 8.0  # seconds after the deadline in which a row may still end
Run = Callable[[], Any]


@dataclass
class Bench:
    """What all cases of one run share.

    Attributes:
        device, dtype: of the weights.
        book: where rows go.
        tiny: small sizes, to try a case where there is no GPU.
        until: moment of `time.monotonic` after which nothing new starts.
        seconds: that the turns of one row may take, where `REPEATS` of them take less.
        held: models that several cases use, by name.
    """

    device: torch.device
    dtype: torch.dtype
    book: Book
    tiny: bool = False
    until: float = float("inf")
    seconds: float = 2.0
    held: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.until - time.monotonic()

    def hold(self, name: str, make: Callable[[], Any]) -> Any:
        """The model of that name, made now if it was not; it stays until `drop`."""
        if name not in self.held:
            start = time.monotonic()
            self.held[name] = make()
            say(f"  made {name} in {time.monotonic() - start:.1f} s")
        return self.held[name]

    def drop(self, *names: str) -> None:
        """Forget models, all of them if none is named."""
        for name in names or tuple(self.held):
            self.held.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Case:
    """A row to be made.

    Attributes:
        stage, name, shape: of the row.
        run: fills the row.
        seconds: that it is thought to take; it does not start with less left.
        part: what it adds to the row, where several cases fill one.
        dtype: of the row, where it is not that of the run.
    """

    stage: str
    name: str
    shape: str
    run: Callable[[Bench, Row], None]
    seconds: float = 10.0
    part: str = "measured"
    dtype: str | None = None


def say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def attempt(case: Case, bench: Bench) -> None:
    """Make a row, or say in it why there is none; rows that the book has are left as they are.

    A row that still works some seconds after the deadline is broken off.

    Raises:
        BrokenDeviceError: the device takes no more work, so the process has to be started again.
    """
    row = Row(case.stage, case.name, case.shape, case.dtype or short(bench.dtype))
    row = bench.book.rows.get(row.key, row)
    if case.part in row.facts.get("parts", ()):
        return
    if bench.left < case.seconds:
        say(f"{row.key}: {case.part} left out, {bench.left:.0f} s remain")
        return
    start = time.monotonic()
    row.facts["parts"] = [*row.facts.get("parts", ()), case.part]
    row.failed[case.part] = "the process ended in it"  # if it does
    bench.book.put(row)
    try:
        with _deadline(bench.left + GRACE):
            case.run(bench, row)
        del row.failed[case.part]
    except Exception as error:  # whatever it is, the next row does not suffer
        row.failed[case.part] = one_line(error)
    bench.book.put(row)
    times = ", ".join(f"{side} {t['median']:.3f}" for side, t in row.ms.items())
    why = "; ".join(f"{side}: {text}" for side, text in row.failed.items())
    say(f"{row.key}: {times or 'nothing'} ms ({time.monotonic() - start:.1f} s) {why}")
    check_device(bench.device)


class OutOfTimeError(RuntimeError):
    """The time of the whole run is over."""


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise `OutOfTimeError` here once so many seconds have passed."""
    if seconds == float("inf") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: Any) -> None:
        raise OutOfTimeError("broken off at the end of the time")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class BrokenDeviceError(RuntimeError):
    """A kernel has failed so that every later call on the device fails too."""


def check_device(device: torch.device) -> None:
    """Raise `BrokenDeviceError` if the device takes no more work."""
    try:
        wait(device)
        torch.ones(1, device=device).item()
    except Exception as error:
        raise BrokenDeviceError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


def measure(bench: Bench, row: Row, sides: Mapping[str, Run], repeats: int = REPEATS, inner: int = 1) -> None:
    """Time the sides in turns after two runs that are not counted; a side that fails is left out and named.

    Args:
        sides: "ours" and peers; each a function without arguments.
        repeats: of the turns, at least; more where they fit into `Bench.seconds`.
        inner: calls between two readings of the clock, for what takes microseconds.
    """
    working, cost = {}, 0.0
    for side, run in sides.items():
        try:
            for _ in range(2):
                start = time.perf_counter()
                run()
                wait(bench.device)
                spent = time.perf_counter() - start
        except Exception as error:
            row.failed[side] = one_line(error)
            say(f"  {side}: {row.failed[side]}")
            check_device(bench.device)
            continue
        working[side], cost = run, cost + spent * inner
    if not working:
        return
    budget = min(bench.seconds, max(0.0, bench.left))
    count = min(50, max(repeats, int(budget / max(cost, 1e-9))))
    times: dict[str, list[float]] = {side: [] for side in working}
    for i in range(count):
        for side in list(working)[:: 1 if i % 2 == 0 else -1]:
            times[side].append(once(working[side], inner, bench.device))
    row.take(times)


def once(run: Run, inner: int, device: torch.device) -> float:
    """Milliseconds per call, from an idle device on."""
    wait(device)
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(inner):
            run()
        return (time.perf_counter() - start) * 1e3 / inner
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(inner):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / inner


def set_floors(row: Row, count: Callable[[], Sequence[Kernel]]) -> None:
    """The roofline's figures of a row, from the kernels that its work consists of."""
    try:
        kernels = count()
        row.floor_ms, row.predicted_ms = floor(kernels) * 1e3, predicted(kernels) * 1e3
    except Exception as error:  # a time without a floor is better than none
        row.failed["floor"] = one_line(error)


def relative(out: Tensor, reference: Tensor) -> float:
    """|out - reference| / |reference| over all elements; infinite where there is a NaN."""
    out, reference = out.double(), reference.double()
    value = ((out - reference).norm() / reference.norm()).item()
    return value if value == value else float("inf")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of references: fp32 for half precision, else float64."""
    return torch.float32 if dtype.itemsize < 4 else torch.float64


def short(dtype: torch.dtype) -> str:
    """fp32, bf16, ..."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """No derivatives, and fp32 products in fp32 whatever the card offers."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def captured(run: Run, device: torch.device) -> Run:
    """The same work as one CUDA graph, on the same inputs and into the same outputs; elsewhere as it is."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
